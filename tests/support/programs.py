"""Programs run in a Python of their own, for what is true of a whole process."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path


def run_program(source: str, *arguments: object, cwd: Path | None = None, **env: str) -> str:
    """What `source` prints, run with warnings as errors; it fails if anything goes to stderr."""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(source), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=800,
        cwd=cwd,
        env={**os.environ, **env},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return result.stdout
