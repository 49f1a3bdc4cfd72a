"""Cross-validation and external validation: fit, predict held-out cases, report."""

import numbers
from collections.abc import Hashable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xmag.errors import InputError
from xmag.evaluate.fitting import (
    Fitted,
    fit,
    fitted_classes,
    name_of,
    predict,
    require_classes,
    tested,
)
from xmag.evaluate.folds import Folds
from xmag.evaluate.report import Report
from xmag.evaluate.results import Result, Sampling, with_estimates
from xmag.evaluate.samples import (
    OnIdentical,
    Samples,
    agreed_classes,
    digests,
    require_different,
    require_separate,
    samples,
    warn_without_groups,
)
from xmag.metrics.labels import Labels, as_labels, encode


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
    data = samples(X, y, groups, name="the cohort")
    order = agreed_classes([data], _required_if(classes, ordered))
    if groups is None:
        warn_without_groups(stacklevel=2)
    if isinstance(folds, Folds):
        if repeats != 1:
            raise InputError(f"repeats is {repeats}, but the folds that were given have their own")
        splits = folds
    else:
        splits = Folds.stratified(
            data.y, groups=data.groups, folds=folds, repeats=repeats, random_state=random_state
        )
    result = _cross_validated(estimator, data, order, splits, on_identical=on_identical)
    number = len({split.repeat for split in splits.splits})
    times = f", {number} repeats" if number > 1 else ""
    return Report(
        title=f"Cross-validation of {name_of(estimator)}: {len(splits)} splits{times}",
        classes=order,
        results=(with_estimates(result, ordered=ordered, sampling=sampling),),
        sampling=sampling,
        folds=splits,
        settings=protocol("cross-validation", estimator, grouped=groups is not None),
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
    if any(part.groups is None for part in parts.values()):
        warn_without_groups(stacklevel=2)
    given = _required_if(classes, ordered)
    if train is None and given is None:
        given = as_labels(fitted_classes(estimator), "classes_")
    order = agreed_classes(list(parts.values()), given)
    if train is None:
        fitted = Fitted(estimator=estimator)
        results = [tested(fitted, part, order, trained_on="") for part in parts.values()]
    else:
        results = _matrix(
            estimator,
            parts,
            _train_names(train, parts),
            order,
            folds=folds,
            random_state=random_state,
            on_identical=on_identical,
        )
    return Report(
        title=f"{name_of(estimator)} across {len(parts)} cohort{'s' if len(parts) > 1 else ''}",
        classes=order,
        results=tuple(with_estimates(r, ordered=ordered, sampling=sampling) for r in results),
        sampling=sampling,
        settings=protocol(
            "external cohorts",
            estimator,
            grouped=all(part.groups is not None for part in parts.values()),
            own_cohort_folds=None if train is None else folds,
        ),
    )


def protocol(
    name: str, estimator: Any, *, grouped: bool, **more: str | int | float | None
) -> dict[str, Any]:
    """Settings of a report: protocol, estimator and package versions, as plain JSON."""
    parameters = {}
    if hasattr(estimator, "get_params"):
        for key, value in estimator.get_params(deep=False).items():
            if value is None or isinstance(value, str | bool | numbers.Real):
                parameters[key] = value.item() if isinstance(value, np.generic) else value
    versions = {}
    for package in ("xmag", "numpy", "scikit-learn"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "protocol": name,
        "estimator": name_of(estimator),
        "parameters": {
            n: v for n, v in parameters.items() if not isinstance(v, float) or np.isfinite(v)
        },
        "patients_separated": grouped,
        "versions": versions,
        **more,
    }


def _cross_validated(
    estimator: Any,
    data: Samples,
    order: tuple[Hashable, ...],
    folds: Folds,
    *,
    on_identical: OnIdentical,
) -> Result:
    if folds.samples != len(data):
        raise InputError(
            f"the folds are of {folds.samples} cases and {data.name} has {len(data)}; make folds"
            " for these cases"
        )
    features = digests(data.x)
    sides = [(np.array(split.train), np.array(split.test)) for split in folds.splits]
    for number, (train, test) in enumerate(sides):
        where = f"split {number} of {data.name}"
        require_separate((data, train), (data, test), where=where)
        require_different(features[train], features[test], where=where, on_identical=on_identical)
        require_classes(data, train, order, where=where)
    parts = []
    for number, (train, test) in enumerate(sides):
        fitted = fit(estimator, data, train, order, where=f"split {number} of {data.name}")
        parts.append(predict(fitted, data, test, order))
    places = np.concatenate([test for _, test in sides])
    repeats = [np.full(len(s.test), s.repeat) for s in folds.splits]
    return Result(
        trained_on=data.name,
        tested_on=data.name,
        classes=order,
        rows=places,
        truth=encode(data.y, order)[places],
        predicted=np.concatenate([predicted for _, predicted in parts]),
        scores=np.concatenate([scores for scores, _ in parts]),
        patients=_numbered(data.patients()[places]),
        splits=np.concatenate(
            [np.full(len(s.test), number) for number, s in enumerate(folds.splits)]
        ),
        repeats=np.concatenate(repeats),
        estimates={},
        class_aurocs=(),
    )


def _matrix(
    estimator: Any,
    parts: Mapping[str, Samples],
    names: Sequence[str],
    order: tuple[Hashable, ...],
    *,
    folds: int | None,
    random_state: int,
    on_identical: OnIdentical,
) -> list[Result]:
    """Results of all cohorts for models fitted on each of `names`; checks come before any fit."""
    features = {name: digests(part.x) for name, part in parts.items()}
    everything = {name: np.arange(len(part)) for name, part in parts.items()}
    own = {
        name: Folds.stratified(
            parts[name].y, groups=parts[name].groups, folds=folds, random_state=random_state
        )
        for name in names
        if folds is not None
    }
    for name in names:
        for other in parts:
            if other != name:
                where = f"trained on {name}, tested on {other}"
                sides = [(parts[n], everything[n]) for n in (name, other)]
                require_separate(sides[0], sides[1], where=where)
                require_different(
                    features[name], features[other], where=where, on_identical=on_identical
                )
        require_classes(parts[name], everything[name], order, where=f"trained on {name}")
    results = []
    for name in names:
        fitted = None
        for other, part in parts.items():
            if other != name:
                if fitted is None:
                    where = f"trained on {name}"
                    fitted = fit(estimator, parts[name], everything[name], order, where=where)
                results.append(tested(fitted, part, order, trained_on=name))
            elif name in own:
                results.append(
                    _cross_validated(estimator, part, order, own[name], on_identical=on_identical)
                )
    return results


def _cohort(name: str, content: tuple[Any, ...]) -> Samples:
    if not isinstance(content, tuple) or len(content) not in (2, 3):
        raise InputError(
            f"cohort {name!r} is {type(content).__name__}; expected (X, y) or (X, y, groups)"
        )
    x, y, groups = (*content, None)[:3]
    return samples(x, y, groups, name=name)


def _train_names(train: str | Sequence[str], parts: Mapping[str, Samples]) -> list[str]:
    names = [train] if isinstance(train, str) else list(train)
    unknown = [name for name in names if name not in parts]
    if unknown or not names:
        raise InputError(f"train is {train!r}; expected one or more of {list(parts)}")
    return names


def _required_if(classes: Labels | None, ordered: bool) -> Labels | None:
    if ordered and classes is None:
        raise InputError(
            "ordered=True needs the order of the classes, lowest first; give classes=[...]"
        )
    return classes


def _numbered(patients: NDArray[np.int64]) -> NDArray[np.int64]:
    """Patient ids renumbered from 0 without gaps, where folds do not test every patient."""
    return np.unique(patients, return_inverse=True)[1].astype(np.int64)
