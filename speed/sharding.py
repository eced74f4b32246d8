"""Sharded training (`--shard`): each process keeps a shard of the weights, gradients and optimizer state (FSDP2).

Every forward pass of a sharded network is a collective. Only passes with gradients use it, and their number is the same
on every rank; the no-grad steps, whose number is random, and all sample images use the full copy that each process has
in `inference_copy.py`.
"""

import torch.distributed as dist

from unet import ResnetBlock, TransformerBlock, UNet
from utils import distributed


def shard(unet: UNet) -> None:
    """Shard every parameter, and with it gradients and optimizer state. Gradients are summed over processes."""
    from torch.distributed.fsdp import fully_shard  # slow: a fifth of the imports of sample.py

    device = next(unet.parameters()).device.type
    mesh = dist.init_device_mesh(device, (distributed.world_size,))
    blocks = [module for module in unet.modules() if isinstance(module, (ResnetBlock, TransformerBlock))]
    for module in [*blocks, unet]:  # gathered one at a time: each block, and what is outside of blocks
        fully_shard(module, mesh=mesh)
        module.set_gradient_divide_factor(1)
        module.set_force_sum_reduction_for_comms(True)  # gloo supports no other
