"""An HTTP server on a free port of this machine, in a thread."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that has seen enough hangs up; that is not worth a word."""


@contextmanager
def serving(
    handler: type[BaseHTTPRequestHandler], *, released: threading.Event, **state: object
) -> Iterator[str]:
    """The URL of a server whose handlers have the attributes `state`.

    `released` is set before it ends, for those that keep a client waiting.
    """
    server = _Server(("127.0.0.1", 0), type("Handler", (handler,), state))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        released.set()
        server.shutdown()
        thread.join()
        server.server_close()
