"""Figures of reports: ROC and calibration curves, confusion matrices, scatter, Kaplan-Meier.

By matplotlib's object interface alone: pyplot, the global backend and rcParams are not touched.
"""

import io
import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from xmag.errors import InputError
from xmag.evaluate.extra import optional
from xmag.evaluate.results import Result, Sampling, cases_of, shown_p
from xmag.metrics.bootstrap import TASKS, Floats, Outcomes, resampled
from xmag.metrics.ranking import mean_roc
from xmag.metrics.survival import Survival, kaplan_meier

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from xmag.evaluate.comparison import Comparison
    from xmag.evaluate.report import Report

_Draw = Callable[["Axes", Result], None]

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Colour-blind safe palette of Okabe and Ito, without its yellow, which is faint on white."""
_DASHES = ("-", "--", "-.", (0, (1, 1)))
_INK, _FAINT = "#222222", "#8A8A8A"
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_DPI = 150
_MOST_BINS = 10
_MOST_COLUMNS = 3
_MOST_DRAWS = 500
"""Limit of bootstrap draws for a band, which is drawn and not reported as a number."""
_MOST_BANDS = 4
"""Limit of curves with a confidence band in a panel; more would hide each other."""


def roc_figure(report: "Report") -> "Figure":
    """Figure of ROC curves: a panel for each result, a curve for each class against the rest.

    Bands and legends have the report's intervals; of two classes, the second one's curve is drawn,
    and of several labels that of each. Raises InputError for other tasks, and MissingExtraError
    without matplotlib.
    """
    _require(report, "ROC curve", "classification", "multilabel")
    return _figure(report, partial(_draw_roc, sampling=report.sampling), side_in=4.4)


def confusion_figure(report: "Report") -> "Figure":
    """Figure of confusion matrices, a panel for each result.

    A cell has the share of its row's class, which is its colour, and the number of cases; over
    several repeats, their mean. Raises InputError for other tasks than classification, and
    MissingExtraError without matplotlib.
    """
    _require(report, "confusion matrix", "classification")
    return _figure(report, _draw_confusion, side_in=2.4 + 0.62 * min(len(report.classes), 20))


def calibration_figure(report: "Report") -> "Figure":
    """Figure of calibration curves: the share of cases that are of a class, by its probability.

    Cases are sorted by the predicted probability and cut into ten parts of as many each, fewer of
    less than 100 cases; bars are 95% intervals (Wilson's), which take each case for a patient of
    its own. On the diagonal, probabilities are what they say. Classes are as in `roc_figure`.
    """
    _require(report, "calibration curve", "classification", "multilabel")
    return _figure(report, _draw_calibration, side_in=4.4)


def scatter_figure(report: "Report") -> "Figure":
    """Figure of predicted against true numbers: a panel for each result and target.

    The line is where both are equal. Raises InputError for other tasks than regression, and
    MissingExtraError without matplotlib.
    """
    _require(report, "scatter of numbers", "regression")
    draws = [partial(_draw_scatter, place=place) for place in range(len(report.classes))]
    return _figure(report, *draws, side_in=4.2, high=0.9 if len(draws) > 1 else 1)


def kaplan_meier_figure(report: "Report") -> "Figure":
    """Figure of Kaplan-Meier curves of the cases of low and of high risk, a panel for each result.

    Groups are cut at the median risk of the cases that were fitted on, or of the cohort where those
    are not known. Bands are pointwise 95% intervals, ticks are censored cases, and p is the
    log-rank test's; below are the numbers at risk. Raises InputError for other tasks than survival,
    and MissingExtraError without matplotlib.
    """
    _require(report, "Kaplan-Meier curve", "survival")
    return _figure(report, _draw_kaplan_meier, side_in=4.8)


def cost_figure(comparison: "Comparison") -> "Figure":
    """Figure of a metric against GFLOP a slide, on a log scale: a panel for each cohort.

    Bars are the intervals. Models whose GFLOP are not known stand at their tiles a slide instead,
    all of them. Raises MissingExtraError without matplotlib.
    """
    cohorts = list(comparison.models[0].estimates)
    figure = _empty_figure(4.8 * len(cohorts), 4.0)
    known = all(one.gflop is not None for one in comparison.models)
    for place, cohort in enumerate(cohorts):
        axes = figure.add_subplot(1, len(cohorts), place + 1)
        for number, one in enumerate(comparison.models):
            estimate, cost = one.estimates[cohort], one.gflop if known else one.tiles
            if estimate.value is None or cost is None:
                continue
            low, high = estimate.interval or (estimate.value, estimate.value)
            spread = [[max(0, estimate.value - low)], [max(0, high - estimate.value)]]
            axes.errorbar(
                [cost], [estimate.value], yerr=spread, capsize=3, color=_look(number)[0],
                marker=_MARKERS[number % len(_MARKERS)], linestyle="none",
                label=f"{one.label}, {one.mpp:g} µm/px",
            )  # fmt: skip
        axes.set_xscale("log")
        _label(axes, "GFLOP a slide" if known else "tiles a slide", comparison.title)
        _write(axes.set_title, cohort, fontsize=9.5, color=_INK)
        axes.legend(fontsize=7.5, frameon=False, loc="best")
    return figure


def _empty_figure(width_in: float, height_in: float) -> "Figure":
    figure: Figure = optional("matplotlib.figure", "a picture").Figure(
        figsize=(width_in, height_in), dpi=_DPI, facecolor="white", layout="constrained"
    )
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
    cases, codes = cases_of(result), result.truth
    if isinstance(cases, Outcomes):
        codes = cases.codes
        cases, place = cases.label(place), 1
    fpr, tpr = mean_roc(cases, None, place)
    if not len(fpr):
        return None
    grid = np.linspace(0, 1, 201)
    ends = (1 - sampling.level) / 2, (1 + sampling.level) / 2
    try:
        drawn = resampled(
            lambda weights: mean_roc(cases, weights, place, grid)[1],
            codes,
            result.patients,
            resamples=min(sampling.resamples, _MOST_DRAWS),
            random_state=sampling.random_state,
        )
        low, high = np.quantile(drawn, ends, axis=0)
    except InputError:  # too few patients for an interval, as the report says
        low = high = None
    fpr, tpr = np.append(0.0, fpr), np.append(0.0, tpr)
    return Curve(fpr=fpr, tpr=tpr, band_fpr=grid, low=low, high=high)


def _require(report: "Report", what: str, *tasks: str) -> None:
    if report.task not in tasks:
        raise InputError(
            f"the task of the report is {report.task}, which has no {what}; expected"
            f" {' or '.join(tasks)}"
        )


def _figure(report: "Report", *draws: _Draw, side_in: float, high: float = 1.0) -> "Figure":
    """A figure with a panel of each of `draws` for each result, `high` times as high as wide."""
    each = len(draws)
    number = len(report.results) * each
    trained = len({result.trained_on for result in report.results})
    columns = min(number, _MOST_COLUMNS)
    if trained > 1 and number % trained == 0:
        columns = number // trained  # a row for each cohort that was trained on
    elif each > 1 and len(report.results) > 1:
        columns = each
    rows = math.ceil(number / columns)
    titles_in = 0.35 if number > 1 else 0.15
    width_in = columns * side_in + 0.2
    figure = _empty_figure(width_in, rows * (side_in * high + titles_in) + 0.4)
    layout: Any = figure.get_layout_engine()
    layout.set(h_pad=0.08, w_pad=0.08)
    title, most = report.title, int(12 * width_in)
    if len(title) > most:  # wrapped to the width of the figure between its parts
        title = "\n".join(textwrap.fill(part, most) for part in title.split(": ", 1))
    _write(figure.suptitle, title, fontsize=10.5, color=_INK)
    drawn = ((result, draw) for result in report.results for draw in draws)
    for place, (result, draw) in enumerate(drawn, 1):
        axes = figure.add_subplot(rows, columns, place)
        axes.set_facecolor("white")
        axes.tick_params(colors=_INK, labelsize=8)
        for spine in axes.spines.values():
            spine.set_color(_FAINT)
        draw(axes, result)
        _entitle(axes, report, result)
    return figure


def _unit_square(axes: "Axes", x: str, y: str) -> None:
    axes.plot([0, 1], [0, 1], color=_FAINT, linewidth=0.8, linestyle=":")
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
    _label(axes, x, y)


def _draw_roc(axes: "Axes", result: Result, *, sampling: Sampling) -> None:
    _unit_square(axes, "false positive rate", "true positive rate")
    counts, places = result.counts(), _curves(result)
    lines, texts = [], []
    for drawn, place in enumerate(places):
        curve = curve_of(result, place, sampling=sampling)
        if curve is None:
            continue
        colour, dash = _look(drawn)
        if len(places) <= _MOST_BANDS and curve.low is not None and curve.high is not None:
            axes.fill_between(
                curve.band_fpr, curve.low, curve.high, color=colour, alpha=0.13, linewidth=0
            )
        lines += axes.plot(curve.fpr, curve.tpr, color=colour, linewidth=1.6, linestyle=dash)
        name = _shortened(str(result.classes[place]), 18)
        texts.append(f"{name} (n = {counts[place]:,}): {result.class_aurocs[place]}")
    title = f"AUROC ({100 * sampling.level:.4g}% interval)"
    _legend(axes, lines, texts, title, "lower right")


def _curves(result: Result) -> Sequence[int]:
    """The classes or labels that have a curve: of two classes, the second."""
    two = result.task == "classification" and len(result.classes) == 2
    return (1,) if two else range(len(result.classes))


def _look(place: int) -> tuple[str, Any]:
    """Colour and dashes of the curve at a place."""
    return _COLOURS[place % len(_COLOURS)], _DASHES[(place // len(_COLOURS)) % len(_DASHES)]


def _label(axes: "Axes", x: str, y: str) -> None:
    _write(axes.set_xlabel, x, fontsize=9, color=_INK)
    _write(axes.set_ylabel, y, fontsize=9, color=_INK)
    axes.grid(color="#E6E6E6", linewidth=0.6)
    axes.set_axisbelow(True)


def _legend(axes: "Axes", lines: list[Any], texts: list[str], title: str, where: str) -> None:
    if not lines:
        return
    legend = axes.legend(
        lines, texts, title=title, loc=where, fontsize=7.5, title_fontsize=7.5, frameon=True,
        framealpha=0.85, edgecolor="none", facecolor="white", labelcolor=_INK,
    )  # fmt: skip
    for text in legend.get_texts():
        text.set_parse_math(False)


def calibration_of(result: Result, place: int) -> NDArray[np.float64]:
    """Calibration of a class: mean probability, share of its cases, and their number, (3, bins)."""
    truth = result.truth[:, place] if result.truth.ndim > 1 else result.truth == place
    probability = result.scores[:, place]
    bins = max(2, min(_MOST_BINS, len(truth) // _MOST_BINS))
    parts = np.array_split(np.argsort(probability, kind="stable"), min(bins, len(truth)))
    values = [(probability[part].mean(), truth[part].mean(), len(part)) for part in parts]
    return np.array(values, np.float64).T


def _draw_calibration(axes: "Axes", result: Result) -> None:
    _unit_square(axes, "predicted probability", "observed share")
    lines, texts, z = [], [], 1.959963984540054
    for drawn, place in enumerate(_curves(result)):
        colour, dash = _look(drawn)
        x, p, n = calibration_of(result, place)
        # Wilson 1927, JASA 22, 209-212.
        middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
        spread = z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
        axes.vlines(x, middle - spread, middle + spread, color=colour, alpha=0.35, linewidth=1.2)
        marker = _MARKERS[drawn % len(_MARKERS)]
        lines += axes.plot(
            x, p, color=colour, linestyle=dash, linewidth=1.2, marker=marker, markersize=4.5
        )
        texts.append(_shortened(str(result.classes[place]), 24))
    _legend(axes, lines, texts, "", "upper left")


def _draw_scatter(axes: "Axes", result: Result, *, place: int) -> None:
    truth, predicted = result.truth[:, place], result.predicted[:, place]
    known = ~np.isnan(truth)
    truth, predicted = truth[known], predicted[known]
    ends = np.concatenate([truth, predicted, [0.0] if not len(truth) else []])
    margin = 0.04 * (np.ptp(ends) or 1)
    limits = ends.min() - margin, ends.max() + margin
    axes.plot(limits, limits, color=_FAINT, linewidth=1, linestyle="--")
    size = float(np.clip(400 / np.sqrt(max(len(truth), 1)), 4, 26))
    axes.scatter(truth, predicted, s=size, color=_COLOURS[0], alpha=0.55, linewidths=0)
    axes.set(xlim=limits, ylim=limits, aspect="equal")
    name = _shortened(str(result.classes[place]), 24)
    _label(axes, f"{name}, true", f"{name}, predicted")
    found = {name: each[place] for name, each in result.of_each.items()} or result.estimates
    table = TASKS["regression"]
    lines = [f"{table[name].title} {found[name]}" for name in ("r2", "mae", "pearson")]
    axes.text(
        0.03, 0.97, "\n".join(lines), transform=axes.transAxes, ha="left", va="top",
        fontsize=7.5, color=_INK, linespacing=1.4,
        bbox={"facecolor": "white", "alpha": 0.85, "edgecolor": "none", "pad": 2},
    )  # fmt: skip


def _draw_kaplan_meier(axes: "Axes", result: Result) -> None:
    seen, groups = result.risk_groups()
    last = float(seen.time.max())
    ticks = optional("matplotlib.ticker", "a picture").MaxNLocator(5).tick_values(0, last)
    ticks = [tick for tick in ticks if 0 <= tick <= last]
    below = axes.get_xaxis_transform()
    lines, texts = [], []
    for row, (group, name) in enumerate(((1, "high risk"), (0, "low risk"))):
        own = Survival(event=seen.event[groups == group], time=seen.time[groups == group])
        colour, dash = (_COLOURS[1], "-") if group else (_COLOURS[0], (0, (5, 1.5)))
        y = -0.21 - 0.055 * row
        beside: dict[str, Any] = {"va": "center", "fontsize": 7.5, "color": colour}
        axes.text(-0.03, y, name, transform=axes.transAxes, ha="right", **beside)
        if not len(own):
            continue
        estimate = kaplan_meier(own)
        x = np.append(0.0, estimate.times)
        parts = estimate.survival, estimate.low, estimate.high
        share, low, high = (np.append(1.0, part) for part in parts)
        axes.fill_between(x, low, high, step="post", color=colour, alpha=0.13, linewidth=0)
        lines += axes.step(x, share, where="post", color=colour, linestyle=dash, linewidth=1.6)
        censored = np.unique(own.time[~own.event])
        axes.plot(censored, estimate.at(censored), "|", color=colour, markersize=5)
        texts.append(f"{name} (n = {len(own):,}, events {int(own.event.sum()):,})")
        for tick, count in zip(ticks, estimate.at_risk_at(ticks), strict=True):
            axes.text(tick, y, f"{count:,}", transform=below, ha="center", **beside)
    axes.text(-0.03, -0.155, "at risk", transform=axes.transAxes, ha="right", va="center",
              fontsize=7.5, color=_INK)  # fmt: skip
    _label(axes, "time", "share without an event")
    axes.set(xlim=(-0.02 * last, 1.02 * last), ylim=(-0.01, 1.02), xticks=ticks)
    p = result.estimates["log_rank"].value
    title = "" if p is None else f"log-rank p {'' if p < 1e-3 else '= '}{shown_p(p)}"
    _legend(axes, lines, texts, title, "best")


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
    axes.set_xlabel("predicted class", fontsize=9, color=_INK)
    axes.set_ylabel("true class", fontsize=9, color=_INK)


def _entitle(axes: "Axes", report: "Report", result: Result) -> None:
    """Set the title of a panel: its cohorts, where there are several, and the number of cases."""
    patients = len(np.unique(result.patients))
    size = f"{result.cases:,} cases, {patients:,} patients"
    if len(report.results) > 1:
        trained, where = (_shortened(x, 20) for x in (result.trained_on, result.tested_on))
        if result.trained_on == result.tested_on:
            where = f"{where}, cross-validated"
        elif trained:
            where = f"{trained} → {where}"
        size = f"{where}\n{size}"
    _write(axes.set_title, size, fontsize=8.5, color=_INK)


def _write(setter: Any, text: str, **look: Any) -> None:
    """Set a text without mathtext: a dollar sign in a name is no formula."""
    setter(text, parse_math=False, **look)


def _shortened(text: str, most: int) -> str:
    text = text.replace("\n", " ")
    return text if len(text) <= most else f"{text[: most - 1]}…"
