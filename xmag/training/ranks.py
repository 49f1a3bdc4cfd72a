"""Ranks of distributed training: the processes that torchrun starts, and what they share."""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

if dist.is_available():
    # Before any process group: its functions take the one that is there when it is imported as
    # their default, and keep it and its threads until the process ends.
    # DistributedDataParallel imports it.
    import torch.distributed.nn

_RENDEZVOUS_LIMIT = timedelta(minutes=30)
_PARTING_S = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """Rank and world size of this process in distributed training; rank 0 of 1 without it."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, which writes files and shows progress."""
        return self.rank == 0

    def device(self) -> torch.device:
        """The device that this rank trains on: the GPU of its local rank, or the CPU."""
        if torch.cuda.is_available():
            return torch.device("cuda", self.local_rank)
        return torch.device("cpu")

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a tensor over all ranks, equally weighted; not differentiable."""
        return value if self.world == 1 else self.sum(value) / self.world

    def sum(self, value: Tensor) -> Tensor:
        """The sum of a tensor on any device over all ranks; not differentiable."""
        if self.world == 1:
            return value
        # NCCL takes none of the CPU.
        place = self.device() if dist.get_backend() == "nccl" else value.device
        total = value.detach().to(place, copy=True)
        dist.all_reduce(total)
        return total.to(value.device)

    def sums(self, values: Sequence[Tensor]) -> list[Tensor]:
        """The `sum` of each of several tensors of one dtype and device, in a single message."""
        if self.world == 1:
            return list(values)
        total = self.sum(torch.cat([value.flatten() for value in values]))
        parts = torch.split(total, [value.numel() for value in values])
        return [part.view_as(value) for part, value in zip(parts, values, strict=True)]

    def wait(self) -> None:
        """Barrier: return when all ranks have reached this call."""
        if self.world > 1:
            dist.barrier()


@contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """A context in which the processes of torchrun form a process group; yields the `Ranks`.

    A group that the program has joined already is used and left as it is.
    """
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if dist.is_available() and dist.is_initialized():
        yield Ranks(rank=dist.get_rank(), world=dist.get_world_size(), local_rank=local)
        return
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1 or "RANK" not in os.environ:
        yield Ranks()
        return
    ranks = Ranks(rank=int(os.environ["RANK"]), world=world, local_rank=local)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=_RENDEZVOUS_LIMIT)
    try:
        yield ranks
    finally:
        # A thread of gloo needs the GIL to drop the last message. Destroying the group holds it
        # and waits for that thread, and one that is late at the end of a process aborts it.
        time.sleep(_PARTING_S)
        dist.destroy_process_group()
