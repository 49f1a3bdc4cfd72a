"""The table of the miniature: all models by the same probes, and the differences between them."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import table
from miniature_data import (
    Images,
    Rows,
    colours,
    low_views,
    per_image,
    taught,
    teacher_rows,
)
from miniature_scores import PROBES, hits, summary
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from xmag.distill.student import Student, fresh_student
from xmag.distill.teachers import Teacher
from xmag.geometry import Resample

UNTRAINED = 5
BOTH, UNTRAINED_ROW, COLOURS = "global + local", "untrained", "colours"
CLASS_TOKEN, PATCHES = "class token", "mean of patch tokens"
POOLED = "class token and mean"
"""What xmag-mini gives as an embedding."""
Hits = dict[tuple[str, str], dict[str, list[NDArray[np.bool_]]]]
"""(model, embedding) -> probe -> for each seed, the hits of all images."""


def load_student(path: Path | None, seed: int, device: torch.device) -> Student:
    """A student from its file, or untrained."""
    start = fresh_student("xmag_mini", seed=seed)
    if path is not None:
        start.vit.load_state_dict(load_file(path))
    return Student(start.vit, start.config, teacher_dims=[1]).to(device).eval()


@torch.inference_mode()
def embedded(student: Student, low: Tensor) -> dict[str, Rows]:
    """The class tokens of images, the means of their patch tokens, and both side by side."""
    tokens = []
    for part in low.split(16):
        images = part.permute(0, 3, 1, 2) * student.scale + student.shift
        found = student.vit(images, student.vit.positions((16, 16)))
        tokens.append(torch.stack([found[:, 0], found[:, 1:].mean(1)], dim=1).cpu())
    both = torch.cat(tokens)
    return {
        CLASS_TOKEN: per_image(both[:, 0]),
        PATCHES: per_image(both[:, 1]),
        POOLED: per_image(both.flatten(1)),
    }


def at_20x(teacher: Teacher) -> str:
    """The name of a teacher's row, of its tiles at 20x."""
    return f"{teacher.name} at 20x"


def fed_5x(teacher: Teacher) -> str:
    """The name of a teacher's row, of the low views."""
    return f"{teacher.name} fed 5x pixels"


def scored(
    images: Images,
    teachers: Sequence[Teacher],
    out: Path,
    students: Sequence[Mapping[str, Any]],
    kernel: Resample,
) -> Hits:
    """What each model gets right, patients left out in turn; `students` are lines of results.

    `kernel` makes the low views, for all models that see them.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows: Hits = {}

    def add(model: str, embeddings: Mapping[str, Rows]) -> None:
        for name, x in embeddings.items():
            probes = rows.setdefault((model, name), {probe: [] for probe in PROBES})
            whole = {probe: np.zeros(len(x), bool) for probe in PROBES}
            for patient in np.unique(images.patients):
                held = images.patients == patient
                for probe, hit in hits(x, images.classes, held).items():
                    whole[probe][held] = hit
            for probe in PROBES:
                probes[probe].append(whole[probe])

    low = low_views(images, device, kernel)
    for number, teacher in enumerate(teachers):
        fine = teacher_rows(teacher, images, out / "evaluation" / str(number), device)
        add(at_20x(teacher), {"mean of tiles": fine})
        add(fed_5x(teacher), {"tile": per_image(taught(teacher, low).cpu())})
    names = {"both": BOTH, "global": "global only", "local": "local only"}
    for levels, model in names.items():
        for line in students:
            if line["levels"] == levels and line["left_out"] is None:
                path = out / f"{line['name']}.safetensors"
                add(model, embedded(load_student(path, 0, device), low))
    for seed in range(UNTRAINED):
        add(UNTRAINED_ROW, embedded(load_student(None, 100 + seed, device), low))
    add(COLOURS, {"12 numbers": colours(low)})
    return rows


def results(
    rows: Hits, costs: Mapping[str, Mapping[str, float]], images: Images
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of the table, and what the student has over the others under the same draws."""
    shown = []
    for (model, embedding), probes in rows.items():
        scores = {p: _both(probes[p], images) for p in PROBES}
        cost = {} if model == COLOURS else costs.get(model, costs["student"])
        shown.append(
            {"model": model, "embedding": embedding, "seeds": len(probes[PROBES[0]])}
            | scores
            | dict(cost)
        )
    ours, gains = rows[BOTH, POOLED], []
    for (model, embedding), theirs in rows.items():
        if model != BOTH and embedding not in (CLASS_TOKEN, PATCHES):
            of = {p: _both(ours[p], images, minus=theirs[p]) for p in PROBES}
            gains.append({"over": model, **of})
    return shown, gains


def _both(
    seeds: Sequence[NDArray[Any]], images: Images, *, minus: Sequence[NDArray[Any]] = ()
) -> dict[str, Any]:
    """The balanced accuracy, or a difference, with its intervals by image and by patient."""
    found = summary(seeds, images.classes, minus=minus)
    by = summary(seeds, images.classes, minus=minus, groups=images.patients)
    return found | {"by_patient": [by["low"], by["high"]]}


def score_cells(rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows as text: values with their intervals by image, and the spread over seeds."""
    for row in rows:
        cells: dict[str, Any] = {"model": row["model"], "embedding": row["embedding"]}
        for probe in PROBES:
            score = row[probe]
            cells[probe] = f"{score['value']:.2f} ({score['low']:.2f}-{score['high']:.2f})"
            if len(score["seeds"]) > 1:
                cells[probe] += f" ±{np.std(score['seeds'], ddof=1):.2f}"
        cells["seeds"] = row["seeds"]
        for name, key in (("tiles", "tiles"), ("GFLOP", "gflop")):
            cells[name] = f"{row[key]:,.0f}" if key in row else "-"
        cells["s a slide"] = f"{row['seconds']:.2f}" if "seconds" in row else "-"
        yield cells


def gain_cells(gains: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Differences as text: the value, its interval by image, and that by patient."""
    for gain in gains:
        cells = {"over": gain["over"]}
        for probe in PROBES:
            of = gain[probe]
            low, high = of["by_patient"]
            cells[probe] = (
                f"{of['value']:+.2f} ({of['low']:+.2f} to {of['high']:+.2f};"
                f" {low:+.2f} to {high:+.2f})"
            )
        yield cells


def markdown(result: Mapping[str, Any]) -> str:
    """Both tables of a result."""
    scores, gains = list(score_cells(result["scores"])), list(gain_cells(result["gains"]))
    return f"{table(scores)}\n\n{table(gains)}"
