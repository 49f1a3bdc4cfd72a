"""Sampler of bags: shuffled or class-balanced."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Sampling = Literal["balanced", "shuffled"]


class Order:
    """Sampler of the bags of each epoch; an epoch has as many as the cohort.

    "shuffled" takes each bag once. "balanced" takes the classes equally often, and the bags of a
    class in turn: none comes again before all others of its class have come, over epochs too.
    """

    def __init__(
        self, labels: NDArray[np.int64], sampling: Sampling, rng: np.random.Generator
    ) -> None:
        self._labels, self._rng = labels, rng
        self._classes = np.unique(labels) if sampling == "balanced" else None
        self._decks: dict[int, list[int]] = {}

    def epoch(self) -> NDArray[np.int64]:
        """The rows of the cohort that one epoch takes, in order: int64 (n,)."""
        size = len(self._labels)
        if self._classes is None:
            return self._rng.permutation(size)
        # Where the classes do not divide an epoch, chance decides which come once more.
        turns = np.tile(self._classes, size // len(self._classes))
        more = self._rng.permutation(self._classes)[: size - len(turns)]
        turns = self._rng.permutation(np.concatenate([turns, more]))
        return np.array([self._next(int(turn)) for turn in turns], dtype=np.int64)

    def _next(self, label: int) -> int:
        deck = self._decks.setdefault(label, [])
        if not deck:
            deck.extend(self._rng.permutation(np.flatnonzero(self._labels == label)).tolist())
        return deck.pop()
