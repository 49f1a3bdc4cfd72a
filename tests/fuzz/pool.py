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
_START_S = 90.0


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


class _Child:
    def __init__(self, target: str, seeds: Path, seed: int) -> None:
        read, write = os.pipe()
        code = f"from fuzz.child import main; main({target!r}, {str(seeds)!r}, {seed}, {MEMORY}, {write})"  # fmt: skip
        root = Path(__file__).parents[2]
        environment = {
            **os.environ,
            "PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}",
            "MALLOC_ARENA_MAX": "2",
            "OMP_NUM_THREADS": "1",
        }
        self._errors = os.memfd_create("errors")
        fcntl.fcntl(self._errors, fcntl.F_SETFL, os.O_APPEND)
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stderr=self._errors,
            stdout=self._errors, env=environment, pass_fds=[write],
        )  # fmt: skip
        os.close(write)
        self.answers = os.fdopen(read)
        self.number, self.since = -1, time.monotonic()
        line = self.answers.readline()
        if line != "ready\n":
            self.process.wait(_START_S)
            self.kill()
            raise RuntimeError(f"the child did not start: {self.said()}")

    def give(self, number: int) -> None:
        self.number, self.since = number, time.monotonic()
        assert self.process.stdin is not None
        self.process.stdin.write(f"{number}\n".encode())
        self.process.stdin.flush()

    def said(self) -> str:
        """What it printed during the last case, its last words among it."""
        return os.pread(self._errors, 6000, 0).decode("utf-8", "replace")

    def kill(self) -> int:
        """End it; its exit status."""
        self.process.kill()
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.answers.close()
        return self.process.wait()

    def close(self) -> None:
        self.kill()
        os.close(self._errors)


def run(
    target: str, seeds: Path, numbers: Iterable[int], *, seed: int, children: int = 1
) -> Iterator[Result]:
    """The results of cases, as they come."""
    waiting = iter(numbers)
    busy: list[_Child] = []
    try:
        for number in (n for _, n in zip(range(children), waiting, strict=False)):
            busy.append(_Child(target, seeds, seed))
            busy[-1].give(number)
        while busy:
            ready = wait([child.answers for child in busy], 0.2)
            for child in list(busy):
                late = time.monotonic() - child.since > SECONDS
                if child.answers not in ready and not late:
                    continue
                result = _timed_out(child) if child.answers not in ready else _answered(child)
                yield result
                busy.remove(child)
                following = next(waiting, None)
                if following is None:
                    child.close()
                    continue
                if child.process.poll() is not None or child.answers.closed:
                    child.close()
                    child = _Child(target, seeds, seed)  # noqa: PLW2901
                busy.append(child)
                child.give(following)
    finally:
        for child in busy:
            child.close()


def _timed_out(child: _Child) -> Result:
    child.kill()
    return Result(
        number=child.number, name="", outcome="time-out!", detail=child.said(), seconds=SECONDS
    )


def _answered(child: _Child) -> Result:
    seconds = time.monotonic() - child.since
    line = child.answers.readline()
    if line:
        answer: dict[str, Any] = json.loads(line)
        return Result(**answer, seconds=round(seconds, 3))
    status = child.process.wait(_START_S)
    child.kill()
    if status > 0:
        raise RuntimeError(f"case {child.number} could not be made: {child.said()}")
    reason = signal.Signals(-status).name
    return Result(
        number=child.number,
        name="",
        outcome=f"crash {reason}!",
        detail=child.said(),
        seconds=seconds,
    )
