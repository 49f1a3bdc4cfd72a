"""The command that trains an encoder: distill."""

import os
import sys
from pathlib import Path

from xmag.cli.console import ALL_DONE, write
from xmag.distill.run import run_config


def distill(config: Path, *, dry_run: bool = False) -> int:
    """Distillation by a configuration file, or its dry run."""
    summary = run_config(config, dry_run=dry_run)
    if os.environ.get("RANK", "0") == "0":  # torchrun starts a process for each GPU
        for line in summary.lines():
            write(sys.stdout, line)
    return ALL_DONE
