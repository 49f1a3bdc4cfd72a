"""Run of a distillation: `distill`, `run_config` from a TOML file, and its dry run."""

import hashlib
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xmag.devices import Float32, seeded
from xmag.distill.cache import CachedFeatures, CacheSettings, cache_features
from xmag.distill.dataset import Numbers, RegionSource, SlideRegions
from xmag.distill.export import Card, export_student
from xmag.distill.regions import Manifest, held_out, plan_images, plan_slides
from xmag.distill.settings import DistillConfig, Settings, StudentConfig, TeacherConfig, read_config
from xmag.distill.student import Student, StudentStart, fresh_student, pretrained_student
from xmag.distill.summary import Estimate, Summary, check_tensorboard
from xmag.distill.teachers import OnlineFeatures, Teacher, TeacherFeatures, load_teacher
from xmag.distill.trainer import Trainer, ViewLoader
from xmag.distill.views import SIDE, teacher_tiles
from xmag.errors import InputError, MismatchError
from xmag.files import make_folder
from xmag.progress import ProgressOption, tell
from xmag.training import Ranks, joined_ranks
from xmag.training.augmentation import Draws
from xmag.urls import base_name

AnyTeacher = Teacher | TeacherFeatures
"""Accepted teachers: models, or features of them, online or cached, with a weight."""

MANIFEST, MODEL, TARGETS = "manifest.json", "model", "targets"


def distill(
    source: RegionSource,
    teachers: AnyTeacher | Sequence[AnyTeacher],
    student: StudentStart,
    out: str | os.PathLike[str],
    *,
    settings: Settings | None = None,
    validation: Sequence[int] | NDArray[np.int64] = (),
    about: Mapping[str, Any] | None = None,
    card: Card | None = None,
    progress: ProgressOption = None,
) -> Summary:
    """Train a student on teachers' features, and export its EMA; returns a Summary.

    Started by torchrun, the processes share the work; each calls this with the same arguments, its
    teachers on its own device (`xmag.training.joined_ranks` says which). A run that was stopped
    goes on from its last checkpoint in `out`: the same call gives, on a CPU, the same bits.

    Args:
        source: Dataset of regions: `SlideRegions`, or anything with its `read`. Regions that
            raise DamagedSlideError are counted, and never trained on.
        teachers: One, or several, each with heads of its own; OnlineFeatures weights one,
            and CachedFeatures takes features from a cache.
        student: From `fresh_student` or `pretrained_student`; its ViT is trained in place.
        out: The folder of the run: metrics.csv, validation.csv, tensorboard/,
            checkpoint.safetensors and model/, which `load_model` reads.
        settings: Training settings; the defaults are those of `Settings`.
        validation: The numbers of the regions to validate on, which are not trained on.
        about: Identity of the data, as JSON values; it goes into the checkpoint and the model.
        card: Name, terms and license for the exported model's card.
        progress: Show a bar on stderr; None does on a terminal and in a notebook. A function is
            called with each `xmag.progress.ProgressEvent` instead.

    Raises:
        InputError: Arguments that make no sense, or do not fit each other.
        ModelError: The loss is no longer finite.
        MismatchError: `out` holds a run with other settings, teachers or data.
        WeightsError: The checkpoint in `out` is damaged, or of another version of xmag.
        OutputError: Something cannot be written; the last checkpoint is then still whole.
        MissingExtraError: TensorBoard is wanted and not installed.
    """
    settings = settings or Settings()
    if settings.log.tensorboard:
        check_tensorboard()
    model = Path(out) / MODEL
    with joined_ranks() as ranks, on_device(ranks.device()):
        training, held = split(len(source), validation)
        data, trainer = prepare(source, teachers, student, training, settings=settings, ranks=ranks)
        identity = {
            "settings": settings.decisive(),
            "total_steps": trainer.total_steps,
            "student": {"config": student.config.to_dict(), **student.provenance},
            "teachers": [{"weight": each.weight, **each.identity} for each in data.teachers],
            "data": {
                **(about or {}),
                "validation_sha256": hashlib.sha256(held.tobytes()).hexdigest(),
                "training_regions": len(training),
                "validation_regions": len(held),
            },
        }
        trainer.train(data, held, Path(out), identity, progress=progress)
        now = trainer.progress
        summary = replace(
            _summary(trainer, data, now.seconds), validation=now.validation, untrained=now.untrained
        )
        if ranks.leads:
            average = cast(Student, trainer.averaged)
            results = {
                "steps": summary.steps,
                "damaged_regions": summary.damaged,
                "validation": now.validation,
                "untrained": now.untrained,
            }
            export_student(
                model,
                average.vit,
                student.config,
                made_by={**identity, "results": results},
                card=card,
            )
        ranks.wait()
    return replace(summary, model=model)


def split(regions: int, validation: Sequence[int] | NDArray[np.int64]) -> tuple[Numbers, Numbers]:
    """Numbers of the regions to train and to validate on; all but those of `validation` train.

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
    return training, held


def prepare(
    source: RegionSource,
    teachers: AnyTeacher | Sequence[AnyTeacher],
    student: StudentStart,
    training: Numbers,
    *,
    settings: Settings,
    ranks: Ranks,
) -> tuple[ViewLoader, Trainer]:
    """The loader of a run's views, and the trainer of its student, on this rank's device."""
    device, loss = ranks.device(), settings.loss
    given = teachers if isinstance(teachers, Sequence) else [teachers]
    features = [_features(teacher) for teacher in given]
    data = ViewLoader(
        source,
        features,
        student.config.tile_spec,
        training=training,
        settings=settings,
        ranks=ranks,
        device=device,
    )
    with seeded(settings.train.seed, torch.device("cpu")), Float32():
        module = Student(
            student.vit,
            student.config,
            teacher_dims=[teacher.dim for teacher in features],
            with_global=loss.global_weight > 0,
            with_local=loss.local_weight > 0,
        )
    trainer = Trainer(
        module,
        teachers={teacher.name: teacher.weight for teacher in features},
        settings=settings,
        total_steps=settings.train.total_steps(len(training)),
        ranks=ranks,
        device=device,
    )
    return data, trainer


def _features(teacher: AnyTeacher) -> TeacherFeatures:
    return OnlineFeatures(teacher=teacher) if isinstance(teacher, Teacher) else teacher


def _summary(trainer: Trainer, data: ViewLoader, seconds: float) -> Summary:
    regions, steps = len(data.training), trainer.total_steps
    return Summary(
        steps=steps,
        epochs=steps * trainer.settings.train.batch / regions,
        regions=regions,
        damaged=data.count_damaged(),
        seconds=seconds,
    )


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """A context with `device` as CUDA's current device; a null context for other types."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def run_config(
    path: str | os.PathLike[str], *, dry_run: bool = False, progress: ProgressOption = None
) -> Summary:
    """Train a student by distillation from a TOML configuration; returns a Summary.

    The folder `out` gets manifest.json (the sampled regions, used again on resuming), targets/
    (cached features, if any), and the outputs of `distill`. With `dry_run` the regions are sampled
    and a few steps taken to estimate the memory and time of the run, and nothing is written.
    Started by torchrun, the processes share the work.

    Raises InputError for a file or values that make no sense, MismatchError where `out` was sampled
    otherwise, and what `plan_slides`, `load_teacher`, `pretrained_student`, `cache_features` and
    `distill` raise.
    """
    config, folder = read_config(path), Path(path).absolute().parent
    with joined_ranks() as ranks, on_device(ranks.device()), ExitStack() as stack:
        run = _ConfiguredRun(config, folder, folder / config.out, ranks, stack, progress)
        return run.estimate() if dry_run else run.train()


@dataclass(frozen=True, slots=True)
class _ConfiguredRun:
    """A run of one configuration; what it opens is closed by `stack`."""

    config: DistillConfig
    folder: Path
    out: Path
    ranks: Ranks
    stack: ExitStack
    progress: ProgressOption

    def train(self) -> Summary:
        """Sample regions, cache features where configured, train and export."""
        source = self._source(self._manifest())
        teachers = [self._teacher(wanted, source) for wanted in self.config.teachers]
        validation, about = self._validation(source.manifest), _about(source.manifest)
        summary = distill(
            source,
            teachers,
            _student(self.config.student),
            self.out,
            settings=self.config.settings,
            validation=validation,
            about=about,
            card=self.config.model,
            progress=self.progress,
        )
        plan = self._plan(source.manifest, teachers, len(validation))
        return replace(summary, data=about, plan=plan)

    def estimate(self) -> Summary:
        """Sample regions, and estimate memory and time from a few steps; writes nothing."""
        if self.config.log.tensorboard:
            check_tensorboard()
        known = (self.out / MANIFEST).exists()
        source = self._source(self._manifest() if known else self._sampled())
        device, teachers, cache_seconds = self.ranks.device(), [], 0.0
        for wanted in self.config.teachers:
            teacher = load_teacher(wanted.name, device=device, dtype=wanted.dtype)
            kind = OnlineFeatures if wanted.keep == "no" else _FeaturesToCache
            teachers.append(kind(teacher=teacher, weight=wanted.weight))
            if wanted.keep != "no":
                each = _seconds_to_cache(source, teacher, device)
                each *= 8 if wanted.keep == "turned" else 1
                cache_seconds += each * len(source) / self.ranks.world
        training, held = split(len(source), self._validation(source.manifest))
        data, trainer = prepare(
            source,
            teachers,
            _student(self.config.student),
            training,
            settings=self.config.settings,
            ranks=self.ranks,
        )
        found = replace(estimate(data, trainer), cache_seconds=cache_seconds)
        return replace(
            _summary(trainer, data, cache_seconds + found.seconds_per_step * trainer.total_steps),
            data=_about(source.manifest),
            plan=self._plan(source.manifest, teachers, len(held)),
            estimate=found,
        )

    def _source(self, manifest: Manifest) -> SlideRegions:
        loader, device = self.config.loader, self.ranks.device()
        regions = SlideRegions(
            manifest,
            self._paths()[1],
            threads=loader.threads_on(device),
            processes=loader.processes_on(device),
        )
        return self.stack.enter_context(regions)

    def _manifest(self) -> Manifest:
        """The manifest in `out`; rank 0 samples one where there is none yet."""
        kept, data = self.out / MANIFEST, self.config.data
        if self.ranks.leads and not kept.exists():
            sampled = self._sampled()
            make_folder(self.out)
            sampled.save(kept)
        self.ranks.wait()
        manifest = Manifest.load(kept)
        asked: dict[str, Any] = {"regions": data.regions, "seed": data.seed}
        if data.slides is not None:
            asked |= {"min_tissue": data.min_tissue, "overlap_px": data.overlap}
        different = [
            f"{key}: {manifest.options.get(key)!r} there, {value!r} here"
            for key, value in asked.items()
            if manifest.options.get(key) != value
        ]
        if different:
            raise MismatchError(
                f"{kept} was sampled otherwise ({'; '.join(different)}); write to another folder,"
                " or delete it to sample again"
            )
        return manifest

    def _sampled(self) -> Manifest:
        data, (paths, root) = self.config.data, self._paths()
        options: dict[str, Any] = {
            "mpp": data.mpp,
            "regions": data.regions,
            "root": root,
            "seed": data.seed,
            "skip_refused": data.skip_refused,
            "progress": self.progress if self.ranks.leads else False,
        }
        if data.slides is None:
            return plan_images(paths, **options)
        return plan_slides(paths, min_tissue=data.min_tissue, overlap=data.overlap, **options)

    def _paths(self) -> tuple[Path | list[Path], Path]:
        """The folder or files to sample, and the root of the manifest's paths."""
        data = self.config.data
        given = data.images if data.slides is None else data.slides
        assert given is not None
        if isinstance(given, str):
            path = self.folder / given
            return path, path if path.is_dir() else path.parent
        paths = [self.folder / each for each in given]
        return paths, Path(os.path.commonpath([path.parent for path in paths]))

    def _teacher(self, wanted: TeacherConfig, source: SlideRegions) -> TeacherFeatures:
        device = self.ranks.device()
        tell(self.progress if self.ranks.leads else False, f"loading {base_name(wanted.name)}")
        teacher = load_teacher(wanted.name, device=device, dtype=wanted.dtype)
        if wanted.keep == "no":
            return OnlineFeatures(teacher=teacher, weight=wanted.weight)
        make_folder(self.out / TARGETS)
        cache = cache_features(
            self.out / TARGETS / teacher.name.replace("/", "--"),
            source,
            source.manifest,
            teacher,
            settings=cache_settings(self.config, wanted),
            device=device,
            progress=self.progress,
            ranks=self.ranks,
        )
        return CachedFeatures(cache=self.stack.enter_context(cache), weight=wanted.weight)

    def _validation(self, manifest: Manifest) -> Numbers:
        """Held-out regions: whole slides; of a single slide, every so many of its regions."""
        data = self.config.data
        if not data.hold_out:
            return np.empty(0, np.int64)
        if len(np.unique(manifest.places[:, 0])) > 1:
            return held_out(manifest, fraction=data.hold_out, seed=data.seed)[1]
        return np.arange(0, len(manifest), max(2, round(1 / data.hold_out)))

    def _plan(
        self, manifest: Manifest, teachers: Sequence[TeacherFeatures], held: int
    ) -> tuple[str, ...]:
        """Description of the run for the summary, line by line."""
        counts, train = manifest.counts(), self.config.train
        training = len(manifest) - held
        quarters = f" and {train.quarters} quarters of each" if train.quarters else ""
        shared = "" if self.ranks.world == 1 else f", shared by {self.ranks.world} processes"
        return (
            f"slides    {counts['slides']:,} ({counts['empty']:,} more without a region,"
            f" {counts['refused']:,} refused)",
            *(
                f"          site {site!r}: {found['slides']:,} slides, {found['regions']:,} regions"
                for site, found in counts["sites"].items()
            ),
            f"regions   {training:,} to learn from, {held:,} held out",
            *(
                f"teacher   {teacher.name}: {teacher.dim}-d, weight {teacher.weight:g}, features"
                f" {'of every view' if teacher.needs_pixels else 'cached'}"
                for teacher in teachers
            ),
            f"steps     {train.total_steps(training):,} of {train.batch} regions,"
            f" {train.views} views each{quarters}{shared}",
            f"rate      {train.lr:g} after a warm-up of {train.warmup:.0%}, then half a cosine down"
            f" to {train.floor * train.lr:g}",
        )


def cache_settings(config: DistillConfig, wanted: TeacherConfig) -> CacheSettings:
    """The settings of the cache that a configuration wants of a teacher."""
    return CacheSettings(
        low=wanted.keep_low, turned=wanted.keep == "turned", resample=config.student.resample
    )


def _student(wanted: StudentConfig) -> StudentStart:
    if wanted.weights is not None:
        return pretrained_student(wanted.weights, config=wanted.config, resample=wanted.resample)
    assert wanted.config is not None
    return fresh_student(
        wanted.config,
        layer_scale=wanted.layer_scale,
        seed=wanted.seed,
        resample=wanted.resample,
    )


def _about(manifest: Manifest) -> dict[str, Any]:
    """Identity of the data for checkpoints and the model, as plain JSON values."""
    counts = manifest.counts()
    return {
        "manifest_sha256": manifest.sha256,
        "slides": counts["slides"],
        "regions_per_site": {site: found["regions"] for site, found in counts["sites"].items()},
        "region_spec": manifest.spec.to_dict(),
    }


_TIMED_STEPS = 3
_CACHED_REGIONS = 4


def estimate(data: ViewLoader, trainer: Trainer) -> Estimate:
    """Estimate memory and time of a run from a few steps, which train its student a little.

    The first step is not timed: it begins with an empty queue of regions, and on a GPU with work
    that is done once.
    """
    device, student = trainer.device, trainer.module
    weights = sum(p.numel() * p.element_size() for p in student.parameters())
    parameters, of_vit = (sum(p.numel() for p in m.parameters()) for m in (student, student.vit))
    times: list[float] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with closing(data.batches(0, 1 + _TIMED_STEPS, trainer.watch)) as batches:
        first = next(batches)
        activations = _activation_bytes(trainer, first.low)
        parts = chain([first], batches)
        for number in range(1 + _TIMED_STEPS):
            trainer.optimize(islice(parts, data.count), number=number, count=data.count)
            if number in (0, _TIMED_STEPS):
                trainer.watch.seconds()  # waits for the device
                times.append(time.perf_counter())
    return Estimate(
        student_parameters=of_vit,
        head_parameters=parameters - of_vit,
        state_bytes={
            "weights": weights,
            "gradients": weights,
            "moments": 2 * weights,
            "average": weights,
        },
        activation_bytes=activations,
        peak_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        seconds_per_step=(times[1] - times[0]) / _TIMED_STEPS,
    )


def _activation_bytes(trainer: Trainer, low: Tensor) -> int:
    """Bytes that the student saves for the backward pass of some images, each storage once."""
    sizes: dict[int, int] = {}

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor), trainer.autocast():
        projections = trainer.module(low)
    for parameter in trainer.module.parameters():
        sizes.pop(parameter.untyped_storage().data_ptr(), None)
    del projections  # until here it kept what is saved, so that no storage was used twice
    return sum(sizes.values())


class _FeaturesToCache(OnlineFeatures):
    """Zeros in the place of features that are to be cached, in a dry run."""

    needs_pixels = False

    def targets(self, regions: Numbers, draws: Draws, high: Tensor | None) -> Tensor:  # noqa: ARG002
        """Zeros in place of features: float32 (B, 16, dim)."""
        return torch.zeros(len(regions), SIDE**2, self.dim, dtype=torch.float32)


def _seconds_to_cache(source: SlideRegions, teacher: Teacher, device: torch.device) -> float:
    """Measured seconds to compute a teacher's features of a region, reading included."""
    rows, start = list(range(min(_CACHED_REGIONS, len(source)))), 0.0
    for _ in range(2):  # the first time is not counted
        start = time.perf_counter()
        _, regions = source.read_intact(rows)
        tiles = teacher_tiles(torch.from_numpy(regions).to(device))
        teacher.features(tiles).cpu()  # on the CPU again, they are done
    return (time.perf_counter() - start) / len(rows)
