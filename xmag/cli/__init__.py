"""Command line of xmag: runs a command, and turns its errors into lines and exit statuses.

Results go to stdout; progress, warnings and errors go to stderr. Exit status: 0 all done,
1 something failed, 2 wrong use or data that makes no sense, 130 interrupted.
"""

import logging
import sys
from collections.abc import Sequence
from pkgutil import resolve_name

from xmag.cli.console import (
    FAILED,
    INTERRUPTED,
    WRONG_USE,
    console,
    one_line,
    say_torch_is_loading,
    write,
)
from xmag.cli.parser import parse
from xmag.errors import (
    BagError,
    InputError,
    MismatchError,
    SlideError,
    WeightsError,
    XmagError,
)

_OF_THE_USER = InputError, BagError, MismatchError, SlideError, WeightsError
"""Errors of what a command was given: its arguments, tables, slides, features and weights."""

_REPORT = "this was not foreseen: run it again with -v to see where it happened, and report that"

_LIGHT = tuple(
    f"xmag.cli.{name}:" for name in ("bags", "completion", "doctor", "examples", "info", "slides")
)
"""Modules of commands that need no torch, or import it themselves."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv`; returns its exit status."""
    try:
        options = parse(argv)
    except SystemExit as end:  # how argparse leaves, after --help and after wrong use
        return int(end.code or 0)
    command = options.pop("run")
    with console(verbose=options.pop("verbose", False)):
        try:
            if not command.startswith(_LIGHT):
                say_torch_is_loading()
            status: int = resolve_name(command)(**options)
        except XmagError as error:
            write(sys.stderr, f"xmag: error: {one_line(error)}")
            return WRONG_USE if isinstance(error, _OF_THE_USER) else FAILED
        except KeyboardInterrupt:
            write(sys.stderr, "xmag: interrupted; what is written is whole")
            return INTERRUPTED
        except Exception as error:
            logging.getLogger("xmag").debug("", exc_info=error)  # shown with -v
            write(sys.stderr, f"xmag: error: {type(error).__name__}: {one_line(error)}; {_REPORT}")
            return FAILED
    return status
