"""One GPU of a host against two: the same slides through one worker process, then through two.

    python benchmarks/two_gpus.py FOLDER [--slides 200] [--workers 0 1 2] [--json OUT]

FOLDER holds a few slides, which are read again and again under other names until there are
`--slides` of them. Weights are random (ViT-B/14) unless `--model` names some. Each worker claims a
GPU of its own and has the same number of decoding processes: the cores of the host, shared by the
largest number of workers. Workers are started, have their model and have done some slides before
the clock runs; it stops when the last file is there. 0 workers is the cohort in this process, on
one GPU and with as many decoding processes. On a host without GPUs the workers compute on
the CPU, which shows that the benchmark runs, and not what GPUs do.
"""

import argparse
import csv
import itertools
import multiprocessing
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from common import report, usable_cores
from encoder import xmag_encoder

from xmag.cohort import CohortReport, extract_cohort
from xmag.encoder import load_model

WARM_UP = 4
"""Slides that each worker does before the clock runs."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--slides", type=int, default=200)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--model", help="a name or folder; default: a ViT-B/14 with random weights")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    paths = sorted(p for p in args.folder.iterdir() if p.suffix in (".svs", ".tif", ".tiff"))
    processes = None
    if torch.cuda.is_available():
        processes = max(1, usable_cores() // max(args.workers))
    rows = []
    with tempfile.TemporaryDirectory(prefix="xmag-gpus-") as folder:
        work = Path(folder)
        model = args.model or saved_model(work / "model")
        for workers in args.workers:
            rows.append(measure(paths, args.slides, workers, model, processes, work))
    for row in rows:
        one = next((r for r in rows if r["workers"] == 1), rows[0])
        row["x one"] = row["slides/min"] / one["slides/min"]
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    report("two GPUs", rows, args.json, devices=devices, processes_a_worker=processes)


def saved_model(folder: Path) -> str:
    folder.mkdir()
    xmag_encoder(torch.device("cpu"), torch.float32).save(folder)
    return str(folder)


def measure(
    paths: list[Path], count: int, workers: int, model: str, processes: int | None, work: Path
) -> dict[str, Any]:
    """The row of so many workers."""
    options: dict[str, Any] = {"model": model, "processes": processes, "progress": False}
    cohort = listed(paths, count, work / "cohort.csv")
    warm_up = listed(paths, max(WARM_UP, processes or 0), work / "warm-up.csv")
    out = work / str(workers)
    if not workers:
        options["model"] = load_model(model)
        extract_cohort(warm_up, out / "warm-up", **options)
        start = time.perf_counter()
        done = extract_cohort(cohort, out / "timed", **options)
        return row_of(0, done, time.perf_counter() - start)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        # A cohort for each at once: of one, the first worker that is up would do all.
        def warm(number: int) -> None:
            folder = out / f"warm-up-{number}"
            extract_cohort(warm_up, folder, executor=pool, shards=1, **options)

        with ThreadPoolExecutor(workers) as threads:
            list(threads.map(warm, range(workers)))
        start = time.perf_counter()
        done = extract_cohort(cohort, out / "timed", executor=pool, shards=workers, **options)
        seconds = time.perf_counter() - start
    return row_of(workers, done, seconds)


def row_of(workers: int, done: CohortReport, seconds: float) -> dict[str, Any]:
    assert all(row.status == "done" for row in done), done.counts()
    return {
        "workers": workers,
        "slides": len(done),
        "tiles/s": sum(row.tiles for row in done) / seconds,
        "slides/min": 60 * len(done) / seconds,
    }


def listed(paths: list[Path], count: int, path: Path) -> Path:
    """A CSV with `count` slides, the same ones again and again."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["slide", "id"])
        again = itertools.islice(itertools.cycle(paths), count)
        writer.writerows((path.absolute(), f"slide-{n:04}") for n, path in enumerate(again))
    return path


if __name__ == "__main__":
    main()
