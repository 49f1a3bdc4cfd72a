"""Byte sources: ranges of a file, readable from several threads at once."""

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from xmag.errors import ClosedSlideError, DamagedSlideError


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
        chunks = [self._read(offset, length) for offset, length in ranges]
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
