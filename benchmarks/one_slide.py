"""One slide at a time, warm: `extract_features` and its stages, beside another version of xmag.

    python benchmarks/one_slide.py SLIDE... [--against CHECKOUT] [--threads 1 4 8 16] [--json OUT]

Each version runs in a process of its own, which has read every slide once before the clock runs;
they take turns, stage by stage, on each slide, `--repeats` times. Figures are medians over slides
and repeats, in seconds. Weights are random (ViT-B/14); on a GPU they are bfloat16.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from common import report, usable_cores

HERE = Path(__file__).resolve()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("slides", nargs="+", type=Path)
    parser.add_argument("--against", type=Path, help="a checkout of the other version")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 4, 8, 12, 16])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.slides)
        return
    versions = {"this": HERE.parents[1]} | ({"other": args.against} if args.against else {})
    children = {name: started(root.resolve(), args.slides) for name, root in versions.items()}
    threads = [n for n in args.threads if n <= usable_cores()]
    stages = ["find_tissue", *(f"read_tiles {n}" for n in threads), "embed", "extract_features"]
    rows = []
    for stage in stages:
        seconds: dict[str, list[float]] = {name: [] for name in versions}
        for turn in range(args.repeats + 1):
            for number in range(len(args.slides)):
                for name, child in children.items():
                    taken = asked(child, f"{stage} {number}")
                    if turn:
                        seconds[name].append(taken)
        rows.append({"stage": stage} | {name: statistics.median(s) for name, s in seconds.items()})
        print(rows[-1], flush=True)
    tiles = [int(asked(children["this"], f"tiles {n}")) for n in range(len(args.slides))]
    for child in children.values():
        child.communicate("\n")
    report("one slide", rows, args.json, tiles=tiles)


def started(root: Path, slides: list[Path]) -> subprocess.Popen[str]:
    """A process that measures the xmag at `root`."""
    command = [sys.executable, str(HERE), "--serve", *map(str, slides)]
    return subprocess.Popen(
        command,
        env=os.environ | {"PYTHONPATH": str(root)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def asked(child: subprocess.Popen[str], question: str) -> float:
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(question + "\n")
    child.stdin.flush()
    return float(child.stdout.readline())


def serve(paths: list[Path]) -> None:
    """Answer each line of stdin, a stage and the number of a slide, with seconds."""
    import torch
    from encoder import xmag_encoder

    import xmag

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = xmag_encoder(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    slides = [xmag.Slide(path) for path in paths]
    masks = [xmag.find_tissue(slide) for slide in slides]
    plans = [
        xmag.plan_tiles(slide, encoder.tile_spec, tissue=mask)
        for slide, mask in zip(slides, masks, strict=True)
    ]
    for line in iter(sys.stdin.readline, "\n"):
        stage, *arguments, which = line.split()
        number = int(which)
        slide, plan = slides[number], plans[number]
        if stage == "tiles":
            print(len(plan), flush=True)
            continue
        run: Callable[[], object]
        if stage == "find_tissue":
            run = partial(xmag.find_tissue, slide)
        elif stage == "read_tiles":
            batches = partial(xmag.read_tiles, slide, plan, threads=int(arguments[0]))
            run = partial(read_all, batches)
        elif stage == "embed":
            shape = (len(plan), plan.spec.size_px, plan.spec.size_px, 3)
            tiles = torch.zeros(shape, dtype=torch.uint8, device=device)
            run = partial(embedded, encoder, tiles)
        else:
            run = partial(xmag.extract_features, paths[number], model=encoder, progress=False)
        start = time.perf_counter()
        run()
        print(time.perf_counter() - start, flush=True)


def read_all(batches: Callable[[], Iterable[object]]) -> None:
    for _ in batches():
        pass


def embedded(encoder: Any, tiles: Any) -> Any:
    """Embeddings of tiles that are on the device."""
    import torch

    return torch.cat([encoder.embed(part) for part in tiles.split(256)]).cpu()


if __name__ == "__main__":
    main()
