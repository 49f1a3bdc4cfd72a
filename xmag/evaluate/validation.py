"""Cross-validation and external validation: fit, predict held-out cases, report."""

import contextlib
import inspect
import itertools
import math
import numbers
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from xmag.errors import InputError
from xmag.evaluate.extra import optional
from xmag.evaluate.folds import Folds
from xmag.evaluate.report import Report
from xmag.evaluate.results import Result, Sampling, with_estimates
from xmag.evaluate.samples import OnIdentical, Samples, Trial, agreed_classes, warn_without_groups
from xmag.evaluate.tasks import (
    CLASSIFICATION,
    Fitted,
    Order,
    Predictions,
    Task,
    classes_of,
    for_fit,
    name_of,
    task_of,
)
from xmag.metrics.labels import Labels, encode


def cross_validate(
    estimator: Any,
    X: Any,  # noqa: N803 (scikit-learn's name)
    y: Labels | ArrayLike,
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
    and numbers are put together before their metrics are computed; AUROC, average precision and C
    compare scores within a split alone, weighted by its pairs (average precision by its positive
    cases), since scores of two models have no common scale (Forman and Scholz 2010), and
    correlations are means over splits by their cases. Over `repeats` values are averaged.

    The task is survival where `estimator` has `predict_survival_function` or `y` is structured,
    regression where it is a regressor, multi-label where `y` is a matrix of 0 and 1, else
    classification.

    Args:
        estimator: Anything with scikit-learn's `fit`, and `predict_proba` and `classes_`
            (classification), `predict_proba` (multi-label), or `predict` (numbers, or the risk).
            It is not changed. `groups` go to its `fit` if that takes them. Where a classifier has
            `predict`, that decides; else the largest probability.
        X: n cases: an array, a table, or a list of bags, arrays or paths, and of lists of them,
            which are the slides of a patient.
        y: n labels of any hashable kind; a matrix (n, L) of 0 and 1; numbers (n,) or (n, T), NaN
            where missing; or (event, time), as a structured array or two columns.
        groups: n patients. None warns, and takes each case for a patient of its own.
        folds: The number of folds by patient, stratified by class, by event, or by the quarters of
            a single number; or a `Folds`, such as the one of an earlier report, or of a table.
        repeats: Repetitions of the folds; not for a `Folds`, which has its own.
        classes: The order of classes; by default, the sorted labels. The names of labels or
            targets; by default, those of the columns of a table, or their numbers.
        ordered: Whether that order means something, as for grades: adds quadratic kappa. So it is
            for an estimator with an `ordinal` that is True, or the classes in their order.
        level: Share that the intervals hold.
        resamples: Draws of patients for the intervals.
        random_state: Seed of folds and draws. No global random state is used or changed.
        on_identical: What to do where a case to test has the features of one to fit on.

    Raises InputError for operands that do not fit each other, one class only, fewer patients than
    folds, a split without an event or a class to fit on, a patient on both sides of a split or
    identical features there, and scores that are not finite; MissingExtraError without
    scikit-learn.
    """
    sampling = Sampling(level=level, resamples=resamples, random_state=random_state)
    data = Samples.of(X, y, groups, name="the cohort", task=task_of(estimator, y))
    classes, ordered = _order_of(estimator, [data], classes, ordered=ordered)
    order = agreed_classes([data], classes, ordered=ordered)
    if groups is None:
        warn_without_groups(stacklevel=2)
    if not isinstance(folds, Folds):
        seeds = {"repeats": repeats, "random_state": random_state}
        folds = data.task.folds(data.y, data.groups, folds, **seeds)
    elif repeats != 1:
        raise InputError(f"repeats is {repeats}, but the folds that were given have their own")
    (result,) = _run(estimator, [Trial.of_folds(folds, data)], order, on_identical=on_identical)
    number = len({split.repeat for split in folds.splits})
    times = f", {number} repeats" if number > 1 else ""
    settings = settings_of("cross-validation", estimator, data.task, grouped=groups is not None)
    return Report(
        title=f"Cross-validation of {name_of(estimator)}: {len(folds)} splits{times}",
        classes=order,
        results=(with_estimates(result, ordered=ordered, sampling=sampling),),
        sampling=sampling,
        folds=folds,
        settings=settings,
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
    a cross-validation in `folds` folds, or left out where `folds` is None. In survival, a model
    that is fitted already has no training cases here: risk groups are then cut at the median risk
    of each cohort, whose own censoring weighs Uno's C and the Brier score.

    Args:
        estimator: As `cross_validate` takes it; fitted, unless `train` is given.
        cohorts: By name, each ``(X, y)`` or ``(X, y, groups)``.
        train: The name or names of cohorts to fit on; ``train=list(cohorts)`` gives the whole
            matrix.
        folds: Of the cross-validation on the cohort that was fitted on.
        classes: As for `cross_validate`; by default those of a fitted estimator.
        ordered: As for `cross_validate`.
        level: Share that the intervals hold.
        resamples: Draws of patients for the intervals.
        random_state: Seed of folds and draws.
        on_identical: What to do where a case to test has the features of one to fit on.

    Raises InputError as `cross_validate` does, and for an estimator that is not fitted, a label
    that it does not know, and a patient in both the training and a test cohort. Where a cohort
    lacks a class, its AUROC is left out with the reason.
    """
    sampling = Sampling(level=level, resamples=resamples, random_state=random_state)
    if not cohorts:
        raise InputError("cohorts is empty; expected at least one, by name")
    parts: list[Samples] = []
    for name, content in cohorts.items():
        if not isinstance(content, tuple) or len(content) not in (2, 3):
            kind = type(content).__name__
            raise InputError(f"cohort {name!r} is {kind}; expected (X, y) or (X, y, groups)")
        x, y, groups = (*content, None)[:3]
        task = parts[0].task if parts else task_of(estimator, y)
        parts.append(Samples.of(x, y, groups, name=name, task=task))
    task = parts[0].task
    grouped = all(part.groups is not None for part in parts)
    if not grouped:
        warn_without_groups(stacklevel=2)
    if train is None and classes is None and not ordered and task.name == "classification":
        classes = classes_of(estimator)
    classes, ordered = _order_of(estimator, parts, classes, ordered=ordered)
    order = agreed_classes(parts, classes, ordered=ordered)
    if train is None:
        fitted = Fitted(estimator=estimator, order=order)
        results = [
            result_of(order, [part], [task.predict(fitted, part)], trained_on="") for part in parts
        ]
    else:
        plans = _matrix(parts, train, folds=folds, random_state=random_state)
        results = _run(estimator, plans, order, on_identical=on_identical)
    own = None if train is None else folds
    return Report(
        title=f"{name_of(estimator)} across {len(parts)} cohort{'s' if len(parts) > 1 else ''}",
        classes=order,
        results=tuple(with_estimates(r, ordered=ordered, sampling=sampling) for r in results),
        sampling=sampling,
        settings=settings_of(
            "external cohorts", estimator, task, grouped=grouped, own_cohort_folds=own
        ),
    )


def _order_of(
    estimator: Any, parts: Sequence[Samples], classes: Labels | None, *, ordered: bool
) -> tuple[Labels | None, bool]:
    """The classes and whether they are ordered: as given, or by the `ordinal` of an estimator."""
    order = getattr(estimator, "ordinal", False)
    if order is None or order is False or parts[0].task.name != "classification":
        return classes, ordered
    if order is not True and classes is None:
        classes = order
    labels = {label for part in parts for label in part.y}
    if classes is None and all(isinstance(label, numbers.Real) for label in labels):
        classes = sorted(labels)  # numbers have an order
    return classes, True


def _matrix(
    parts: Sequence[Samples], train: str | Sequence[str], *, folds: int | None, random_state: int
) -> list[list[Trial]]:
    """The trials of each result: of a cohort to fit on and another, or of folds of its own."""
    names = [train] if isinstance(train, str) else list(train)
    by_name = {part.name: part for part in parts}
    if not names or not set(names) <= set(by_name):
        raise InputError(f"train is {train!r}; expected one or more of {list(by_name)}")
    plans = []
    for known in (by_name[name] for name in names):
        for part in parts:
            if part is not known:
                plans.append([Trial.across(known, part)])
            elif folds is not None:
                seeds = {"repeats": 1, "random_state": random_state}
                own = known.task.folds(known.y, known.groups, folds, **seeds)
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
            fitted = whole.get(trial.name) or fit(estimator, trial.train, order)
            if not trial.within:
                whole = {trial.name: fitted}
            predictions.append(trial.test.task.predict(fitted, trial.test))
        tests, repeats = [trial.test for trial in trials], [trial.repeat for trial in trials]
        known = trials[0].train.name
        results.append(result_of(order, tests, predictions, trained_on=known, repeats=repeats))
    return results


def fit(estimator: Any, train: Samples, order: Order) -> Fitted:
    """Fit a clone of `estimator` on these cases, and their patients if it takes `groups`.

    Cases of which nothing is known are left out.
    """
    task = train.task
    for method in task.methods:
        if not callable(getattr(estimator, method, None)):
            has_classes = "predict_proba" in task.methods
            needs = "fit, predict_proba and classes_" if has_classes else ", ".join(task.methods)
            raise InputError(f"{name_of(estimator)} has no {method}; give one with {needs}")
    fresh = optional("sklearn.base", "cloning an estimator").clone(estimator, safe=False)
    if len(rows := task.fitted_on(train.y)) < len(train):
        train = train.part(rows.tolist())
    labels, by_place = train.y, False
    if task is CLASSIFICATION:
        labels, by_place = for_fit(labels, order)
    options = {}
    if train.groups is not None and _takes_groups(fresh):
        options["groups"] = for_fit(train.groups, tuple(dict.fromkeys(train.groups)))[0]
    fresh.fit(train.x, labels, **options)
    known = task.known(fresh, train.x, train.y)
    return Fitted(estimator=fresh, order=order, by_place=by_place, known=known)


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
    whole, sizes = tests[0].whole or tests[0], [len(test) for test in tests]
    patients = whole.rows
    if whole.groups is not None:
        patients = encode(whole.groups, dict.fromkeys(whole.groups))
    return Result(
        task=whole.task.name,
        trained_on=trained_on,
        tested_on=whole.name,
        classes=order,
        rows=rows,
        truth=whole.task.truth(whole.y, order)[rows],
        # Without gaps, where folds do not test every patient.
        patients=np.unique(patients[rows], return_inverse=True)[1],
        splits=np.repeat(np.arange(len(sizes)), sizes),
        repeats=np.repeat(repeats, sizes),
        estimates={},
        of_each={},
        **{name: np.concatenate([one[name] for one in predictions]) for name in predictions[0]},
    )


def settings_of(
    protocol: str, estimator: Any, task: Task, *, grouped: bool, **more: str | int | float | None
) -> dict[str, Any]:
    """Settings of a report: protocol, task, estimator and package versions, as plain JSON."""
    given = estimator.get_params(deep=False) if hasattr(estimator, "get_params") else {}
    parameters = {}
    for name, value in given.items():
        plain = value.item() if isinstance(value, np.generic) else value
        if name == "aggregator" and not isinstance(value, str):
            plain = name_of(value)  # a module of the user's own
        fits = plain is None or isinstance(plain, str | bool | numbers.Real)
        if fits and not (isinstance(plain, float) and not math.isfinite(plain)):
            parameters[name] = plain
    versions = {}
    for package in ("xmag", "numpy", "scikit-learn"):
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return {
        "protocol": protocol,
        "task": task.name,
        "estimator": name_of(estimator),
        "parameters": parameters,
        "patients_separated": grouped,
        "versions": versions,
        **more,
    }
