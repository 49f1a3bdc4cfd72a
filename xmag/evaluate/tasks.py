"""Tasks: how each reads y, makes folds, and turns what an estimator predicts into a result."""

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from xmag.errors import InputError, not_fitted
from xmag.evaluate.folds import Folds
from xmag.metrics.labels import Labels, as_labels, as_scores, class_order, encode, refuse_continuous
from xmag.metrics.regression import as_numbers
from xmag.metrics.survival import Survival, as_survival, brier_errors, censoring_weights

if TYPE_CHECKING:
    from xmag.evaluate.samples import Samples

Order = tuple[Hashable, ...]
Predictions = Mapping[str, NDArray[Any]]
"""Arrays of a Result by their names: predicted and scores, and what else the task has."""

_STRATA = 4
"""Quarters of a number to predict, which are spread over the folds."""
_BRIER_TIMES = 100
_BRIER_SHARES = (0.1, 0.9)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """A fitted estimator, and the order of classes, labels or targets.

    `by_place` is whether the classes of the estimator are indices in `order`; `known` what the task
    keeps of the cases that it was fitted on, None where they are not known.
    """

    estimator: Any
    order: Order
    by_place: bool = False
    known: Any = None


class Task(ABC):
    """Base of tasks of prediction; their metrics are in `xmag.metrics.bootstrap.TASKS`."""

    name: ClassVar[str]
    methods: ClassVar[tuple[str, ...]] = ("fit", "predict")
    """Methods that an estimator has to have."""

    @abstractmethod
    def read(self, y: Any, name: str, n: int) -> Any:
        """Checked `y`: a tuple of labels, or an array (n, ...)."""

    def strata(self, y: Any, folds: int) -> NDArray[np.int64] | None:  # noqa: ARG002
        """Strata to spread evenly over `folds`, int64 (n,); None where there are none."""
        return None

    def folds(self, y: Any, groups: Labels | None, folds: int, **options: int) -> Folds:
        """Folds by patient; `options` are `repeats` and `random_state`."""
        patients = range(len(y)) if groups is None else groups
        return Folds.by_patient(patients, strata=self.strata(y, folds), folds=folds, **options)

    def order(self, parts: "Sequence[Samples]", names: Labels | None) -> Order:
        """Names of targets or labels: as given, or of the columns of a table, or their numbers."""
        counts = {part.name: _table(part.y).shape[1] for part in parts}
        if len(set(counts.values())) > 1:
            raise InputError(f"y has as many columns as {counts}; expected the same in all cohorts")
        count = counts[parts[0].name]
        if names is None:
            named = parts[0].columns or ()
            return named if len(named) == count else ("y",) if count == 1 else tuple(range(count))
        found = tuple(as_labels(names, "classes"))
        if not len(set(found)) == len(found) == count:
            raise InputError(
                f"classes is {found}, but y has {count} columns; expected a different name for each"
            )
        return found

    @abstractmethod
    def lacking(self, y: Any, order: Order) -> str | None:
        """Why these cases cannot be fitted on; None where they can."""

    def fitted_on(self, y: Any) -> NDArray[np.int64]:
        """The cases of `y` from which something can be learned."""
        return np.arange(len(y))

    def truth(self, y: Any, order: Order) -> NDArray[Any]:  # noqa: ARG002
        """The truth as a Result has it."""
        return _table(y)

    def known(self, estimator: Any, x: Any, y: Any) -> Any:  # noqa: ARG002
        """Facts of the cases fitted on that predictions need; None by default."""
        return None

    @abstractmethod
    def predict(self, fitted: Fitted, data: "Samples") -> Predictions:
        """Checked predictions of a fitted estimator; InputError for others."""


class _Classification(Task):
    """One of several classes, ordered or not."""

    name = "classification"
    methods = ("fit", "predict_proba")

    def read(self, y: Any, name: str, n: int) -> tuple[Hashable, ...]:
        labels = as_labels(y, name, n=n)
        refuse_continuous(labels, name)
        return tuple(labels)

    def folds(self, y: Any, groups: Labels | None, folds: int, **options: int) -> Folds:
        return Folds.stratified(y, groups=groups, folds=folds, **options)

    def order(self, parts: "Sequence[Samples]", names: Labels | None) -> Order:
        order = class_order([label for part in parts for label in part.y], names, name="y")
        for part in parts:
            if len(set(part.y)) < 2:
                raise InputError(
                    f"{part.name} has one class only: all {len(part)} cases are {part.y[0]!r};"
                    " expected cases of at least two classes"
                )
        return order

    def lacking(self, y: Any, order: Order) -> str | None:
        for label in order:
            if label not in y:
                return (
                    f"there is no case of class {label!r} to fit on; give fewer folds, or leave"
                    " that class out"
                )
        return None

    def truth(self, y: Any, order: Order) -> NDArray[np.int64]:
        return encode(y, order)

    def predict(self, fitted: Fitted, data: "Samples") -> Predictions:
        """Scores (n, C) and predicted classes (n,)."""
        estimator, order = fitted.estimator, fitted.order
        name, x, n = data.name, data.x, len(data)

        def labelled(found: list[Any]) -> list[Hashable]:
            return [order[int(place)] for place in found] if fitted.by_place else found

        known, who = labelled(classes_of(estimator)), name_of(estimator)
        for label in known:
            if label not in order:
                raise InputError(
                    f"{who} knows the class {label!r}, which is not in classes {order};"
                    " name all of its classes there"
                )
        for label in data.y:
            if label not in known:
                raise InputError(
                    f"{name} has the label {label!r}, which {who} does not know (it knows"
                    f" {known}); leave such cases out, or fit it on that class too"
                )
        scores, found = np.zeros((n, len(order))), estimator.predict_proba(x)
        scores[:, encode(known, order)] = as_scores(found, n, known, name=f"the scores of {name}")
        if not callable(getattr(estimator, "predict", None)):
            return {"scores": scores, "predicted": scores.argmax(1)}
        labels = labelled(as_labels(estimator.predict(x), "what predict returned"))
        for label in labels:
            if label not in known:
                raise InputError(f"{who}.predict gave {label!r}, none of its classes_ {known}")
        return {"scores": scores, "predicted": encode(labels, order)}


class _MultiLabel(Task):
    """Several labels, each there or not."""

    name = "multilabel"
    methods = ("fit", "predict_proba")

    def read(self, y: Any, name: str, n: int) -> NDArray[np.int64]:
        array = np.asarray(y)
        if array.ndim != 2 or len(array) != n or not np.isin(array, (0, 1)).all():
            raise InputError(
                f"{name} has shape {array.shape} for {n} cases, or values other than 0 and 1;"
                " expected a matrix of 0 and 1, (cases, labels)"
            )
        return array.astype(np.int64)

    def lacking(self, y: Any, order: Order) -> str | None:
        for label, column in zip(order, y.T, strict=True):
            if len(np.unique(column)) < 2:
                return (
                    f"all cases to fit on have {column[0]} of label {label!r}; give fewer folds, or"
                    " leave that label out"
                )
        return None

    def truth(self, y: Any, order: Order) -> NDArray[np.int64]:  # noqa: ARG002
        return np.asarray(y, np.int64)

    def predict(self, fitted: Fitted, data: "Samples") -> Predictions:
        """Scores (n, L) and decisions (n, L), 0 or 1; scikit-learn's lists of (n, 2) are read."""
        estimator, order, x = fitted.estimator, fitted.order, data.x
        found = estimator.predict_proba(x)
        if isinstance(found, list):
            if any(np.ndim(part) != 2 or np.shape(part)[1] != 2 for part in found):
                raise InputError(
                    f"{name_of(estimator)}.predict_proba gave {[np.shape(p) for p in found]};"
                    f" expected (cases, 2) of each of {len(order)} labels"
                )
            found = np.stack([np.asarray(part)[:, 1] for part in found], axis=1)
        scores = finite(found, (len(data), len(order)), f"the scores of {data.name}")
        if not callable(getattr(estimator, "predict", None)):
            return {"scores": scores, "predicted": (scores >= 0.5).astype(np.int64)}
        decided = finite(estimator.predict(x), scores.shape, f"the labels of {data.name}")
        return {"scores": scores, "predicted": decided.astype(np.int64)}


class _Regression(Task):
    """Numbers, of which some may be missing (NaN)."""

    name = "regression"

    def read(self, y: Any, name: str, n: int) -> NDArray[np.float64]:
        return as_numbers(y, n, name)

    def strata(self, y: Any, folds: int) -> NDArray[np.int64] | None:
        """Quarters of a single target; cases without it are spread too."""
        table = _table(y)
        if table.shape[1] > 1:
            return None
        known = ~np.isnan(table[:, 0])
        parts = max(1, min(_STRATA, int(known.sum()) // folds))
        codes = np.full(len(table), parts)
        place = np.argsort(np.argsort(table[known, 0], kind="stable"), kind="stable")
        codes[known] = place * parts // max(known.sum(), 1)
        return codes

    def lacking(self, y: Any, order: Order) -> str | None:
        for label, column in zip(order, _table(y).T, strict=True):
            if (count := len(np.unique(column[~np.isnan(column)]))) < 2:
                return (
                    f"the cases to fit on have {count} different known values of target {label!r};"
                    " expected two or more: give fewer folds, or leave that target out"
                )
        return None

    def fitted_on(self, y: Any) -> NDArray[np.int64]:
        return np.flatnonzero(~np.isnan(_table(y)).all(1))

    def predict(self, fitted: Fitted, data: "Samples") -> Predictions:
        """Predicted numbers (n, T)."""
        found, shape = _table(fitted.estimator.predict(data.x)), (len(data), len(fitted.order))
        predicted = finite(found, shape, f"the predictions of {data.name}")
        return {"predicted": predicted, "scores": np.zeros((len(data), 0))}


class _SurvivalTime(Task):
    """Times to an event, which may be censored: the risk, and the share without an event."""

    name = "survival"

    def read(self, y: Any, name: str, n: int) -> Any:
        """A structured array of event and time, (n,), as scikit-survival takes it."""
        seen = as_survival(y, name)
        if len(seen) != n:
            raise InputError(f"{name} has {len(seen)} entries for {n} cases")
        if np.asarray(y).dtype.names is not None:
            return np.asarray(y)
        array = np.empty(n, dtype=[("event", bool), ("time", np.float64)])
        array["event"], array["time"] = seen.event, seen.time
        return array  # scikit-survival takes nothing else

    def strata(self, y: Any, folds: int) -> NDArray[np.int64]:  # noqa: ARG002
        return as_survival(y).event.astype(np.int64)

    def order(self, parts: "Sequence[Samples]", names: Labels | None) -> Order:  # noqa: ARG002
        if names is not None:
            raise InputError("classes is given, but there are none in survival; leave it out")
        return ("censored", "event")

    def lacking(self, y: Any, order: Order) -> str | None:  # noqa: ARG002
        if as_survival(y).event.any():
            return None
        return "no case to fit on has an event; give fewer folds, or cases with one"

    def truth(self, y: Any, order: Order) -> NDArray[np.float64]:  # noqa: ARG002
        seen = as_survival(y)
        return np.stack([seen.event, seen.time], axis=1).astype(np.float64)

    def predict(self, fitted: Fitted, data: "Samples") -> Predictions:
        """Risks (n, 1), risk groups, and what compares them with the cases fitted on.

        Where those are not known, the groups are cut at the median of these cases, and the
        censoring is theirs.
        """
        estimator, seen, x = fitted.estimator, as_survival(data.y), data.x
        risk = _risks(estimator, x, len(data), f"the risks of {data.name}")
        train, cut = fitted.known or (seen, float(np.median(risk)))
        try:
            weights = censoring_weights(seen, train)
        except InputError:  # the last of the training are censored: nothing is known from there on
            weights = censoring_weights(seen, train, tau=float(train.time.max()))
        return {
            "scores": risk[:, None],
            "predicted": (risk > cut).astype(np.int64),
            "event_weights": weights**2,
            "brier": _brier_parts(estimator, x, seen, train),
        }

    def known(self, estimator: Any, x: Any, y: Any) -> tuple[Survival, float]:
        """The times, and the median of the risks."""
        risk = _risks(estimator, x, len(y), "the risks of the cases fitted on")
        return as_survival(y), float(np.median(risk))


def _risks(estimator: Any, x: Any, n: int, name: str) -> NDArray[np.float64]:
    """Risks (n,): what is predicted, or minus that of scikit-survival's models of the time."""
    found = finite(estimator.predict(x), (n,), name)
    own = getattr(estimator, "best_estimator_", estimator)  # of a GridSearchCV
    return found if getattr(own, "_predict_risk_score", True) else -found


def _brier_parts(estimator: Any, x: Any, seen: Survival, train: Survival) -> NDArray[np.float64]:
    """Each case's part of the integrated Brier score, (n,); NaN where it cannot be known."""
    missing = np.full(len(seen), np.nan)
    if not callable(getattr(estimator, "predict_survival_function", None)):
        return missing
    functions = estimator.predict_survival_function(x)
    domains = [getattr(one, "domain", (one.x[0], one.x[-1])) for one in functions]
    low, high = np.quantile(seen.time, _BRIER_SHARES)
    low = max([low, *(first for first, _ in domains)])
    # Below the last times, at which nobody is observed any longer.
    ends = (math.nextafter(each.time.max(), 0) for each in (seen, train))
    high = min([high, *ends, *(last for _, last in domains)])
    if low >= high:
        return missing
    times = np.linspace(low, high, _BRIER_TIMES)
    predicted = np.stack([np.asarray(one(times), np.float64) for one in functions])
    errors = brier_errors(seen, predicted, times, train)
    return np.asarray(np.trapezoid(errors, times, axis=1) / (high - low))


CLASSIFICATION: Task = _Classification()


def task_of(estimator: Any, y: Any) -> Task:
    """The task of an estimator and labels.

    Survival where it predicts survival functions, or `y` has two fields; regression where it is a
    regressor of scikit-learn's; multi-label where `y` is a matrix of 0 and 1; else classification.
    """
    fields = getattr(getattr(y, "dtype", None), "names", None)
    if fields is not None or hasattr(estimator, "predict_survival_function"):
        return _SurvivalTime()
    tags = getattr(estimator, "__sklearn_tags__", None)
    kind = getattr(estimator, "_estimator_type", None) if tags is None else tags().estimator_type
    if kind == "regressor":
        return _Regression()
    if hasattr(y, "shape") or (isinstance(y, list) and y and isinstance(y[0], list)):
        array = np.asarray(y)
        is_matrix = array.ndim == 2 and array.shape[1] > 1 and array.dtype.kind in "biuf"
        if is_matrix and np.isin(array, (0, 1)).all():
            return _MultiLabel()
    return CLASSIFICATION


def for_fit(labels: Sequence[Hashable], classes: Order) -> tuple[NDArray[Any], bool]:
    """Labels that scikit-learn accepts, and whether they are encoded as indices in `classes`.

    Text, whole numbers or bools stay as they are; labels of other types, or mixed, become indices.
    """
    if {type(label) for label in classes} in ({str}, {int}, {bool}):
        return np.array(labels), False
    return encode(labels, classes), True


def classes_of(estimator: Any) -> list[Hashable]:
    """The classes of a fitted estimator, in its order; InputError where it is not fitted."""
    found = getattr(estimator, "classes_", None)
    if found is None:
        raise not_fitted(
            f"{name_of(estimator)} has no classes_, so it is not fitted; fit it first, or name the"
            " cohort to fit it on with train="
        )
    return as_labels(found, "classes_")


def name_of(estimator: Any) -> str:
    """The name of an estimator in messages and titles: its class."""
    return type(estimator).__name__


def finite(found: Any, shape: tuple[int, ...], name: str) -> NDArray[np.float64]:
    """Numbers of a shape, float64; InputError for another one, and what is not finite."""
    array = np.asarray(found, dtype=np.float64)
    if array.shape != shape:
        raise InputError(
            f"{name} have shape {array.shape}; expected {shape}: an estimator of that task, and"
            " fitted on as many labels or targets"
        )
    if bad := int((~np.isfinite(array)).sum()):
        raise InputError(f"{name} hold {bad} values that are not finite; expected numbers")
    return array


def _table(y: Any) -> NDArray[np.float64]:
    array = np.asarray(y, np.float64)
    return array[:, None] if array.ndim == 1 else array
