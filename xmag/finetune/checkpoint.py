"""Checkpoints to resume fine-tuning from: one safetensors file with JSON in its header."""

import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from xmag import records
from xmag.errors import MismatchError, OutputError, WeightsError, XmagWarning
from xmag.finetune.training import Progress, Trainer
from xmag.hub.weights import write_tensors
from xmag.progress import progress_bar
from xmag.provenance import Provenance
from xmag.training import Ranks

_logger = logging.getLogger(__name__)

_NAME = "xmag-finetune-checkpoint"
_FORMAT = records.Format(
    version=1,
    writer="a fine-tuning run",
    remedy="delete it to begin anew, or use the xmag that wrote it",
    error=WeightsError,
)


def train(
    trainer: Trainer,
    path: Path | None,
    identity: Mapping[str, Any],
    ranks: Ranks,
    progress: bool | None,
) -> None:
    """Train to the end with checkpoints at `path`, resuming from one that is there."""
    resumed = path is not None and load_checkpoint(path, trainer, identity)
    if path is not None:
        _check_path(path, trainer, ranks)
    if resumed:
        _logger.info("going on from %s: epoch %d", path, trainer.progress.epoch)
    kept = f"the checkpoint {path} is kept" if resumed else "there is no checkpoint yet"

    def keep() -> None:
        nonlocal kept
        if path is None or not ranks.leads:
            return
        now = trainer.progress
        try:
            save_checkpoint(path, trainer, identity)
        except OutputError as error:
            # Training is worth more than this checkpoint, and the one before is still there.
            warnings.warn(
                f"no checkpoint of epoch {now.epoch}, step {now.step}: {error}. Training goes on;"
                f" {kept}",
                XmagWarning,
                stacklevel=2,
            )
        else:
            kept = f"the checkpoint {path} of epoch {now.epoch}, step {now.step}, is kept"

    total = trainer.slides_left()
    try:
        with progress_bar(progress, total=total, desc="fine-tuning", unit="slide") as bar:
            trainer.run(keep, bar.update)
    except KeyboardInterrupt as stop:
        remedy = "make the same call again to go on from it" if path else "give checkpoint= a path"
        raise KeyboardInterrupt(
            f"interrupted in epoch {trainer.progress.epoch}; {kept}: {remedy}"
        ) from stop


def _check_path(path: Path, trainer: Trainer, ranks: Ranks) -> None:
    if not path.parent.is_dir():
        raise OutputError(f"there is no folder {path.parent} for the checkpoint; create it first")
    here = torch.tensor(float(trainer.progress.updates), device=trainer.device)
    if float(ranks.mean(here)) != float(here):
        raise OutputError(
            f"the processes do not read the same checkpoint at {path}; expected a folder that all"
            " machines share"
        )


def save_checkpoint(path: Path, trainer: Trainer, identity: Mapping[str, Any]) -> None:
    """Save a checkpoint of the trainer to `path`, atomically.

    `identity` describes the run, as JSON values: only a run with the same one resumes from it.
    Raises OutputError where it cannot be written; the file that was there stays.
    """
    header = {
        "identity": dict(identity),
        "progress": records.plain(trainer.progress),
    }
    # Copies: safetensors refuses tensors that share memory, as tied weights do.
    tensors = {key: t.detach().to("cpu", copy=True) for key, t in _tensors(trainer)}
    metadata = {"format": _NAME, "header": _FORMAT.dumps(header)}
    write_tensors(path, tensors, metadata=metadata)


def load_checkpoint(path: Path, trainer: Trainer, identity: Mapping[str, Any]) -> bool:
    """Restore `trainer` from the checkpoint at `path`; False where there is none.

    Raises WeightsError for a file that is damaged or no checkpoint, MismatchError for one of
    another run, with what is different.
    """
    if not path.exists():
        return False
    try:
        with safe_open(path, "pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"{path} is no whole checkpoint ({error}); delete it to begin anew, or name another"
        ) from error
    if metadata.get("format") != _NAME:
        raise WeightsError(
            f"{path} is no checkpoint of a fine-tuning run; give another path for the checkpoint"
        )
    header = _FORMAT.loads(metadata["header"], str(path))
    here, there = Provenance(identity, {}), Provenance(header["identity"], {})
    if differences := here.differences(there):
        raise MismatchError(
            f"the checkpoint {path} is of another run: {'; '.join(differences[:10])}. Delete it to"
            " begin anew, or give another path"
        )
    _restore(trainer, tensors, header["progress"])
    return True


def _tensors(trainer: Trainer) -> Iterator[tuple[str, Tensor]]:
    parts = {"network": trainer.network.state_dict(), "best": trainer.best or {}}
    if trainer.ema is not None:
        parts["ema"] = trainer.ema.module.state_dict()
    for part, state in parts.items():
        for key, tensor in state.items():
            yield f"{part}.{key}", tensor
    for number, parameter in enumerate(trainer.parameters):
        for key, tensor in trainer.optimizer.state[parameter].items():
            yield f"optimizer.{number}.{key}", tensor


def _restore(trainer: Trainer, tensors: Mapping[str, Tensor], progress: dict[str, Any]) -> None:
    trainer.network.load_state_dict(_part(tensors, "network"))
    if trainer.ema is not None:
        trainer.ema.module.load_state_dict(_part(tensors, "ema"))
    trainer.best = _part(tensors, "best") or None
    for number, parameter in enumerate(trainer.parameters):
        state = _part(tensors, f"optimizer.{number}")
        # AdamW keeps the counts of steps on the CPU.
        trainer.optimizer.state[parameter] = {
            key: tensor if key == "step" else tensor.to(parameter.device)
            for key, tensor in state.items()
        }
    trainer.progress = records.from_dict(Progress, progress, "progress")


def _part(tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    return {
        key.removeprefix(f"{part}."): tensor.clone(memory_format=torch.contiguous_format)
        for key, tensor in tensors.items()
        if key.startswith(f"{part}.")
    }
