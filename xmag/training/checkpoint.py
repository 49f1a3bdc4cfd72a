"""Checkpoints of a training: one safetensors file with JSON in its header, for exact resume."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError, safe_open
from torch import Tensor

from xmag import records
from xmag.errors import MismatchError, WeightsError
from xmag.hub.weights import write_tensors

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
    """State of a training run of a `kind`: JSON values of its progress, and tensors by name.

    `identity` is all that decides the weights; only a run with the same one resumes from it.
    """

    kind: str
    identity: Mapping[str, Any]
    progress: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    def save(self, path: Path) -> None:
        """Write to `path`; OutputError where that fails, and the file that was there stays."""
        header = {"xmag": version("xmag"), "kind": self.kind, "identity": self.identity}
        header["progress"] = self.progress
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
        """The checkpoint at `path`, on the CPU; None where there is no file.

        Raises WeightsError for a file that is damaged or no such checkpoint, and MismatchError for
        one of a run with another `identity`, with what is different.
        """
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt", device="cpu") as file:
                metadata = file.metadata() or {}
                # Copies: what safetensors gives may be a view of the file.
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (no mapping)
        except (SafetensorError, OSError) as error:
            raise WeightsError(
                f"{path} is no whole checkpoint ({error}); delete it to begin anew, or name another"
            ) from error
        form = metadata.get("format")
        if any(name in (form or metadata.get("xmag", "")) for name in _VERSION_1):
            raise WeightsError(
                f"{path} is a checkpoint of version 1, written by xmag 0.1, and cannot be gone on"
                " from exactly; finish that run with xmag 0.1, or delete the file to begin anew"
            )
        if "checkpoint" not in metadata:
            raise WeightsError(
                f"{path} is no checkpoint of {kind} (it has format {form!r}); name another file"
            )
        header = _FORMAT.loads(metadata["checkpoint"], str(path))
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


def tensors_of(tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    """The tensors "PART.KEY" of a part, such as "module", by KEY."""
    return {
        name.removeprefix(f"{part}."): tensor
        for name, tensor in tensors.items()
        if name.startswith(f"{part}.")
    }


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
