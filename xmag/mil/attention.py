"""Attention weights of an aggregator, one for each tile."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from xmag.geometry import TileGeometry


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Attention:
    """Attention weights of the tiles of a bag; row i belongs to tile i of the bag.

    Attributes:
        scores: float32 (N,), not negative; they sum to 1 over a bag that has tiles.
        coords: int64 (N, 2), top-left corner of each tile, level-0 px; None for a bag without.
        kind: "softmax" for learned weights of a mean (ABMIL, CLAM-SB), "nystrom" for what
            TransMIL's class token attends to, "custom" for an aggregator that says nothing.
        tiles: Size and scale of the tiles; None where the bag does not know.
    """

    scores: NDArray[np.float32]
    coords: NDArray[np.int64] | None
    kind: str
    tiles: TileGeometry | None = None

    def __len__(self) -> int:
        return len(self.scores)
