"""DICOM slides on a server, read by frame through DICOMweb (PS3.18), with dicomweb-client.

What is asked for are the attributes of a series and the frames that pixels are made of, as they are
stored. Credentials come with the URL, from ``XMAG_DICOMWEB_TOKEN``, or from a .netrc file.
"""

import json
import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import numpy as np
from numpy.typing import NDArray

from xmag.errors import ClosedSlideError, DamagedSlideError, MissingExtraError, SlideError
from xmag.slide.dicom import (
    J2K_SYNTAX,
    JPEG_SYNTAX,
    RAW_SYNTAX,
    VOLUME,
    Attributes,
    DicomReader,
    kind,
    named,
    text,
)
from xmag.slide.dicom_files import TEXTS, WANTED
from xmag.slide.integrity import damaged
from xmag.slide.remote import StatusError
from xmag.urls import Url, retold

_SERIES = re.compile(r"(.+)/studies/([0-9.]+)/series/([0-9.]+)/?")
_SCHEMES = {"http": "http", "https": "https", "dicomweb": "https"}
_TIMEOUT_S = (20.0, 60.0)
"""Seconds to connect, and without a byte, after which a request has failed."""
_ATTEMPTS, _FIRST_PAUSE_MS = 3, 250
_MOST_FRAMES = 32
"""Frames of a request: their numbers stand in its URL."""
_MOST_BYTES = 1 << 28
"""Of an answer."""
_STORED = ("application/octet-stream", "*")
_MEDIA_TYPES = {JPEG_SYNTAX: "image/jpeg", J2K_SYNTAX: "image/jp2"}
_MAGIC = {b"\xff\xd8": JPEG_SYNTAX, b"\xff\x4f": J2K_SYNTAX}


def is_series(place: object) -> bool:
    """Whether a place is the URL of a series on a DICOMweb server."""
    return isinstance(place, Url) and place.scheme in _SCHEMES and _parts(place) is not None


def _parts(url: Url) -> tuple[str, str, str] | None:
    """The path of the service, and the UIDs of study and series."""
    found = _SERIES.fullmatch(urlsplit(url.text).path)
    return None if found is None else (found[1], found[2], found[3])


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
        self.url, parts, split = url, _parts(url), urlsplit(url.text)
        assert parts is not None
        service, self._study, self._series = parts
        self._parameters = dict(parse_qsl(split.query)) or None
        self._session = requests.Session()
        if split.username is not None:
            self._session.auth = (unquote(split.username), unquote(split.password or ""))
        elif token := os.environ.get("XMAG_DICOMWEB_TOKEN"):
            self._session.auth = _bearer(token)
        self._session.hooks["response"].append(self._check_whole)
        host = split.netloc.rpartition("@")[2]
        self._client = DICOMwebClient(
            f"{_SCHEMES[split.scheme]}://{host}{service}", session=self._session, timeout=_TIMEOUT_S
        )
        self._client.set_http_retry_params(
            max_attempts=_ATTEMPTS, wait_exponential_multiplier=_FIRST_PAUSE_MS
        )
        self._lock, self._closed = threading.Lock(), False
        self.bytes_fetched = 0

    def metadata(self) -> list[Any]:
        """The attributes of all instances, in JSON."""
        ask = self._client.retrieve_series_metadata
        return self._asked(lambda: list(ask(self._study, self._series, self._parameters)))

    def frames(self, uid: str, numbers: Sequence[int], syntax: str) -> list[bytes]:
        """Frames of an instance as they are stored, by their numbers from 1, which ascend."""
        media_type = _MEDIA_TYPES.get(syntax)
        types = (*([(media_type, syntax)] if media_type else []), _STORED)
        ask = self._client.retrieve_instance_frames
        found = self._asked(
            lambda: ask(self._study, self._series, uid, numbers, types, self._parameters)
        )
        if len(found) != len(numbers):
            raise SlideError(
                f"{self.url} gave {len(found)} frames of {len(numbers)} that it was asked for; its"
                " server or the network fails: try again"
            )
        with self._lock:
            self.bytes_fetched += sum(map(len, found))
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
        """Raise SlideError where an answer is too long, or the end of its last part is not there.

        dicomweb-client takes what there is for the whole part.
        """
        import requests

        if response.status_code >= 300:
            return
        if int(response.headers.get("Content-Length") or 0) > _MOST_BYTES:
            raise SlideError(f"{self.url} gave more than {_MOST_BYTES} bytes at once")
        boundary = re.search(r'boundary="?([^";]+)', response.headers.get("Content-Type", ""))
        try:
            end = response.content.rstrip()[-100:]
        except (requests.exceptions.ChunkedEncodingError, requests.exceptions.ContentDecodingError):
            end, boundary = b"", boundary or re.match("(.?)", "")
        if boundary and not end.endswith(f"--{boundary[1]}--".encode()):
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
        keyword, form = WANTED.get(int(tag, 16), ("", ""))
        content = element.get("Value") or []
        if form == "items":
            values[keyword] = list(map(_attributes, content))
        elif keyword == "PerFrameFunctionalGroupsSequence":
            values |= {keyword: content, "FirstFrame": list(map(_attributes, content[:1]))}
        elif form != "place" and keyword:
            values[keyword] = content
    return values


def _position(frame: Mapping[str, Any]) -> list[int]:
    (place,) = frame["0048021A"]["Value"]
    return [int(place[tag]["Value"][0]) for tag in ("0048021E", "0048021F")]


class _WebInstance:
    """An instance on a server, whose attributes are known."""

    version: str | None = None

    def __init__(self, server: _Server, found: Mapping[str, Any]) -> None:
        self._server = server
        self.head: Attributes = _attributes(found)
        self._uid = text(self.head, "SOPInstanceUID")
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
        return _MAGIC.get(self._first[:2], RAW_SYNTAX)

    def read_attributes(self) -> Attributes:
        return self.head

    def positions(self, attributes: Attributes) -> NDArray[np.int64]:
        frames = attributes["PerFrameFunctionalGroupsSequence"]
        return np.array([_position(frame) for frame in frames], np.int64).reshape(-1, 2)

    def open(self, attributes: Attributes, frames: int, frame_bytes: int | None) -> None:  # noqa: ARG002 (they are asked for by number)
        self._frame_bytes = frame_bytes

    def read(self, frames: Sequence[int], most: int) -> list[bytes]:
        found: dict[int, bytes] = {}
        wanted = sorted(set(frames))
        if self._first is not None and 0 in wanted:
            found[0] = self._first
            wanted.remove(0)
        for at in range(0, len(wanted), _MOST_FRAMES):
            these = wanted[at : at + _MOST_FRAMES]
            chunks = self._server.frames(self._uid, [n + 1 for n in these], self.syntax)
            found.update(zip(these, chunks, strict=True))
        for frame, data in found.items():
            if len(data) > most or (self._frame_bytes and len(data) < self._frame_bytes):
                raise damaged(f"frame {frame} has {len(data)} bytes; expected at most {most}")
        return [found[frame] for frame in frames]

    def read_many(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        return [self._identity[offset : offset + length] for offset, length in ranges]

    def texts(self) -> Mapping[str, str]:
        from pydicom.datadict import keyword_for_tag

        found: dict[str, str] = {}
        for instance in self._server.metadata():
            if text(_attributes(instance), "SOPInstanceUID") != self._uid:
                continue
            for tag, element in instance.items():
                if element["vr"].encode() in TEXTS:
                    values = element.get("Value") or []
                    parts = [v.get("Alphabetic", "") if isinstance(v, dict) else v for v in values]
                    name = keyword_for_tag(int(tag, 16)) or f"{tag[:4]},{tag[4:]}"
                    found[f"dicom.{name}"] = "\\".join(map(str, parts))
        return found

    def close(self) -> None:
        # Labels are read, and done with, while the slide is open.
        if kind(self.head) == VOLUME:
            self._server.close()


def open_series(url: Url, region: int | None = None) -> DicomReader:
    """The reader of the scan in a series on a server.

    Raises SlideErrors for what cannot be had or read, SeveralScansError where one must be chosen,
    and MissingExtraError without dicomweb-client.
    """
    server = _Server(url)
    try:
        found = server.metadata()
        with retold(DamagedSlideError, url):
            return DicomReader([_WebInstance(server, instance) for instance in found], region)
    except DamagedSlideError as error:
        server.close()
        raise named(error, url.name) from None
    except BaseException:
        server.close()
        raise
