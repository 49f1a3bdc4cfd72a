"""Fit clones of an estimator and predict held-out cases, in one order of classes."""

import contextlib
import inspect
import math
import numbers
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xmag.errors import InputError, not_fitted
from xmag.evaluate.extra import optional
from xmag.evaluate.results import Result
from xmag.evaluate.samples import Rows, Samples, Trial
from xmag.metrics.labels import as_labels, as_scores, encode

Order = tuple[Hashable, ...]
Predictions = tuple[Rows, NDArray[np.float64], Rows]
"""Rows (m,), scores (m, C) and predicted class indices (m,)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """A fitted estimator; `by_place` if its classes are indices into the order of classes."""

    estimator: Any
    order: Order
    by_place: bool = False

    def predict(self, data: Samples, rows: Rows) -> Predictions:
        """Predictions of these rows, in the order of classes.

        Raises InputError for scores of the wrong shape or not finite, and for classes that the
        estimator and the order do not both know.
        """
        cases, name = data.at(rows), name_of(self.estimator)
        known = self._labels(classes_of(self.estimator))
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
        scores = np.zeros((len(rows), len(self.order)))
        scores[:, encode(known, self.order)] = as_scores(
            self.estimator.predict_proba(cases),
            len(rows),
            known,
            name=f"the scores of {data.name}",
        )
        if not callable(getattr(self.estimator, "predict", None)):
            return rows, scores, scores.argmax(1)
        labels = self._labels(as_labels(self.estimator.predict(cases), "what predict returned"))
        for label in labels:
            if label not in known:
                raise InputError(
                    f"{name}.predict gave {label!r}, which is not one of its classes_ {known}"
                )
        return rows, scores, encode(labels, self.order)

    def _labels(self, found: list[Any]) -> list[Hashable]:
        """Class values of the estimator (labels, or indices where `by_place`) as labels."""
        return [self.order[int(place)] for place in found] if self.by_place else found


def fit(estimator: Any, trial: Trial, order: Order) -> Fitted:
    """Fit a clone of `estimator` on a trial's cases, and their patients if it takes `groups`."""
    for method in ("fit", "predict_proba"):
        if not callable(getattr(estimator, method, None)):
            raise InputError(
                f"{name_of(estimator)} has no {method}; give an estimator with fit, predict_proba"
                " and classes_"
            )
    data, rows = trial.train, trial.fit_rows
    fresh = optional("sklearn.base", "cloning an estimator").clone(estimator, safe=False)
    labels, by_place = _for_fit([data.y[row] for row in rows.tolist()], order)
    options = {}
    if data.groups is not None and _takes_groups(fresh):
        patients = [data.groups[row] for row in rows.tolist()]
        options["groups"] = _for_fit(patients, tuple(dict.fromkeys(patients)))[0]
    fresh.fit(data.at(rows), labels, **options)
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
    data: Samples,
    order: Order,
    predictions: Sequence[Predictions],
    *,
    trained_on: str,
    repeats: Sequence[int] = (0,),
) -> Result:
    """A Result without metrics from the predictions of each split, and the repeat it belongs to."""
    sizes = [len(rows) for rows, _, _ in predictions]
    rows, scores, predicted = map(np.concatenate, zip(*predictions, strict=True))
    return Result(
        trained_on=trained_on,
        tested_on=data.name,
        classes=order,
        rows=rows,
        truth=encode(data.y, order)[rows],
        predicted=predicted,
        scores=scores,
        # Without gaps, where folds do not test every patient.
        patients=np.unique(data.patients[rows], return_inverse=True)[1],
        splits=np.repeat(np.arange(len(sizes)), sizes),
        repeats=np.repeat(repeats, sizes),
        estimates={},
        class_aurocs=(),
    )


def name_of(estimator: Any) -> str:
    """The name of an estimator in messages and titles: its class."""
    return type(estimator).__name__


def classes_of(estimator: Any) -> list[Hashable]:
    """The classes of a fitted estimator, in its order; InputError where it is not fitted."""
    found = getattr(estimator, "classes_", None)
    if found is None:
        raise not_fitted(
            f"{name_of(estimator)} has no classes_, so it is not fitted; fit it first, or name the"
            " cohort to fit it on with train="
        )
    return as_labels(found, "classes_")


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
        "estimator": name_of(estimator),
        "parameters": parameters,
        "patients_separated": grouped,
        "versions": versions,
        **more,
    }
