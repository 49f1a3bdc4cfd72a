"""The slides of a cohort in this process and its children."""

from collections.abc import Generator, Sequence
from contextlib import closing

from xmag.cohort.jobs import Job
from xmag.cohort.loop import in_processes
from xmag.cohort.report import CohortRow
from xmag.cohort.settings import Settings
from xmag.cohort.sharing import Share
from xmag.cohort.single import one_by_one


def rows_here(
    jobs: Sequence[Job], settings: Settings
) -> Generator[tuple[Job, CohortRow], None, None]:
    """The rows of jobs, each as soon as it is done.

    Raises MismatchError before any work, see `find_earlier`; OutputError where nothing more can be
    written.
    """
    with Share(jobs, settings) as share:
        count = settings.processes_for(len(jobs))
        done = in_processes(share, settings, count) if count else one_by_one(share, settings)
        # However the caller stops: the processes end with this call, and not with its last trace.
        with closing(done):
            for job, row in done:
                share.release(job)
                yield job, row
