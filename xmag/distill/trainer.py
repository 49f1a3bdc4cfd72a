"""Trainer of the student: session, steps, validation and checkpoints.

The weights, their moving average (EMA), the optimizer's moments and the teachers' means as tensors;
the step and what decides the run as JSON in its header. One file, replaced as a whole: a run that
is killed, or a disk that runs full, leaves the one before.
"""

import hashlib
import json
import os
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (the name that every torch reader knows)
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from xmag import records
from xmag.cores import usable_cores
from xmag.devices import Float32, seeded
from xmag.distill.cache import CachedFeatures, LowViews
from xmag.distill.dataset import (
    RegionBatch,
    RegionLoader,
    RegionSampler,
    RegionSource,
    SlideRegions,
    share,
)
from xmag.distill.losses import BLOCKS, global_distances, local_distances, summed
from xmag.distill.settings import LoaderSettings, LossSettings, Settings, rate_factor
from xmag.distill.student import Projection, Student, StudentStart
from xmag.distill.teachers import TeacherFeatures, check_teachers
from xmag.distill.views import SIDE, low_view
from xmag.errors import InputError, MismatchError, OutputError
from xmag.hub.weights import write_tensors
from xmag.training import Ema, Ranks
from xmag.training.augmentation import NONE, Augmentation, augment, draw


class Stopwatch:
    """Timer of named parts of the work on one device; `seconds` sums them up.

    On CUDA a part is what the device did between its events, on the CPU what the host did. A part
    named by `host` is always timed on the host.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._host: defaultdict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A context whose device time counts towards `name`."""
        if self._device.type != "cuda":
            with self.host(name):
                yield
            return
        start, end = _event(), _event()
        start.record()
        yield
        end.record()
        self._events.append((name, start, end))

    @contextmanager
    def host(self, name: str) -> Iterator[None]:
        """A context whose host time counts towards `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._host[name] += time.perf_counter() - start

    def seconds(self) -> dict[str, float]:
        """The seconds of each part so far; synchronises the device, and resets."""
        if self._events:
            torch.cuda.synchronize(self._device)
        for name, start, end in self._events:
            self._host[name] += start.elapsed_time(end) / 1e3
        result = dict(self._host)
        self._host.clear()
        self._events.clear()
        return result


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


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
            for level, part in self._levels.items():
                term = self._level(level, projected, target, views.weights)
                parts.append(weight * part * term)
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


class Curriculum:
    """Builds training batches: augmented views of regions, and each teacher's targets for them.

    `centres` are the means to subtract from the teachers' features, if any. With `reads_low` the
    pixels of a batch are low views already.
    """

    def __init__(
        self,
        lessons: Sequence[TeacherFeatures],
        *,
        augmentation: Augmentation,
        seed: int,
        views: int,
        device: torch.device,
        reads_low: bool = False,
    ) -> None:
        self.lessons = list(lessons)
        self.centres: list[Tensor | None] = [None] * len(self.lessons)
        self._augmentation, self._seed, self._views = augmentation, seed, views
        self._device, self._reads_low = device, reads_low
        self._needs_pixels = any(lesson.needs_pixels for lesson in self.lessons)

    def views(self, batch: RegionBatch, watch: Stopwatch) -> Views:
        """Augmented views and targets of a batch, view by view: (views * B, ...)."""
        batch = self._known(batch)
        regions = batch.regions
        with watch.part("low view and augment"):
            pixels = batch.pixels.to(self._device, non_blocking=True)
            low = pixels if self._reads_low else low_view(pixels)
        lows: list[Tensor] = []
        targets: list[list[Tensor]] = [[] for _ in self.lessons]
        for view in range(self._views):
            draws = draw(self._seed, batch.epochs, regions, view, augmentation=self._augmentation)
            with watch.part("low view and augment"):
                lows.append(augment(low, draws))
                high = augment(pixels, draws) if self._needs_pixels else None
            with watch.part("teacher"):
                for lesson, found in zip(self.lessons, targets, strict=True):
                    said = lesson.targets(regions, draws, high)
                    found.append(said.to(self._device, non_blocking=True).float())
        return Views(
            low=torch.cat(lows),
            targets=[self._centred(torch.cat(found), at) for at, found in enumerate(targets)],
            weights=torch.ones(len(regions) * self._views, device=self._device),
        )

    def plain(self, batch: RegionBatch) -> tuple[Tensor, list[Tensor]]:
        """Unaugmented low views and teacher features of the regions, for validation.

        uint8 (B, S, S, 3), and float32 (B, 16, dim) each, with no mean subtracted.
        """
        batch = self._known(batch)
        regions, pixels = batch.regions, batch.pixels.to(self._device)
        draws = draw(0, 0, regions, 0, augmentation=NONE)
        low = pixels if self._reads_low else low_view(pixels)
        high = pixels if self._needs_pixels else None
        said = [lesson.targets(regions, draws, high) for lesson in self.lessons]
        return low, [features.to(self._device).float() for features in said]

    def _known(self, batch: RegionBatch) -> RegionBatch:
        """The batch of the regions that every teacher has features of."""
        for lesson in self.lessons:
            batch = batch.where(lesson.available(batch.regions))
        return batch

    def _centred(self, target: Tensor, at: int) -> Tensor:
        centre = self.centres[at]
        return target if centre is None else target - centre.to(target.device)


_AT_ONCE = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationSet:
    """Validation set: this rank's share of the held-out regions, in host memory.

    `low` is uint8 (N, S, S, 3), `targets` hold each teacher's features, float32 (N, 16, Dt).
    """

    low: Tensor
    targets: Sequence[Tensor]

    @classmethod
    def of(
        cls, parts: Iterable[tuple[Tensor, Sequence[Tensor]]], *, dims: Sequence[int]
    ) -> "ValidationSet":
        """Concatenate batches; `dims` are the widths of the teachers, for a rank without any."""
        lows: list[Tensor] = []
        targets: list[list[Tensor]] = [
            [torch.empty(0, BLOCKS**2, dim, dtype=torch.float32)] for dim in dims
        ]
        for low, found in parts:
            lows.append(low.cpu())
            for kept, target in zip(targets, found, strict=True):
                kept.append(target.cpu())
        low = torch.cat(lows) if lows else torch.empty(0, dtype=torch.uint8)
        return cls(low=low, targets=[torch.cat(kept) for kept in targets])


def validate(
    trainer: Trainer, held: ValidationSet, *, names: Sequence[str], centres: Sequence[Tensor | None]
) -> dict[str, float]:
    """Mean cosine similarities of the EMA student to each teacher, over all ranks.

    "cosine/global/NAME" and "cosine/local/NAME" compare as the loss does (with the teacher's mean
    subtracted, where that is trained); "centred_cosine/..." subtracts, on both sides, the mean over
    these very regions, so that only what tells them apart counts. A student with the same output
    for every region has a centred cosine of 0.
    """
    result = {}
    projected = _projections(trainer, held)
    for at, name in enumerate(names):
        target, centre = held.targets[at].to(trainer.device), centres[at]
        shift = 0 if centre is None else centre.to(trainer.device)
        levels = {
            "global": (projected[at][0], target.mean(1)),
            "local": (projected[at][1], target),
        }
        for level, (projection, teacher) in levels.items():
            if projection is None:
                continue
            ours, theirs = projection.flatten(0, -2), teacher.flatten(0, -2)
            centred = (ours - _mean(ours), theirs - _mean(theirs))
            result[f"cosine/{level}/{name}"] = _mean_cosine(ours, theirs - shift)
            result[f"centred_cosine/{level}/{name}"] = _mean_cosine(*centred)
    return result


@torch.no_grad()
def _projections(
    trainer: Trainer, held: ValidationSet
) -> list[tuple[Tensor | None, Tensor | None]]:
    """Projections of all regions for each teacher, concatenated: (region, tiles)."""
    student = cast(Student, trainer.ema.module)
    if not len(held.low):  # all of this rank's are damaged; the others wait for its sums
        nothing = [target.to(trainer.device) for target in held.targets]
        return [
            (n[:, 0] if student.global_heads else None, n if student.local_heads else None)
            for n in nothing
        ]
    parts: list[list[tuple[Tensor | None, Tensor | None]]] = []
    for low in torch.split(held.low, _AT_ONCE):
        with trainer.autocast():
            found = student(low.to(trainer.device))
        parts.append([(each.region, each.tiles) for each in found])

    def whole(teacher: int, level: int) -> Tensor | None:
        found = [part[teacher][level] for part in parts]
        return None if found[0] is None else torch.cat([p for p in found if p is not None])

    return [(whole(at, 0), whole(at, 1)) for at in range(len(held.targets))]


def _mean(rows: Tensor) -> Tensor:
    """Mean of the rows of all ranks."""
    total = summed(torch.cat((rows.sum(0), rows.new_tensor([len(rows)]))))
    return total[:-1] / total[-1]


def _mean_cosine(ours: Tensor, theirs: Tensor) -> float:
    return float(_mean(F.cosine_similarity(ours, theirs, dim=-1)[:, None]))


def chunks(rows: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """Consecutive chunks of at most `size` rows."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


_MOST_CORES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Training and validation split: numbers of regions in the source, int64."""

    training: NDArray[np.int64]
    validation: NDArray[np.int64]

    @classmethod
    def of(cls, regions: int, validation: Sequence[int] | NDArray[np.int64]) -> "Split":
        """Split with the given validation regions; all others train.

        Raises InputError for numbers that are no regions, and where none is left to learn from.
        """
        held = np.unique(np.asarray(validation, np.int64))
        if len(held) and not (held[0] >= 0 and held[-1] < regions):
            raise InputError(
                f"validation names regions {held[0]} to {held[-1]}; expected numbers from 0 to"
                f" {regions - 1}"
            )
        training = np.setdiff1d(np.arange(regions), held)
        if not len(training):
            raise InputError(
                f"{len(held)} of {regions} regions are for validation and none is left to learn"
                " from; expected some. Sample more regions, or hold fewer out"
            )
        return cls(training=training, validation=held)


class Session:
    """Training session on one rank: data loader, teachers, student and optimizer."""

    def __init__(
        self,
        source: RegionSource,
        lessons: Sequence[TeacherFeatures],
        student: StudentStart,
        *,
        split: Split,
        settings: Settings,
        ranks: Ranks,
        device: torch.device,
    ) -> None:
        train = settings.train
        check_teachers(lessons, student.config.tile_spec)
        if train.batch % ranks.world:
            raise InputError(
                f"train.batch is {train.batch}, which {ranks.world} processes cannot share alike;"
                " expected a multiple"
            )
        self.split, self.settings, self.ranks, self.device = split, settings, ranks, device
        self.names = [lesson.name for lesson in lessons]
        self.config = student.config
        self.total_steps = train.total_steps(len(split.training))
        self._order = RegionSampler(
            split.training,
            batch=train.batch,
            seed=train.seed,
            sources=_slides_of(source, split.training),
        )
        each = train.batch // ranks.world
        self._share = share(
            ranks.rank, ranks.world, batch=train.batch, micro_batch=train.micro_batch or each
        )
        lows = _kept_low_views(lessons)
        size = student.config.tile_spec.size_px
        self.loader = RegionLoader(
            lows or source,
            side=size if lows else SIDE * size,
            threads=reading_threads(settings.loader, device),
            ahead=settings.loader.prefetch,
            device=device,
        )
        self.curriculum = Curriculum(
            lessons,
            augmentation=settings.augment,
            seed=train.seed,
            views=train.views,
            device=device,
            reads_low=lows is not None,
        )
        self.trainer = self._trainer(student, lessons)

    def _trainer(self, student: StudentStart, lessons: Sequence[TeacherFeatures]) -> Trainer:
        loss, seed = self.settings.loss, self.settings.train.seed
        with seeded(seed, torch.device("cpu")), Float32():
            model = Student(
                student.vit,
                student.config,
                teacher_dims=[lesson.dim for lesson in lessons],
                with_global=loss.global_weight > 0,
                with_local=loss.local_weight > 0,
            )
        return Trainer(
            model,
            teachers={lesson.name: lesson.weight for lesson in lessons},
            settings=self.settings,
            total_steps=self.total_steps,
            ranks=self.ranks,
            device=self.device,
        )

    def steps(
        self, first: int, last: int, *, watch: Stopwatch | None = None
    ) -> Iterator[StepRecord]:
        """Train steps `first` to `last` (exclusive); yields a StepRecord for each."""
        watch = watch or Stopwatch(self.device)
        groups = (group for number in range(first, last) for group in self.groups(number))
        with closing(self.loader.read(groups)) as batches:
            for number in range(first, last):

                def parts() -> Iterator[Any]:
                    for _ in self._share:
                        with watch.host("waiting for regions"):
                            batch = next(batches)
                        yield self.curriculum.views(batch, watch)

                yield self.trainer.step(parts(), number=number, count=len(self._share), watch=watch)

    def groups(self, number: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Micro-batches of this rank at a step, for the loader."""
        regions, epochs = self._order.step(number)
        for part in self._share:
            yield regions[part], epochs[part]

    def validation_set(self) -> ValidationSet:
        """Read this rank's share of the validation regions."""
        dims = [lesson.dim for lesson in self.curriculum.lessons]
        return ValidationSet.of(self._plain(self.split.validation), dims=dims)

    def find_centres(self) -> None:
        """Compute the teachers' mean features over the first regions, the same on all ranks."""
        count = min(self.settings.loss.centre_regions, len(self.split.training))
        regions, _ = self._order.positions(0, count)
        lessons = self.curriculum.lessons
        sums = [torch.zeros(lesson.dim, dtype=torch.float64) for lesson in lessons]
        seen = torch.zeros((), dtype=torch.float64)
        for low, targets in self._plain(np.sort(regions)):
            seen += len(low)
            for total, target in zip(sums, targets, strict=True):
                total.add_(target.mean(1).double().sum(0).cpu())
        # In double precision, so that the mean does not depend on how ranks share the regions.
        count_all = float(summed(seen.to(self.device)))
        if not count_all:
            raise InputError(
                f"all of the {count} regions that the teachers' mean is to be found from are"
                " damaged; expected whole ones. Check the slides, or sample again"
            )
        means = [summed(total.to(self.device)) / count_all for total in sums]
        self.curriculum.centres = [mean.float() for mean in means]

    def damaged(self) -> NDArray[np.bool_]:
        """Mask of the regions found damaged by any rank, bool (regions,); synchronises ranks."""
        found = torch.from_numpy(self.loader.damaged.astype(np.int32)).to(self.device)
        self.loader.damaged |= (summed(found) > 0).cpu().numpy()
        return self.loader.damaged

    def _plain(self, regions: NDArray[np.int64]) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """Unaugmented batches of this rank's share of some regions."""
        mine = regions[self.ranks.rank :: self.ranks.world]
        size = self._share[0].stop - self._share[0].start
        groups = (
            (part, np.zeros_like(part))
            for part in np.split(mine, range(size, len(mine), size))
            if len(part)
        )
        with closing(self.loader.read(groups)) as batches:
            for batch in batches:
                if len(batch.regions):
                    yield self.curriculum.plain(batch)


def decisive(session: Session, student: StudentStart, data: Mapping[str, Any]) -> dict[str, Any]:
    """All inputs that determine the weights of a run, as plain JSON values."""
    split = session.split
    return {
        "settings": session.settings.decisive(),
        "total_steps": session.total_steps,
        "student": {"config": student.config.to_dict(), **student.provenance},
        "teachers": [
            {"weight": lesson.weight, **lesson.identity} for lesson in session.curriculum.lessons
        ],
        "data": {
            **data,
            "validation_sha256": hashlib.sha256(split.validation.tobytes()).hexdigest(),
            "training_regions": len(split.training),
            "validation_regions": len(split.validation),
        },
    }


def _slides_of(source: RegionSource, regions: NDArray[np.int64]) -> NDArray[np.int64] | None:
    """Slide number of each region, int64 (N,); None where the source does not tell."""
    return source.manifest.places[regions, 0] if isinstance(source, SlideRegions) else None


def _kept_low_views(lessons: Sequence[TeacherFeatures]) -> LowViews | None:
    """Cached low views, if all teachers are cached, so that no slide has to be read."""
    if any(lesson.needs_pixels for lesson in lessons):
        return None
    caches = [lesson.cache for lesson in lessons if isinstance(lesson, CachedFeatures)]
    return next((LowViews(cache) for cache in caches if cache.settings.low), None)


def reading_processes(loader: LoaderSettings, device: torch.device) -> int:
    """The number of decoding child processes of this rank."""
    if loader.processes is not None:
        return loader.processes
    return _cores_of_a_rank() if device.type == "cuda" and os.name == "posix" else 0


def reading_threads(loader: LoaderSettings, device: torch.device) -> int:
    """The number of loader threads of this rank: enough to keep all processes busy."""
    return loader.threads or max(_cores_of_a_rank(), reading_processes(loader, device))


def _cores_of_a_rank() -> int:
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(_MOST_CORES, usable_cores() // sharing))


_FORMAT = records.Format(
    name="xmag-distillation",
    version=1,
    writer="a distillation",
    remedy="go on with the xmag that wrote it, or write to another folder",
    error=OutputError,
)
_HEADER = "xmag"
_IN_HEADER = ("step", "decisive", "seconds", "validation", "untrained")
_LISTED = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """Checkpoint to resume a run from; `step` is the number of steps taken.

    `decisive` is all that decides the weights, as plain JSON; `seconds` is the time so far, and
    `validation` and `untrained` are the last and the first validation metrics. `centres` are the
    teachers' mean features, None where not subtracted; `damaged` (bool, regions) marks what could
    not be read. `tensors` are the weights and moments, of a checkpoint that was loaded.
    """

    step: int
    decisive: Mapping[str, Any]
    seconds: float
    validation: Mapping[str, float]
    untrained: Mapping[str, float]
    centres: list[Tensor | None]
    damaged: NDArray[np.bool_]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


def save_checkpoint(path: Path, trainer: Trainer, state: Checkpoint) -> None:
    """Save a checkpoint, atomically.

    Raises OutputError where it cannot be written; what was there before is untouched.
    """
    tensors = dict(_tensors(trainer))
    tensors |= {f"centre.{at}": mean for at, mean in enumerate(state.centres) if mean is not None}
    tensors["damaged"] = torch.from_numpy(state.damaged)
    about = {
        "teachers": len(state.centres),
        **{name: getattr(state, name) for name in _IN_HEADER},
    }
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_tensors(path, ready, metadata={_HEADER: json.dumps(_FORMAT.headed(about))})


def load_checkpoint(path: Path) -> Checkpoint:
    """Load a checkpoint; OutputError where the file is none."""
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {}).get(_HEADER, "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise OutputError(
            f"{path} is no whole checkpoint ({error}); delete it to begin the run anew"
        ) from error
    header = _FORMAT.opened(header, str(path))
    centres = [tensors.pop(f"centre.{at}", None) for at in range(header["teachers"])]
    return Checkpoint(
        **{name: header[name] for name in _IN_HEADER},
        damaged=tensors.pop("damaged").numpy(),
        centres=centres,
        tensors=tensors,
    )


def check_same_run(path: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raise MismatchError, listing the differences, where a checkpoint is of another run."""
    # Through JSON, which has lists and no tuples.
    old, new = dict(_leaves(there)), dict(_leaves(json.loads(json.dumps(here))))
    lines = [
        f"{key}: {old.get(key)!r} there, {new.get(key)!r} here"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
    if lines:
        more = f" and {len(lines) - _LISTED} more" if len(lines) > _LISTED else ""
        raise MismatchError(
            f"{path} is of a run with other settings ({'; '.join(lines[:_LISTED])}{more}). Write to"
            " another folder, delete it to begin anew, or take its settings to go on"
        )


def restore(trainer: Trainer, checkpoint: Checkpoint) -> None:
    """Restore weights, EMA and optimizer state from a checkpoint."""
    parts: dict[str, dict[str, Tensor]] = {"student": {}, "ema": {}, "optimizer": {}}
    for name, tensor in checkpoint.tensors.items():
        part, _, key = name.partition(".")
        parts[part][key] = tensor
    trainer.student.load_state_dict(parts["student"])
    trainer.ema.module.load_state_dict(parts["ema"])
    states: dict[int, dict[str, Tensor]] = {}
    for at, name in enumerate(_optimized(trainer)):
        found = {
            key.removeprefix(f"{name}|"): tensor
            for key, tensor in parts["optimizer"].items()
            if key.startswith(f"{name}|")
        }
        if found:
            states[at] = found
    groups = trainer.optimizer.state_dict()["param_groups"]
    trainer.optimizer.load_state_dict({"state": states, "param_groups": groups})


def _tensors(trainer: Trainer) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in trainer.student.state_dict().items():
        yield f"student.{name}", tensor
    for name, tensor in trainer.ema.module.state_dict().items():
        yield f"ema.{name}", tensor
    states = trainer.optimizer.state_dict()["state"]
    for at, name in enumerate(_optimized(trainer)):
        for key, value in states.get(at, {}).items():
            yield f"optimizer.{name}|{key}", value


def _optimized(trainer: Trainer) -> Iterator[str]:
    """Parameter names in the order of the optimizer's state."""
    names = {parameter: name for name, parameter in trainer.student.named_parameters()}
    for group in trainer.optimizer.param_groups:
        for parameter in group["params"]:
            yield names[parameter]


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list):
        for at, item in enumerate(value):
            yield from _leaves(item, f"{prefix}[{at}]")
    else:
        yield prefix, value
