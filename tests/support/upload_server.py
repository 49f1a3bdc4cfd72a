"""A local HTTP server that takes what huggingface_hub uploads to a model repository.

POST /api/validate-yaml finds no fault with a card, /api/repos/create makes a repository,
/api/models/<repo>/preupload/<rev> says that every file goes into the commit itself, and
/api/models/<repo>/commit/<rev> makes the commit.
"""

import base64
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class UploadHub:
    """What was uploaded to the server, by whom, and how it misbehaves."""

    token: str = "hf_write"
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    status: int | None = None
    """Answer commits with this status."""
    url: str = ""


@contextmanager
def serve(hub: UploadHub) -> Iterator[UploadHub]:
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
    hub: UploadHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(404, {"error": "no such route"})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            self._answer(401, {"error": "Invalid username or password."})
        elif self.path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif self.path == "/api/repos/create":
            self._create(json.loads(body))
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/([^/?]+).*", self.path):
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self._answer(200, {"files": files})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/([^/?]+).*", self.path):
            self._commit(found[1], [json.loads(line) for line in body.splitlines() if line])
        else:
            self._answer(404, {"error": "no such route"})

    def _create(self, wanted: dict[str, Any]) -> None:
        organization = wanted.get("organization") or "someone"
        repo = f"{organization}/{wanted['name']}"
        known = repo in self.hub.repos
        self.hub.repos.setdefault(repo, {})
        private = wanted.get("private") or wanted.get("visibility") == "private"
        self.hub.private.setdefault(repo, bool(private))
        self._answer(409 if known else 200, {"url": f"{self.hub.url}/{repo}"})

    def _commit(self, repo: str, lines: list[dict[str, Any]]) -> None:
        if self.hub.status is not None:
            self._answer(self.hub.status, {"error": "as told"})
            return
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.hub.messages.append(value["summary"])
            else:
                assert line["key"] == "file", line
                self.hub.repos[repo][value["path"]] = base64.b64decode(value["content"])
        commit = "d" * 40
        self._answer(
            200, {"commitUrl": f"{self.hub.url}/{repo}/commit/{commit}", "commitOid": commit}
        )

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is printed."""
