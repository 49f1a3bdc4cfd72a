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


def run_on_two_ranks(source: str, out: Path, *, beside: str) -> None:
    """Run `source` with `out` as its argument in two processes of torchrun; it fails if one does.

    It may import the tests' `support`, and the modules beside the file of the test that calls.
    """
    tests = Path(__file__).parents[1]
    out.mkdir(exist_ok=True)
    script = out / "program.py"
    script.write_text(textwrap.dedent(source))
    paths = (str(tests), str(Path(beside).parent), os.environ.get("PYTHONPATH", ""))
    result = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone",
            "--nproc-per-node=2", str(script), str(out),
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        cwd=tests.parent, capture_output=True, text=True, timeout=800, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
