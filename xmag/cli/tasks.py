"""Tasks of the command line: what flags and rows say of each, and its predictions in words."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from xmag import records
from xmag.errors import InputError
from xmag.files import Row, write_text
from xmag.mil import MILClassifier, MILRegressor, MILSurvival, load_estimator
from xmag.mil.estimator import MILEstimator

Estimator = MILEstimator[Any]
Task = Literal["classification", "regression", "survival"]
Value = tuple[str | float, ...]
"""Values of a row in the columns of a target."""

ESTIMATORS: dict[str, type[Estimator]] = {
    "classification": MILClassifier,
    "regression": MILRegressor,
    "survival": MILSurvival,
}
_TASK_OF = {
    "ordinal": "classification",
    "time": "survival",
    "event": "survival",
    "loss": "survival",
}
"""Tasks of the flags that belong to one alone."""
_TARGET_NAME = "target.json"
_FORMAT = records.Format(
    name="xmag.Target", version=1, writer="xmag train", remedy="train again, or remove the file"
)
_TRUTHS = {"1": 1, "true": 1, "1.0": 1, "0": 0, "false": 0, "0.0": 0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Target(records.Record):
    """The columns of what is predicted, by the task: labels, numbers, or an event and its time.

    Several columns of a classification are labels of their own (0 or 1); `ordinal` classes are
    whole numbers.
    """

    task: Task = "classification"
    columns: tuple[str, ...] = ("label",)
    ordinal: bool = False

    def save(self, folder: str) -> None:
        """Write it into the folder of an estimator, for the commands that use that."""
        text = _FORMAT.dumps(self.to_dict(), indent=2)
        write_text(Path(folder) / _TARGET_NAME, text + "\n")

    @classmethod
    def load(cls, folder: str) -> Self | None:
        """The target of an estimator that `xmag train` wrote; None for one trained in Python."""
        path = Path(folder) / _TARGET_NAME
        return cls.from_dict(_FORMAT.load(path)) if path.is_file() else None

    def value(self, row: Row) -> Value:
        """The target's values in a row; InputError, which names its line, where they make no sense.

        With several numbers, one that is missing is NaN.
        """
        if self.task == "survival":
            event, time = self.columns
            found = _number(row, time)
            if found < 0:
                raise _strange(row, time, "a time from 0 on")
            return _truth(row, event), found
        if self.task == "regression":
            several = len(self.columns) > 1
            numbers = [_number(row, c) if row.get(c) or not several else math.nan
                       for c in self.columns]  # fmt: skip
            if all(map(math.isnan, numbers)):
                raise InputError(
                    f"line {row.line} of {row.table!r} has none of {', '.join(self.columns)};"
                    " expected a number in one of them or more: fill it in, or remove the line"
                )
            return tuple(numbers)
        if len(self.columns) > 1:
            return tuple(_truth(row, column) for column in self.columns)
        (column,) = self.columns
        if self.ordinal and not _number(row, column).is_integer():
            raise _strange(row, column, "a whole number, as --ordinal orders classes by it")
        return (_number(row, column),) if self.ordinal else (row.required(column),)

    def array(self, values: Sequence[Value]) -> Any:
        """The y of `fit`: a list of labels, an array of numbers, or (event, time)."""
        if self.task == "survival":
            return np.array(values, dtype=[("event", np.bool_), ("time", np.float64)])
        if len(self.columns) > 1:
            return np.array(values, np.float64 if self.task == "regression" else np.int64)
        if self.task == "regression":
            return np.array([number for (number,) in values], np.float64)
        return [int(label) if self.ordinal else label for (label,) in values]

    def summary(self, values: Sequence[Value]) -> str:
        """Summary of the cases in words: how many are of each class, or what they span."""
        table = list(zip(*values, strict=True))
        if self.task == "survival":
            return f"{sum(table[0]):,} events, {_span('time', table[1])}"
        if self.task == "regression":
            return ", ".join(map(_span, self.columns, table))
        if len(self.columns) > 1:
            return ", ".join(f"{c} {sum(v)}" for c, v in zip(self.columns, table, strict=True))
        labels = self.array(values)
        return ", ".join(f"{label} {labels.count(label)}" for label in sorted({*labels}))


def _strange(row: Row, column: str, expected: str) -> InputError:
    return InputError(
        f"line {row.line} of {row.table!r} has {row.get(column)!r} as its {column}; expected"
        f" {expected}"
    )


def _number(row: Row, column: str) -> float:
    text = row.required(column)
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise _strange(row, column, "a number, with a decimal point")
    return number


def _truth(row: Row, column: str) -> int:
    found = _TRUTHS.get(row.required(column).casefold())
    if found is None:
        raise _strange(row, column, "1 or true where it is so (it happened), else 0 or false")
    return found


def _span(name: str, numbers: Sequence[Any]) -> str:
    known = [number for number in numbers if not math.isnan(number)]
    missing = len(numbers) - len(known)
    ends = f"{min(known):g} to {max(known):g}" if known else "unknown"
    return f"{name} {ends}" + (f" ({missing:,} missing)" if missing and known else "")


def target_of(options: dict[str, Any]) -> tuple[Target, dict[str, Any]]:
    """The target that flags describe, and the other options, which are the estimator's.

    Raises InputError for a flag of another task.
    """
    rest = dict(options)
    task = rest.pop("task", "classification")
    for name, of in _TASK_OF.items():
        if name in rest and task != of:
            raise InputError(f"--{name} is for --task {of}, but the task is {task}; leave it out")
    if task == "survival" and "label" in rest:
        raise InputError("--label is not for --task survival; name its columns: --event, --time")
    columns = rest.pop("label", ["label"])
    if task == "survival":
        columns = [rest.pop("event", "event"), rest.pop("time", "time")]
    ordered = rest.pop("ordinal", None)
    if ordered is not None:
        if len(columns) > 1:
            raise InputError(f"--ordinal is for one column, but --label has {', '.join(columns)}")
        rest["ordinal"] = ordered or True  # the order of names, or that of numbers
    return Target(task=task, columns=tuple(columns), ordinal=ordered == []), rest


def saved_target(
    classifier: str, options: dict[str, Any], *, device: str = "auto"
) -> tuple[Estimator, Target]:
    """A saved estimator, and the target it was trained for, with the columns of the options."""
    loaded = load_estimator(classifier, device=device)
    task = next(task for task, kind in ESTIMATORS.items() if isinstance(loaded, kind))
    saved = Target.load(classifier)
    known: dict[str, Any] = {} if saved is None else {"label": saved.columns}
    if saved is not None and task == "survival":
        known = dict(zip(("event", "time"), saved.columns, strict=True))
    target, _ = target_of({**known, **options, "task": task})
    return loaded, target if saved is None else replace(saved, columns=target.columns)


def classes_of(target: Target, options: dict[str, Any]) -> dict[str, Any]:
    """The order of classes, or the names of several labels or of numbers, for an evaluation."""
    if isinstance(order := options.get("ordinal"), list):
        return {"classes": order, "ordered": True}
    named = target.task == "regression" or (len(target.columns) > 1 and target.task != "survival")
    return {"classes": target.columns} if named else {}


def own_labels(estimator: Estimator, y: Any) -> Any:
    """The labels as the classifier has them: one trained in Python may have numbers."""
    if not isinstance(estimator, MILClassifier) or isinstance(y, np.ndarray):
        return y
    own = {str(label): label for label in estimator.classes_.tolist()}
    known = [str(label) for label in y]
    if unknown := sorted({*known} - {*own}):
        raise InputError(
            f"the cohort has the label {unknown[0]!r}, but the classifier knows {sorted(own)};"
            " expected the same names: change the CSV"
        )
    return [own[label] for label in known]


class Predictions(NamedTuple):
    """Predictions of cases: columns of text by their names, and each case in words."""

    columns: dict[str, list[str]]
    words: list[str]


def predictions(
    estimator: Estimator,
    cases: Sequence[Any],
    *,
    target: Target | None = None,
    times: Sequence[float] | None = None,
) -> Predictions:
    """Predictions of cases, as the estimator's task has them.

    The `target` names several numbers or labels (which have numbers from 1 on without it); `times`
    are those at which survival is asked for (by default quarters of what the training knows of).
    Raises InputError for `times` of another task, or beyond the training's.
    """
    if isinstance(estimator, MILSurvival):
        return _of_survival(estimator, cases, times)
    if times is not None:
        raise InputError(f"--times is for survival, but this is a {type(estimator).__name__}")
    if isinstance(estimator, MILRegressor):
        table = estimator.predict(cases).reshape(len(cases), -1)
        return _of_numbers(table, _named(target, table.shape[1]))
    assert isinstance(estimator, MILClassifier)  # there is no other
    probabilities = estimator.predict_proba(cases)
    if estimator.predict([]).ndim > 1:
        return _of_labels(probabilities, _named(target, probabilities.shape[1]))
    return _of_classes(probabilities, [str(label) for label in estimator.classes_.tolist()])


def _of_classes(probabilities: NDArray[np.float64], classes: Sequence[str]) -> Predictions:
    chosen = [classes[row.argmax()] for row in probabilities]
    columns = {"prediction": chosen}
    for label, column in zip(classes, probabilities.T, strict=True):
        columns[f"probability {label}"] = [f"{p:.6f}" for p in column]
    words = []
    for label, row in zip(chosen, probabilities, strict=True):
        each = ", ".join(f"{c} {p:.3f}" for c, p in zip(classes, row, strict=True))
        words.append(f"{label} ({each})")
    return Predictions(columns, words)


def _of_labels(probabilities: NDArray[np.float64], names: Sequence[str]) -> Predictions:
    columns = {}
    for name, column in zip(names, probabilities.T, strict=True):
        columns[f"prediction {name}"] = [str(int(p > 0.5)) for p in column]
        columns[f"probability {name}"] = [f"{p:.6f}" for p in column]
    words = [
        ", ".join(f"{name} {int(p > 0.5)} ({p:.3f})" for name, p in zip(names, row, strict=True))
        for row in probabilities
    ]
    return Predictions(columns, words)


def _of_numbers(table: NDArray[np.float64], names: Sequence[str]) -> Predictions:
    if len(names) == 1:
        names = [""]
    columns = {
        f"prediction {name}".rstrip(): [f"{number:.6g}" for number in column]
        for name, column in zip(names, table.T, strict=True)
    }
    words = [
        ", ".join(f"{name} {number:.4g}".lstrip() for name, number in zip(names, row, strict=True))
        for row in table
    ]
    return Predictions(columns, words)


def _of_survival(
    estimator: MILSurvival, cases: Sequence[Any], times: Sequence[float] | None
) -> Predictions:
    risks = estimator.predict(cases)
    functions = estimator.predict_survival_function(cases)
    if times is None:
        end = functions[0].domain[1] if functions else 0.0
        times = [float(f"{share * end:.2g}") for share in (0.25, 0.5, 0.75)]
    shares = np.array([function(times) for function in functions]).reshape(-1, len(times))
    columns = {"risk": [f"{risk:.6f}" for risk in risks]}
    for time, column in zip(times, shares.T, strict=True):
        columns[f"survival at {time:g}"] = [f"{share:.6f}" for share in column]
    words = []
    for risk, row in zip(risks, shares, strict=True):
        each = ", ".join(f"{share:.3f} at {time:g}" for time, share in zip(times, row, strict=True))
        words.append(f"risk {risk:.3f}, survival {each}")
    return Predictions(columns, words)


def _named(target: Target | None, count: int) -> Sequence[str]:
    """The names of the target's columns, if they are as many as wanted, else numbers from 1 on."""
    if target is not None and len(target.columns) == count:
        return target.columns
    return [str(number) for number in range(1, count + 1)]
