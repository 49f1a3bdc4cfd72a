"""Saving and loading of an estimator: a folder with weights in safetensors, the rest in JSON."""

import hashlib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from xmag import records
from xmag.errors import InputError, ModelError, OutputError, WeightsError
from xmag.files import make_folder, sha256_of, write_bytes, write_text
from xmag.hub.weights import read_tensors
from xmag.mil.aggregators import with_outputs
from xmag.mil.heads import Head

if TYPE_CHECKING:
    from xmag.mil.estimator import MILEstimator


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved(records.Record):
    """Content of an estimator's JSON but for its head.

    `aggregator` is the name and options of the aggregator, None for a module of the user's own,
    whose class is called `aggregator_class`. `params` are the estimator's parameters but for the
    aggregator's, `fingerprint` that of the bags, None where they had none.
    """

    aggregator: dict[str, Any] | None
    aggregator_class: str
    in_dim: int
    fingerprint: dict[str, Any] | None
    params: dict[str, Any]
    best_epoch: int | None
    history: list[dict[str, Any]]
    temperature: float | None = None

    def __post_init__(self) -> None:
        warm = self.temperature is None or 0 < self.temperature < math.inf
        records.require(self, "temperature", warm, "a number above 0, or null")
        fits = self.aggregator is None or set(self.aggregator) == {"name", "options"}
        records.require(self, "aggregator", fits, "a name and options, or null")


class EstimatorFolder:
    """Folder of a saved estimator, such as classifier.safetensors and classifier.json."""

    def __init__(self, path: str | os.PathLike[str], kind: "type[MILEstimator[Any]]") -> None:
        self.path, self._estimator, self._noun = Path(path), kind.__name__, kind._noun
        self.weights = self.path / f"{self._noun}.safetensors"
        self.description = self.path / f"{self._noun}.json"
        self.format = records.Format(
            name=f"xmag.{kind.__name__}",
            version=1,
            writer=f"{kind.__name__}.save",
            remedy=f"it is damaged or was changed: save the {kind._noun} again, or copy it again",
            error=ModelError,
        )

    def write(self, values: Mapping[str, Any], state: Mapping[str, Tensor], kind: str) -> None:
        """Save JSON values and weights of a `kind` of module; OutputError where that fails.

        The description comes last, with the hash of the weights: what was interrupted is never
        read.
        """
        state = {key: value.detach().cpu().contiguous() for key, value in state.items()}
        try:
            weights = safetensors_bytes(state, metadata={"format": "pt"})
        except RuntimeError as error:
            raise OutputError(
                f"the weights of {kind} cannot be written as safetensors ({error}); a module of"
                " your own must not share tensors between names"
            ) from error
        digest = hashlib.sha256(weights).hexdigest()
        try:
            text = self.format.dumps({**values, "weights_sha256": digest}, indent=2)
        except (TypeError, ValueError) as error:
            raise OutputError(
                f"the {self._noun} has a parameter that JSON cannot hold ({error}); set it to a"
                " plain number, text or None first"
            ) from error
        make_folder(self.path)
        write_bytes(self.weights, weights)
        write_text(self.description, text + "\n")

    def read(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The JSON values and weights of a folder; errors are those of `MILEstimator.load`."""
        for file in (self.description, self.weights):
            if not file.is_file():
                wanted = f"expected a folder that {self._estimator}.save wrote to its end"
                raise ModelError(f"{self.path} has no {file.name}; {wanted}")
        values = self.format.load(self.description)
        found, expected = sha256_of(self.weights), values.pop("weights_sha256", None)
        if found != expected:
            raise WeightsError(
                f"{self.weights} does not belong to {self.description.name}: its SHA-256 is"
                f" {found}, not {expected}. It is damaged, or saving was interrupted; save it again"
            )
        state = read_tensors(self.weights)
        for key, value in state.items():
            if value.is_floating_point() and not torch.isfinite(value).all():
                raise WeightsError(f"{self.weights} holds values in {key!r} that are not finite")
        return values, state


def load_estimator(
    path: str | os.PathLike[str],
    *,
    aggregator: nn.Module | None = None,
    device: str | torch.device = "auto",
) -> "MILEstimator[Any]":
    """The MILClassifier, MILRegressor or MILSurvival in a folder that its `save` wrote.

    Options and errors are those of their `load`; ModelError too where the folder holds none of
    them, or several.
    """
    # They are above this module, which serves them all.
    from xmag.mil.classifier import MILClassifier
    from xmag.mil.regressor import MILRegressor
    from xmag.mil.survival import MILSurvival

    kinds: list[type[MILEstimator[Any]]] = [MILClassifier, MILRegressor, MILSurvival]
    files = {kind: EstimatorFolder(path, kind).description for kind in kinds}
    found = [kind for kind in kinds if files[kind].is_file()]
    if len(found) != 1:
        seen = " and ".join(files[kind].name for kind in found) or "none of them"
        names = ", ".join(file.name for file in files.values())
        raise ModelError(f"{os.fspath(path)} has {seen}; expected one of {names}")
    return found[0].load(path, aggregator=aggregator, device=device)


def rebuilt(
    saved: Saved, state: Mapping[str, Tensor], module: nn.Module | None, *, head: Head
) -> nn.Module:
    """The saved aggregator in eval mode: `module` with the weights, if it is not one of xmag's."""
    if saved.aggregator is not None:
        if module is not None:
            raise InputError(
                "aggregator= is for estimators with a module of your own; this one has"
                f" {saved.aggregator['name']!r}. Leave it out"
            )
        module = _described(saved, saved.aggregator, head)
    elif module is None:
        raise InputError(
            f"it was trained with an aggregator of your own, {saved.aggregator_class}; give one"
            " that is built the same way: load(path, aggregator=module)"
        )
    if faults := _misfits(state, module.state_dict()):
        raise WeightsError(
            f"the weights are not those of {saved.aggregator_class}: {'; '.join(faults[:5])}"
            f" ({len(faults)} in all). Save it again, or give the right aggregator="
        )
    # In the file tensors lie at any byte, and kernels round otherwise where memory is not aligned.
    aligned = {key: value.clone() for key, value in state.items()}
    module.load_state_dict(aligned, assign=saved.aggregator is not None)
    return module.eval()


def _described(saved: Saved, config: dict[str, Any], head: Head) -> nn.Module:
    """The aggregator of a description, on no device: absurd sizes cost no memory."""
    try:
        with torch.device("meta"):
            return with_outputs(
                config["name"], saved.in_dim, head.outputs, config["options"],
                last_layer=head.last_layer,
            ).float()  # fmt: skip
    except (InputError, TypeError) as error:
        raise ModelError(
            f"the description of the aggregator is damaged ({error}); save or copy it again"
        ) from error


def _misfits(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """Reasons why weights do not fit a module; empty where they do."""
    faults = [f"{key} is missing" for key in expected if key not in found]
    faults += [f"{key} is not expected" for key in found if key not in expected]
    for key in sorted(found.keys() & expected.keys()):
        seen, wanted = found[key], expected[key]
        if seen.shape != wanted.shape:
            faults.append(f"{key} has shape {tuple(seen.shape)}, not {tuple(wanted.shape)}")
        elif seen.dtype != wanted.dtype:
            faults.append(f"{key} is {seen.dtype}, not {wanted.dtype}")
    return faults
