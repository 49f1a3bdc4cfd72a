"""Decoding processes: fresh interpreters that read slides, and what supervises them.

Threads of one process stop scaling at the GIL; processes do not, and a slide whose bytes crash a
decoder, hang it or eat its memory takes only its own process down. The children import neither
torch nor the caller's program, so they need no ``__main__`` guard and start in a fraction of a
second. They end when this side does, however it ends.
"""

import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

from xmag.errors import DamagedSlideError, InputError, XmagError
from xmag.tiles.arena import Arena, Tiles
from xmag.tiles.decoder import Begun, Decoded, DecodeJob, Event, Failed, Finished, Idle
from xmag.tiles.worker import Filled, Free, Places

PROCESSES_SUPPORTED = (
    os.name == "posix" and bool(sys.executable) and not getattr(sys, "frozen", False)
)
"""Whether this program can start a Python, and hand sockets and memory to it as is done here."""

LIMITS_MEMORY = sys.platform == "linux"
"""Whether the system holds a process to a limit on what it allocates."""

LEAST_MEMORY = 256 * 2**20
"""Bytes: a decoding process allocates a hundred million before it has opened a slide."""

_SLOTS_EACH = 3
"""Slots a child fills in turn: one being written, one on its way, one being copied from."""

_JOBS_EACH = 2
"""Slides a child has at hand, so that it never waits for the next."""

_IDLE_S, _LENT_IDLE_S = 0.05, 0.002
"""Seconds without an event after which the caller gets to look about, or for slots to release."""

_NO_SLOT_S = 0.25
"""Seconds between looks at the clock of a child that waits for a slot."""

_DIES_S = 2.0
"""Seconds that a process gets to be gone after SIGKILL; one that waits for a dead disk is not."""

_STARTS = 3
"""Failed starts of children in a row that are taken to be no accident."""


class _GoneError(Exception):
    """The child has died, or talks no sense any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits of a slide: seconds of decoding, and bytes that its process may allocate."""

    slide_timeout: float | None = None
    memory_limit: int | None = None

    def __post_init__(self) -> None:
        if self.slide_timeout is not None and not self.slide_timeout > 0:
            raise InputError(
                f"slide_timeout is {self.slide_timeout!r}; expected seconds above 0, or None"
            )
        if self.memory_limit is None:
            return
        if not self.memory_limit >= LEAST_MEMORY:
            raise InputError(
                f"memory_limit is {self.memory_limit!r}; expected at least {LEAST_MEMORY:,} bytes"
                " (256 MiB), or None"
            )
        if not LIMITS_MEMORY:
            raise InputError(
                "memory_limit is given, but only Linux can hold a process to one; expected None"
            )


class _Process:
    """A child process, our end of the line to it, and the seconds that its slide has cost."""

    def __init__(self, pool: "_Pool", slots: list[int]) -> None:
        ours, theirs = socket.socketpair()
        # The child finds this very xmag, wherever the caller's sys.path found it.
        root = str(Path(__file__).parents[2])
        code = (
            f"import sys; sys.path.insert(0, {root!r}); from xmag.tiles.worker import main;"
            f" main({theirs.fileno()}, {pool.arena.fd}, {pool.shape}, {slots},"
            f" threads={pool.threads}, memory_limit={pool.memory_limit}, parent={os.getpid()})"
        )
        try:
            self.popen = subprocess.Popen(
                [sys.executable, "-P", "-c", code],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), pool.arena.fd),
                # Ctrl-C goes to this process, which then ends the children.
                process_group=0,
                # Nothing there multiplies matrices: threads for that would only take memory.
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            )
        except OSError as error:
            ours.close()
            raise XmagError(
                f"no process to decode slides can be started ({error.strerror}); with processes=0"
                " slides are decoded in this process"
            ) from error
        finally:
            theirs.close()
        self.connection: Connection[Any, Any] = Connection(ours.detach())
        self._sending = threading.Lock()
        self._worked_s, self._since = 0.0, time.monotonic()

    def send(self, message: object) -> None:
        """Send a message, unless the child has died: that is noticed when it is read from."""
        with self._sending, suppress(BrokenPipeError, ConnectionResetError):
            self.connection.send(message)

    def receive(self, patience_s: float | None = None) -> Any:
        """The next message, or None after so many seconds; _GoneError where none will come."""
        try:
            if not self.connection.poll(patience_s):
                return None
            self._worked_s, message = self.connection.recv()
        # Before a process dies of a wild pointer it may say anything.
        except Exception as error:
            raise _GoneError from error
        self._since = time.monotonic()
        return message

    def start_clock(self, *, anew: bool = False) -> None:
        """Let the time that it takes for its slide go on from now."""
        self._since = time.monotonic()
        if anew:
            self._worked_s = 0.0

    def seconds_left(self, limit_s: float) -> float:
        """Seconds that it may still be silent, if its slide may take `limit_s`."""
        return limit_s - self._worked_s - (time.monotonic() - self._since)

    def kill(self) -> None:
        """Kill it; one that the kernel cannot end now is left to it."""
        self.popen.kill()
        with suppress(subprocess.TimeoutExpired):
            self.popen.wait(_DIES_S)

    def end(self) -> str:
        """Make sure that it is dead; how it died, in words."""
        self.connection.close()
        try:
            status = self.popen.wait(_DIES_S)
        except subprocess.TimeoutExpired:
            self.kill()
            return "stopped answering"
        if status == -signal.SIGKILL:
            return "was killed (signal SIGKILL), most likely because memory ran out"
        if status < 0:
            names = {number.value: number.name for number in signal.Signals}
            return f"crashed (signal {names.get(-status, -status)})"
        return f"ended by itself (status {status})"


class _Pool:
    """Memory that children share with this process, and the thread that starts them."""

    def __init__(
        self, slots: int, slot_tiles: int, size_px: int, threads: int, memory_limit: int | None
    ) -> None:
        self.shape = {"slots": slots, "slot_tiles": slot_tiles, "size_px": size_px}
        self.threads, self.memory_limit = threads, memory_limit
        self.arena = Arena(**self.shape)
        # A child gets SIGKILL when the thread that started it ends: this one outlives them.
        self._starter = ThreadPoolExecutor(1, "xmag-starter")

    def start(self, slots: list[int]) -> _Process:
        """A child that fills these slots. XmagError where the system starts none."""
        return self._starter.submit(_Process, self, slots).result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the memory. Closing twice is fine."""
        self._starter.shutdown()
        self.arena.close()


class DecodingPool(_Pool):
    """Child processes that decode whole slides; a context manager that leaves none behind.

    Each has a thread here that only receives; all that they say comes out of `run`, in the
    caller's thread.
    """

    def __init__(
        self,
        processes: int,
        *,
        slot_tiles: int,
        size_px: int,
        threads: int = 1,
        limits: Limits | None = None,
    ) -> None:
        self.limits = limits or Limits()
        slots = processes * _SLOTS_EACH
        super().__init__(slots, slot_tiles, size_px, threads, self.limits.memory_limit)
        self.todo: queue.SimpleQueue[DecodeJob | None] = queue.SimpleQueue()
        self.inbox: queue.Queue[Event | BaseException] = queue.Queue(2 * processes)
        self.is_closing, self.failed_starts = False, 0
        self._children: list[_Child] = []
        try:
            for first in range(0, slots, _SLOTS_EACH):
                self._children.append(_Child(self, list(range(first, first + _SLOTS_EACH))))
        except BaseException:
            self.close()
            raise

    def run(self, jobs: Iterable[DecodeJob]) -> Iterator[Event]:
        """The events of jobs, as they come; those of one job in order, those of several mixed.

        A child that dies, or that is killed because its slide takes too long, is replaced, and the
        slides it had not come to are done all the same. Raises XmagError where children do not
        start.
        """
        waiting, under_way = iter(jobs), 0
        while True:
            while under_way < _JOBS_EACH * len(self._children):
                job = next(waiting, None)
                if job is None:
                    break
                self.todo.put(job)
                under_way += 1
            if not under_way:
                return
            is_lent = any(child.lent for child in self._children)
            try:
                event = self.inbox.get(timeout=_LENT_IDLE_S if is_lent else _IDLE_S)
            except queue.Empty:
                event = Idle()
            if isinstance(event, BaseException):
                raise event
            under_way -= isinstance(event, Finished | Failed)
            yield event

    def close(self) -> None:
        """Kill the children, and see every one end. Closing twice is fine."""
        self.is_closing = True
        for child in self._children:
            child.process.popen.kill()
            self.todo.put(None)
        for child in self._children:
            while child.thread.is_alive():
                with suppress(queue.Empty):  # it may be about to say something
                    self.inbox.get_nowait()
                child.thread.join(0.01)
        self._children.clear()
        super().close()


class _Child:
    """A decoding process and its thread, which feeds it, passes on what it says, replaces it."""

    def __init__(self, pool: DecodingPool, slots: list[int]) -> None:
        self._pool, self._slots = pool, slots
        self.lent: set[int] = set()
        self._jobs, self._has_begun = deque[DecodeJob](), False
        self._slots_change = threading.Lock()
        self.process = pool.start(slots)
        self.thread = threading.Thread(target=self._serve, name="xmag-decoder", daemon=True)
        self.thread.start()

    def _serve(self) -> None:
        try:
            while self._feed():
                event = self._next_event()
                if event is not None:
                    self._pool.inbox.put(event)
        # It reaches the caller, in its own thread.
        except BaseException as error:  # noqa: BLE001
            if not self._pool.is_closing:
                self._pool.inbox.put(error)
        finally:
            self.process.end()

    def _feed(self) -> bool:
        """Give the process its next jobs, one ahead of its work; False once the pool closes."""
        while not self._pool.is_closing and len(self._jobs) < _JOBS_EACH:
            try:
                # While it has not begun, the next job is for a process that has none.
                can_take = self._has_begun or not self._jobs
                job = self._pool.todo.get(block=not self._jobs) if can_take else None
            except queue.Empty:
                break
            if job is None:
                break
            if not self._jobs:
                self.process.start_clock()
            self._jobs.append(job)
            self.process.send(job)
        return not self._pool.is_closing

    def _next_event(self) -> Event | None:
        """The next event of the process; None where what it says concerns nobody else."""
        try:
            message = self.process.receive(self._patience_s())
        except _GoneError:
            return self._replace(self.process.end())
        if message is None:
            return self._stop_if_overdue()
        if isinstance(message, Filled):
            with self._slots_change:
                self.lent.add(message.slot)
            tiles = self._pool.arena.slot(message.slot)[: message.count]
            return Decoded(message.number, tiles, partial(self._release, message.slot))
        if isinstance(message, Begun):
            self._has_begun, self._pool.failed_starts = True, 0
        elif isinstance(message, Finished | Failed):
            self._jobs.popleft()
            self._has_begun = False
            self.process.start_clock(anew=True)
        event: Event = message
        return event

    def _release(self, slot: int) -> None:
        """Let a slot be written to again; called from the thread that has copied its tiles."""
        with self._slots_change:
            if not self._has_slot():
                self.process.start_clock()
            self.lent.discard(slot)
            self.process.send(Free(slot))

    def _has_slot(self) -> bool:
        return not self.lent.issuperset(self._slots)

    def _patience_s(self) -> float | None:
        """Seconds after which a silent process is looked at; None: it may be silent for ever."""
        limit = self._pool.limits.slide_timeout
        if limit is None or not self._has_begun:  # it is not at a slide yet
            return None
        return max(0.0, self.process.seconds_left(limit)) if self._has_slot() else _NO_SLOT_S

    def _stop_if_overdue(self) -> Failed | None:
        """Kill the process if its slide takes too long."""
        limit = self._pool.limits.slide_timeout
        if limit is None or not self._has_slot() or self.process.seconds_left(limit) > 0:
            return None
        self.process.kill()
        self.process.connection.close()
        return self._replace(f"took longer than slide_timeout={limit:g} s and was stopped")

    def _replace(self, how: str) -> Failed | None:
        """Start another process for one that died; the event of the slide that it had begun."""
        if self._pool.is_closing:
            return None
        if not self._has_begun:
            self._pool.failed_starts += 1
            if self._pool.failed_starts >= _STARTS:
                raise XmagError(
                    f"the processes that decode slides do not start: the last one {how}; stderr"
                    " says more. With processes=0 slides are decoded in this process"
                )
        died_of = self._jobs.popleft() if self._has_begun else None
        self._has_begun = False
        with self._slots_change:
            self.process = self._pool.start([s for s in self._slots if s not in self.lent])
        for job in self._jobs:
            self.process.send(job)
        if died_of is None:
            return None
        return Failed(died_of.number, f"the decoder {how}; check the slide with another program")


class PlacePool(_Pool):
    """Child processes that read tiles at any places; a context manager that leaves none behind.

    Each call takes a child that is free; whoever wants several busy calls from as many threads.
    `slot_tiles` is the most that one call may ask for.
    """

    def __init__(self, processes: int, *, slot_tiles: int, size_px: int) -> None:
        super().__init__(processes, slot_tiles, size_px, 1, None)
        self._children: dict[int, _Process] = {}
        self._free: queue.SimpleQueue[int] = queue.SimpleQueue()
        try:
            for slot in range(processes):
                self._children[slot] = self.start([slot])
        except BaseException:
            self.close()
            raise
        for slot in self._children:
            self._free.put(slot)

    def read(self, places: Places, into: Tiles) -> None:
        """Read tiles into an array of theirs; safe to call from several threads.

        Raises what `read_places` and Slide raise, and DamagedSlideError where the child dies of it.
        """
        slot = self._free.get()
        try:
            try:
                error = self._asked(slot, places, into)
            except _GoneError:
                # It may have died of something else, or before: what kills two is the slide's.
                self._replace(slot)
                error = self._asked(slot, places, into)
        except _GoneError as gone:
            raise DamagedSlideError(
                f"the process that read it {self._replace(slot)}: its bytes crash a decoder, or"
                " memory ran out; check the file with another program"
            ) from gone
        except BaseException:
            # Interrupted while the child still works: its answer must not reach the next call.
            self._children[slot].kill()
            self._replace(slot)
            raise
        finally:
            self._free.put(slot)
        if error is not None:
            raise error

    def _asked(self, slot: int, places: Places, into: Tiles) -> XmagError | None:
        child = self._children[slot]
        child.send(places)
        error: XmagError | None = child.receive()
        if error is None:
            into[:] = self.arena.slot(slot)[: len(into)]
        return error

    def _replace(self, slot: int) -> str:
        """Start another child in the place of one that died; how that died."""
        how = self._children[slot].end()
        self._children[slot] = self.start([slot])
        return how

    def close(self) -> None:
        """Kill the children, and see every one end. Closing twice is fine."""
        for child in self._children.values():
            child.kill()
            child.connection.close()
        self._children.clear()
        super().close()
