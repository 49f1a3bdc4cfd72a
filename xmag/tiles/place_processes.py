"""Tiles at any places of many slides, read by child processes: what sampling fast needs.

Threads of one process stop scaling at the GIL (see `processes`). Here each call takes a child that
is free, tells it what to read, and copies the tiles out of the memory that both share; whoever
wants several children busy calls from as many threads.
"""

import logging
import queue
import signal
import subprocess
from collections import OrderedDict
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self

import numpy as np

from xmag.errors import DamagedSlideError, SlideError, XmagError
from xmag.geometry import TileSpec
from xmag.plan import Coords
from xmag.slide import Slide
from xmag.tiles.arena import Arena
from xmag.tiles.child import end_children, how_it_ended, start_child
from xmag.tiles.places import read_places
from xmag.tiles.stream import Tiles

_OPEN_SLIDES = 80
"""Slides that a child keeps open."""
_OPEN_BYTES = 256 << 20
"""Of plain images, whose px stay in memory as long as they are open."""

_LOST = (EOFError, BrokenPipeError, ConnectionResetError)
"""What happens when the other side is gone."""


@dataclass(frozen=True, slots=True)
class Places:
    """What to read: tiles of one slide."""

    path: str
    mpp: float | None
    spec: TileSpec
    coords: Coords


@dataclass(slots=True)
class _Child:
    process: "subprocess.Popen[bytes]"
    connection: "Connection[Any, Any]"
    slot: int


class PlacePool:
    """Child processes that read tiles; a context manager that leaves none of them behind.

    `slot_tiles` is the most that one call may ask for.
    """

    def __init__(self, processes: int, *, slot_tiles: int, size_px: int) -> None:
        self.slot_tiles = slot_tiles
        self._shape = {"slots": processes, "slot_tiles": slot_tiles, "size_px": size_px}
        self._arena = Arena(**self._shape)
        self._children: list[_Child] = []
        self._free: queue.SimpleQueue[_Child] = queue.SimpleQueue()
        try:
            for slot in range(processes):
                process, connection = self._start(slot)
                self._children.append(_Child(process, connection, slot))
        except BaseException:
            self.close()
            raise
        for child in self._children:
            self._free.put(child)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def read(self, places: Places, into: Tiles) -> None:
        """Read tiles into an array of theirs; safe to call from several threads.

        Raises what `read_places` and Slide raise, and DamagedSlideError where the child dies of it.
        """
        child = self._free.get()
        try:
            try:
                error = self._asked(child, places, into)
            except _LOST:
                # It may have died of something else, or before: what kills two is the slide's.
                self._replace(child)
                error = self._asked(child, places, into)
        except _LOST as lost:
            status = self._replace(child)
            raise DamagedSlideError(
                f"the process that read it {how_it_ended(status)}: its bytes crash a decoder, or"
                " memory ran out; check the file with another program"
            ) from lost
        except BaseException:
            # Interrupted while the child still works: its answer must not reach the next call.
            child.process.kill()
            self._replace(child)
            raise
        finally:
            self._free.put(child)
        if error is not None:
            raise error

    def _asked(self, child: _Child, places: Places, into: Tiles) -> XmagError | None:
        child.connection.send(places)
        error: XmagError | None = child.connection.recv()
        if error is None:
            into[:] = self._arena.slot(child.slot)[: len(into)]
        return error

    def close(self) -> None:
        """Hang up, and see every child end. Closing twice is fine."""
        if self._children:
            end_children((child.process, child.connection) for child in self._children)
            self._children.clear()
            self._arena.close()

    def _start(self, slot: int) -> tuple["subprocess.Popen[bytes]", "Connection[Any, Any]"]:
        return start_child("xmag.tiles.place_processes", self._arena, self._shape, slot)

    def _replace(self, child: _Child) -> int:
        """Start another child in the place of one that died; the status it ended with."""
        child.connection.close()
        status = child.process.wait()
        child.process, child.connection = self._start(child.slot)
        return status


def main(connection_fd: int, arena_fd: int, shape: dict[str, int], slot: int) -> None:
    """The child's side: read what is asked for until the other side hangs up."""
    # The parent decides when to stop, and does so by hanging up.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # What tifffile has to say of a file, the error says; stderr is the caller's.
    logging.getLogger("tifffile").addHandler(logging.NullHandler())
    connection: Connection[Any, Any] = Connection(connection_fd)
    tiles = Arena(fd=arena_fd, **shape).slot(slot)
    slides = _Slides()
    try:
        while True:
            connection.send(_answer(connection.recv(), slides, tiles))
    except _LOST:
        return


def _answer(places: Places, slides: "_Slides", tiles: Tiles) -> XmagError | None:
    """Read tiles into the shared memory; what stood in the way, or None."""
    try:
        slide = slides.opened(places.path, places.mpp)
        tiles[: len(places.coords)] = read_places(slide, places.spec, places.coords)
    except XmagError as error:
        return error
    # Whatever else is wrong with a slide has to reach who asked, and not end this process.
    except Exception as error:  # noqa: BLE001
        return SlideError(f"{places.path} cannot be read: {type(error).__name__}: {error}")
    return None


class _Slides:
    """The slides that a child has open; those not used for longest are closed again."""

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
