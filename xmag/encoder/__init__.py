"""Encoder: a ViT, its normalisation and the tiles it wants, in one immutable view.

`load_model` makes one; `embed` takes a batch of tiles, `embed_stream` a stream of them.
"""

from xmag.encoder.loading import default_encoder, load_model
from xmag.encoder.model import Encoder, TileEncoder
from xmag.encoder.stream import TileStream, pinned
from xmag.hub.registry import known_models

__all__ = [
    "Encoder",
    "TileEncoder",
    "TileStream",
    "default_encoder",
    "known_models",
    "load_model",
    "pinned",
]
