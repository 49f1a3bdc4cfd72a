"""Byte sources: ranges of a file, readable from several threads at once."""

import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from xmag.errors import ClosedSlideError, DamagedSlideError

_MOST_GAP = 64
"""Bytes between tiles that are read along with them: some writers align tiles."""
_MOST_TOGETHER = 1 << 22
"""Bytes read at once."""


class ByteSource(Protocol):
    """Protocol of a source of bytes for the TIFF reader."""

    def read_many(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes of each (offset, length); DamagedSlideError where the file is too short."""
        ...

    def close(self) -> None:
        """Release the file. Closing twice is fine."""
        ...


class LocalSource:
    """A file on a local or mounted file system."""

    def __init__(self, path: Path) -> None:
        self._name = path.name
        self._file = path.open("rb", buffering=0)
        self._lock = threading.Lock()

    def read_many(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes of each (offset, length); DamagedSlideError where the file is too short."""
        if self._file.closed:
            raise ClosedSlideError(f"{self._name} is closed; open the slide again to read from it")
        chunks = list[bytes]()
        for group in _neighbours(ranges):
            start, last = group[0][0], group[-1]
            data = self._read(start, sum(last) - start)
            # Each read lets go of the GIL and waits for it, which slices do not.
            chunks += [data[offset - start : offset - start + size] for offset, size in group]
        for (offset, length), chunk in zip(ranges, chunks, strict=True):
            if len(chunk) != length:
                raise DamagedSlideError(
                    f"{self._name} should hold {length} bytes at offset {offset}, but ends after"
                    f" {len(chunk)} of them; the file is truncated or damaged: copy it again"
                )
        return chunks

    def close(self) -> None:
        """Release the file. Closing twice is fine."""
        self._file.close()

    def _read_at(self, offset: int, length: int) -> bytes:
        return os.pread(self._file.fileno(), length, offset)

    def _seek_and_read(self, offset: int, length: int) -> bytes:
        with self._lock:
            self._file.seek(offset)
            return self._file.read(length)

    # Windows has no pread.
    _read = _read_at if hasattr(os, "pread") else _seek_and_read


def _neighbours(ranges: Sequence[tuple[int, int]]) -> Iterator[Sequence[tuple[int, int]]]:
    """The (offset, length) in groups that follow each other in the file."""
    first = 0
    for at in range(1, len(ranges) + 1):
        if at < len(ranges):
            gap = ranges[at][0] - sum(ranges[at - 1])
            if 0 <= gap <= _MOST_GAP and sum(ranges[at]) - ranges[first][0] <= _MOST_TOGETHER:
                continue
        yield ranges[first:at]
        first = at
