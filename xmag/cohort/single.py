"""Slides one after the other, in this process."""

import time
from collections import deque
from collections.abc import Generator

from xmag.bag import FeatureBag, save_bag
from xmag.cohort.failures import costs_a_row
from xmag.cohort.jobs import Job
from xmag.cohort.pictures import is_picture_missing, write_picture
from xmag.cohort.report import CohortRow, Status
from xmag.cohort.resume import Found, earlier_of
from xmag.cohort.settings import Settings
from xmag.cohort.sharing import Share
from xmag.extract import embed_plan
from xmag.plan import TilePlan, plan_tiles
from xmag.slide import Slide, SlideFacts
from xmag.tiles import reading_of
from xmag.tissue import TissueMask, find_tissue


def one_by_one(share: Share, settings: Settings) -> Generator[tuple[Job, CohortRow], None, None]:
    """The rows of jobs, in order, each as soon as it is done."""
    for jobs in share.rounds():
        for job in jobs:
            start, rows = time.monotonic(), deque[CohortRow]()
            with costs_a_row(job, start, rows.append):
                rows.append(_row_of(job, share, settings, start))
            yield job, rows.pop()


def skipped_row(job: Job, found: Found) -> CohortRow:
    """The row of a slide whose bag is there already."""
    return CohortRow(
        slide=job.name,
        status="skipped",
        tiles=found.tiles,
        coverage=found.coverage,
        output=str(job.output),
        empty_source_tiles=found.empty,
    )


def save(
    bag: FeatureBag, slide: SlideFacts, job: Job, *, share: Share, settings: Settings, start: float
) -> CohortRow:
    """Write a slide's bag where it belongs; the row of the slide."""
    share.check_folder()
    # Once more when it is written: a share may go away at any time.
    save_bag(bag, settings.out / job.output, check=share.check_folder, inside=settings.out)
    assert bag.provenance is not None
    made = Found(len(bag), bag.provenance.record)
    share.seen.add(job, made.sha256, slide.version)
    status: Status = "done" if len(bag) else "empty"
    return CohortRow(
        slide=job.name,
        status=status,
        tiles=len(bag),
        coverage=bag.coverage,
        seconds=time.monotonic() - start,
        output=str(job.output),
        empty_source_tiles=made.empty,
    )


def _row_of(job: Job, share: Share, settings: Settings, start: float) -> CohortRow:
    found = share.earlier(job)
    with Slide(job.path, mpp=job.mpp) as slide:
        planned = None
        if found is not None:
            thumbnail, sha256 = is_picture_missing(job, settings), None
            earlier = earlier_of(found, job, settings, share.seen, thumbnail=thumbnail)
            if earlier.is_to_compare(slide.facts):
                planned = _planned(slide, settings)
                sha256 = reading_of(slide, planned[1]).sha256
            if found.is_of(slide.facts, sha256, job, settings):
                share.seen.add(job, found.sha256, slide.facts.version)
                if thumbnail:
                    write_picture(slide, job, settings, *(planned or _planned(slide, settings)))
                return skipped_row(job, found)
        mask, plan = planned or _planned(slide, settings)
        if settings.overlay:
            write_picture(slide, job, settings, mask, plan)
        bag = embed_plan(
            slide,
            plan,
            settings.encoder,
            batch_size=settings.batch_size,
            progress=False,
            transform=settings.transform,
            damaged=settings.damaged,
            tissue=mask,
        )
    return save(bag, slide.facts, job, share=share, settings=settings, start=start)


def _planned(slide: Slide, settings: Settings) -> tuple[TissueMask | None, TilePlan]:
    mask = find_tissue(slide) if settings.tissue == "auto" else None
    plan = plan_tiles(
        slide,
        settings.encoder.tile_spec,
        tissue=mask,
        overlap=settings.overlap,
        min_tissue=settings.min_tissue,
        border=settings.border,
    )
    return mask, plan
