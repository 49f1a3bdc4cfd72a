"""Run of a distillation: `distill`, and `run_config` from a TOML file."""

import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xmag.distill.cache import CachedFeatures, CacheSettings, cache_features
from xmag.distill.dataset import RegionSource, SlideRegions
from xmag.distill.export import Card, export_student
from xmag.distill.regions import Manifest, held_out, plan_images, plan_slides
from xmag.distill.settings import (
    SCHEDULES,
    DataConfig,
    DistillConfig,
    Settings,
    StudentConfig,
    TeacherConfig,
    read_config,
)
from xmag.distill.student import Student, StudentStart, fresh_student, pretrained_student
from xmag.distill.summary import TRAINING, VALIDATION, Needs, RunRecord, Summary, check_tensorboard
from xmag.distill.teachers import OnlineFeatures, Teacher, TeacherFeatures, load_teacher
from xmag.distill.trainer import (
    Checkpoint,
    Session,
    Split,
    StepRecord,
    Stopwatch,
    ValidationSet,
    check_same_run,
    decisive,
    load_checkpoint,
    reading_processes,
    reading_threads,
    restore,
    save_checkpoint,
    validate,
)
from xmag.distill.views import SIDE, teacher_tiles
from xmag.errors import MismatchError, ModelError
from xmag.files import make_folder
from xmag.geometry import TileSpec
from xmag.progress import progress_bar
from xmag.training import Ranks, joined_ranks
from xmag.training.augmentation import Draws

_logger = logging.getLogger(__name__)

AnyTeacher = Teacher | TeacherFeatures
"""Accepted teachers: of weight 1, or with a weight as OnlineFeatures or CachedFeatures."""

CHECKPOINT = "checkpoint.safetensors"
MODEL = "model"


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
    progress: bool | None = None,
) -> Summary:
    """Train a student on teachers' features, and export its EMA; returns a Summary.

    Started by torchrun, the processes share the work; each calls this with the same arguments, its
    teachers on its own device (`xmag.training.joined_ranks` says which). A run that was stopped
    goes on from its last checkpoint in `out`: the same call gives, on a CPU, the same bits.

    Args:
        source: Dataset of regions: `SlideRegions`, or anything with its `read`. Regions that
            raise DamagedSlideError are counted, and never trained on.
        teachers: One, or several, each with heads of its own; OnlineFeatures weights one,
            and CachedFeatures takes cached ones.
        student: From `fresh_student` or `pretrained_student`; its ViT is trained in place.
        out: The folder of the run: metrics.csv, validation.csv, tensorboard/,
            checkpoint.safetensors and model/, which `load_model` reads.
        settings: Training settings; the defaults are those of `Settings`.
        validation: The numbers of the regions to validate on, which are not trained on.
        about: Identity of the data, as JSON values; it goes into the checkpoint and the model.
        card: Name, terms and license for the exported model's card.
        progress: Show a bar on stderr; None does on a terminal and in a notebook.

    Raises:
        InputError: Arguments that make no sense, or do not fit each other.
        ModelError: The loss is no longer finite.
        MismatchError: `out` holds a run with other settings, teachers or data.
        OutputError: Something cannot be written; the last checkpoint is then still whole.
        MissingExtraError: TensorBoard is wanted and not installed.
    """
    settings = settings or Settings()
    if settings.log.tensorboard:
        check_tensorboard()
    folder = Path(out)
    with joined_ranks() as ranks, on_device(ranks.device()):
        session = Session(
            source,
            lessons_of(teachers),
            student,
            split=Split.of(len(source), validation),
            settings=settings,
            ranks=ranks,
            device=ranks.device(),
        )
        decides = decisive(session, student, about or {})
        summary = _Run(session, folder, decides).carried_out(progress=progress)
        model = folder / MODEL
        if ranks.leads:
            average = cast(Student, session.trainer.ema.module)
            results = {
                "steps": summary.steps,
                "damaged_regions": summary.damaged,
                "validation": dict(summary.validation),
                "untrained": dict(summary.untrained),
            }
            export_student(
                model, average.vit, session.config, made_by={**decides, "results": results},
                card=card or Card(),
            )  # fmt: skip
        ranks.wait()
    return replace(summary, model=model)


def lessons_of(teachers: AnyTeacher | Sequence[AnyTeacher]) -> list[TeacherFeatures]:
    """Sources of targets from teachers, of weight 1 where none is given."""
    each = teachers if isinstance(teachers, Sequence) else [teachers]
    return [_lesson_of(teacher) for teacher in each]


def _lesson_of(teacher: AnyTeacher) -> TeacherFeatures:
    return OnlineFeatures(teacher=teacher) if isinstance(teacher, Teacher) else teacher


class _Run:
    """Training loop of a session: resume, log, validate, checkpoint."""

    def __init__(self, session: Session, folder: Path, decides: Mapping[str, Any]) -> None:
        self._session, self._folder, self._decides = session, folder, decides
        self._log = session.settings.log
        self._watch = Stopwatch(session.device)
        self._pending: list[StepRecord] = []
        self._seconds, self._start = 0.0, time.perf_counter()
        self._taken = self._logged = 0
        self._untrained: Mapping[str, float] = {}
        self._validation: Mapping[str, float] = {}
        self._damaged = 0

    def carried_out(self, *, progress: bool | None) -> Summary:
        """Train all steps that are left; returns the Summary of the whole run."""
        session = self._session
        first = self._resumed()
        with ExitStack() as stack:
            record = None
            if session.ranks.leads:
                record = RunRecord(self._folder, step=first, tensorboard=self._log.tensorboard)
                stack.callback(record.close)
            held = session.validation_set() if len(session.split.validation) else None
            if held is not None and not first:
                self._untrained = self._validated(held, record)
            shown = progress if session.ranks.leads else False
            bar = stack.enter_context(
                progress_bar(shown, total=session.total_steps, initial=first, unit="step")
            )
            for step in session.steps(first, session.total_steps, watch=self._watch):
                self._pending.append(step)
                self._taken += 1
                bar.update()
                self._after_step(held, record)
        return self._summary()

    def _after_step(self, held: ValidationSet | None, record: RunRecord | None) -> None:
        """Log, validate and save a checkpoint, each where it is due."""
        due = {
            name: self._taken == self._session.total_steps or (every and self._taken % every == 0)
            for name, every in (
                ("log", self._log.every),
                ("validate", self._log.validate_every),
                ("checkpoint", self._log.checkpoint_every),
            )
        }
        if not any(due.values()):
            return
        self._write_row(record)
        if held is not None and due["validate"]:
            self._validation = self._validated(held, record)
        if due["checkpoint"]:
            if record is not None:
                record.flush()
                self._save()
            # No rank is a checkpoint ahead: one that fails to write ends them all.
            self._session.ranks.wait()

    def _resumed(self) -> int:
        """Restore the last checkpoint, if any; returns the number of steps taken before."""
        session, path = self._session, self._folder / CHECKPOINT
        if not path.exists():
            if session.ranks.leads:
                make_folder(self._folder)
            if session.settings.loss.centre:
                session.find_centres()
            return 0
        checkpoint = load_checkpoint(path)
        check_same_run(path, checkpoint.decisive, self._decides)
        restore(session.trainer, checkpoint)
        session.curriculum.centres = checkpoint.centres
        session.loader.damaged |= checkpoint.damaged
        self._damaged = int(checkpoint.damaged.sum())
        self._seconds = checkpoint.seconds
        self._untrained, self._validation = checkpoint.untrained, checkpoint.validation
        self._taken = self._logged = checkpoint.step
        _logger.info("going on from step %d of %s", checkpoint.step, path)
        return checkpoint.step

    def _write_row(self, record: RunRecord | None) -> None:
        """Log the mean of the steps since the last row; ModelError where it is not finite."""
        steps, self._pending = self._pending, []
        means = torch.stack([step.values for step in steps]).mean(0).tolist()
        values = dict(zip(steps[0].names, means, strict=True))
        if not np.isfinite(means).all():
            raise ModelError(
                f"between steps {self._logged} and {self._taken} the loss or its gradient is no"
                f" longer finite ({values}); expected numbers. Lower train.lr, or set"
                ' train.precision = "float32"; the last checkpoint is from before'
            )
        session = self._session
        self._damaged = int(session.damaged().sum())
        parts = self._watch.seconds()
        now = time.perf_counter()
        passed = now - self._start
        self._seconds, self._start = self._seconds + passed, now
        regions = len(steps) * session.settings.train.batch
        if record is not None:
            record.add(
                TRAINING,
                self._taken,
                {
                    "epoch": self._taken
                    * session.settings.train.batch
                    / len(session.split.training),
                    "rate": steps[-1].rate,
                    **values,
                    "regions_per_second": regions / passed,
                    "waiting_share": parts.get("waiting for regions", 0.0) / passed,
                    "damaged_regions": self._damaged,
                    "seconds": self._seconds,
                },
            )
            if self._taken == session.total_steps:
                record.flush()
        self._logged = self._taken

    def _validated(self, held: ValidationSet, record: RunRecord | None) -> Mapping[str, float]:
        session = self._session
        found = validate(
            session.trainer, held, names=session.names, centres=session.curriculum.centres
        )
        if record is not None:
            record.add(VALIDATION, self._taken, found)
            record.flush()
        return found

    def _save(self) -> None:
        session = self._session
        save_checkpoint(
            self._folder / CHECKPOINT,
            session.trainer,
            Checkpoint(
                step=self._taken,
                decisive=self._decides,
                seconds=self._seconds,
                validation=self._validation,
                untrained=self._untrained,
                centres=session.curriculum.centres,
                damaged=session.loader.damaged,
            ),
        )

    def _summary(self) -> Summary:
        session = self._session
        batch, regions = session.settings.train.batch, len(session.split.training)
        return Summary(
            steps=session.total_steps,
            epochs=session.total_steps * batch / regions,
            regions=regions,
            damaged=self._damaged,
            seconds=self._seconds,
            validation=self._validation,
            untrained=self._untrained,
        )


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """A context with `device` as CUDA's current device; a null context for other types."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


_TIMED_STEPS = 3
_KEPT_REGIONS = 4


def measured_needs(session: Session) -> Needs:
    """Estimate memory and time of a run from a few steps, which train its student a little.

    The first step is not timed: it begins with an empty queue of regions, and on a GPU with work
    that is done once.
    """
    device, trainer = session.device, session.trainer
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    steps = session.steps(0, 1 + _TIMED_STEPS)
    with _kept_for_backward(trainer.student.parameters()) as kept:
        next(steps)
    _synchronise(device)
    start = time.perf_counter()
    for _ in steps:
        pass
    _synchronise(device)
    seconds = (time.perf_counter() - start) / _TIMED_STEPS
    weights = [p.numel() * p.element_size() for p in trainer.student.parameters()]
    student = sum(p.numel() for p in trainer.student.vit.parameters())
    return Needs(
        student_parameters=student,
        head_parameters=sum(p.numel() for p in trainer.student.parameters()) - student,
        state_bytes={
            "weights": sum(weights),
            "gradients": sum(weights),
            "moments": 2 * sum(weights),
            "average": sum(weights),
        },
        activation_bytes=max(kept),
        peak_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        seconds_per_step=seconds,
    )


def seconds_to_keep(source: SlideRegions, teacher: Teacher, *, device: torch.device) -> float:
    """Measured seconds to compute a teacher's features of one region, reading included."""
    rows = list(range(min(_KEPT_REGIONS, len(source))))
    for _ in range(2):  # the first is not timed
        start = time.perf_counter()
        _, regions = source.read_intact(rows)
        teacher.features(teacher_tiles(torch.from_numpy(regions).to(device)))
        _synchronise(device)
    return (time.perf_counter() - start) / len(rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class UnkeptLesson:
    """Placeholder of a feature cache in a dry run: targets are zeros."""

    teacher: Teacher
    weight: float

    @property
    def name(self) -> str:
        """The teacher's name."""
        return self.teacher.name

    @property
    def dim(self) -> int:
        """Length of the teacher's feature vectors."""
        return self.teacher.dim

    @property
    def identity(self) -> Mapping[str, Any]:
        """The teacher's identity, as plain JSON values."""
        return self.teacher.identity

    @property
    def needs_pixels(self) -> bool:
        """False: no pixels are needed, as with a cache."""
        return False

    def available(self, regions: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Mask of the regions that have targets: all, bool (B,)."""
        return np.ones(len(regions), np.bool_)

    def targets(
        self,
        regions: NDArray[np.int64],
        draws: Draws,  # noqa: ARG002
        high: Tensor | None,  # noqa: ARG002
    ) -> Tensor:
        """Zeros in place of targets: float32 (B, 16, dim)."""
        return torch.zeros(len(regions), SIDE**2, self.dim, dtype=torch.float32)

    def check(self, student: TileSpec) -> None:
        """Raise InputError where a tile of the student is not 4 x 4 of the teacher's."""
        OnlineFeatures(teacher=self.teacher).check(student)


@contextmanager
def _kept_for_backward(parameters: Iterator[Tensor]) -> Iterator[list[int]]:
    """A context that measures the peak bytes saved for backward, as a list of one number.

    Each storage counts once, and those of parameters not at all.
    """
    known = {p.untyped_storage().data_ptr() for p in parameters}
    most, held = [0], [0]

    def pack(tensor: Tensor) -> "_Held":
        storage = tensor.untyped_storage()
        where, count = storage.data_ptr(), 0
        if where not in known:
            known.add(where)
            count = storage.nbytes()
        held[0] += count
        most[0] = max(most[0], held[0])
        return _Held(tensor, where, count)

    def unpack(kept: "_Held") -> Tensor:
        held[0] -= kept.count
        if kept.count:
            known.discard(kept.where)
            kept.count = 0
        return kept.tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield most


class _Held:
    """Tensor saved for backward, with its storage and counted bytes."""

    def __init__(self, tensor: Tensor, where: int, count: int) -> None:
        self.tensor, self.where, self.count = tensor, where, count


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


MANIFEST = "manifest.json"
TARGETS = "targets"


def run_config(
    path: str | os.PathLike[str], *, dry_run: bool = False, progress: bool | None = None
) -> Summary:
    """Train a student by distillation from a TOML configuration; returns a Summary.

    The folder `out` gets manifest.json (the sampled regions, used again on resuming), targets/
    (cached features, if any), and the outputs of `distill`. With `dry_run` the regions are sampled
    and a few steps taken to see what memory and time the run needs, and nothing is written. Started
    by torchrun, the processes share the work.

    Raises InputError for a file or values that make no sense, MismatchError where `out` was sampled
    otherwise, and what `plan_slides`, `load_teacher`, `pretrained_student`, `cache_features` and
    `distill` raise.
    """
    config = read_config(path)
    folder = Path(path).absolute().parent
    with joined_ranks() as ranks, on_device(ranks.device()), ExitStack() as stack:
        job = _Job(config, folder, folder / config.out, ranks, progress)
        return job.dry_run(stack) if dry_run else job.run(stack)


@dataclass(frozen=True, slots=True)
class _Job:
    """A run of one configuration: its folders and ranks."""

    config: DistillConfig
    folder: Path
    out: Path
    ranks: Ranks
    progress: bool | None

    def run(self, stack: ExitStack) -> Summary:
        """Sample regions, cache features where configured, train and export."""
        source = self._source(self._manifest(), stack)
        lessons = [self._lesson(teacher, source, stack) for teacher in self.config.teachers]
        validation = _validation(source.manifest, self.config.data)
        about = _about(source.manifest)
        summary = distill(
            source,
            lessons,
            _student(self.config.student),
            self.out,
            settings=self.config.settings,
            validation=validation,
            about=about,
            card=self.config.model,
            progress=self.progress,
        )
        plan = self._plan(source.manifest, lessons, len(validation))
        return replace(summary, data=about, plan=plan)

    def dry_run(self, stack: ExitStack) -> Summary:
        """Sample regions, and estimate memory and time from a few steps; writes nothing."""
        if self.config.log.tensorboard:
            check_tensorboard()
        known = (self.out / MANIFEST).exists()
        source = self._source(self._manifest() if known else self._sampled(), stack)
        lessons, keeping = [], 0.0
        for wanted in self.config.teachers:
            teacher = load_teacher(wanted.name, device=self.ranks.device(), dtype=wanted.dtype)
            lesson: TeacherFeatures = OnlineFeatures(teacher=teacher, weight=wanted.weight)
            if wanted.keep != "no":
                once = seconds_to_keep(source, teacher, device=self.ranks.device())
                keeping += once * len(source) / self.ranks.world
                lesson = UnkeptLesson(teacher=teacher, weight=wanted.weight)
            lessons.append(lesson)
        validation = _validation(source.manifest, self.config.data)
        session = Session(
            source,
            lessons,
            _student(self.config.student),
            split=Split.of(len(source), validation),
            settings=self.config.settings,
            ranks=self.ranks,
            device=self.ranks.device(),
        )
        needs = replace(measured_needs(session), keeping_seconds=keeping)
        regions = len(session.split.training)
        return Summary(
            steps=session.total_steps,
            epochs=session.total_steps * self.config.train.batch / regions,
            regions=regions,
            damaged=int(session.damaged().sum()),
            seconds=keeping + needs.seconds_per_step * session.total_steps,
            data=_about(source.manifest),
            plan=self._plan(source.manifest, lessons, len(validation)),
            needs=needs,
        )

    def _source(self, manifest: Manifest, stack: ExitStack) -> SlideRegions:
        loader, device = self.config.loader, self.ranks.device()
        regions = SlideRegions(
            manifest,
            self._paths()[1],
            threads=reading_threads(loader, device),
            processes=reading_processes(loader, device),
        )
        return stack.enter_context(regions)

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
        shown = self.progress if self.ranks.leads else False
        if data.slides is not None:
            return plan_slides(
                paths,
                regions=data.regions,
                root=root,
                mpp=data.mpp,
                min_tissue=data.min_tissue,
                overlap=data.overlap,
                seed=data.seed,
                skip_refused=data.skip_refused,
                progress=shown,
            )
        assert data.mpp is not None
        assert data.regions is not None
        return plan_images(
            paths,
            mpp=data.mpp,
            regions=data.regions,
            root=root,
            seed=data.seed,
            skip_refused=data.skip_refused,
            progress=shown,
        )

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

    def _lesson(
        self, wanted: TeacherConfig, source: SlideRegions, stack: ExitStack
    ) -> TeacherFeatures:
        device = self.ranks.device()
        teacher = load_teacher(wanted.name, device=device, dtype=wanted.dtype)
        if wanted.keep == "no":
            return OnlineFeatures(teacher=teacher, weight=wanted.weight)
        folder = self.out / TARGETS
        make_folder(folder)
        cache = cache_features(
            folder / teacher.name.replace("/", "--"),
            source,
            source.manifest,
            teacher,
            settings=CacheSettings(low=wanted.keep_low),
            device=device,
            progress=self.progress,
            ranks=self.ranks,
        )
        return CachedFeatures(cache=stack.enter_context(cache), weight=wanted.weight)

    def _plan(
        self, manifest: Manifest, lessons: list[TeacherFeatures], validation: int
    ) -> tuple[str, ...]:
        """Description of the run for the summary, line by line."""
        counts, train = manifest.counts(), self.config.train
        training = len(manifest) - validation
        lines = [
            f"slides    {counts['slides']:,} ({counts['empty']:,} more without a region,"
            f" {counts['refused']:,} refused)"
        ]
        lines += [
            f"          site {site!r}: {found['slides']:,} slides, {found['regions']:,} regions"
            for site, found in counts["sites"].items()
        ]
        lines.append(f"regions   {training:,} to learn from, {validation:,} held out")
        for teacher, lesson in zip(self.config.teachers, lessons, strict=True):
            lines.append(
                f"teacher   {lesson.name}: {lesson.dim}-d, weight {lesson.weight:g},"
                f" {_KEEPING[teacher.keep]}"
            )
        shared = "" if self.ranks.world == 1 else f", shared by {self.ranks.world} processes"
        lines += [
            f"steps     {train.total_steps(training):,} of {train.batch} regions,"
            f" {train.views} views each{shared}",
            f"schedule  {train.schedule}: {SCHEDULES[train.schedule]}",
        ]
        return tuple(lines)


_KEEPING = {
    "no": "looks at every view",
    "plain": "features kept of the regions as they are",
}


def _student(wanted: StudentConfig) -> StudentStart:
    if wanted.weights is not None:
        return pretrained_student(wanted.weights, config=wanted.config)
    assert wanted.config is not None
    return fresh_student(wanted.config, layer_scale=wanted.layer_scale, seed=wanted.seed)


def _validation(manifest: Manifest, data: DataConfig) -> NDArray[np.int64]:
    """Held-out regions: whole slides; of a single slide, every so many of its regions."""
    if not data.hold_out:
        return np.empty(0, np.int64)
    if len(np.unique(manifest.places[:, 0])) > 1:
        return held_out(manifest, fraction=data.hold_out, seed=data.seed)[1]
    return np.arange(0, len(manifest), max(2, round(1 / data.hold_out)))


def _about(manifest: Manifest) -> dict[str, Any]:
    """Identity of the data for checkpoints and the model, as plain JSON values."""
    counts = manifest.counts()
    return {
        "manifest_sha256": manifest.sha256,
        "slides": counts["slides"],
        "regions_per_site": {site: found["regions"] for site, found in counts["sites"].items()},
        "region_spec": manifest.spec.to_dict(),
    }
