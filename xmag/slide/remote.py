"""Slides at URLs, read by ranges of bytes over HTTP or from an object store."""

import asyncio
import io
import logging
import re
import threading
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from xmag.errors import (
    ClosedSlideError,
    DamagedSlideError,
    InputError,
    SlideError,
    UnsupportedSlideError,
)
from xmag.slide.integrity import damaged
from xmag.urls import Url, retold

logger = logging.getLogger(__name__)

_HEAD_BYTES = 32 * 1024
"""Bytes of the first request: they tell the format and the size, often the first directory."""
_GAP_BYTES = 8 * 1024
"""Largest gap between ranges that is fetched along where that saves a request."""
_MOST_MERGED_BYTES = 8 * 1024 * 1024
"""Most bytes of a merged request; longer ones would be slower than several at once."""
_MOST_REQUESTS = 16
"""Most requests of one call that are under way at once."""
_ATTEMPTS = 3
_FIRST_PAUSE_S = 0.5
_TIMEOUT_S = 60.0
"""Seconds without a byte after which a request has failed."""
_BLOCK_BYTES = 32 * 1024
_MOST_PARSED_BYTES = 256 * 1024 * 1024
"""Most bytes fetched for directories; those of a slide with a million tiles are a tenth of this."""

_VERSIONS = (
    "ETag", "etag", "generation", "Last-Modified", "LastModified", "last_modified", "mtime",
    "updated", "modified", "created",
)  # fmt: skip
"""Names of an object's version in HTTP headers and the facts of fsspec's stores, the best first."""

_Ranges = Sequence[tuple[int, int]]
"""(offset, length) of each range of bytes."""


class RemoteSource:
    """Byte ranges of a file at a URL; usable from many threads at once.

    Ranges that lie close together are fetched with one request, and several requests are under way
    at once. Raises SlideError where the file cannot be reached, and UnsupportedSlideError where the
    server gives whole files only.
    """

    def __init__(self, url: Url) -> None:
        self.url = url
        self.name = url.name
        self.bytes_fetched = 0
        self.requests = 0
        self._lock = threading.Lock()
        self._closed = False
        with retold(SlideError, url):
            self._store = (_HttpServer if url.scheme in ("http", "https") else _Store)(url)
            self.head, self.size = self._store.first(_HEAD_BYTES)
        self.version = self._store.version
        """ETag or time that changes when the file is written; None where the store has none."""
        self._count([self.head])
        if not self.size:
            raise DamagedSlideError(f"{self.name} is empty; copy it there again")

    def read_many(self, ranges: _Ranges) -> list[bytes]:
        """The bytes of each (offset, length); DamagedSlideError where the file is too short."""
        if self._closed:
            raise ClosedSlideError(f"{self.name} is closed; open the slide again to read from it")
        for offset, length in ranges:
            if offset + length > self.size:
                raise damaged(
                    f"{self.name} should hold {length} bytes at offset {offset}, but has only"
                    f" {self.size} in all"
                )
        spans = _merged(ranges)
        with retold(SlideError, self.url):
            chunks = self._store.fetch(spans)
        self._count(chunks)
        for (offset, length), chunk in zip(spans, chunks, strict=True):
            if len(chunk) != length:
                raise _cut_short(self.url, len(chunk), length, offset)
        starts = [start for start, _ in spans]
        parts = []
        for offset, length in ranges:
            span = bisect_right(starts, offset) - 1
            start = offset - starts[span] if length else 0
            parts.append(chunks[span][start : start + length] if length else b"")
        return parts

    def file(self) -> "_RangeFile":
        """A file object over the source, for a parser that hops between small pieces."""
        return _RangeFile(self)

    def close(self) -> None:
        """Close the source, and log the bytes fetched. Closing twice is fine."""
        if not self._closed:
            counts = (self.bytes_fetched, self.size, self.requests)
            logger.info("%s: %d of %d bytes fetched in %d requests", self.name, *counts)
        self._closed = True

    def _count(self, chunks: Sequence[bytes]) -> None:
        with self._lock:
            self.requests += len(chunks)
            self.bytes_fetched += sum(map(len, chunks))


class OpenFile:
    """Byte ranges of the file that an open TiffSlide reads, which stays open and the caller's."""

    head = b""

    def __init__(self, handle: Any) -> None:
        # The lock of all who read from it; without one, tifffile reads by no thread but one.
        handle.set_lock(True)
        self._handle = handle
        self.name, self.size = str(handle.name), int(handle.size)

    def read_many(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes of each (offset, length); ClosedSlideError where the TiffSlide was closed."""
        chunks = list[bytes]()
        try:
            with self._handle.lock:
                for offset, length in ranges:
                    self._handle.seek(offset)
                    chunks.append(bytes(self._handle.read(length)))
        except (ValueError, AttributeError):
            raise ClosedSlideError(
                f"the TiffSlide of {self.name} is closed; open it again"
            ) from None
        if any(len(chunk) != length for chunk, (_, length) in zip(chunks, ranges, strict=True)):
            raise damaged(f"{self.name} ends within the bytes of a tile")
        return chunks

    def file(self) -> "_RangeFile":
        """A file object over it, with a position of its own."""
        return _RangeFile(self)

    def close(self) -> None:
        """Leave the file open: it is the caller's."""

    def __reduce__(self) -> Any:
        raise InputError(
            f"a Slide of a TiffSlide whose file is not of this machine ({self.name}) cannot be sent"
            " to another process; open a Slide by its path or URL"
        )


class RemoteFolder:
    """Files below a URL, fetched as they are needed; usable from many threads at once.

    Raises SlideError where the store cannot be reached.
    """

    version: str | None = None
    """None: no ETag tells of all the files."""

    def __init__(self, url: Url) -> None:
        self.url, self.name = url, url.name
        self._own_bytes = 0
        self._sources = dict[str, RemoteSource | None]()
        self._lock = threading.Lock()
        with retold(SlideError, url):
            self._store, _ = url.store()

    @property
    def bytes_fetched(self) -> int:
        """Bytes that came over the network so far."""
        with self._lock:
            return self._own_bytes + sum(s.bytes_fetched for s in self._sources.values() if s)

    def read_files(self, names: Sequence[str], most: int) -> list[bytes | None]:
        """The first `most` bytes of files; None for those that are not there."""
        with retold(SlideError, self.url):
            urls = [self.url / name for name in names]
            if self.url.scheme in ("http", "https"):
                from fsspec.asyn import sync

                asked = [(_HttpServer(url, whole=True), 0, most) for url in urls]
                found = sync(self._store.loop, _fetched, asked, keep_errors=True)
            else:
                paths, zeros = [url.store()[1] for url in urls], [0] * len(urls)
                ends = [most] * len(urls)
                found = self._store.cat_ranges(paths, zeros, ends, on_error="return")
            in_zip = self.url.scheme == "zip"
            for chunk in found:
                # Of a zip file, older versions of fsspec give the KeyError of zipfile.
                kinds = (FileNotFoundError, KeyError) if in_zip else FileNotFoundError
                gone = isinstance(chunk, kinds) or getattr(chunk, "status", 0) in (404, 410)
                if isinstance(chunk, BaseException) and not gone:
                    raise chunk
        files = [None if isinstance(chunk, BaseException) else bytes(chunk) for chunk in found]
        with self._lock:
            self._own_bytes += sum(len(data) for data in files if data is not None)
        return files

    def size(self, name: str) -> int | None:
        """The length of a file; None where it is not there."""
        source = self._source(name)
        return None if source is None else source.size

    def read_parts(self, name: str, ranges: _Ranges) -> list[bytes]:
        """Ranges of the bytes of a file that is there; SlideError where it was replaced since."""
        source = self._source(name)
        assert source is not None
        return source.read_many(ranges)

    def _source(self, name: str) -> RemoteSource | None:
        if name not in self._sources:
            is_there = self.read_files([name], 1)[0] is not None
            source = RemoteSource(self.url / name) if is_there else None
            with self._lock:
                self._sources.setdefault(name, source)
        return self._sources[name]

    def close(self) -> None:
        """Close what was opened. Closing twice is fine."""
        with self._lock:
            for source in self._sources.values():
                if source is not None:
                    source.close()


async def _fetched(
    asked: Sequence[tuple["_HttpServer", int, int]], *, keep_errors: bool = False
) -> list[Any]:
    """The bytes of each (server, offset, length); with `keep_errors`, or why there are none."""
    gate = asyncio.Semaphore(_MOST_REQUESTS)
    tasks = [asyncio.ensure_future(server._persistently(gate, *span)) for server, *span in asked]
    try:
        return list(await asyncio.gather(*tasks, return_exceptions=keep_errors))
    finally:
        for task in tasks:
            task.cancel()


class _RangeFile(io.RawIOBase):
    """A read-only file object that fetches blocks as they are needed and keeps them.

    `failure` is the first error of fetching, raised at the end of its `with` block before all else:
    a parser may take it for a fault of the file, and go on with a part of it.
    """

    def __init__(self, source: RemoteSource | OpenFile) -> None:
        from fsspec.caching import BlockCache

        self.name = source.name
        self.failure: SlideError | None = None
        self._source = source
        self._at = self._asked = 0
        self._blocks = BlockCache(_BLOCK_BYTES, self._fetch, source.size, maxblocks=None)

    def __exit__(self, *_: object) -> None:
        self.close()
        if self.failure is not None:
            raise self.failure

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._source.size}[whence]
        if base + offset < 0:
            raise ValueError(f"there is no offset {base + offset}")
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        start, end = self._at, min(self._at + len(view), self._source.size)
        try:
            # A table of tiles at once: the cache would ask for one block after the other.
            large = len(view) > _BLOCK_BYTES
            data = self._fetch(start, end) if large else self._blocks._fetch(start, end)
        except SlideError as error:
            self.failure = self.failure or error
            raise
        self._at += len(data)
        view[: len(data)] = data
        return len(data)

    def _fetch(self, start: int, end: int) -> bytes:
        end = min(end, self._source.size)
        if start >= end:
            return b""
        if end <= len(self._source.head):
            return self._source.head[start:end]
        self._asked += end - start
        if self._asked > _MOST_PARSED_BYTES:
            raise damaged(f"its directories ask for more than {_MOST_PARSED_BYTES} bytes")
        return self._source.read_many([(start, end - start)])[0]


class _Store:
    """Byte ranges of an object in a store, by fsspec's own means."""

    version: str | None = None

    def __init__(self, url: Url) -> None:
        self._url = url
        self._store, self._path = url.store()  # which tells of packages that are missing

    def first(self, length: int) -> tuple[bytes, int]:
        """The first bytes, at most `length`, and the size of the object."""
        facts = self._url.info()
        size, self.version = int(facts["size"]), _version(facts)
        return (self.fetch([(0, min(length, size))])[0] if size else b""), size

    def fetch(self, spans: _Ranges) -> list[bytes]:
        starts = [offset for offset, _ in spans]
        ends = [offset + length for offset, length in spans]
        found = self._store.cat_ranges([self._path] * len(spans), starts, ends, on_error="return")
        for chunk in found:
            if isinstance(chunk, BaseException):
                raise chunk
        return [bytes(chunk) for chunk in found]


class _HttpServer(_Store):
    """Byte ranges of a file on an HTTP server, through the session that fsspec sets up.

    fsspec would take a whole file for the range that it asked for, and log the URL with its
    signature; here the whole file is an error before its body is read, unless it is `whole` that is
    wanted.
    """

    def __init__(self, url: Url, *, whole: bool = False) -> None:
        super().__init__(url)
        import aiohttp

        self._whole = whole
        limit = _TIMEOUT_S
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=limit, sock_read=limit)
        # A connection that breaks, a body that ends early, a server that is busy.
        broken = (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, TimeoutError)
        self._passing = (*broken, _BusyError)
        self._size: int | None = None

    def first(self, length: int) -> tuple[bytes, int]:
        chunk = self.fetch([(0, length)])[0]
        assert self._size is not None
        return chunk, self._size

    def fetch(self, spans: _Ranges) -> list[bytes]:
        from fsspec.asyn import sync

        asked = [(self, *span) for span in spans]
        chunks: list[bytes] = sync(self._store.loop, _fetched, asked)
        return chunks

    async def _persistently(self, gate: asyncio.Semaphore, offset: int, length: int) -> bytes:
        """The bytes of a span, fetched again after errors that may pass."""
        async with gate:
            for attempt in range(_ATTEMPTS - 1):
                try:
                    return await self._get(offset, length)
                except self._passing:
                    await asyncio.sleep(_FIRST_PAUSE_S * 2**attempt)
            return await self._get(offset, length)

    async def _get(self, offset: int, length: int) -> bytes:
        session = await self._store.set_session()
        options = dict(self._store.kwargs)
        options["headers"] = {
            **options.pop("headers", {}),
            "Range": f"bytes={offset}-{offset + length - 1}",
            "Accept-Encoding": "identity",
        }
        url = self._store.encode_url(self._path)
        async with session.get(url, timeout=self._timeout, **options) as answer:
            is_empty = answer.status == 200 and answer.headers.get("Content-Length") == "0"
            if is_empty or (answer.status == 416 and self._size is None):
                self._size = 0
                return b""
            if answer.status == 200 and not self._whole:
                # Its body is not read: leaving the context drops the connection.
                raise UnsupportedSlideError(
                    f"{self._url} is on a server that does not give parts of files (it answers a"
                    " request for a range with the whole); xmag would have to fetch all of it:"
                    " download it, and open the local file"
                )
            if answer.status not in (200, 206):
                passing = answer.status >= 500 or answer.status == 429
                raise (_BusyError if passing else StatusError)(answer.status)
            self.version = self.version or _version(answer.headers)
            expected = length
            if answer.status == 206:
                expected = self._expected(answer.headers.get("Content-Range", ""), offset, length)
            body = bytearray()
            async for piece in answer.content.iter_any():
                body += piece
                if len(body) > expected:
                    break
        if len(body) != expected and answer.status == 206:
            raise _cut_short(self._url, len(body), expected, offset)
        return bytes(body[:length])

    def _expected(self, content_range: str, offset: int, length: int) -> int:
        """Length of the answer by its Content-Range; SlideError where that does not fit."""
        said = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", content_range, re.ASCII)
        if said is None:
            raise SlideError(
                f"{self._url} answers with the range {content_range!r}; expected 'bytes"
                " FIRST-LAST/SIZE': its server cannot be used; download the file"
            )
        start, last, total = map(int, said.groups())
        self._size = total if self._size is None else self._size
        expected = min(offset + length, total) - offset
        if total != self._size or (start, last) != (offset, offset + expected - 1):
            raise SlideError(
                f"{self._url} gave bytes {start}-{last} of {total} for"
                f" {offset}-{offset + length - 1} of {self._size}; the file was replaced while it"
                " was read: open it again"
            )
        return expected


class StatusError(Exception):
    """An answer of a server with an HTTP status that is an error."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class _BusyError(StatusError):
    """A status that may pass."""


def _version(facts: Mapping[str, Any]) -> str | None:
    """Version of an object, its ETag or time, in the facts of a store; None without one."""
    return next((f"{key} {facts[key]}" for key in _VERSIONS if facts.get(key)), None)


def _merged(ranges: _Ranges) -> list[tuple[int, int]]:
    """The spans to fetch for `ranges`, in order, those that lie close together merged."""
    from fsspec.utils import merge_offset_ranges

    wanted = sorted({span for span in ranges if span[1]})
    starts = [offset for offset, _ in wanted]
    # Older versions of fsspec take the end of the last range for the end of all that are merged.
    ends = list(accumulate((offset + length for offset, length in wanted), max))
    _, starts, ends = merge_offset_ranges(
        [""] * len(wanted), starts, ends, max_gap=_GAP_BYTES, max_block=_MOST_MERGED_BYTES
    )
    return [(start, end - start) for start, end in zip(starts, ends, strict=True)]


def _cut_short(url: Url, found: int, expected: int, offset: int) -> SlideError:
    return SlideError(
        f"{url} gave {found} of {expected} bytes at offset {offset}; its server or the network"
        " fails: try again"
    )
