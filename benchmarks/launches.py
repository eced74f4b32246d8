"""Count, without a GPU, the kernels that `torch.compile` would launch on one: ours and those of diffusers.

    pip install triton==3.7.1
    python benchmarks/launches.py

Inductor generates kernels for an H100 from tensors without data, and none is run. In three minutes this counts the
launches and, from the tensors' shapes, the bytes that they read and write. It does not predict time, nor what happens
inside a library call. It needs private names of torch 2.13, a CPU build of torch, and g++.
"""

import os
import re
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import pretended_gpu  # noqa: F401 - before torch, which then accepts tensors on a GPU

# isort: split
import torch
import torch._functorch.aot_autograd as aot
import torch._inductor.config as inductor
import torch.nn.functional as F
import triton
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from torch._dynamo.device_interface import CudaInterface
from torch._inductor.compile_fx import _recursive_post_grad_passes
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget

import unet as unets
import vae as vaes
from benchmarks.networks import FAST
from pretrained.configs import unet_dict, vae_dict
from speed.fused_upsample import fuse
from training import cost

BATCH = 8
SIDE = 64  # of the latents
H100 = {"name": "NVIDIA H100", "major": 9, "minor": 0, "multi_processor_count": 132, "warp_size": 32}
H100 |= {"regs_per_multiprocessor": 65536, "max_threads_per_multi_processor": 2048, "max_threads_per_block": 1024}
H100 |= {"total_memory": 80 * 2**30, "shared_memory_per_block_optin": 232448, "gcnArchName": ""}


def pretend() -> None:
    """Have torch and triton answer inductor's queries as on an H100."""
    properties, target = SimpleNamespace(**H100), GPUTarget("cuda", 90, 32)
    triton.runtime.driver.set_active(SimpleNamespace(get_current_target=lambda: target))
    answers = {"is_available": True, "device_count": 1, "current_device": 0, "get_device_capability": (9, 0)}
    answers |= {"get_device_properties": properties, "get_device_name": H100["name"], "is_bf16_supported": True}
    for name, value in answers.items():
        setattr(torch.cuda, name, lambda *_, value=value, **__: value)
    for owner in (CudaInterface, CudaInterface.Worker):
        owner.get_device_properties = staticmethod(lambda *_: properties)
        owner.current_device = staticmethod(lambda: 0)
    CudaInterface.is_available = staticmethod(lambda: True)
    CudaInterface.get_compute_capability = staticmethod(lambda *_: 90)
    CudaInterface.raise_if_triton_unavailable = staticmethod(lambda *_: None)
    aot.preserve_rng_state = nullcontext  # there is no CUDA generator
    F.scaled_dot_product_attention = attention
    torch._C._conv_determine_backend_memory_format = layout


def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask=None, **_) -> Tensor:
    """The attention kernel of a GPU in bf16; for the decoder's head of width 512 it would be another one."""
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]


def layout(x: Tensor, weight: Tensor, _) -> torch.memory_format:
    """The memory format in which cuDNN convolves: channels_last if the input or the weight has it."""
    last = any(t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous() for t in (x, weight))
    return torch.channels_last if last else torch.contiguous_format


def count_kernels(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> dict[str, float]:
    """Have inductor generate the kernels of a graph, and count them."""
    with V.set_fake_mode(torch._guards.detect_fake_mode(inputs)):
        _recursive_post_grad_passes(graph, is_inference=True)
        lowering = GraphLowering(graph, example_inputs=inputs, is_inference=True)
        with V.set_graph_handler(lowering), DebugContext():
            lowering.run(*inputs)
            code = lowering.codegen()[0].value
            counts = {"own": 0, "own GB": 0.0, "library": 0, "library GB": 0.0}
            for node in lowering.scheduler.nodes:
                kind = "library" if node.is_extern() else "own"
                counts[kind] += node.is_extern() and getattr(node.node, "python_kernel_name", None) is not None
                counts[f"{kind} GB"] += node.get_read_write_buffers_sizes() / 1e9
    return counts | {"own": len(re.findall(r"^\s+triton_\w+\.run\(", code, re.MULTILINE))}


def count_launches(make: Callable[[], nn.Module], call: Callable[[nn.Module], Tensor], last: bool) -> dict[str, float]:
    """Kernels and bytes of one call of a network in bf16. `last`: its weights are in channels_last."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        network = make().requires_grad_(False)
        given = {}
        for key, t in [*network.named_parameters(), *network.named_buffers()]:
            order = torch.channels_last if last and t.ndim == 4 else torch.contiguous_format
            given[key] = torch.empty(t.shape, dtype=torch.bfloat16, device="cuda").contiguous(memory_format=order)
        found: dict[str, float] = {}

        def compiler(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
            found.update(count_kernels(graph, inputs))
            return aot.make_boxed_func(graph.forward)

        def whole(given: dict[str, Tensor]) -> Tensor:
            with torch.nn.utils.stateless._reparametrize_module(network, given):
                return call(network)

        settings = {"fw_compiler": compiler, "inference_compiler": compiler, "decompositions": select_decomp_table()}
        with cost.counter() as counter:
            whole(given)
        aot.aot_function(whole, **settings)(given)
    return found | {"TFLOP": counter.get_total_flops() / 1e12}


def their_unet() -> nn.Module:
    network = UNet2DConditionModel.from_config(unet_dict(unets.SD15))
    network.fuse_qkv_projections()
    return network


def predict(network: nn.Module) -> Tensor:
    x, t = torch.empty(BATCH, 4, SIDE, SIDE, device="cuda"), torch.full((BATCH,), 500, device="cuda")
    context = torch.empty(BATCH, 77, 768, device="cuda", dtype=torch.bfloat16)
    if isinstance(network, unets.UNet):
        return network(x, t, context)
    return network(x.bfloat16(), t, encoder_hidden_states=context, return_dict=False)[0]


def decode(network: nn.Module) -> Tensor:
    z = torch.empty(BATCH, 4, SIDE, SIDE, device="cuda", dtype=torch.bfloat16)
    if isinstance(network, vaes.VAE):
        return network.decode(z)
    return network.decode(z / vaes.SD15.scale, return_dict=False)[0]


def main() -> None:
    pretend()
    config = vae_dict(vaes.SD15)
    rows = {
        "UNet, ours in training": (unets.UNet, predict, False, {}),
        "UNet, ours": (lambda: fuse(unets.UNet()), predict, True, {}),
        "UNet, diffusers": (their_unet, predict, True, FAST),
        "decoder, ours not fused": (vaes.VAE, decode, False, {}),
        "decoder, ours": (lambda: fuse(vaes.VAE()), decode, True, {}),
        "decoder, diffusers": (lambda: AutoencoderKL.from_config(config), decode, True, FAST),
    }
    print(f"SD1.5 at {8 * SIDE} pixels, batch {BATCH}, bf16, no gradients: launches, and the GB they read and write\n")
    print("| | TFLOP | own kernels | GB | library calls | GB | launches | GB |\n|---|---|---|---|---|---|---|---|")
    for name, (make, call, last, flags) in rows.items():
        with inductor.patch(flags):
            found = count_launches(make, call, last)
        own, library = (found["own"], found["own GB"]), (found["library"], found["library GB"])
        cells = (found["TFLOP"], *own, *library, own[0] + library[0], own[1] + library[1])
        print(f"| {name} | {' | '.join(f'{v:.2f}' if isinstance(v, float) else str(v) for v in cells)} |", flush=True)


if __name__ == "__main__":
    main()
