"""Trainer of the student: micro-batches of views, optimizer steps, validation and checkpoints."""

import time
from collections import defaultdict
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (the name that every torch reader knows)
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from xmag.devices import resolve_dtype
from xmag.distill.cache import CachedFeatures, LowViews
from xmag.distill.dataset import (
    Numbers,
    RegionBatch,
    RegionLoader,
    RegionSampler,
    RegionSource,
    SlideRegions,
    share,
)
from xmag.distill.losses import Objective
from xmag.distill.settings import Settings
from xmag.distill.student import Student
from xmag.distill.summary import TRAINING, VALIDATION, MetricsLogger
from xmag.distill.teachers import TeacherFeatures, check_teachers
from xmag.distill.views import SIDE, low_view, quarters
from xmag.errors import InputError, ModelError
from xmag.files import make_folder
from xmag.geometry import TileSpec
from xmag.progress import ProgressOption, tell
from xmag.training import Ema, Loop, Progress, Ranks, Schedule
from xmag.training.augmentation import NONE, augment, draw
from xmag.training.checkpoint import tensors_of

CHECKPOINT = "checkpoint.safetensors"
_AT_ONCE = 64
"""Images of a batch in validation."""
_LEAST_DEVIATION = 1e-4
"""Dimensions of a teacher that hardly vary are not blown up further than by this one's inverse."""


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
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Views:
    """Micro-batch: images for the student, and each teacher's targets for them.

    `low` is uint8 (B, S, S, 3), `targets` holds float32 (B, 16, Dt) for each teacher, (B, 4, Dt)
    for quarters of regions. Damaged regions are left out, so that B may be 0.
    """

    low: Tensor
    targets: Sequence[Tensor]

    def quarters(self, corners: Tensor) -> "Views":
        """The quarter of each image that `corners`, int64 (B,), numbers row by row."""
        grids = [target.view(len(target), SIDE, SIDE, target.shape[-1]) for target in self.targets]
        return Views(
            low=quarters(self.low, corners),
            targets=[quarters(grid, corners).flatten(1, 2) for grid in grids],
        )


class ViewLoader:
    """Loader of this rank's micro-batches: augmented views of regions, and teacher targets.

    `training` are the numbers of the regions to train on, `spec` is the student's; a step has
    `count` micro-batches on each rank. Where all features are cached, and the low views too, these
    are read in place of `source`. Raises InputError for teachers that do not fit the student, and a
    batch that the ranks cannot share alike.
    """

    def __init__(
        self,
        source: RegionSource,
        teachers: Sequence[TeacherFeatures],
        spec: TileSpec,
        *,
        training: Numbers,
        settings: Settings,
        ranks: Ranks,
        device: torch.device,
    ) -> None:
        check_teachers(teachers, spec)
        train, loader = settings.train, settings.loader
        if train.batch % ranks.world:
            raise InputError(
                f"train.batch is {train.batch}, which {ranks.world} processes cannot share alike;"
                " expected a multiple"
            )
        self.teachers, self.training, self.device = teachers, training, device
        self._settings, self._ranks = settings, ranks
        self._kernel = spec.resample
        self._needs_pixels = any(teacher.needs_pixels for teacher in teachers)
        caches = [teacher.cache for teacher in teachers if isinstance(teacher, CachedFeatures)]
        lows = [LowViews(cache) for cache in caches if cache.settings.low]
        self._reads_low = bool(lows) and not self._needs_pixels
        micro_batch = train.micro_batch or train.batch // ranks.world
        self._share = share(ranks.rank, ranks.world, batch=train.batch, micro_batch=micro_batch)
        self.count = len(self._share) * (2 if train.quarters else 1)
        slides = source.manifest.places[training, 0] if isinstance(source, SlideRegions) else None
        self.sampler = RegionSampler(training, batch=train.batch, seed=train.seed, sources=slides)
        self._regions = RegionLoader(
            lows[0] if self._reads_low else source,
            side=spec.size_px if self._reads_low else SIDE * spec.size_px,
            threads=loader.threads_on(device),
            ahead=loader.prefetch,
            device=device,
        )

    def batches(self, first: int, last: int, watch: Stopwatch) -> Generator[Views]:
        """Micro-batches of the steps from `first` to `last` (exclusive), read ahead."""
        steps = (self.sampler.step(number) for number in range(first, last))
        wanted = ((regions[s], epochs[s]) for regions, epochs in steps for s in self._share)
        with closing(self._regions.read(wanted)) as batches:
            while True:
                with watch.host("waiting for regions"):
                    batch = next(batches, None)
                if batch is None:
                    return
                batch = self._available(batch)
                yield (views := self._augmented(batch, watch))
                if count := self._settings.train.quarters:
                    # In turn, so that a region shows all four in as many epochs.
                    turn = torch.from_numpy(batch.regions + batch.epochs)
                    turn = turn.repeat(self._settings.train.views)
                    yield _cat([views.quarters((turn + at) % 4) for at in range(count)])

    def plain(self, regions: Numbers) -> Generator[Views]:
        """Views without augmentation of this rank's share of some regions, in batches."""
        mine = regions[self._ranks.rank :: self._ranks.world]
        size = self._share[0].stop - self._share[0].start
        parts = np.split(mine, range(size, len(mine), size))
        with closing(self._regions.read((part, np.zeros_like(part)) for part in parts)) as batches:
            for batch in map(self._available, batches):
                pixels = batch.pixels.to(self.device)
                draws = draw(0, 0, batch.regions, 0, augmentation=NONE)
                yield Views(
                    low=pixels if self._reads_low else low_view(pixels, self._kernel),
                    targets=[
                        teacher.targets(batch.regions, draws, pixels).to(self.device).float()
                        for teacher in self.teachers
                    ],
                )

    @property
    def damaged(self) -> Tensor:
        """Mask of the regions found damaged by this rank: bool (regions,), on the CPU."""
        return torch.from_numpy(self._regions.damaged)

    def count_damaged(self) -> int:
        """The number of regions found damaged by any rank; `damaged` is then the same on all."""
        found = self._ranks.sum(self.damaged.to(torch.int32)) > 0
        return int(self.damaged.copy_(found).sum())

    def _augmented(self, batch: RegionBatch, watch: Stopwatch) -> Views:
        """Augmented views and targets of a batch, view by view: (views * B, ...)."""
        train = self._settings.train
        with watch.part("low view and augment"):
            pixels = batch.pixels.to(self.device, non_blocking=True)
            low = pixels if self._reads_low else low_view(pixels, self._kernel)
        lows: list[Tensor] = []
        targets: list[list[Tensor]] = [[] for _ in self.teachers]
        for view in range(train.views):
            draws = draw(
                train.seed, batch.epochs, batch.regions, view, augmentation=self._settings.augment
            )
            with watch.part("low view and augment"):
                lows.append(augment(low, draws))
                high = augment(pixels, draws) if self._needs_pixels else None
            with watch.part("teacher"):
                for teacher, found in zip(self.teachers, targets, strict=True):
                    features = teacher.targets(batch.regions, draws, high)
                    if self.device.type == "cuda" and not features.is_cuda:
                        features = _pinned(features)
                    found.append(features.to(self.device, non_blocking=True).float())
        return Views(low=torch.cat(lows), targets=[torch.cat(found) for found in targets])

    def _available(self, batch: RegionBatch) -> RegionBatch:
        """The batch of the regions that every teacher has features of."""
        for teacher in self.teachers:
            batch = batch.where(teacher.available(batch.regions))
        return batch


def _pinned(features: Tensor) -> Tensor:
    """A copy in pinned memory, from which a GPU copies while the host goes on."""
    pinned = torch.empty_like(features, pin_memory=True)
    np.copyto(pinned.numpy(), features.numpy())  # PyTorch's copy would wait for all cores
    return pinned


@dataclass(slots=True, kw_only=True)
class DistillProgress(Progress):
    """Progress of a run: with its last validation metrics, and those before the first step."""

    validation: dict[str, float] = field(default_factory=dict)
    untrained: dict[str, float] = field(default_factory=dict)


class Trainer(Loop[int]):
    """Trainer of a student; a batch is the number of a step.

    `teachers` maps names to weights. The gradients of a step are those of the mean over all its
    images, on whichever rank. `centres` are the means to subtract from each teacher's features, and
    `scales` what to multiply them with then.
    """

    kind = "distillation"
    module: Student
    progress: DistillProgress

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
        train = settings.train
        student = student.to(device).train()
        super().__init__(
            student,
            torch.optim.AdamW(
                parameter_groups(student, train.weight_decay),
                lr=train.lr,
                fused=device.type == "cuda",
            ),
            schedule=Schedule(
                total=total_steps, warmup=int(train.warmup * total_steps), floor=train.floor
            ),
            epochs=1,
            checkpoint_steps=settings.log.checkpoint_every,
            ema=Ema(student, decay=train.ema),
            progress=DistillProgress(),
        )
        self.settings, self.total_steps = settings, total_steps
        self.device, self.watch = device, Stopwatch(device)
        self.objective = Objective(settings.loss, teachers)
        self.metrics = ("loss", *self.objective.terms, "gradient_norm")
        self.centres: list[Tensor | None] = [None] * len(teachers)
        self.scales: list[Tensor | None] = [None] * len(teachers)
        self._teachers, self._ranks = list(teachers), ranks
        self._dtype = compute_dtype(train.precision, device)
        self._model: nn.Module = student
        if ranks.world > 1:
            self._model = DistributedDataParallel(
                student,
                device_ids=None if device.type == "cpu" else [device.index],
                broadcast_buffers=False,  # the statistics of the heads are the same everywhere
                gradient_as_bucket_view=True,
            )
        self._pending: list[Tensor] = []
        self._logged = 0.0

    def train(
        self,
        data: ViewLoader,
        held: Numbers,
        folder: Path,
        identity: Mapping[str, Any],
        *,
        progress: ProgressOption,
    ) -> None:
        """Train to the end, from the checkpoint in `folder` if there is one.

        `held` are the regions to validate on, `identity` is that of `xmag.training.Checkpoint`.
        """
        started, path = time.perf_counter(), folder / CHECKPOINT
        self._data, self._path, self._identity = data, path, identity
        if self._ranks.leads:
            make_folder(folder)
        self._ranks.wait()
        shown = progress if self._ranks.leads else False
        tell(shown, "preparing the first regions")
        if not self.resume(path, identity, self._ranks) and self.settings.loss.centre:
            self.find_centres(data)
        now = self.progress
        self._held = _joined(data.plain(held)) if len(held) else None
        board = self.settings.log.tensorboard
        with (
            MetricsLogger(
                folder, step=now.updates, tensorboard=board, writes=self._ranks.leads
            ) as self._logger,
            closing(data.batches(now.updates, self.total_steps, self.watch)) as self._batches,
        ):
            if self._held is not None and not now.updates:
                now.untrained = self._validate(0)
            now.seconds += time.perf_counter() - started
            self._logged = now.seconds
            steps = self.total_steps
            self.run(shown, total=steps, initial=now.updates, desc="distilling", unit="step")

    def steps(self, epoch: int) -> range:  # noqa: ARG002 (there is one: regions have epochs)
        """The numbers of all steps."""
        return range(self.total_steps)

    def step(self, batch: int) -> None:
        """Take an optimizer step; log and validate where it is due."""
        parts = islice(self._batches, self._data.count)
        self._pending.append(self.optimize(parts, number=batch, count=self._data.count))
        self.bar.update()
        log, taken = self.settings.log, batch + 1
        log_due, validation_due, checkpoint_due = (
            taken == self.total_steps or (every > 0 and taken % every == 0)
            for every in (log.every, log.validate_every, log.checkpoint_every)
        )
        if log_due or validation_due or checkpoint_due:
            self._log(taken)
        if validation_due and self._held is not None:
            self.progress.validation = self._validate(taken)

    def optimize(self, parts: Iterable[Views], *, number: int, count: int) -> Tensor:
        """Train step `number` (from 0) on the `count` micro-batches of this rank.

        Returns the values of `metrics`, still on the device.
        """
        train, watch = self.settings.train, self.watch
        # Of all ranks, if none is damaged.
        images = train.batch * train.views * (1 + train.quarters)
        self.schedule.set_rate(self.optimizer, number)
        self.optimizer.zero_grad(set_to_none=True)
        done = torch.zeros(len(self.metrics), dtype=torch.float32, device=self.device)
        for at, views in enumerate(parts, start=1):
            with self._reducing(last=at == count):
                with watch.part("student forward"), self.autocast():
                    projections = self._model(views.low)
                with watch.part("student backward"):
                    loss, terms = self.objective.sums(projections, self._centred(views.targets))
                    # DDP averages over ranks what is summed here.
                    torch.autograd.backward(loss * (self._ranks.world / images))
            done += torch.cat((loss.detach()[None], terms, terms.new_full((1,), len(views.low))))
        with watch.part("optimizer"):
            done = self._ranks.sum(done)
            whole = done[-1].clamp(min=1)
            parameters = list(self.module.parameters())
            gradients = [p.grad for p in parameters if p.grad is not None]
            torch._foreach_mul_(gradients, images / whole)  # by 1 exactly, if none is damaged
            norm = nn.utils.clip_grad_norm_(parameters, train.clip)
            self.optimizer.step()
            assert self.ema is not None
            self.ema.update(self.module, step=number if train.ema_ramp else None)
            return torch.cat((done[:-1] / whole, norm[None]))

    @torch.no_grad()
    def validate(self, held: Views) -> dict[str, float]:
        """Mean cosine similarities of the EMA student to each teacher, over all ranks.

        "cosine/global/NAME" and "cosine/local/NAME" compare as the loss does (with the teacher's
        mean subtracted and in units of its deviation, where that is trained); "centred_cosine/..."
        subtracts, on both sides, the mean over these very regions, so that only what tells them
        apart counts. A student with the same output for every region has a centred cosine of 0.
        """
        student, result = cast(Student, self.averaged), {}
        with self.autocast():
            parts = [student(low.to(self.device)) for low in torch.split(held.low, _AT_ONCE)]
        targets = [target.to(self.device) for target in held.targets]
        for at, (name, target, shifted) in enumerate(
            zip(self._teachers, self._scaled(targets), self._centred(targets), strict=True)
        ):
            for level, of_level in (("global", 0), ("local", 1)):
                found = [part[at][of_level] for part in parts]
                if found[0] is None:
                    continue
                ours = torch.cat(found)
                # Of a region there may be two vectors, and each is compared with its one target.
                two = level == "global" and ours.ndim == 3
                each = ours.unbind(1) if two else [ours.flatten(0, -2)]
                theirs, centred = (
                    x.mean(1) if level == "global" else x.flatten(0, 1) for x in (shifted, target)
                )
                centred = centred - self._mean(centred)
                pairs = {
                    "cosine": [(rows, theirs) for rows in each],
                    "centred_cosine": [(rows - self._mean(rows), centred) for rows in each],
                }
                for kind, of in pairs.items():
                    cosines = torch.stack([F.cosine_similarity(*pair, dim=-1) for pair in of])
                    result[f"{kind}/{level}/{name}"] = float(self._mean(cosines.mean(0)[:, None]))
        return result

    def find_centres(self, data: ViewLoader) -> None:
        """Compute the teachers' mean features over the first regions, the same on all ranks.

        Where the loss standardises, the inverse of their deviation over tiles too.
        """
        count = min(self.settings.loss.centre_regions, len(data.training))
        regions, _ = data.sampler.positions(0, count)
        # In double precision, so that the mean does not depend on how ranks share the regions.
        sums = [
            torch.zeros(1 + 2 * teacher.dim, dtype=torch.float64, device=self.device)
            for teacher in data.teachers
        ]
        for views in data.plain(np.sort(regions)):
            for total, target in zip(sums, views.targets, strict=True):
                total[0] += len(target)
                squares = target.double().square().mean(1).sum(0)
                total[1:] += torch.cat((target.mean(1).double().sum(0), squares))
        totals = [self._ranks.sum(total) for total in sums]
        if not totals[0][0]:
            raise InputError(
                f"all of the {count} regions that the teachers' mean is to be found from are"
                " damaged; expected whole ones. Check the slides, or sample again"
            )
        parts = [(total[1:] / total[0]).chunk(2) for total in totals]
        self.centres = [mean.float() for mean, _ in parts]
        if self.settings.loss.standardise:
            deviations = [(of_squares - mean**2).clamp(min=0).sqrt() for mean, of_squares in parts]
            self.scales = [(1 / d.clamp(min=_LEAST_DEVIATION)).float() for d in deviations]

    def save(self) -> None:
        """Save a checkpoint, if this rank does; what is logged so far is written before."""
        if self._ranks.leads:
            self._logger.flush()
            self.write_checkpoint(self._path, self._identity)
        # No rank is a checkpoint ahead: one that fails to write ends them all.
        self._ranks.wait()

    def state(self) -> dict[str, Tensor]:
        """Tensors of a checkpoint: those of `Loop`, centres and scales, and damaged regions."""
        found = {
            f"{name}.{at}": tensor
            for name, of in (("centre", self.centres), ("scale", self.scales))
            for at, tensor in enumerate(of)
            if tensor is not None
        }
        return super().state() | found | {"data.damaged": self._data.damaged}

    def restore(self, tensors: Mapping[str, Tensor], progress: Mapping[str, Any]) -> None:
        """Go back to the `state` and the `progress` (as JSON values) of a checkpoint."""
        super().restore(tensors, progress)
        self.centres, self.scales = (
            [of[str(at)].to(self.device) if of else None for at in range(len(self.centres))]
            for of in (tensors_of(tensors, "centre"), tensors_of(tensors, "scale"))
        )
        self._data.damaged.logical_or_(tensors["data.damaged"])

    def _log(self, taken: int) -> None:
        """Log the mean of the steps since the last row; ModelError where it is not finite."""
        steps, self._pending = self._pending, []
        values = dict(zip(self.metrics, torch.stack(steps).mean(0).tolist(), strict=True))
        if not np.isfinite(list(values.values())).all():
            raise ModelError(
                f"in the {len(steps)} steps up to step {taken} the loss or its gradient is no"
                f" longer finite ({values}); expected numbers. Lower train.lr, or set"
                ' train.precision = "float32"; the last checkpoint is from before'
            )
        train, parts, seconds = self.settings.train, self.watch.seconds(), self.seconds()
        passed, self._logged = seconds - self._logged, seconds
        row = {
            "epoch": taken * train.batch / len(self._data.training),
            "rate": self.optimizer.param_groups[0]["lr"],
            **values,
            "regions_per_second": len(steps) * train.batch / passed,
            "waiting_share": parts.get("waiting for regions", 0.0) / passed,
            "damaged_regions": self._data.count_damaged(),
            "seconds": seconds,
        }
        self._logger.add(TRAINING, taken, row)

    def _validate(self, taken: int) -> dict[str, float]:
        held = self._held
        assert held is not None
        found = self.validate(held)
        if self.settings.train.quarters:
            # By its place among all that are held out: the same on any number of ranks.
            places = self._ranks.rank + self._ranks.world * torch.arange(len(held.low))
            corners = places % 4
            of_quarters = self.validate(held.quarters(corners))
            found |= {f"quarter/{name}": value for name, value in of_quarters.items()}
        self._logger.add(VALIDATION, taken, found)
        self._logger.flush()
        return found

    def _mean(self, rows: Tensor) -> Tensor:
        """Mean of the rows of all ranks."""
        total = self._ranks.sum(torch.cat((rows.sum(0), rows.new_full((1,), len(rows)))))
        return total[:-1] / total[-1]

    def _centred(self, targets: Sequence[Tensor]) -> list[Tensor]:
        """Targets less the teachers' means, and standardised, where that is trained."""
        found = zip(targets, self.centres, strict=True)
        return self._scaled([t if centre is None else t - centre for t, centre in found])

    def _scaled(self, targets: Sequence[Tensor]) -> list[Tensor]:
        """Targets in units of the teachers' deviations, where that is trained."""
        found = zip(targets, self.scales, strict=True)
        return [t if scale is None else t * scale for t, scale in found]

    def autocast(self) -> AbstractContextManager[Any]:
        """Autocast context of the student's forward pass."""
        if self._dtype == torch.float32:
            return torch.autocast(self.device.type, enabled=False)
        return torch.autocast(self.device.type, dtype=self._dtype)

    def _reducing(self, *, last: bool) -> AbstractContextManager[Any]:
        """Context that synchronises gradients over ranks at the last micro-batch alone."""
        if isinstance(self._model, DistributedDataParallel) and not last:
            return self._model.no_sync()
        return nullcontext()


def parameter_groups(student: Student, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups of AdamW: weight decay for matrices and tables alone, as in DINOv2."""
    named = list(student.named_parameters())
    return [
        {"params": [p for name, p in named if decayed(name, p)], "weight_decay": weight_decay},
        {"params": [p for name, p in named if not decayed(name, p)], "weight_decay": 0.0},
    ]


def decayed(name: str, parameter: Tensor) -> bool:
    """Whether a parameter has weight decay."""
    return parameter.ndim > 1 and not name.endswith("bias")


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Compute dtype of the student; "auto" is bfloat16 on CUDA that has it natively."""
    resolved = resolve_dtype(precision, device)
    return torch.float32 if resolved == torch.float16 else resolved  # it would need loss scaling


def _joined(parts: Iterable[Views]) -> Views:
    """Batches of views as one, in host memory."""
    return _cat(
        [Views(low=v.low.cpu(), targets=[target.cpu() for target in v.targets]) for v in parts]
    )


def _cat(parts: Sequence[Views]) -> Views:
    """Views of one size as one batch."""
    low, *targets = (
        torch.cat(column) for column in zip(*((v.low, *v.targets) for v in parts), strict=True)
    )
    return Views(low=low, targets=targets)
