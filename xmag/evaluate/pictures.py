"""Figures of ROC curves and confusion matrices, by matplotlib's object interface alone.

Neither pyplot, nor a global backend, nor rcParams are touched.
"""

import io
import math
import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from xmag.errors import InputError
from xmag.evaluate.extra import optional
from xmag.evaluate.results import Result, Sampling, cases_of
from xmag.metrics.bootstrap import Floats, resampled
from xmag.metrics.ranking import mean_roc

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from xmag.evaluate.report import Report

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Colour-blind safe palette of Okabe and Ito, without its yellow, which is faint on white."""
_DASHES = ("-", "--", "-.", (0, (1, 1)))
_INK, _FAINT = "#222222", "#8A8A8A"
_DPI = 150
_MOST_COLUMNS = 3
_MOST_DRAWS = 500
"""Limit of bootstrap draws for a band, which is drawn and not reported as a number."""
_MOST_BANDS = 4
"""Limit of curves with a confidence band in a panel; more would hide each other."""


def roc_figure(report: "Report") -> "Figure":
    """Figure of ROC curves: a panel for each result, a curve for each class against the rest.

    Bands and legends have the report's intervals; of two classes, the second one's curve is drawn.
    Raises MissingExtraError without matplotlib.
    """
    figure, panels = _panels(report, side_in=4.4)
    for axes, result in zip(panels, report.results, strict=True):
        _draw_roc(axes, result, report)
        _entitle(axes, report, result)
    return figure


def confusion_figure(report: "Report") -> "Figure":
    """Figure of confusion matrices, a panel for each result.

    A cell has the share of its row's class, which is its colour, and the number of cases; over
    several repeats, their mean. Raises MissingExtraError without matplotlib.
    """
    figure, panels = _panels(report, side_in=2.4 + 0.62 * min(len(report.classes), 20))
    for axes, result in zip(panels, report.results, strict=True):
        _draw_confusion(axes, result)
        _entitle(axes, report, result)
    return figure


def as_png(figure: "Figure") -> bytes:
    """Render a figure as PNG bytes."""
    backend = optional("matplotlib.backends.backend_agg", "a picture")
    out = io.BytesIO()
    backend.FigureCanvasAgg(figure).print_png(out)
    return out.getvalue()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Curve:
    """The ROC curve of one class; `low` and `high` are the pointwise band at `band_fpr`, or None.

    Of several splits it is their mean at each false positive rate, weighted by their pairs of a
    positive and a negative case, so that the area under it is the AUROC of the report.
    """

    fpr: Floats
    tpr: Floats
    band_fpr: Floats
    low: Floats | None
    high: Floats | None


def curve_of(result: Result, place: int, *, sampling: Sampling) -> Curve | None:
    """The ROC curve of the class at `place` against the rest; None without a pair to compare."""
    cases = cases_of(result)
    fpr, tpr = mean_roc(cases, None, place)
    if not len(fpr):
        return None
    grid = np.linspace(0, 1, 201)
    ends = (1 - sampling.level) / 2, (1 + sampling.level) / 2
    try:
        drawn = resampled(
            lambda weights: mean_roc(cases, weights, place, grid)[1],
            result.truth,
            result.patients,
            resamples=min(sampling.resamples, _MOST_DRAWS),
            random_state=sampling.random_state,
        )
        low, high = np.quantile(drawn, ends, axis=0)
    except InputError:  # too few patients for an interval, as the report says
        low = high = None
    return Curve(
        fpr=np.append(0.0, fpr), tpr=np.append(0.0, tpr), band_fpr=grid, low=low, high=high
    )


def _panels(report: "Report", *, side_in: float) -> tuple["Figure", list["Axes"]]:
    number = len(report.results)
    trained = len({result.trained_on for result in report.results})
    columns = min(number, _MOST_COLUMNS)
    if trained > 1 and number % trained == 0:
        columns = number // trained  # a row for each cohort that was trained on
    rows = math.ceil(number / columns)
    titles_in = 0.35 if number > 1 else 0.15
    figure = optional("matplotlib.figure", "a picture").Figure(
        figsize=(columns * side_in + 0.2, rows * (side_in + titles_in) + 0.4),
        dpi=_DPI,
        facecolor="white",
        layout="constrained",
    )
    figure.get_layout_engine().set(h_pad=0.08, w_pad=0.08)
    panels = [figure.add_subplot(rows, columns, place + 1) for place in range(number)]
    for axes in panels:
        axes.set_facecolor("white")
        axes.tick_params(colors=_INK, labelsize=8)
        for spine in axes.spines.values():
            spine.set_color(_FAINT)
    _write(figure.suptitle, _title(report, figure.get_figwidth()), fontsize=10.5, color=_INK)
    return figure, panels


def _draw_roc(axes: "Axes", result: Result, report: "Report") -> None:
    axes.plot([0, 1], [0, 1], color=_FAINT, linewidth=0.8, linestyle=":")
    counts = result.counts()
    places = range(len(report.classes)) if len(report.classes) > 2 else (1,)
    lines, texts = [], []
    for drawn, place in enumerate(places):
        estimate = result.class_aurocs[place]
        curve = curve_of(result, place, sampling=report.sampling)
        if curve is None:
            continue
        colour = _COLOURS[drawn % len(_COLOURS)]
        dash = _DASHES[(drawn // len(_COLOURS)) % len(_DASHES)]
        banded = len(places) <= _MOST_BANDS
        if banded and curve.low is not None and curve.high is not None:
            axes.fill_between(
                curve.band_fpr, curve.low, curve.high, color=colour, alpha=0.13, linewidth=0
            )
        lines += axes.plot(curve.fpr, curve.tpr, color=colour, linewidth=1.6, linestyle=dash)
        name = _shortened(str(report.classes[place]), 18)
        texts.append(f"{name} (n = {counts[place]:,}): {estimate}")
    _write(axes.set_xlabel, "false positive rate", fontsize=9, color=_INK)
    _write(axes.set_ylabel, "true positive rate", fontsize=9, color=_INK)
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
    axes.grid(color="#E6E6E6", linewidth=0.6)
    axes.set_axisbelow(True)
    if lines:
        percent = f"{100 * report.sampling.level:.4g}%"
        legend = axes.legend(
            lines,
            texts,
            title=f"AUROC ({percent} interval)",
            loc="lower right",
            fontsize=7.5,
            title_fontsize=7.5,
            frameon=True,
            framealpha=0.85,
            edgecolor="none",
            facecolor="white",
            labelcolor=_INK,
        )
        for text in legend.get_texts():
            text.set_parse_math(False)


def _draw_confusion(axes: "Axes", result: Result) -> None:
    matrix = result.confusion()
    totals = matrix.sum(1, keepdims=True)
    shares = matrix / np.where(totals > 0, totals, 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1.15)
    size = len(result.classes)
    font = max(4.0, 9.5 - 0.35 * size)
    for row, column in np.ndindex(size, size):
        colour = "white" if shares[row, column] > 0.75 else _INK
        count = f"{matrix[row, column]:,.1f}".removesuffix(".0")
        text = f"{shares[row, column]:.0%}\n{count}"
        if not matrix[row, column]:
            text, colour = "0" if totals[row, 0] else "–", _FAINT
        axes.text(column, row, text, ha="center", va="center", fontsize=font, color=colour)
    names = [_shortened(str(label), 16) for label in result.classes]
    counts = result.counts()
    by_row = [f"{name}\nn = {count:,}" for name, count in zip(names, counts, strict=True)]
    axes.set_yticks(range(size), by_row, parse_math=False, fontsize=8)
    axes.set_xticks(range(size), names, parse_math=False, fontsize=8)
    if size * max(map(len, names)) > 26:
        for label in axes.get_xticklabels():
            label.set(rotation=35, ha="right", rotation_mode="anchor")
    axes.tick_params(length=0)
    _write(axes.set_ylabel, "true class", fontsize=9, color=_INK)
    _write(axes.set_xlabel, "predicted class", fontsize=9, color=_INK)


def _entitle(axes: "Axes", report: "Report", result: Result) -> None:
    """Set the title of a panel: its cohorts, where there are several, and the number of cases."""
    patients = len(np.unique(result.patients))
    size = f"{result.cases:,} cases, {patients:,} patients"
    if len(report.results) > 1:
        trained = f"{_shortened(result.trained_on, 20)} → " if result.trained_on else ""
        if result.trained_on == result.tested_on:
            where = f"{_shortened(result.tested_on, 20)}, cross-validated"
        else:
            where = f"{trained}{_shortened(result.tested_on, 20)}"
        size = f"{where}\n{size}"
    _write(axes.set_title, size, fontsize=8.5, color=_INK)


def _title(report: "Report", width_in: float) -> str:
    """The report's title, wrapped to the width of the figure between its parts."""
    most = int(12 * width_in)
    if len(report.title) <= most:
        return report.title
    return "\n".join(textwrap.fill(part, most) for part in report.title.split(": ", 1))


def _write(setter: Any, text: str, **look: Any) -> None:
    """Set a text without mathtext: a dollar sign in a name is no formula."""
    setter(text, parse_math=False, **look)


def _shortened(text: str, most: int) -> str:
    text = text.replace("\n", " ")
    return text if len(text) <= most else f"{text[: most - 1]}…"
