"""Atomic writing of tensors to a safetensors file."""

from collections.abc import Mapping
from os import PathLike

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from xmag.errors import OutputError
from xmag.files import atomic_path


def write_tensors(
    path: str | PathLike[str], tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str]
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
