"""MILRegressor: numbers of a slide, one or several, from the embeddings of tiles."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xmag.errors import InputError
from xmag.metrics import regression
from xmag.metrics.labels import Floats, Ints
from xmag.mil.bags import BagLike
from xmag.mil.estimator import MILEstimator
from xmag.mil.heads import Head, Objective, case_weights
from xmag.mil.pooling import full

if TYPE_CHECKING:
    from sklearn.utils import Tags

_STRATA = 4
"""Quarters of a target, of each of which a validation set gets its share."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RegressionHead(Head):
    """Regression head: squared error of standardised targets, missing ones left out.

    `mean` and `scale` (T,) are of the training; `flat`: targets were given as (n,).
    """

    mean: Floats
    scale: Floats
    flat: bool

    metric_names: ClassVar[tuple[str, ...]] = ("validation_r2",)

    @property
    def outputs(self) -> int:
        """The number of targets."""
        return len(self.mean)

    @staticmethod
    def read(values: Any, count: int, what: str) -> Floats:
        """Targets as float64 (n,) or (n, T), NaN where missing; InputError for anything else."""
        return regression.as_numbers(values, count, what)

    @classmethod
    def of(cls, labels: Floats) -> Self:
        """The head for training targets; InputError for one that is constant or never known."""
        table = labels.reshape(len(labels), -1)
        for column, values in enumerate(table.T):
            known = values[~np.isnan(values)]
            if len(known) < 2 or np.ptp(known) == 0:
                raise InputError(
                    f"target {column} of y has {len(np.unique(known))} different known values;"
                    " expected two or more to learn from"
                )
        scale = np.nanstd(table, axis=0)
        return cls(mean=np.nanmean(table, axis=0), scale=scale, flat=labels.ndim == 1)

    def encode(self, labels: Floats, what: str) -> NDArray[np.float32]:
        """Standardised targets (n, T); InputError for another number of targets."""
        table = labels.reshape(len(labels), -1)
        if table.shape[1] != self.outputs:
            raise InputError(
                f"{what} has {table.shape[1]} targets, the training {self.outputs}; give as many"
            )
        return ((table - self.mean) / self.scale).astype(np.float32)

    def require_trainable(self, targets: NDArray[np.float32]) -> None:
        """Raise InputError where no bag with tiles has a known target."""
        for column in np.flatnonzero(np.isnan(targets).all(axis=0)):
            raise InputError(f"no bag with tiles has a known value of target {column} of y")

    def strata(self, targets: NDArray[np.float32]) -> Ints:
        """Quarters of the target that is known least often; a fifth where it is missing."""
        missing = np.isnan(targets).sum(axis=0)
        rarest, known = targets[:, missing.argmax()], len(targets) - int(missing.max())
        # NaN comes last.
        order = np.argsort(np.argsort(rarest, kind="stable"), kind="stable")
        return np.minimum(order * _STRATA // max(known, 1), _STRATA).astype(np.int64)

    def validation_weights(self, targets: NDArray[np.float32]) -> Floats:
        """1 where a target is known, and 0 where the loss is 0 for want of one."""
        known = np.asarray(~np.isnan(targets).all(axis=1))
        if not known.any():
            raise InputError(
                f"none of the {len(known)} bags to validate with has a known target; give others,"
                " more patients, or validation=None"
            )
        return known.astype(np.float64)

    def objective(self, targets: NDArray[np.float32], device: torch.device) -> Objective:
        """Mean squared error over the known targets of each bag."""
        known = torch.from_numpy(targets).to(device)
        return lambda logits, rows: squared_errors(full(logits), known[list(rows)])

    def predictions(self, logits: Floats) -> Floats:
        """The predicted numbers in units of the targets, (n, T)."""
        return self.mean + logits * self.scale

    def metrics(self, logits: Floats, targets: NDArray[np.float32]) -> dict[str, float | None]:
        """Validation R², a mean over targets; None where one is constant."""
        r2 = _mean_r2(targets.astype(np.float64), logits, np.ones(len(targets)))
        return {"validation_r2": r2 if np.isfinite(r2) else None}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """The head in `values`, from which "mean", "scale" and "flat" are taken."""
        mean, scale = (np.array(values.pop(key), np.float64) for key in ("mean", "scale"))
        flat = values.pop("flat")
        if mean.shape != scale.shape or mean.ndim != 1 or not len(mean):
            raise ValueError("mean and scale do not fit")
        if not (np.isfinite(mean).all() and (scale > 0).all() and isinstance(flat, bool)):
            raise ValueError("mean, scale or flat makes no sense")
        return cls(mean=mean, scale=scale, flat=flat)


def squared_errors(predicted: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error of each bag over its known targets, (B,); 0 where none is known."""
    known = ~torch.isnan(targets)
    # NaN is replaced before the difference: 0 * NaN would be the gradient otherwise.
    errors = (predicted - torch.where(known, targets, predicted.detach())) ** 2
    return (errors * known).sum(1) / known.sum(1).clamp(min=1)


def _mean_r2(truth: Floats, predicted: Floats, weights: Floats) -> float:
    """Mean of R² over the columns of known truth (n, T); NaN where one is constant."""
    values = []
    for column, guess in zip(truth.T, predicted.T, strict=True):
        known = ~np.isnan(column)
        values.append(regression.r2s(column[known], guess[known], weights[None, known])[0])
    return float(np.mean(values))


@dataclass(kw_only=True, eq=False, repr=False)
class MILRegressor(MILEstimator[RegressionHead]):
    """Multiple-instance regressor of bags of embeddings, with scikit-learn's conventions.

    `y` is (n,), or (n, T) for several targets, which share the aggregator; NaN stands for a missing
    value, which is left out of the loss. Targets are standardised for the training, so that those
    with large numbers do not outweigh the others. Parameters are those of `MILClassifier`, but for
    its classes'; `history_` has validation_loss (in standard deviations squared) and validation_r2.
    """

    _noun: ClassVar[str] = "regressor"
    _head_type: ClassVar[type[Any]] = RegressionHead
    _estimator_type = "regressor"

    def _new_head(self, labels: Floats) -> RegressionHead:
        return RegressionHead.of(labels)

    def predict(self, X: Sequence[BagLike]) -> Floats:
        """The predicted numbers, float64 (n,) or (n, T), as y was given.

        A bag without tiles says nothing: its row is the mean of the training, with a warning.
        Raises BagError for a bag that cannot be read, is of another width or not finite, and
        MismatchError for one that was made otherwise than those of the training.
        """
        # Logits are 0 where a bag has no tiles.
        logits, _ = self._predict_logits(X, "their prediction is the mean of the training")
        found = self._head.predictions(logits)
        return found[:, 0] if self._head.flat else found

    def score(
        self, X: Sequence[BagLike], y: Any, sample_weight: Sequence[float] | None = None
    ) -> float:
        """R², a mean over targets; missing values are left out. `sample_weight` is (n,)."""
        predicted = self.predict(X)
        truth = RegressionHead.read(y, len(predicted), "y")
        if truth.shape != predicted.shape:
            raise InputError(
                f"y has shape {truth.shape}; expected that of the predictions, {predicted.shape}"
            )
        table, guesses = (values.reshape(len(truth), -1) for values in (truth, predicted))
        found = _mean_r2(table, guesses, case_weights(sample_weight, len(truth)))
        if not np.isfinite(found):
            raise InputError("R² does not exist where the known truth is one number only")
        return found

    def __sklearn_tags__(self) -> "Tags":
        from sklearn.utils import RegressorTags

        tags = super().__sklearn_tags__()
        tags.regressor_tags, tags.target_tags.multi_output = RegressorTags(), True
        return tags
