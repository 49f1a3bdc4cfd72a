"""Schedule of a training: learning rate by step, and the epoch whose weights are kept."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch

from xmag.errors import InputError, XmagWarning


def warmup_cosine(step: int, *, total: int, warmup: int, floor: float = 0.0) -> float:
    """The learning-rate factor at `step` (from 0): linear warm-up to 1, then cosine decay.

    The last of `warmup` steps has factor 1, and the last of `total` steps has `floor`. Raises
    InputError where the warm-up leaves no step to decay in.
    """
    if not 0 <= warmup < total:
        raise InputError(
            f"the warm-up takes {warmup} of {total} steps; expected fewer, so that the rate decays"
        )
    if step < warmup:
        return (step + 1) / warmup
    done = min((step - warmup + 1) / (total - warmup), 1.0)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Learning-rate schedule: linear warm-up, then cosine decay; see `warmup_cosine`."""

    total: int
    warmup: int
    floor: float = 0.0

    def set_rate(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Set the learning rate of `step`: the factor times the rate that a group began with."""
        factor = warmup_cosine(step, total=self.total, warmup=self.warmup, floor=self.floor)
        for group in optimizer.param_groups:
            group["lr"] = factor * group.setdefault("initial_lr", group["lr"])


def best_epoch(losses: Sequence[float], *, epochs: int) -> int:
    """The best epoch (from 1), whose weights to keep, by smoothed validation losses so far.

    Of few patients a single loss is mostly luck: an epoch counts as the mean of the last losses up
    to its own, a tenth of `epochs` (the length of the schedule) of them. Until a fifth of `epochs`
    is over the latest is kept: a network that has hardly learned anything is unsure of everything,
    which can cost less than a few errors in good faith.
    """
    first, window = _first_epoch(epochs), math.ceil(epochs / 10)
    if len(losses) <= first:
        return len(losses)
    means = [fmean(losses[last - window : last]) for last in range(first, len(losses) + 1)]
    return first + means.index(min(means))


def warn_of_early_best(best: int, *, trained: int, epochs: int, stacklevel: int) -> None:
    """Warn where the best epoch is the first that may be kept, and more than one came after it."""
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
