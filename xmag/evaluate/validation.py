"""Cross-validation and external validation: fit, predict held-out cases, report."""

import itertools
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from xmag.errors import InputError
from xmag.evaluate.fitting import Fitted, classes_of, fit, name_of, result_of, settings_of
from xmag.evaluate.folds import Folds
from xmag.evaluate.report import Report
from xmag.evaluate.results import Result, Sampling, with_estimates
from xmag.evaluate.samples import OnIdentical, Samples, Trial, agreed_classes, warn_without_groups
from xmag.metrics.labels import Labels


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
    for trial in trials:
        trial.check(order, on_identical=on_identical)
    result = _cross_validated(estimator, trials, order)
    number = len({split.repeat for split in folds.splits})
    times = f", {number} repeats" if number > 1 else ""
    return Report(
        title=f"Cross-validation of {name_of(estimator)}: {len(folds)} splits{times}",
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
        classes = classes_of(estimator)
    order = agreed_classes(list(parts.values()), classes, ordered=ordered)
    if train is None:
        fitted = Fitted(estimator=estimator, order=order)
        results = [
            result_of(part, order, [fitted.predict(part, part.rows)], trained_on="")
            for part in parts.values()
        ]
    else:
        plans = _matrix(parts, train, folds=folds, random_state=random_state)
        for trial in itertools.chain.from_iterable(plans.values()):
            trial.check(order, on_identical=on_identical)
        results = _fitted_matrix(estimator, plans, order)
    return Report(
        title=f"{name_of(estimator)} across {len(parts)} cohort{'s' if len(parts) > 1 else ''}",
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
) -> dict[tuple[str, str], list[Trial]]:
    """The trials of each result, by the names of the cohorts to fit on and to test on."""
    names = [train] if isinstance(train, str) else list(train)
    if not names or not set(names) <= set(parts):
        raise InputError(f"train is {train!r}; expected one or more of {list(parts)}")
    plans = {}
    for name in names:
        known = parts[name]
        for other, part in parts.items():
            if other != name:
                plans[name, other] = [Trial.whole(known, part)]
            elif folds is not None:
                own = Folds.stratified(
                    known.y, groups=known.groups, folds=folds, random_state=random_state
                )
                plans[name, name] = Trial.of_folds(own, known)
    return plans


def _fitted_matrix(
    estimator: Any,
    plans: Mapping[tuple[str, str], list[Trial]],
    order: tuple[Hashable, ...],
) -> list[Result]:
    """The results of the trials; a cohort is fitted once for all others that it is tested on."""
    results: list[Result] = []
    whole: dict[str, Fitted] = {}
    for (name, other), trials in plans.items():
        if other == name:
            results.append(_cross_validated(estimator, trials, order))
            continue
        if name not in whole:
            whole = {name: fit(estimator, trials[0], order)}
        part = trials[0].test
        predictions = [whole[name].predict(part, part.rows)]
        results.append(result_of(part, order, predictions, trained_on=name))
    return results


def _cross_validated(
    estimator: Any, trials: Sequence[Trial], order: tuple[Hashable, ...]
) -> Result:
    data = trials[0].test
    return result_of(
        data,
        order,
        [fit(estimator, trial, order).predict(data, trial.test_rows) for trial in trials],
        trained_on=data.name,
        repeats=[trial.repeat for trial in trials],
    )
