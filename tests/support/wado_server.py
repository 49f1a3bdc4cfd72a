"""A local WADO-RS server (DICOM PS3.18, 10.4) of a folder, which misbehaves when told to."""

import json
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pydicom
from support.dicom_slides import frames_of
from support.serving import serving


@dataclass
class WadoServer:
    """The instances in a folder, how they are given, and what was asked for."""

    url: str = ""
    """Of the series."""
    says_syntax: bool = True
    """Name the transfer syntax among the attributes, as most servers do."""
    status: int | None = None
    """Answer everything with this status."""
    failures: int = 0
    """Answer so many requests with status 503 before the first good answer."""
    authorization: str | None = None
    """Answer 401 to requests without this header."""
    is_silent: bool = False
    """Accept requests, and say nothing."""
    missing_bytes: int = 0
    """Leave so many bytes off the end of frames' answers, and say so."""
    lost_bytes: int = 0
    """Leave so many bytes off the end of frames' answers, which say that they are there."""
    lost_parts: int = 0
    """Leave so many frames out."""
    instances: dict[str, Any] = field(default_factory=dict)
    metadata: list[Any] = field(default_factory=list)
    frames: list[tuple[str, int]] = field(default_factory=list)
    """(SOPInstanceUID, number from 1) of the frames that were asked for."""
    requests: list[tuple[str, str]] = field(default_factory=list)
    """(path, Accept) of all requests."""
    released: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)


@contextmanager
def serve_series(folder: Path) -> Iterator[WadoServer]:
    """The series in a folder at `url`, on a free port of this machine."""
    state = WadoServer()
    for path in sorted(folder.iterdir()):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dataset = pydicom.dcmread(path)
            state.instances[dataset.SOPInstanceUID] = frames_of(dataset)
            syntax = dataset.file_meta.TransferSyntaxUID
            place = f"studies/{dataset.StudyInstanceUID}/series/{dataset.SeriesInstanceUID}"
            del dataset.PixelData
            content = dataset.to_json_dict()
        content["00083002"] = {"vr": "UI", "Value": [syntax]}
        state.metadata.append(content)
    with serving(_Handler, released=state.released, state=state) as root:
        state.url = f"{root}/dicom-web/{place}"
        yield state


class _Handler(BaseHTTPRequestHandler):
    state: WadoServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        state = self.state
        with state.lock:
            state.requests.append((self.path, self.headers.get("Accept", "")))
            fails = state.failures > 0
            state.failures -= fails
        if state.is_silent:
            state.released.wait(800)
            self.close_connection = True
        elif fails:
            self._answer(503, b"busy", "text/plain")
        elif state.status is not None:
            self._answer(state.status, b"as told", "text/plain")
        elif state.authorization not in (None, self.headers.get("Authorization")):
            self._answer(401, b"who are you", "text/plain")
        elif self.path.endswith("/metadata"):
            self._give_metadata()
        elif found := re.search(r"/instances/([0-9.]+)/frames/([0-9,]+)$", self.path):
            self._give_frames(found[1], [int(number) for number in found[2].split(",")])
        else:
            self._answer(404, b"no such thing", "text/plain")

    def _give_metadata(self) -> None:
        hidden = () if self.state.says_syntax else ("00083002",)
        content = [
            {tag: element for tag, element in instance.items() if tag not in hidden}
            for instance in self.state.metadata
        ]
        self._answer(200, json.dumps(content).encode(), "application/dicom+json")

    def _give_frames(self, uid: str, numbers: list[int]) -> None:
        state = self.state
        stored = state.instances.get(uid, [])
        if max(numbers) > len(stored):
            self._answer(404, b"no such frame", "text/plain")
            return
        with state.lock:
            state.frames += [(uid, number) for number in numbers]
        body = b""
        # As they lie in the instance, whatever the order in which they are asked for.
        for number in sorted(numbers)[: len(numbers) - state.lost_parts]:
            body += b"--part\r\nContent-Type: application/octet-stream\r\n\r\n"
            body += stored[number - 1] + b"\r\n"
        body += b"--part--\r\n"
        body = body[: len(body) - state.missing_bytes]
        self._answer(200, body, 'multipart/related; boundary="part"', cut=state.lost_bytes)

    def _answer(self, status: int, body: bytes, kind: str, cut: int = 0) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) - cut])
        if cut:
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""
