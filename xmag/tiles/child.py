"""One decoding process, as the process that started it sees it."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from xmag.errors import XmagError
from xmag.tiles.arena import Arena
from xmag.tiles.decoder import DecodeJob, Free, FromChild

_DIES_S = 2.0
"""Seconds that a process gets to be gone after SIGKILL; one that waits for a dead disk is not."""


class GoneError(Exception):
    """The child has died, or talks no sense any more."""


def _launched(
    module: str, call: str, fds: tuple[int, ...]
) -> tuple["subprocess.Popen[bytes]", "Connection[Any, Any]"]:
    """A process that imports `main` from a module and does `call`, and our end of the line."""
    ours, theirs = socket.socketpair()
    # The child finds this very xmag, wherever the caller's sys.path found it.
    root = str(Path(__file__).parents[2])
    code = (
        f"import sys; sys.path.insert(0, {root!r}); from {module} import main;"
        f" {call.format(fd=theirs.fileno())}"
    )
    with theirs, _told(ours):
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", code],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(), *fds),
            # Ctrl-C goes to this process, which then ends the children.
            process_group=0,
            # Nothing there multiplies matrices: threads for that would only take memory.
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        )
    return process, Connection(ours.detach())


@contextmanager
def _told(ours: socket.socket) -> Iterator[None]:
    """XmagError where the system starts no process."""
    try:
        yield
    except OSError as error:
        ours.close()
        raise XmagError(
            f"no process to decode slides can be started ({error.strerror}); with processes=0"
            " slides are decoded in this process"
        ) from error


def start_child(
    module: str, arena: Arena, *arguments: object
) -> tuple["subprocess.Popen[bytes]", "Connection[Any, Any]"]:
    """A child that runs ``module.main(connection_fd, arena_fd, *arguments)``, and our end of it.

    The arguments are written out as Python literals.
    """
    passed = ", ".join(map(repr, (arena.fd, *arguments))).replace("{", "{{").replace("}", "}}")
    return _launched(module, f"main({{fd}}, {passed})", (arena.fd,))


def end_children(
    children: Iterable[tuple["subprocess.Popen[bytes]", "Connection[Any, Any]"]],
) -> None:
    """Hang up on children, and see every one end."""
    children = list(children)
    for _, connection in children:
        connection.close()
    for process, _ in children:
        try:
            process.wait(_DIES_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def how_it_ended(status: int) -> str:
    """What the exit status of a child says, for a message."""
    return f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"


class Child:
    """A decoding process, the slides it has at hand, and how long it has been at the first."""

    def __init__(self, call: str, fds: tuple[int, ...], slots: list[int]) -> None:
        """Start the process; `call` is what it calls, with ``{fd}`` for its end of the line."""
        self.slots, self.jobs = slots, deque[DecodeJob]()
        self.has_started, self.begun = False, False
        self._worked_s, self._since = 0.0, time.monotonic()
        self.process, self.connection = _launched("xmag.tiles.worker", call, fds)

    def send(self, message: DecodeJob | Free) -> None:
        """Send a message, unless the child has died: that is noticed when it is read from."""
        try:
            self.connection.send(message)
        except (BrokenPipeError, ConnectionResetError):
            return

    def receive(self) -> FromChild:
        """The next message; GoneError where none will come."""
        try:
            worked_s, message = self.connection.recv()
        # Before a process dies of a wild pointer it may say anything.
        except Exception as error:
            raise GoneError from error
        self._worked_s, self._since = worked_s, time.monotonic()
        result: FromChild = message
        return result

    def add(self, job: DecodeJob) -> None:
        """Give it one more slide."""
        if not self.jobs:
            self._since = time.monotonic()
        self.jobs.append(job)
        self.send(job)

    def finish_job(self) -> None:
        """Note that it is done with the slide it was at."""
        self.jobs.popleft()
        self.begun, self._worked_s = False, 0.0

    def resume_clock(self) -> None:
        """Note that it can go on: it had no free slot."""
        self._since = time.monotonic()

    def seconds_left(self, limit_s: float) -> float:
        """How long it may still be silent, if its slide may take `limit_s`."""
        return limit_s - self._worked_s - (time.monotonic() - self._since)

    def end(self) -> str:
        """Make sure that it is dead; how it died, in words."""
        self.connection.close()
        try:
            status = self.process.wait(_DIES_S)
        except subprocess.TimeoutExpired:
            self.kill()
            return "stopped answering"
        if status == -signal.SIGKILL:
            return "was killed (signal SIGKILL), most likely because memory ran out"
        if status < 0:
            return f"crashed (signal {_name_of(-status)})"
        return f"ended by itself (status {status})"

    def kill(self) -> None:
        """Kill it; one that the kernel cannot end now is left to it."""
        self.process.kill()
        try:
            self.process.wait(_DIES_S)
        except subprocess.TimeoutExpired:
            return


def _name_of(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)
