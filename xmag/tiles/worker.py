"""The child's side of decoding processes: jobs come in, plans and tiles go out.

Started as ``python -c "from xmag.tiles.worker import main; main(...)"``: nothing of the program
that uses xmag is imported again, and so nothing is asked of its ``__main__``.
"""

import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections import OrderedDict, deque
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from xmag.errors import SlideError, XmagError, XmagWarning
from xmag.geometry import TileSpec
from xmag.plan import Coords
from xmag.slide import Slide
from xmag.tiles.arena import Arena
from xmag.tiles.decoder import Decoded, DecodeJob, Event, Warned, decode, reason_of
from xmag.tiles.stream import read_places

_LOOK_FOR_PARENT_S = 1.0
_PR_SET_PDEATHSIG = 1

_OPEN_SLIDES = 80
"""Slides that stay open between calls for tiles at places."""
_OPEN_BYTES = 256 << 20
"""Of plain images, whose px stay in memory as long as they are open."""


@dataclass(frozen=True, slots=True)
class Places:
    """Tiles of one slide to read: their top-left corners, int64 (N, 2) in level-0 px.

    The answer is the error that stood in the way, or None: then they lie in the slot.
    """

    path: str
    mpp: float | None
    spec: TileSpec
    coords: Coords


@dataclass(frozen=True, slots=True)
class Free:
    """A slot may be written to again."""

    slot: int


@dataclass(frozen=True, slots=True)
class Filled:
    """`count` tiles of a slide lie in a slot of the arena."""

    number: int
    slot: int
    count: int


def main(
    connection_fd: int,
    arena_fd: int,
    shape: dict[str, int],
    slots: list[int],
    *,
    threads: int,
    memory_limit: int | None,
    parent: int,
) -> None:
    """Work on jobs until the other side hangs up."""
    _behave(parent, memory_limit)
    arena, line = Arena(fd=arena_fd, **shape), Connection(connection_fd)
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        _Worker(line, arena, slots, threads, memory_limit).run()


def _behave(parent: int, memory_limit: int | None) -> None:
    """Arrange this process so that nothing a slide does to it reaches further."""
    import resource  # not on Windows, where this module is imported but never run

    # The parent decides when to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _die_with(parent)
    # A core file would hold pixels of the slide, and lie in the current folder.
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    if memory_limit is not None:
        # What is allocated, and not the address space: that has libraries, the arena, and what
        # threads reserve in it.
        resource.setrlimit(resource.RLIMIT_DATA, (memory_limit, memory_limit))
    with suppress(OSError):
        # Where memory runs out for all, this process goes before the one with the model.
        Path("/proc/self/oom_score_adj").write_text("1000")
    # What tifffile has to say of a file, the error of its row says; stderr is the caller's.
    logging.getLogger("tifffile").addHandler(logging.NullHandler())


def _die_with(parent: int) -> None:
    """Let this process end when `parent` does, even while a decoder hangs."""
    if sys.platform == "linux":
        import ctypes

        # At once and by the kernel: a decoder that hangs may hold the GIL.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    else:
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    if os.getppid() != parent:
        os._exit(1)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_LOOK_FOR_PARENT_S)
    os._exit(1)


class _Worker:
    """The line to the other side, the slots that are free, and the clock of the slide at hand."""

    def __init__(
        self,
        connection: "Connection[Any, Any]",
        arena: Arena,
        slots: list[int],
        threads: int,
        memory_limit: int | None,
    ) -> None:
        self._connection, self._arena, self._threads = connection, arena, threads
        self._memory_limit = memory_limit
        self._free, self._jobs = deque(slots), deque[DecodeJob | Places]()
        self._slides = _OpenSlides()
        self._sending = threading.Lock()
        self._number, self._start, self._waited_s = 0, time.monotonic(), 0.0
        # Only the caller knows which warnings it wants to see: it gets all that are meant for it.
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", XmagWarning)
        warnings.showwarning = self._warn

    def run(self) -> None:
        """Do jobs, until the other side hangs up."""
        while True:
            while not self._jobs:
                self._receive()
            job = self._jobs.popleft()
            if isinstance(job, Places):
                self._send(self._read(job))
            else:
                self._decode(job)

    def _decode(self, job: DecodeJob) -> None:
        self._number, self._start, self._waited_s = job.number, time.monotonic(), 0.0
        slot_tiles = len(self._arena.slot(0))
        for event in decode(
            job, batch_size=slot_tiles, threads=self._threads, told=self._reason_of
        ):
            if not isinstance(event, Decoded):
                self._send(event)
                continue
            while not self._free:
                self._receive()
            slot = self._free.popleft()
            self._arena.slot(slot)[: len(event.tiles)] = event.tiles
            self._send(Filled(job.number, slot, len(event.tiles)))

    def _read(self, places: Places) -> XmagError | None:
        """Read tiles into the shared memory; the error that stood in the way, or None."""
        try:
            slide = self._slides.opened(places.path, places.mpp)
            tiles = read_places(slide, places.spec, places.coords)
        except XmagError as error:
            return error
        # Whatever else is wrong with a slide has to reach who asked, and not end this process.
        except Exception as error:  # noqa: BLE001
            return SlideError(f"{places.path} cannot be read: {type(error).__name__}: {error}")
        self._arena.slot(self._free[0])[: len(tiles)] = tiles
        return None

    def _reason_of(self, error: Exception) -> str:
        # A thread that gets no stack is told like this.
        starved = isinstance(error, MemoryError) or "can't start new thread" in str(error)
        if starved and self._memory_limit is not None:
            return (
                f"decoding it took more memory than memory_limit={self._memory_limit:,} bytes;"
                " raise the limit if the slide is worth it"
            )
        return reason_of(error)

    def _warn(self, message: Warning | str, *_: Any, **__: Any) -> None:
        self._send(Warned(self._number, str(message)))

    def _send(self, message: Event | Filled | XmagError | None) -> None:
        """Send a message, with the seconds that the slide has cost so far."""
        # Waiting for the other side, here or for a slot, is no fault of the slide.
        with self._sending:
            now = time.monotonic()
            self._connection.send((now - self._start - self._waited_s, message))
            self._waited_s += time.monotonic() - now

    def _receive(self) -> None:
        now = time.monotonic()
        message = self._connection.recv()
        self._waited_s += time.monotonic() - now
        if isinstance(message, Free):
            self._free.append(message.slot)
        else:
            self._jobs.append(message)


class _OpenSlides:
    """Slides that stay open; those not used for longest are closed again."""

    def __init__(self) -> None:
        self._open: OrderedDict[tuple[str, float | None], Slide] = OrderedDict()

    def opened(self, path: str, mpp: float | None) -> Slide:
        key = (path, mpp)
        if key not in self._open:
            self._open[key] = Slide(path, mpp=mpp)
        self._open.move_to_end(key)
        while len(self._open) > 1 and (
            len(self._open) > _OPEN_SLIDES or self._bytes() > _OPEN_BYTES
        ):
            self._open.popitem(last=False)[1].close()
        return self._open[key]

    def _bytes(self) -> int:
        images = [s for s in self._open.values() if s.format in ("png", "jpeg")]
        return sum(3 * int(np.prod(slide.dimensions)) for slide in images)
