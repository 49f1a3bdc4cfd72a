"""Parts shared by all training loops: learning-rate schedule, best epoch, EMA, distributed ranks.

The loops themselves are in `mil`, `finetune` and `distill`.
"""

import copy
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from statistics import fmean

import torch
import torch.distributed as dist
from torch import Tensor, nn

from xmag.errors import InputError, XmagWarning

_RENDEZVOUS_LIMIT = timedelta(minutes=30)


def warmup_cosine(step: int, *, total: int, warmup: int, floor: float = 0.0) -> float:
    """The learning-rate factor at `step` (from 0): linear warm-up to 1, then cosine decay.

    The last of `warmup` steps has factor 1, and the last of `total` steps has `floor`. Raises
    InputError where the warm-up leaves no step to decay in: a rate that only ever rises is a
    mistake that is easy to make and hard to see.
    """
    if not 0 <= warmup < total:
        raise InputError(
            f"the warm-up takes {warmup} of {total} steps; expected fewer, so that the rate decays"
        )
    if step < warmup:
        return (step + 1) / warmup
    done = min((step - warmup + 1) / (total - warmup), 1.0)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))


def best_epoch(losses: Sequence[float], *, epochs: int) -> int:
    """The best epoch (from 1), whose weights to keep, by smoothed validation losses so far.

    Of few patients a single loss is mostly luck, so that an epoch counts as the mean of the last
    losses up to its own, a tenth of `epochs` of them; the lowest mean wins. Until a fifth of
    `epochs` is over, the latest is kept: a network that has hardly learned anything is unsure of
    everything, which can cost less than a few errors in good faith. `epochs` is the length of the
    schedule, however early the training ends.
    """
    first, window = _first_epoch(epochs), math.ceil(epochs / 10)
    if len(losses) <= first:
        return len(losses)
    means = [fmean(losses[last - window : last]) for last in range(first, len(losses) + 1)]
    return first + means.index(min(means))


def warn_of_early_best(best: int, *, trained: int, epochs: int, stacklevel: int) -> None:
    """Warn (XmagWarning) where the best epoch is the first that may be kept.

    Not where a single epoch came after it, which says nothing.
    """
    if best == _first_epoch(epochs) < trained - 1:
        warnings.warn(
            f"epoch {best} of {trained} is kept, the first that may be: the validation loss has not"
            " improved since, so that the network may have learned little, or the patients to"
            " validate with are too few to tell. Compare with validation=None, which keeps the last"
            " epoch, in a cross-validation; or give more patients, or a lower learning rate",
            XmagWarning,
            stacklevel=stacklevel + 1,
        )


def _first_epoch(epochs: int) -> int:
    return math.ceil(epochs / 5)


class Ema:
    """Exponential moving average (EMA) of a module's parameters and buffers, in float32.

    `module` is a frozen copy that holds the average; call `update` after the optimizer's step.
    Integer buffers (counters) are copied as they are.
    """

    def __init__(self, module: nn.Module, *, decay: float) -> None:
        if not 0 <= decay < 1:
            raise InputError(f"the decay of an average is {decay}; expected 0 <= decay < 1")
        self.decay = decay
        self.module = copy.deepcopy(module).float().eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move the average towards `module`: average = decay * average + (1 - decay) * module."""
        now = module.state_dict()
        for name, mean in self.module.state_dict().items():
            value = now[name].detach().to(mean.device)
            if mean.is_floating_point():
                mean.lerp_(value.to(mean.dtype), 1 - self.decay)
            else:
                mean.copy_(value)


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
        if self.world == 1:
            return value
        total = value.detach().clone()
        dist.all_reduce(total)
        return total / self.world

    def wait(self) -> None:
        """Barrier: return when all ranks have reached this call."""
        if self.world > 1:
            dist.barrier()


@contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """A context in which the processes of torchrun form a process group; yields the `Ranks`.

    Without torchrun's variables, or where the program has joined a group by itself already, that
    group is used and left as it is.
    """
    if dist.is_available() and dist.is_initialized():
        yield Ranks(
            rank=dist.get_rank(),
            world=dist.get_world_size(),
            local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        )
        return
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1 or "RANK" not in os.environ:
        yield Ranks()
        return
    ranks = Ranks(
        rank=int(os.environ["RANK"]), world=world, local_rank=int(os.environ.get("LOCAL_RANK", "0"))
    )
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=_RENDEZVOUS_LIMIT)
    try:
        yield ranks
    finally:
        dist.destroy_process_group()
