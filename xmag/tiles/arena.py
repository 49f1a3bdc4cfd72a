"""Memory of tile batches: shared with decoding processes, and used again within this one."""

import math
import mmap
import os
import tempfile
import weakref
from collections import deque
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from xmag.errors import OutputError

Tiles = NDArray[np.uint8]
"""uint8 (B, size_px, size_px, 3) RGB."""

_SHM = Path("/dev/shm")
_SPARE = 0.8
"""The share of free shared memory that may be taken; Docker gives 64 MB in all by default."""


class Arena:
    """`slots` pieces of memory of `slot_tiles` tiles each, in a file without a name.

    The file lies in shared memory if there is room, else in the temporary folder. It has no name,
    so nothing is left however the processes end; those that are to share it inherit its
    descriptor.
    """

    def __init__(self, *, slots: int, slot_tiles: int, size_px: int, fd: int | None = None) -> None:
        self._shape = (slots, slot_tiles, size_px, size_px, 3)
        size = int(np.prod(self._shape))
        self.fd = _unnamed_file(size) if fd is None else fd
        self._map = mmap.mmap(self.fd, size)
        self._array = np.frombuffer(self._map, np.uint8).reshape(self._shape)

    def slot(self, number: int) -> Tiles:
        """The tiles of a slot, uint8 (slot_tiles, S, S, 3); writing to it writes to the memory."""
        tiles: Tiles = self._array[number]
        return tiles

    @property
    def whole(self) -> Tiles:
        """All slots as one array."""
        return self._array

    def close(self) -> None:
        """Let go of the memory, as far as this process is concerned."""
        os.close(self.fd)


def _unnamed_file(size: int) -> int:
    for folder in (_SHM, Path(tempfile.gettempdir())):
        if not folder.is_dir():
            continue
        room = os.statvfs(folder)
        if room.f_bavail * room.f_frsize * _SPARE < size:
            continue
        fd = _open_unnamed(folder)
        try:
            # Reserved now: a write to a mapping that the disk has no room for would be fatal.
            _reserve(fd, size)
        except OSError:
            os.close(fd)
            continue
        return fd
    raise OutputError(
        f"there is no room for {size / 2**20:.0f} MiB of tiles in {_SHM} or"
        f" {tempfile.gettempdir()}; free some, set TMPDIR to a folder with room, or use processes=0"
    )


def _reserve(fd: int, size: int) -> None:
    """Have the room for so many bytes; OSError where there is none."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(fd, 0, size)
        return
    # macOS has no such call.
    block = bytes(1 << 20)
    for at in range(0, size, len(block)):
        os.pwrite(fd, block[: size - at], at)


def _open_unnamed(folder: Path) -> int:
    """A descriptor of a new file; one without ever a name, where the file system can do that."""
    if hasattr(os, "O_TMPFILE"):
        with suppress(OSError):
            return os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o600)
    fd, name = tempfile.mkstemp(prefix="xmag-", dir=folder)
    Path(name).unlink()
    return fd


class Recycler:
    """Arrays of uint8 in memory of one size, which comes back by itself.

    A large array that is let go of goes back to the system, and the next one comes from there page
    by page: for tiles that are dropped once they are embedded, a sixth of the time of decoding.
    Memory is given out again when the array and all views of it, torch's among them, are gone, so
    that each array is its holder's to keep. Usable from many threads.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._idle: deque[NDArray[np.uint8]] = deque()

    def empty(self, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        """An array of this shape, of at most the recycler's size; what it holds is undefined."""
        try:
            memory = self._idle.pop()
        except IndexError:
            memory = np.empty(self._most_bytes, np.uint8)
        # Views of an array keep what owns its memory, here something that is no array: so they keep
        # `flat`, and not just `memory`.
        flat = np.frombuffer(memory.data, np.uint8, math.prod(shape))
        weakref.finalize(flat, self._idle.append, memory).atexit = False
        return flat.reshape(shape)
