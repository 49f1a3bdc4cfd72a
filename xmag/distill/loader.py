"""Data loader: threads that prefetch batches of regions; damaged ones are masked."""

import logging
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xmag.distill.sources import RegionSource
from xmag.distill.targets import KeptTargets
from xmag.errors import DamagedSlideError, InputError

_logger = logging.getLogger(__name__)

_WHITE = 255


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Request of a batch: numbers of regions in the source, and the epoch of each."""

    regions: NDArray[np.int64]
    epochs: NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class RegionBatch:
    """Batch of regions: `pixels` uint8 (B, S, S, 3), white where not `good` (damaged)."""

    group: Group
    pixels: Tensor
    good: NDArray[np.bool_]


class LowViews:
    """Region source of the low views in a feature cache."""

    def __init__(self, kept: KeptTargets) -> None:
        self._kept = kept

    def __len__(self) -> int:
        return len(self._kept)

    def read(self, indices: Sequence[int], /) -> NDArray[np.uint8]:
        """Read low views, uint8 (B, 224, 224, 3); DamagedSlideError where a region has none."""
        if not self._kept.good[list(indices)].all():
            raise DamagedSlideError(
                f"of regions {list(indices)} some were damaged when the features were kept"
            )
        return self._kept.low(indices).numpy()


class RegionLoader:
    """Data loader with `threads` threads, which read the regions of groups one by one.

    `ahead` groups are prefetched. Images are `side` px wide. On CUDA they lie in pinned memory,
    from which the device copies by itself. `damaged` marks the regions of the source that could not
    be read.
    """

    def __init__(
        self,
        source: RegionSource,
        *,
        side: int,
        threads: int,
        ahead: int,
        device: torch.device,
    ) -> None:
        self.damaged = np.zeros(len(source), bool)
        self._source, self._side = source, side
        self._threads, self._ahead = threads, ahead
        self._pinned = device.type == "cuda"

    def read(self, groups: Iterable[Group]) -> Generator[RegionBatch]:
        """Read groups in their order; yields batches in host memory.

        Raises what the source raises, but for DamagedSlideError; InputError for regions of another
        size or type.
        """
        pool = ThreadPoolExecutor(self._threads, thread_name_prefix="xmag-regions")
        try:
            waiting: deque[tuple[Group, Tensor, list[Future[bool]]]] = deque()
            for group in groups:
                waiting.append(self._begin(group, pool))
                if len(waiting) > self._ahead:
                    yield self._finish(*waiting.popleft())
            while waiting:
                yield self._finish(*waiting.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    def _begin(
        self, group: Group, pool: ThreadPoolExecutor
    ) -> tuple[Group, Tensor, list[Future[bool]]]:
        shape = (len(group.regions), self._side, self._side, 3)
        pixels = torch.empty(shape, dtype=torch.uint8, pin_memory=self._pinned)
        tasks = [
            pool.submit(_read_into, into, self._source, int(region))
            for region, into in zip(group.regions, pixels.numpy(), strict=True)
        ]
        return group, pixels, tasks

    def _finish(self, group: Group, pixels: Tensor, tasks: list[Future[bool]]) -> RegionBatch:
        good = np.array([task.result() for task in tasks], bool)
        for region in group.regions[~good].tolist():
            if not self.damaged[region]:
                _logger.warning("region %d is damaged and is left out of the training", region)
            self.damaged[region] = True
        return RegionBatch(group=group, pixels=pixels, good=good)


def _read_into(into: NDArray[np.uint8], source: RegionSource, region: int) -> bool:
    """Read a region into `into`; False, and white pixels, where it is damaged."""
    try:
        found = source.read([region])
    except DamagedSlideError as error:
        _logger.info("region %d: %s", region, error)
        into[...] = _WHITE
        return False
    if found.shape != (1, *into.shape) or found.dtype != np.uint8:
        raise InputError(
            f"region {region} is {found.dtype} {found.shape}; expected uint8 {(1, *into.shape)}:"
            " a region has four times the student's tile a side"
        )
    into[...] = found[0]
    return True
