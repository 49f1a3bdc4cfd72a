"""Checkpoints of a training: one safetensors file with JSON in its header, for exact resume.

A file is replaced as a whole: a run that is killed, or a disk that runs full, leaves the one
before.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from xmag import records
from xmag.errors import MismatchError, OutputError, WeightsError
from xmag.hub.weights import write_tensors
from xmag.training.ema import Ema
from xmag.training.ranks import Ranks

_FORMAT = records.Format(
    version=2,
    writer="a training run",
    remedy="delete it to begin anew, or go on with the xmag that wrote it",
    error=WeightsError,
)
_LISTED = 10
_VERSION_1 = ("xmag-finetune-checkpoint", "xmag-distillation")
"""Formats of the checkpoints of xmag's first version, which drew other augmentations."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """State of a training run to resume from.

    Attributes:
        kind: The training that it is of, such as "fine-tuning".
        identity: All that decides the weights of the run, as JSON values; only a run with the same
            one resumes from it.
        progress: How far the run is, as JSON values.
        tensors: Weights, moments of the optimizer and other tensors by name.
    """

    kind: str
    identity: Mapping[str, Any]
    progress: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    def save(self, path: Path) -> None:
        """Write the checkpoint to `path`, atomically.

        Raises OutputError where it cannot be written; the file that was there stays.
        """
        header = {
            "xmag": version("xmag"),
            "kind": self.kind,
            "identity": self.identity,
            "progress": self.progress,
        }
        # Copies: safetensors refuses tensors that share memory, as tied weights do.
        tensors = {
            name: tensor.detach().to("cpu", copy=True).contiguous()
            for name, tensor in self.tensors.items()
        }
        write_tensors(path, tensors, metadata={"checkpoint": _FORMAT.dumps(header)})

    @classmethod
    def load(
        cls, path: Path, *, kind: str, identity: Mapping[str, Any] | None = None
    ) -> Self | None:
        """The checkpoint at `path`, None where there is no file; tensors are on the CPU.

        Raises WeightsError for a file that is damaged, no checkpoint of this kind, or of another
        version of xmag, and MismatchError for one of a run with another `identity`, where that is
        given, with what is different.
        """
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt", device="cpu") as file:
                metadata = file.metadata() or {}
                # Copies: what safetensors gives may be a view of the file.
                tensors = {
                    name: file.get_tensor(name).clone()
                    for name in file.keys()  # noqa: SIM118 (no mapping)
                }
        except (SafetensorError, OSError) as error:
            raise WeightsError(
                f"{path} is no whole checkpoint ({error}); delete it to begin anew, or name another"
            ) from error
        header = _FORMAT.loads(_header_text(path, metadata, kind), str(path))
        with _FORMAT.reading(str(path)):
            values = {name: header[name] for name in ("kind", "identity", "progress")}
        found = cls(**values, tensors=tensors)
        if found.kind != kind:
            raise WeightsError(
                f"{path} is no checkpoint of {kind}, but of {found.kind}; name another"
            )
        if identity is not None:
            found._require_same_run(path, identity)
        return found

    def _require_same_run(self, path: Path, identity: Mapping[str, Any]) -> None:
        """Raise MismatchError, listing the differences, where the checkpoint is of another run."""
        there = dict(_leaves(self.identity))
        here = dict(_leaves(json.loads(json.dumps(identity))))  # JSON has lists and no tuples
        lines = [
            f"{key}: {there.get(key)!r} there, {here.get(key)!r} here"
            for key in sorted(there.keys() | here.keys())
            if there.get(key) != here.get(key)
        ]
        if lines:
            more = f"; and {len(lines) - _LISTED} more" if len(lines) > _LISTED else ""
            raise MismatchError(
                f"the checkpoint {path} is of another run: {'; '.join(lines[:_LISTED])}{more}."
                " Delete it to begin anew, write to another place, or take its settings to go on"
            )


def state_tensors(
    module: nn.Module, optimizer: torch.optim.Optimizer, ema: Ema | None = None
) -> dict[str, Tensor]:
    """State of a training as tensors by name: of the module, its EMA and the optimizer.

    They are "module.KEY", "ema.KEY" and "optimizer.PARAMETER.KEY"; `restore_state` takes them.
    """
    tensors = {f"module.{key}": tensor for key, tensor in module.state_dict().items()}
    if ema is not None:
        tensors |= {f"ema.{key}": tensor for key, tensor in ema.module.state_dict().items()}
    states = optimizer.state_dict()["state"]
    for at, name in enumerate(_optimized(module, optimizer)):
        tensors |= {f"optimizer.{name}.{key}": t for key, t in states.get(at, {}).items()}
    return tensors


def restore_state(
    tensors: Mapping[str, Tensor],
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: Ema | None = None,
) -> None:
    """Restore module, EMA and optimizer from the tensors of `state_tensors`, in place."""
    module.load_state_dict(tensors_of(tensors, "module"))
    if ema is not None:
        ema.module.load_state_dict(tensors_of(tensors, "ema"))
    places = {name: at for at, name in enumerate(_optimized(module, optimizer))}
    states: defaultdict[int, dict[str, Tensor]] = defaultdict(dict)
    for path, tensor in tensors_of(tensors, "optimizer").items():
        name, _, key = path.rpartition(".")
        states[places[name]][key] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": dict(states), "param_groups": groups})


def tensors_of(tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    """The tensors "PART.KEY" of a part, such as "module", by KEY."""
    return {
        name.removeprefix(f"{part}."): tensor
        for name, tensor in tensors.items()
        if name.startswith(f"{part}.")
    }


def require_shared(path: Path, updates: int, ranks: Ranks) -> None:
    """Raise OutputError where there is no folder for `path`, or ranks resume from other steps."""
    if not path.parent.is_dir():
        raise OutputError(f"there is no folder {path.parent} for the checkpoint; create it first")
    if float(ranks.mean(torch.tensor(float(updates)))) != updates:
        raise OutputError(
            f"the processes do not read the same checkpoint at {path}; expected a folder that all"
            " machines share"
        )


def _header_text(path: Path, metadata: Mapping[str, str], kind: str) -> str:
    """The JSON text in a file's metadata; WeightsError for what is no checkpoint of version 2."""
    if "checkpoint" in metadata:
        return metadata["checkpoint"]
    found = metadata.get("format")
    if any(name in (found or metadata.get("xmag", "")) for name in _VERSION_1):
        raise WeightsError(
            f"{path} is a checkpoint of version 1, written by xmag 0.1, and cannot be gone on from"
            " exactly; finish that run with xmag 0.1, or delete the file to begin anew"
        )
    raise WeightsError(
        f"{path} is no checkpoint of {kind} (it has format {found!r}); name another file"
    )


def _optimized(module: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[str]:
    """Names of the parameters in the order of the optimizer's state."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield names[parameter]


def _leaves(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Places and values of all that is in nested JSON values: "teachers[0].seed", 0."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{place}.{key}" if place else str(key))
    elif isinstance(value, list) and value:
        for at, item in enumerate(value):
            yield from _leaves(item, f"{place}[{at}]")
    else:
        yield place, value
