"""The state of a fitted classifier: its attributes, and its pickling."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from xmag.devices import resolve_device
from xmag.errors import InputError, not_fitted
from xmag.mil.bags import Bag, Bags, require_same_origin, require_width
from xmag.mil.batches import Runner
from xmag.mil.estimator import Estimator
from xmag.mil.labels import class_array
from xmag.mil.training import Epoch
from xmag.provenance import Provenance


class Fitted(Estimator):
    """Base of MILClassifier: its fitted attributes, and pickling without a device."""

    classes_: NDArray[Any]
    n_features_in_: int
    aggregator_: nn.Module
    history_: list[Epoch]
    best_epoch_: int | None
    class_prior_: NDArray[np.float64]
    fingerprint_: Mapping[str, Any] | None
    device: str | torch.device
    _device: torch.device

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

    def _set_fitted(
        self,
        module: nn.Module,
        classes: Sequence[Any],
        *,
        in_dim: int,
        prior: NDArray[np.float64],
        fingerprint: Mapping[str, Any] | None,
        device: torch.device,
    ) -> None:
        self.aggregator_ = module.to(device).eval()
        self.classes_ = class_array(classes)
        self.n_features_in_ = in_dim
        self.class_prior_ = prior
        self.fingerprint_ = fingerprint
        self._device = device

    def _fitting(self, bags: Bags, row: int) -> Bag:
        """Read a bag to predict on; raises where its width or fingerprint is not the training's."""
        bag: Bag = bags[row]
        reference = "those of the training"
        require_width(bag.features.shape[1], self.n_features_in_, bags.name(row), reference)
        if self.fingerprint_ is not None:
            expected = Provenance(self.fingerprint_, {})
            require_same_origin(bag.provenance, expected, bags.name(row), reference)
        return bag

    def _class_list(self) -> list[Any]:
        return list(self.classes_.tolist())

    def _kind(self) -> str:
        return type(self.aggregator_).__name__

    def _require_fitted(self) -> None:
        if not hasattr(self, "classes_"):
            raise not_fitted(
                f"this {type(self).__name__} is not fitted; call fit(X, y) first, or"
                f" {type(self).__name__}.load(path)"
            )

    def _runner(self) -> Runner:
        return Runner(self.aggregator_, self._device, classes=len(self.classes_))
