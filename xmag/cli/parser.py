"""Parser of the command line, made of the table of commands.

A flag is named as the option of the Python function that it is for. One that is not given is not
passed on: the defaults are those of the functions. Nothing heavy is imported here, as `xmag --help`
must not wait for torch.
"""

import argparse
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

from xmag.cli.commands import COMMANDS, VERBOSE
from xmag.cli.console import WRONG_USE, write


def parse(argv: Sequence[str] | None) -> dict[str, Any]:
    """The flags that are given, by option; "run" is the path of the function to call with them.

    "verbose" is for the caller. Raises SystemExit after --help, --version and wrong use.
    """
    parser = argparse.ArgumentParser(
        prog="xmag", description=_DESCRIPTION, epilog=_EPILOG, **_STYLE
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version")
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND", required=True, parser_class=_CommandParser
    )
    for name, command in COMMANDS.items():
        added = commands.add_parser(name, help=command.help, epilog=command.epilog, **_STYLE)
        for names, options in (*command.flags, VERBOSE):
            added.add_argument(*names, **options)
        added.set_defaults(run=f"xmag.cli.{command.module}:{name}")
    if not (sys.argv[1:] if argv is None else argv):
        parser.print_help(sys.stderr)
        parser.exit(WRONG_USE)
    return vars(parser.parse_args(argv))


class _CommandParser(argparse.ArgumentParser):
    """Parser of one command, which shows its own help where it does not know an option."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """The flags of the command; SystemExit where there are others."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.print_help(sys.stderr)
            name = unknown[0].partition("=")[0]
            near = get_close_matches(name, self._option_string_actions, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            message = f"\n{self.prog}: error: unrecognized arguments: {' '.join(unknown)}{hint}\n"
            self.exit(WRONG_USE, message)
        return found, unknown


class _Version(argparse.Action):
    """Option --version; looks the version up only when asked for it."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        write(sys.stdout, f"xmag {version('xmag')}")
        parser.exit()


_STYLE: dict[str, Any] = {
    "formatter_class": argparse.RawDescriptionHelpFormatter,
    "allow_abbrev": False,
    "argument_default": argparse.SUPPRESS,
}
_DESCRIPTION = "Embeddings of whole-slide images at 5x (2.0 µm/px) with the XMAG foundation model."
_EPILOG = """\
examples:
  xmag demo                                    make a small slide and extract its features
  xmag info slide.svs                          what xmag sees in a file
  xmag extract slides.csv -o features          features; columns: slide, optionally mpp, region, id
  xmag train slides.csv --features features -o classifier
                                               a classifier; columns: slide, label, patient
  xmag heatmap slide.svs --classifier classifier
                                               what it looked at

`xmag COMMAND --help` tells more. Exit status: 0 all done, 1 something failed, 2 wrong use.
"""
