"""Time and memory against the area of a slide, and against the number of slides.

    python benchmarks/scaling.py SLIDE... [--processes 4] [--count 96] [--json OUT]

Each SLIDE is done as a cohort of one copy a process, so that all processes are busy with it, and
the second smallest as cohorts of up to `--count`. The encoder takes the mean colour of a tile, so
that what is measured is all but the model. Memory is the most that the tree of processes held above
what it held before: the proportional share (PSS) of each, summed, so that shared memory counts
once. Linux only.
"""

import argparse
import csv
import os
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from common import report

from xmag.cohort import extract_cohort
from xmag.geometry import TileSpec


class MeanColour:
    """Serves as an encoder at no cost."""

    tile_spec = TileSpec()
    embed_dim = 768
    provenance: Mapping[str, Any] = {"name": "mean colour", "weights_sha256": "none"}

    def embed(self, tiles: np.ndarray) -> np.ndarray:
        return np.resize(tiles.mean(axis=(1, 2), dtype=np.float32), (len(tiles), self.embed_dim))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("slides", type=Path, nargs="+")
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--count", type=int, default=96)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    paths = sorted(args.slides, key=lambda path: path.stat().st_size)
    rows = [measure([path] * args.processes, args.processes) for path in paths]
    second = paths[min(1, len(paths) - 1)]
    counts = (args.count // 16, args.count // 4, args.count)
    rows += [measure([second] * count, args.processes) for count in counts]
    report(f"scaling ({args.processes} decoding processes)", rows, args.json)


def measure(paths: list[Path], processes: int) -> dict[str, Any]:
    """A row: a cohort of these slides."""
    with tempfile.TemporaryDirectory() as folder:
        cohort = Path(folder) / "cohort.csv"
        with cohort.open("w", newline="") as file:
            rows = ((path.absolute(), f"slide-{n}") for n, path in enumerate(paths))
            csv.writer(file).writerows([("slide", "id"), *rows])
        with PeakMemory() as memory:
            start = time.perf_counter()
            done = extract_cohort(
                cohort,
                Path(folder) / "out",
                model=MeanColour(),
                processes=processes,
                progress=False,
            )
            seconds = time.perf_counter() - start
    assert not done.failed, done.failed[0]
    tiles = sum(row.tiles for row in done)
    return {
        "slide": paths[0].stem,
        "slides": len(paths),
        "tiles": tiles,
        "s": seconds,
        "ms a tile": 1000 * seconds / tiles,
        "peak MiB": memory.peak_mib,
    }


class PeakMemory:
    """The most memory that this process and its children held above what they held at first."""

    def __enter__(self) -> "PeakMemory":
        self._before = tree_pss_mib()
        self.peak_mib = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            self.peak_mib = max(self.peak_mib, tree_pss_mib() - self._before)


def tree_pss_mib() -> float:
    """The proportional share of memory of this process and all below it, in MiB."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int(
                (folder / "stat").read_text().rpartition(")")[2].split()[1]
            )
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended meanwhile
    tree, grown = {os.getpid()}, True
    while grown:
        more = {pid for pid, parent in parents.items() if parent in tree} - tree
        tree |= more
        grown = bool(more)
    return sum(pss_kib(pid) for pid in tree) / 1024


def pss_kib(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


if __name__ == "__main__":
    main()
