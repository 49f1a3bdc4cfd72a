"""A cohort of slides -> feature files: xmag against what the field writes, at 5x and at 20x.

    python benchmarks/slides.py FOLDER [--slides 200] [--compile] [--field 3] [--json OUT]
    python benchmarks/slides.py FOLDER [--slides 200] --turns 5 [--json OUT]
    python benchmarks/slides.py FOLDER --slides 80 --timm vit_small_patch16_224 --mpp 0.5

FOLDER holds a few slides, which are read again and again under other names until there are
`--slides` of them, all in the page cache. Weights are random. The contenders:

- xmag: `extract_cohort`, from opening the slide and finding the tissue to the file on the disk.
- field: OpenSlide's read_region for each tile, resized and normalised in a DataLoader with a worker
  a core, made anew for each slide; fp16, eager. It gets the coordinates for free.
- kept: the same done well: one DataLoader, whose workers are kept across slides and send uint8,
  which the GPU normalises.
- field 20x, kept 20x: both with 224 px tiles at 0.5 µm/px and a ViT of UNI2-h's size.

With `--turns` xmag alone runs so many times, eager and compiled in turn, each time beside its
encoder alone; figures are medians.

With `--timm` a model of timm, loaded from what timm saves, takes the place of ViT-B/14, at `--mpp`:
xmag beside the encoder alone and beside the same cohort with an encoder that does nothing, which is
decoding alone, in three turns; and field and kept with the same model and tiles.

The contenders other than xmag run on `--field` slides (at 20x on a part of one), as they are slow;
slides a minute follow from their tiles a second.
"""

import argparse
import csv
import itertools
import logging
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import torch
from common import report, usable_cores
from encoder import MEAN, STD, xmag_encoder
from picture import stacked_bars
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from xmag.cohort import extract_cohort
from xmag.encoder import Encoder, load_model
from xmag.extract import bag_of, extract_features
from xmag.geometry import TileSpec
from xmag.plan import TilePlan, plan_tiles
from xmag.slide import Slide
from xmag.tiles import read_tiles
from xmag.tissue import find_tissue


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--slides", type=int, default=200)
    parser.add_argument("--field", type=int, default=3, help="slides for the others; 0: none")
    parser.add_argument("--tiles-20x", type=int, default=6000, help="tiles of the 20x pipelines")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--turns", type=int, default=0, help="eager and compiled in turn")
    parser.add_argument("--timm", metavar="NAME", help="a model of timm instead of ViT-B/14")
    parser.add_argument("--mpp", type=float, default=0.5, help="of --timm (default: 0.5)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path, help="PNG of where the time of a slide goes")
    args = parser.parse_args()
    paths = sorted(p for p in args.folder.iterdir() if p.suffix in (".svs", ".tif", ".tiff"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if args.timm:
        rows = of_timm(args, paths, timm_encoder(args.timm, args.mpp, device, dtype))
        report("slides", rows, args.json)
        return
    encoder = xmag_encoder(device, dtype)
    if args.turns:
        report("slides", in_turn(paths, args.slides, encoder, args.turns), args.json)
        return
    encoder = encoder.compiled() if args.compile else encoder
    rows, more = [], {"one slide": single(paths, encoder)}
    ours, cohort = measure_cohort(paths, args.slides, encoder, args.processes)
    rows.append(ours)
    more |= cohort
    if args.field:
        rows += others(paths[: args.field], args.tiles_20x, device, ours["slides/min"])
    if args.picture:
        draw_stages(stages(paths, encoder), ours["slides/min"], args.picture)
    for key, value in more.items():
        print(f"{key}: {value}")
    report("slides", rows, args.json, **more)


def in_turn(paths: list[Path], count: int, encoder: Encoder, turns: int) -> list[dict[str, Any]]:
    """The rows of xmag, eager and compiled, each the median of so many turns."""
    encoders = {"eager": encoder, "compiled": encoder.compiled()}
    found: dict[str, list[dict[str, Any]]] = {mode: [] for mode in encoders}
    for turn in range(turns + 1):
        for mode, each in encoders.items():
            row, more = measure_cohort(paths, count if turn else 8, each, None)
            if turn:
                found[mode].append({"tiles/s": row["tiles/s"], **more})
                print(mode, found[mode][-1], flush=True)
    return [
        {
            "mode": mode,
            **{name: float(np.median([each[name] for each in runs])) for name in runs[0]},
        }
        for mode, runs in found.items()
    ]


def timm_encoder(name: str, mpp: float, device: torch.device, dtype: torch.dtype) -> Encoder:
    """A model of timm with random weights, as timm saves it and `load_model` reads it."""
    import timm

    with tempfile.TemporaryDirectory() as folder:
        timm.models.save_for_hf(timm.create_model(name, pretrained=False, num_classes=0), folder)
        return load_model(folder, tile_spec=TileSpec(mpp=mpp), device=device, dtype=dtype)


class Nothing:
    """An encoder without work, for tiles and batches like another's."""

    def __init__(self, like: Encoder) -> None:
        self.tile_spec, self.embed_dim, self.device = like.tile_spec, like.embed_dim, like.device
        self.provenance = {"name": "nothing", "weights_sha256": ""}

    def embed(self, tiles: Any) -> np.ndarray:
        return np.zeros((len(tiles), self.embed_dim), np.float32)


def of_timm(args: argparse.Namespace, paths: list[Path], encoder: Encoder) -> list[dict[str, Any]]:
    """The rows of a model of timm: in xmag, alone, without it, and as the field runs it."""
    runs: list[tuple[float, float, float, float]] = []
    for turn in range(4):
        row, more = measure_cohort(paths, args.slides if turn else 2, encoder, args.processes)
        alone = more["encoder alone, tiles/s"]
        without = measure_cohort(
            paths, args.slides if turn else 2, Nothing(encoder), args.processes, rate=alone
        )[1]
        if turn:
            # Slides of many tiles finish in bunches, so that only the whole run has a rate.
            rates = [x["whole run, slides/min"] / 60 for x in (more, without)]
            runs.append(
                (alone, *(rate * row["tiles a slide"] for rate in rates), more["cores busy"])
            )
            print(runs[-1], flush=True)
    alone, ours, without, busy = (float(x) for x in np.median(runs, axis=0))
    rates = {"encoder alone": alone, "xmag": ours, "xmag without the encoder": without}
    plan = plan_of(paths[0], encoder.tile_spec)
    downsample = plan.tiles.mpp / plan.tiles.level0_mpp
    tiles = [(paths[0], (int(x), int(y)), downsample) for x, y in plan.coords[: args.tiles_20x]]
    for name, run in (("field", run_field), ("kept", run_kept)):
        rates[name] = run([tiles], encoder)
    return [
        {
            "pipeline": name,
            "tiles/s": rate,
            "of the encoder": rate / alone,
            "cores busy": busy if name == "xmag" else "",
        }
        for name, rate in rates.items()
    ]


def measure_cohort(
    paths: list[Path],
    count: int,
    encoder: Any,
    processes: int | None,
    rate: float | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """xmag's row, and what it takes to judge it; `rate` is the encoder's alone, where known."""
    work = Path(tempfile.mkdtemp(prefix="xmag-slides-"))
    cohort = work / "cohort.csv"
    with cohort.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["slide", "id"])
        again = itertools.islice(itertools.cycle(paths), count)
        writer.writerows((path.absolute(), f"slide-{n:04}") for n, path in enumerate(again))
    finished = FinishTimes()
    logging.getLogger("xmag.cohort").addHandler(finished)
    logging.getLogger("xmag.cohort").setLevel(logging.INFO)
    busy, start = CpuTime(), time.perf_counter()
    done = extract_cohort(cohort, work / "out", model=encoder, processes=processes, progress=False)
    end = time.perf_counter()
    shutil.rmtree(work)
    assert not done.failed, done.failed[0]
    # Steady state: from the time a tenth of the slides are done until nine tenths are.
    first, last = count // 10, count - count // 10 - 1
    tiles = [row.tiles for row in done]
    slides = (last - first) / (finished.at[last] - finished.at[first])
    alone = rate or encoder_rate(encoder)
    mean_tiles = float(np.mean(tiles))
    row = {
        "pipeline": "xmag",
        "slides": count,
        "tiles a slide": mean_tiles,
        "tiles/s": slides * mean_tiles,
        "slides/min": 60 * slides,
        "xmag is x": 1.0,
    }
    return row, {
        "start-up until the first slide, s": finished.at[0] - start,
        "whole run, slides/min": 60 * count / (end - start),
        "encoder alone, tiles/s": alone,
        "of the encoder alone": slides * mean_tiles / alone,
        "cores busy": busy.cores(),
    }


class FinishTimes(logging.Handler):
    """When each slide was done, by xmag's own log."""

    def __init__(self) -> None:
        super().__init__()
        self.at: list[float] = []

    def emit(self, record: logging.LogRecord) -> None:
        del record
        self.at.append(time.perf_counter())


class CpuTime:
    """How many cores have been busy since this was made, by Linux's count."""

    def __init__(self) -> None:
        self._start = (time.perf_counter(), self._seconds())

    @staticmethod
    def _seconds() -> float:
        stat = Path("/proc/stat")
        if not stat.exists():
            return float("nan")
        fields = [int(x) for x in stat.read_text().splitlines()[0].split()[1:]]
        return (sum(fields) - fields[3] - fields[4]) / 100  # all but idle and waiting for disks

    def cores(self) -> float:
        return (self._seconds() - self._start[1]) / (time.perf_counter() - self._start[0])


def encoder_rate(encoder: Encoder) -> float:
    """Tiles a second of the encoder alone, from uint8 on the device."""
    shape = (256, 224, 224, 3) if encoder.device.type == "cuda" else (8, 224, 224, 3)
    tiles = torch.randint(0, 256, shape, dtype=torch.uint8, device=encoder.device)
    repeats = 40 if encoder.device.type == "cuda" else 2
    for count in (3, repeats):
        start = time.perf_counter()
        for _ in range(count):
            result = encoder.embed(tiles)
        result.cpu()
    return repeats * len(tiles) / (time.perf_counter() - start)


def single(paths: list[Path], encoder: Encoder) -> str:
    """Seconds of `extract_features` on one slide, warm."""
    seconds = []
    for path in [paths[0], *paths[:5]]:
        start = time.perf_counter()
        bag = extract_features(path, model=encoder, progress=False)
        seconds.append(time.perf_counter() - start)
    return f"{np.median(seconds[1:]):.3f} s for about {len(bag)} tiles (first {seconds[0]:.3f} s)"


def stages(paths: list[Path], encoder: Encoder) -> dict[str, float]:
    """Milliseconds of each stage of a slide, one after the other: on one core, and on the GPU."""
    taken: dict[str, list[float]] = {}

    def lap(name: str, start: float) -> float:
        now = time.perf_counter()
        taken.setdefault(name, []).append(1000 * (now - start))
        return now

    for path in paths[:4]:
        at = time.perf_counter()
        with Slide(path) as slide:
            facts = slide.facts
            at = lap("open", at)
            mask = find_tissue(slide)
            at = lap("tissue", at)
            plan = plan_tiles(slide, encoder.tile_spec, tissue=mask)
            at = lap("plan", at)
            batches = [tiles for _, tiles in read_tiles(slide, plan, threads=1)]
            lap("read and decode", at)
        on_device = [torch.from_numpy(tiles).to(encoder.device) for tiles in batches]
        encoder.embed(on_device[0]).cpu()
        at = time.perf_counter()
        features = torch.cat([encoder.embed(tiles) for tiles in on_device]).cpu().numpy()
        at = lap("embed", at)
        bag = bag_of(features, plan, facts, encoder, transform=None)
        with tempfile.TemporaryDirectory() as folder:
            bag.save(Path(folder) / "slide.h5")
        lap("save", at)
    return {name: float(np.median(values)) for name, values in taken.items()}


def draw_stages(stage_ms: dict[str, float], slides_per_minute: float, path: Path) -> None:
    """The picture: a slide's stages on one core, on all cores, on the GPU, and as measured."""
    embed = {"embed": stage_ms["embed"]}
    on_cpu = {name: ms for name, ms in stage_ms.items() if name != "embed"}
    cores = usable_cores()
    bars = {
        "one core": on_cpu,
        f"{cores} cores, evenly": {name: ms / cores for name, ms in on_cpu.items()},
        "GPU" if torch.cuda.is_available() else "encoder": embed,
        "cohort, as measured": {"a slide": 60_000 / slides_per_minute},
    }
    stacked_bars("A slide's time, in milliseconds", bars, path)


def others(
    paths: list[Path], tiles_20x: int, device: torch.device, ours: float
) -> list[dict[str, Any]]:
    """The rows of what the field writes."""
    rows = []
    for name, spec, vit in (
        ("", TileSpec(), "dinov2_vitb14"),
        (" 20x", TileSpec(mpp=0.5), "uni2_h"),
    ):
        plans = [plan_of(path, spec) for path in (paths if not name else paths[:1])]
        # The tiles of a part of a slide take as long each as those of all of it.
        whole = float(np.mean([len(plan) for plan in plans]))
        slides = [
            [
                (path, (int(x), int(y)), plan.tiles.mpp / plan.tiles.level0_mpp)
                for x, y in plan.coords[: tiles_20x if name else None]
            ]
            for path, plan in zip(paths, plans, strict=False)
        ]
        model = xmag_encoder(device, torch.float16, vit)
        model.embed(np.zeros((128, 224, 224, 3), np.uint8)).cpu()
        for kind, run in (("field", run_field), ("kept", run_kept)):
            rate = run(slides, model) / whole * 60
            rows.append(
                {
                    "pipeline": kind + name,
                    "slides": len(plans),
                    "tiles a slide": whole,
                    "tiles/s": rate * whole / 60,
                    "slides/min": rate,
                    "xmag is x": ours / rate,
                }
            )
    return rows


def plan_of(path: Path, spec: TileSpec) -> TilePlan:
    with Slide(path) as slide:
        return plan_tiles(slide, spec, tissue=find_tissue(slide))


class FieldTiles(Dataset[torch.Tensor]):
    """Tiles of slides as most scripts read them: one region each, resized.

    float32 (3, 224, 224), normalised, or with `as_uint8` uint8 (224, 224, 3).
    """

    def __init__(self, items: list[tuple[Path, tuple[int, int], float]], *, as_uint8: bool) -> None:
        self._items, self._as_uint8 = items, as_uint8
        self._open: dict[Path, openslide.OpenSlide] = {}

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> torch.Tensor:
        path, corner, downsample = self._items[index]
        if path not in self._open:
            self._open = {path: openslide.OpenSlide(path)}
        slide = self._open[path]
        level = slide.get_best_level_for_downsample(downsample)
        side = round(224 * downsample / slide.level_downsamples[level])
        image = slide.read_region(corner, level, (side, side)).convert("RGB")
        pixels = torch.from_numpy(np.array(image.resize((224, 224), Image.Resampling.BILINEAR)))
        if self._as_uint8:
            return pixels
        pixels = pixels.permute(2, 0, 1).float() / 255
        return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def run_field(slides: list[list[tuple[Path, tuple[int, int], float]]], encoder: Encoder) -> float:
    """Tiles a second of the field's way: a DataLoader for each slide, fp16, eager."""
    vit, start = encoder.vit, time.perf_counter()
    for items in slides:
        loader = DataLoader(
            FieldTiles(items, as_uint8=False),
            batch_size=128,
            num_workers=usable_cores(),
            pin_memory=True,
        )
        with torch.inference_mode(), tempfile.NamedTemporaryFile(suffix=".pt") as file:
            features = [vit(x.to(encoder.device, encoder.dtype))[:, 0].cpu() for x in loader]
            torch.save(torch.cat(features), file.name)
    return sum(map(len, slides)) / (time.perf_counter() - start)


def run_kept(slides: list[list[tuple[Path, tuple[int, int], float]]], encoder: Encoder) -> float:
    """Tiles a second of the same done well, once its workers are there.

    They are kept across slides and send uint8, which the GPU normalises; copies are asynchronous.
    """
    items = list(itertools.chain(*slides))
    loader = DataLoader(
        FieldTiles(items, as_uint8=True),
        batch_size=128,
        num_workers=usable_cores(),
        pin_memory=True,
        prefetch_factor=4,
    )
    features, start = [], 0.0
    for batch in loader:
        start = start or time.perf_counter()
        features.append(encoder.embed(batch))
    with tempfile.NamedTemporaryFile(suffix=".pt") as file:
        torch.save(torch.cat(features).cpu(), file.name)
    # The first batch of each worker was read before the clock started.
    first = min(128 * usable_cores(), len(items) // 2)
    return (len(items) - first) / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
