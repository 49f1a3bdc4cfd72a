"""MILClassifier: slide-level classification from the embeddings of tiles."""

import copy
import os
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from xmag.devices import Float32, own_torch, resolve_device, resolve_dtype, seeded
from xmag.errors import InputError, ModelError
from xmag.mil.aggregators import AGGREGATORS, aggregator_config
from xmag.mil.aggregators import aggregator as new_aggregator
from xmag.mil.attention import Attention
from xmag.mil.bags import BagLike, Bags
from xmag.mil.cohort import warn_of_empty
from xmag.mil.estimator import seed_of
from xmag.mil.fitted import Fitted
from xmag.mil.fitting import Setup, checked_settings, prepare
from xmag.mil.labels import ClassWeight, distinct, hashables
from xmag.mil.sampling import Sampling
from xmag.mil.saving import Saved, read_folder, rebuilt, write_folder
from xmag.mil.scoring import attention_of, log_sum_exp, predict_logits
from xmag.mil.training import Trainer
from xmag.provenance import Provenance

_NOT_SAVED = ("aggregator", "aggregator_options", "device")


class MILClassifier(Fitted):
    """Multiple-instance classifier of bags of embeddings, with scikit-learn's conventions.

    `X` is a list of bags: FeatureBags, arrays or tensors (N, D), or paths of ``.h5``,
    ``.safetensors`` or ``.pt`` files, which are read each time they are needed, so that a cohort
    need not fit into memory. Labels are of any hashable kind.

    Args:
        aggregator: "abmil", "mean", "max", "transmil", "clam_sb", or a module of your own; see
            `xmag.mil.aggregator`. A module is copied, and trained on from the weights it has.
        aggregator_options: Sizes and dropout of an aggregator by name.
        epochs: At most; an epoch takes as many bags as there are.
        patience: Epochs after the best so far at which training stops.
        batch_size: Bags a step.
        lr: Learning rate of AdamW after the warm-up, from where it follows a cosine to 0.
        weight_decay: Of AdamW.
        class_weight: Weight of a bag in the loss: None, "balanced" or {class: weight}.
        sampling: "balanced" draws every class equally often, "shuffled" each bag once an epoch.
        max_tiles: In training, a random subset of larger bags, another one each time.
        device: "auto" takes CUDA or MPS where there is one.
        dtype: Compute dtype of training: "auto" is bfloat16 or float16 on CUDA, else float32.
            Weights stay in float32, and so do predictions.
        progress: Show a bar on stderr; None does on a terminal and in a notebook.
        random_state: An int makes fits repeat themselves on the same machine.

    Attributes:
        classes_: (C,), in order; column j of `predict_proba` is the class ``classes_[j]``.
        n_features_in_: D.
        aggregator_: The trained module, in eval mode.
        history_: A dict for each epoch: epoch, train_loss, validation_loss, validation_auroc,
            validation_balanced_accuracy, lr; None where there is no such value.
        best_epoch_: The epoch whose weights were kept.
        class_prior_: Frequency of each class among the labels, (C,).
        fingerprint_: Of the training bags, where they had a provenance: bags to predict on must
            have the same.
    """

    def __init__(
        self,
        *,
        aggregator: str | nn.Module = "abmil",
        aggregator_options: Mapping[str, Any] | None = None,
        epochs: int = 100,
        patience: int = 20,
        batch_size: int = 8,
        lr: float = 3e-4,
        weight_decay: float = 1e-4,
        class_weight: ClassWeight = None,
        sampling: Sampling = "balanced",
        max_tiles: int | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        progress: bool | None = None,
        random_state: int | np.random.RandomState | np.random.Generator | None = None,
    ) -> None:
        self.aggregator = aggregator
        self.aggregator_options = aggregator_options
        self.epochs = epochs
        self.patience = patience
        self.batch_size = batch_size
        self.lr = lr
        self.weight_decay = weight_decay
        self.class_weight = class_weight
        self.sampling = sampling
        self.max_tiles = max_tiles
        self.device = device
        self.dtype = dtype
        self.progress = progress
        self.random_state = random_state

    def fit(
        self,
        X: Sequence[BagLike],  # noqa: N803
        y: Sequence[Any],
        *,
        groups: Sequence[Any] | None = None,
        validation: float | tuple[Any, ...] | None = 0.2,
    ) -> Self:
        """Train on bags and labels; returns self, with the weights of the best validation epoch.

        The best epoch is the one with the lowest validation loss, as a mean of the last tenth of
        `epochs`, once a fifth of them is over; where it is the first of those, a warning says so.
        Every bag is read and checked before training starts. Bags without tiles are left out, with
        a warning. Where training is interrupted (Ctrl-C, a file that is gone) after an epoch or
        more, the classifier keeps the best weights so far, and the error goes on; before that it
        stays what it was.

        Args:
            X: The bags, n of them.
            y: Their labels.
            groups: The patient of each bag: a patient is never on both sides of the validation
                split. Without groups the split is by slide, with a warning. Bags with identical
                features stay on one side in any case.
            validation: The fraction to hold out, stratified by class as far as patients allow; or
                (X, y) or (X, y, groups); or None, to train for all epochs and keep the last.

        Raises:
            InputError: Labels of one class only, counts that differ, a parameter out of its
                range, or a patient or features on both sides of a given validation set.
            BagError: A bag that cannot be read, of another width, or not finite; it is named.
            MismatchError: Bags that were made with different models or settings.
            ModelError: A loss that is not finite, or a bag too large for the device.
        """
        settings = checked_settings(self.get_params())
        device = resolve_device(self.device)
        dtype = resolve_dtype(self.dtype, device)
        seed = seed_of(self.random_state)
        rng = np.random.default_rng(seed)
        setup = prepare(
            X, y, groups, validation,
            class_weight=self.class_weight, balanced=self.sampling == "balanced", rng=rng,
        )  # fmt: skip
        with seeded(seed, device), own_torch(device):
            trainer = Trainer(
                self._new_module(setup.width, len(setup.classes)).to(device),
                setup.train, setup.validation, settings,
                classes=len(setup.classes), device=device, dtype=dtype, rng=rng,
            )  # fmt: skip
            try:
                trainer.run()
            except BaseException as stop:
                if trainer.best is not None:
                    self._adopt(setup, trainer)
                    stop.add_note(
                        "The classifier keeps the weights of epoch"
                        f" {self.best_epoch_}, the best of {len(self.history_)}."
                    )
                raise
            self._adopt(setup, trainer)
        return self

    def predict_proba(self, X: Sequence[BagLike]) -> NDArray[np.float64]:  # noqa: N803
        """The probability of each class, float64 (n, C), columns as in `classes_`.

        A bag without tiles says nothing: its row is `class_prior_`, with a warning. Probabilities
        are those of a cohort in which classes are as frequent as training drew them: equally
        frequent with sampling="balanced". Raises BagError for a bag that cannot be read, is of
        another width or not finite, and MismatchError for one that was made otherwise than those
        of the training.
        """
        logs, empty = self._logs(X)
        return np.where(empty[:, None], self.class_prior_, np.exp(logs))

    def predict_log_proba(self, X: Sequence[BagLike]) -> NDArray[np.float64]:  # noqa: N803
        """The logarithm of `predict_proba`, (n, C), finite also where a probability rounds to 0."""
        return self._logs(X)[0]

    def _logs(self, X: Sequence[BagLike]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:  # noqa: N803
        """Log-probabilities of bags (n, C), and the mask of those without tiles, bool (n,)."""
        self._require_fitted()
        bags = Bags(X)
        runner = self._runner()
        logs = np.empty((len(bags), len(self.classes_)))
        empty = np.zeros(len(bags), dtype=np.bool_)
        for row in range(len(bags)):
            bag = self._fitting(bags, row)
            if len(bag.features) == 0:
                empty[row] = True
                with np.errstate(divide="ignore"):
                    logs[row] = np.log(self.class_prior_)
                continue
            logits = predict_logits(runner, [bag.features])
            logs[row] = (logits - log_sum_exp(logits)[:, None])[0]
        if empty.any():
            names = [bags.name(row) for row in np.flatnonzero(empty).tolist()]
            warn_of_empty(names, "their prediction is how frequent each class was in training")
        return logs, empty

    def predict(self, X: Sequence[BagLike]) -> NDArray[Any]:  # noqa: N803
        """The most probable class of each bag, (n,); see `predict_proba`."""
        chosen = self.predict_proba(X).argmax(axis=1)
        labels: NDArray[Any] = self.classes_[chosen]
        return labels

    def score(
        self,
        X: Sequence[BagLike],  # noqa: N803
        y: Sequence[Any],
        sample_weight: Sequence[float] | None = None,
    ) -> float:
        """The accuracy: the share of bags whose class is predicted; see `predict_proba`.

        A bag counts as much as `sample_weight` (n,) says; None counts all alike.
        """
        chosen = self.predict_proba(X).argmax(axis=1)
        labels = hashables(y, count=len(chosen), what="y")
        if not labels:
            raise InputError("X is empty; expected one bag or more to score")
        classes = self._class_list()
        right = [classes[i] == label for i, label in zip(chosen, labels, strict=True)]
        return float(np.average(right, weights=sample_weight))

    def attention(self, bag: BagLike) -> Attention:
        """The attention weight of each tile of one bag, in the order of its coords.

        Raises InputError for an aggregator without attention (mean, max).
        """
        self._require_fitted()
        found = self._fitting(Bags([bag], what="bag"), 0)
        scores = attention_of(self._runner(), found.features)
        if scores is None:
            raise InputError(
                f"the aggregator {self._kind()} has no attention; train a classifier with"
                ' aggregator="abmil", "clam_sb" or "transmil"'
            )
        return Attention(
            scores=scores,
            coords=found.coords,
            kind=getattr(self.aggregator_, "attention_kind", None) or "custom",
            tiles=found.tiles,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Save to the folder `path`: classifier.safetensors and classifier.json, without pickle.

        Raises OutputError where it cannot be written, or a label or parameter is not what JSON can
        hold. A module of your own has to be given again to `load`.
        """
        self._require_fitted()
        known = type(self.aggregator_) in AGGREGATORS.values()
        params = {k: _plain(v) for k, v in self.get_params().items() if k not in _NOT_SAVED}
        if not isinstance(params["random_state"], int):
            params["random_state"] = None  # a generator: where it stood is not known any more
        write_folder(
            path,
            Saved(
                state=self.aggregator_.state_dict(),
                config=aggregator_config(self.aggregator_) if known else None,
                kind=self._kind(),
                classes=self._class_list(),
                in_dim=self.n_features_in_,
                params=params,
                class_prior=self.class_prior_.tolist(),
                fingerprint=self.fingerprint_,
                history=self.history_,
                best_epoch=self.best_epoch_,
            ),
        )

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        aggregator: nn.Module | None = None,
        device: str | torch.device = "auto",
    ) -> Self:
        """Load the classifier from a folder that `save` wrote; no code in it is ever run.

        `aggregator` is for a module of your own: one with the architecture of that which was
        saved; its weights are replaced in a copy. Raises ModelError where the folder holds no
        classifier or a damaged one, and WeightsError where its weights are damaged or do not fit.
        """
        saved = read_folder(path)
        module = rebuilt(saved, copy.deepcopy(aggregator))
        params = dict(saved.params)
        if saved.config is not None:
            params["aggregator"] = saved.config["name"]
            params["aggregator_options"] = dict(saved.config["options"])
        else:
            params["aggregator"] = aggregator
        if unknown := sorted(set(params) - set(cls._defaults())):
            raise ModelError(
                f"{os.fspath(path)} has the parameters {unknown}, which this xmag does not know;"
                " upgrade it: pip install --upgrade xmag"
            )
        loaded = cls(**params, device=device)
        loaded._set_fitted(
            module,
            saved.classes,
            in_dim=saved.in_dim,
            prior=np.array(saved.class_prior),
            fingerprint=saved.fingerprint,
            device=resolve_device(device),
        )
        loaded.history_, loaded.best_epoch_ = saved.history, saved.best_epoch
        return loaded

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
        """A fitted classifier from an aggregator that was trained elsewhere.

        Args:
            module: The aggregator, which is taken over: moved to the device, in eval mode.
            classes: The label of each column of its logits.
            in_dim: The width D of features.
            class_prior: Probabilities of a bag without tiles, (C,); uniform by default.
            provenance: That of the bags it was trained on, or of others like them.
            device: As in the constructor.
            params: Other parameters of the constructor.
        """
        given = hashables(classes, count=len(classes), what="classes")
        if len(distinct(given)) != len(given):
            raise InputError(f"classes are {given}; expected each one once")
        prior = np.full(len(given), 1 / len(given)) if class_prior is None else class_prior
        fitted = cls(aggregator=module, device=device, **params)
        if type(module) in AGGREGATORS.values():
            config = aggregator_config(module)
            fitted.set_params(aggregator=config["name"], aggregator_options=config["options"])
        fitted._set_fitted(
            module,
            given,
            in_dim=in_dim,
            prior=np.asarray(prior, dtype=np.float64),
            fingerprint=None if provenance is None else _fingerprint(provenance),
            device=resolve_device(device),
        )
        fitted.history_, fitted.best_epoch_ = [], None
        return fitted

    def _new_module(self, in_dim: int, classes: int) -> nn.Module:
        options = dict(self.aggregator_options or {})
        # What the program has made torch's default device and dtype is none of our business.
        with torch.device("cpu"), Float32():
            module = new_aggregator(self.aggregator, in_dim=in_dim, classes=classes, **options)
        if module is self.aggregator:
            module = copy.deepcopy(module)
        if not any(parameter.requires_grad for parameter in module.parameters()):
            raise InputError(f"the aggregator {type(module).__name__} has no parameters to train")
        return module.float()

    def _adopt(self, setup: Setup, trainer: Trainer) -> None:
        """Set all fitted attributes, from a trainer that completed an epoch or more."""
        assert trainer.best is not None
        trainer.module.load_state_dict(trainer.best.state)
        self._set_fitted(
            trainer.module,
            setup.classes,
            in_dim=setup.width,
            prior=setup.prior,
            fingerprint=None if setup.provenance is None else _fingerprint(setup.provenance),
            device=trainer.device,
        )
        self.history_, self.best_epoch_ = trainer.history, trainer.best.epoch


def _plain(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return value.item() if isinstance(value, np.generic) else value


def _fingerprint(provenance: Provenance) -> Mapping[str, Any]:
    """The fingerprint as plain dicts and lists."""
    return dict(provenance.to_dict()["fingerprint"])
