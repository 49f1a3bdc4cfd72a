"""From regions to what a step is taken on: augmented low views, and the teachers' features."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xmag.distill.augment import NONE, Augmentation, Draws, augment, draw
from xmag.distill.loader import RegionBatch
from xmag.distill.step import Views
from xmag.distill.stopwatch import Stopwatch
from xmag.distill.teachers import Teacher
from xmag.distill.views import SIDE, low_view, teacher_tiles


class Lesson(Protocol):
    """What one teacher says of regions, computed on the way or kept from before."""

    @property
    def name(self) -> str:
        """What the teacher is called in records."""
        ...

    @property
    def dim(self) -> int:
        """The length of its features."""
        ...

    @property
    def identity(self) -> Mapping[str, object]:
        """What tells it from others, as plain JSON values."""
        ...

    @property
    def weight(self) -> float:
        """How much its losses count."""
        ...

    @property
    def sees_pixels(self) -> bool:
        """Whether it needs the augmented high views."""
        ...

    def targets(self, regions: NDArray[np.int64], draws: Draws, high: Tensor | None) -> Tensor:
        """The features of augmented regions: float32 (B, 16, dim)."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class OnlineLesson:
    """A teacher that looks at every augmented region, each time anew."""

    teacher: Teacher
    weight: float = 1.0

    @property
    def name(self) -> str:
        """The teacher's."""
        return self.teacher.name

    @property
    def dim(self) -> int:
        """The teacher's."""
        return self.teacher.dim

    @property
    def identity(self) -> Mapping[str, object]:
        """The teacher's."""
        return self.teacher.identity

    @property
    def sees_pixels(self) -> bool:
        """It does."""
        return True

    def targets(self, regions: NDArray[np.int64], draws: Draws, high: Tensor | None) -> Tensor:  # noqa: ARG002
        """The features of the 16 tiles of `high`: float32 (B, 16, dim)."""
        assert high is not None
        return features_of(self.teacher, high)


def features_of(teacher: Teacher, high: Tensor) -> Tensor:
    """A teacher's features of the 16 tiles of each region: float32 (B, 16, dim)."""
    features = teacher.features(teacher_tiles(high)).float()
    return features.view(len(high), SIDE**2, teacher.dim)


class Curriculum:
    """Makes the views of regions, and gathers what each teacher says of them.

    `centres` are the means that are taken off the teachers' features, if any.
    """

    def __init__(
        self,
        lessons: Sequence[Lesson],
        *,
        augmentation: Augmentation,
        seed: int,
        views: int,
        device: torch.device,
    ) -> None:
        self.lessons = list(lessons)
        self.centres: list[Tensor | None] = [None] * len(self.lessons)
        self._augmentation, self._seed, self._views = augmentation, seed, views
        self._device = device

    def views(self, batch: RegionBatch, watch: Stopwatch) -> Views:
        """All views of a batch, the first of every region, then the second: (views * B, ...)."""
        with watch.part("low view and augment"):
            high = batch.high.to(self._device, non_blocking=True)
            low = low_view(high)
        lows: list[Tensor] = []
        targets: list[list[Tensor]] = [[] for _ in self.lessons]
        needed = any(lesson.sees_pixels for lesson in self.lessons)
        for view in range(self._views):
            draws = self._draws(batch, view)
            with watch.part("low view and augment"):
                lows.append(augment(low, draws))
                seen = augment(high, draws) if needed else None
            with watch.part("teacher"):
                for lesson, found in zip(self.lessons, targets, strict=True):
                    found.append(lesson.targets(batch.group.regions, draws, seen))
        good = torch.from_numpy(batch.good.astype(np.float32)).to(self._device)
        return Views(
            low=torch.cat(lows),
            targets=[self._centred(torch.cat(found), at) for at, found in enumerate(targets)],
            weights=good.repeat(self._views),
        )

    def plain(self, batch: RegionBatch) -> tuple[Tensor, list[Tensor]]:
        """The good regions without augmentation: low views, and each teacher's features.

        uint8 (B, S, S, 3), and float32 (B, 16, dim) each, of which no mean is taken off.
        """
        regions = batch.group.regions[batch.good]
        high = batch.high[torch.from_numpy(batch.good)].to(self._device)
        draws = self._plain_draws(regions)
        low, seen = augment(low_view(high), draws), augment(high, draws)
        return low, [lesson.targets(regions, draws, seen) for lesson in self.lessons]

    def _draws(self, batch: RegionBatch, view: int) -> Draws:
        """The draws of a batch, whose regions may belong to two epochs."""
        regions, epochs = batch.group.regions, batch.group.epochs
        parts = [
            draw(
                self._seed,
                int(epoch),
                regions[epochs == epoch].tolist(),
                view,
                augmentation=self._augmentation,
            )
            for epoch in np.unique(epochs)
        ]
        return _joined(parts)

    def _plain_draws(self, regions: NDArray[np.int64]) -> Draws:
        return draw(0, 0, regions.tolist(), 0, augmentation=NONE)

    def _centred(self, target: Tensor, at: int) -> Tensor:
        centre = self.centres[at]
        return target if centre is None else target - centre.to(target.device)


def _joined(parts: Sequence[Draws]) -> Draws:
    """The draws of several parts, one after another: epochs only grow along a batch."""
    return Draws(
        **{
            field.name: torch.cat([getattr(part, field.name) for part in parts])
            for field in fields(Draws)
        }
    )
