"""Saving and loading of a classifier: a folder with weights in safetensors, the rest in JSON."""

import hashlib
import math
import os
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from xmag import records
from xmag.errors import InputError, ModelError, OutputError, WeightsError
from xmag.files import make_folder, sha256_of, write_bytes, write_text
from xmag.hub.weights import read_tensors
from xmag.mil.aggregators import aggregator
from xmag.mil.labels import from_json, to_json

WEIGHTS, DESCRIPTION = "classifier.safetensors", "classifier.json"
_FORMAT = records.Format(
    name="xmag.MILClassifier",
    version=1,
    writer="MILClassifier.save",
    remedy="it is damaged or was changed: save the classifier again, or copy it again",
    error=ModelError,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """Content of a classifier's folder.

    `config` is the name and options of the aggregator, None for a module of the user's own, whose
    class is called `kind`. `params` are the classifier's parameters but for the aggregator's,
    `fingerprint` that of the bags, None where they had none.
    """

    state: Mapping[str, Tensor]
    config: Mapping[str, Any] | None
    kind: str
    classes: list[Hashable]
    in_dim: int
    params: Mapping[str, Any]
    class_prior: list[float]
    fingerprint: Mapping[str, Any] | None
    history: list[dict[str, Any]]
    best_epoch: int | None


def write_folder(path: str | os.PathLike[str], saved: Saved) -> None:
    """Save a classifier to a folder; OutputError where that fails, or JSON cannot hold a value.

    The description comes last and names the weights by their hash: a folder whose writing was
    interrupted has none, or one that does not fit, and is never read.
    """
    folder = Path(path)
    state = {key: value.detach().cpu().contiguous() for key, value in saved.state.items()}
    try:
        weights = safetensors_bytes(state, metadata={"format": "pt"})
    except RuntimeError as error:
        raise OutputError(
            f"the weights of {saved.kind} cannot be written as safetensors ({error}); a module of"
            " your own must not share tensors between names"
        ) from error
    text = _described(saved, hashlib.sha256(weights).hexdigest())
    make_folder(folder)
    write_bytes(folder / WEIGHTS, weights)
    write_text(folder / DESCRIPTION, text)


def _described(saved: Saved, weights_sha256: str) -> str:
    params = dict(saved.params)
    if isinstance(params.get("class_weight"), Mapping):
        params["class_weight"] = [
            [to_json(label), float(value)] for label, value in params["class_weight"].items()
        ]
    description = {
        "aggregator": None if saved.config is None else dict(saved.config),
        "aggregator_class": saved.kind,
        "in_dim": saved.in_dim,
        "classes": [to_json(label) for label in saved.classes],
        "class_prior": saved.class_prior,
        "fingerprint": saved.fingerprint,
        "params": params,
        "best_epoch": saved.best_epoch,
        "history": saved.history,
        "weights_sha256": weights_sha256,
    }
    try:
        return _FORMAT.dumps(description, indent=2) + "\n"
    except (TypeError, ValueError) as error:
        raise OutputError(
            f"the classifier has a parameter that JSON cannot hold ({error}); set it to a plain"
            " number, text or None first"
        ) from error


def read_folder(path: str | os.PathLike[str]) -> Saved:
    """Load and check a folder that `write_folder` wrote; no code in it is ever run.

    Raises ModelError where there is no classifier or its description is damaged, and WeightsError
    where the weights are damaged, not finite, or those of another classifier.
    """
    folder = Path(path)
    for name in (DESCRIPTION, WEIGHTS):
        if not (folder / name).is_file():
            raise ModelError(
                f"{folder} has no {name}; expected a folder that MILClassifier.save wrote to its"
                " end"
            )
    described = _FORMAT.load(folder / DESCRIPTION)
    with _FORMAT.reading(str(folder / DESCRIPTION)):
        saved = _checked(described)
    found = sha256_of(folder / WEIGHTS)
    if found != described.get("weights_sha256"):
        raise WeightsError(
            f"{folder / WEIGHTS} does not belong to {DESCRIPTION}: its SHA-256 is {found}, and not"
            f" {described.get('weights_sha256')}. It was damaged, or saving was interrupted; save"
            " the classifier again, or copy the whole folder again"
        )
    state = read_tensors(folder / WEIGHTS)
    for key, value in state.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise WeightsError(f"{folder / WEIGHTS} holds values in {key!r} that are not finite")
    return Saved(state=state, **saved)


def _checked(values: Mapping[str, Any]) -> dict[str, Any]:
    """The checked fields of Saved without the weights; ValueError or the like for a bad one."""
    classes = [from_json(value) for value in values["classes"]]
    prior = [float(value) for value in values["class_prior"]]
    _require(len(set(classes)) == len(classes) >= 2, "classes")
    _require(len(prior) == len(classes) and math.isclose(sum(prior), 1, abs_tol=1e-6), "prior")
    _require(all(0 <= value <= 1 for value in prior), "class_prior")
    config, params = values["aggregator"], values["params"]
    _require(isinstance(params, dict), "params")
    params = dict(params)
    _require(config is None or set(config) == {"name", "options"}, "aggregator")
    _require(type(values["in_dim"]) is int, "in_dim")
    _require(isinstance(values["fingerprint"], dict | None), "fingerprint")
    if isinstance(params.get("class_weight"), list):
        pairs = params["class_weight"]
        params["class_weight"] = {from_json(label): float(value) for label, value in pairs}
    return {
        "config": config,
        "kind": str(values["aggregator_class"]),
        "classes": classes,
        "in_dim": values["in_dim"],
        "params": params,
        "class_prior": prior,
        "fingerprint": values["fingerprint"],
        "history": [dict(row) for row in values["history"]],
        "best_epoch": values["best_epoch"],
    }


def _require(fits: bool, what: str) -> None:
    if not fits:
        raise ValueError(f"{what} does not fit")


def rebuilt(saved: Saved, module: nn.Module | None) -> nn.Module:
    """The saved aggregator in eval mode: `module` with the weights, if it is not one of xmag's.

    Raises InputError where a module is needed or was given for nothing, WeightsError where the
    weights are not those of such an aggregator.
    """
    if module is None and saved.config is None:
        raise InputError(
            f"the classifier was trained with an aggregator of your own, {saved.kind}; give one"
            " that is built the same way: MILClassifier.load(path, aggregator=module)"
        )
    if module is not None and saved.config is not None:
        raise InputError(
            f"aggregator= is for classifiers with a module of your own; this one has"
            f" {saved.config['name']!r}. Leave it out"
        )
    if saved.config is not None:
        # On no device: a description with absurd sizes costs no memory, and then fits no weights.
        with torch.device("meta"):
            module = _made(saved).float()
    assert module is not None
    expected = module.state_dict()
    faults = [f"{key} is missing" for key in expected if key not in saved.state]
    faults += [f"{key} is not expected" for key in saved.state if key not in expected]
    faults += [
        f"{key} has shape {tuple(saved.state[key].shape)}, not {tuple(value.shape)}"
        for key, value in expected.items()
        if key in saved.state and saved.state[key].shape != value.shape
    ]
    faults += [
        f"{key} is {saved.state[key].dtype}, not {value.dtype}"
        for key, value in expected.items()
        if key in saved.state and saved.state[key].dtype != value.dtype
    ]
    if faults:
        raise WeightsError(
            f"the weights are not those of {saved.kind}: {'; '.join(faults[:5])}"
            f" ({len(faults)} in all). Save the classifier again, or give the right aggregator="
        )
    module.load_state_dict(dict(saved.state), assign=saved.config is not None)
    return module.eval()


def _made(saved: Saved) -> nn.Module:
    assert saved.config is not None
    try:
        return aggregator(
            saved.config["name"],
            in_dim=saved.in_dim,
            classes=len(saved.classes),
            **saved.config["options"],
        )
    except (InputError, TypeError) as error:
        raise ModelError(
            f"the description of the aggregator is damaged ({error}); save the classifier again, or"
            " copy it again"
        ) from error
