"""DICOM slides on a server, read by frame through DICOMweb (PS3.18), with dicomweb-client.

What is asked for are the attributes of a series and the frames that pixels are made of, as they are
stored. Credentials come with the URL, from ``XMAG_DICOMWEB_TOKEN``, or from a .netrc file.
"""

import json
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
from numpy.typing import NDArray

from xmag.errors import ClosedSlideError, MissingExtraError, SlideError, XmagError
from xmag.slide import dicom
from xmag.slide.dicom_files import TEXTS, WANTED
from xmag.slide.integrity import damaged, named
from xmag.slide.remote import StatusError
from xmag.urls import Url, retold

_SERIES = re.compile(r"(?:https?|dicomweb)://([^?#]+)/studies/([0-9.]+)/series/([0-9.]+)/?", re.I)
_TIMEOUT_S = (20.0, 60.0)
"""Seconds to connect, and without a byte, after which a request has failed."""
_ATTEMPTS, _FIRST_PAUSE_MS = 3, 250
_MOST_CONNECTIONS = 32
"""Kept open: a thread that reads has one."""
_MOST_FRAMES = 32
"""Frames of a request: their numbers stand in its URL."""
_MOST_BYTES = 1 << 28
"""Of an answer."""
_STORED = ("application/octet-stream", "*")
_MEDIA_TYPES = {dicom.JPEG_SYNTAX: "image/jpeg", dicom.J2K_SYNTAX: "image/jp2"}
_MAGIC = {b"\xff\xd8": dicom.JPEG_SYNTAX, b"\xff\x4f": dicom.J2K_SYNTAX}
_TAKER = logging.NullHandler()
"""Where a program does not log, logging writes on stderr what nobody takes."""


def is_series(place: object) -> bool:
    """Whether a place is the URL of a series on a DICOMweb server."""
    return isinstance(place, Url) and _SERIES.fullmatch(place.text) is not None


class _Server:
    """A client for one series; usable from many threads at once."""

    def __init__(self, url: Url) -> None:
        try:
            import requests
            from dicomweb_client import DICOMwebClient
        except ImportError as error:
            raise MissingExtraError(
                f"{url} needs packages that are not installed ({error.name}); run"
                ' pip install "xmag[dicom]"'
            ) from None
        found, parts = _SERIES.fullmatch(url.text), urlsplit(url.text)
        assert found is not None
        self.url, self._closed, self._lock, self.bytes_fetched = url, False, threading.Lock(), 0
        service, *self._series = found.groups()
        self._session = requests.Session()
        self._session.hooks["response"].append(self._check_whole)
        for scheme in ("http://", "https://"):
            adapter = requests.adapters.HTTPAdapter(pool_maxsize=_MOST_CONNECTIONS)
            self._session.mount(scheme, adapter)
        if parts.username is not None:
            self._session.auth = (unquote(parts.username), unquote(parts.password or ""))
        elif token := os.environ.get("XMAG_DICOMWEB_TOKEN"):
            self._session.auth = _bearer(token)
        logging.getLogger("dicomweb_client").addHandler(_TAKER)
        self._client = DICOMwebClient(
            f"{'http' if url.scheme == 'http' else 'https'}://{service.rpartition('@')[2]}",
            session=self._session,
            timeout=_TIMEOUT_S,
        )
        self._client.set_http_retry_params(
            max_attempts=_ATTEMPTS, wait_exponential_multiplier=_FIRST_PAUSE_MS
        )

    def metadata(self) -> list[Any]:
        """The attributes of all instances, in JSON."""
        return self._asked(lambda: self._client.retrieve_series_metadata(*self._series))

    def frames(self, uid: str, numbers: Sequence[int], syntax: str) -> list[bytes]:
        """Frames of an instance as they are stored, by their numbers from 1, which ascend."""
        known = [(_MEDIA_TYPES[syntax], syntax)] if syntax in _MEDIA_TYPES else []
        place, types = (*self._series, uid), (*known, _STORED)
        found = self._asked(
            lambda: self._client.retrieve_instance_frames(*place, numbers, media_types=types)
        )
        if len(found) != len(numbers):
            raise SlideError(
                f"{self.url} gave {len(found)} frames of {len(numbers)} that it was asked for; its"
                " server or the network fails: try again"
            )
        return list(map(bytes, found))

    def _asked(self, ask: Callable[[], list[Any]]) -> list[Any]:
        """The answer to a request; SlideError, without the library's words, where it fails."""
        import requests
        import retrying

        if self._closed:
            raise ClosedSlideError(f"{self.url} is closed; open the slide again to read from it")
        with retold(SlideError, self.url):
            try:
                return ask()
            except requests.exceptions.Timeout:
                raise TimeoutError from None
            except requests.exceptions.RequestException as error:
                if error.response is None:
                    raise ConnectionError from None
                raise StatusError(error.response.status_code) from None
            except retrying.RetryError as error:
                raise StatusError(error.last_attempt.value.status_code) from None

    def _check_whole(self, response: Any, **_: Any) -> None:
        """Raise SlideError where an answer is too long, or is cut, which its client lets pass."""
        import requests

        if response.status_code >= 300:
            return
        if int(response.headers.get("Content-Length") or 0) > _MOST_BYTES:
            raise SlideError(f"{self.url} gave more than {_MOST_BYTES} bytes at once")
        boundary = re.search(r'boundary="?([^";]+)', response.headers.get("Content-Type", ""))
        try:
            data = response.content
            is_whole = not boundary or data.rstrip().endswith(f"--{boundary[1]}--".encode())
        except (requests.exceptions.ChunkedEncodingError, requests.exceptions.ContentDecodingError):
            data, is_whole = b"", False
        with self._lock:
            self.bytes_fetched += len(data)
        if not is_whole:
            raise SlideError(
                f"{self.url} gave an answer that was cut short; its server or the network fails:"
                " try again"
            )

    def close(self) -> None:
        """Close its connections. Closing twice is fine."""
        self._closed = True
        self._session.close()


def _bearer(token: str) -> Callable[[Any], Any]:
    def authorised(request: Any) -> Any:
        request.headers["Authorization"] = f"Bearer {token}"
        return request

    return authorised


def _attributes(found: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes that pixels need, of DICOM JSON (PS3.18, F.2)."""
    values: dict[str, Any] = {}
    for tag, element in found.items():
        keyword, kind = WANTED.get(int(tag, 16), ("", ""))
        content = element.get("Value") or []
        if kind == "items":
            values[keyword] = list(map(_attributes, content))
        elif keyword == "PerFrameFunctionalGroupsSequence":
            values |= {keyword: content, "FirstFrame": list(map(_attributes, content[:1]))}
        elif kind != "place" and keyword:
            values[keyword] = content
    return values


class _WebInstance:
    """An instance on a server, whose attributes are known."""

    version: str | None = None

    def __init__(self, server: _Server, found: Mapping[str, Any]) -> None:
        self._server = server
        self.head: dicom.Attributes = _attributes(found)
        self._uid = dicom.text(self.head, "SOPInstanceUID")
        self._identity = json.dumps(self.head, sort_keys=True).encode()
        self.size = len(self._identity)
        self._first: bytes | None = None

    @property
    def syntax(self) -> str:
        """Its transfer syntax: as the server says, or as its first frame begins."""
        for keyword in ("TransferSyntaxUID", "AvailableTransferSyntaxUID"):
            if len(said := self.head.get(keyword) or []) == 1:
                return str(said[0])
        if self._first is None:
            (self._first,) = self._server.frames(self._uid, [1], "")
        return _MAGIC.get(self._first[:2], dicom.RAW_SYNTAX)

    @property
    def attributes(self) -> dicom.Attributes:
        return self.head

    def positions(self) -> NDArray[np.int64]:
        places = [
            frame["0048021A"]["Value"][0][tag]["Value"][0]
            for frame in self.head["PerFrameFunctionalGroupsSequence"]
            for tag in ("0048021E", "0048021F")
        ]
        return np.array(places, np.int64).reshape(-1, 2)

    def open(self, frames: int, frame_bytes: int | None) -> None:  # noqa: ARG002 (by number)
        self._frame_bytes = frame_bytes or 0

    def read(self, frames: Sequence[int], most: int) -> list[bytes]:
        found = {} if self._first is None else {0: self._first}
        wanted = sorted(set(frames) - set(found))
        for at in range(0, len(wanted), _MOST_FRAMES):
            these = wanted[at : at + _MOST_FRAMES]
            chunks = self._server.frames(self._uid, [n + 1 for n in these], self.syntax)
            found.update(zip(these, chunks, strict=True))
        for frame in frames:
            if not self._frame_bytes <= len(found[frame]) <= most:
                raise damaged(f"frame {frame} has {len(found[frame])} bytes; expected up to {most}")
        return [found[frame] for frame in frames]

    def read_many(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        return [self._identity[offset : offset + length] for offset, length in ranges]

    def texts(self) -> Iterator[tuple[int, str]]:
        for instance in self._server.metadata():
            if dicom.text(_attributes(instance), "SOPInstanceUID") == self._uid:
                for tag, element in instance.items():
                    if element["vr"].encode() in TEXTS:
                        values = element.get("Value") or []
                        texts = [v.get("Alphabetic") if isinstance(v, dict) else v for v in values]
                        yield int(tag, 16), "\\".join(map(str, texts))

    def close(self) -> None:
        # Labels are read, and done with, while the slide is open.
        if dicom.kind(self.head) == dicom.VOLUME:
            self._server.close()


def open_series(url: Url, region: int | None = None) -> dicom.DicomReader:
    """The reader of the scan in a series on a server.

    Raises SlideErrors for what cannot be had or read, SeveralScansError where one must be chosen,
    and MissingExtraError without dicomweb-client.
    """
    server = _Server(url)
    try:
        found = server.metadata()
        try:
            instances = [_WebInstance(server, instance) for instance in found]
            with named(url.name):
                reader = dicom.DicomReader(instances, region)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, XmagError):
                raise
            # Without the error itself, which may hold some of what it gave.
            raise damaged(f"{url} gives attributes that make no sense") from None
    except BaseException:
        server.close()
        raise
    reader.server = server
    return reader
