"""A local HTTP server that gives ranges of files, and misbehaves when told to."""

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from support.serving import serving


@dataclass
class RangeServer:
    """The files below a folder, how they are given, and what was asked for."""

    folder: Path
    url: str = ""
    ranges: bool = True
    """Answer ranges; else give the whole file, as a server without them does."""
    status: int | None = None
    """Answer everything with this status."""
    failures: int = 0
    """Answer so many requests with status 503 before the first good answer."""
    failing_request: int | None = None
    """Answer that request, counted from 1, with status 400."""
    missing_bytes: int = 0
    """Leave so many bytes off the end of each answer, which says that they are there."""
    short_ranges: bool = False
    """Answer with half of each range, and say so."""
    token: str | None = None
    """Answer 403 without ``?signature=<token>``."""
    silent_after: int | None = None
    """After so many requests, accept them and say nothing."""
    bytes_sent: int = 0
    requests: list[str] = field(default_factory=list)
    released: threading.Event = field(default_factory=threading.Event)
    counting: threading.Lock = field(default_factory=threading.Lock)

    def has_sent(self, count: int) -> bool:
        """Whether it has sent so many bytes; a moment passes between sending and counting."""
        until = time.monotonic() + 120
        while self.bytes_sent != count and time.monotonic() < until:
            time.sleep(0.01)
        return self.bytes_sent == count


@contextmanager
def serve_folder(folder: Path) -> Iterator[RangeServer]:
    """The files of a folder at `url`, on a free port of this machine."""
    pytest.importorskip("aiohttp", reason="fsspec reads from HTTP servers with it")
    state = RangeServer(folder)
    with serving(_Handler, released=state.released, state=state) as root:
        state.url = root
        yield state


class _Handler(BaseHTTPRequestHandler):
    state: RangeServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        state = self.state
        state.requests.append(self.headers.get("Range", "everything"))
        if state.silent_after is not None and len(state.requests) > state.silent_after:
            state.released.wait(800)
            self.close_connection = True
            return
        path, _, query = self.path.partition("?")
        file = state.folder / path.lstrip("/")
        if state.failures > 0:
            state.failures -= 1
            self._answer(503, b"busy")
        elif len(state.requests) == state.failing_request:
            self._answer(400, b"as told")
        elif state.status is not None:
            self._answer(state.status, b"as told")
        elif state.token is not None and f"signature={state.token}" not in query:
            self._answer(403, b"no signature")
        elif not file.is_file():
            self._answer(404, b"no such file")
        else:
            self._give(file)

    def _give(self, file: Path) -> None:
        size = file.stat().st_size
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not (wanted and self.state.ranges):
            self._answer(200, file.read_bytes())
            return
        first, last = int(wanted[1]), min(int(wanted[2]), size - 1)
        if first >= size:
            self._answer(416, b"", {"Content-Range": f"bytes */{size}"})
            return
        if self.state.short_ranges:
            last = (first + last) // 2
        with file.open("rb") as opened:
            opened.seek(first)
            body = opened.read(last - first + 1)
        # As Apache makes it: from the time of change and the size.
        etag = f'"{file.stat().st_mtime_ns:x}-{size:x}"'
        self._answer(206, body, {"Content-Range": f"bytes {first}-{last}/{size}", "ETag": etag})

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.state.missing_bytes and status == 206:
            body = body[: -self.state.missing_bytes]
            self.close_connection = True
        try:
            self.wfile.write(body)
        except (BrokenPipeError, ConnectionResetError):
            return  # whoever asked has seen enough
        with self.state.counting:
            self.state.bytes_sent += len(body)

    def log_message(self, format: str, *args: object) -> None:
        """Requests are in `state.requests`; nothing is printed."""
