"""Learning-rate schedules by name."""

from collections.abc import Mapping
from types import MappingProxyType

from xmag.errors import InputError
from xmag.training import warmup_cosine

PAPER_GPUS = 24

SCHEDULES: Mapping[str, str] = MappingProxyType(
    {
        "cosine": "a linear warm-up to the learning rate, then half a cosine down to the floor",
        "paper": (
            "what the code of arXiv 2509.23097 did: a warm-up counted as if for one GPU while"
            f" {PAPER_GPUS} shared the steps, so that the rate rises linearly to 1/{PAPER_GPUS} of"
            " the learning rate (2.1e-5 for 5e-4) at the last step and never decays"
        ),
    }
)
"""Schedules by name, with a description."""


def rate_factor(name: str, step: int, *, total: int, warmup: int = 0, floor: float = 0.0) -> float:
    """The learning-rate factor at `step` (from 0) of `total`; see `SCHEDULES`.

    `warmup` (steps) and `floor` are those of "cosine". Raises InputError for another name.
    """
    if name == "cosine":
        return warmup_cosine(step, total=total, warmup=warmup, floor=floor)
    if name == "paper":
        return (step + 1) / (total * PAPER_GPUS)
    raise InputError(f"schedule is {name!r}; expected one of {sorted(SCHEDULES)}")
