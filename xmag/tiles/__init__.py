"""A plan -> a stream of uint8 tile batches.

Decoding processes live here alone, and threads too, but for those that decode a large window.
"""

from xmag.tiles.stream import read_tiles

__all__ = ["read_tiles"]
