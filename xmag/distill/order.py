"""Sampler of regions: shuffled epochs, the same whatever the number of ranks.

The epochs' shuffles, one after another, are one endless sequence; step s takes positions
s * batch to (s + 1) * batch of it. The step is thus all there is to remember of where a run was.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from xmag.distill.manifest import shuffled

_PURPOSE = 0x5F1E
"""Salt of the random stream that shuffles draw from the seed."""


class Order:
    """Sampler of regions, int64 (N,), in shuffled epochs; the same for the same seed.

    `sources` (N,) is the slide of each region, where known: slides are then mixed so that only some
    of them are open at a time.
    """

    def __init__(
        self,
        regions: NDArray[np.int64],
        *,
        batch: int,
        seed: int,
        sources: NDArray[np.int64] | None = None,
    ) -> None:
        self._regions, self._batch, self._seed = regions, batch, seed
        # Without slides, any order is as good as any other.
        self._sources = np.zeros(len(regions), np.int64) if sources is None else sources
        self._epoch = lru_cache(maxsize=4)(self._shuffled)

    def step(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The batch of regions of a step, and the epoch of each: int64 (batch,) both."""
        return self.positions(number * self._batch, self._batch)

    def positions(self, first: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Regions at `count` positions of the endless sequence, and the epoch of each."""
        epochs, within = np.divmod(np.arange(first, first + count), len(self._regions))
        regions = np.empty(count, np.int64)
        for epoch in np.unique(epochs):
            taken = epochs == epoch
            regions[taken] = self._epoch(int(epoch))[within[taken]]
        return regions, epochs

    def _shuffled(self, epoch: int) -> NDArray[np.int64]:
        rng = np.random.default_rng(np.random.SeedSequence((self._seed, epoch, _PURPOSE)))
        return self._regions[shuffled(self._sources, rng)]


def share(rank: int, world: int, *, batch: int, micro_batch: int) -> Sequence[slice]:
    """Micro-batches of a rank: slices of a step's batch."""
    each = batch // world
    start = rank * each
    return [
        slice(at, min(at + micro_batch, start + each))
        for at in range(start, start + each, micro_batch)
    ]
