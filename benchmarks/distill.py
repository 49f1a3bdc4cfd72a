"""Distillation: regions/s, how busy the GPU is, and where the time goes.

    python benchmarks/distill.py [--json OUT]
    torchrun --standalone --nproc-per-node=2 benchmarks/distill.py [--json OUT]
    python benchmarks/distill.py --teacher tiny --student tiny --batch 2 --steps 1 --side 2  # CPU

A teacher of UNI2-h's size and a ViT-B/14 student, both with random weights, on slides that are
written first: JPEG, 0.5 µm/px, in a temporary folder. "online": the teacher computes
features of every view. "cached": they were computed before. "cached, low": so were the low views,
and no slide is read.
Shares are of the wall time; what the device does is timed by its own events, and "waiting" is the
host, waiting for regions. "GPU busy" is the share of the time in which a kernel runs, from a
profile of some more steps, which slows the host a little. Batches are per GPU.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import report
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support.slides import texture, write_svs

from xmag.distill import (
    CachedFeatures,
    CacheSettings,
    Manifest,
    OnlineFeatures,
    Settings,
    SlideRegions,
    Teacher,
    TrainSettings,
    cache_features,
    fresh_student,
    load_teacher,
    plan_slides,
)
from xmag.distill.run import on_device, prepare
from xmag.distill.settings import LoaderSettings
from xmag.distill.teachers import TeacherFeatures
from xmag.distill.trainer import Trainer, ViewLoader
from xmag.encoder import Encoder
from xmag.geometry import TileSpec
from xmag.hub.registry import KNOWN, ModelConfig
from xmag.training import Ranks, joined_ranks
from xmag.vit import ViT, ViTConfig

UNI = "MahmoodLab/UNI2-h"
TINY = ViTConfig(width=64, depth=2, heads=2, hidden=128, position_grid=16)
REGION_PX, TILES = 896, 16
PARTS = ("low view and augment", "teacher", "student forward", "student backward", "optimizer")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--teacher", choices=("uni2-h", "tiny"), default="uni2-h")
    parser.add_argument("--student", default="dinov2_vitb14", help="a known config, or tiny")
    parser.add_argument("--batch", type=int, default=48, help="regions a step on each GPU")
    parser.add_argument("--steps", type=int, default=8, help="timed, of a teacher that looks")
    parser.add_argument("--processes", type=int, help="that decode for each GPU")
    parser.add_argument("--slides", type=int, default=4)
    parser.add_argument("--side", type=int, default=10, help="regions along a slide's side")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        joined_ranks() as ranks,
        on_device(ranks.device()),
        ExitStack() as stack,
    ):
        # Each process writes slides of its own: the same ones.
        write_slides(Path(folder), args.slides, args.side)
        manifest = plan_slides(folder, tissue=None, progress=False)
        loader, device = loader_of(args), ranks.device()
        source = stack.enter_context(
            SlideRegions(
                manifest,
                folder,
                threads=loader.threads_on(device),
                processes=loader.processes_on(device),
            )
        )
        rows = measured(args, ranks, source, manifest, Path(folder))
        if ranks.leads:
            title = (
                f"distillation ({ranks.world} x {ranks.device().type}, {args.batch} regions each)"
            )
            report(title, rows, args.json, world=ranks.world)


def write_slides(folder: Path, count: int, side: int) -> None:
    """Slides at 0.5 µm/px of `side` x `side` regions, no two alike."""
    for number in range(count):
        pattern = texture(2 * REGION_PX, 2 * REGION_PX, seed=number)
        pixels = np.tile(pattern, (-(-side // 2), -(-side // 2), 1))
        pixels = pixels[: side * REGION_PX, : side * REGION_PX]
        write_svs(folder / f"{number}.svs", mpp=0.5, power=20, levels=(1, 16), pixels=pixels)


def measured(
    args: argparse.Namespace, ranks: Ranks, source: SlideRegions, manifest: Manifest, folder: Path
) -> list[dict[str, Any]]:
    """A row for each way to come by the teacher's features."""
    device = ranks.device()
    teacher = random_teacher(args.teacher, device)
    alone = teacher_alone(teacher, device, tiles=256 if device.type == "cuda" else 16)
    columns = ("features", "regions/s", "tiles/s", "ms a step", "GPU busy", "waiting", *PARTS)
    most = {"features": "the teacher alone", "tiles/s": alone * ranks.world}
    rows: list[dict[str, Any]] = [dict.fromkeys(columns, "") | most]

    def add(name: str, features: TeacherFeatures, steps: int) -> None:
        data, trainer = prepared(args, ranks, source, features)
        rows.append({"features": name, **timed(data, trainer, steps)})

    add("online", OnlineFeatures(teacher=teacher), args.steps)
    if ranks.world > 1:
        return rows  # a cache is written by one process, and read in the same way
    for low in (False, True):
        cache = cache_features(
            folder / f"cache {low}",
            source,
            manifest,
            teacher,
            settings=CacheSettings(low=low),
            device=device,
            progress=False,
        )
        with cache:
            add("cached, low" if low else "cached", CachedFeatures(cache=cache), 4 * args.steps)
    return rows


def random_teacher(name: str, device: torch.device) -> Teacher:
    """A teacher of this size with random weights, in the precision that it would be used in."""
    config = KNOWN[UNI].config
    if name == "tiny":
        config = ModelConfig(vit=TINY, tile_spec=TileSpec(mpp=0.5))
    with torch.device(device):  # random numbers are drawn faster there
        vit = ViT(config.vit)
    about = {"name": name, "weights_sha256": "0" * 64, "trained": False}
    encoder = Encoder(vit, config, provenance=about, device=device, dtype="auto")
    return load_teacher(encoder)


def teacher_alone(teacher: Teacher, device: torch.device, *, tiles: int) -> float:
    """Tiles/s of the teacher on tiles that lie on the device: the most that there can be."""
    given = torch.randint(0, 256, (tiles, 224, 224, 3), dtype=torch.uint8, device=device)
    repeats = 8 if device.type == "cuda" else 1
    for turn in range(2):
        synchronise(device)
        start = time.perf_counter()
        for _ in range(repeats if turn else 2):
            teacher.features(given)
        synchronise(device)
    return repeats * tiles / (time.perf_counter() - start)


def prepared(
    args: argparse.Namespace, ranks: Ranks, source: SlideRegions, features: TeacherFeatures
) -> tuple[ViewLoader, Trainer]:
    student = TINY if args.student == "tiny" else args.student
    settings = Settings(
        train=TrainSettings(epochs=1000, batch=args.batch * ranks.world),
        loader=loader_of(args),
    )
    regions = np.arange(len(source))
    return prepare(
        source, features, fresh_student(student), regions, settings=settings, ranks=ranks
    )


def loader_of(args: argparse.Namespace) -> LoaderSettings:
    return LoaderSettings(processes=args.processes)


def timed(data: ViewLoader, trainer: Trainer, steps: int) -> dict[str, Any]:
    """Rates and shares of some steps, after two that are not timed."""
    watch, device, train = trainer.watch, trainer.device, trainer.settings.train
    last = 2 + steps + profiled_steps(steps)
    batches = data.batches(0, last, watch)
    run = (
        trainer.optimize(islice(batches, data.count), number=number, count=data.count)
        for number in range(last)
    )
    take(run, 2)
    watch.seconds()
    synchronise(device)
    start = time.perf_counter()
    take(run, steps)
    synchronise(device)
    wall = time.perf_counter() - start
    parts = watch.seconds()
    busy = gpu_busy(run, profiled_steps(steps), device)
    regions = steps * train.batch
    row: dict[str, Any] = {
        "regions/s": regions / wall,
        "tiles/s": regions * train.views * TILES / wall,
        "ms a step": 1e3 * wall / steps,
        "GPU busy": "" if busy is None else f"{busy:.0%}",
        "waiting": f"{parts['waiting for regions'] / wall:.0%}",
    }
    return row | {name: f"{parts.get(name, 0) / wall:.0%}" for name in PARTS}


def profiled_steps(steps: int) -> int:
    return max(2, steps // 4)


def take(run: Iterator[Any], count: int) -> None:
    for _ in range(count):
        next(run)


def gpu_busy(run: Iterator[Any], steps: int, device: torch.device) -> float | None:
    """The share of the time in which a kernel runs; None without a GPU."""
    if device.type != "cuda":
        take(run, steps)
        return None
    synchronise(device)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        start = time.perf_counter()
        take(run, steps)
        synchronise(device)
        wall = time.perf_counter() - start
    kernels = [
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA and not event.name.startswith(("Memcpy", "Memset"))
    ]
    return covered(kernels) / 1e6 / wall


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """The length that spans cover together, each point once."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
