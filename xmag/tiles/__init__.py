"""A plan -> a stream of uint8 tile batches.

Decoding processes live here alone, and threads too, but for those that decode a large window.
"""

from xmag.tiles.children import SUPPORTED as PROCESSES_SUPPORTED
from xmag.tiles.children import DecodingPool, Limits
from xmag.tiles.decoder import (
    Begun,
    DecodeJob,
    Earlier,
    Event,
    Failed,
    Filled,
    Finished,
    Idle,
    Opened,
    Planned,
    Thumbnail,
    Warned,
)
from xmag.tiles.decoding import Damaged
from xmag.tiles.stream import (
    Tiles,
    check_damaged,
    default_threads,
    read_rows,
    read_tiles,
)
from xmag.tiles.worker import reason_of

__all__ = [
    "PROCESSES_SUPPORTED",
    "Begun",
    "Damaged",
    "DecodeJob",
    "DecodingPool",
    "Earlier",
    "Event",
    "Failed",
    "Filled",
    "Finished",
    "Idle",
    "Limits",
    "Opened",
    "Planned",
    "Thumbnail",
    "Tiles",
    "Warned",
    "check_damaged",
    "default_threads",
    "read_rows",
    "read_tiles",
    "reason_of",
]
