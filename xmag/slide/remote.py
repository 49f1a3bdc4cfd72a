"""Slides at URLs, read by ranges of bytes over HTTP or from an object store."""

import asyncio
import io
import logging
import threading
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from xmag.errors import ClosedSlideError, DamagedSlideError, SlideError, UnsupportedSlideError
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

Ranges = Sequence[tuple[int, int]]
"""(offset, length) of each range of bytes."""


class RemoteSource:
    """A ByteSource over a file at a URL; usable from many threads at once.

    Ranges that lie close together are fetched with one request, and several requests are under way
    at once. Raises SlideError where the file cannot be reached, and UnsupportedSlideError where the
    server gives whole files only.
    """

    def __init__(self, url: Url, *, timeout_s: float | None = None) -> None:
        self.url = url
        self._lock = threading.Lock()
        self._closed = False
        self.bytes_fetched = 0
        self.requests = 0
        timeout_s = _TIMEOUT_S if timeout_s is None else timeout_s
        with retold(SlideError, url):
            self._fetcher: _Fetcher = (
                _HttpRanges(url, timeout_s) if url.scheme in ("http", "https") else _Store(url)
            )
            self.head, self.size = self._fetcher.first(_HEAD_BYTES)
        self._count([self.head])
        if not self.size:
            raise DamagedSlideError(f"{url.name} is empty; copy it there again")

    @property
    def name(self) -> str:
        """Base name of the file."""
        return self.url.name

    @property
    def version(self) -> str | None:
        """ETag or time that changes when the file is written; None where the store has none."""
        return self._fetcher.version

    def read_many(self, ranges: Ranges) -> list[bytes]:
        """The bytes of each (offset, length); DamagedSlideError where the file is too short."""
        if self._closed:
            raise ClosedSlideError(
                f"{self.url.name} is closed; open the slide again to read from it"
            )
        for offset, length in ranges:
            if offset + length > self.size:
                raise DamagedSlideError(
                    f"{self.url.name} should hold {length} bytes at offset {offset}, but has only"
                    f" {self.size} in all; the file is truncated or damaged: copy it there again"
                )
        spans = _merged(ranges)
        with retold(SlideError, self.url):
            chunks = self._fetcher.fetch(spans)
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

    def file(self) -> "RangeFile":
        """A file object over the source, for a parser that hops between small pieces."""
        return RangeFile(self)

    def close(self) -> None:
        """Close the source, and log the bytes fetched. Closing twice is fine."""
        if not self._closed:
            logger.info(
                "%s: %d of %d bytes fetched in %d requests",
                self.url.name,
                self.bytes_fetched,
                self.size,
                self.requests,
            )
        self._closed = True

    def _count(self, chunks: Sequence[bytes]) -> None:
        with self._lock:
            self.requests += len(chunks)
            self.bytes_fetched += sum(map(len, chunks))


class RangeFile(io.RawIOBase):
    """A read-only file object that fetches blocks as they are needed and keeps them.

    `failure` is the first error of fetching: a parser may take it for a fault of the file, and go
    on with a part of it.
    """

    def __init__(self, source: RemoteSource) -> None:
        self.name = source.url.name
        self.failure: SlideError | None = None
        self._source = source
        self._at = 0
        self._blocks = {0: source.head}

    def readable(self) -> bool:
        """Whether bytes can be read: always."""
        return True

    def seekable(self) -> bool:
        """Whether offsets can be set: always."""
        return True

    def tell(self) -> int:
        """The offset of the next byte."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to an offset."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._source.size}[whence]
        if base + offset < 0:
            raise ValueError(f"there is no offset {base + offset}")
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer as far as the file goes; returns the number of bytes."""
        view = memoryview(buffer).cast("B")
        data = self.read(len(view))
        view[: len(data)] = data
        return len(data)

    def read(self, size: int = -1) -> bytes:
        """The next bytes, as far as the file goes. DamagedSlideError for far too many."""
        left = max(self._source.size - self._at, 0)
        size = left if size is None or size < 0 else min(size, left)
        if not size:
            return b""
        first, last = self._at // _BLOCK_BYTES, (self._at + size - 1) // _BLOCK_BYTES
        try:
            self._fetch([block for block in range(first, last + 1) if block not in self._blocks])
        except SlideError as error:
            self.failure = self.failure or error
            raise
        data = b"".join(self._blocks[block] for block in range(first, last + 1))
        start = self._at - first * _BLOCK_BYTES
        self._at += size
        return data[start : start + size]

    def _fetch(self, blocks: list[int]) -> None:
        if (len(self._blocks) + len(blocks)) * _BLOCK_BYTES > _MOST_PARSED_BYTES:
            raise DamagedSlideError(
                f"its directories ask for more than {_MOST_PARSED_BYTES} bytes; it is damaged:"
                " copy it there again"
            )
        size = self._source.size
        starts = [block * _BLOCK_BYTES for block in blocks]
        ranges = [(start, min(_BLOCK_BYTES, size - start)) for start in starts]
        self._blocks.update(zip(blocks, self._source.read_many(ranges), strict=True))


class _Fetcher(Protocol):
    version: str | None

    def first(self, length: int) -> tuple[bytes, int]:
        """The first bytes, at most `length`, and the size of the file."""

    def fetch(self, spans: Ranges) -> list[bytes]:
        """The bytes of each span."""


class _Store:
    """Byte ranges of an object in a store, by fsspec's own means."""

    def __init__(self, url: Url) -> None:
        facts = url.info()
        self._size = int(facts["size"])
        self.version: str | None = _version(facts)
        self._store, self._path = url.store()

    def first(self, length: int) -> tuple[bytes, int]:
        """The first bytes, at most `length`, and the size of the object."""
        return (self.fetch([(0, min(length, self._size))])[0] if self._size else b""), self._size

    def fetch(self, spans: Ranges) -> list[bytes]:
        """The bytes of each span."""
        starts = [offset for offset, _ in spans]
        ends = [offset + length for offset, length in spans]
        found = self._store.cat_ranges([self._path] * len(spans), starts, ends, on_error="return")
        for chunk in found:
            if isinstance(chunk, BaseException):
                raise chunk
        return [bytes(chunk) for chunk in found]


class _HttpRanges:
    """Ranges of a file on an HTTP server, through the session that fsspec sets up.

    fsspec would take a whole file for the range that it asked for; here that is an error before
    its body is read.
    """

    def __init__(self, url: Url, timeout_s: float) -> None:
        self._url = url
        self._store, self._path = url.store()  # which tells of packages that are missing
        import aiohttp
        from fsspec.asyn import sync

        self._sync = sync
        self._timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=timeout_s, sock_read=timeout_s
        )
        # A connection that breaks, or a body that ends early.
        self._passing = (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, TimeoutError)
        self._size: int | None = None
        self.version: str | None = None

    def first(self, length: int) -> tuple[bytes, int]:
        """The first bytes, at most `length`, and the size of the file."""
        chunk = self.fetch([(0, length)])[0]
        assert self._size is not None
        return chunk, self._size

    def fetch(self, spans: Ranges) -> list[bytes]:
        """The bytes of each span."""
        chunks: list[bytes] = self._sync(self._store.loop, self._fetch_all, spans)
        return chunks

    async def _fetch_all(self, spans: Ranges) -> list[bytes]:
        session = await self._store.set_session()
        gate = asyncio.Semaphore(_MOST_REQUESTS)

        async def one(offset: int, length: int) -> bytes:
            async with gate:
                return await self._persistently(session, offset, length)

        tasks = [asyncio.ensure_future(one(*span)) for span in spans]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()

    async def _persistently(self, session: Any, offset: int, length: int) -> bytes:
        """The bytes of a span, fetched again after errors that may pass."""
        for attempt in range(_ATTEMPTS):
            try:
                return await self._get(session, offset, length)
            except _StatusError as error:
                if attempt == _ATTEMPTS - 1 or (error.status < 500 and error.status != 429):
                    raise
            except self._passing:
                if attempt == _ATTEMPTS - 1:
                    raise
            await asyncio.sleep(_FIRST_PAUSE_S * 2**attempt)
        raise AssertionError("the last attempt returns or raises")

    async def _get(self, session: Any, offset: int, length: int) -> bytes:
        options = dict(self._store.kwargs)
        options["headers"] = {
            **options.pop("headers", {}),
            "Range": f"bytes={offset}-{offset + length - 1}",
            "Accept-Encoding": "identity",
        }
        url = self._store.encode_url(self._path)
        async with session.get(url, timeout=self._timeout, **options) as answer:
            if answer.status == 200:
                # Its body is not read: leaving the context drops the connection.
                if answer.headers.get("Content-Length") == "0":
                    self._size = 0
                    return b""
                raise UnsupportedSlideError(
                    f"{self._url} is on a server that does not give parts of files (it answers a"
                    " request for a range with the whole); xmag would have to fetch all of it:"
                    " download it, and open the local file"
                )
            if answer.status == 416 and self._size is None:
                self._size = 0
                return b""
            if answer.status != 206:
                raise _StatusError(answer.status)
            self.version = self.version or _version(answer.headers)
            expected = self._expected(answer.headers.get("Content-Range", ""), offset, length)
            body = bytearray()
            while len(body) <= expected:
                piece = await answer.content.read(expected + 1 - len(body))
                if not piece:
                    break
                body += piece
        if len(body) != expected:
            raise _cut_short(self._url, len(body), expected, offset)
        return bytes(body)

    def _expected(self, content_range: str, offset: int, length: int) -> int:
        """Length of the answer by its Content-Range; SlideError where that does not fit."""
        unit, _, rest = content_range.partition(" ")
        span, _, total = rest.partition("/")
        start, _, end = span.partition("-")
        if unit != "bytes" or not (start.isdecimal() and end.isdecimal() and total.isdecimal()):
            raise SlideError(
                f"{self._url} answers with the range {content_range!r}; expected 'bytes"
                " FIRST-LAST/SIZE': its server cannot be used; download the file"
            )
        expected = min(offset + length, int(total)) - offset
        if self._size is None:
            self._size = int(total)
        if int(total) != self._size or (int(start), int(end)) != (offset, offset + expected - 1):
            raise SlideError(
                f"{self._url} gave bytes {span} of {total} for {offset}-{offset + length - 1} of"
                f" {self._size}; the file was replaced while it was read: open it again"
            )
        return expected


class _StatusError(Exception):
    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


def _version(facts: Mapping[str, Any]) -> str | None:
    """Version of an object, its ETag or time, in the facts of a store; None without one."""
    return next((f"{key} {facts[key]}" for key in _VERSIONS if facts.get(key)), None)


def _merged(ranges: Ranges) -> list[tuple[int, int]]:
    """The spans to fetch for `ranges`, in order, those that lie close together merged."""
    spans: list[tuple[int, int]] = []
    for offset, length in sorted({span for span in ranges if span[1]}):
        if spans:
            start, so_far = spans[-1]
            end = max(start + so_far, offset + length)
            inside = offset + length <= start + so_far
            near = offset - (start + so_far) <= _GAP_BYTES and end - start <= _MOST_MERGED_BYTES
            if inside or near:
                spans[-1] = (start, end - start)
                continue
        spans.append((offset, length))
    return spans


def _cut_short(url: Url, found: int, expected: int, offset: int) -> SlideError:
    return SlideError(
        f"{url} gave {found} of {expected} bytes at offset {offset}; its server or the network"
        " fails: try again"
    )
