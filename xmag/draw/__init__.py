"""Pictures of a slide: tissue and tiles, embeddings as colours, attention of a MIL model.

Every function returns an image, or GeoJSON, and writes nothing.
"""

from xmag.draw.attention import Scale, attention_geojson, gallery, heatmap, is_nearly_even
from xmag.draw.overview import feature_map, overlay

__all__ = [
    "Scale",
    "attention_geojson",
    "feature_map",
    "gallery",
    "heatmap",
    "is_nearly_even",
    "overlay",
]


def __dir__() -> list[str]:
    return sorted(__all__)
