"""Checkpoints of a run: one safetensors file, from which it resumes exactly.

The weights, their moving average (EMA), the optimizer's moments and the teachers' means as tensors;
the step and what decides the run as JSON in its header. One file, replaced as a whole: a run that
is killed, or a disk that runs full, leaves the one before.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from xmag import records
from xmag.distill.step import Trainer
from xmag.errors import MismatchError, OutputError
from xmag.hub.weights import write_tensors

_FORMAT = records.Format(
    name="xmag-distillation",
    version=1,
    writer="a distillation",
    remedy="go on with the xmag that wrote it, or write to another folder",
    error=OutputError,
)
_HEADER = "xmag"
_IN_HEADER = ("step", "decisive", "seconds", "validation", "untrained")
_LISTED = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """Checkpoint to resume a run from; `step` is the number of steps taken.

    `decisive` is all that decides the weights, as plain JSON; `seconds` is the time so far, and
    `validation` and `untrained` are the last and the first validation metrics. `centres` are the
    teachers' mean features, None where not subtracted; `damaged` (bool, regions) marks what could
    not be read. `tensors` are the weights and moments, of a checkpoint that was loaded.
    """

    step: int
    decisive: Mapping[str, Any]
    seconds: float
    validation: Mapping[str, float]
    untrained: Mapping[str, float]
    centres: list[Tensor | None]
    damaged: NDArray[np.bool_]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


def save_checkpoint(path: Path, trainer: Trainer, state: Checkpoint) -> None:
    """Save a checkpoint, atomically.

    Raises OutputError where it cannot be written; what was there before is untouched.
    """
    tensors = dict(_tensors(trainer))
    tensors |= {f"centre.{at}": mean for at, mean in enumerate(state.centres) if mean is not None}
    tensors["damaged"] = torch.from_numpy(state.damaged)
    about = {
        "teachers": len(state.centres),
        **{name: getattr(state, name) for name in _IN_HEADER},
    }
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_tensors(path, ready, metadata={_HEADER: json.dumps(_FORMAT.headed(about))})


def load_checkpoint(path: Path) -> Checkpoint:
    """Load a checkpoint; OutputError where the file is none."""
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {}).get(_HEADER, "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise OutputError(
            f"{path} is no whole checkpoint ({error}); delete it to begin the run anew"
        ) from error
    header = _FORMAT.opened(header, str(path))
    centres = [tensors.pop(f"centre.{at}", None) for at in range(header["teachers"])]
    return Checkpoint(
        **{name: header[name] for name in _IN_HEADER},
        damaged=tensors.pop("damaged").numpy(),
        centres=centres,
        tensors=tensors,
    )


def check_same_run(path: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raise MismatchError, listing the differences, where a checkpoint is of another run."""
    # Through JSON, which has lists and no tuples.
    old, new = dict(_leaves(there)), dict(_leaves(json.loads(json.dumps(here))))
    lines = [
        f"{key}: {old.get(key)!r} there, {new.get(key)!r} here"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
    if lines:
        more = f" and {len(lines) - _LISTED} more" if len(lines) > _LISTED else ""
        raise MismatchError(
            f"{path} is of a run with other settings ({'; '.join(lines[:_LISTED])}{more}). Write to"
            " another folder, delete it to begin anew, or take its settings to go on"
        )


def restore(trainer: Trainer, checkpoint: Checkpoint) -> None:
    """Restore weights, EMA and optimizer state from a checkpoint."""
    parts: dict[str, dict[str, Tensor]] = {"student": {}, "ema": {}, "optimizer": {}}
    for name, tensor in checkpoint.tensors.items():
        part, _, key = name.partition(".")
        parts[part][key] = tensor
    trainer.student.load_state_dict(parts["student"])
    trainer.ema.module.load_state_dict(parts["ema"])
    states: dict[int, dict[str, Tensor]] = {}
    for at, name in enumerate(_optimized(trainer)):
        found = {
            key.removeprefix(f"{name}|"): tensor
            for key, tensor in parts["optimizer"].items()
            if key.startswith(f"{name}|")
        }
        if found:
            states[at] = found
    groups = trainer.optimizer.state_dict()["param_groups"]
    trainer.optimizer.load_state_dict({"state": states, "param_groups": groups})


def _tensors(trainer: Trainer) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in trainer.student.state_dict().items():
        yield f"student.{name}", tensor
    for name, tensor in trainer.ema.module.state_dict().items():
        yield f"ema.{name}", tensor
    states = trainer.optimizer.state_dict()["state"]
    for at, name in enumerate(_optimized(trainer)):
        for key, value in states.get(at, {}).items():
            yield f"optimizer.{name}|{key}", value


def _optimized(trainer: Trainer) -> Iterator[str]:
    """Parameter names in the order of the optimizer's state."""
    names = {parameter: name for name, parameter in trainer.student.named_parameters()}
    for group in trainer.optimizer.param_groups:
        for parameter in group["params"]:
            yield names[parameter]


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list):
        for at, item in enumerate(value):
            yield from _leaves(item, f"{prefix}[{at}]")
    else:
        yield prefix, value
