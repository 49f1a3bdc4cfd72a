"""The command report: a cohort, or an evaluation, as one HTML file."""

import sys
from collections.abc import Sequence
from typing import Any

from xmag.cli.console import ALL_DONE, write
from xmag.cohort.report import REPORT_NAME, CohortReport
from xmag.errors import InputError
from xmag.urls import place_of


def report(
    folder: str, *, out: str | None = None, slides: Sequence[str] = (), **options: Any
) -> int:
    """Write the page of a folder of `extract_cohort`, or of an evaluation."""
    place = place_of(folder)
    path = place / "report.html" if out is None else place_of(out)
    if (place / "report.json").exists() and not (place / REPORT_NAME).exists():
        from xmag.evaluate import Report  # needs the extra

        if slides or options:
            given = ", ".join(f"--{name}".replace("_", "-") for name in ("slides", *options))
            raise InputError(
                f"{folder} holds an evaluation, which has no slides: leave out {given}"
            )
        Report.load(folder).to_html(path)
    else:
        if slides:
            options["slides"] = slides if len(slides) > 1 else slides[0]
        CohortReport.load(folder).to_html(path, **options)
    write(sys.stdout, f"written   {path}")
    return ALL_DONE
