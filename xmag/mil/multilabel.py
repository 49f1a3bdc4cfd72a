"""Multi-label classification: the head of labels that do not exclude each other."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from xmag.errors import InputError
from xmag.metrics import auroc
from xmag.metrics.labels import Floats, Ints
from xmag.mil.heads import Head, Objective, mean_logits
from xmag.mil.pooling import full


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LabelsHead(Head):
    """Head of labels that do not exclude each other: a sigmoid and binary cross-entropy for each.

    `prior` (L,) is how frequent each label is. With `balanced`, bags with a label and those without
    weigh the same in its loss.
    """

    prior: Floats
    balanced: bool = False

    metric_names: ClassVar[tuple[str, ...]] = ("validation_auroc",)

    @classmethod
    def of(cls, labels: Ints, *, balanced: bool = False) -> Self:
        """The head for the indicator matrix of the training."""
        return cls(prior=labels.mean(axis=0), balanced=balanced)

    @property
    def classes(self) -> list[Hashable]:
        """The columns of the indicator matrix, from 0."""
        return list(range(len(self.prior)))

    @property
    def outputs(self) -> int:
        """The number of labels."""
        return len(self.prior)

    @staticmethod
    def read(values: Any, count: int, what: str) -> Ints:
        """The indicator matrix, int64 (n, L); InputError for other values than 0 and 1."""
        try:
            array = np.asarray(values, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"{what} is no indicator matrix ({error}); expected 0 or 1 for each label"
            ) from None
        if array.ndim != 2 or len(array) != count or array.shape[1] < 2:
            raise InputError(
                f"{what} has shape {array.shape} for {count} bags; expected ({count}, L) with two"
                f" labels or more, or ({count},) for classes that exclude each other"
            )
        wrong = np.argwhere(~np.isin(array, (0, 1)))
        if len(wrong):
            row, column = wrong[0]
            raise InputError(
                f"{what}[{row}, {column}] is {array[row, column]:g} ({len(wrong)} such values in"
                " all); expected 0 or 1. Leave out cases of which a label is missing, or train one"
                " classifier for each label"
            )
        return array.astype(np.int64)

    def encode(self, labels: Any, what: str) -> Ints:
        """The indicator matrix itself; InputError unless it has as many labels."""
        table = self.read(labels, len(labels), what)
        if table.shape[1] != self.outputs:
            raise InputError(
                f"{what} has {table.shape[1]} labels, and the training {self.outputs}; give as many"
            )
        return table

    def require_trainable(self, targets: Ints) -> None:
        """Raise InputError for a label that no bag with tiles has, or that all have."""
        for column, values in enumerate(targets.T):
            if len(set(values.tolist())) < 2:
                raise InputError(
                    f"column {column} of y is {values[0]} in all {len(values)} bags with tiles;"
                    " expected both 0 and 1: leave this label out"
                )

    def strata(self, targets: Ints) -> Ints:
        """The rarest of the labels that a bag has; those without any are a stratum too."""
        frequency = np.where(targets, self.prior, np.inf)
        rarest = np.where(targets.any(axis=1), frequency.argmin(axis=1), self.outputs)
        return np.unique(rarest, return_inverse=True)[1].astype(np.int64)

    def objective(self, targets: Ints, device: torch.device) -> Objective:
        """Binary cross-entropy of each bag, a mean over labels."""
        known = torch.from_numpy(targets).to(device)
        return lambda logits, rows: self._losses(logits, known[list(rows)])

    def _losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        logits = full(logits)
        losses = functional.binary_cross_entropy_with_logits(
            logits, labels.to(logits.dtype), reduction="none"
        )
        if self.balanced:
            share = torch.from_numpy(self.prior).to(logits.device, logits.dtype)
            losses = losses * 0.5 / torch.where(labels > 0, share, 1 - share)
        return losses.mean(dim=1)

    def log_probabilities(self, logits: Floats) -> Floats:
        """Logarithm of the probability of each label, (n, L), finite where it rounds to 0."""
        return -np.logaddexp(0, -logits)

    fuse = staticmethod(mean_logits)

    def calibration(
        self, logits: Floats, targets: Ints
    ) -> tuple[Floats, Callable[[Tensor], Tensor]]:
        """Values that a temperature divides, here logits (n, L), and the log losses of them."""
        plain, labels = replace(self, balanced=False), torch.from_numpy(targets)
        return logits, lambda scaled: plain._losses(scaled, labels)

    def metrics(self, logits: Floats, targets: Ints) -> dict[str, float | None]:
        """Validation AUROC, a mean over labels; None where none has both 0 and 1."""
        areas = [
            auroc(truth, scores, classes=(0, 1))
            for truth, scores in zip(targets.T, logits.T, strict=True)
            if len(set(truth.tolist())) > 1
        ]
        return {"validation_auroc": fmean(areas) if areas else None}

    def to_json(self) -> dict[str, Any]:
        """The head as JSON values."""
        return {"head": "labels", "label_prior": self.prior.tolist()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """The head in `values`, from which "label_prior" is taken."""
        prior = np.array([float(value) for value in values.pop("label_prior")])
        if len(prior) < 2 or not ((prior >= 0) & (prior <= 1)).all():
            raise ValueError("label_prior does not fit")
        return cls(prior=prior)
