"""A plan -> a stream of uint8 tile batches.

Decoding processes live here alone, and threads too, but for those that decode a large window.
"""

from xmag.tiles.arena import Tiles
from xmag.tiles.children import SUPPORTED as PROCESSES_SUPPORTED
from xmag.tiles.children import DecodingPool, Limits, PlacePool
from xmag.tiles.decoder import (
    Begun,
    Decoded,
    DecodeJob,
    Earlier,
    Event,
    Failed,
    Finished,
    Idle,
    Opened,
    Planned,
    Thumbnail,
    Warned,
    decode_here,
    reason_of,
)
from xmag.tiles.decoding import Damaged, Reading
from xmag.tiles.stream import (
    check_damaged,
    default_threads,
    read_places,
    read_rows,
    read_tiles,
    reading_of,
)
from xmag.tiles.worker import Places

__all__ = [
    "PROCESSES_SUPPORTED",
    "Begun",
    "Damaged",
    "DecodeJob",
    "Decoded",
    "DecodingPool",
    "Earlier",
    "Event",
    "Failed",
    "Finished",
    "Idle",
    "Limits",
    "Opened",
    "PlacePool",
    "Places",
    "Planned",
    "Reading",
    "Thumbnail",
    "Tiles",
    "Warned",
    "check_damaged",
    "decode_here",
    "default_threads",
    "read_places",
    "read_rows",
    "read_tiles",
    "reading_of",
    "reason_of",
]
