"""Choice of a GPU for a worker, where a host has several and nobody gave it one."""

import logging
import os
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

import torch

from xmag.cohort.locks import open_lock, try_lock
from xmag.errors import ModelError

logger = logging.getLogger(__name__)

_lock = threading.Lock()
_held: dict[str, int] = {}
"""The device this process has claimed, and the open lock file that says so to the others."""


def claimed_device() -> str:
    """The device that this process computes on, its own as far as there are enough.

    Of several CUDA devices that it may see (CUDA_VISIBLE_DEVICES) it takes the one that the fewest
    other workers of this host have taken, for as long as it lives: "cuda:1". With one or none
    there is nothing to choose: "auto". Raises ModelError in a process that cannot use CUDA.
    """
    count = torch.cuda.device_count()
    if count:
        _require_cuda()
    if count < 2:
        return "auto"
    with _lock:
        if not _held:
            index, file = claim(_names(count), Path(tempfile.gettempdir()))
            _held[f"cuda:{index}"] = file
        return next(iter(_held))


def claim(devices: Sequence[str], folder: Path) -> tuple[int, int]:
    """The index of the device that the fewest processes hold, and the file that holds it.

    A claim is a lock on an empty file in `folder`, which the system lets go of when the process
    ends, however it ends. `devices` are names that mean the same device in every process. Raises
    ModelError where no file can be made there.
    """
    user = os.getuid() if hasattr(os, "getuid") else 0
    taken = 0
    while True:
        for index, device in enumerate(devices):
            name = "".join(c if c.isalnum() or c == "-" else "_" for c in device)
            path = folder / f"xmag-{user}-{name}-{taken}.lock"
            try:
                file = open_lock(path, shared=False)
            except OSError as error:
                raise ModelError(
                    f"no lock can be made in {folder} ({error.strerror or error}), by which workers"
                    " share the GPUs; set TMPDIR to a folder of your own"
                ) from error
            try:
                if hasattr(os, "getuid") and os.fstat(file).st_uid != user:
                    os.close(file)
                    raise ModelError(
                        f"{path} is another user's, and has the name of a lock of this one; set"
                        " TMPDIR to a folder of your own"
                    )
                if try_lock(file):
                    return index, file
            except OSError as error:
                # Without locks nobody knows what the others take: chance has to do.
                logger.warning("no files can be locked in %s (%s)", folder, error.strerror)
                return os.getpid() % len(devices), file
            os.close(file)
        taken += 1


def _names(count: int) -> list[str]:
    """Names of the visible devices: what CUDA_VISIBLE_DEVICES calls them, else their numbers."""
    visible = [part.strip() for part in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    named = visible if len(visible) >= count and all(visible[:count]) else map(str, range(count))
    return [f"gpu-{name}" for name, _ in zip(named, range(count), strict=False)]


def _require_cuda() -> None:
    try:
        torch.cuda.current_device()
    except RuntimeError as error:
        raise ModelError(
            f"this worker cannot use its GPU ({str(error).splitlines()[0]}); if the executor forks,"
            ' give it another start method: ProcessPoolExecutor(2, mp_context=get_context("spawn"))'
        ) from error
