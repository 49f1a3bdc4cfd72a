"""Sharing of a cohort's slides between runs over one folder: claims, waits and earlier bags."""

import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from xmag import files
from xmag.cohort.jobs import Job
from xmag.cohort.locks import Claims, Unclaimed
from xmag.cohort.pictures import refuse_foreign_picture
from xmag.cohort.resume import Found, Seen, find_earlier
from xmag.cohort.settings import Settings
from xmag.errors import MismatchError, OutputError
from xmag.provenance import Provenance

logger = logging.getLogger(__name__)

_LOOK_AGAIN_S = 0.5
"""Seconds between looks whether another run is through with a slide."""


class Share:
    """Jobs of a cohort that this run takes, as other runs over the folder leave them.

    Two runs over one folder each take what the other has not taken. What is left in the end is
    waited for: it is done by the other run, or by this one if the other ends without.
    """

    def __init__(self, jobs: Sequence[Job], settings: Settings) -> None:
        """Look for earlier bags; raises MismatchError before any work, see `find_earlier`."""
        self._jobs, self._settings = jobs, settings
        self._expected = Provenance(fingerprint=settings.fingerprint, record={})
        self._found: dict[Job, Found | None] = {}
        out = settings.out
        self.seen = Seen(out)
        self._claims = Claims(out) if isinstance(out, Path) else Unclaimed()
        self._refused: dict[Job, OutputError] = {}
        for job in jobs:
            self._found[job] = self._looked_at(job)

    def __enter__(self) -> Self:
        self._claims.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.seen.write()
        self._claims.__exit__(kind, error, trace)

    def rounds(self) -> Iterator[Iterator[Job]]:
        """Rounds of the jobs to do now, until none is left. Exhaust each before the next.

        Have all that was taken done and released before asking for the next round: the other run
        may be waiting for it.
        """
        waiting = list(self._jobs)
        while waiting:
            postponed: list[Job] = []
            yield self._takeable(waiting, postponed)
            if len(postponed) == len(waiting):
                time.sleep(_LOOK_AGAIN_S)
            elif postponed:
                logger.info("waiting for %d slides that another run is at", len(postponed))
            waiting = postponed

    def check_folder(self) -> None:
        """Raise OutputError where the output folder has gone away since the cohort began."""
        self._claims.check_folder()

    def release(self, job: Job) -> None:
        """Drop the claim on a job that has its row."""
        self._claims.release(job)

    def earlier(self, job: Job) -> Found | None:
        """The valid bag that is there already for a job taken, another run's among them.

        Raises MismatchError if it was made with something else and that is not to be redone, and
        OutputError where the folder of this one output takes no files.
        """
        if job in self._refused:
            raise self._refused[job]
        found = self._found[job]
        if found is None:
            found = self._found[job] = find_earlier(job, self._settings, self._expected)
        if found is None:
            self._check_room(job)
        return found

    def _check_room(self, job: Job) -> None:
        """Raise OutputError where what is to be written for a job would replace another's file."""
        out = self._settings.out
        if isinstance(out, Path):
            files.linked_to(out / job.output, out)
        if self._settings.overlay:
            refuse_foreign_picture(job, self._settings)

    def _looked_at(self, job: Job) -> Found | None:
        """Earlier bag of a job, before any work; one that cannot be read costs its own row."""
        try:
            return find_earlier(job, self._settings, self._expected)
        except MismatchError:
            raise
        except OutputError as error:
            self._refused[job] = error
            return None

    def _takeable(self, jobs: Sequence[Job], postponed: list[Job]) -> Iterator[Job]:
        for job in jobs:
            try:
                if self._writes_nothing(job):
                    self._claims.tidy(job)
                    is_ours = True
                else:
                    is_ours = self._claims.take(job)
            except OSError as error:
                told = files.cannot_write(self._settings.out / job.output, error)
                if files.is_of_the_place(told):
                    raise told from error
                self._refused[job], is_ours = told, True
            if is_ours:
                yield job
            else:
                postponed.append(job)

    def _writes_nothing(self, job: Job) -> bool:
        settings = self._settings
        may_write = settings.overlay or settings.on_mismatch == "redo"
        return self._found[job] is not None and not may_write
