"""Pictures of a slide: its tissue and tiles, what the embeddings see, what a classifier looked at.

Every function returns an image, or GeoJSON, and writes nothing.
"""

from xmag.draw.attention import gallery, heatmap
from xmag.draw.outlines import attention_geojson
from xmag.draw.overview import feature_map, overlay

__all__ = ["attention_geojson", "feature_map", "gallery", "heatmap", "overlay"]
