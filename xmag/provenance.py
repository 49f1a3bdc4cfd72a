"""Provenance: the fingerprint, which decides what may be mixed, and the record of the rest.

Neither holds an absolute path, a user, a host, or anything a scanner wrote about the patient.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from types import MappingProxyType
from typing import Any

from xmag import records
from xmag.errors import InputError
from xmag.urls import base_name, readable

PREPROCESSING_VERSION = 2
"""Changes only when the same slide and settings give other pixels or another plan."""

_DTYPE_CLASSES = {"float32": "fp32", "fp32": "fp32"} | dict.fromkeys(
    ("float16", "fp16", "half", "bfloat16", "bf16"), "half"
)

_SAMPLE_BLOCKS = 16
_SAMPLE_BLOCK_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True, repr=False)
class Provenance(records.Record):
    """Provenance of a bag: JSON values only, read-only all the way down.

    Bags whose `fingerprint` is equal may be mixed; see `mixing_fingerprint`. The `record` holds
    what does not decide that: versions, device, time, the model, the slide, counts. Raises
    InputError for a value that JSON cannot hold, NaN among them, and names its key.
    """

    fingerprint: Mapping[str, Any]
    record: Mapping[str, Any]

    def __post_init__(self) -> None:
        for part in ("fingerprint", "record"):
            value = getattr(self, part)
            if not isinstance(value, Mapping):
                raise InputError(f"{part} is {value!r}; expected a mapping with str keys")
            object.__setattr__(self, part, _frozen(value, part))

    def __repr__(self) -> str:
        model, fingerprint = self.record.get("model"), self.fingerprint
        name = base_name(model.get("name")) if isinstance(model, Mapping) else "unknown"
        weights = str(fingerprint.get("weights_sha256"))[:12]
        return f"<Provenance: {name}, weights {weights}, {fingerprint.get('dtype_class')}>"

    def __reduce__(self) -> tuple[type["Provenance"], tuple[Any, Any]]:
        return Provenance, (records.plain(self.fingerprint), records.plain(self.record))

    def to_json(self) -> str:
        """The same content as JSON text; equal provenances give equal text."""
        return json.dumps(self.to_dict(), sort_keys=True, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "Provenance":
        """The Provenance that `to_json` wrote; InputError where the text is something else."""
        try:
            return cls.from_dict(records.loads(text))
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"this is not what Provenance.to_json wrote: provenance cannot be read ({error});"
                " make the file again"
            ) from error

    def differences(self, other: "Provenance") -> list[str]:
        """Differences of the fingerprint of `other`, a line each; empty if the two may be mixed.

        A line reads ``tile_spec.mpp: 2.0 there, 1.0 here``: *here* is this one, *there* `other`.
        """
        here, there = dict(_leaves(self.fingerprint)), dict(_leaves(other.fingerprint))
        return [
            f"{key}: {_shown(there, key)} there, {_shown(here, key)} here"
            for key in sorted(here.keys() | there.keys())
            if key not in here or key not in there or here[key] != there[key]
        ]


def mixing_fingerprint(
    *,
    weights_sha256: str,
    tile_spec: Mapping[str, Any],
    plan: Mapping[str, Any],
    dtype: str,
    transform: str | None = None,
) -> dict[str, Any]:
    """The fingerprint of features: all that decides whether they may be mixed with others.

    `plan` holds the parameters of the tile plan (overlap, minimum of tissue, ...), not its
    coordinates, and `transform` the name of a transform of the tiles. `dtype` is that of the
    forward pass.
    """
    return {
        "weights_sha256": weights_sha256,
        "tile_spec": dict(tile_spec),
        "plan": dict(plan),
        "dtype_class": dtype_class(dtype),
        "transform": transform,
        "preprocessing_version": PREPROCESSING_VERSION,
    }


def dtype_class(dtype: str) -> str:
    """The class, "fp32" or "half", of a dtype given by name ("float32", "torch.bfloat16", ...).

    Half precisions may be mixed with each other, but not with full precision.
    """
    found = _DTYPE_CLASSES.get(dtype.removeprefix("torch."))
    if found is None:
        raise InputError(f"dtype is {dtype!r}; expected 'float32', 'float16' or 'bfloat16'")
    return found


def file_fingerprint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Name (without folders), size in bytes, and a hash of a sample of a file's content.

    The sample is the whole file up to 1 MiB, and 16 blocks of 64 KiB above: the first, the last,
    and 14 evenly spaced between. It tells slides apart at a cost that does not grow with them; it
    does not prove that two files are equal.
    """
    path = Path(path)
    with path.open("rb") as file:

        def read(blocks: list[tuple[int, int]]) -> Iterator[bytes]:
            for offset, length in blocks:
                file.seek(offset)
                yield file.read(length)

        return content_fingerprint(path.name, os.fstat(file.fileno()).st_size, read)


def content_fingerprint(
    name: str, size: int, read: Callable[[list[tuple[int, int]]], Iterable[bytes]]
) -> dict[str, Any]:
    """The fingerprint of a file of this name and size; `read` gives the bytes of (offset, length).

    See `file_fingerprint`.
    """
    last = size - _SAMPLE_BLOCK_BYTES
    offsets = [last * block // (_SAMPLE_BLOCKS - 1) for block in range(_SAMPLE_BLOCKS)]
    if size <= _SAMPLE_BLOCKS * _SAMPLE_BLOCK_BYTES:
        offsets = list(range(0, size, _SAMPLE_BLOCK_BYTES))
    blocks = [(at, min(_SAMPLE_BLOCK_BYTES, size - at)) for at in offsets]
    digest = hashlib.sha256(str(size).encode())
    for block in read(blocks):
        digest.update(block)
    return {"name": readable(name), "size_bytes": size, "content_sample_sha256": digest.hexdigest()}


def _frozen(value: Any, key: str) -> Any:
    """`value` as an immutable JSON value; `key` is its place, for the error."""
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real) and math.isfinite(value):
        return float(value)
    if isinstance(value, Mapping):
        if unfit := [name for name in value if not isinstance(name, str)]:
            raise InputError(f"{key} has the key {unfit[0]!r}; expected only str keys")
        return MappingProxyType({k: _frozen(v, f"{key}.{k}") for k, v in value.items()})
    if isinstance(value, list | tuple):
        return tuple(_frozen(item, f"{key}[{i}]") for i, item in enumerate(value))
    raise InputError(
        f"{key} is {value!r}; expected what JSON holds: None, bool, str, int, finite float, list or"
        " mapping"
    )


def _leaves(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            yield from _leaves(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item


def _shown(leaves: Mapping[str, Any], key: str) -> str:
    return repr(records.plain(leaves[key])) if key in leaves else "nothing"
