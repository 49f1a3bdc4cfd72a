"""Thousands of slides through one process: does it hold more and more memory, files or threads?

    python benchmarks/soak.py [--slides 2000] [--processes 0 1] [--json OUT]

Small slides of one to four tiles, each with an output of its own, embedded by xmag-mini. Twice a
second the proportional set size (what a process has in memory, shared pages by halves), open
files and threads are taken, of this process and of its decoding processes together. The growth is
the slope of a straight line through the figures from the first fifth of the slides on, for a
thousand slides.
"""

import argparse
import os
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from common import report
from support.killing import descendants, write_slides

import xmag

_EVERY_S = 0.5
_DIFFERENT = 25
"""Slides that are listed again and again, with other outputs."""
_MB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--slides", type=int, default=2000)
    parser.add_argument("--processes", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    encoder = xmag.load_model("xmag-mini")
    rows, samples = [], {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_slides(folder / "slides", _DIFFERENT, mpp=1.0)
        table = folder / "cohort.csv"
        with table.open("w") as file:
            file.write("slide,id\n")
            for number in range(args.slides):
                file.write(f"slides/{number % _DIFFERENT:03}.svs,{number}\n")
        for processes in args.processes:
            taken = sampled(table, folder / "out", encoder, processes)
            shutil.rmtree(folder / "out")
            rows += told(taken, processes)
            samples[processes] = taken
    report(f"{args.slides} slides through one process", rows, args.json, samples=samples)


def sampled(table: Path, out: Path, encoder: xmag.Encoder, processes: int) -> list[dict]:
    """What is held while a cohort is at work."""
    taken, over = [], threading.Event()

    def watch() -> None:
        while not over.wait(_EVERY_S):
            taken.append(sample(out))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        done = xmag.extract_cohort(
            table, out, model=encoder, tissue=None, processes=processes, progress=False
        )
    finally:
        over.set()
        watcher.join()
    assert done.counts() == {"done": len(done)}, done.counts()
    return taken


def sample(out: Path) -> dict:
    below = descendants(os.getpid())
    names = [path.name for path in out.iterdir()] if out.is_dir() else []
    return {
        "time": time.monotonic(),
        "done": sum(name.endswith(".h5") for name in names),
        "caller_mb": pss(os.getpid()),
        "children_mb": sum(pss(pid) for pid in below),
        "files": sum(files(pid) for pid in (os.getpid(), *below)),
        "threads": sum(threads(pid) for pid in (os.getpid(), *below)),
    }


def pss(pid: int) -> float:
    """Proportional set size in MB; 0 for a process that has just ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (OSError, ProcessLookupError):
        return 0.0
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024 / _MB


def files(pid: int) -> int:
    return entries(Path(f"/proc/{pid}/fd"))


def threads(pid: int) -> int:
    return entries(Path(f"/proc/{pid}/task"))


def entries(folder: Path) -> int:
    """How many there are; 0 for a process that has just ended."""
    try:
        return len(list(folder.iterdir()))
    except OSError:
        return 0


def told(taken: list[dict], processes: int) -> list[dict]:
    """A row for each tenth of the way, and one with the growth."""
    last = taken[-1]["done"]
    steady = [one for one in taken if one["done"] >= last / 5]
    keys = ("caller_mb", "children_mb", "files", "threads")
    rows = []
    for tenth in range(1, 11):
        part = [one for one in taken if (tenth - 1) * last / 10 <= one["done"] <= tenth * last / 10]
        rows.append(
            {"processes": processes, "slides done": round(tenth * last / 10)}
            | {key: float(np.median([one[key] for one in part])) for key in keys}
        )
    thousands = np.array([one["done"] for one in steady]) / 1000
    rows.append(
        {"processes": processes, "slides done": "growth for 1,000"}
        | {key: float(np.polyfit(thousands, [one[key] for one in steady], 1)[0]) for key in keys}
    )
    return rows


if __name__ == "__main__":
    main()
