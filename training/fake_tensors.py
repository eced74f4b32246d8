"""Run networks on tensors that have shapes but no data, as a GPU would: allocations, norms, bf16 weights.

`torch._subclasses.FakeTensorMode` does the same ten times as slowly: `ShapeTensor` leaves out its checks and its cache.
"""

import functools
import itertools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

aten = torch.ops.aten
META = torch.device("meta")


class ShapeTensor(Tensor):
    """A tensor without data that counts as a CPU's, so that autocast and attention do what they do there."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, meta: Tensor):
        layout = {"strides": meta.stride(), "storage_offset": meta.storage_offset(), "dtype": meta.dtype}
        t = Tensor._make_wrapper_subclass(cls, meta.shape, **layout, device="cpu")
        t.meta = meta
        return t

    @classmethod
    def __torch_dispatch__(cls, f, types, args=(), kwargs=None):
        raise RuntimeError(f"{f}: a ShapeTensor works within a ShapeMode only")


class ShapeMode(TorchDispatchMode):
    """Within: new tensors are `ShapeTensor`s, and operations on them compute shapes only.

    Reading a value, as `.item()` does, raises RuntimeError. Tensors made before, or on the meta device, are left alone.
    """

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        known = {}  # id of a meta tensor -> the ShapeTensor that holds it, which in-place operations return
        kwargs = kwargs or {}
        inner, options = unwrap(args, known), {key: unwrap(value, known) for key, value in kwargs.items()}
        if not known and (kwargs.get("device") == META or not makes_tensors(f)):
            return f(*args, **kwargs)
        if makes_tensors(f):
            options["device"] = META
        inner = [x.to(META) if isinstance(x, Tensor) else x for x in inner]
        return wrap(SHAPES.get(f, f)(*inner, **options), known)


def unwrap(x, known: dict[int, ShapeTensor]):
    """An argument of an operation with the meta tensors in place of ShapeTensors, which are noted in `known`."""
    if isinstance(x, ShapeTensor):
        known[id(x.meta)] = x
        return x.meta
    return [unwrap(y, known) for y in x] if isinstance(x, list | tuple) else x


def wrap(x, known: dict[int, ShapeTensor]):
    """A result of an operation with ShapeTensors in place of meta tensors."""
    if isinstance(x, Tensor):
        return known[id(x)] if id(x) in known else ShapeTensor(x)
    return [wrap(y, known) for y in x] if isinstance(x, list | tuple) else x


@functools.cache
def makes_tensors(f) -> bool:
    """True for operations with an argument `device`, such as `torch.empty` and `Tensor.to`."""
    return any(argument.name == "device" for argument in f._schema.arguments)


def like(x: Tensor) -> Tensor:
    """A contiguous meta tensor with the shape and dtype of x."""
    return torch.empty(x.shape, dtype=x.dtype, device=META)


def group_norm(x, weight, bias, N, C, HW, groups, eps) -> tuple[Tensor, ...]:
    return like(x), x.new_empty(N, groups), x.new_empty(N, groups)


def layer_norm(x, shape, weight, bias, eps) -> tuple[Tensor, ...]:
    statistic = (*x.shape[: x.ndim - len(shape)], *[1] * len(shape))
    return like(x), x.new_empty(statistic), x.new_empty(statistic)


def group_norm_backward(dy, x, mean, std, weight, N, C, HW, groups, mask) -> list[Tensor | None]:
    return [like(t) if needed else None for t, needed in zip((x, weight, weight), mask, strict=True)]


def layer_norm_backward(dy, x, shape, mean, std, weight, bias, mask) -> list[Tensor | None]:
    return [like(t) if needed else None for t, needed in zip((x, weight, bias), mask, strict=True)]


def elementwise(f, *tensors, **options) -> Tensor:
    """f of tensors with one layout; others, and numbers, go torch's way."""
    first = tensors[0]
    if all(isinstance(t, Tensor) and t.dtype == first.dtype and t.stride() == first.stride() for t in tensors):
        if all(t.shape == first.shape for t in tensors):
            return torch.empty_like(first)
    return f(*tensors, **options)


SHAPES = {  # what torch decomposes in Python, in up to 20 milliseconds per call and most of the time of a pass
    aten.native_group_norm.default: group_norm,
    aten.native_layer_norm.default: layer_norm,
    aten.native_group_norm_backward.default: group_norm_backward,
    aten.native_layer_norm_backward.default: layer_norm_backward,
    aten.addmm.default: lambda bias, x, weight, **_: x.new_empty(x.shape[0], weight.shape[1]),
} | {
    f: functools.partial(elementwise, f)
    for f in (aten.add.Tensor, aten.mul.Tensor, aten.gelu.default, aten.gelu_backward.default)
}


class AllocationTracker(TorchDispatchMode):
    """Within: `events` records the bytes of each new storage, and the negative bytes when it is freed."""

    def __init__(self):
        super().__init__()
        self.events, self.tracked = [], set()

    @property
    def current(self) -> int:
        return sum(self.events)

    @property
    def peak(self) -> int:
        return max(itertools.accumulate(self.events))

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        output = f(*args, **(kwargs or {}))
        for t in output if isinstance(output, list | tuple) else [output]:
            if isinstance(t, Tensor):
                self.add(t)
        return output

    def add(self, t: Tensor) -> None:
        storage = getattr(t, "meta", t).untyped_storage()
        if storage._cdata not in self.tracked:
            self.tracked.add(storage._cdata)
            self.events.append(storage.nbytes())
            weakref.finalize(storage, self.remove, storage._cdata, storage.nbytes())

    def remove(self, identity: int, size: int) -> None:
        self.tracked.discard(identity)
        self.events.append(-size)


@contextmanager
def norms_in_float32() -> Iterator[None]:
    """Autocast norms to float32, forward and backward, as a GPU does and a CPU, where fake tensors live, does not."""

    def in_float32(f: Callable) -> Callable:
        def norm(*args, **kwargs):
            if torch.is_autocast_enabled("cpu"):
                args, kwargs = tree_map_only(Tensor, Tensor.float, (args, kwargs))
            return f(*args, **kwargs)

        return norm

    group_norm, layer_norm = in_float32(F.group_norm), in_float32(F.layer_norm)
    with patch.object(F, "group_norm", group_norm), patch.object(F, "layer_norm", layer_norm):
        yield


def to_bf16(module: nn.Module) -> None:
    """Replace the parameters by frozen ones in bf16; `Module.to` cannot convert tensors without data."""
    for part in module.modules():
        for name, p in list(part.named_parameters(recurse=False)):
            setattr(part, name, nn.Parameter(torch.empty_like(p, dtype=torch.bfloat16), requires_grad=False))
