"""Run networks on fake tensors, which have shapes but no data, as a GPU would: allocations, norms, bf16 weights."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


class AllocationTracker(TorchDispatchMode):
    """Within: tracks the bytes of all live tensors (`current`) and their maximum (`peak`)."""

    def __init__(self):
        super().__init__()
        self.current, self.peak, self.tracked = 0, 0, set()

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        output = f(*args, **(kwargs or {}))
        tree_map_only(Tensor, self.add, output)
        return output

    def add(self, t: Tensor) -> None:
        storage = t.untyped_storage()
        if storage._cdata not in self.tracked:
            self.tracked.add(storage._cdata)
            self.current += storage.nbytes()
            self.peak = max(self.peak, self.current)
            weakref.finalize(storage, self.remove, storage._cdata, storage.nbytes())

    def remove(self, identity: int, size: int) -> None:
        self.tracked.discard(identity)
        self.current -= size


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
    """Replace the parameters by frozen ones in bf16; `Module.to` cannot convert fake tensors."""
    for part in module.modules():
        for name, p in list(part.named_parameters(recurse=False)):
            setattr(part, name, nn.Parameter(torch.empty_like(p, dtype=torch.bfloat16), requires_grad=False))
