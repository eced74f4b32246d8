"""Several processes of one run, one a GPU, as torchrun starts them (NCCL on GPUs, gloo on CPUs).

    torchrun --nproc-per-node 4 train.py --base sd15 --data ...

The passes of an update are shared out, and the gradients added up once an update. Noise and images of a pass follow
from its number, not from the process that takes it, so that N processes make the update that one would make. There is
no DistributedDataParallel: a loss calls the network up to forty times, and its backward pass comes `--accumulate`
times, where one sum at the end says all.

With `--shard` each process keeps its part of the weights, gradients and moments (FSDP2), and every call of the network
is one of all processes. Only calls with gradients go there, as many in each pass; the steps before them, whose number
is drawn, and all pictures come from the whole copy that each process has in `speed/inference_copy.py`.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from unet import ResnetBlock, TransformerBlock, UNet

rank = int(os.environ.get("RANK", 0))
world_size = int(os.environ.get("WORLD_SIZE", 1))
TIMEOUT = timedelta(hours=2)  # the others wait while the first one makes pictures; torchrun ends them when one dies


def set_device() -> None:
    """Make "cuda" mean this process's own GPU, before it is used. Raises ValueError where there are fewer."""
    gpus, mine = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", 0))
    if world_size == 1 or not gpus:
        return
    if mine >= gpus:
        raise ValueError(f"process {rank} of {world_size}: there are only {gpus} GPUs here; --nproc-per-node {gpus}")
    torch.cuda.set_device(mine)


@contextmanager
def process_group(device: str) -> Iterator[None]:
    """Within: the processes that torchrun started know of each other. Nothing happens where this is the only one.

    Raises ValueError when one of them is gone.
    """
    if world_size == 1:
        yield
        return
    dist.init_process_group("gloo" if device == "cpu" else "nccl", timeout=TIMEOUT)
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"process {rank} of {world_size}: another one is gone, its message says why ({reason})"
        ) from None
    dist.destroy_process_group()  # not after an error, when others may be gone: it would wait for them


def check_divisible(batch_size: int, passes: int) -> None:
    """Raises ValueError when the processes cannot share the passes of an update evenly."""
    if passes % world_size:
        images = batch_size * passes
        ways = [
            (images // n, n)
            for n in range(world_size, images + 1, world_size)
            if images % n == 0 and images // n <= batch_size
        ]
        same = f"; --batch-size {ways[0][0]} --accumulate {ways[0][1]} is as many images an update" if ways else ""
        raise ValueError(f"--accumulate {passes}: {world_size} processes cannot share it evenly; give a multiple{same}")


def micro_batches_of_this_rank(passes: int) -> range:
    """The passes of an update that this process takes."""
    return range(rank, passes, world_size)


def all_reduce(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its sum over all processes."""
    if world_size > 1:
        for work in [dist.all_reduce(t, async_op=True) for t in tensors]:
            work.wait()


def all_reduce_sum(numbers: list[float], device: str) -> list[float]:
    """Each number's sum over all processes."""
    sums = torch.tensor(numbers, dtype=torch.float64, device=device)
    all_reduce([sums])
    return sums.tolist()


def shard(unet: UNet) -> None:
    """Leave of every parameter, and so of gradients and moments, a part in each process. Gradients are summed."""
    from torch.distributed.fsdp import fully_shard  # seconds to import

    device = next(unet.parameters()).device.type
    mesh = dist.init_device_mesh(device, (world_size,))
    blocks = [module for module in unet.modules() if isinstance(module, (ResnetBlock, TransformerBlock))]
    for module in [*blocks, unet]:  # whole at a time: one block, and the little that is in none
        fully_shard(module, mesh=mesh)
        module.set_gradient_divide_factor(1)
        module.set_force_sum_reduction_for_comms(True)  # gloo knows no other


def gather(t: Tensor) -> Tensor:
    """A tensor, put together where it is in parts: then a call of all processes."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def scatter(t: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor, if `like`, of the same shape, is in parts."""
    if not hasattr(like, "full_tensor") or t.shape != like.shape:
        return t
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(t, like.device_mesh, like.placements, src_data_rank=None)


def gather_to_rank0(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors whole and on the CPU, in the first process alone; a call of all processes where they are in parts."""
    return {key: t.cpu() for key, t in ((key, gather(t)) for key, t in tensors.items()) if rank == 0}
