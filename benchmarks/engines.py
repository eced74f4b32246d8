"""Our networks in other CPU engines: OpenVINO, by conversion of our module, ONNX Runtime, from torch's ONNX export, and
what torch.compile's inductor generates, with frozen weights, compiled ahead of time (it needs a C++ compiler).

The first two are optional packages: pip install openvino; pip install onnx onnxscript onnxruntime.
"""

import copy
import importlib.util
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

PACKAGES = {"openvino": ("openvino",), "onnxruntime": ("onnx", "onnxscript", "onnxruntime"), "inductor": ()}


def missing(engine: str) -> list[str]:
    """Packages that an engine needs and that are not installed."""
    return [name for name in PACKAGES[engine] if importlib.util.find_spec(name) is None]


class Positional(nn.Module):
    """A UNet or the decoder of an autoencoder with positional arguments, as both converters need them."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.network(*inputs) if len(inputs) > 1 else self.network.decode(*inputs)


class Engine:
    """A network in an engine, one of `ENGINES`, for the sizes of `inputs`; called like the network.

    `conversion`: seconds to write the engine's own files, once per network. `startup`: seconds from these to a network
    that has run once, less a second run. bf16 is OpenVINO's own; weights and inputs are float32. ONNX Runtime has few
    bf16 kernels on CPUs: ValueError.
    """

    def __init__(self, engine: str, network: nn.Module, inputs: tuple[Tensor, ...], dtype: torch.dtype):
        if dtype != torch.float32 and engine == "onnxruntime":
            raise ValueError("onnxruntime computes in float32 only on a CPU; try --engines openvino")
        convert, load, suffix = ENGINES[engine]
        module, inputs = Positional(network).eval(), tuple(map(in_float32, inputs))
        with tempfile.TemporaryDirectory() as folder:
            began, path = time.perf_counter(), Path(folder, f"network.{suffix}")
            with torch.no_grad():
                convert(module, inputs, path, dtype)
            self.conversion = time.perf_counter() - began
            self.startup, self.infer = startup(lambda: load(path, dtype), lambda infer: infer(*inputs))

    def __call__(self, x: Tensor, t: Tensor | int, context: Tensor, **more: Tensor) -> Tensor:
        t = torch.as_tensor(t).expand(len(x))
        return self.infer(*map(in_float32, (x, t, context, *more.values())))

    def decode(self, z: Tensor) -> Tensor:
        return self.infer(in_float32(z))


def in_float32(x: Tensor) -> Tensor:
    """x contiguous, and in float32 unless it holds integers: numpy has no bf16."""
    return (x.float() if x.is_floating_point() else x).contiguous()


def startup(load: Callable[[], Callable], call: Callable) -> tuple[float, Callable]:
    """Seconds to load a network and to call it for the first time, less those of a second call; and the network."""
    began = time.perf_counter()
    network = load()
    call(network)
    first = time.perf_counter() - began
    began = time.perf_counter()
    call(network)
    return max(0.0, first - (time.perf_counter() - began)), network


def to_openvino(module: nn.Module, inputs: tuple[Tensor, ...], path: Path, dtype: torch.dtype) -> None:
    import openvino

    model = openvino.convert_model(module, example_input=inputs, input=[tuple(x.shape) for x in inputs])
    openvino.save_model(model, path, compress_to_fp16=False)


def openvino(path: Path, dtype: torch.dtype) -> Callable:
    import openvino

    precision = "bf16" if dtype == torch.bfloat16 else "f32"
    settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    settings["PERFORMANCE_HINT"] = "LATENCY"
    compiled = openvino.Core().compile_model(path, "CPU", settings)
    return lambda *given: torch.from_numpy(compiled([x.numpy() for x in given])[0])


def to_onnx(module: nn.Module, inputs: tuple[Tensor, ...], path: Path, dtype: torch.dtype) -> None:
    torch.onnx.export(module, inputs, path, dynamo=True, external_data=True, verbose=False)


def onnxruntime(path: Path, dtype: torch.dtype) -> Callable:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [x.name for x in session.get_inputs()]

    def infer(*given: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: x.numpy() for name, x in zip(names, given, strict=True)})[0])

    return infer


def to_inductor(module: nn.Module, inputs: tuple[Tensor, ...], path: Path, dtype: torch.dtype) -> None:
    module = copy.deepcopy(module).to(dtype)
    program = torch.export.export(module, tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs))
    settings = {"freezing": True}  # weights as constants, in the layout that the kernels want
    torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=settings)


def inductor(path: Path, dtype: torch.dtype) -> Callable:
    compiled = torch._inductor.aoti_load_package(str(path))
    return lambda *given: compiled(*(x.to(dtype) if x.is_floating_point() else x for x in given))


ENGINES = {  # conversion, loading, suffix of the file
    "openvino": (to_openvino, openvino, "xml"),
    "onnxruntime": (to_onnx, onnxruntime, "onnx"),
    "inductor": (to_inductor, inductor, "pt2"),
}
