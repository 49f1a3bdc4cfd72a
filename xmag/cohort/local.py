"""The slides of a cohort in this process and its children, without any other machine."""

from collections.abc import Iterator, Sequence

from xmag.cohort.jobs import Job
from xmag.cohort.pipelined import in_processes
from xmag.cohort.report import CohortRow
from xmag.cohort.resume import find_earlier
from xmag.cohort.settings import Settings
from xmag.cohort.single import one_by_one


def rows_here(jobs: Sequence[Job], settings: Settings) -> Iterator[tuple[Job, CohortRow]]:
    """The rows of jobs, each as soon as it is done.

    Raises MismatchError before any work, see `find_earlier`.
    """
    found = {job: find_earlier(job, settings) for job in jobs}
    count = settings.processes_for(len(jobs))
    return (
        in_processes(jobs, found, settings, count) if count else one_by_one(jobs, found, settings)
    )
