"""How fast regions are read, seen, and taught: what a distillation needs each second.

    python benchmarks/regions.py SLIDE... [--regions 256] [--seconds 5] [--json OUT]

Regions of 896 px at 0.5 µm/px at random places of the slides' tissue, read by threads and by
processes; then, on the GPU where there is one, the low view, the augmentation, and the features of
a teacher the size of UNI2-h with random weights. `make_slides.py` writes slides to run it on.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import report, usable_cores

from xmag.distill.dataset import SlideRegions
from xmag.distill.regions import Manifest, plan_slides
from xmag.distill.teachers import load_teacher
from xmag.distill.views import low_view, teacher_tiles
from xmag.encoder import Encoder
from xmag.hub.registry import KNOWN
from xmag.training.augmentation import augment, draw
from xmag.vit import ViT

BATCH = 16


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("slides", type=Path, nargs="+")
    parser.add_argument("--regions", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    manifest = plan_slides([p.absolute() for p in args.slides], regions=args.regions, seed=1)
    root = manifest_root(args.slides, manifest)
    rows = list(reading(manifest, root, args.seconds))
    rows += computing(manifest, root, args.seconds)
    report("Regions of 896 px at 0.5 µm/px", rows, args.json, counts=manifest.counts())


def manifest_root(slides: list[Path], manifest: Manifest) -> Path:
    """The folder that the manifest's paths are relative to."""
    first = min(str(path.absolute()) for path in slides)
    return Path(first.removesuffix(manifest.sources[0].path))


def reading(manifest: Manifest, root: Path, seconds: float) -> Iterator[dict[str, Any]]:
    """Regions a second, asked for one at a time as a training loop does, by as many callers."""
    cores = usable_cores()
    counts = sorted({1, 2, 4, 8, cores} & set(range(cores + 1)))
    ways = [{"threads": n} for n in counts] + [{"processes": n} for n in counts]
    for way in ways:
        callers = max(way.values())
        with SlideRegions(manifest, root, **way) as source, ThreadPoolExecutor(callers) as pool:
            order = np.random.default_rng(0).permutation(len(manifest)).tolist()
            list(pool.map(source.read, ([i] for i in order[: 2 * callers])))  # opens the slides

            def epoch(
                source: SlideRegions = source,
                pool: ThreadPoolExecutor = pool,
                order: list[int] = order,
            ) -> int:
                return sum(len(part) for part in pool.map(source.read, ([i] for i in order)))

            (name, n) = next(iter(way.items()))
            yield {"what": f"read, {n} {name}", "regions/s": rate(epoch, seconds)}


def computing(manifest: Manifest, root: Path, seconds: float) -> Iterator[dict[str, Any]]:
    """Regions a second through each step on the way to the student and the teacher."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    with SlideRegions(manifest, root) as source:
        high = torch.from_numpy(source.read(range(min(BATCH, len(manifest))))).to(device)
    low, numbers = low_view(high), list(range(len(high)))

    def finished(values: torch.Tensor) -> int:
        if cuda:
            torch.cuda.synchronize()
        return len(values)

    steps: dict[str, Callable[[], int]] = {
        "draw": lambda: len(draw(0, 0, numbers, 0)),
        "low view": lambda: finished(low_view(high)),
        "augment the high view": lambda: finished(augment(high, draw(0, 0, numbers, 0))),
        "augment the low view": lambda: finished(augment(low, draw(0, 0, numbers, 0))),
    }
    if cuda:
        config = KNOWN["MahmoodLab/UNI2-h"].config
        encoder = Encoder(ViT(config.vit), config, provenance={"name": "random"}, device=device)
        teacher = load_teacher(encoder)
        steps["teach, the size of UNI2-h"] = lambda: (
            finished(teacher.features(teacher_tiles(high))) // 16
        )
    for name, step in steps.items():
        step()
        yield {"what": f"{name}, {device.type}", "regions/s": rate(step, seconds)}


def rate(step: Callable[[], int], seconds: float) -> float:
    """What `step` counts, a second."""
    start, done = time.perf_counter(), 0
    while (spent := time.perf_counter() - start) < seconds:
        done += step()
    return done / spent


if __name__ == "__main__":
    main()
