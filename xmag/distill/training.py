"""`distill`: train a student, resuming from a checkpoint, and export it."""

import logging
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from xmag.distill.checkpoint import (
    Checkpoint,
    check_same_run,
    load_checkpoint,
    restore,
    save_checkpoint,
)
from xmag.distill.export import Card, export_student
from xmag.distill.lessons import Lesson, OnlineLesson
from xmag.distill.record import TRAINING, VALIDATION, RunRecord, check_tensorboard
from xmag.distill.session import Session, Split, decisive
from xmag.distill.settings import Settings
from xmag.distill.sources import RegionSource
from xmag.distill.step import StepRecord
from xmag.distill.stopwatch import Stopwatch
from xmag.distill.student import Student, StudentStart
from xmag.distill.summary import Summary
from xmag.distill.teachers import Teacher, WeightedTeacher
from xmag.distill.validation import ValidationSet, validate
from xmag.errors import ModelError
from xmag.files import make_folder
from xmag.progress import progress_bar
from xmag.training import joined_ranks

_logger = logging.getLogger(__name__)

AnyTeacher = Teacher | WeightedTeacher | Lesson
"""Accepted teachers: online ones, weighted or not, or any source of targets (Lesson)."""

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
        teachers: One, or several, each with heads of its own; WeightedTeacher weights one,
            and a KeptLesson takes cached features.
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


def lessons_of(teachers: AnyTeacher | Sequence[AnyTeacher]) -> list[Lesson]:
    """Sources of targets from teachers, of weight 1 where none is given."""
    each = teachers if isinstance(teachers, Sequence) else [teachers]
    return [_lesson_of(teacher) for teacher in each]


def _lesson_of(teacher: AnyTeacher) -> Lesson:
    if isinstance(teacher, WeightedTeacher):
        return OnlineLesson(teacher=teacher.teacher, weight=teacher.weight)
    return OnlineLesson(teacher=teacher) if isinstance(teacher, Teacher) else teacher


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
