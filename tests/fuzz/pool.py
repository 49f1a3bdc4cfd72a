"""Children that run cases under supervision, replaced when they die or take too long."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

MEMORY = 1 << 30
"""Bytes that a case may take."""
SECONDS = 10.0
"""Time that a case may take."""
_START_S = 800.0
_ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What became of a case. Outcomes that end in "!" are findings."""

    number: int
    name: str
    outcome: str
    detail: str = ""
    seconds: float = 0.0
    peak_mb: int = 0

    @property
    def is_finding(self) -> bool:
        return self.outcome.endswith("!")


def run(
    target: str,
    originals: Path,
    numbers: Iterable[int],
    *,
    seed: int = 0,
    children: int = 1,
    seconds: float = SECONDS,
    memory: int = MEMORY,
) -> Iterator[Result]:
    """The results of cases, as they come.

    `target` names a module of this package with `make` and `outcome`, `originals` is the folder of
    undamaged files.
    """
    waiting = iter(numbers)
    busy: list[_Child] = []
    options = (target, originals, seed, memory, seconds)
    try:
        for number in (n for _, n in zip(range(children), waiting, strict=False)):
            busy.append(_Child(*options))
            busy[-1].give(number)
        while busy:
            ready = wait([child.answers for child in busy], 0.2)
            for child in list(busy):
                if child.answers not in ready and not child.is_late(seconds):
                    continue
                yield child.result() if child.answers in ready else child.timed_out()
                busy.remove(child)
                following = next(waiting, None)
                if following is None or child.is_over:
                    child.close()
                if following is not None:
                    busy.append(_Child(*options) if child.is_over else child)
                    busy[-1].give(following)
    finally:
        for child in busy:
            child.close()


class _Child:
    def __init__(
        self, target: str, originals: Path, seed: int, memory: int, seconds: float
    ) -> None:
        read, write = os.pipe()
        arguments = (target, str(originals), seed, memory, seconds, write)
        code = f"from fuzz.child import main; main{arguments!r}"
        environment = {
            **os.environ,
            "PYTHONPATH": f"{_ROOT}{os.pathsep}{_ROOT / 'tests'}",
            "MALLOC_ARENA_MAX": "2",
            "OMP_NUM_THREADS": "1",
        }
        self._errors = os.memfd_create("errors")
        fcntl.fcntl(self._errors, fcntl.F_SETFL, os.O_APPEND)
        self._process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stderr=self._errors,
            stdout=self._errors, env=environment, pass_fds=[write],
        )  # fmt: skip
        os.close(write)
        self.answers = os.fdopen(read)
        self.is_over = False
        self._number, self._since = -1, time.monotonic()
        if self.answers.readline() != "ready\n":
            self._process.wait(_START_S)
            said = self._said()
            self.close()
            raise RuntimeError(f"the child did not start: {said}")

    def give(self, number: int) -> None:
        """Have it run a case."""
        self._number, self._since = number, time.monotonic()
        assert self._process.stdin is not None
        self._process.stdin.write(f"{number}\n".encode())
        self._process.stdin.flush()

    def is_late(self, seconds: float) -> bool:
        """Whether its case has taken longer than it may."""
        return time.monotonic() - self._since > seconds

    def result(self) -> Result:
        """What it answers, or what became of it instead."""
        seconds = round(time.monotonic() - self._since, 3)
        line = self.answers.readline()
        if line:
            answer: dict[str, Any] = json.loads(line)
            return Result(**answer, seconds=seconds)
        self.is_over = True
        status = self._process.wait(_START_S)
        if status >= 0:
            raise RuntimeError(f"case {self._number} could not be made: {self._said()}")
        outcome = f"crash {signal.Signals(-status).name}!"
        return Result(
            number=self._number, name="", outcome=outcome, detail=self._said(), seconds=seconds
        )

    def timed_out(self) -> Result:
        """The result of a case that has taken too long; the child is killed."""
        self.is_over = True
        self._process.kill()
        self._process.wait()
        seconds = round(time.monotonic() - self._since, 3)
        return Result(
            number=self._number, name="", outcome="time-out!", detail=self._said(), seconds=seconds
        )

    def close(self) -> None:
        """End it, and let go of all that belongs to it."""
        self.is_over = True
        self._process.kill()
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        if not self.answers.closed:
            self.answers.close()
            os.close(self._errors)

    def _said(self) -> str:
        """What it printed during the last case, its last words among it."""
        return os.pread(self._errors, 6000, 0).decode("utf-8", "replace")
