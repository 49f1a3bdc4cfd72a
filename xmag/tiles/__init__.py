"""A plan -> a stream of uint8 tile batches.

Decoding processes live here alone, and threads too, but for those that decode a large window.
"""

from xmag.tiles.decoding import Damaged, Reading
from xmag.tiles.messages import (
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
from xmag.tiles.processes import SUPPORTED as PROCESSES_SUPPORTED
from xmag.tiles.processes import DecodingPool, Limits
from xmag.tiles.threads import (
    Tiles,
    check_damaged,
    default_threads,
    read_rows,
    read_tiles,
    reading_of,
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
    "Reading",
    "Thumbnail",
    "Tiles",
    "Warned",
    "check_damaged",
    "default_threads",
    "read_rows",
    "read_tiles",
    "reading_of",
    "reason_of",
]
