"""MILClassifier: slide-level classification from the embeddings of tiles."""

import warnings
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from xmag import records
from xmag.devices import resolve_device
from xmag.errors import InputError, XmagWarning
from xmag.metrics.labels import Bools, Floats, Ints, as_labels, class_array
from xmag.mil.aggregators import AGGREGATORS, aggregator_config
from xmag.mil.bags import BagDataset, BagLike
from xmag.mil.estimator import MILEstimator
from xmag.mil.heads import (
    ClassHead,
    ClassWeight,
    Sampling,
    case_weights,
    class_weights,
    distinct,
    label_from_json,
    label_to_json,
)
from xmag.mil.multilabel import LabelsHead
from xmag.mil.ordinal import OrdinalHead
from xmag.provenance import Provenance

if TYPE_CHECKING:
    from sklearn.utils import Tags


class ClassifierHead:
    """Choice of the head of a classifier: an indicator matrix is of several labels."""

    @staticmethod
    def read(values: Any, count: int, what: str) -> list[Hashable] | Ints:
        """Checked labels of `count` bags: one of each, or an indicator matrix (n, L)."""
        rows = isinstance(values, list) and all(isinstance(v, list | np.ndarray) for v in values)
        table = getattr(values, "ndim", 1) == 2 or (rows and len(values) > 0)
        return (LabelsHead if table else ClassHead).read(values, count, what)

    @staticmethod
    def from_json(values: dict[str, Any]) -> ClassHead | LabelsHead:
        """The head in `values`, which name it unless it is that of classes without an order."""
        kinds: dict[str, type[ClassHead] | type[LabelsHead]] = {
            "classes": ClassHead, "ordinal": OrdinalHead, "labels": LabelsHead
        }  # fmt: skip
        return kinds[values.pop("head", "classes")].from_json(values)


@dataclass(kw_only=True, eq=False, repr=False)
class MILClassifier(MILEstimator[ClassHead | LabelsHead]):
    """Multiple-instance classifier of bags of embeddings, with scikit-learn's conventions.

    `X` is a list of bags: FeatureBags, arrays or tensors (N, D), or paths of ``.h5``,
    ``.safetensors`` or ``.pt`` files, which are read each time they are needed, so that a cohort
    need not fit into memory. In place of a bag there may be a case, a list of the bags of a patient
    (X may mix both): their slides may differ in level-0 µm/px, as tiles are all at one. In which
    order a case lists them changes nothing. Labels are of any hashable kind, one a case; or an
    indicator matrix (n, L) of 0 and 1 for L labels that do not exclude each other (multi-label
    classification), of which each is learned with a sigmoid of its own.

    Args:
        aggregator: "abmil", "mean", "max", "transmil", "clam_sb", or a module of your own; see
            `xmag.mil.aggregator`. A module is copied, and trained on from the weights it has.
        aggregator_options: Sizes and dropout of an aggregator by name.
        epochs: At most; an epoch takes as many bags as there are.
        patience: Epochs after the best so far at which training stops.
        batch_size: Bags a step.
        lr: Learning rate of AdamW after the warm-up, from where it follows a cosine to 0.
        weight_decay: Of AdamW.
        class_weight: Weight of a bag in the loss: None, "balanced" or {class: weight}. Of several
            labels None or "balanced", with which 0 and 1 weigh the same in the loss of each label.
        sampling: "balanced" draws every class equally often, "shuffled" each bag once an epoch, as
            it is with several labels in any case.
        ordinal: Whether classes have an order, such as grades: True for that of numbers, or a list
            from lowest to highest. The network then gives one score, and thresholds cut it into
            classes (proportional odds). CLAM goes without its instance loss here, as with several
            labels; a module of your own for C classes has to give C - 1 logits that fall, as
            `xmag.mil.OrderedLinear` as its last layer does.
        max_tiles: In training, a random subset of larger bags, another one each time.
        fusion: "early" takes the tiles of all bags of a case as one bag. "late" trains on each bag
            with the label of its case, and predicts the mean of what it predicts of each: where
            what decides lies in one slide of several, it learns from the others too that they have
            it, and finds less.
        device: "auto" takes CUDA or MPS where there is one.
        dtype: Compute dtype of training: "auto" is bfloat16 or float16 on CUDA, else float32.
            Weights stay in float32, and so do predictions.
        progress: Show a bar on stderr; None does on a terminal and in a notebook. A function is
            called with each `xmag.progress.ProgressEvent` instead.
        random_state: An int makes fits repeat themselves on the same machine.

    Attributes:
        classes_: (C,), in order; column j of `predict_proba` is the class ``classes_[j]``. Of
            several labels the columns of y, from 0.
        n_features_in_: D.
        aggregator_: The trained module, in eval mode.
        history_: A dict for each epoch: epoch, train_loss, validation_loss, validation_auroc,
            validation_balanced_accuracy, lr; None where there is no such value. With `ordinal` it
            has validation_quadratic_kappa in place of the AUROC; of several labels no accuracy.
        best_epoch_: The epoch whose weights were kept.
        temperature_: By which log-probabilities are divided, once `calibrate` was called.
        class_prior_: Frequency of each class among the labels, (C,), or of each label, (L,).
        fingerprint_: Of the training bags, where they had a provenance: bags to predict on must
            have the same.
    """

    class_weight: ClassWeight = None
    sampling: Sampling = "balanced"
    ordinal: bool | Sequence[Any] = False

    _noun: ClassVar[str] = "classifier"
    _head_type: ClassVar[type[Any]] = ClassifierHead
    _estimator_type = "classifier"  # what scikit-learn before 1.6 asks for

    @property
    def classes_(self) -> NDArray[Any]:
        """The classes, (C,), in order."""
        return class_array(self._head.classes)

    @property
    def class_prior_(self) -> Floats:
        """The frequency of each class among the labels, (C,)."""
        return self._head.prior

    def predict_proba(self, X: Sequence[BagLike]) -> Floats:
        """The probability of each class, float64 (n, C), columns as in `classes_`.

        Of several labels it is (n, L), that of having each. A bag without tiles says nothing: its
        row is `class_prior_`, with a warning. Probabilities are those of a cohort in which classes
        are as frequent as training drew them: equally frequent with sampling="balanced". Raises
        BagError for a bag that cannot be read, is of another width or not finite, and
        MismatchError for one that was made otherwise than those of the training.
        """
        logs, empty = self._log_proba(X)
        return np.where(empty[:, None], self.class_prior_, np.exp(logs))

    def predict_log_proba(self, X: Sequence[BagLike]) -> Floats:
        """The logarithm of `predict_proba`, (n, C), finite also where a probability rounds to 0."""
        return self._log_proba(X)[0]

    def _log_proba(self, X: Sequence[BagLike]) -> tuple[Floats, Bools]:
        """Log-probabilities of bags (n, C), and the mask of those without tiles, bool (n,)."""
        what = "their prediction is how frequent each class was in training"
        logits, empty = self._predict_logits(X, what)
        logs = self._head.log_probabilities(logits)
        with np.errstate(divide="ignore"):
            logs[empty] = np.log(self.class_prior_)
        return logs, empty

    def predict(self, X: Sequence[BagLike]) -> NDArray[Any]:
        """The most probable class of each bag, (n,); see `predict_proba`.

        Of several labels an indicator matrix, int64 (n, L): 1 where the probability is above 0.5.
        """
        chosen = self._decided(X)
        labels: NDArray[Any] = chosen if chosen.ndim == 2 else self.classes_[chosen]
        return labels

    def _decided(self, X: Sequence[BagLike]) -> Ints:
        """The index of the predicted class (n,), or the indicator matrix of labels (n, L)."""
        probabilities = self.predict_proba(X)
        if isinstance(self._head, LabelsHead):
            return (probabilities > 0.5).astype(np.int64)
        chosen: Ints = probabilities.argmax(axis=1)
        return chosen

    def score(
        self, X: Sequence[BagLike], y: Sequence[Any], sample_weight: Sequence[float] | None = None
    ) -> float:
        """The accuracy: the share of bags whose class is predicted; see `predict_proba`.

        Of several labels, the share of bags of which all are right (subset accuracy). A bag counts
        as much as `sample_weight` (n,) says; None counts all alike.
        """
        chosen, head = self._decided(X), self._head
        if not len(chosen):
            raise InputError("X is empty; expected one bag or more to score")
        labels = head.read(y, len(chosen), "y")
        if isinstance(head, LabelsHead):
            right = (head.encode(labels, "y") == chosen).all(axis=1)
        else:
            classes = head.classes
            right = [classes[i] == label for i, label in zip(chosen, labels, strict=True)]
        return float(np.average(right, weights=case_weights(sample_weight, len(chosen))))

    @classmethod
    def from_module(
        cls,
        module: nn.Module,
        *,
        classes: Sequence[Any],
        in_dim: int,
        class_prior: Sequence[float] | None = None,
        provenance: Provenance | None = None,
        device: str | torch.device = "auto",
        **params: Any,
    ) -> Self:
        """A fitted classifier from an aggregator that was trained elsewhere, with one class a bag.

        Args:
            module: The aggregator, which is taken over: moved to the device, in eval mode.
            classes: The label of each column of its logits.
            in_dim: The width D of features.
            class_prior: Probabilities of a bag without tiles, (C,); uniform by default.
            provenance: That of the bags it was trained on, or of others like them.
            device: As in the constructor.
            params: Other parameters of the constructor.
        """
        given = as_labels(classes, "classes")
        if len(distinct(given)) != len(given):
            raise InputError(f"classes are {given}; expected each one once")
        prior = np.full(len(given), 1 / len(given)) if class_prior is None else class_prior
        fitted = cls(aggregator=module, device=device, **params)
        kind = ClassHead if fitted.ordinal is False else OrdinalHead
        head = kind(classes=given, prior=np.asarray(prior, dtype=np.float64))
        if head.prior.shape != (len(given),) or not np.isclose(head.prior.sum(), 1):
            raise InputError(f"class_prior is {prior}; expected {len(given)} that sum to 1")
        if type(module) in AGGREGATORS.values():
            if not isinstance(module.head, head.last_layer):
                raise InputError(
                    f"the module ends in a {type(module.head).__name__}; expected"
                    f" {head.last_layer.__name__} with ordinal={fitted.ordinal!r}"
                )
            config = aggregator_config(module)
            fitted.set_params(aggregator=config["name"], aggregator_options=config["options"])
        fitted._set_fitted(module, head, resolve_device(device), in_dim, provenance)
        return fitted

    def _require_params(self) -> None:
        super()._require_params()
        records.require(
            self, "sampling", self.sampling in ("balanced", "shuffled"),
            '"balanced" (classes equally often) or "shuffled" (each bag once an epoch)',
        )  # fmt: skip
        records.require(
            self, "ordinal", isinstance(self.ordinal, bool | list | tuple | np.ndarray),
            "True, False, or the classes from lowest to highest",
        )  # fmt: skip

    def _new_head(self, labels: list[Hashable] | Ints) -> ClassHead | LabelsHead:
        if self.ordinal is False and isinstance(labels, list):
            return ClassHead.of(labels)
        if isinstance(labels, list):
            order = None if isinstance(self.ordinal, bool) else self.ordinal
            return OrdinalHead.of(labels, order)
        if self.ordinal is not False or isinstance(self.class_weight, Mapping):
            raise InputError(
                f"y is an indicator matrix of {labels.shape[1]} labels, which have no order and no"
                ' weights; expected ordinal=False, and class_weight=None or "balanced"'
            )
        class_weights(self.class_weight, [], np.ones(0))  # refuses other words
        return LabelsHead.of(labels, balanced=self.class_weight is not None)

    def _balance(
        self, head: ClassHead | LabelsHead, train: BagDataset, check: BagDataset | None
    ) -> Ints | None:
        if isinstance(head, LabelsHead):
            return None
        balanced = self.sampling == "balanced"
        counts = np.bincount(train.targets, minlength=len(head.classes))
        drawn = np.ones(len(head.classes)) if balanced else counts.astype(np.float64)
        weights = class_weights(self.class_weight, head.classes, drawn)
        train.weights = weights[train.targets]
        if check is not None:
            counts = np.bincount(check.targets, minlength=len(head.classes))
            if missing := [repr(head.classes[i]) for i in np.flatnonzero(counts == 0)]:
                warnings.warn(
                    f"no bag to validate with is of the class {', '.join(missing)}, so the epoch to"
                    " keep is chosen without it; give more patients, or validation=(X, y, groups)",
                    XmagWarning,
                    stacklevel=3,
                )
            if balanced:
                weights = weights / np.maximum(counts, 1)
            check.weights = weights[check.targets]
        return train.targets if balanced else None

    def _params_to_json(self) -> dict[str, Any]:
        params = super()._params_to_json()
        if isinstance(self.class_weight, Mapping):
            pairs = self.class_weight.items()
            params["class_weight"] = [[label_to_json(k), float(v)] for k, v in pairs]
        if not isinstance(self.ordinal, bool):
            params["ordinal"] = [label_to_json(v) for v in as_labels(self.ordinal, "ordinal")]
        return params

    @classmethod
    def _params_from_json(cls, params: dict[str, Any]) -> dict[str, Any]:
        if isinstance(pairs := params.get("class_weight"), list):
            params = {**params, "class_weight": {label_from_json(k): float(v) for k, v in pairs}}
        if isinstance(order := params.get("ordinal"), list):
            params = {**params, "ordinal": [label_from_json(label) for label in order]}
        return params

    def __sklearn_tags__(self) -> "Tags":
        from sklearn.utils import ClassifierTags

        tags = super().__sklearn_tags__()
        tags.classifier_tags = ClassifierTags(multi_label=True)
        return tags
