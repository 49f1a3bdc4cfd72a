"""The slides of a cohort in this process and its children."""

from collections.abc import Generator, Sequence

from xmag.cohort.jobs import Job
from xmag.cohort.pipelined import in_processes
from xmag.cohort.report import CohortRow
from xmag.cohort.resume import find_earlier
from xmag.cohort.settings import Settings
from xmag.cohort.single import one_by_one


def rows_here(
    jobs: Sequence[Job], settings: Settings
) -> Generator[tuple[Job, CohortRow], None, None]:
    """The rows of jobs, each as soon as it is done.

    Raises MismatchError before any work, see `find_earlier`.
    """
    found = {job: find_earlier(job, settings) for job in jobs}
    count = settings.processes_for(len(jobs))
    if count:
        yield from in_processes(jobs, found, settings, count)
    else:
        yield from one_by_one(jobs, found, settings)
