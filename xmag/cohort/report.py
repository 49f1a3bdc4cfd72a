"""Report of a cohort: a row for each slide, kept as a CSV file."""

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, fields
from operator import methodcaller
from pathlib import Path
from typing import Any, Literal

from xmag import files
from xmag.cohort.jobs import Job
from xmag.errors import OutputError
from xmag.notebook import Rows, Shown
from xmag.urls import Place

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


@dataclass(frozen=True, slots=True, repr=False)
class CohortReport(Shown, Sequence[CohortRow]):
    """The rows of a cohort, in the order of its slides."""

    rows: tuple[CohortRow, ...]

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
            values |= {"seconds": f"{row.seconds:.2f}", "coverage": share}
            rows.append([*values.values()])
        return files.csv_text([names, *rows])


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
