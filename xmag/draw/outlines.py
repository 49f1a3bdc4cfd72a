"""Attention as GeoJSON outlines of tiles, for QuPath and other programs."""

from typing import TYPE_CHECKING, Any

import numpy as np

from xmag.draw.scale import colours, percentiles, placed

if TYPE_CHECKING:  # outlines are made without torch
    from xmag.mil import Attention

_RANKS = ((0, 50), (50, 75), (75, 90), (90, 100))
"""Classes of tiles by the rank of their attention, in percent: from, up to."""


def attention_geojson(attention: "Attention") -> dict[str, Any]:
    """The tiles with their attention as a GeoJSON FeatureCollection in level-0 px, for QuPath.

    Each tile is a detection, in the order of the bag, with the measurements "Attention" (its score)
    and "Attention rank" (0 to 100 among the tiles of the slide), by which QuPath's measurement maps
    colour it. It is classified by its rank: "Attention rank 90-100" and so on, in the colours of
    `heatmap`. Raises BagError where the attention does not say where its tiles lie.
    """
    coords, tiles = placed(attention)
    ranks = percentiles(attention.scores)
    kinds = [
        {
            "name": f"Attention rank {low}-{high}",
            "color": colours(np.array((low + high) / 2)).tolist(),
        }
        for low, high in _RANKS
    ]
    bins = np.searchsorted([high for _, high in _RANKS[:-1]], ranks, side="right")
    features = [
        {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [_ring(x, y, tiles.size_level0)]},
            "properties": {
                "objectType": "detection",
                "classification": kinds[kind],
                "measurements": {"Attention": score, "Attention rank": round(rank, 2)},
            },
        }
        for (x, y), score, rank, kind in zip(
            coords.tolist(), attention.scores.tolist(), ranks.tolist(), bins.tolist(), strict=True
        )
    ]
    return {"type": "FeatureCollection", "features": features}


def _ring(x: int, y: int, side: int) -> list[list[int]]:
    return [[x, y], [x + side, y], [x + side, y + side], [x, y + side], [x, y]]
