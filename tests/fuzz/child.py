"""The process in which cases run, one after the other: ``python -c "from fuzz.child import main"``.

It is told the number of a case and answers with a line of JSON. What it leaves unanswered (it died,
or was killed for taking too long) is for the other side to judge.
"""

import faulthandler
import json
import os
import re
import resource
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from random import Random
from typing import Any, Protocol

from xmag.errors import XmagError, XmagWarning

_STATUS = Path("/proc/self/status")
_STDERR = 2
"""Where stdout and stderr go to: a file of the other side, which has the last word of the dead."""


class Target(Protocol):
    """What a module of cases offers."""

    FINE: str
    """The outcome of an undamaged file."""
    THEIR_WARNINGS: tuple[type[Warning], ...]
    """Warnings that other libraries give, and that are theirs to give."""
    THEIR_PRINTS: str
    """What native libraries may print, as a regular expression."""

    @staticmethod
    def make(originals: Mapping[str, bytes], number: int, rng: Random) -> tuple[str, bytes]:
        """(name, content) of a case."""
        ...

    @staticmethod
    def outcome(path: Path) -> str:
        """What became of a case, in a word; raises what xmag raises."""
        ...


def main(
    target_name: str, folder: str, seed: int, memory: int, seconds: float, answers: int
) -> None:
    """Take case numbers from stdin until it ends; answer each on the descriptor `answers`.

    `memory` is how many bytes a case may take on top of what the process has when it starts.
    """
    target: Any = import_module(f"fuzz.{target_name}")
    originals = {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}
    with tempfile.TemporaryDirectory() as place, os.fdopen(answers, "w", buffering=1) as out:
        faulthandler.enable(file=_STDERR)
        _warm_up(target, originals, Path(place))
        _limit_memory(memory)
        out.write("ready\n")
        for line in sys.stdin:
            number = int(line)
            name, content = target.make(originals, number, Random(f"{seed} {number}"))
            path = Path(place) / name
            path.write_bytes(content)
            # Before the other side kills it, a case that hangs tells where.
            faulthandler.dump_traceback_later(0.8 * seconds, file=_STDERR)
            result = _result(target, path)
            faulthandler.cancel_dump_traceback_later()
            path.unlink()
            out.write(json.dumps({"number": number, "name": name, **result}) + "\n")


def _warm_up(target: Target, originals: Mapping[str, bytes], place: Path) -> None:
    """Load all that cases need; the undamaged files have to be read without complaint."""
    for name, content in originals.items():
        path = place / name
        path.write_bytes(content)
        result = _result(target, path)
        if result["outcome"] != target.FINE:
            raise SystemExit(f"undamaged {name}: {result}")
        path.unlink()


def _result(target: Target, path: Path) -> dict[str, Any]:
    """What became of a case: an outcome, and details of what should not have been."""
    os.ftruncate(_STDERR, 0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    before, open_before = _status("VmRSS"), len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    detail = ""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            outcome = target.outcome(path)
        except XmagError as error:
            outcome, detail = type(error).__name__, _memory_error(error)
        except Exception as error:  # noqa: BLE001 (that is what is looked for)
            outcome, detail = f"{type(error).__name__}!", traceback.format_exc()
    peak = _status("VmHWM") - before
    if detail.startswith("MemoryError"):
        outcome = "memory!"
    elif not detail:
        detail = _alien_warning(caught, target)
        if detail:
            outcome = "warning!"
    text = os.pread(_STDERR, 2000, 0).decode("utf-8", "replace")
    if not detail and text and not re.search(target.THEIR_PRINTS, text):
        outcome, detail = "printed!", text
    left = len(os.listdir("/proc/self/fd")) - open_before  # noqa: PTH208
    if not detail and (left > 0 or threading.active_count() > 1):
        outcome = "left open!"
        detail = f"{left} descriptors, {threading.active_count()} threads"
    return {"outcome": outcome, "detail": detail, "peak_mb": round(peak / 1024)}


def _memory_error(error: BaseException | None) -> str:
    """Where a MemoryError lies behind an error that does not show it."""
    while error is not None:
        if isinstance(error, MemoryError):
            return "MemoryError behind it:\n" + "".join(traceback.format_exception(error))
        error = error.__cause__ or error.__context__
    return ""


def _alien_warning(caught: list[warnings.WarningMessage], target: Target) -> str:
    known = (XmagWarning, *target.THEIR_WARNINGS)
    for w in caught:
        if not issubclass(w.category, known):
            return f"{w.category.__name__}: {w.message} {w.filename}:{w.lineno}"
    return ""


def _status(key: str) -> int:
    """A value of /proc/self/status in kB."""
    match = re.search(rf"{key}:\s+(\d+)", _STATUS.read_text())
    return int(match[1]) if match else 0


def _limit_memory(more: int) -> None:
    now = _status("VmSize") * 1024
    resource.setrlimit(resource.RLIMIT_AS, (now + more, now + more))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
