"""Evaluation reports: results as a Markdown table, JSON and figures."""

import math
import os
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from xmag import files, records
from xmag.draw.page import as_cells, document, interval_bar, table, write_page
from xmag.errors import InputError
from xmag.evaluate import pictures
from xmag.evaluate.folds import Folds
from xmag.evaluate.results import ARRAYS, Estimate, Result, Sampling, shown, shown_interval, shown_p
from xmag.metrics.bootstrap import TASKS, Interval
from xmag.notebook import Shown
from xmag.urls import Url, place_of


def _from_version_1(values: dict[str, Any]) -> dict[str, Any]:
    """A report of the time when all were of classification."""
    results = [
        {**one, "of_each": {"auroc": one["class_aurocs"]}, "event_weights": [], "brier": []}
        for one in values["results"]
    ]
    return {**values, "task": "classification", "results": results}


_FORMAT = records.Format(
    name="xmag.Report",
    version=2,
    writer="Report.save",
    remedy="give a folder that xmag saved",
    migrations={1: _from_version_1},
)
_JSON_NAME = "report.json"
HEADLINES = {
    "classification": "auroc_ovr",
    "multilabel": "auroc",
    "regression": "r2",
    "survival": "harrell_c",
}
"""The metric of each task that stands for all others where there is room for one."""
_WITH_SCORES = ("classification", "multilabel")
_FIGURES: tuple[tuple[str, str, Callable[["Report"], Any], tuple[str, ...]], ...] = (
    ("roc", "ROC curves", pictures.roc_figure, _WITH_SCORES),
    ("confusion", "Confusion matrix", pictures.confusion_figure, _WITH_SCORES[:1]),
    ("calibration", "Calibration curves", pictures.calibration_figure, _WITH_SCORES),
    ("scatter", "Predicted against true numbers", pictures.scatter_figure, ("regression",)),
    ("kaplan-meier", "Kaplan-Meier curves of the risk groups", pictures.kaplan_meier_figure,
     ("survival",)),
)  # fmt: skip
"""Name of the file of each picture, what it shows, how it is drawn, and of which tasks."""


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Report(Shown):
    """Report of an evaluation: results, metrics, settings. ``print(report)`` shows its table.

    Two reports can be compared with ``==``.

    Attributes:
        title: Estimator and protocol, in words.
        classes: The order of classes; names of the labels or targets; "censored" and "event" in
            survival.
        results: One for each pair of training and test cohort; a single one for a
            cross-validation and for a probe.
        sampling: Level, draws and seed of the bootstrap intervals.
        folds: The splits of a cross-validation; None otherwise.
        settings: The protocol, estimator and versions, as plain JSON.
    """

    title: str
    classes: tuple[Hashable, ...]
    results: tuple[Result, ...]
    sampling: Sampling
    folds: Folds | None = None
    settings: Mapping[str, Any]

    def __repr__(self) -> str:
        name, several = HEADLINES[self.task], len(self.results) > 1
        found = [f"{r.tested_on} " * several + self._cell(r, name) for r in self.results]
        return f"<Report of {self.title}: {self._title(name)} {', '.join(found)}>"

    def __str__(self) -> str:
        tables = map(markdown, self._tables())
        return "\n".join([self.title, "", "\n\n".join(tables), "", *self._notes()])

    def _tables(self) -> list[list[list[str]]]:
        """The table of all metrics, and those of each label or target where there are several."""
        tables = [self._rows()]
        for result in self.results if self.task in ("multilabel", "regression") else ():
            if result.of_each:
                what = "target" if self.task == "regression" else "label"
                where = f" ({result.tested_on})" if len(self.results) > 1 else ""
                titles = [TASKS[self.task][name].title.split(",")[0] for name in result.of_each]
                rows = [[f"{what}{where}", *titles]]
                for label, *estimates in zip(self.classes, *result.of_each.values(), strict=True):
                    rows.append([str(label), *map(str, estimates)])
                tables.append(rows)
        return tables

    def _notes(self) -> list[str]:
        """Sentences on cases, intervals, and metrics that are not defined."""
        notes = [
            f"{self._percent} intervals: percentiles of {self.sampling.resamples:,} bootstrap draws"
            " of patients."
        ]
        for result in self.results:
            reasons = (estimate.reason for estimate in result.estimates.values())
            notes += [f"Tested on {result.tested_on}: {reason}." for reason in reasons if reason]
        if len(self.results) == 1:
            (result,) = self.results
            counts = zip(self.classes, result.counts(), strict=True)
            listed = ", ".join(f"{label} {count:,}" for label, count in counts)
            known = " known" if self.task == "regression" else ""
            patients = len(np.unique(result.patients))
            notes.insert(0, f"{result.cases:,} cases of {patients:,} patients: {listed}{known}.")
        sizes = [(r.cases, len(np.unique(r.patients))) for r in self.results]
        if self.task == "survival" and any(patients < cases for cases, patients in sizes):
            notes.append(
                "The log-rank test takes each case for a patient of its own; for an honest p, give"
                " one case for each patient."
            )
        return list(dict.fromkeys(notes))

    @property
    def task(self) -> str:
        """The task: "classification", "multilabel", "regression" or "survival"."""
        return self.results[0].task

    def estimate(
        self, metric: str, *, trained_on: str | None = None, tested_on: str | None = None
    ) -> Estimate:
        """A metric with its interval, of the only result or of the one on these cohorts.

        Raises InputError where there is no such metric, no such result, or more than one.
        """
        self._require(metric)
        found = [
            result
            for result in self.results
            if trained_on in (None, result.trained_on) and tested_on in (None, result.tested_on)
        ]
        if len(found) != 1:
            pairs = [(result.trained_on, result.tested_on) for result in self.results]
            raise InputError(
                f"{len(found)} results were trained on {trained_on!r} and tested on {tested_on!r}"
                f" (None stands for any); choose one of these pairs: {pairs}"
            )
        return found[0].estimates[metric]

    def table(self, metric: str | None = None) -> str:
        """Markdown table of all metrics, or with `metric` the cross-institution table.

        With `metric`, rows are the cohorts trained on and columns those tested on. Without, a
        single result has a row for each metric, and several have a row each. Values are followed by
        their intervals. Raises InputError for a metric that does not exist.
        """
        if metric is None:
            return markdown(self._rows())
        self._require(metric)
        cells = {(r.trained_on, r.tested_on): self._cell(r, metric) for r in self.results}
        trained, tested = (dict.fromkeys(names) for names in zip(*cells, strict=True))
        rows = [[f"{self._title(metric)}: trained on", *(f"tested on {t}" for t in tested)]]
        rows += [[a or "–", *(cells.get((a, b), "") for b in tested)] for a in trained]
        return markdown(rows)

    def _rows(self) -> list[list[str]]:
        """The table of all metrics, the first row its head."""
        names = self._shown_metrics
        titles = [self._title(name) for name in names]
        if len(self.results) == 1:
            rows = [["metric", "value", f"{self._percent} interval"]]
            for title, name in zip(titles, names, strict=True):
                interval = self.results[0].estimates[name].interval
                rows.append([title, self._value(self.results[0], name), shown_interval(interval)])
            return rows
        rows = [["trained on", "tested on", "cases", "patients", *titles]]
        for result in self.results:
            own = " (cross-validated)" if result.trained_on == result.tested_on else ""
            sizes = f"{result.cases:,}", f"{len(np.unique(result.patients)):,}"
            values = [self._cell(result, name) for name in names]
            rows.append([result.trained_on, f"{result.tested_on}{own}", *sizes, *values])
        if not any(result.trained_on for result in self.results):
            rows = [row[1:] for row in rows]
        return rows

    def to_json(self) -> str:
        """The whole report as JSON; `from_json` restores an equal one.

        Raises InputError for classes that JSON cannot hold: others than text, numbers, bools and
        tuples of these.
        """
        content = {
            "title": self.title,
            "task": self.task,
            "classes": [_plain(label) for label in self.classes],
            "sampling": records.plain(self.sampling),
            "settings": dict(self.settings),
            "results": [_result_to_dict(result) for result in self.results],
            "folds": None if self.folds is None else self.folds.to_dict(),
        }
        return _FORMAT.dumps(content) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Report":
        """The Report from a text of `to_json`; InputError for anything else."""
        return _from_dict(_FORMAT.loads(text))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Save ``report.json`` and the pictures of the task to `folder`, which is made.

        They are ``roc.png``, ``confusion.png`` and ``calibration.png`` of classes; the first and
        the last of several labels; ``scatter.png`` of numbers; ``kaplan-meier.png`` in survival.
        Each file is whole or not there, and ``report.json`` comes last. Raises OutputError where
        they cannot be written, and MissingExtraError without matplotlib.
        """
        text, figures = self.to_json(), self._figures()
        files.make_folder(folder)
        for name, _, data in figures:
            files.write_bytes(Path(folder, f"{name}.png"), data)
        files.write_text(Path(folder) / _JSON_NAME, text)

    def _figures(self) -> list[tuple[str, str, bytes]]:
        """The pictures of the task: name, what it shows, and the bytes of a PNG file."""
        return [
            (name, shows, pictures.as_png(draw(self)))
            for name, shows, draw, tasks in _FIGURES
            if self.task in tasks
        ]

    def to_html(self, path: str | os.PathLike[str] | Url) -> None:
        """Write the report as one HTML file, which a browser shows without server or network.

        It has the tables, which sort by their columns, the pictures of `save`, and the settings.
        Raises OutputError where it cannot be written, or would replace a file that xmag did not
        write, and MissingExtraError without matplotlib.
        """
        tables = [(head, as_cells(rows)) for head, *rows in self._tables()]
        if len(self.results) == 1:
            head, cells = tables[0]
            head.append("0 to 1")
            for row, name in zip(cells, self._shown_metrics, strict=True):
                row.append(_drawn(self.results[0].estimates[name]))
        page = document(
            title="Evaluation",
            lead=self.title,
            tables=[table(head, cells) for head, cells in tables],
            notes=self._notes(),
            figures={shows: data for _, shows, data in self._figures()},
            settings=self.settings,
        )
        write_page(place_of(path), page)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "Report":
        """Load the Report from a folder of `save`; InputError where there is none."""
        return _from_dict(_FORMAT.load(Path(folder) / _JSON_NAME))

    @property
    def _percent(self) -> str:
        return f"{100 * self.sampling.level:.4g}%"

    @property
    def _metrics(self) -> list[str]:
        return [name for name in TASKS[self.task] if name in self.results[0].estimates]

    @property
    def _shown_metrics(self) -> list[str]:
        # With two classes, one AUROC, as both are equal.
        return [n for n in self._metrics if len(self.classes) > 2 or n != "auroc_ovo"]

    def _require(self, metric: str) -> None:
        if metric not in self._metrics:
            raise InputError(f"there is no metric {metric!r}; expected one of {self._metrics}")

    def _title(self, metric: str) -> str:
        if metric == "auroc_ovr" and len(self.classes) == 2:
            return f"AUROC of {self.classes[1]}"
        title = TASKS[self.task][metric].title
        several = self.task == "regression" and len(self.classes) > 1
        return f"{title}, mean over targets" if several else title

    def _value(self, result: Result, metric: str) -> str:
        value = result.estimates[metric].value
        return shown_p(value) if TASKS[self.task][metric].is_test else shown(value)

    def _cell(self, result: Result, metric: str) -> str:
        """A value with its interval, where it has one."""
        interval, value = result.estimates[metric].interval, self._value(result, metric)
        return value if interval is None else f"{value} ({shown_interval(interval)})"


def _drawn(estimate: Estimate) -> str:
    """A picture of an estimate and its interval, where both lie between 0 and 1."""
    value, interval = estimate.value, estimate.interval
    if value is None or interval is None or not 0 <= interval.low <= interval.high <= 1:
        return ""
    return interval_bar(value, interval.low, interval.high)


def markdown(rows: list[list[str]]) -> str:
    """Markdown table of rows of cells, the first of which is its head."""
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def _plain(label: Hashable) -> Any:
    if isinstance(label, tuple):
        return {"tuple": [_plain(part) for part in label]}
    if type(label) in (str, int, float, bool):
        return label
    raise InputError(
        f"class {label!r} is of {type(label).__name__}, which JSON cannot hold; use text, numbers,"
        " bools or tuples of these as labels"
    )


def _label(plain: Any) -> Hashable:
    if isinstance(plain, dict):
        return tuple(_label(part) for part in plain["tuple"])
    assert isinstance(plain, Hashable)
    return plain


def _result_to_dict(result: Result) -> dict[str, Any]:
    return {
        "trained_on": result.trained_on,
        "tested_on": result.tested_on,
        "estimates": {name: _estimate_to_dict(e) for name, e in result.estimates.items()},
        "of_each": {name: [*map(_estimate_to_dict, e)] for name, e in result.of_each.items()},
        **{name: _without_nan(getattr(result, name).tolist()) for name in ARRAYS},
    }


def _without_nan(values: Any) -> Any:
    """Nested lists of numbers with None for NaN, which JSON does not have."""
    if isinstance(values, list):
        return [_without_nan(value) for value in values]
    return None if math.isnan(values) else values


def _estimate_to_dict(estimate: Estimate) -> dict[str, Any]:
    ends = None if estimate.interval is None else list(estimate.interval)
    return {"value": estimate.value, "interval": ends, "reason": estimate.reason}


def _from_dict(content: Any) -> Report:
    with _FORMAT.reading():
        classes = tuple(_label(plain) for plain in content["classes"])
        folds = content["folds"]
        return Report(
            title=content["title"],
            classes=classes,
            results=tuple(_result(p, classes, content["task"]) for p in content["results"]),
            sampling=records.from_dict(Sampling, content["sampling"], "sampling"),
            folds=None if folds is None else Folds.from_dict(folds),
            settings=content["settings"],
        )


def _result(plain: Mapping[str, Any], classes: tuple[Hashable, ...], task: str) -> Result:
    floats = {"scores", "event_weights", "brier"}
    floats |= {"regression": {"truth", "predicted"}, "survival": {"truth"}}.get(task, set())
    arrays: dict[str, Any] = {
        name: np.array(plain[name], dtype=np.float64 if name in floats else np.int64)
        for name in ARRAYS
    }
    if task not in TASKS:
        raise ValueError(f"its task is {task!r}")
    return Result(
        task=task,
        trained_on=plain["trained_on"],
        tested_on=plain["tested_on"],
        classes=classes,
        estimates={name: _estimate(e) for name, e in plain["estimates"].items()},
        of_each={name: tuple(map(_estimate, each)) for name, each in plain["of_each"].items()},
        **arrays,
    )


def _estimate(plain: Mapping[str, Any]) -> Estimate:
    ends = plain["interval"]
    interval = None if ends is None else Interval(*ends)
    return Estimate(value=plain["value"], interval=interval, reason=plain["reason"])
