"""The child's side of decoding processes: paths come in, plans and tiles go out.

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
from collections import deque
from contextlib import closing, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xmag.errors import XmagError, XmagWarning
from xmag.plan import TilePlan, plan_tiles
from xmag.slide import Slide, SlideFacts
from xmag.tiles.decoding import Reading
from xmag.tiles.messages import (
    Begun,
    DecodeJob,
    Failed,
    Filled,
    Finished,
    Free,
    FromChild,
    Opened,
    Planned,
    Ready,
    Thumbnail,
    Warned,
)
from xmag.tiles.shared import Arena
from xmag.tiles.threads import read_rows, reading_of
from xmag.tissue import TissueMask, find_tissue

_LOOK_FOR_PARENT_S = 1.0
_PR_SET_PDEATHSIG = 1


def reason_of(error: BaseException) -> str:
    """An error as a person reads it in a report."""
    return str(error) if isinstance(error, XmagError) else f"{type(error).__name__}: {error}"


def main(
    connection_fd: int,
    arena_fd: int,
    arena: dict[str, int],
    slots: list[int],
    *,
    threads: int,
    memory_limit: int | None,
    parent: int,
) -> None:
    """Work on jobs until the other side hangs up."""
    _behave(parent, memory_limit)
    worker = _Worker(Connection(connection_fd), Arena(fd=arena_fd, **arena), slots, threads)
    worker.memory_limit = memory_limit
    try:
        worker.greet()
        while True:
            worker.work()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def _behave(parent: int, memory_limit: int | None) -> None:
    """Arrange this process so that nothing a slide does to it reaches further."""
    import resource  # not on Windows, where this module is imported but never run

    # The parent decides when to stop, and does so by hanging up.
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
    def __init__(
        self, connection: "Connection[Any, Any]", arena: Arena, slots: list[int], threads: int
    ) -> None:
        self._connection, self._arena, self._threads = connection, arena, threads
        self._free, self._jobs = deque(slots), deque[DecodeJob]()
        self._sending = threading.Lock()
        self._number, self._start, self._waited_s = 0, time.monotonic(), 0.0
        self.memory_limit: int | None = None
        # Only the caller knows which warnings it wants to see: it gets all that are meant for it.
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", XmagWarning)
        warnings.showwarning = self._warn

    def greet(self) -> None:
        """Say that the start is over."""
        self._send(Ready())

    def work(self) -> None:
        """Do the next job."""
        while not self._jobs:
            self._receive()
        job = self._jobs.popleft()
        self._number, self._start, self._waited_s = job.number, time.monotonic(), 0.0
        self._send(Begun(job.number))
        try:
            lost, reading = self._decode(job)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise
        # Whatever is wrong with one slide is told, and the next one is done.
        except Exception as error:  # noqa: BLE001
            self._send(Failed(job.number, self._reason_of(error)))
        else:
            self._send(Finished(job.number, lost, reading))

    def _decode(self, job: DecodeJob) -> tuple[NDArray[np.bool_] | None, Reading | None]:
        """Send all that is wanted of a slide; which tiles were lost, and what was read."""
        with Slide(job.path, mpp=job.mpp) as slide:
            self._send(Opened(job.number, slide.facts))
            planned, reading = None, None
            if job.earlier is not None and job.earlier.is_to_compare(slide.facts):
                planned = _planned(job, slide)
                reading = reading_of(slide, planned[1], threads=self._threads)
            tiles, thumbnail = _wanted(job, slide.facts, reading)
            if not (tiles or thumbnail):
                return None, reading
            mask, plan = planned or _planned(job, slide)
            small = None
            if thumbnail and job.thumbnail_px is not None:
                small = Thumbnail(
                    pixels=np.asarray(slide.thumbnail(max_px=job.thumbnail_px).convert("RGB")),
                    dimensions=slide.dimensions,
                    tissue=mask,
                )
            self._send(Planned(job.number, plan, small))
            return self._send_tiles(slide, plan, mask, job) if tiles else (None, reading)

    def _send_tiles(
        self, slide: Slide, plan: TilePlan, mask: TissueMask | None, job: DecodeJob
    ) -> tuple[NDArray[np.bool_] | None, Reading]:
        lost = np.ones(len(plan), np.bool_)
        readings: list[Reading] = []
        batches = read_rows(
            slide,
            plan,
            batch_size=len(self._arena.slot(0)),
            threads=self._threads,
            damaged=job.damaged,
            tissue=mask,
            note=readings.append,
        )
        with closing(batches):
            for rows, pixels in batches:
                lost[rows] = False
                while not self._free:
                    self._receive()
                slot = self._free.popleft()
                self._arena.slot(slot)[: len(pixels)] = pixels
                self._send(Filled(job.number, slot, len(pixels)))
        return lost if lost.any() else None, readings[0]

    def _reason_of(self, error: Exception) -> str:
        # A thread that gets no stack is told like this.
        starved = isinstance(error, MemoryError) or "can't start new thread" in str(error)
        if starved and self.memory_limit is not None:
            return (
                f"decoding it took more memory than memory_limit={self.memory_limit:,} bytes; raise"
                " the limit if the slide is worth it"
            )
        return reason_of(error)

    def _warn(self, message: Warning | str, *_: Any, **__: Any) -> None:
        self._send(Warned(self._number, str(message)))

    def _send(self, message: FromChild) -> None:
        """Send a message, with the seconds that the slide has cost so far.

        Waiting for the other side, here or for a slot, is no fault of the slide.
        """
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


def _planned(job: DecodeJob, slide: Slide) -> tuple[TissueMask | None, TilePlan]:
    mask = find_tissue(slide) if job.tissue == "auto" else None
    plan = plan_tiles(
        slide,
        job.spec,
        tissue=mask,
        overlap=job.overlap,
        min_tissue=job.min_tissue,
        border=job.border,
    )
    return mask, plan


def _wanted(job: DecodeJob, slide: SlideFacts, reading: Reading | None) -> tuple[bool, bool]:
    """Whether tiles, and whether a thumbnail, are wanted of a slide with these facts."""
    earlier = job.earlier
    if earlier is None:
        return True, job.thumbnail_px is not None
    if earlier.is_of(slide, None if reading is None else reading.sha256):
        return False, earlier.thumbnail
    return earlier.redo, earlier.redo and job.thumbnail_px is not None
