"""Ordinal classification: the head of classes with an order, such as grades."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from xmag.errors import InputError, ModelError
from xmag.metrics import balanced_accuracy, quadratic_kappa
from xmag.metrics.labels import Floats, Ints, as_labels
from xmag.mil.heads import ClassHead, Objective, distinct, indices, mean_logits
from xmag.mil.pooling import full


class OrderedLinear(nn.Module):
    """Last layer of an ordinal classifier: one score, less thresholds that rise, (B, E) -> (B, K).

    Logit k is that of a class above the k-th: w h - t_k, with one w for all thresholds
    (proportional odds; McCullagh 1980, "Regression Models for Ordinal Data"). At first the
    thresholds are those of K + 1 equally frequent classes.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.score = nn.Linear(in_features, 1, bias=False)
        first = torch.logit(torch.arange(1, out_features + 1) / (out_features + 1))
        self.lowest = nn.Parameter(first[:1].clone())
        self.log_steps = nn.Parameter(first.diff().log())

    def forward(self, pooled: Tensor) -> Tensor:
        """Logits that fall from the first to the last."""
        steps = torch.cat([torch.zeros_like(self.lowest), self.log_steps.exp().cumsum(0)])
        logits: Tensor = self.score(pooled) - (self.lowest + steps)
        return logits


def ordinal_log_probabilities(logits: Tensor) -> Tensor:
    """Log-probabilities (B, K + 1) of ordered classes from the logits (B, K) of more than each.

    P(class k) = s(logit k-1) - s(logit k) with the sigmoid s, by logarithms:
    s(a) - s(b) = s(a) s(-b) (1 - exp(b - a)). Raises ModelError for logits that rise.
    """
    logits = full(logits)
    if (logits.detach().diff(dim=1) > 0).any():
        raise ModelError(
            "the logits of an ordinal classifier have to fall from the first to the last, and rise;"
            " a module of your own for it may end in xmag.mil.OrderedLinear"
        )
    ends = torch.full_like(logits[:, :1], math.inf)
    above = torch.cat([ends, logits, -ends], dim=1)
    lower, upper = above[:, :-1], above[:, 1:]
    fall = (upper - lower).clamp(max=-torch.finfo(logits.dtype).eps)
    both = functional.logsigmoid(lower) + functional.logsigmoid(-upper)
    return both + torch.log(-torch.expm1(fall))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OrdinalHead(ClassHead):
    """Head of classes with an order: cumulative logits (proportional odds), and quadratic kappa."""

    has_labels: ClassVar[bool] = False  # an auxiliary loss would be of classes without an order
    last_layer: ClassVar[type[nn.Module]] = OrderedLinear
    metric_names: ClassVar[tuple[str, ...]] = (
        "validation_quadratic_kappa",
        "validation_balanced_accuracy",
    )

    @classmethod
    def of(cls, labels: Sequence[Hashable], order: Sequence[Hashable] | None = None) -> Self:
        """The head for training labels, in the order given, else that of numbers."""
        classes = distinct(labels)
        if order is not None:
            classes = as_labels(order, "ordinal")
            if len(distinct(classes)) != len(classes):
                raise InputError(f"ordinal is {classes}; expected each class once")
        elif all(isinstance(label, bool | int | float) for label in classes):
            classes = sorted(classes)  # type: ignore[type-var]  # `distinct` goes by type first
        else:
            raise InputError(
                f"the classes are {classes}, whose order is not known; expected numbers, or give"
                " the order from lowest to highest: ordinal=[...]"
            )
        counts = np.bincount(indices(labels, classes, "y"), minlength=len(classes))
        return cls(classes=classes, prior=counts / len(labels))

    @property
    def outputs(self) -> int:
        """The number of thresholds between classes."""
        return len(self.classes) - 1

    def objective(self, targets: Ints, device: torch.device) -> Objective:
        """Negative log-likelihood of the class of each bag."""
        labels = torch.from_numpy(targets).to(device)
        return lambda logits, rows: functional.nll_loss(
            ordinal_log_probabilities(logits), labels[list(rows)], reduction="none"
        )

    def log_probabilities(self, logits: Floats) -> Floats:
        """Logarithm of the probability of each class, (n, C), finite where it rounds to 0."""
        return np.asarray(ordinal_log_probabilities(torch.from_numpy(logits)).numpy())

    fuse = staticmethod(mean_logits)

    def tempered(self, logits: Floats, temperature: float) -> Floats:
        """The logits (n, C - 1) of calibrated probabilities; the most probable class is the same.

        Logits themselves, divided, would move the most probable class to the outer ones.
        """
        logs = self.log_probabilities(logits) / temperature
        up_to = np.logaddexp.accumulate(logs, axis=1)[:, :-1]
        above = np.logaddexp.accumulate(logs[:, ::-1], axis=1)[:, -2::-1]
        return np.minimum.accumulate(above - up_to, axis=1)  # they fall, but for rounding

    def metrics(self, logits: Floats, targets: Ints) -> dict[str, float | None]:
        """Validation metrics of the most probable class."""
        chosen = self.log_probabilities(logits).argmax(axis=1)
        every = range(len(self.classes))
        several = len({*targets.tolist(), *chosen.tolist()}) > 1
        return {
            "validation_quadratic_kappa": (
                quadratic_kappa(targets, chosen, classes=every) if several else None
            ),
            "validation_balanced_accuracy": balanced_accuracy(targets, chosen, classes=every),
        }

    def to_json(self) -> dict[str, Any]:
        """As of classes without an order, and that they have one."""
        return {"head": "ordinal", **ClassHead.to_json(self)}
