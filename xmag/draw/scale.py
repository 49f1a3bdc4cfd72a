"""Colours of tiles: their scores by rank within the slide, along a perceptual map."""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from xmag.errors import BagError, InputError
from xmag.geometry import TileGeometry

if TYPE_CHECKING:  # pictures are drawn without torch
    from xmag.mil import Attention

_VIRIDIS = np.array(
    [
        (68, 1, 84), (72, 24, 106), (71, 45, 123), (66, 64, 134), (59, 82, 139), (51, 99, 141),
        (44, 114, 142), (38, 130, 142), (33, 145, 140), (31, 160, 136), (40, 174, 128),
        (63, 188, 115), (94, 201, 98), (132, 212, 75), (173, 220, 48), (216, 226, 25),
        (253, 231, 37),
    ],
    np.float64,
)  # fmt: skip
"""Every sixteenth colour of matplotlib's viridis (CC0), whose lightness rises evenly."""


def percentiles(scores: NDArray[np.float32]) -> NDArray[np.float64]:
    """Rank of each score among all, from 0 (least) to 100 (most); equal scores rank equal.

    It is the mean rank of equal scores, from 0, by N - 1. One score alone stands at 50.
    """
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    if len(scores) < 2:
        return np.full(len(scores), 50.0)
    ranks = np.cumsum(counts) - (counts + 1) / 2
    return np.asarray(100 * ranks[inverse] / (len(scores) - 1), np.float64)


def colours(percent: NDArray[np.float64]) -> NDArray[np.uint8]:
    """The colours, uint8 (..., 3), of percentiles: from dark violet over green to yellow."""
    at = np.asarray(percent, np.float64) / 100 * (len(_VIRIDIS) - 1)
    places = np.arange(len(_VIRIDIS))
    channels = [np.interp(at, places, channel) for channel in _VIRIDIS.T]
    return np.asarray(np.rint(np.stack(channels, axis=-1)), np.uint8)


def placed(attention: "Attention") -> tuple[NDArray[np.int64], TileGeometry]:
    """The corners of the tiles and their geometry.

    Raises BagError where the bag did not know them, and InputError for scores that are not one
    finite number for each tile.
    """
    coords, tiles = attention.coords, attention.tiles
    if coords is None or tiles is None:
        missing = "coords" if coords is None else "tiles"
        raise BagError(
            f"the attention does not say where its tiles lie ({missing} is None); use that of a"
            " bag that extract_features made, or of the path of its file. Of a file of other"
            " software give what it lacks: FeatureBag(bag.features, coords, tiles=), or for STAMP's"
            " FeatureBag.load(path).on(slide)"
        )
    if attention.scores.shape != (len(coords),) or not np.isfinite(attention.scores).all():
        raise InputError(
            f"the attention has scores of shape {attention.scores.shape} for {len(coords)} tiles;"
            " expected one finite number for each tile"
        )
    return coords, tiles
