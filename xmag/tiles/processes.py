"""Many slides -> tiles in shared memory, decoded by child processes.

Threads of one process stop scaling at the GIL; processes do not, and a slide whose bytes crash a
decoder takes only its own process down. The children are fresh interpreters that import neither
torch nor the caller's program, so they need no ``__main__`` guard and start in a fraction of a
second. They end when this side hangs up, however it ends.
"""

import os
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from xmag.tiles.shared import Arena
from xmag.tiles.threads import Tiles
from xmag.tiles.worker import DecodeJob, Failed, Filled, Finished, Free, Planned


@dataclass(frozen=True, slots=True)
class Idle:
    """Nothing happened for a moment: time to look whether slots can be released."""


Event = Planned | Filled | Finished | Failed | Idle

SUPPORTED = os.name == "posix"
"""Whether this system can hand sockets and memory to a child process the way this is done here."""

_SLOTS_EACH = 3
"""Slots a child fills in turn: one being written, one on its way, one being copied from."""

_JOBS_EACH = 2
"""Slides a child has at hand, so that it never waits for the next."""

_IDLE_S = 0.002
"""Seconds without an event after which the caller gets to look for slots it can release."""

_GRACE_S = 2.0
"""Seconds a child gets to end by itself once this side has hung up."""


@dataclass(slots=True)
class _Child:
    process: "subprocess.Popen[bytes]"
    connection: "Connection[Any, Any]"
    slots: list[int]
    jobs: deque[DecodeJob] = field(default_factory=deque)


class DecodingPool:
    """Child processes that decode slides; a context manager that leaves none of them behind."""

    def __init__(self, processes: int, *, slot_tiles: int, size_px: int) -> None:
        slots = processes * _SLOTS_EACH
        self._shape = {"slots": slots, "slot_tiles": slot_tiles, "size_px": size_px}
        self.arena = Arena(**self._shape)
        self._lent: set[int] = set()
        self._children: list[_Child] = []
        try:
            for first in range(0, slots, _SLOTS_EACH):
                self._children.append(self._start(list(range(first, first + _SLOTS_EACH))))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def run(self, jobs: Iterable[DecodeJob]) -> Iterator[Event]:
        """What happens to the jobs, as it happens; each ends in Finished or Failed.

        The events of one job come in order, those of several mixed. Give the slot of each Filled
        back with `release` once its tiles are copied.
        """
        waiting = iter(jobs)
        for child in self._children * _JOBS_EACH:
            self._feed(child, waiting)
        while any(child.jobs for child in self._children):
            # A child may be waiting for slots that are still lent, and this side for its tiles.
            timeout = _IDLE_S if self._lent else None
            busy = [child.connection for child in self._children if child.jobs]
            all_ready = wait(busy, timeout)
            if not all_ready:
                yield Idle()
            for ready in all_ready:
                child = next(c for c in self._children if c.connection is ready)
                try:
                    event: Event = child.connection.recv()
                except (EOFError, ConnectionResetError):
                    yield self._replace(child)
                    self._feed(child, waiting)
                    continue
                if isinstance(event, Filled):
                    self._lent.add(event.slot)
                elif isinstance(event, Finished | Failed):
                    child.jobs.popleft()
                    self._feed(child, waiting)
                yield event

    def tiles(self, event: Filled) -> Tiles:
        """The tiles that a Filled event is about; valid until its slot is released."""
        return self.arena.slot(event.slot)[: event.count]

    def release(self, slot: int) -> None:
        """Let a slot be written to again."""
        self._lent.discard(slot)
        self._send(self._children[slot // _SLOTS_EACH], Free(slot))

    def close(self) -> None:
        """Hang up, and see every child end."""
        end_children((child.process, child.connection) for child in self._children)
        self._children.clear()
        self.arena.close()

    def _start(self, slots: list[int]) -> _Child:
        free = [slot for slot in slots if slot not in self._lent]
        process, connection = start_child("xmag.tiles.worker", self.arena, self._shape, free)
        return _Child(process, connection, slots)

    def _feed(self, child: _Child, waiting: Iterator[DecodeJob]) -> None:
        job = next(waiting, None)
        if job is not None:
            child.jobs.append(job)
            self._send(child, job)

    def _send(self, child: _Child, message: DecodeJob | Free) -> None:
        try:
            child.connection.send(message)
        except (BrokenPipeError, ConnectionResetError):
            # It died: `run` notices when it reads, and starts another in its place.
            return

    def _replace(self, child: _Child) -> Failed:
        """Start another child in the place of one that died; what becomes of the job it died of."""
        child.connection.close()
        status = child.process.wait()
        died_of, *rest = child.jobs
        fresh = self._start(child.slots)
        child.process, child.connection = fresh.process, fresh.connection
        child.jobs = deque(rest)
        for job in rest:
            self._send(child, job)
        return Failed(
            died_of.number,
            f"the process that decoded it {how_it_ended(status)}: its bytes crash a decoder, or"
            " memory ran out; check the file with another program",
        )


def start_child(
    module: str, arena: Arena, *arguments: object
) -> tuple["subprocess.Popen[bytes]", "Connection[Any, Any]"]:
    """A child that runs ``module.main(connection_fd, arena_fd, *arguments)``, and our end of it.

    The arguments are written out as Python literals.
    """
    ours, theirs = socket.socketpair()
    passed = ", ".join(map(repr, (theirs.fileno(), arena.fd, *arguments)))
    # The child finds this very xmag, wherever the caller's sys.path found it.
    root = str(Path(__file__).parents[2])
    code = f"import sys; sys.path.insert(0, {root!r}); from {module} import main; main({passed})"
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(), arena.fd),
            # Ctrl-C goes to this process, which then ends the children.
            process_group=0,
        )
    return process, Connection(ours.detach())


def end_children(
    children: Iterable[tuple["subprocess.Popen[bytes]", "Connection[Any, Any]"]],
) -> None:
    """Hang up on children, and see every one end."""
    children = list(children)
    for _, connection in children:
        connection.close()
    for process, _ in children:
        try:
            process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def how_it_ended(status: int) -> str:
    """What the exit status of a child says, for a message."""
    return f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
