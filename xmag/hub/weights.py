"""Tensors of a file: read without running code from it, written whole; and its SHA-256."""

import io
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from xmag.errors import OutputError, WeightsError
from xmag.files import atomic_path, sha256_of

_SAFE_PICKLE = (2, 10)
"""The first torch whose weights_only loading has neither CVE-2025-32434 nor CVE-2026-24747."""

_NAMED = re.compile(r"GLOBAL (\S+)")
_SHA256_HEX = 64
_ZIP_MAGIC = b"PK\x03\x04"

_LOAD_ERRORS = (
    RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError,
    AssertionError, OverflowError, MemoryError, struct.error, zipfile.BadZipFile,
)  # fmt: skip
"""Errors that torch may raise on a file that makes no sense, RecursionError as a RuntimeError."""


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file of weights, in hex.

    Raises WeightsError where the Hub's cache names the file by another hash: it is damaged.
    """
    try:
        found = sha256_of(path)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read ({error}); check path and rights") from error
    blob = path.resolve()
    if blob.parent.name == "blobs" and len(blob.name) == _SHA256_HEX and blob.name != found:
        raise WeightsError(
            f"{path} is damaged: its SHA-256 is {found}, the Hub's is {blob.name}. Delete {blob}"
            " and load the model again"
        )
    return found


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by its dotted path, on the CPU, in the dtype of the file.

    Nested dictionaries are flattened ("state_dict.model.norm.weight"); what is no tensor is left
    out. Raises WeightsError for a file that is truncated, no checkpoint, or a pickle with code.
    """
    if path.suffix == ".safetensors":
        try:
            tensors = load_file(path, device="cpu")
        except (SafetensorError, OSError) as error:
            raise WeightsError(
                f"{path} is no whole safetensors file ({error}). Fetch or copy it again"
            ) from error
    else:
        tensors = dict(_flatten(_read_pickle(path), ""))
    if not tensors:
        raise WeightsError(
            f"{path} holds no tensors by name; expected a state dict, or a training checkpoint that"
            " contains one"
        )
    return tensors


def _read_pickle(path: Path) -> Any:
    if torch.__version__ < _SAFE_PICKLE:  # type: ignore[operator] # TorchVersion compares to tuples
        raise WeightsError(
            f"{path} is a pickle, and torch {torch.__version__} does not read those safely"
            " (CVE-2025-32434, CVE-2026-24747). Upgrade torch to 2.10 or newer, or give the weights"
            " as safetensors"
        )
    try:
        return torch.load(_checked_archive(path), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # The rest of torch's message advises to trust the file (weights_only=False).
        named = _NAMED.search(str(error))
        refused = f" (it names {named[1]})" if named else ""
        raise WeightsError(
            f"{path} is a pickle that holds more than tensors and plain values, or is none at"
            f" all{refused}. Code in a file is never run, and there is no option that would."
            " Save the bare state dict, best as safetensors"
        ) from None
    except _LOAD_ERRORS as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if "weights_only" in reason:  # with False it would read these two, says torch
            reason = "it is TorchScript, or a tar as of torch 0.1"
        raise WeightsError(
            f"{path} is no whole torch checkpoint ({reason}). Fetch or copy it again"
        ) from error


def _checked_archive(path: Path) -> Path | io.BytesIO:
    """File for torch.load; WeightsError for a zip whose records unpack to more than it holds.

    A file of torch's older format is read to memory, where no read can ask for more than there is.
    """
    with path.open("rb") as file:
        if file.read(len(_ZIP_MAGIC)) != _ZIP_MAGIC:
            file.seek(0)
            return io.BytesIO(file.read())
    with zipfile.ZipFile(path) as archive:
        size, records = path.stat().st_size, archive.infolist()
    unpacked = sum(record.file_size for record in records)
    if unpacked > size or any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise WeightsError(
            f"{path} has {size} bytes and records that unpack to {unpacked}; expected them as they"
            " are, as torch.save writes them. Save the state dict again, best as safetensors"
        )
    return path


def _flatten(node: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(node, Tensor):
        yield path, node.detach()
    elif isinstance(node, Mapping):
        for key, value in node.items():
            yield from _flatten(value, f"{path}.{key}" if path else str(key))


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str]
) -> None:
    """Write contiguous CPU tensors to `path` as safetensors, atomically; see `atomic_path`.

    Raises OutputError where it cannot be written; what was there before is untouched.
    """
    try:
        with atomic_path(path) as temporary:
            save_file(dict(tensors), temporary, metadata=dict(metadata))
    except SafetensorError as error:  # how its writer reports a full disk
        raise OutputError(
            f"{path} cannot be written ({error}): free some space there, or write elsewhere. What"
            " was there before is untouched"
        ) from error
