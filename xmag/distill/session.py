"""Training session on one rank: data loader, teachers, student, trainer; writes nothing."""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xmag.cores import usable_cores
from xmag.devices import Float32, seeded
from xmag.distill.curriculum import Curriculum
from xmag.distill.lessons import KeptLesson, Lesson, check_lessons
from xmag.distill.loader import Group, LowViews, RegionLoader
from xmag.distill.order import Order, share
from xmag.distill.ranks import summed
from xmag.distill.settings import LoaderSettings, Settings
from xmag.distill.sources import RegionSource, SlideRegions
from xmag.distill.step import StepRecord, Trainer
from xmag.distill.stopwatch import Stopwatch
from xmag.distill.student import Student, StudentStart
from xmag.distill.validation import ValidationSet
from xmag.distill.views import SIDE
from xmag.errors import InputError
from xmag.training import Ranks

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
        lessons: Sequence[Lesson],
        student: StudentStart,
        *,
        split: Split,
        settings: Settings,
        ranks: Ranks,
        device: torch.device,
    ) -> None:
        train = settings.train
        check_lessons(lessons, student.config.tile_spec)
        if train.batch % ranks.world:
            raise InputError(
                f"train.batch is {train.batch}, which {ranks.world} processes cannot share alike;"
                " expected a multiple"
            )
        self.split, self.settings, self.ranks, self.device = split, settings, ranks, device
        self.names = [lesson.name for lesson in lessons]
        self.config = student.config
        self.total_steps = train.total_steps(len(split.training))
        self._order = Order(
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

    def _trainer(self, student: StudentStart, lessons: Sequence[Lesson]) -> Trainer:
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

    def groups(self, number: int) -> Iterator[Group]:
        """Micro-batches of this rank at a step, for the loader."""
        regions, epochs = self._order.step(number)
        for part in self._share:
            yield Group(regions=regions[part], epochs=epochs[part])

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
            Group(regions=part, epochs=np.zeros_like(part))
            for part in np.split(mine, range(size, len(mine), size))
            if len(part)
        )
        with closing(self.loader.read(groups)) as batches:
            for batch in batches:
                if batch.good.any():
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


def _kept_low_views(lessons: Sequence[Lesson]) -> LowViews | None:
    """Cached low views, if all teachers are cached, so that no slide has to be read."""
    if any(lesson.sees_pixels for lesson in lessons):
        return None
    kept = [lesson.kept for lesson in lessons if isinstance(lesson, KeptLesson)]
    return next((LowViews(targets) for targets in kept if targets.has_low), None)


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
