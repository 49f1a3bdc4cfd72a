"""Which regions a step takes: every region once an epoch, whatever the number of ranks.

The epochs' shuffles, one after another, are one endless sequence; step s takes positions
s * batch to (s + 1) * batch of it. The step is thus all there is to remember of where a run was.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

_PURPOSE = 0x5F1E
"""Keeps the shuffles apart from other numbers drawn from the same seed."""


def positions(
    step: int, *, regions: int, batch: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The rows of `regions` that a step takes, and the epoch of each: int64 (batch,) both."""
    places = np.arange(step * batch, (step + 1) * batch)
    epochs, within = np.divmod(places, regions)
    rows = np.empty(batch, np.int64)
    for epoch in np.unique(epochs):
        taken = epochs == epoch
        rows[taken] = _shuffled(regions, seed, int(epoch))[within[taken]]
    return rows, epochs


def share(rank: int, world: int, *, batch: int, micro_batch: int) -> Sequence[slice]:
    """The slices of a step's batch that a rank takes, one after another."""
    each = batch // world
    start = rank * each
    return [
        slice(at, min(at + micro_batch, start + each))
        for at in range(start, start + each, micro_batch)
    ]


@lru_cache(maxsize=4)
def _shuffled(regions: int, seed: int, epoch: int) -> NDArray[np.int64]:
    # PCG64 and its `permutation` of NumPy's Generator; a change of NumPy's stream would change the
    # order, which is no more than another shuffle.
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, epoch, _PURPOSE))))
    return rng.permutation(regions)
