"""Our networks in other CPU engines: OpenVINO, by conversion of our module, and ONNX Runtime, from torch's ONNX export.

Both are optional packages: pip install openvino; pip install onnx onnxscript onnxruntime.
"""

import importlib.util
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn

PACKAGES = {"openvino": ("openvino",), "onnxruntime": ("onnx", "onnxscript", "onnxruntime")}


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
    """A network in an engine, for the sizes of `inputs`; called like the network. `seconds`: conversion and start-up.

    bf16 is OpenVINO's own; weights and inputs are float32. ONNX Runtime has few bf16 kernels on CPUs: ValueError.
    """

    def __init__(self, engine: str, network: nn.Module, inputs: tuple[Tensor, ...], dtype: torch.dtype):
        if dtype != torch.float32 and engine == "onnxruntime":
            raise ValueError("onnxruntime computes in float32 only on a CPU; try --engines openvino")
        module, began = Positional(network).eval(), time.perf_counter()
        inputs = tuple(map(in_float32, inputs))
        with torch.no_grad():
            self.infer = {"openvino": openvino, "onnxruntime": onnxruntime}[engine](module, inputs, dtype)
        self.seconds = time.perf_counter() - began

    def __call__(self, x: Tensor, t: Tensor | int, context: Tensor, **more: Tensor) -> Tensor:
        t = torch.as_tensor(t).expand(len(x))
        return self.infer(*map(in_float32, (x, t, context, *more.values())))

    def decode(self, z: Tensor) -> Tensor:
        return self.infer(in_float32(z))


def in_float32(x: Tensor) -> Tensor:
    """x contiguous, and in float32 unless it holds integers: numpy has no bf16."""
    return (x.float() if x.is_floating_point() else x).contiguous()


def openvino(module: nn.Module, inputs: tuple[Tensor, ...], dtype: torch.dtype):
    import openvino

    precision = "bf16" if dtype == torch.bfloat16 else "f32"
    settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    settings["PERFORMANCE_HINT"] = "LATENCY"
    model = openvino.convert_model(module, example_input=inputs, input=[tuple(x.shape) for x in inputs])
    compiled = openvino.Core().compile_model(model, "CPU", settings)
    return lambda *given: torch.from_numpy(compiled([x.numpy() for x in given])[0])


def onnxruntime(module: nn.Module, inputs: tuple[Tensor, ...], dtype: torch.dtype):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "network.onnx")
        torch.onnx.export(module, inputs, path, dynamo=True, external_data=True, verbose=False)
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [x.name for x in session.get_inputs()]

    def infer(*given: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: x.numpy() for name, x in zip(names, given, strict=True)})[0])

    return infer
