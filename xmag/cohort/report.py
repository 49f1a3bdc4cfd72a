"""Report of a cohort: a row for each slide, kept as a CSV file."""

import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, fields, replace
from operator import methodcaller
from os import PathLike
from pathlib import Path
from typing import Any, Literal, Self

from xmag import files
from xmag.cohort.given import masked, within
from xmag.cohort.jobs import Job, jobs_of
from xmag.draw.page import write_page
from xmag.errors import InputError, OutputError
from xmag.notebook import Rows, Shown
from xmag.urls import Place, Url, place_of

Status = Literal["done", "skipped", "empty", "failed", "lost"]

REPORT_NAME = "report.csv"
_OWN_START = b"slide,status,tiles"
"""First bytes of every report of xmag, whatever columns it has besides."""

_REPORT_EVERY_S = 2.0
"""Seconds between writings of the report while a cohort runs: cheap, and never far behind."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CohortRow:
    """Report row of one slide.

    `status` is "done", "skipped" (it was there already), "empty" (no tile; a valid empty bag was
    written), "failed" (`error` says why) or "lost" (its worker was; run the same again). `output`
    is relative to the output folder, `seconds` is 0 for what was skipped. `coverage` is the share
    of the tissue that lies under tiles, None where no tissue is known. `empty_source_tiles` is how
    many tiles of the level that is read the slide declares empty. `model` is the name of the model,
    and of its folder, where there are several; `region` the scan that was asked for.

    The seconds of the stages tell why a slide was slow: `planning_seconds` it took to open it and
    to find its tissue and tiles, `reading_seconds` to decode these, `embedding_seconds` while the
    model had them or was waited for, `saving_seconds` to write its file. Slides are done side by
    side and decoded ahead, so that their sum is not `seconds`.
    """

    slide: str
    status: Status
    tiles: int = 0
    coverage: float | None = None
    seconds: float = 0.0
    error: str = ""
    output: str = ""
    empty_source_tiles: int = 0
    model: str = ""
    region: int | None = None
    planning_seconds: float = 0.0
    reading_seconds: float = 0.0
    embedding_seconds: float = 0.0
    saving_seconds: float = 0.0


STAGES = tuple(f.name for f in fields(CohortRow) if f.name.endswith("_seconds"))
"""Names of the stages' fields of a row, in their order."""


@dataclass(frozen=True, slots=True, repr=False)
class CohortReport(Shown, Sequence[CohortRow]):
    """The rows of a cohort, in the order of its slides.

    `folder` is where their bags are, and `jobs` are their slides, as far as that is known: for
    `to_html`, which shows them.
    """

    rows: tuple[CohortRow, ...]
    folder: Place | None = field(default=None, repr=False, compare=False)
    jobs: tuple[Job, ...] = field(default=(), repr=False, compare=False)

    @classmethod
    def load(cls, folder: str | PathLike[str] | Url) -> Self:
        """The report of a folder that `extract_cohort` wrote to; of one done in shares, of all.

        Raises InputError where there is none.
        """
        place = place_of(folder)
        paths: list[Place] = [place / REPORT_NAME]
        if isinstance(place, Path) and not paths[0].exists():
            paths = [*sorted(place.glob(report_name((0, 0)).replace("0", "*")))] or paths
        rows = []
        for path in paths:
            with files.local_copy(path, InputError) as local:
                rows += [_row(row) for row in files.read_csv(local, required=_COLUMNS)]
        return cls(tuple(rows), place)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        counts = ", ".join(f"{count:,} {status}" for status, count in self.counts().items())
        tiles, noun = sum(row.tiles for row in self.rows), "slide" if len(self) == 1 else "slides"
        return f"<CohortReport of {len(self):,} {noun}: {counts or 'none'}; {tiles:,} tiles>"

    def _rows(self) -> Rows:
        # What a person has to look at comes first.
        rows = sorted(self.rows, key=lambda row: row.status in ("done", "skipped"))
        names = ["status", "slide", "model", "tiles", "coverage", "seconds", "error"]
        shares = ["" if row.coverage is None else f"{row.coverage:.0%}" for row in rows]
        told = [
            [
                row.status,
                row.slide,
                row.model,
                f"{row.tiles:,}",
                share,
                f"{row.seconds:.1f}",
                row.error,
            ]
            for row, share in zip(rows, shares, strict=True)
        ]
        return [names, *told] if told else []

    @property
    def failed(self) -> tuple[CohortRow, ...]:
        """The rows of slides that could not be done."""
        return tuple(row for row in self.rows if row.status == "failed")

    @property
    def lost(self) -> tuple[CohortRow, ...]:
        """The rows of slides whose worker was lost: the same command again does them."""
        return tuple(row for row in self.rows if row.status == "lost")

    def counts(self) -> dict[str, int]:
        """Number of slides by status."""
        return dict(Counter(row.status for row in self.rows))

    def to_csv(self) -> str:
        """The report as CSV text with a header.

        Text that a spreadsheet would run as a formula has an apostrophe before it.
        """
        names = [field.name for field in fields(CohortRow)]
        rows = []
        for row in self.rows:
            values = {name: getattr(row, name) for name in names}
            share = "" if row.coverage is None else f"{row.coverage:.3f}"
            values |= {name: f"{values[name]:.2f}" for name in names if "seconds" in name}
            values["coverage"] = share
            rows.append([*values.values()])
        return files.csv_text([names, *rows])

    def to_html(
        self,
        path: str | PathLike[str] | Url,
        *,
        slides: str | PathLike[str] | Iterable[str | PathLike[str]] | None = None,
        tissue: str | PathLike[str] | None = None,
        roi: str | PathLike[str] | None = None,
        classifier: Any = None,
        title: str | None = None,
        max_mb: float = 40,
        progress: bool | None = None,
    ) -> None:
        """Write the report as one HTML file, which a browser shows without server or network.

        It has the rows as a table that sorts and filters, and a card for each slide: its thumbnail
        to pan and zoom, with tissue, tiles, dropped cells and their reasons, a map of the features
        and the attention of a classifier as layers; tiles; where the time went, and why tiles are
        missing. Bags are read from `folder`, and slides again for their pictures. Nothing of their
        labels, macro images and properties is in it; names of slides are.

        Args:
            path: The file to write, such as ``out/report.html``.
            slides: Where the slides are now, as `extract_cohort` takes them; by default where that
                call, which made the report, had them. Without any, cards have no pictures.
            tissue: With `slides`, the masks that `extract_cohort` was given, to show them.
            roi: Likewise, the regions of interest.
            classifier: A fitted MILClassifier, MILRegressor or MILSurvival, or the folder of one,
                for its attention and predictions.
            title: The page's, by default "Cohort of N slides".
            max_mb: Most megabytes (10^6 bytes) of cards and pictures: those of many slides are
                smaller.
            progress: Show a bar on stderr; None does on a terminal and in a notebook.

        A slide or bag that cannot be read has a card that says so. Raises InputError for slides of
        which none is in the report, ModelError where there is no such classifier, and OutputError
        where the file cannot be written, or would replace one that xmag did not write.
        """
        from xmag.cohort.page import cohort_page  # torch, and more than a report needs

        report = self
        if slides is not None:
            jobs = jobs_of(slides, format="h5", mpp=None)
            jobs = jobs if roi is None else within(jobs, roi)
            jobs = jobs if tissue is None else masked(jobs, tissue)
            names = {row.slide for row in self.rows}
            if not any(job.name in names for job in jobs):
                raise InputError(
                    f"none of the {len(jobs)} slides is in the report: its first is"
                    f" {self.rows[0].slide if self.rows else None!r}, and theirs {jobs[0].name!r};"
                    " give the slides as they were given to extract_cohort"
                )
            report = replace(self, jobs=tuple(jobs))
        elif not (tissue is None and roi is None):
            raise InputError("tissue and roi go with slides: expected slides=, too")
        content = cohort_page(
            report, title=title, classifier=classifier, max_mb=max_mb, progress=progress
        )
        write_page(place_of(path), content)


_COLUMNS = tuple(field.name for field in fields(CohortRow))[:3]


def _row(row: files.Row) -> CohortRow:
    """The row that `to_csv` wrote; those of earlier versions lack columns."""
    values: dict[str, Any] = {}
    try:
        for each in fields(CohortRow):
            text = files.without_apostrophe(row.values.get(each.name, ""))
            if text or each.name == "slide":
                kinds: dict[Any, Any] = {int: int, int | None: int, float: float}
                kinds[float | None] = float
                values[each.name] = kinds.get(each.type, str)(text)
    except ValueError as error:
        raise InputError(
            f"line {row.line} of {row.table!r} was not written by xmag ({error}); expected a"
            f" {REPORT_NAME} of extract_cohort"
        ) from error
    return CohortRow(**values)


def report_name(shard: tuple[int, int] | None) -> str:
    """File name of the report of a cohort, or of share i of n of one."""
    return REPORT_NAME if shard is None else f"report-{shard[0]}-of-{shard[1]}.csv"


class ReportFile:
    """Keeps ``report.csv`` up to date while the rows come in, and complete at the end."""

    def __init__(self, path: Place, jobs: Sequence[Job], rows: Mapping[Job, CohortRow]) -> None:
        self._path, self._jobs, self._rows = path, jobs, rows
        self._written_at = -math.inf

    def __enter__(self) -> "ReportFile":
        files.make_folder(self._path.parent)
        # Written before any work, so that a folder that takes no files is found out at once.
        self._write()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # Where the disk is full, the report is the next thing that does not fit: the first error
        # says more.
        with nullcontext() if kind is None else suppress(OutputError):
            self._write()

    def update(self) -> None:
        """Write the report, unless that was done a moment ago."""
        if time.monotonic() - self._written_at > _REPORT_EVERY_S:
            self._write()

    def _write(self) -> None:
        rows = [self._rows[job] for job in self._jobs if job in self._rows]
        if isinstance(self._path, Path) or self._written_at == -math.inf:
            is_own = methodcaller("startswith", _OWN_START)
            files.require_own(self._path, self._path.parent, is_own)
        text = CohortReport(tuple(rows)).to_csv()
        files.write_text(self._path, text, inside=self._path.parent)
        self._written_at = time.monotonic()
