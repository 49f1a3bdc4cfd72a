"""A local HTTP server that speaks as much of the Hub's protocol as fetching a model needs.

GET /api/models/<owner>/<name>[/revision/<rev>] lists a repository; HEAD and GET
/<owner>/<name>/resolve/<rev>/<file> give a file with ETag and X-Repo-Commit, also by range.
"""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class FakeHub:
    """What the server has, how it misbehaves, and what it was asked."""

    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: dict[str, str] = field(default_factory=dict)
    """repo -> the token that may read it"""
    commit: str = "c" * 40
    cut_body_after: int | None = None
    """Close the connection after so many bytes of a body, for the next `cuts` downloads."""
    cuts: int = 0
    status: int | None = None
    """Answer every request for a file with this status."""
    requests: list[str] = field(default_factory=list)
    url: str = ""


@contextmanager
def serve(hub: FakeHub) -> Iterator[FakeHub]:
    """The hub at `hub.url`, on a free port of this machine."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        listing = re.fullmatch(
            r"/api/models/([^/]+/[^/]+)(?:/revision/([^/?]+))?(\?.*)?", self.path
        )
        if listing:
            self._list(listing[1], listing[2] or "main")
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/([^?]+)(\?.*)?", self.path):
            self._resolve(found[1], found[2], found[3])
        else:
            self._refuse(404, "no such route")

    def _list(self, repo: str, revision: str) -> None:
        if repo not in self.hub.repos:
            # The Hub answers 401 to strangers, so as not to say whether a private one exists.
            self._refuse(401, "Repository not found", "RepoNotFound")
        elif revision not in ("main", "v1", self.hub.commit):
            self._refuse(404, "Invalid rev id", "RevisionNotFound")
        else:
            files = [{"rfilename": name} for name in self.hub.repos[repo]]
            listing = {"id": repo, "modelId": repo, "sha": self.hub.commit, "siblings": files}
            body = json.dumps({**listing, "tags": [], "downloads": 0}).encode()
            self._send(200, body, {"Content-Type": "application/json"})

    def _resolve(self, repo: str, revision: str, name: str) -> None:
        token = self.hub.gated.get(repo)
        given = self.headers.get("Authorization")
        if self.hub.status is not None:
            self._refuse(self.hub.status, "as told")
        elif token is not None and given is None:
            self._refuse(401, "Access to this model is restricted", "GatedRepo")
        elif token is not None and given != f"Bearer {token}":
            self._refuse(403, "You are not in the authorized list", "GatedRepo")
        elif name not in self.hub.repos.get(repo, {}):
            self._refuse(404, "Entry not found", "EntryNotFound")
        else:
            self._send_file(self.hub.repos[repo][name])

    def _send_file(self, body: bytes) -> None:
        headers: dict[str, Any] = {
            "ETag": f'"{hashlib.sha256(body).hexdigest()}"',
            "X-Repo-Commit": self.hub.commit,
            "Accept-Ranges": "bytes",
        }
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if wanted and self.command == "GET":
            start = int(wanted[1])
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
            self._send(206, body[start:], headers)
        else:
            self._send(200, body, headers)

    def _send(self, status: int, body: bytes, headers: dict[str, Any]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": len(body)}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command == "HEAD":
            return
        hub = self.hub
        if hub.cuts > 0 and hub.cut_body_after is not None and "/resolve/" in self.path:
            hub.cuts -= 1
            self.wfile.write(body[: hub.cut_body_after])
            self.close_connection = True
            return
        self.wfile.write(body)

    def _refuse(self, status: int, message: str, code: str | None = None) -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        if code != "RepoNotFound":
            headers["X-Repo-Commit"] = self.hub.commit
        self._send(status, json.dumps({"error": message}).encode(), headers)

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are in `hub.requests`; nothing is printed."""
