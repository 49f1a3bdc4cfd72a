"""Cross-validation and external validation: fit, predict held-out cases, report."""

import contextlib
import inspect
import itertools
import math
import numbers
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xmag.errors import InputError, not_fitted
from xmag.evaluate.extra import optional
from xmag.evaluate.folds import Folds
from xmag.evaluate.report import Report
from xmag.evaluate.results import Result, Sampling, with_estimates
from xmag.evaluate.samples import (
    OnIdentical,
    Samples,
    Trial,
    agreed_classes,
    warn_without_groups,
)
from xmag.metrics.labels import Labels, as_labels, as_scores, encode

Order = tuple[Hashable, ...]
Predictions = tuple[NDArray[np.float64], NDArray[np.int64]]
"""Scores (m, C) and predicted class indices (m,)."""


def cross_validate(
    estimator: Any,
    X: Any,  # noqa: N803 (scikit-learn's name)
    y: Labels,
    *,
    groups: Labels | None = None,
    folds: int | Folds = 5,
    repeats: int = 1,
    classes: Labels | None = None,
    ordered: bool = False,
    level: float = 0.95,
    resamples: int = 1000,
    random_state: int = 0,
    on_identical: OnIdentical = "raise",
) -> Report:
    """Cross-validation by patient: a Report with metrics and bootstrap intervals.

    Each case is predicted by a clone of `estimator` that was not fitted on its patient. Decisions
    are put together before their metrics are computed; AUROC compares scores within a split alone,
    weighted by its pairs, since scores of two models have no common scale (Forman and Scholz 2010).
    Over `repeats` values are averaged.

    Args:
        estimator: Anything with scikit-learn's `fit`, `predict_proba` and `classes_`. It is not
            changed. `groups` go to its `fit` if that takes them. Where it has `predict`, that
            decides; else the largest probability.
        X: n cases: an array, a table, or a list of bags, arrays or paths.
        y: n labels of any hashable kind.
        groups: n patients. None warns, and takes each case for a patient of its own.
        folds: The number of stratified folds by patient, or a `Folds`, such as the one of an
            earlier report.
        repeats: Repetitions of the folds; not for a `Folds`, which has its own.
        classes: The order of classes; by default, the sorted labels.
        ordered: Whether that order means something, as for grades: adds quadratic kappa.
        level: Share that the intervals hold.
        resamples: Draws of patients for the intervals.
        random_state: Seed of folds and draws. No global random state is used or changed.
        on_identical: What to do where a case to test has the features of one to fit on.

    Raises InputError for operands that do not fit each other, one class only, fewer patients than
    folds, a patient on both sides of a split or identical features there, and scores that are not
    finite; MissingExtraError without scikit-learn.
    """
    sampling = Sampling(level=level, resamples=resamples, random_state=random_state)
    data = Samples.of(X, y, groups, name="the cohort")
    order = agreed_classes([data], classes, ordered=ordered)
    if groups is None:
        warn_without_groups(stacklevel=2)
    if not isinstance(folds, Folds):
        folds = Folds.stratified(
            data.y, groups=data.groups, folds=folds, repeats=repeats, random_state=random_state
        )
    elif repeats != 1:
        raise InputError(f"repeats is {repeats}, but the folds that were given have their own")
    trials = Trial.of_folds(folds, data)
    (result,) = _run(estimator, [trials], order, on_identical=on_identical)
    number = len({split.repeat for split in folds.splits})
    times = f", {number} repeats" if number > 1 else ""
    return Report(
        title=f"Cross-validation of {_name_of(estimator)}: {len(folds)} splits{times}",
        classes=order,
        results=(with_estimates(result, ordered=ordered, sampling=sampling),),
        sampling=sampling,
        folds=folds,
        settings=settings_of("cross-validation", estimator, grouped=groups is not None),
    )


def external(
    estimator: Any,
    cohorts: Mapping[str, tuple[Any, ...]],
    *,
    train: str | Sequence[str] | None = None,
    folds: int | None = 5,
    classes: Labels | None = None,
    ordered: bool = False,
    level: float = 0.95,
    resamples: int = 1000,
    random_state: int = 0,
    on_identical: OnIdentical = "raise",
) -> Report:
    """External validation: a Report of several cohorts, the cross-institution table.

    Without `train`, `estimator` is fitted already, and is tested on each cohort. With it, a clone
    is fitted on each cohort named there and tested on all others; on its own cohort, the result is
    a cross-validation in `folds` folds, or left out where `folds` is None.

    Args:
        estimator: As `cross_validate` takes it; fitted, unless `train` is given.
        cohorts: By name, each ``(X, y)`` or ``(X, y, groups)``.
        train: The name or names of cohorts to fit on; ``train=list(cohorts)`` gives the whole
            matrix.
        folds: Of the cross-validation on the cohort that was fitted on.
        classes: The order of classes; by default that of the fitted estimator, or the labels
            sorted.
        ordered: Whether that order means something: adds quadratic kappa.
        level: Share that the intervals hold.
        resamples: Draws of patients for the intervals.
        random_state: Seed of folds and draws.
        on_identical: What to do where a case to test has the features of one to fit on.

    Raises InputError as `cross_validate` does, and for an estimator that is not fitted, a label
    that it does not know, and a patient in both the training and a test cohort. Where a cohort
    lacks a class, its AUROC is left out with the reason.
    """
    sampling = Sampling(level=level, resamples=resamples, random_state=random_state)
    parts = {name: _cohort(name, content) for name, content in cohorts.items()}
    if not parts:
        raise InputError("cohorts is empty; expected at least one, by name")
    grouped = all(part.groups is not None for part in parts.values())
    if not grouped:
        warn_without_groups(stacklevel=2)
    if train is None and classes is None and not ordered:
        classes = _classes_of(estimator)
    order = agreed_classes(list(parts.values()), classes, ordered=ordered)
    if train is None:
        fitted = Fitted(estimator=estimator, order=order)
        results = [
            result_of(order, [part], [fitted.predict(part)], trained_on="")
            for part in parts.values()
        ]
    else:
        plans = _matrix(parts, train, folds=folds, random_state=random_state)
        results = _run(estimator, plans, order, on_identical=on_identical)
    return Report(
        title=f"{_name_of(estimator)} across {len(parts)} cohort{'s' if len(parts) > 1 else ''}",
        classes=order,
        results=tuple(with_estimates(r, ordered=ordered, sampling=sampling) for r in results),
        sampling=sampling,
        settings=settings_of(
            "external cohorts",
            estimator,
            grouped=grouped,
            own_cohort_folds=None if train is None else folds,
        ),
    )


def _cohort(name: str, content: tuple[Any, ...]) -> Samples:
    if not isinstance(content, tuple) or len(content) not in (2, 3):
        raise InputError(
            f"cohort {name!r} is {type(content).__name__}; expected (X, y) or (X, y, groups)"
        )
    x, y, groups = (*content, None)[:3]
    return Samples.of(x, y, groups, name=name)


def _matrix(
    parts: Mapping[str, Samples],
    train: str | Sequence[str],
    *,
    folds: int | None,
    random_state: int,
) -> list[list[Trial]]:
    """The trials of each result: of a cohort to fit on and another, or of folds of its own."""
    names = [train] if isinstance(train, str) else list(train)
    if not names or not set(names) <= set(parts):
        raise InputError(f"train is {train!r}; expected one or more of {list(parts)}")
    plans = []
    for known in (parts[name] for name in names):
        for part in parts.values():
            if part is not known:
                plans.append([Trial.across(known, part)])
            elif folds is not None:
                own = Folds.stratified(
                    known.y, groups=known.groups, folds=folds, random_state=random_state
                )
                plans.append(Trial.of_folds(own, known))
    return plans


def _run(
    estimator: Any, plans: Sequence[Sequence[Trial]], order: Order, *, on_identical: OnIdentical
) -> list[Result]:
    """A Result, without metrics, of each list of trials; all checks come before any fit."""
    for trial in itertools.chain.from_iterable(plans):
        trial.check(order, on_identical=on_identical, stacklevel=4)
    results = []
    whole: dict[str, Fitted] = {}  # the model of a cohort, for all others that it is tested on
    for trials in plans:
        predictions = []
        for trial in trials:
            if trial.within:
                fitted = fit(estimator, trial.train, order)
            else:
                if trial.name not in whole:
                    whole = {trial.name: fit(estimator, trial.train, order)}
                fitted = whole[trial.name]
            predictions.append(fitted.predict(trial.test))
        tests, repeats = [trial.test for trial in trials], [trial.repeat for trial in trials]
        known = trials[0].train.name
        results.append(result_of(order, tests, predictions, trained_on=known, repeats=repeats))
    return results


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """A fitted estimator; `by_place` if its classes are indices into the order of classes."""

    estimator: Any
    order: Order
    by_place: bool = False

    def predict(self, data: Samples) -> Predictions:
        """Predictions of these cases, in the order of classes.

        Raises InputError for scores of the wrong shape or not finite, and for classes that the
        estimator and the order do not both know.
        """
        cases, name = data.x, _name_of(self.estimator)
        known = self._labels(_classes_of(self.estimator))
        for label in known:
            if label not in self.order:
                raise InputError(
                    f"{name} knows the class {label!r}, which is not in classes {self.order};"
                    " name all of its classes there"
                )
        for label in data.y:
            if label not in known:
                raise InputError(
                    f"{data.name} has the label {label!r}, which {name} does not know (it knows"
                    f" {known}); leave such cases out, or fit it on that class too"
                )
        scores = np.zeros((len(data), len(self.order)))
        found = self.estimator.predict_proba(cases)
        scores[:, encode(known, self.order)] = as_scores(
            found, len(data), known, name=f"the scores of {data.name}"
        )
        if not callable(getattr(self.estimator, "predict", None)):
            return scores, scores.argmax(1)
        labels = self._labels(as_labels(self.estimator.predict(cases), "what predict returned"))
        for label in labels:
            if label not in known:
                raise InputError(
                    f"{name}.predict gave {label!r}, which is not one of its classes_ {known}"
                )
        return scores, encode(labels, self.order)

    def _labels(self, found: list[Any]) -> list[Hashable]:
        """Class values of the estimator (labels, or indices where `by_place`) as labels."""
        return [self.order[int(place)] for place in found] if self.by_place else found


def fit(estimator: Any, train: Samples, order: Order) -> Fitted:
    """Fit a clone of `estimator` on these cases, and their patients if it takes `groups`."""
    for method in ("fit", "predict_proba"):
        if not callable(getattr(estimator, method, None)):
            raise InputError(
                f"{_name_of(estimator)} has no {method}; give an estimator with fit, predict_proba"
                " and classes_"
            )
    fresh = optional("sklearn.base", "cloning an estimator").clone(estimator, safe=False)
    labels, by_place = _for_fit(train.y, order)
    options = {}
    if train.groups is not None and _takes_groups(fresh):
        options["groups"] = _for_fit(train.groups, tuple(dict.fromkeys(train.groups)))[0]
    fresh.fit(train.x, labels, **options)
    return Fitted(estimator=fresh, order=order, by_place=by_place)


def _for_fit(labels: Sequence[Hashable], classes: Order) -> tuple[NDArray[Any], bool]:
    """Labels that scikit-learn accepts, and whether they are encoded as indices in `classes`.

    Text, whole numbers or bools stay as they are; labels of other types, or mixed, become indices.
    """
    if {type(label) for label in classes} in ({str}, {int}, {bool}):
        return np.array(labels), False
    return encode(labels, classes), True


def _takes_groups(estimator: Any) -> bool:
    """Whether `fit` has a parameter `groups`, or scikit-learn's metadata routing takes them."""
    if "groups" in inspect.signature(estimator.fit).parameters:
        return True
    if not optional("sklearn", "cloning an estimator").get_config()["enable_metadata_routing"]:
        return False
    routing = optional("sklearn.utils.metadata_routing", "cloning an estimator")
    return bool(routing.get_routing_for_object(estimator).consumes("fit", ["groups"]))


def result_of(
    order: Order,
    tests: Sequence[Samples],
    predictions: Sequence[Predictions],
    *,
    trained_on: str,
    repeats: Sequence[int] = (0,),
) -> Result:
    """A Result without metrics: predictions of the test cases of each split, and its repeat."""
    rows = np.concatenate([test.rows for test in tests])
    scores, predicted = map(np.concatenate, zip(*predictions, strict=True))
    whole, sizes = tests[0].whole or tests[0], [len(test) for test in tests]
    patients = whole.rows
    if whole.groups is not None:
        patients = encode(whole.groups, dict.fromkeys(whole.groups))
    return Result(
        trained_on=trained_on,
        tested_on=whole.name,
        classes=order,
        rows=rows,
        truth=encode(whole.y, order)[rows],
        predicted=predicted,
        scores=scores,
        # Without gaps, where folds do not test every patient.
        patients=np.unique(patients[rows], return_inverse=True)[1],
        splits=np.repeat(np.arange(len(sizes)), sizes),
        repeats=np.repeat(repeats, sizes),
        estimates={},
        class_aurocs=(),
    )


def _classes_of(estimator: Any) -> list[Hashable]:
    """The classes of a fitted estimator, in its order; InputError where it is not fitted."""
    found = getattr(estimator, "classes_", None)
    if found is None:
        raise not_fitted(
            f"{_name_of(estimator)} has no classes_, so it is not fitted; fit it first, or name the"
            " cohort to fit it on with train="
        )
    return as_labels(found, "classes_")


def _name_of(estimator: Any) -> str:
    """The name of an estimator in messages and titles: its class."""
    return type(estimator).__name__


def settings_of(
    protocol: str, estimator: Any, *, grouped: bool, **more: str | int | float | None
) -> dict[str, Any]:
    """Settings of a report: protocol, estimator and package versions, as plain JSON."""
    parameters = {}
    if hasattr(estimator, "get_params"):
        for name, value in estimator.get_params(deep=False).items():
            plain = value.item() if isinstance(value, np.generic) else value
            fits = plain is None or isinstance(plain, str | bool | numbers.Real)
            if fits and not (isinstance(plain, float) and not math.isfinite(plain)):
                parameters[name] = plain
    versions = {}
    for package in ("xmag", "numpy", "scikit-learn"):
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return {
        "protocol": protocol,
        "estimator": _name_of(estimator),
        "parameters": parameters,
        "patients_separated": grouped,
        "versions": versions,
        **more,
    }
