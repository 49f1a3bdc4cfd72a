"""Dry-run estimates of memory and time, measured on a few training steps."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xmag.distill.augment import Draws
from xmag.distill.lessons import OnlineLesson
from xmag.distill.session import Session
from xmag.distill.sources import RegionSource, read_intact
from xmag.distill.summary import Needs
from xmag.distill.targets import TargetSettings
from xmag.distill.teachers import Teacher
from xmag.distill.views import SIDE, teacher_tiles
from xmag.geometry import TileSpec

_TIMED_STEPS = 3
_KEPT_REGIONS = 4


def measured_needs(session: Session) -> Needs:
    """Estimate memory and time of a run from a few steps, which train its student a little.

    The first step is not timed: it begins with an empty queue of regions, and on a GPU with work
    that is done once.
    """
    device, trainer = session.device, session.trainer
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    steps = session.steps(0, 1 + _TIMED_STEPS)
    with _kept_for_backward(trainer.student.parameters()) as kept:
        next(steps)
    _synchronise(device)
    start = time.perf_counter()
    for _ in steps:
        pass
    _synchronise(device)
    seconds = (time.perf_counter() - start) / _TIMED_STEPS
    weights = [p.numel() * p.element_size() for p in trainer.student.parameters()]
    student = sum(p.numel() for p in trainer.student.vit.parameters())
    return Needs(
        student_parameters=student,
        head_parameters=sum(p.numel() for p in trainer.student.parameters()) - student,
        state_bytes={
            "weights": sum(weights),
            "gradients": sum(weights),
            "moments": 2 * sum(weights),
            "average": sum(weights),
        },
        activation_bytes=max(kept),
        peak_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        seconds_per_step=seconds,
    )


def seconds_to_keep(
    source: RegionSource, teacher: Teacher, *, device: torch.device, variants: int
) -> float:
    """Measured seconds to compute a teacher's features of one region, reading included."""
    rows = list(range(min(_KEPT_REGIONS, len(source))))
    for timed in (False, True):
        start = time.perf_counter()
        _, regions = read_intact(source, rows)
        if regions is not None:
            high = torch.from_numpy(regions).to(device)
            for _ in range(variants if timed else 1):
                teacher.features(teacher_tiles(high))
        _synchronise(device)
    return (time.perf_counter() - start) / len(rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class UnkeptLesson:
    """Placeholder of a feature cache in a dry run: targets are zeros."""

    teacher: Teacher
    weight: float

    @property
    def name(self) -> str:
        """The teacher's name."""
        return self.teacher.name

    @property
    def dim(self) -> int:
        """Length of the teacher's feature vectors."""
        return self.teacher.dim

    @property
    def identity(self) -> Mapping[str, Any]:
        """The teacher's identity, as plain JSON values."""
        return self.teacher.identity

    @property
    def sees_pixels(self) -> bool:
        """False: no pixels are needed, as with a cache."""
        return False

    @property
    def variants(self) -> TargetSettings | None:
        """None: any augmentation will do."""
        return None

    def knows(self, regions: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Mask of the regions that have targets: all, bool (B,)."""
        return np.ones(len(regions), np.bool_)

    def targets(
        self,
        regions: NDArray[np.int64],
        draws: Draws,  # noqa: ARG002
        high: Tensor | None,  # noqa: ARG002
        variants: NDArray[np.int64],  # noqa: ARG002
    ) -> Tensor:
        """Zeros in place of targets: float32 (B, 16, dim)."""
        return torch.zeros(len(regions), SIDE**2, self.dim, dtype=torch.float32)

    def check(self, student: TileSpec) -> None:
        """Raise InputError where a tile of the student is not 4 x 4 of the teacher's."""
        OnlineLesson(teacher=self.teacher).check(student)


@contextmanager
def _kept_for_backward(parameters: Iterator[Tensor]) -> Iterator[list[int]]:
    """A context that measures the peak bytes saved for backward, as a list of one number.

    Each storage counts once, and those of parameters not at all.
    """
    known = {p.untyped_storage().data_ptr() for p in parameters}
    most, held = [0], [0]

    def pack(tensor: Tensor) -> "_Held":
        storage = tensor.untyped_storage()
        where, count = storage.data_ptr(), 0
        if where not in known:
            known.add(where)
            count = storage.nbytes()
        held[0] += count
        most[0] = max(most[0], held[0])
        return _Held(tensor, where, count)

    def unpack(kept: "_Held") -> Tensor:
        held[0] -= kept.count
        if kept.count:
            known.discard(kept.where)
            kept.count = 0
        return kept.tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield most


class _Held:
    """Tensor saved for backward, with its storage and counted bytes."""

    def __init__(self, tensor: Tensor, where: int, count: int) -> None:
        self.tensor, self.where, self.count = tensor, where, count


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
