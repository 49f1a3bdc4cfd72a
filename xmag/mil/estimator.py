"""Base of MIL estimators: fitting, attention, pooled vectors, confidence, saving and loading."""

import copy
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any, ClassVar, Generic, Self, TypeVar, cast, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from xmag import records
from xmag.devices import Float32, own_torch, resolve_device, resolve_dtype, seeded
from xmag.errors import InputError, ModelError, not_fitted
from xmag.metrics.labels import Bools, Floats, Ints
from xmag.mil.aggregators import AGGREGATORS, aggregator_config, with_outputs
from xmag.mil.bags import (
    BagDataset,
    BagLike,
    Bags,
    Fusion,
    Origin,
    SingleBag,
    is_list,
    mean_of,
    read_dataset,
    require_same_origin,
)
from xmag.mil.batches import BagSampler, BatchedAggregator
from xmag.mil.confidence import LEAST_PATIENTS, Known, fit_temperature
from xmag.mil.heads import Head
from xmag.mil.params import Estimator, is_whole, seed_of
from xmag.mil.pooling import Attention
from xmag.mil.saving import EstimatorFolder, Saved, rebuilt
from xmag.mil.trainer import BagTrainer, Epoch
from xmag.progress import ProgressOption
from xmag.provenance import Provenance
from xmag.training import warn_of_early_best
from xmag.training.splits import held_out, read_validation, warn_without_groups

H = TypeVar("H", bound=Head)


@dataclass(kw_only=True, eq=False, repr=False)
class MILEstimator(Estimator, Generic[H]):
    """Base of estimators on bags of embeddings: an aggregator, trained with the loss of a head.

    A subclass says which head its labels make, and what it predicts from logits. Parameters and
    attributes are those of `MILClassifier`.
    """

    aggregator: str | nn.Module = "abmil"
    aggregator_options: Mapping[str, Any] | None = None
    epochs: int = 100
    patience: int = 20
    batch_size: int = 8
    lr: float = 3e-4
    weight_decay: float = 1e-4
    max_tiles: int | None = None
    fusion: Fusion = "early"
    device: str | torch.device = "auto"
    dtype: str | torch.dtype = "auto"
    progress: ProgressOption = None
    random_state: int | np.random.RandomState | np.random.Generator | None = None

    n_features_in_: int = field(init=False)
    aggregator_: nn.Module = field(init=False)
    history_: list[Epoch] = field(init=False)
    best_epoch_: int | None = field(init=False)
    fingerprint_: dict[str, Any] | None = field(init=False)
    temperature_: float = field(init=False)
    _head: H = field(init=False)
    _device: torch.device = field(init=False)
    _known: Known = field(init=False)
    _fusion: Fusion = field(init=False)

    _noun: ClassVar[str] = "estimator"
    _head_type: ClassVar[type[Any]]

    def _new_head(self, labels: Any) -> H:
        """The head for the labels of the training."""
        raise NotImplementedError

    def _balance(self, head: H, train: BagDataset, check: BagDataset | None) -> Ints | None:  # noqa: ARG002
        """Set the weights of bags in the loss; the strata to draw equally often, None for none."""
        return None

    def fit(
        self,
        X: Sequence[BagLike],
        y: Any,
        *,
        groups: Sequence[Any] | None = None,
        validation: float | tuple[Any, ...] | None = 0.2,
    ) -> Self:
        """Train on cases and labels; returns self, with the weights of the best validation epoch.

        The best epoch is the one with the lowest validation loss, as a mean of the last tenth of
        `epochs`, once a fifth of them is over; where it is the first of those, a warning says so.
        Every bag is read and checked before training starts. Cases without tiles are left out, with
        a warning. Where training is interrupted (Ctrl-C, a file that is gone) after an epoch or
        more, the estimator keeps the best weights so far, and the error goes on; before that it
        stays what it was.

        Args:
            X: The cases, n of them: bags, or lists of the bags of a patient.
            y: Their labels.
            groups: The patient of each case: a patient is never on both sides of the validation
                split. Without groups the split is by case, with a warning where these are bags.
                Cases that share a bag (identical features) stay on one side in any case.
            validation: The fraction to hold out, stratified by class as far as patients allow; or
                (X, y) or (X, y, groups); or None, to train for all epochs and keep the last.

        Raises:
            InputError: Labels of one class only, targets that are constant, or fewer than two
                events; counts that differ, a parameter out of its range, or a patient or features
                on both sides of a given validation set.
            BagError: A bag that cannot be read, of another width, or not finite; it is named.
            MismatchError: Bags that were made with different models or settings.
            ModelError: A loss that is not finite, or a bag too large for the device.
        """
        self._require_params()
        device = resolve_device(self.device)
        dtype = resolve_dtype(self.dtype, device)
        seed = seed_of(self.random_state)
        rng = np.random.default_rng(seed)
        head, data, train, check = self._datasets(X, y, groups, validation, rng)
        if check is not None:
            check.weights = head.validation_weights(check.targets)
        strata = self._balance(head, train, check)
        known = Known.of(data, check, rng=np.random.default_rng([seed, 1]))
        with seeded(seed, device), own_torch(device):
            module = self._new_module(train.origin[0], head).to(device)
            trainer = BagTrainer(
                BatchedAggregator(module, device, outputs=head.outputs, dtype=dtype),
                head, train, check, self,
                sampler=BagSampler(len(train), rng, strata=strata), rng=rng,
            )  # fmt: skip
            try:
                trainer.run(self.progress, total=self.epochs, desc="training", unit="epoch")
            except BaseException as stop:
                if trainer.best is not None:
                    self._adopt(trainer, known)
                    stop.add_note(
                        f"The {type(self).__name__} keeps the weights of epoch"
                        f" {self.best_epoch_}, the best of {len(self.history_)}."
                    )
                raise
            self._adopt(trainer, known)
        if check is not None and self.best_epoch_ is not None:
            trained = len(self.history_)
            warn_of_early_best(self.best_epoch_, trained=trained, epochs=self.epochs, stacklevel=2)
        return self

    @overload
    def attention(self, case: SingleBag) -> Attention: ...

    @overload
    def attention(self, case: list[Any] | tuple[Any, ...]) -> list[Attention]: ...

    def attention(self, case: BagLike) -> Attention | list[Attention]:
        """The attention weight of each tile of a bag, in the order of its coords.

        Of a list of bags, a list of theirs: with fusion="early" the weights that the tiles of all
        have together, with "late" each bag's own, divided by the number of bags that have tiles.
        Either way all sum to 1 together. Raises InputError for an aggregator without attention
        (mean, max).
        """
        self._require_fitted()
        bags = Bags([case], what="bag").read_matching(0, self._origin)
        scores = self._batched().attention([bag.features for bag in bags])
        kind = getattr(self.aggregator_, "attention_kind", None) or "custom"
        found = [
            Attention(scores=part, coords=bag.coords, kind=kind, tiles=bag.tiles)
            for part, bag in zip(scores, bags, strict=True)
        ]
        return found if is_list(case) else found[0]

    def embed(self, X: Sequence[BagLike]) -> NDArray[np.float32]:
        """The pooled vector of each case, float32 (n, E): what the last layer makes logits of.

        With fusion="late" it is the mean of those of the bags. A case without tiles gives zeros,
        with a warning. Raises InputError for a module of your own whose MILOutput has no `pooled`.
        """
        self._require_fitted()
        model, origin = self._batched(), self._origin
        width = len(model.pooled([np.zeros((1, origin[0]), np.float32)]))
        vectors, _ = Bags(X).each(model.pooled, "their vector is 0", width=width, origin=origin)
        return vectors.astype(np.float32)

    def calibrate(
        self, X: Sequence[BagLike], y: Any, *, groups: Sequence[Any] | None = None
    ) -> Self:
        """Fit `temperature_`, by which log-probabilities are divided; returns self.

        It makes the log loss of these cases lowest (temperature scaling), and changes no
        prediction. `save` keeps it, `fit` and scikit-learn's clone drop it. Cases without tiles are
        left out. Labels that do not exclude each other share one temperature, of their logits.

        Args:
            X: Cases that `fit` did not see, neither to train on nor to validate with.
            y: Their labels.
            groups: The patient of each case.

        Raises:
            InputError: An estimator without probabilities (survival, regression); a bag of the
                training, by its features; or, where `fit` was given groups too, a patient of it. A
                loaded or unpickled estimator knows the features, and no patients.
        """
        self._require_fitted()
        if not hasattr(self, "predict_proba"):
            raise InputError(
                f"{type(self).__name__} predicts no probabilities, so there is nothing to calibrate"
            )
        cases = Bags(X, least=1)
        targets = self._head.encode(self._head_type.read(y, len(cases), "y"), "y")
        data = read_dataset(cases, targets, groups)
        require_same_origin(data.first, data.origin, "those of the training", self._origin)
        self._known.require_new(data)
        if not len(data):
            raise InputError("no case to calibrate with has any tile; give others")
        of = self._batched().logits
        logits = np.stack([of(data.features(row)) for row in range(len(data))])
        values, losses = cast(Any, self._head).calibration(logits, data.targets)
        self.temperature_ = fit_temperature(values, losses)
        return self

    def novelty(self, X: Sequence[BagLike]) -> Floats:
        """Novelty of each case, unlike those of the training: percentiles 0 to 100, float64 (n,).

        It is the share of training cases that lie nearer to the others than this case does, by the
        Mahalanobis distance of the mean of a case's tiles, with shrunk covariance. Each of them was
        held out of the mean and covariance that it was measured with: a new case like them is at
        any percentile, one from elsewhere near 100. A case without tiles is at 100, with a warning.

        The mean is that of the features, and not `embed`: a trained aggregator has learned its
        training cases by heart, and new ones of the same cohort lie elsewhere (see
        benchmarks/mil_confidence.py). After Lee et al. 2018, "A Simple
        Unified Framework for Detecting Out-of-Distribution Samples and Adversarial Attacks".

        Raises InputError where `fit` had fewer than 10 patients (cases, without groups) with tiles.
        """
        self._require_fitted()
        if self._known.novelty is None:
            raise InputError(
                f"this {type(self).__name__} cannot tell what is novel; expected one that was"
                f" fitted to {LEAST_PATIENTS} patients (cases, without groups) or more with tiles"
            )
        of_empty, origin = "their novelty is 100", self._origin
        means, empty = Bags(X).each(mean_of, of_empty, width=origin[0], origin=origin)
        return np.where(empty, 100.0, self._known.novelty.percentiles(means))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Save to the folder `path`, as safetensors and JSON, without pickle.

        A MILClassifier's files are classifier.safetensors and classifier.json; the others' begin
        with regressor and survival. Raises OutputError where they cannot be written, or a label or
        parameter is not what JSON can hold. A module of your own has to be given again to `load`.
        """
        self._require_fitted()
        known = type(self.aggregator_) in AGGREGATORS.values()
        saved = Saved(
            aggregator=aggregator_config(self.aggregator_) if known else None,
            aggregator_class=type(self.aggregator_).__name__,
            in_dim=self.n_features_in_,
            fingerprint=self.fingerprint_,
            params={**self._params_to_json(), "fusion": self._fusion},
            best_epoch=self.best_epoch_,
            history=self.history_,
            temperature=getattr(self, "temperature_", None),
        )
        values = {**self._head.to_json(), **saved.to_dict()}
        state = {**self.aggregator_.state_dict(), **self._known.to_tensors()}
        EstimatorFolder(path, type(self)).write(values, state, saved.aggregator_class)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        aggregator: nn.Module | None = None,
        device: str | torch.device = "auto",
    ) -> Self:
        """Load the estimator from a folder that `save` wrote; no code in it is ever run.

        `aggregator` is for a module of your own: one with the architecture of that which was
        saved; its weights are replaced in a copy. Raises ModelError where the folder holds no
        such estimator or a damaged one, and WeightsError where its weights are damaged or do not
        fit.
        """
        folder = EstimatorFolder(path, cls)
        values, state = folder.read()
        with folder.format.reading(str(folder.description)):
            head: H = cls._head_type.from_json(values)
            saved = records.from_dict(Saved, values)
            params = cls._params_from_json(saved.params)
            if unknown := sorted(set(params) - set(cls._defaults())):
                raise ModelError(
                    f"{os.fspath(path)} has the parameters {unknown}, which this xmag does not"
                    " know; upgrade it: pip install --upgrade xmag"
                )
            loaded = cls(**params, device=device)
            loaded._require_fusion()
        known = Known.from_tensors(state)
        module = rebuilt(saved, state, copy.deepcopy(aggregator), head=head)
        if saved.aggregator is not None:
            loaded.aggregator = saved.aggregator["name"]
            loaded.aggregator_options = dict(saved.aggregator["options"])
        elif aggregator is not None:
            loaded.aggregator = aggregator
        loaded._set_fitted(
            module, head, resolve_device(device), saved.in_dim, saved.fingerprint,
            history=saved.history, best_epoch=saved.best_epoch, known=known,
        )  # fmt: skip
        if saved.temperature is not None:
            loaded.temperature_ = saved.temperature
        return loaded

    def _require_params(self) -> None:
        """Raise InputError for a parameter out of its range."""
        self._require_fusion()
        for name in ("epochs", "patience", "batch_size", "max_tiles"):
            value = getattr(self, name)
            fits = is_whole(value, 1) or (name == "max_tiles" and value is None)
            records.require(self, name, fits, "an int from 1 on")
        for name, least in (("lr", "above 0"), ("weight_decay", "from 0 on")):
            value = getattr(self, name)
            number = isinstance(value, Real) and not isinstance(value, bool)
            fits = number and (0 < value < math.inf or (value == 0 and least == "from 0 on"))
            records.require(self, name, fits, f"a number {least}")

    def _require_fusion(self) -> None:
        fits = self.fusion in ("early", "late")
        records.require(self, "fusion", fits, '"early" (one bag of all) or "late" (a mean of each)')

    def _datasets(
        self, X: Any, y: Any, groups: Any, validation: Any, rng: np.random.Generator
    ) -> tuple[H, BagDataset, BagDataset, BagDataset | None]:
        """The head, and the checked datasets: of X, to train on, to validate with; see `fit`."""
        fraction, given = read_validation(validation, what="X")
        bags = Bags(X, least=1)
        labels = self._head_type.read(y, len(bags), "y")
        head = self._new_head(labels)
        data = read_dataset(bags, head.encode(labels, "y"), groups, fusion=self.fusion)
        head.require_trainable(data.targets)
        train, check = data, None
        if fraction is not None:
            held = held_out(data.units(), head.strata(data.targets), fraction, rng)
            train, check = data.subset(~held), data.subset(held)
        elif given is not None:
            others = Bags(given[0], what="validation X", least=1)
            labels = self._head_type.read(given[1], len(others), "validation y")
            targets = head.encode(labels, "validation y")
            check = read_dataset(others, targets, given[2], fusion=self.fusion, of="validation ")
            if not len(check):
                raise InputError("the validation bags have no tiles at all; give others, or None")
            data.require_separate(check)
        # Who gives lists of bags knows whose they are.
        unknown = check is not None and (train.groups is None or check.groups is None)
        if unknown and not bags.has_lists:
            warn_without_groups()
        return head, data, train, check

    def _new_module(self, in_dim: int, head: H) -> nn.Module:
        options = dict(self.aggregator_options or {})
        # What the program has made torch's default device and dtype is none of our business.
        with torch.device("cpu"), Float32():
            module = with_outputs(
                self.aggregator, in_dim, head.outputs, options, last_layer=head.last_layer
            )
        if module is self.aggregator:
            module = copy.deepcopy(module)
        if not any(parameter.requires_grad for parameter in module.parameters()):
            raise InputError(f"the aggregator {type(module).__name__} has no parameters to train")
        return module.float()

    def _adopt(self, trainer: BagTrainer, known: Known) -> None:
        """Set all fitted attributes, from a trainer that completed an epoch."""
        self._set_fitted(
            trainer.result(), cast(H, trainer.head), trainer.model.device, *trainer.train.origin,
            history=trainer.history, best_epoch=trainer.progress.best_epoch, known=known,
        )  # fmt: skip

    def _set_fitted(
        self, module: nn.Module, head: H, device: torch.device,
        in_dim: int, made: Provenance | Mapping[str, Any] | None,
        *, history: Sequence[Epoch] = (), best_epoch: int | None = None, known: Known | None = None,
    ) -> None:  # fmt: skip
        """Set the fitted attributes; `made` is the provenance of the bags, or a fingerprint."""
        fingerprint = made.to_dict()["fingerprint"] if isinstance(made, Provenance) else made
        self._require_fusion()
        self._head, self._device, self._fusion = head, device, self.fusion
        self._known = known or Known()
        self.__dict__.pop("temperature_", None)
        self.aggregator_ = module.to(device).eval()
        self.n_features_in_ = in_dim
        self.fingerprint_ = None if fingerprint is None else dict(fingerprint)
        self.history_, self.best_epoch_ = list(history), best_epoch

    def _predict_logits(self, X: Any, of_empty: str) -> tuple[Floats, Bools]:
        """The logits of bags (n, C), and which have no tiles: a warning says their prediction."""
        self._require_fitted()
        logits, empty = Bags(X).each(
            self._batched().logits, of_empty,
            width=self._head.outputs, origin=self._origin,
        )  # fmt: skip
        if hasattr(self, "temperature_"):
            logits = self._head.tempered(logits, self.temperature_)
        return logits, empty

    @property
    def _origin(self) -> Origin:
        made = self.fingerprint_
        return self.n_features_in_, None if made is None else Provenance(made, {})

    def _batched(self) -> BatchedAggregator:
        fuse = self._head.fuse if self._fusion == "late" else None
        outputs = self._head.outputs
        return BatchedAggregator(self.aggregator_, self._device, outputs=outputs, fuse=fuse)

    def _require_fitted(self) -> None:
        if not self.__sklearn_is_fitted__():
            name = type(self).__name__
            raise not_fitted(
                f"this {name} is not fitted; call fit(X, y) first, or {name}.load(path)"
            )

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "aggregator_")

    def __getstate__(self) -> dict[str, Any]:
        # A pickle may be opened where there is no GPU.
        state = {name: value for name, value in self.__dict__.items() if name != "_device"}
        if "aggregator_" in state:
            state["_known"] = replace(state["_known"], patients=None)
            state["aggregator_"] = copy.deepcopy(state["aggregator_"]).cpu()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if "aggregator_" in state:
            try:
                self._device = resolve_device(self.device)
            except InputError:
                self._device = torch.device("cpu")
            self.aggregator_.to(self._device)
