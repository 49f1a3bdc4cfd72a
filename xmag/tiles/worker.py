"""The child's side of decoding processes: paths come in, plans and tiles go out.

Started as ``python -c "from xmag.tiles.worker import main; main(...)"``: nothing of the program
that uses xmag is imported again, and so nothing is asked of its ``__main__``.
"""

import logging
import signal
from collections import deque
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Literal

from xmag.errors import XmagError
from xmag.geometry import TileSpec
from xmag.plan import TilePlan, plan_tiles
from xmag.slide import Slide, SlideFacts
from xmag.tiles.shared import Arena
from xmag.tiles.threads import read_tiles
from xmag.tissue import find_tissue
from xmag.urls import Place


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeJob:
    """A slide to plan and decode; `number` comes back with all that belongs to it."""

    number: int
    path: str | Place
    mpp: float | None
    spec: TileSpec
    tissue: Literal["auto"] | None
    overlap: int
    min_tissue: float


@dataclass(frozen=True, slots=True)
class Planned:
    """The slide was opened, and these are its tiles."""

    number: int
    slide: SlideFacts
    plan: TilePlan


@dataclass(frozen=True, slots=True)
class Filled:
    """`count` tiles of the slide lie in a slot of the arena."""

    number: int
    slot: int
    count: int


@dataclass(frozen=True, slots=True)
class Finished:
    """All tiles of the slide have been sent."""

    number: int


@dataclass(frozen=True, slots=True)
class Failed:
    """The slide cannot be done; no more of it will come."""

    number: int
    reason: str


@dataclass(frozen=True, slots=True)
class Free:
    """A slot may be written to again."""

    slot: int


def reason_of(error: BaseException) -> str:
    """An error as a person reads it in a report."""
    return str(error) if isinstance(error, XmagError) else f"{type(error).__name__}: {error}"


def main(connection_fd: int, arena_fd: int, arena: dict[str, int], slots: list[int]) -> None:
    """Work on jobs until the other side hangs up."""
    # The parent decides when to stop, and does so by hanging up.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # What tifffile has to say of a file, the error of its row says; stderr is the caller's.
    logging.getLogger("tifffile").addHandler(logging.NullHandler())
    worker = _Worker(Connection(connection_fd), Arena(fd=arena_fd, **arena), slots)
    try:
        while True:
            worker.work()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


class _Worker:
    def __init__(self, connection: "Connection[Any, Any]", arena: Arena, slots: list[int]) -> None:
        self._connection, self._arena = connection, arena
        self._free, self._jobs = deque(slots), deque[DecodeJob]()

    def work(self) -> None:
        """Do the next job."""
        while not self._jobs:
            self._receive()
        job = self._jobs.popleft()
        try:
            self._decode(job)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise
        # Whatever is wrong with one slide is told, and the next one is done.
        except Exception as error:  # noqa: BLE001
            self._connection.send(Failed(job.number, reason_of(error)))
        else:
            self._connection.send(Finished(job.number))

    def _decode(self, job: DecodeJob) -> None:
        with Slide(job.path, mpp=job.mpp) as slide:
            mask = find_tissue(slide) if job.tissue == "auto" else None
            plan = plan_tiles(
                slide, job.spec, tissue=mask, overlap=job.overlap, min_tissue=job.min_tissue
            )
            self._connection.send(Planned(job.number, slide.facts, plan))
            batch = len(self._arena.slot(0))
            for _, tiles in read_tiles(slide, plan, batch_size=batch, threads=1):
                while not self._free:
                    self._receive()
                slot = self._free.popleft()
                self._arena.slot(slot)[: len(tiles)] = tiles
                self._connection.send(Filled(job.number, slot, len(tiles)))

    def _receive(self) -> None:
        message = self._connection.recv()
        if isinstance(message, Free):
            self._free.append(message.slot)
        else:
            self._jobs.append(message)
