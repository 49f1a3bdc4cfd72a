"""The command that trains an encoder: distill."""

import argparse
import os
import sys
from pathlib import Path

from xmag.cli.arguments import Commands
from xmag.cli.console import ALL_DONE, write


def add_commands(commands: Commands) -> None:
    """Add distill to the commands."""
    distill = commands.add_parser(
        "distill", help="train an encoder to see at one scale what another sees at a finer one",
        allow_abbrev=False,
    )  # fmt: skip
    distill.add_argument("config", metavar="CONFIG.toml", type=Path, help="what is done")
    distill.add_argument(
        "--dry-run", action="store_true", help="say what memory and time it needs; write nothing"
    )
    distill.set_defaults(run=_distill)


def _distill(args: argparse.Namespace) -> int:
    from xmag.distill.run import run_config

    summary = run_config(args.config, dry_run=args.dry_run)
    if os.environ.get("RANK", "0") == "0":  # torchrun starts a process for each GPU
        for line in summary.lines():
            write(sys.stdout, line)
    return ALL_DONE
