"""Where regions come from: a manifest's slides, read as they are asked for."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

Regions = NDArray[np.uint8]
"""uint8 (B, REGION_PX, REGION_PX, 3) RGB: the high views of B regions."""


@runtime_checkable
class RegionSource(Protocol):
    """What a training loop reads from: `SlideRegions`, or the user's own."""

    def __len__(self) -> int:
        """The number of regions."""
        ...

    def read(self, indices: Sequence[int], /) -> Regions:
        """The high views of regions: uint8 (B, 896, 896, 3), row i for region ``indices[i]``.

        Safe to call from several threads. Raises DamagedSlideError where one cannot be decoded.
        """
        ...
