"""Command line of xmag: the parser of ``xmag``, its errors and exit status.

Results go to stdout; progress, warnings and errors go to stderr. Exit status: 0 all done,
1 something failed, 2 wrong use or data that makes no sense, 130 interrupted.
"""

import argparse
import logging
import sys
from collections.abc import Sequence

from xmag.cli import classify, heatmap, slides, training
from xmag.cli.console import FAILED, INTERRUPTED, WRONG_USE, console, one_line, write
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

# The commands import what they call: `xmag --help` must not wait for torch.

_DESCRIPTION = "Embeddings of whole-slide images at 5x (2.0 µm/px) with the XMAG foundation model."
_EPILOG = """\
examples:
  xmag demo                                    make a small slide and extract its features
  xmag info slide.svs                          what xmag sees in a file
  xmag extract slides.csv -o features          features; columns: slide, optionally mpp and id
  xmag train slides.csv --features features -o classifier
                                               a classifier; columns: slide, label, patient
  xmag heatmap slide.svs --classifier classifier
                                               what it looked at

`xmag COMMAND --help` tells more. Exit status: 0 all done, 1 something failed, 2 wrong use.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv`; returns its exit status."""
    try:
        args = _parser().parse_args(argv)
    except SystemExit as end:  # how argparse leaves, after --help and after wrong use
        return int(end.code or 0)
    with console(verbose=args.verbose):
        try:
            status: int = args.run(args)
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="xmag", description=_DESCRIPTION, epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for group in (slides, classify, heatmap, training):
        group.add_commands(commands)
    for command in commands.choices.values():
        command.add_argument("-v", "--verbose", action="store_true", help="log to stderr")
    return parser


class _Version(argparse.Action):
    """Option --version; looks the version up only when asked for it."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        write(sys.stdout, f"xmag {version('xmag')}")
        parser.exit()
