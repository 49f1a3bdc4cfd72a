"""Base of MIL estimators: scikit-learn's interface, fitting, attention, saving and loading.

scikit-learn is imported only where it calls itself, and is loaded by then: see
https://scikit-learn.org/stable/developers/develop.html.
"""

import copy
import inspect
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from xmag import records
from xmag.devices import Float32, own_torch, resolve_device, resolve_dtype, seeded
from xmag.errors import InputError, ModelError, not_fitted
from xmag.geometry import TileGeometry
from xmag.mil.aggregators import AGGREGATORS, aggregator_config, with_outputs
from xmag.mil.bags import BagDataset, BagLike, Bags, read_dataset
from xmag.mil.batches import BagSampler, BatchedAggregator
from xmag.mil.heads import Head
from xmag.mil.saving import EstimatorFolder, Saved, rebuilt
from xmag.mil.trainer import BagTrainer, Epoch, Settings
from xmag.provenance import Provenance
from xmag.training import warn_of_early_best
from xmag.training.splits import held_out, read_validation, warn_without_groups

if TYPE_CHECKING:
    from sklearn.utils.metadata_routing import MetadataRequest

H = TypeVar("H", bound=Head)

_UNCHANGED = "$UNCHANGED$"  # scikit-learn's own word for it, sklearn.utils.metadata_routing
_NOT_SAVED = ("aggregator", "aggregator_options", "device")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Attention:
    """Attention weights of the tiles of a bag; row i belongs to tile i of the bag.

    Attributes:
        scores: float32 (N,), not negative; they sum to 1 over a bag that has tiles.
        coords: int64 (N, 2), top-left corner of each tile, level-0 px; None for a bag without.
        kind: "softmax" for learned weights of a mean (ABMIL, CLAM-SB), "nystrom" for what
            TransMIL's class token attends to, "custom" for an aggregator that says nothing.
        tiles: Size and scale of the tiles; None where the bag does not know.
    """

    scores: NDArray[np.float32]
    coords: NDArray[np.int64] | None
    kind: str
    tiles: TileGeometry | None = None

    def __len__(self) -> int:
        return len(self.scores)


class Estimator:
    """scikit-learn's interface: get_params and set_params by the constructor, and routing."""

    @classmethod
    def _defaults(cls) -> dict[str, Any]:
        parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
        return {parameter.name: parameter.default for parameter in parameters}

    def get_params(self, deep: bool = True) -> dict[str, Any]:  # noqa: ARG002
        """The constructor's parameters by name; `deep` changes nothing."""
        return {name: getattr(self, name) for name in sorted(self._defaults())}

    def set_params(self, **params: Any) -> Self:
        """Set constructor parameters and return self; InputError for an unknown name."""
        known = self._defaults()
        if unknown := sorted(set(params) - set(known)):
            raise InputError(
                f"{type(self).__name__} has no parameter {unknown[0]!r}; expected one of"
                f" {sorted(known)}"
            )
        for name, value in params.items():
            setattr(self, name, value)
        return self

    def __repr__(self) -> str:
        shown = [
            f"{name}={getattr(self, name)!r}"
            for name, default in self._defaults().items()
            if type(getattr(self, name)) is not type(default) or getattr(self, name) != default
        ]
        return f"{type(self).__name__}({', '.join(shown)})"

    def set_fit_request(
        self, *, groups: bool | str | None = _UNCHANGED, validation: bool | str | None = _UNCHANGED
    ) -> Self:
        """Request that scikit-learn's metadata routing passes these to `fit`; returns self.

        Needs ``sklearn.set_config(enable_metadata_routing=True)``, as with every estimator.
        """
        return self._ask("fit", groups=groups, validation=validation)

    def set_score_request(self, *, sample_weight: bool | str | None = _UNCHANGED) -> Self:
        """Request that metadata routing passes `sample_weight` to `score`; returns self."""
        return self._ask("score", sample_weight=sample_weight)

    def _ask(self, method: str, **aliases: bool | str | None) -> Self:
        from sklearn import get_config

        if not get_config()["enable_metadata_routing"]:
            raise RuntimeError(
                "metadata routing is off; switch it on first:"
                " sklearn.set_config(enable_metadata_routing=True)"
            )
        request = self.get_metadata_routing()
        for name, alias in aliases.items():
            if alias != _UNCHANGED:
                getattr(request, method).add_request(param=name, alias=alias)
        self._metadata_request = request
        return self

    def get_metadata_routing(self) -> "MetadataRequest":
        """scikit-learn's MetadataRequest: the arguments of `fit` and `score` that it may route."""
        from sklearn.utils.metadata_routing import MetadataRequest

        if hasattr(self, "_metadata_request"):
            return copy.deepcopy(self._metadata_request)
        request = MetadataRequest(owner=type(self).__name__)
        for name in ("groups", "validation"):
            request.fit.add_request(param=name, alias=None)
        # A pipeline's own score hands it on whether it was given or not.
        request.score.add_request(param="sample_weight", alias=None)
        return request


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
    device: str | torch.device = "auto"
    dtype: str | torch.dtype = "auto"
    progress: bool | None = None
    random_state: int | np.random.RandomState | np.random.Generator | None = None

    n_features_in_: int = field(init=False)
    aggregator_: nn.Module = field(init=False)
    history_: list[Epoch] = field(init=False)
    best_epoch_: int | None = field(init=False)
    fingerprint_: dict[str, Any] | None = field(init=False)
    _head: H = field(init=False)
    _device: torch.device = field(init=False)

    _noun: ClassVar[str] = "estimator"
    _head_type: ClassVar[type[Any]]

    def _new_head(self, labels: Any) -> H:
        """The head for the labels of the training."""
        raise NotImplementedError

    def _balance(
        self,
        head: H,  # noqa: ARG002
        train: BagDataset,  # noqa: ARG002
        check: BagDataset | None,  # noqa: ARG002
    ) -> NDArray[np.int64] | None:
        """Set the weights of bags in the loss; the strata to draw equally often, None for none.

        Here all weights are 1, and nothing is drawn more often than once an epoch.
        """
        return None

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
        more, the estimator keeps the best weights so far, and the error goes on; before that it
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
        settings = self._settings()
        device = resolve_device(self.device)
        dtype = resolve_dtype(self.dtype, device)
        seed = seed_of(self.random_state)
        rng = np.random.default_rng(seed)
        head, train, check = self._datasets(X, y, groups, validation, rng)
        strata = self._balance(head, train, check)
        with seeded(seed, device), own_torch(device):
            module = self._new_module(train.origin[0], head).to(device)
            trainer = BagTrainer(
                BatchedAggregator(module, device, outputs=head.outputs, dtype=dtype),
                head, train, check, settings,
                sampler=BagSampler(len(train), rng, strata=strata), rng=rng,
            )  # fmt: skip
            try:
                trainer.run(self.progress, total=self.epochs, desc="training", unit="epoch")
            except BaseException as stop:
                if trainer.best is not None:
                    self._adopt(trainer)
                    stop.add_note(
                        f"The {self._noun} keeps the weights of epoch {self.best_epoch_}, the best"
                        f" of {len(self.history_)}."
                    )
                raise
            best = self._adopt(trainer)
        if check is not None:
            warn_of_early_best(
                best, trained=len(self.history_), epochs=settings.epochs, stacklevel=2
            )
        return self

    def attention(self, bag: BagLike) -> Attention:
        """The attention weight of each tile of one bag, in the order of its coords.

        Raises InputError for an aggregator without attention (mean, max).
        """
        self._require_fitted()
        found = Bags([bag], what="bag").read_matching(0, self.n_features_in_, self.fingerprint_)
        scores = self._batched().output_of(found.features).attention
        if scores is None:
            raise InputError(
                f"the aggregator {type(self.aggregator_).__name__} has no attention; train with"
                ' aggregator="abmil", "clam_sb" or "transmil"'
            )
        return Attention(
            scores=scores[0].float().cpu().numpy(),
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
        saved = Saved(
            aggregator=aggregator_config(self.aggregator_) if known else None,
            aggregator_class=type(self.aggregator_).__name__,
            in_dim=self.n_features_in_,
            fingerprint=self.fingerprint_,
            params=self._params_to_json(),
            best_epoch=self.best_epoch_,
            history=self.history_,
        )
        values = {**self._head.to_json(), **saved.to_dict()}
        self._folder(path).write(values, self.aggregator_.state_dict(), saved.aggregator_class)

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
        folder = cls._folder(path)
        values, state = folder.read()
        with folder.format.reading(str(folder.description)):
            head: H = cls._head_type.from_json(values)
            saved = records.from_dict(Saved, values)
            params = cls._params_from_json(saved.params)
        module = rebuilt(saved, state, copy.deepcopy(aggregator), head=head)
        params["aggregator"] = aggregator
        if saved.aggregator is not None:
            params["aggregator"] = saved.aggregator["name"]
            params["aggregator_options"] = dict(saved.aggregator["options"])
        if unknown := sorted(set(params) - set(cls._defaults())):
            raise ModelError(
                f"{os.fspath(path)} has the parameters {unknown}, which this xmag does not know;"
                " upgrade it: pip install --upgrade xmag"
            )
        loaded = cls(**params, device=device)
        loaded._set_fitted(
            module, head, resolve_device(device), saved.in_dim, saved.fingerprint,
            history=saved.history, best_epoch=saved.best_epoch,
        )  # fmt: skip
        return loaded

    @classmethod
    def _folder(cls, path: str | os.PathLike[str]) -> EstimatorFolder:
        return EstimatorFolder(path, estimator=cls.__name__, noun=cls._noun)

    def _params_to_json(self) -> dict[str, Any]:
        """The parameters as JSON has them, but for those that are saved otherwise or not at all."""
        params = {k: _plain(v) for k, v in self.get_params().items() if k not in _NOT_SAVED}
        if not isinstance(params["random_state"], int):
            params["random_state"] = None  # a generator: where it stood is not known any more
        return params

    @classmethod
    def _params_from_json(cls, params: dict[str, Any]) -> dict[str, Any]:
        return params

    def _settings(self) -> Settings:
        """The checked training settings; InputError for a parameter out of its range."""
        for name in ("epochs", "patience", "batch_size", "max_tiles"):
            value = getattr(self, name)
            whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
            fits = (whole and value >= 1) or (name == "max_tiles" and value is None)
            records.require(self, name, fits, "an int from 1 on")
        for name, least in (("lr", "above 0"), ("weight_decay", "from 0 on")):
            value = getattr(self, name)
            number = isinstance(value, Real) and not isinstance(value, bool)
            fits = number and (0 < value < math.inf or (value == 0 and least == "from 0 on"))
            records.require(self, name, fits, f"a number {least}")
        return Settings(**{item.name: getattr(self, item.name) for item in fields(Settings)})

    def _datasets(
        self,
        X: Any,  # noqa: N803
        y: Any,
        groups: Any,
        validation: Any,
        rng: np.random.Generator,
    ) -> tuple[H, BagDataset, BagDataset | None]:
        """The head, and the checked datasets to train and to validate on; see `fit`."""
        fraction, given = read_validation(validation, what="X")
        bags = Bags(X, least=1)
        labels = self._head_type.read(y, len(bags), "y")
        head = self._new_head(labels)
        data = read_dataset(bags, head.encode(labels, "y"), groups)
        head.require_trainable(data.targets)
        train, check = data, None
        if fraction is not None:
            held = held_out(data.units(), head.strata(data.targets), fraction, rng)
            train, check = data.subset(~held), data.subset(held)
        elif given is not None:
            bags = Bags(given[0], what="validation X", least=1)
            labels = self._head_type.read(given[1], len(bags), "validation y")
            targets = head.encode(labels, "validation y")
            check = read_dataset(bags, targets, given[2], of="validation ")
            if not len(check):
                raise InputError("the validation bags have no tiles at all; give others, or None")
            data.require_separate(check)
        if check is not None and (train.groups is None or check.groups is None):
            warn_without_groups()
        return head, train, check

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

    def _adopt(self, trainer: BagTrainer) -> int:
        """Set all fitted attributes, from a trainer that completed an epoch; the best epoch."""
        best = trainer.progress.best_epoch
        assert best is not None
        self._set_fitted(
            trainer.result(), cast(H, trainer.head), trainer.model.device, *trainer.train.origin,
            history=trainer.history, best_epoch=best,
        )  # fmt: skip
        return best

    def _set_fitted(
        self, module: nn.Module, head: H, device: torch.device,
        in_dim: int, made: Provenance | Mapping[str, Any] | None,
        *, history: Sequence[Epoch] = (), best_epoch: int | None = None,
    ) -> None:  # fmt: skip
        """Set the fitted attributes; `made` is the provenance of the bags, or a fingerprint."""
        fingerprint = made.to_dict()["fingerprint"] if isinstance(made, Provenance) else made
        self._head, self._device = head, device
        self.aggregator_ = module.to(device).eval()
        self.n_features_in_ = in_dim
        self.fingerprint_ = None if fingerprint is None else dict(fingerprint)
        self.history_, self.best_epoch_ = list(history), best_epoch

    def _predict_logits(
        self,
        X: Any,  # noqa: N803
        of_empty: str,
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """The logits of bags (n, C), and the mask of those without tiles, bool (n,).

        Warns of these; `of_empty` says what their prediction is.
        """
        self._require_fitted()
        bags, model = Bags(X), self._batched()
        logits = np.zeros((len(bags), model.outputs))
        empty = np.zeros(len(bags), dtype=np.bool_)
        for row in range(len(bags)):
            features = bags.read_matching(row, self.n_features_in_, self.fingerprint_).features
            empty[row] = len(features) == 0
            if not empty[row]:
                logits[row] = model.logits(features)
        bags.warn_of_empty(np.flatnonzero(empty).tolist(), of_empty)
        return logits, empty

    def _batched(self) -> BatchedAggregator:
        return BatchedAggregator(self.aggregator_, self._device, outputs=self._head.outputs)

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


def seed_of(random_state: Any) -> int:
    """The seed for a `random_state=` argument: the int itself, or a draw from a generator.

    Raises InputError for anything else. None draws from the operating system, and leaves NumPy's
    global generator alone.
    """
    if random_state is None:
        return int(np.random.SeedSequence().generate_state(1, np.uint64)[0] >> 1)
    if isinstance(random_state, np.random.RandomState):
        return int(random_state.randint(2**31 - 1))
    if isinstance(random_state, np.random.Generator):
        return int(random_state.integers(2**63 - 1))
    whole = isinstance(random_state, int | np.integer) and not isinstance(random_state, bool)
    if whole and 0 <= random_state < 2**63:
        return int(random_state)
    raise InputError(
        f"random_state is {random_state!r}; expected None, an int from 0 on, or a generator of"
        " NumPy"
    )


def _plain(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return value.item() if isinstance(value, np.generic) else value
