"""What a slide that cannot be done costs: one row, with its reason."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from xmag import files
from xmag.cohort.jobs import Job
from xmag.cohort.report import CohortRow
from xmag.tiles import reason_of
from xmag.urls import readable, without_folder

logger = logging.getLogger(__name__)


def failed_row(job: Job, reason: str, start: float) -> CohortRow:
    """The row of a slide that could not be done; `start` is on the monotonic clock."""
    seconds = time.monotonic() - start
    if isinstance(job.path, Path):
        reason = without_folder(reason, job.path)
    return CohortRow(slide=job.name, status="failed", seconds=seconds, error=readable(reason))


@contextmanager
def costs_a_row(job: Job, start: float, give: Callable[[CohortRow], None]) -> Iterator[None]:
    """Make whatever goes wrong inside the failed row of a slide, give that away, and go on.

    Only what would go wrong with all the others is raised: a disk that is full, or gone.
    """
    try:
        yield
    # Users' encoders and transforms, and libraries at damaged files, raise anything.
    except Exception as error:
        if files.is_of_the_place(error):
            raise
        logger.debug("%s failed", job.name, exc_info=True)
        give(failed_row(job, reason_of(error), start))
