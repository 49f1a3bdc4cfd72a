"""One student of the miniature: trained on the kept regions of some patients, then embedded."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (the name that every torch reader knows)
from miniature_data import AUGMENTATION, kept
from miniature_scores import hits
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from xmag.distill.settings import LossSettings, Settings, TrainSettings
from xmag.distill.student import Student, fresh_student
from xmag.distill.trainer import Trainer, Views
from xmag.distill.views import SIDE
from xmag.training import Ranks
from xmag.training.augmentation import augment, draw, map_tokens

LEVELS = {"global + local": (1.0, 0.5), "global only": (1.0, 0.0), "local only": (0.0, 0.5)}
"""The weights of the two levels of the loss in each variant."""
_LOOK_EVERY = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How students are trained; fixed before any of them was scored."""

    steps: int = 400
    batch: int = 48
    lr: float = 1e-3
    ema: float = 0.998
    warmup: float = 0.1

    def settings(self, levels: str, *, steps: int, seed: int) -> Settings:
        """The settings of xmag.distill for these levels of the loss."""
        region, tiles = LEVELS[levels]
        return Settings(
            loss=LossSettings(global_weight=region, local_weight=tiles, centre=True),
            train=TrainSettings(
                steps=steps,
                batch=self.batch,
                views=1,
                lr=self.lr,
                ema=self.ema,
                warmup=self.warmup,
                seed=seed,
            ),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A student to train: which levels, which kept features, who stays out."""

    name: str
    levels: str
    kind: str
    left_out: str
    seed: int
    steps: int


class Regions:
    """The kept regions of the training patients, on the device that trains."""

    def __init__(self, out: Path, kind: str, rows: NDArray[np.int64], device: torch.device) -> None:
        lanczos, box, target = (kept(out, kind, name) for name in ("lanczos", "box", "target"))
        self.lanczos, self.box, self.target = (
            torch.from_numpy(array[rows]).to(device) for array in (lanczos, box, target)
        )
        self.plain = kind == "plain"
        self.mean = self.target.float().mean((0, 1))

    def views(self, drawn: Tensor, step: int, seed: int) -> Views:
        """The views of a batch; plain regions are changed now, and their features moved along."""
        device = self.target.device
        rows = drawn.to(device)
        target = self.target[rows].float() - self.mean
        # The student is also given what fast decoding makes: any mixture of the two kernels.
        rng = torch.Generator().manual_seed(seed * 1_000_003 + step)
        share = torch.rand(len(drawn), 1, 1, 1, generator=rng).to(device)
        low = torch.lerp(self.lanczos[rows].float(), self.box[rows].float(), share)
        low = low.round_().clamp_(0, 255).byte()
        if self.plain:
            draws = draw(seed, step, range(len(drawn)), 0, augmentation=AUGMENTATION)
            low = augment(low, draws)
            target = map_tokens(target.unflatten(1, (SIDE, SIDE)), draws).flatten(1, 2)
        return Views(low=low, targets=[target])


def order(count: int, batch: int, steps: int, seed: int) -> Tensor:
    """Rows of each step (steps, batch): epochs, each a permutation, one after the other."""
    rng = torch.Generator().manual_seed(seed)
    epochs = -(-steps * batch // count)
    rows = torch.cat([torch.randperm(count, generator=rng) for _ in range(epochs)])
    return rows[: steps * batch].view(steps, batch)


def train(
    regions: Regions, recipe: Recipe, task: Task, *, deadline: float, device: torch.device
) -> Student | None:
    """The average student after `task.steps`, or None where the deadline came first."""
    region, tiles = LEVELS[task.levels]
    start = fresh_student("xmag_mini", seed=task.seed)
    student = Student(
        start.vit,
        start.config,
        teacher_dims=[regions.target.shape[-1]],
        with_global=region > 0,
        with_local=tiles > 0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(task.seed)  # the heads draw their weights when they are made
        for heads in (student.global_heads, student.local_heads):
            for module in heads.modules():
                if isinstance(module, torch.nn.Linear):
                    module.reset_parameters()
    trainer = Trainer(
        student,
        teachers={"teacher": 1.0},
        settings=recipe.settings(task.levels, steps=task.steps, seed=task.seed),
        total_steps=task.steps,
        ranks=Ranks(),
        device=device,
    )
    for step, rows in enumerate(order(len(regions.target), recipe.batch, task.steps, task.seed)):
        if step % _LOOK_EVERY == 0 and time.time() > deadline:
            return None
        trainer.optimize([regions.views(rows, step, task.seed)], number=step, count=1)
    average = trainer.ema.module
    assert isinstance(average, Student)
    return average.eval()


@torch.inference_mode()
def embedded(student: Student, low: Tensor) -> tuple[Tensor, Tensor]:
    """The class token and the mean of the patch tokens of uint8 images: float32 (B, D) each."""
    images = low.permute(0, 3, 1, 2) * student.scale + student.shift
    side = low.shape[1] // 14
    tokens = torch.cat(
        [student.vit(part, student.vit.positions((side, side))) for part in images.split(64)]
    )
    return tokens[:, 0], tokens[:, 1:].mean(1)


def image_embeddings(student: Student, out: Path) -> dict[str, NDArray[np.float32]]:
    """(N, D) embeddings of images: the mean over the fixed crops of each."""
    low = torch.from_numpy(np.array(kept(out, "evaluation", "lanczos"))).to(student.scale.device)
    found = embedded(student, low.flatten(0, 1))
    names = ("class token", "mean of patch tokens")
    return {
        name: tokens.unflatten(0, low.shape[:2]).mean(1).cpu().numpy()
        for name, tokens in zip(names, found, strict=True)
    }


@torch.inference_mode()
def cosines(
    student: Student, out: Path, mean: Tensor, held_out: NDArray[np.bool_]
) -> dict[str, float]:
    """The cosines to the teacher's features, less the training mean, of the left-out patient."""
    device = student.scale.device
    low, target = (
        torch.from_numpy(kept(out, "evaluation", name)[held_out]).to(device).flatten(0, 1)
        for name in ("lanczos", "target")
    )
    wanted, found = target - mean.to(device), student(low)[0]
    result = {}
    if found.region is not None:
        result["global"] = F.cosine_similarity(found.region, wanted.mean(1), dim=-1).mean().item()
    if found.tiles is not None:
        result["local"] = F.cosine_similarity(found.tiles, wanted, dim=-1).mean().item()
    return result


def run(
    out: Path,
    task: Task,
    recipe: Recipe,
    classes: NDArray[np.str_],
    patients: NDArray[np.str_],
    *,
    deadline: float,
) -> dict[str, Any] | None:
    """Train and score one student: a line of JSON, or None where the time did not suffice."""
    start = time.time()
    device = Ranks().device()
    held_out = patients == task.left_out
    count = len(kept(out, task.kind, "target"))
    rows = np.flatnonzero(~held_out[np.arange(count) % len(patients)])
    regions = Regions(out, task.kind, rows, device)
    student = train(regions, recipe, task, deadline=deadline, device=device)
    if student is None:
        return None
    result: dict[str, Any] = {
        "task": task.name,
        "levels": task.levels,
        "kind": task.kind,
        "left_out": task.left_out,
        "seed": task.seed,
        "steps": task.steps,
        "regions": len(rows),
    }
    if task.name == "mini":
        # Scored as it is shipped.
        state = {key: t.half().cpu().contiguous() for key, t in student.vit.state_dict().items()}
        save_file(state, out / "mini.safetensors", metadata={"format": "pt"})
        student.vit.load_state_dict(state)
    result["cosine"] = cosines(student, out, regions.mean, held_out)
    result["hits"] = {
        name: {probe: hit.tolist() for probe, hit in hits(x, classes, held_out).items()}
        for name, x in image_embeddings(student, out).items()
    }
    result["seconds"] = time.time() - start
    return result
