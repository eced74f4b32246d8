"""Several processes of one run, one per GPU, as torchrun starts them (NCCL on GPUs, gloo on CPUs).

    torchrun --nproc-per-node 4 train.py --base sd15 --data ...

The micro-batches of an update are split between processes, and gradients are all-reduced once per update. Noise and
images of a micro-batch follow from its number, not from its process, so N processes make the same update as one.
DistributedDataParallel is not used: a loss calls the network up to forty times and backward runs once per micro-batch,
while one all-reduce per update suffices. Sharding of the weights (`--shard`) is in `speed/sharding.py`.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

rank = int(os.environ.get("RANK", 0))
world_size = int(os.environ.get("WORLD_SIZE", 1))
TIMEOUT = timedelta(hours=2)  # other ranks wait while rank 0 samples images; torchrun ends them when one dies


def is_main_process() -> bool:
    """True on rank 0, the only process that writes files."""
    return rank == 0


def set_device() -> None:
    """Make "cuda" mean this process's own GPU, before it is used. Raises ValueError if there are too few GPUs."""
    gpus, local_rank = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", 0))
    if world_size == 1 or not gpus:
        return
    if local_rank >= gpus:
        raise ValueError(f"process {rank} of {world_size}: only {gpus} GPUs here; use --nproc-per-node {gpus}")
    torch.cuda.set_device(local_rank)


@contextmanager
def process_group(device: str) -> Iterator[None]:
    """Join the processes that torchrun started; does nothing if there is only one.

    Raises ValueError when another process dies.
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
        message = f"process {rank} of {world_size}: another one is gone; its message says why ({reason})"
        raise ValueError(message) from None
    dist.destroy_process_group()  # not after an error, when others may be gone: it would wait for them


def check_divisible(batch_size: int, micro_batches: int) -> None:
    """Raises ValueError unless the micro-batches of an update can be split evenly between the processes."""
    if micro_batches % world_size:
        images = batch_size * micro_batches
        counts = [n for n in range(world_size, images + 1, world_size) if images % n == 0 and images // n <= batch_size]
        same = ""
        if counts:
            same = f"; --batch-size {images // counts[0]} --accumulate {counts[0]} has the same effective batch size"
        raise ValueError(f"--accumulate {micro_batches}: not divisible by the {world_size} processes{same}")


def micro_batches_of_this_rank(count: int) -> range:
    """The numbers of the micro-batches that this process computes, out of `count` per update."""
    return range(rank, count, world_size)


def all_reduce(tensors: Iterable[Tensor]) -> None:
    """Sum each tensor over all processes, in place."""
    if world_size > 1:
        for work in [dist.all_reduce(t, async_op=True) for t in tensors]:
            work.wait()


def all_reduce_sum(numbers: list[float], device: str) -> list[float]:
    """Each number summed over all processes."""
    sums = torch.tensor(numbers, dtype=torch.float64, device=device)
    all_reduce([sums])
    return sums.tolist()


def gather(t: Tensor) -> Tensor:
    """Gather a sharded tensor (a collective); return any other unchanged."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def scatter(t: Tensor, like: Tensor) -> Tensor:
    """This process's shard of a full tensor, if `like`, of the same shape, is sharded; else t."""
    if not hasattr(like, "full_tensor") or t.shape != like.shape:
        return t
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(t, like.device_mesh, like.placements, src_data_rank=None)


def gather_to_rank0(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Full tensors on the CPU of rank 0, {} elsewhere; a collective where they are sharded."""
    return {key: t.cpu() for key, t in ((key, gather(t)) for key, t in tensors.items()) if rank == 0}
