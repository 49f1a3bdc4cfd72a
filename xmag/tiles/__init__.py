"""A plan -> a stream of uint8 tile batches. Threads and decoding processes live here alone."""

from xmag.tiles.threads import Tiles, default_threads, read_tiles

__all__ = ["Tiles", "default_threads", "read_tiles"]
