"""Training batches: augmented low views of regions, with their teacher targets."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xmag.distill.augment import NONE, Augmentation, Draws, augment, draw
from xmag.distill.lessons import Lesson
from xmag.distill.loader import RegionBatch
from xmag.distill.step import Views
from xmag.distill.stopwatch import Stopwatch
from xmag.distill.views import low_view

_UNDRAWN = 0
"""Index of the cached variant to use without augmentation: the first."""


class Curriculum:
    """Builds training batches: augmented views of regions, and each teacher's targets for them.

    `centres` are the means to subtract from the teachers' features, if any. With `reads_low` the
    pixels of a batch are low views already.
    """

    def __init__(
        self,
        lessons: Sequence[Lesson],
        *,
        augmentation: Augmentation,
        seed: int,
        views: int,
        device: torch.device,
        reads_low: bool = False,
    ) -> None:
        self.lessons = list(lessons)
        self.centres: list[Tensor | None] = [None] * len(self.lessons)
        self._augmentation, self._seed, self._views = augmentation, seed, views
        self._device, self._reads_low = device, reads_low
        kept = [lesson.variants for lesson in self.lessons if lesson.variants is not None]
        self._kept = kept[0] if kept else None
        self._sees_pixels = any(lesson.sees_pixels for lesson in self.lessons)

    def views(self, batch: RegionBatch, watch: Stopwatch) -> Views:
        """Augmented views and targets of a batch, view by view: (views * B, ...)."""
        regions = batch.group.regions
        with watch.part("low view and augment"):
            pixels = batch.pixels.to(self._device, non_blocking=True)
            low = pixels if self._reads_low else low_view(pixels)
        lows: list[Tensor] = []
        targets: list[list[Tensor]] = [[] for _ in self.lessons]
        for view in range(self._views):
            draws, variants = self._drawn(batch, view)
            with watch.part("low view and augment"):
                lows.append(augment(low, draws))
                high = augment(pixels, draws) if self._sees_pixels else None
            with watch.part("teacher"):
                for lesson, found in zip(self.lessons, targets, strict=True):
                    said = lesson.targets(regions, draws, high, variants)
                    found.append(said.to(self._device, non_blocking=True).float())
        good = torch.from_numpy(self._good(batch).astype(np.float32)).to(self._device)
        return Views(
            low=torch.cat(lows),
            targets=[self._centred(torch.cat(found), at) for at, found in enumerate(targets)],
            weights=good.repeat(self._views),
        )

    def plain(self, batch: RegionBatch) -> tuple[Tensor, list[Tensor]]:
        """Unaugmented low views and teacher features of the undamaged regions, for validation.

        uint8 (B, S, S, 3), and float32 (B, 16, dim) each, with no mean subtracted. Where only
        augmented features are cached, it is their first variant.
        """
        good = self._good(batch)
        regions = batch.group.regions[good]
        pixels = batch.pixels[torch.from_numpy(good)].to(self._device)
        variants = np.full(len(regions), _UNDRAWN)
        if self._kept is not None:
            draws = self._kept.draws(regions, variants)
        else:
            draws = draw(0, 0, regions, 0, augmentation=NONE)
        low = augment(pixels if self._reads_low else low_view(pixels), draws)
        high = augment(pixels, draws) if self._sees_pixels else None
        said = [lesson.targets(regions, draws, high, variants) for lesson in self.lessons]
        return low, [features.to(self._device).float() for features in said]

    def _good(self, batch: RegionBatch) -> NDArray[np.bool_]:
        """Mask of the regions that were read, and that every teacher has targets for: bool (B,)."""
        known = [lesson.knows(batch.group.regions) for lesson in self.lessons]
        return np.asarray(np.stack([batch.good, *known]).all(0))

    def _drawn(self, batch: RegionBatch, view: int) -> tuple[Draws, NDArray[np.int64]]:
        """Augmentations of the regions in a view, and the indices of cached variants, (B,)."""
        regions, epochs = batch.group.regions, batch.group.epochs
        if self._kept is None:
            draws = draw(self._seed, epochs, regions, view, augmentation=self._augmentation)
            return draws, np.full(len(regions), _UNDRAWN)
        # All variants of a region in turn: KeptTargets.variants_for, for an epoch each.
        variants = (regions + epochs * self._views + view) % self._kept.count
        return self._kept.draws(regions, variants), variants

    def _centred(self, target: Tensor, at: int) -> Tensor:
        centre = self.centres[at]
        return target if centre is None else target - centre.to(target.device)
