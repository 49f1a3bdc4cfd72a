"""Slides one after the other, in this process."""

import logging
import time
from collections.abc import Iterable, Iterator, Mapping

from xmag import draw, files
from xmag.bag import FeatureBag
from xmag.cohort.jobs import Job
from xmag.cohort.report import CohortRow, Status
from xmag.cohort.resume import Found
from xmag.cohort.settings import Settings
from xmag.extract import embed_plan
from xmag.plan import TilePlan, plan_tiles
from xmag.slide import Slide
from xmag.tiles import reason_of
from xmag.tissue import TissueMask, find_tissue
from xmag.urls import Place

logger = logging.getLogger(__name__)


def one_by_one(
    jobs: Iterable[Job], found: Mapping[Job, Found | None], settings: Settings
) -> Iterator[tuple[Job, CohortRow]]:
    """The rows of jobs, in order, each as soon as it is done."""
    for job in jobs:
        start = time.monotonic()
        try:
            row = skipped_row(job, found[job], settings) or _extract(job, settings, start)
        # Whatever is wrong with one slide is the error of its row, not the end of the others.
        except Exception as error:
            logger.debug("%s failed", job.name, exc_info=True)
            row = failed_row(job, reason_of(error), start)
        yield job, row


def skipped_row(job: Job, found: Found | None, settings: Settings) -> CohortRow | None:
    """The row of a slide whose bag is there already; None if it has to be made.

    A picture that is asked for and not there is made up for. Raises what opening the slide does,
    and MismatchError.
    """
    if found is None:
        return None
    with Slide(job.path, mpp=job.mpp) as slide:
        if not found.is_of(slide.facts, job, settings):
            return None
        if settings.overlay and not _picture_of(job, settings).exists():
            _draw(slide, job, settings, *_planned(slide, settings))
    return CohortRow(slide=job.name, status="skipped", tiles=found.tiles, output=str(job.output))


def failed_row(job: Job, reason: str, start: float) -> CohortRow:
    """The row of a slide that could not be done."""
    seconds = time.monotonic() - start
    return CohortRow(slide=job.name, status="failed", seconds=seconds, error=reason)


def save(bag: FeatureBag, job: Job, settings: Settings, start: float) -> CohortRow:
    """Write a slide's bag where it belongs; the row of the slide."""
    output = settings.out / job.output
    output.parent.mkdir(parents=True, exist_ok=True)
    bag.save(output)
    status: Status = "done" if len(bag) else "empty"
    return CohortRow(
        slide=job.name,
        status=status,
        tiles=len(bag),
        seconds=time.monotonic() - start,
        output=str(job.output),
    )


def draw_overlay(job: Job, settings: Settings) -> None:
    """Write the picture of a slide's tissue and tiles, if pictures are asked for."""
    if settings.overlay:
        with Slide(job.path, mpp=job.mpp) as slide:
            _draw(slide, job, settings, *_planned(slide, settings))


def _extract(job: Job, settings: Settings, start: float) -> CohortRow:
    with Slide(job.path, mpp=job.mpp) as slide:
        mask, plan = _planned(slide, settings)
        if settings.overlay:
            _draw(slide, job, settings, mask, plan)
        bag = embed_plan(
            slide,
            plan,
            settings.encoder,
            batch_size=settings.batch_size,
            progress=False,
            transform=settings.transform,
        )
    return save(bag, job, settings, start)


def _planned(slide: Slide, settings: Settings) -> tuple[TissueMask | None, TilePlan]:
    mask = find_tissue(slide) if settings.tissue == "auto" else None
    plan = plan_tiles(
        slide,
        settings.encoder.tile_spec,
        tissue=mask,
        overlap=settings.overlap,
        min_tissue=settings.min_tissue,
    )
    return mask, plan


def _picture_of(job: Job, settings: Settings) -> Place:
    output = settings.out / job.output
    return output.with_name(output.name + ".png")


def _draw(
    slide: Slide, job: Job, settings: Settings, mask: TissueMask | None, plan: TilePlan
) -> None:
    picture = _picture_of(job, settings)
    picture.parent.mkdir(parents=True, exist_ok=True)
    with files.atomic_path(picture) as path:
        draw.overlay(slide, tissue=mask, plan=plan).save(path, format="PNG")
