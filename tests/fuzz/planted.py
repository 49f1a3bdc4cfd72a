"""Cases with known faults, to see that the fuzzer finds each."""

import ctypes
import os
import threading
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from random import Random

from xmag.errors import DamagedSlideError, InputError, XmagWarning

FINE = "fine"
THEIR_WARNINGS: tuple[type[Warning], ...] = (UserWarning,)
THEIR_PRINTS = "OK to print"

EXPECTED = {
    "fine": "fine", "refused": "DamagedSlideError", "XmagWarning": "fine", "their warning": "fine",
    "their print": "fine", "TypeError": "TypeError!", "RuntimeWarning": "warning!",
    "print": "printed!", "open file": "left open!", "thread": "left open!", "hang": "time-out!",
    "memory": "MemoryError!", "hidden memory": "memory!", "segfault": "crash SIGSEGV!",
    "abort": "crash SIGABRT!", "exit": "crash SIGKILL!", "fine again": "fine",
}  # fmt: skip
"""The outcome of each case."""


def make(originals: Mapping[str, bytes], number: int, rng: Random) -> tuple[str, bytes]:
    return "case", list(EXPECTED)[number].encode()


def outcome(path: Path) -> str:
    match path.read_text():
        case "refused":
            raise DamagedSlideError("as it should be")
        case "XmagWarning":
            warnings.warn("ours", XmagWarning, stacklevel=1)
        case "their warning":
            warnings.warn("theirs", UserWarning, stacklevel=1)
        case "their print":
            os.write(2, b"this is OK to print\n")
        case "TypeError":
            raise TypeError("planted")
        case "RuntimeWarning":
            warnings.warn("planted", RuntimeWarning, stacklevel=1)
        case "print":
            os.write(1, b"from native code\n")
        case "open file":
            os.open(path, os.O_RDONLY)
        case "thread":
            threading.Thread(target=time.sleep, args=(0.5,)).start()
        case "hang":
            time.sleep(800)
        case "memory":
            bytearray(1 << 29)
        case "hidden memory":
            try:
                bytearray(1 << 29)
            except MemoryError as error:
                raise InputError("nothing is wrong") from error
        case "segfault":
            ctypes.string_at(0)
        case "abort":
            os.abort()
        case "exit":
            os.kill(os.getpid(), 9)
    return "fine"
