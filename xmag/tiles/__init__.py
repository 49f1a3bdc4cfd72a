"""A plan -> a stream of uint8 tile batches. Threads and decoding processes live here alone."""

from xmag.tiles.decoding import Damaged
from xmag.tiles.processes import SUPPORTED as PROCESSES_SUPPORTED
from xmag.tiles.processes import DecodingPool, Event, Idle
from xmag.tiles.threads import (
    Tiles,
    check_damaged,
    default_threads,
    read_rows,
    read_tiles,
    usable_cores,
)
from xmag.tiles.worker import DecodeJob, Failed, Filled, Finished, Planned, reason_of

__all__ = [
    "PROCESSES_SUPPORTED",
    "Damaged",
    "DecodeJob",
    "DecodingPool",
    "Event",
    "Failed",
    "Filled",
    "Finished",
    "Idle",
    "Planned",
    "Tiles",
    "check_damaged",
    "default_threads",
    "read_rows",
    "read_tiles",
    "reason_of",
    "usable_cores",
]
