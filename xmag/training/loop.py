"""Training loop: epochs of steps, validation, best weights, early stopping, checkpoints."""

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from xmag import records
from xmag.progress import ProgressOption, progress_bar
from xmag.training.checkpoint import (
    Checkpoint,
    require_shared,
    restore_state,
    state_tensors,
    tensors_of,
)
from xmag.training.ema import Ema
from xmag.training.ranks import Ranks
from xmag.training.schedule import Schedule, best_epoch

_logger = logging.getLogger(__name__)

Batch = TypeVar("Batch")


@dataclass(slots=True, kw_only=True)
class Progress:
    """Progress of a training in plain values, for a checkpoint; a trainer may add its own.

    `epoch` epochs are done, `step` steps of the next, and `updates` steps in all, in `seconds`.
    `losses` are the validation losses of the epochs so far. `best_epoch` (from 1) is the epoch
    whose weights are kept, None without validation.
    """

    epoch: int = 0
    step: int = 0
    updates: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    best_epoch: int | None = None


class Loop(ABC, Generic[Batch]):
    """Base class of trainers: `run` trains to the end, from wherever `progress` is.

    A trainer defines `steps` and `step`, and `end_epoch` and `save` where it has validation and
    checkpoints. What changes in training is in `progress` and in `state`, so that a run that is
    resumed from both goes on as one that never stopped.

    Attributes:
        kind: The training that its checkpoints are of, such as "distillation".
        progress: How far the training is.
        best: The weights of the best epoch so far, on the CPU; None without validation.
        bar: The progress bar while `run` runs, which trainers move.
    """

    kind: ClassVar[str] = "training"

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        schedule: Schedule,
        epochs: int,
        patience: int | None = None,
        checkpoint_steps: int | None = None,
        ema: Ema | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.module, self.optimizer, self.ema = module, optimizer, ema
        self.schedule, self.epochs, self.patience = schedule, epochs, patience
        self.checkpoint_steps = checkpoint_steps
        self.progress = progress or Progress()
        self.best: dict[str, Tensor] | None = None
        self.bar: Any = None
        self._started = 0.0

    @abstractmethod
    def steps(self, epoch: int) -> Sequence[Batch]:
        """The batches of an epoch (from 0), one a step; the same again where a run is resumed."""

    @abstractmethod
    def step(self, batch: Batch) -> None:
        """Take an optimizer step; the learning rate is set already."""

    def end_epoch(self) -> float | None:
        """Validate and record an epoch; the validation loss, None where there is none."""
        return None

    def save(self) -> None:
        """Save a checkpoint: after each epoch, and every `checkpoint_steps` steps within it."""

    @property
    def averaged(self) -> nn.Module:
        """The module to validate and to keep: the EMA where there is one."""
        return self.module if self.ema is None else self.ema.module

    def result(self) -> nn.Module:
        """The trained module in eval mode: the EMA if there is one, with the best weights."""
        if self.best is not None:
            self.averaged.load_state_dict(self.best)
        return self.averaged.eval()

    def run(self, progress: ProgressOption, **bar: Any) -> None:
        """Train to the last epoch or to early stopping, with a progress bar as `bar` says."""
        self._started = time.perf_counter() - self.progress.seconds
        with progress_bar(progress, **bar) as self.bar:
            while not self.is_done():
                self._run_epoch()
                self.save()

    def is_done(self) -> bool:
        """Whether all epochs are done, or `patience` epochs have passed since the best one."""
        now, waited = self.progress, 0
        if now.best_epoch is not None and now.step == 0:
            waited = now.epoch - now.best_epoch
        return now.epoch >= self.epochs or (self.patience is not None and waited >= self.patience)

    def seconds(self) -> float:
        """Seconds of training so far, those before it was resumed included."""
        return time.perf_counter() - self._started

    def state(self) -> dict[str, Tensor]:
        """Tensors of a checkpoint: module, EMA, optimizer and the best weights."""
        best = {f"best.{key}": tensor for key, tensor in (self.best or {}).items()}
        return state_tensors(self.module, self.optimizer, self.ema) | best

    def restore(self, tensors: Mapping[str, Tensor], progress: Mapping[str, Any]) -> None:
        """Go back to the `state` and the `progress` (as JSON values) of a checkpoint."""
        restore_state(tensors, self.module, self.optimizer, self.ema)
        self.best = tensors_of(tensors, "best") or None
        self.progress = records.from_dict(type(self.progress), progress, "progress")

    def write_checkpoint(self, path: Path, identity: Mapping[str, Any]) -> None:
        """Write a `Checkpoint` to `path`; OutputError where it cannot be written."""
        progress, tensors = records.plain(self.progress), self.state()
        Checkpoint(kind=self.kind, identity=identity, progress=progress, tensors=tensors).save(path)

    def resume(self, path: Path, identity: Mapping[str, Any], ranks: Ranks) -> bool:
        """Go on from the checkpoint at `path`; False where there is none.

        Raises what `Checkpoint.load` does, and OutputError where ranks read different ones.
        """
        found = Checkpoint.load(path, kind=self.kind, identity=identity)
        if found is not None:
            self.restore(found.tensors, found.progress)
            _logger.info("going on from %s, after %d steps", path, self.progress.updates)
        require_shared(path, self.progress.updates, ranks)
        return found is not None

    def _run_epoch(self) -> None:
        now, batches = self.progress, self.steps(self.progress.epoch)
        while now.step < len(batches):
            self.schedule.set_rate(self.optimizer, now.updates)
            self.step(batches[now.step])
            now.step, now.updates, now.seconds = now.step + 1, now.updates + 1, self.seconds()
            every = self.checkpoint_steps
            if every and now.step % every == 0 and now.step < len(batches):
                self.save()
        if (loss := self.end_epoch()) is not None:
            now.losses.append(loss)
            if best_epoch(now.losses, epochs=self.epochs) == len(now.losses):
                now.best_epoch = len(now.losses)
                state = self.averaged.state_dict()
                # On the CPU, so that the best weights take no room on the GPU.
                self.best = {key: t.detach().to("cpu", copy=True) for key, t in state.items()}
        now.epoch, now.step, now.seconds = now.epoch + 1, 0, self.seconds()
