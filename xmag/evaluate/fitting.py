"""Fit clones of an estimator and collect their predictions, in one order of classes."""

import inspect
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xmag.errors import InputError, not_fitted
from xmag.evaluate.extra import optional
from xmag.evaluate.results import Result
from xmag.evaluate.samples import (
    OnIdentical,
    Samples,
    digests,
    for_fit,
    require_different,
    require_separate,
    taken,
)
from xmag.metrics.labels import as_labels, as_scores, encode

Rows = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """A fitted estimator; `by_place` if its classes are indices into the order of classes."""

    estimator: Any
    by_place: bool = False

    def labels(self, values: Any, name: str, order: tuple[Hashable, ...]) -> list[Hashable]:
        """Class values of the estimator (labels, or indices where `by_place`) as labels."""
        found = as_labels(values, name)
        return [order[int(place)] for place in found] if self.by_place else found  # type: ignore[call-overload]


def name_of(estimator: Any) -> str:
    """The name of an estimator in messages and titles: its class."""
    return type(estimator).__name__


def fitted_classes(estimator: Any) -> Any:
    """The classes of a fitted estimator, in its order; InputError where it is not fitted."""
    found = getattr(estimator, "classes_", None)
    if found is None:
        raise not_fitted(
            f"{name_of(estimator)} has no classes_, so it is not fitted; fit it first, or name the"
            " cohort to fit it on with train="
        )
    return found


def require_classes(data: Samples, rows: Rows, order: tuple[Hashable, ...], *, where: str) -> None:
    """Raise InputError where a class of `order` has no case in `rows`."""
    present = {data.y[row] for row in rows.tolist()}
    missing = [label for label in order if label not in present]
    if missing:
        raise InputError(
            f"{where}: there is no case of class {missing[0]!r} to fit on; give fewer folds, or"
            " leave that class out"
        )


def fit(
    estimator: Any, data: Samples, rows: Rows, order: tuple[Hashable, ...], *, where: str
) -> Fitted:
    """Fit a clone of `estimator` on `rows`."""
    for method in ("fit", "predict_proba"):
        if not callable(getattr(estimator, method, None)):
            raise InputError(
                f"{name_of(estimator)} has no {method}; give an estimator with fit, predict_proba"
                " and classes_"
            )
    require_classes(data, rows, order, where=where)
    fresh = optional("sklearn.base", "cloning an estimator").clone(estimator, safe=False)
    labels, by_place = for_fit((data.y[row] for row in rows.tolist()), order)
    options = {}
    if data.groups is not None and _takes_groups(fresh):
        patients = [data.groups[row] for row in rows.tolist()]
        options["groups"] = for_fit(patients, tuple(dict.fromkeys(patients)))[0]
    fresh.fit(taken(data.x, rows), labels, **options)
    return Fitted(estimator=fresh, by_place=by_place)


def held_out(
    estimator: Any,
    train: Samples,
    test: Samples,
    order: tuple[Hashable, ...],
    *,
    on_identical: OnIdentical,
) -> tuple[Any, Result]:
    """Fit a clone of `estimator` on `train` and predict `test`: (clone, Result without metrics)."""
    every = np.arange(len(train))
    where = f"trained on {train.name}, tested on {test.name}"
    require_separate((train, every), (test, np.arange(len(test))), where=where)
    require_different(digests(train.x), digests(test.x), where=where, on_identical=on_identical)
    fitted = fit(estimator, train, every, order, where=where)
    return fitted.estimator, tested(fitted, test, order, trained_on=train.name)


def tested(
    fitted: Fitted, data: Samples, order: tuple[Hashable, ...], *, trained_on: str
) -> Result:
    """Predict all of `data` with one model: a Result without metrics."""
    rows = np.arange(len(data))
    scores, predicted = predict(fitted, data, rows, order)
    return Result(
        trained_on=trained_on,
        tested_on=data.name,
        classes=order,
        rows=rows,
        truth=encode(data.y, order),
        predicted=predicted,
        scores=scores,
        patients=data.patients(),
        splits=np.zeros(len(rows), np.int64),
        repeats=np.zeros(len(rows), np.int64),
        estimates={},
        class_aurocs=(),
    )


def predict(
    fitted: Fitted, data: Samples, rows: Rows, order: tuple[Hashable, ...]
) -> tuple[NDArray[np.float64], Rows]:
    """Scores, float64 (m, C), and predicted class indices, int64 (m,), in the order of classes.

    Raises InputError for scores of the wrong shape or not finite, and for classes that the
    estimator and the order do not both know.
    """
    estimator, cases = fitted.estimator, taken(data.x, rows)
    known = fitted.labels(fitted_classes(estimator), "classes_", order)
    _require_known(estimator, known, order, data)
    scores = as_scores(
        estimator.predict_proba(cases), len(rows), known, name=f"the scores of {data.name}"
    )
    in_order = np.zeros((len(rows), len(order)))
    in_order[:, [order.index(label) for label in known]] = scores
    if not callable(getattr(estimator, "predict", None)):
        return in_order, in_order.argmax(1)
    labels = fitted.labels(estimator.predict(cases), "what predict returned", order)
    unknown = [label for label in labels if label not in known]
    if unknown:
        raise InputError(
            f"{name_of(estimator)}.predict gave {unknown[0]!r}, which is not one of its classes_"
            f" {known}"
        )
    return in_order, encode(labels, order)


def _require_known(
    estimator: Any, known: list[Hashable], order: tuple[Hashable, ...], data: Samples
) -> None:
    strange = [label for label in known if label not in order]
    if strange:
        raise InputError(
            f"{name_of(estimator)} knows the class {strange[0]!r}, which is not in classes {order};"
            " name all of its classes there"
        )
    missing = [label for label in dict.fromkeys(data.y) if label not in known]
    if missing:
        raise InputError(
            f"{data.name} has the label {missing[0]!r}, which {name_of(estimator)} does not know"
            f" (it knows {known}); leave such cases out, or fit it on that class too"
        )


def _takes_groups(estimator: Any) -> bool:
    """Whether `fit` has a parameter `groups`, or scikit-learn's metadata routing takes them."""
    if "groups" in inspect.signature(estimator.fit).parameters:
        return True
    if not optional("sklearn", "cloning an estimator").get_config()["enable_metadata_routing"]:
        return False
    routing = optional("sklearn.utils.metadata_routing", "cloning an estimator")
    return bool(routing.get_routing_for_object(estimator).consumes("fit", ["groups"]))
