"""Many slides -> tiles in shared memory, decoded by child processes.

Threads of one process stop scaling at the GIL; processes do not, and a slide whose bytes crash a
decoder, hang it or eat its memory takes only its own process down. The children are fresh
interpreters that import neither torch nor the caller's program, so they need no ``__main__`` guard
and start in a fraction of a second. They end when this side hangs up, however it ends.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import wait
from types import TracebackType
from typing import Self

from xmag.errors import InputError, XmagError
from xmag.tiles.arena import Arena
from xmag.tiles.child import Child, GoneError
from xmag.tiles.decoder import Begun, DecodeJob, Event, Failed, Filled, Finished, Free, Idle, Ready
from xmag.tiles.stream import Tiles

SUPPORTED = os.name == "posix" and bool(sys.executable) and not getattr(sys, "frozen", False)
"""Whether this program can start a Python, and hand sockets and memory to it as is done here."""

LIMITS_MEMORY = sys.platform == "linux"
"""Whether the system holds a process to a limit on what it allocates."""

LEAST_MEMORY = 256 * 2**20
"""Bytes: a decoding process allocates a hundred million before it has opened a slide."""

_SLOTS_EACH = 3
"""Slots a child fills in turn: one being written, one on its way, one being copied from."""

_JOBS_EACH = 2
"""Slides a child has at hand, so that it never waits for the next."""

_IDLE_S = 0.002
"""Seconds without an event after which the caller gets to look for slots it can release."""

_GRACE_S = 0.5
"""Seconds the children get to end by themselves once this side has hung up."""

_STARTS = 3
"""How many children in a row may fail to start before that is taken to be no accident."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a slide may cost: seconds of decoding, and bytes that its process may allocate."""

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


class DecodingPool:
    """Child processes that decode slides; a context manager that leaves none of them behind."""

    def __init__(
        self,
        processes: int,
        *,
        slot_tiles: int,
        size_px: int,
        threads: int = 1,
        limits: Limits | None = None,
    ) -> None:
        slots = processes * _SLOTS_EACH
        self._shape = {"slots": slots, "slot_tiles": slot_tiles, "size_px": size_px}
        self._threads, self._limits = threads, limits or Limits()
        self.arena = Arena(**self._shape)
        self._lent: set[int] = set()
        self._failed_starts = 0
        self._children: list[Child] = []
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
        back with `release` once its tiles are copied. A child that dies, or that is killed because
        its slide takes too long, is replaced, and the slides it had not come to are done all the
        same. Raises XmagError where children do not start.
        """
        waiting = iter(jobs)
        for _ in range(_JOBS_EACH):
            for index in range(len(self._children)):
                self._feed(index, waiting)
        while busy := [i for i, child in enumerate(self._children) if child.jobs]:
            all_ready = wait([self._children[i].connection for i in busy], self._patience(busy))
            ready = {i for i in busy if self._children[i].connection in all_ready}
            if not ready:
                yield Idle()
            for index in busy:
                if index in ready:
                    event = self._event_of(index)
                elif self._is_overdue(index):
                    event = self._stop(index)
                else:
                    continue
                if isinstance(event, Finished | Failed):
                    self._feed(index, waiting)
                if event is not None:
                    yield event

    def tiles(self, event: Filled) -> Tiles:
        """The tiles that a Filled event is about; valid until its slot is released."""
        return self.arena.slot(event.slot)[: event.count]

    def release(self, slot: int) -> None:
        """Let a slot be written to again."""
        child = self._children[slot // _SLOTS_EACH]
        if not self._can_work(child):
            child.resume_clock()
        self._lent.discard(slot)
        child.send(Free(slot))

    def close(self) -> None:
        """Hang up, and see every child end."""
        for child in self._children:
            child.connection.close()
        until = time.monotonic() + _GRACE_S
        for child in self._children:
            try:
                child.process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
        self._children.clear()
        self.arena.close()

    def _start(self, slots: list[int]) -> Child:
        free = [slot for slot in slots if slot not in self._lent]
        call = (
            f"main({{fd}}, {self.arena.fd}, dict({_arguments(self._shape)}), {free},"
            f" threads={self._threads}, memory_limit={self._limits.memory_limit},"
            f" parent={os.getpid()})"
        )
        return Child(call, (self.arena.fd,), slots)

    def _feed(self, index: int, waiting: Iterator[DecodeJob]) -> None:
        job = next(waiting, None)
        if job is not None:
            self._children[index].add(job)

    def _event_of(self, index: int) -> Event | None:
        """The next event of a child; None where what it says concerns nobody else."""
        child = self._children[index]
        try:
            message = child.receive()
        except GoneError:
            return self._replace(index, child.end())
        if isinstance(message, Ready):
            child.has_started = True
            return None
        if isinstance(message, Begun):
            child.begun, self._failed_starts = True, 0
        elif isinstance(message, Filled):
            self._lent.add(message.slot)
        elif isinstance(message, Finished | Failed):
            child.finish_job()
        return message

    def _stop(self, index: int) -> Event | None:
        """Kill a child whose slide takes too long."""
        child = self._children[index]
        child.kill()
        child.connection.close()
        how = f"took longer than slide_timeout={self._limits.slide_timeout:g} s and was stopped"
        return self._replace(index, how)

    def _replace(self, index: int, how: str) -> Failed | None:
        """Start another child in the place of one that died; what becomes of the slide it was at.

        A slide that it had not begun is not the reason, and is done by the other.
        """
        dead = self._children[index]
        if not dead.begun:
            self._failed_starts += 1
            if self._failed_starts >= _STARTS:
                raise XmagError(
                    f"the processes that decode slides do not start: the last one {how}; stderr"
                    " says more. With processes=0 slides are decoded in this process"
                )
        died_of = dead.jobs.popleft() if dead.begun else None
        fresh = self._children[index] = self._start(dead.slots)
        for job in dead.jobs:
            fresh.add(job)
        if died_of is None:
            return None
        return Failed(died_of.number, f"the decoder {how}; check the slide with another program")

    def _patience(self, busy: list[int]) -> float | None:
        """How long to wait for an event, in seconds."""
        if self._lent:
            # A child may be waiting for slots that are still lent, and this side for its tiles.
            return _IDLE_S
        if self._limits.slide_timeout is None:
            return None
        # Those that have not started are not at a slide yet.
        left = [
            child.seconds_left(self._limits.slide_timeout)
            for child in (self._children[i] for i in busy)
            if child.has_started
        ]
        return max(0.0, min(left)) if left else None

    def _is_overdue(self, index: int) -> bool:
        child, limit = self._children[index], self._limits.slide_timeout
        if limit is None or not child.has_started or not self._can_work(child):
            return False
        return child.seconds_left(limit) <= 0

    def _can_work(self, child: Child) -> bool:
        """Whether it has a slot to write to."""
        return not self._lent.issuperset(child.slots)


def _arguments(values: dict[str, int]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())
