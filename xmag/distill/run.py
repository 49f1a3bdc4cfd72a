"""Run a distillation from its TOML configuration: `xmag distill CONFIG.toml`."""

import os
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xmag.distill.config import DataConfig, DistillConfig, StudentConfig, TeacherConfig, read_config
from xmag.distill.keeping import keep_targets
from xmag.distill.lessons import KeptLesson, Lesson, OnlineLesson
from xmag.distill.manifest import Manifest, held_out
from xmag.distill.needs import UnkeptLesson, measured_needs, seconds_to_keep
from xmag.distill.record import check_tensorboard
from xmag.distill.sampling import plan_images, plan_slides
from xmag.distill.schedule import SCHEDULES
from xmag.distill.session import Session, Split, reading_processes, reading_threads
from xmag.distill.sources import SlideRegions
from xmag.distill.student import StudentStart, fresh_student, pretrained_student
from xmag.distill.summary import Summary
from xmag.distill.targets import TargetSettings
from xmag.distill.teachers import load_teacher
from xmag.distill.training import distill, on_device
from xmag.errors import MismatchError
from xmag.files import make_folder
from xmag.training import Ranks, joined_ranks

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
    otherwise, and what `plan_slides`, `load_teacher`, `pretrained_student`, `keep_targets` and
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
            lesson: Lesson = OnlineLesson(teacher=teacher, weight=wanted.weight)
            if wanted.keep != "no":
                count = wanted.variants if wanted.keep == "augmented" else 1
                once = seconds_to_keep(source, teacher, device=self.ranks.device(), variants=count)
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

    def _lesson(self, wanted: TeacherConfig, source: SlideRegions, stack: ExitStack) -> Lesson:
        device = self.ranks.device()
        teacher = load_teacher(wanted.name, device=device, dtype=wanted.dtype)
        if wanted.keep == "no":
            return OnlineLesson(teacher=teacher, weight=wanted.weight)
        folder = self.out / TARGETS
        make_folder(folder)
        kept = keep_targets(
            folder / teacher.name.replace("/", "--"),
            source,
            source.manifest,
            teacher,
            settings=TargetSettings(
                variants=wanted.variants if wanted.keep == "augmented" else None,
                augmentation=self.config.augment,
                seed=self.config.train.seed,
                low=wanted.keep_low,
            ),
            device=device,
            progress=self.progress,
            ranks=self.ranks,
        )
        return KeptLesson(kept=stack.enter_context(kept), weight=wanted.weight)

    def _plan(self, manifest: Manifest, lessons: list[Lesson], validation: int) -> tuple[str, ...]:
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
                f" {_KEEPING[teacher.keep].format(teacher.variants)}"
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
    "augmented": "features kept of {} augmented variants",
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
