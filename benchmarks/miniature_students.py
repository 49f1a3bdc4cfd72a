"""The students of the miniature: the shipped recipe with its seeds, and each level alone.

Each is trained by xmag.distill.distill in a process of its own, all at once, on as many GPUs as
there are. Where there is less time than steps, a trial says how many steps fit, for all alike.
"""

import csv
import json
import multiprocessing
import os
import time
from collections.abc import Mapping
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from queue import Empty
from threading import BrokenBarrierError
from typing import Any

import numpy as np
import torch
from common import usable_cores
from safetensors.torch import load_file, save_file

from xmag.distill import distill
from xmag.distill.cache import CachedFeatures, FeatureCache, cache_features
from xmag.distill.dataset import Numbers, SlideRegions
from xmag.distill.export import MADE_BY, WEIGHTS
from xmag.distill.regions import Manifest, plan_images
from xmag.distill.run import MANIFEST, TARGETS, cache_settings, prepare
from xmag.distill.settings import DistillConfig, Settings
from xmag.distill.student import StudentStart, fresh_student
from xmag.distill.summary import TRAINING, VALIDATION
from xmag.distill.teachers import Teacher
from xmag.training import Ranks

RESULTS = "students.jsonl"
_TRIAL = 10, 30
"""Steps of a trial: those that are not timed, and those that are."""
_SPARE = 0.92
"""Share of the time left that steps are planned for: checkpoints and the export take some."""
_START_S = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A student to train: the levels of its loss, its seed, and the source that it never sees."""

    name: str
    seed: int = 0
    levels: str = "both"
    left_out: str | None = None

    def settings(self, config: DistillConfig, steps: int) -> Settings:
        """The settings of the configuration for this student."""
        base, loss = config.settings, config.loss
        if self.levels != "both":
            other = "local_weight" if self.levels == "global" else "global_weight"
            loss = replace(loss, **{other: 0.0})
        every = max(1, steps // 8) if self.left_out else 0
        return replace(
            base,
            loss=loss,
            train=replace(base.train, steps=steps, seed=self.seed),
            loader=replace(base.loader, threads=2, processes=0),
            log=replace(base.log, every=100, checkpoint_every=400, validate_every=every),
        )


SEEDS = tuple(Run(name=f"both-{seed}", seed=seed) for seed in range(3))
ALONE = tuple(Run(name=f"{level}-0", levels=level) for level in ("global", "local"))
CHECK = Run(name="check-0", left_out="brecahad")
"""A student whose curve on a source that it never sees says whether training on still helps."""


def planned(config: DistillConfig, out: Path) -> Manifest:
    """The manifest of the fields in OUT/fields, each a region."""
    path, fields = out / MANIFEST, out / "fields"
    if not path.exists():
        count = len(list(fields.glob("*/*.jpg")))
        plan_images(
            fields, mpp=config.data.mpp or 0, regions=count, seed=config.data.seed, progress=False
        ).save(path)
    return Manifest.load(path)


def write_caches(
    config: DistillConfig, out: Path, teachers: Mapping[str, Teacher], device: torch.device
) -> None:
    """Compute the features of each teacher of the configuration, where they are not there yet."""
    manifest = planned(config, out)
    (out / TARGETS).mkdir(exist_ok=True)
    with SlideRegions(manifest, out / "fields") as source:
        for number, wanted in enumerate(config.teachers):
            folder, settings = out / TARGETS / str(number), cache_settings(config, wanted)
            cache_features(
                folder,
                source,
                manifest,
                teachers[wanted.name],
                settings=settings,
                device=device,
                progress=False,
            ).close()


def fresh(config: DistillConfig, seed: int = 0) -> StudentStart:
    """A student of the configuration with random weights."""
    assert config.student.config is not None
    return fresh_student(config.student.config, seed=seed, resample=config.student.resample)


class _Pace:
    """What processes that train side by side share: a start together, and the steps that fit."""

    def __init__(self, count: int, *, trial: bool) -> None:
        context = multiprocessing.get_context("spawn")
        self.trial = trial
        self.start, self.paces = context.Barrier(count), context.Queue()
        self.steps, self.known = context.Value("i", 0), context.Event()


def train_all(
    config: DistillConfig, out: Path, runs: list[Run], *, deadline: float | None
) -> list[dict[str, Any]]:
    """Train the students that are not in OUT/students.jsonl; the lines of all that are there.

    OUT gets NAME.safetensors, half precision, of each. Steps are those of the configuration, or
    as many as fit before the deadline; they are kept in OUT/steps.json for who resumes.
    """
    path, kept = out / RESULTS, out / "steps.json"
    done = {line["name"] for line in lines(path)}
    runs = [run for run in runs if run.name not in done]
    if not runs:
        return lines(path)
    asked = json.loads(kept.read_text()) if kept.exists() else config.train.steps
    assert isinstance(asked, int)
    pace = _Pace(len(runs), trial=deadline is not None and not kept.exists())
    context, children = multiprocessing.get_context("spawn"), []
    visible = _gpus()
    threads = max(1, usable_cores() // len(runs) - 1)
    for number, run in enumerate(runs):
        if visible:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible[number % len(visible)]
        child = context.Process(target=_train, args=(config, out, run, pace, threads))
        child.start()
        children.append(child)
    if pace.trial:
        assert deadline is not None
        slowest = 0.0
        with suppress(Empty):
            for _ in runs:
                slowest = max(slowest, pace.paces.get(timeout=150))
        left = deadline - time.time() - _START_S
        asked = max(1, min(asked, int(left * _SPARE / max(slowest, 1e-3))))
        print(f"{slowest:.3f} s a step, {left:.0f} s left: {asked} steps", flush=True)
    kept.write_text(f"{asked}\n")
    pace.steps.value = asked
    pace.known.set()
    for child in children:
        child.join()
    if failed := [child.exitcode for child in children if child.exitcode]:
        raise SystemExit(f"{len(failed)} of {len(children)} students failed, as is said above")
    return lines(path)


def lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSONL file that is perhaps not there."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(at) for at in range(torch.cuda.device_count())]


def _train(config: DistillConfig, out: Path, run: Run, pace: _Pace, threads: int) -> None:
    """Train a student, in a process of its own."""
    torch.set_num_threads(threads)
    manifest, start = planned(config, out), time.perf_counter()
    held = np.empty(0, np.int64)
    if run.left_out:
        of = np.array([source.site == run.left_out for source in manifest.sources])
        held = np.flatnonzero(of[manifest.places[:, 0]])
    caches = [
        FeatureCache(
            out / TARGETS / str(number), manifest=manifest, settings=cache_settings(config, wanted)
        )
        for number, wanted in enumerate(config.teachers)
    ]
    teachers = [
        CachedFeatures(cache, weight=wanted.weight)
        for cache, wanted in zip(caches, config.teachers, strict=True)
    ]
    with SlideRegions(manifest, out / "fields", threads=1) as source:
        if pace.trial:
            seconds = _timed(config, run, source, teachers, held, pace)
            pace.paces.put(seconds)
        pace.known.wait()
        steps = pace.steps.value
        summary = distill(
            source,
            teachers,
            fresh(config, run.seed),
            out / "runs" / run.name,
            settings=run.settings(config, steps),
            validation=held,
            card=config.model,
            progress=False,
        )
    assert summary.model is not None
    state = {name: t.half() for name, t in load_file(summary.model / WEIGHTS).items()}
    save_file(state, out / f"{run.name}.safetensors", metadata={"format": "pt"})
    found = {
        **asdict(run),
        "steps": steps,
        "regions": summary.regions,
        "seconds": summary.seconds,
        "seconds_in_all": time.perf_counter() - start,
        "training": _curve(out / "runs" / run.name, TRAINING),
        "validation": _curve(out / "runs" / run.name, VALIDATION),
        "made_by": json.loads((summary.model / MADE_BY).read_text()),
    }
    with (out / RESULTS).open("a") as file:
        file.write(json.dumps(found) + "\n")
    print(f"{run.name}: {steps} steps in {summary.seconds:.0f} s", flush=True)


def _timed(
    config: DistillConfig,
    run: Run,
    source: SlideRegions,
    teachers: list[CachedFeatures],
    held: Numbers,
    pace: _Pace,
) -> float:
    """Seconds of a step while all others train too."""
    untimed, timed = _TRIAL
    training = np.setdiff1d(np.arange(len(source)), held)
    data, trainer = prepare(
        source,
        teachers,
        fresh(config),
        training,
        settings=run.settings(config, untimed + timed),
        ranks=Ranks(),
    )
    with suppress(BrokenBarrierError):  # one that failed is not waited for
        pace.start.wait(timeout=120)
    start = 0.0
    with closing(data.batches(0, untimed + timed, trainer.watch)) as batches:
        for number in range(untimed + timed):
            parts = islice(batches, data.count)
            trainer.optimize(parts, number=number, count=data.count)
            if number + 1 in (untimed, untimed + timed):
                trainer.watch.seconds()  # waits for the device
                start, seconds = time.perf_counter(), time.perf_counter() - start
    return seconds / timed


def _curve(folder: Path, kind: str) -> list[dict[str, float]]:
    """The rows that a run logged, as numbers."""
    if not (folder / kind).exists():
        return []
    with (folder / kind).open(newline="") as file:
        return [
            {name: float(value) for name, value in row.items() if value}
            for row in csv.DictReader(file)
        ]
