"""The command report: a cohort, an evaluation or a comparison as one HTML file."""

import sys
from collections.abc import Sequence
from typing import Any

from xmag.cli.console import ALL_DONE, write
from xmag.cli.info import kind_of_evaluation
from xmag.cohort.report import REPORT_NAME, CohortReport
from xmag.errors import InputError
from xmag.urls import place_of


def report(
    folder: str, *, out: str | None = None, slides: Sequence[str] = (), **options: Any
) -> int:
    """Write the page of a folder of `extract_cohort`, or of an evaluation or a comparison."""
    place = place_of(folder)
    path = place / "report.html" if out is None else place_of(out)
    kind = kind_of_evaluation(place)
    if kind is not None and not (place / REPORT_NAME).exists():
        from xmag import evaluate  # needs the extra

        if slides or options:
            names = [*(["slides"] if slides else []), *options]
            given = ", ".join(f"--{name}".replace("_", "-") for name in names)
            what = "an evaluation" if kind == "Report" else "a comparison"
            raise InputError(f"{folder} holds {what}, which has no slides: leave out {given}")
        getattr(evaluate, kind).load(folder).to_html(path)
    else:
        if "mask" in options:
            options["tissue"] = options.pop("mask")
        if slides:
            options["slides"] = slides if len(slides) > 1 else slides[0]
        CohortReport.load(folder).to_html(path, **options)
    write(sys.stdout, f"written   {path}")
    return ALL_DONE
