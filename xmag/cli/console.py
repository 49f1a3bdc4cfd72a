"""Output of the commands: streams, wording of messages, warnings, log and exit status."""

import logging
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from xmag.errors import XmagWarning

ALL_DONE, FAILED, WRONG_USE, INTERRUPTED = 0, 1, 2, 130

_AS_FLAGS = {
    # Remedies that the command line does not have are left out.
    ", or validation=None, which trains for all epochs and keeps the last weights": "",
    ", or validation=(X, y, groups)": "",
    ", or Folds.leave_one_group_out(groups)": "",
    ", or give them the same patient in groups": "",
    ' Where equal features are no accident, as with empty tiles: on_identical="warn"': "",
    "on_mismatch='redo'": "--redo",
    "damaged='drop'": "--damaged drop",
    "random_state": "--seed",
    "slide_timeout=": "--slide-timeout ",
    "memory_limit=": "--memory-limit ",
    "processes=0": "--processes 0",
    "min_tissue=": "--min-tissue",
    "dtype='float32'": "--dtype float32",
    "folds=": "--folds ",
    "tissue and roi go with slides: expected slides=, too": "--mask and --roi go with --slides",
    "repeats=": "--repeats ",
}
"""Words of messages about Python's options, and those of the command line."""


@contextmanager
def console(*, verbose: bool) -> Iterator[None]:
    """Context: warnings as one line each, and the log where asked for; undone at the end."""

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        if issubclass(category, XmagWarning):
            write(sys.stderr, f"xmag: warning: {one_line(message)}")

    logger = logging.getLogger("xmag")
    # What tifffile says of a damaged file would come twice: it is in the error as well.
    loggers = (logger, logging.getLogger("tifffile"))
    level = logger.level
    handler = logging.StreamHandler(sys.stderr) if verbose else logging.NullHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s"))
    with warnings.catch_warnings():
        warnings.simplefilter("default", XmagWarning)
        warnings.showwarning = show
        for each in loggers:
            each.addHandler(handler)
        if verbose:
            logger.setLevel(logging.DEBUG)
        try:
            yield
        finally:
            for each in loggers:
                each.removeHandler(handler)
            logger.setLevel(level)


def say_torch_is_loading() -> None:
    """Say it, on a terminal: it takes seconds, in which there is nothing else to see."""
    if "torch" not in sys.modules and sys.stderr.isatty():
        write(sys.stderr, "xmag: loading PyTorch")


def one_line(message: object) -> str:
    """The message without line ends, its remedies in the words of the command line."""
    text = str(message)
    for python, flag in _AS_FLAGS.items():
        text = text.replace(python, flag)
    text = re.sub(r"(?<!\S)mpp=(\d?)", lambda found: f"--mpp {found[1]}".rstrip(), text)
    return " ".join(text.split())


def counted(number: int, noun: str) -> str:
    """The number with its noun in singular or plural."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def write(stream: TextIO, text: str) -> None:
    """Writes a line; what the stream's encoding lacks (a µ, an odd file name) is escaped."""
    encoding = stream.encoding or "utf-8"
    stream.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
