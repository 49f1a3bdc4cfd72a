"""Heads of MIL estimators (labels as targets, loss, metrics): their base, and that of classes."""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, fields
from statistics import fmean
from typing import Any, ClassVar, Literal, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from xmag.errors import InputError, OutputError
from xmag.metrics import auroc, balanced_accuracy
from xmag.metrics.labels import Floats, Ints, as_labels, encode, refuse_continuous
from xmag.mil.pooling import MILOutput, full

ClassWeight = Mapping[Any, float] | Literal["balanced"] | None
Sampling = Literal["balanced", "shuffled"]

_PLAIN: dict[str, type] = {"bool": bool, "int": int, "float": float, "str": str}


def class_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each bag, (B,), from logits (B, C) and labels (B,)."""
    return functional.cross_entropy(full(logits), labels, reduction="none")


def training_loss(output: MILOutput, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """The loss to minimise, a scalar: ``bag_weight * mean cross-entropy + loss``.

    Args:
        output: Of an aggregator that was given `labels` where it has an auxiliary loss.
        labels: int64 (B,).
        weights: float (B,), weight of each bag in the mean; all the same by default.
    """
    return weighted_loss(output, class_losses(output.logits, labels), weights)


def weighted_loss(output: MILOutput, losses: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean of the losses of bags (B,) by their weights, with the aggregator's auxiliary loss."""
    weights = torch.ones_like(losses) if weights is None else weights
    loss = output.bag_weight * (weights * losses).sum() / weights.sum()
    return loss if output.loss is None else loss + output.loss


Objective = Callable[[Tensor, Sequence[int]], Tensor]
"""Losses (B,) of logits (B, C) of the bags of a training set that have these rows in it."""


class Head(Protocol):
    """Protocol of heads: how labels become targets, and what is made of logits."""

    has_labels: ClassVar[bool] = False
    """Whether targets are class indices, which an aggregator may use."""
    metric_names: ClassVar[tuple[str, ...]]
    """Names of validation metrics in a history, beside the loss."""
    last_layer: ClassVar[type[nn.Module]] = nn.Linear
    """Class of the last layer of xmag's aggregators, of the width and the number of logits."""

    @property
    def outputs(self) -> int:
        """The number C of logits."""

    @staticmethod
    def read(values: Any, count: int, what: str) -> Any:
        """Checked labels of `count` bags; InputError where there is not one for each."""

    def encode(self, labels: Any, what: str) -> NDArray[Any]:
        """The targets of labels, (n, ...); InputError for a label that is none."""

    def require_trainable(self, targets: NDArray[Any]) -> None:
        """Raise InputError where the bags that have tiles are not enough to learn from."""

    def strata(self, targets: NDArray[Any]) -> Ints:
        """Strata of bags, int64 (n,), of which a validation set gets its share."""

    def validation_weights(self, targets: NDArray[Any]) -> Floats:
        """Weights of bags in the validation loss, (n,); InputError where nothing validates."""
        return np.ones(len(targets))

    def objective(self, targets: NDArray[Any], device: torch.device) -> Objective:
        """The losses of a set of bags with these targets."""

    def fuse(self, logits: Floats) -> Floats:
        """The logits (C,) that predict the mean of what `logits` (k, C) of k slides predict."""
        return np.asarray(logits.mean(axis=0))

    def metrics(self, logits: Floats, targets: NDArray[Any]) -> dict[str, float | None]:
        """Validation metrics of logits (n, C), by `metric_names`; None where one has no value."""

    def validate(self, logits: Floats, targets: NDArray[Any], weights: Floats) -> dict[str, Any]:
        """The validation loss, a mean by the weights (n,) of the bags, and the `metrics`."""
        # An objective of these bags alone: the risk set of a survival loss is the validation set.
        objective = self.objective(targets, torch.device("cpu"))
        losses = objective(torch.from_numpy(logits), range(len(targets))).numpy()
        loss = float((weights * losses).sum() / weights.sum())
        return {"validation_loss": loss, **self.metrics(logits, targets)}

    def tempered(self, logits: Floats, temperature: float) -> Floats:
        """The logits (n, C) of calibrated probabilities, which predict the same."""
        return logits / temperature

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values, from which `from_json` takes them."""
        found = {item.name: getattr(self, item.name) for item in fields(self)}  # type: ignore[arg-type]
        return {name: np.asarray(value).tolist() for name, value in found.items()}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ClassHead(Head):
    """Classification head: softmax over classes, cross-entropy, AUROC and balanced accuracy.

    `prior` is the frequency of each class among the labels, (C,).
    """

    classes: list[Hashable]
    prior: Floats

    has_labels: ClassVar[bool] = True
    metric_names: ClassVar[tuple[str, ...]] = ("validation_auroc", "validation_balanced_accuracy")

    @classmethod
    def of(cls, labels: Sequence[Hashable]) -> Self:
        """The head for training labels; InputError as `distinct`."""
        classes = distinct(labels)
        counts = np.bincount(indices(labels, classes, "y"))
        return cls(classes=classes, prior=counts / len(labels))

    @property
    def outputs(self) -> int:
        """The number of classes."""
        return len(self.classes)

    @staticmethod
    def read(values: Any, count: int, what: str) -> list[Hashable]:
        """Labels as plain Python values; InputError unless there are `count` usable ones."""
        return as_labels(values, what, n=count)

    def metrics(self, logits: Floats, targets: Ints) -> dict[str, float | None]:
        """Validation balanced accuracy, and the mean AUROC of the classes present, one-vs-rest."""
        probabilities = torch.from_numpy(logits).softmax(dim=1).numpy()
        every, present = range(logits.shape[1]), np.unique(targets).tolist()
        areas = [
            auroc(targets, probabilities, classes=every, positive=label)
            for label in present
            if len(present) > 1
        ]
        balanced = balanced_accuracy(targets, logits.argmax(axis=1), classes=every)
        area = fmean(areas) if areas else None
        return {"validation_auroc": area, "validation_balanced_accuracy": balanced}

    def objective(self, targets: Ints, device: torch.device) -> Objective:
        """Cross-entropy of each bag."""
        labels = torch.from_numpy(targets).to(device)
        return lambda logits, rows: class_losses(logits, labels[list(rows)])

    def log_probabilities(self, logits: Floats) -> Floats:
        """Logarithm of the probability of each class, (n, C), finite where it rounds to 0."""
        logs: Floats = torch.from_numpy(logits).log_softmax(dim=1).numpy()
        return logs

    def fuse(self, logits: Floats) -> Floats:
        """The logarithm of the mean probability of each class, (C,), over logits (k, C)."""
        logs = self.log_probabilities(logits)
        return np.asarray(np.logaddexp.reduce(logs, axis=0) - math.log(len(logs)))

    def calibration(
        self, logits: Floats, targets: Ints
    ) -> tuple[Floats, Callable[[Tensor], Tensor]]:
        """Values that a temperature divides, log-probabilities (n, C), and their log losses."""
        labels = torch.from_numpy(targets)
        return self.log_probabilities(logits), lambda scaled: class_losses(scaled, labels)

    def encode(self, labels: Sequence[Hashable], what: str) -> Ints:
        """Class indices, int64 (n,); InputError for a label that is none of the classes."""
        return indices(labels, self.classes, what)

    def require_trainable(self, targets: Ints) -> None:
        """Raise InputError where no bag of a class has tiles."""
        if missing := [label for i, label in enumerate(self.classes) if i not in targets]:
            raise InputError(
                f"no bag of the class {missing[0]!r} has any tile; expected one or more of each"
                " class: extract them again, or leave the class out"
            )

    def strata(self, targets: Ints) -> Ints:
        """The class indices themselves."""
        return targets

    def to_json(self) -> dict[str, Any]:
        """The classes with their types, and the prior; OutputError as `label_to_json`."""
        classes = [label_to_json(label) for label in self.classes]
        return {"classes": classes, "class_prior": self.prior.tolist()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """The head in `values`, from which "classes" and "class_prior" are taken."""
        classes = [label_from_json(value) for value in values.pop("classes")]
        prior = np.array([float(value) for value in values.pop("class_prior")])
        if not len(set(classes)) == len(classes) == len(prior) >= 2:
            raise ValueError("classes do not fit")
        if (prior < 0).any() or not math.isclose(prior.sum(), 1, abs_tol=1e-6):
            raise ValueError("class_prior does not fit")
        return cls(classes=classes, prior=prior)


def mean_logits(logits: Floats) -> Floats:
    """The logits (C,) of the mean of the probabilities that sigmoids make of logits (k, C)."""
    has, lacks = (-np.logaddexp(0, sign * logits) for sign in (-1, 1))
    return np.asarray(np.logaddexp.reduce(has, axis=0) - np.logaddexp.reduce(lacks, axis=0))


def case_weights(values: Any, count: int) -> Floats:
    """The `sample_weight` of a score, float64 (n,), 1 for None; InputError for anything else."""
    weights = np.ones(count) if values is None else np.asarray(values, dtype=np.float64)
    if weights.shape != (count,) or not (np.isfinite(weights) & (weights >= 0)).all():
        raise InputError(
            f"sample_weight has shape {weights.shape} for {count} bags; expected numbers from 0 on"
        )
    return weights


def distinct(labels: Sequence[Hashable]) -> list[Hashable]:
    """The distinct labels (classes), in order; InputError for one only, and for fractions."""
    refuse_continuous(labels, "y")
    seen: dict[Hashable, Hashable] = {}
    for label in labels:
        first = seen.setdefault(label, label)
        if type(first) is not type(label):
            raise InputError(
                f"the labels hold both {first!r} and {label!r}, which Python takes for the same;"
                " expected labels of one type"
            )
    if len(seen) < 2:
        raise InputError(
            f"labels are of {len(seen)} class ({', '.join(map(repr, seen))}); expected two or more"
        )
    return ordered(list(seen))


def ordered(classes: list[Any]) -> list[Hashable]:
    """The classes sorted where they can be compared, else by type and text."""
    if len({type(value) for value in classes}) == 1 and isinstance(
        classes[0], bool | int | float | str | tuple
    ):
        try:
            return sorted(classes)
        except TypeError:
            pass  # tuples of mixed types
    return sorted(classes, key=lambda value: (type(value).__name__, repr(value)))


def indices(labels: Sequence[Hashable], classes: Sequence[Hashable], what: str) -> Ints:
    """The class index of each label, int64 (n,); InputError for an unknown label."""
    known = set(classes)
    for index, label in enumerate(labels):
        if label not in known:
            raise InputError(
                f"{what}[{index}] is {label!r}; expected one of the classes {list(classes)}"
            )
    return encode(labels, classes)


def class_weights(weight: ClassWeight, classes: Sequence[Hashable], drawn: Floats) -> Floats:
    """The weight in the loss of a bag of each class, (C,).

    "balanced" makes up for how often each class is drawn; InputError for what is no `class_weight`.
    """
    if weight is None:
        return np.ones(len(classes))
    if isinstance(weight, str) and weight == "balanced":
        return np.asarray(drawn.sum() / (len(classes) * drawn))
    if not isinstance(weight, Mapping):
        raise InputError(
            f'class_weight is {weight!r}; expected None, "balanced" or {{class: weight}}'
        )
    if unknown := [label for label in weight if label not in classes]:
        raise InputError(
            f"class_weight has the class {unknown[0]!r}; expected those of y: {list(classes)}"
        )
    for label, value in weight.items():
        if isinstance(value, bool | str) or not (math.isfinite(value) and value > 0):
            raise InputError(f"class_weight[{label!r}] is {value!r}; expected a number above 0")
    return np.array([float(weight.get(label, 1.0)) for label in classes])


def label_to_json(label: Hashable) -> list[Any]:
    """A label as JSON, with its type; OutputError for a type that is not supported."""
    if isinstance(label, tuple) and type(label) is tuple:
        return ["tuple", [label_to_json(item) for item in label]]
    for name, kind in _PLAIN.items():
        if type(label) is kind:
            return [name, label]
    raise OutputError(
        f"the class {label!r} is a {type(label).__name__}, which cannot be saved; train with labels"
        " that are str, int, float, bool, or tuples of those"
    )


def label_from_json(value: Any) -> Hashable:
    """Decode a label of `label_to_json`; ValueError for anything else."""
    kind, content = value if isinstance(value, list) and len(value) == 2 else (None, None)
    if kind == "tuple" and isinstance(content, list):
        return tuple(label_from_json(item) for item in content)
    if isinstance(kind, str) and kind in _PLAIN and type(content) is _PLAIN[kind]:
        return content
    raise ValueError(f"{value!r} is no label with its type")
