"""Trainer of the student: loss, distributed gradients, optimizer and EMA, step by step."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from xmag.distill.losses import global_distances, local_distances
from xmag.distill.ranks import summed
from xmag.distill.schedule import rate_factor
from xmag.distill.settings import LossSettings, Settings
from xmag.distill.stopwatch import Stopwatch
from xmag.distill.student import Projection, Student
from xmag.training import Ema, Ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class Views:
    """Micro-batch: augmented images for the student, and each teacher's targets.

    `low` is uint8 (B, S, S, 3), `targets` holds float32 (B, 16, Dt) for each teacher, and `weights`
    (B,) is 1 for an image and 0 for one whose region is damaged.
    """

    low: Tensor
    targets: Sequence[Tensor]
    weights: Tensor


class Objective:
    """Distillation loss of several teachers: weighted global and local distances.

    `teachers` maps names to weights, in the order of the targets.
    """

    def __init__(self, settings: LossSettings, teachers: Mapping[str, float]) -> None:
        self._settings, self._teachers = settings, dict(teachers)
        levels = {"global": settings.global_weight, "local": settings.local_weight}
        self._levels = {level: weight for level, weight in levels.items() if weight}
        self._distances = {name: w for name, w in settings.distances().items() if w}
        self.terms = [f"{level}/{name}" for name in self._teachers for level in self._levels]
        """Names of the loss terms that `sums` returns besides the total."""

    def sums(self, projections: Sequence[Projection], views: Views) -> tuple[Tensor, Tensor]:
        """Total loss summed over images, a scalar, and its terms by level and teacher, detached.

        Sums, and not means: parts of a batch, on one rank or several, add up to the whole.
        """
        parts, terms = [], []
        for weight, projected, target in zip(
            self._teachers.values(), projections, views.targets, strict=True
        ):
            for level, share in self._levels.items():
                term = self._level(level, projected, target, views.weights)
                parts.append(weight * share * term)
                terms.append(term.detach())
        return torch.stack(parts).sum(), torch.stack(terms)

    def _level(self, level: str, projected: Projection, target: Tensor, weights: Tensor) -> Tensor:
        total = weights.new_zeros(())
        for distance, factor in self._distances.items():
            if level == "global":
                assert projected.region is not None
                far = global_distances(projected.region, target, distance, weights)
            else:
                assert projected.tiles is not None
                far = local_distances(projected.tiles, target, distance)
            total = total + factor * (far * weights).sum()
        return total


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """Metrics of a step; `values` are still on the device, in the order of `names`."""

    names: Sequence[str]
    values: Tensor
    rate: float


class Trainer:
    """Trainer: the student, its EMA and its optimizer; `step` updates all three.

    The gradients are those of the mean over all images of the step that are not damaged, on
    whichever rank.
    """

    def __init__(
        self,
        student: Student,
        *,
        teachers: Mapping[str, float],
        settings: Settings,
        total_steps: int,
        ranks: Ranks,
        device: torch.device,
    ) -> None:
        self.settings, self.total_steps = settings, total_steps
        self.ranks, self.device = ranks, device
        self.student = student.to(device).train()
        self.objective = Objective(settings.loss, teachers)
        self.ema = Ema(self.student, decay=settings.train.ema)
        self.optimizer = _optimizer(self.student, settings, device)
        self.dtype = compute_dtype(settings.train.precision, device)
        self._model: nn.Module = self.student
        if ranks.world > 1:
            self._model = DistributedDataParallel(
                self.student,
                device_ids=None if device.type == "cpu" else [device.index],
                broadcast_buffers=False,  # the statistics of the heads are the same everywhere
                gradient_as_bucket_view=True,
            )

    def step(
        self, parts: Iterable[Views], *, number: int, count: int, watch: Stopwatch | None = None
    ) -> StepRecord:
        """Train step `number` (from 0) on the `count` micro-batches of this rank."""
        train, watch = self.settings.train, watch or Stopwatch(self.device)
        images = train.batch * train.views  # of all ranks
        self.optimizer.zero_grad(set_to_none=True)
        done = torch.zeros(len(self.objective.terms) + 2, dtype=torch.float32, device=self.device)
        for at, views in enumerate(parts, start=1):
            with self._reducing(last=at == count):
                with watch.part("student forward"), self.autocast():
                    projections = self._model(views.low, views.weights)
                with watch.part("student backward"):
                    loss, terms = self.objective.sums(projections, views)
                    # DDP averages over ranks what is summed here.
                    torch.autograd.backward(loss * (self.ranks.world / images))
            done += torch.cat((loss.detach()[None], terms, views.weights.sum()[None]))
        with watch.part("optimizer"):
            done = summed(done)
            good = done[-1].clamp(min=1)
            norm = self._update(number, images / good)
            means = torch.cat((done[:-1] / good, norm[None]))
        rate = train.lr * self.rate_factor(number)
        names = ("loss", *self.objective.terms, "gradient_norm")
        return StepRecord(names=names, values=means, rate=rate)

    def rate_factor(self, number: int) -> float:
        """The learning-rate factor at a step."""
        train = self.settings.train
        return rate_factor(
            train.schedule,
            number,
            total=self.total_steps,
            warmup=int(train.warmup * self.total_steps),
            floor=train.floor,
        )

    def autocast(self) -> AbstractContextManager[Any]:
        """Autocast context of the student's forward pass."""
        if self.dtype == torch.float32:
            return torch.autocast(self.device.type, enabled=False)
        return torch.autocast(self.device.type, dtype=self.dtype)

    def _update(self, number: int, scale: Tensor) -> Tensor:
        """Scale and clip gradients, update student and EMA; returns the norm before clipping."""
        parameters = list(self.student.parameters())
        gradients = [p.grad for p in parameters if p.grad is not None]
        torch._foreach_mul_(gradients, scale)  # by 1 exactly, unless regions were damaged
        norm = nn.utils.clip_grad_norm_(parameters, self.settings.train.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.train.lr * self.rate_factor(number)
        self.optimizer.step()
        decay = self.settings.train.ema
        if self.settings.train.ema_ramp:
            decay = min(decay, (1 + number) / (10 + number))
        self.ema.decay = decay
        self.ema.update(self.student)
        return norm

    def _reducing(self, *, last: bool) -> AbstractContextManager[Any]:
        """Context that synchronises gradients over ranks at the last micro-batch alone."""
        if isinstance(self._model, DistributedDataParallel) and not last:
            return self._model.no_sync()
        return nullcontext()


def decayed(name: str, parameter: Tensor) -> bool:
    """Whether a parameter has weight decay: matrices and tables, as in DINOv2."""
    return parameter.ndim > 1 and not name.endswith("bias")


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Compute dtype of the student; "auto" is bfloat16 on CUDA that has it natively."""
    if precision != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]
    native = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if native else torch.float32


def _optimizer(student: Student, settings: Settings, device: torch.device) -> torch.optim.Optimizer:
    named = list(student.named_parameters())
    groups = [
        {
            "params": [p for name, p in named if decayed(name, p) is with_decay],
            "weight_decay": settings.train.weight_decay if with_decay else 0.0,
        }
        for with_decay in (True, False)
    ]
    return torch.optim.AdamW(groups, lr=settings.train.lr, fused=device.type == "cuda")
