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
from importlib import import_module
from pathlib import Path
from random import Random
from typing import Any

from xmag.errors import XmagError, XmagWarning

_STATUS = Path("/proc/self/status")
_STDERR = 2
"""Where stdout and stderr go to: a file of the other side, which has the last word of the dead."""
_TRACE_AFTER_S = 8
"""Time after which a case tells where it is, before the other side kills it."""


def main(target_name: str, seeds: str, seed: int, memory: int, answers: int) -> None:
    """Take case numbers from stdin until it ends; answer each on the descriptor `answers`.

    `memory` is how many bytes a case may take on top of what the process has when it starts.
    """
    target = import_module(f"fuzz.{target_name}")
    originals = {path.name: path.read_bytes() for path in Path(seeds).iterdir()}
    with tempfile.TemporaryDirectory() as folder, open(answers, "w", buffering=1) as out:  # noqa: PTH123 (a descriptor)
        _warm_up(target, originals, Path(folder))
        _limit_memory(memory)
        out.write("ready\n")
        for line in sys.stdin:
            number = int(line)
            name, content = target.make(originals, Random(f"{seed} {number}"))
            path = Path(folder) / name
            path.write_bytes(content)
            faulthandler.dump_traceback_later(_TRACE_AFTER_S, file=_STDERR)
            result = _result(target, path)
            faulthandler.cancel_dump_traceback_later()
            path.unlink()
            out.write(json.dumps({"number": number, "name": name, **result}) + "\n")


def _warm_up(target: Any, originals: dict[str, bytes], folder: Path) -> None:
    """Load all that cases need; the undamaged files have to be read without complaint."""
    faulthandler.enable(file=_STDERR)
    for name, content in originals.items():
        path = folder / name
        path.write_bytes(content)
        result = _result(target, path)
        if result["outcome"] not in target.FINE:
            raise SystemExit(f"undamaged {name}: {result}")
        path.unlink()


def _result(target: Any, path: Path) -> dict[str, Any]:
    """What became of a case: an outcome, and details of what should not have been."""
    os.ftruncate(_STDERR, 0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    before, open_before = _status("VmRSS"), len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            outcome, detail = target.outcome(path), ""
        except XmagError as error:
            outcome, detail = type(error).__name__, _memory_error(error)
        except Exception as error:  # noqa: BLE001 (that is what is looked for)
            outcome, detail = f"{type(error).__name__}!", traceback.format_exc()
    peak = _status("VmHWM") - before
    known = (XmagWarning, *getattr(target, "THEIR_WARNINGS", ()))
    alien = [w for w in caught if not issubclass(w.category, known)]
    if detail == "" and alien:
        first = alien[0]
        outcome, detail = "warning!", f"{first.category.__name__}: {first.message} {first.filename}:{first.lineno}"  # fmt: skip
    text = os.pread(_STDERR, 2000, 0).decode("utf-8", "replace")
    known_text = getattr(target, "THEIR_PRINTS", None)
    if detail == "" and text and not (known_text and re.search(known_text, text)):
        outcome, detail = "printed!", text
    left = len(os.listdir("/proc/self/fd")) - open_before  # noqa: PTH208
    if detail == "" and (left > 0 or threading.active_count() > 1):
        outcome, detail = "left open!", f"{left} descriptors, {threading.active_count()} threads"
    if detail.startswith("MemoryError"):
        outcome = "memory!"
    return {"outcome": outcome, "detail": detail, "peak_mb": round(peak / 1024)}


def _memory_error(error: BaseException | None) -> str:
    """Where a MemoryError lies behind an error that does not show it."""
    while error is not None:
        if isinstance(error, MemoryError):
            return "MemoryError behind it:\n" + "".join(traceback.format_exception(error))
        error = error.__cause__ or error.__context__
    return ""


def _status(key: str) -> int:
    """A value of /proc/self/status in kB."""
    match = re.search(rf"{key}:\s+(\d+)", _STATUS.read_text())
    return int(match[1]) if match else 0


def _limit_memory(more: int) -> None:
    now = _status("VmSize") * 1024
    resource.setrlimit(resource.RLIMIT_AS, (now + more, now + more))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
