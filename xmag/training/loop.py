"""Training loop: epochs of steps, validation, best weights, moving average, checkpoints."""

import copy
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from xmag import records
from xmag.errors import InputError, OutputError
from xmag.progress import ProgressOption, progress_bar
from xmag.training.checkpoint import Checkpoint, tensors_of
from xmag.training.ranks import Ranks
from xmag.training.schedule import Schedule, best_epoch

_logger = logging.getLogger(__name__)

Batch = TypeVar("Batch")
Result = TypeVar("Result")


class Ema:
    """Exponential moving average (EMA) of parameters and buffers, float32; counters are copied.

    `module` is a frozen copy that holds it; call `update` after the optimizer's step.
    """

    def __init__(self, module: nn.Module, *, decay: float) -> None:
        if not 0 <= decay < 1:
            raise InputError(f"the decay of an average is {decay}; expected 0 <= decay < 1")
        self.decay = decay
        self.module = copy.deepcopy(module).float().eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, module: nn.Module, *, step: int | None = None) -> None:
        """Move the average towards `module`: average = decay * average + (1 - decay) * module.

        With the number of a `step` the decay is at most (1 + step) / (10 + step): the first weights
        would otherwise stay for long.
        """
        decay = self.decay if step is None else min(self.decay, (1 + step) / (10 + step))
        now, averages = module.state_dict(), self.module.state_dict()
        means, values = [], []
        for name, mean in averages.items():
            if mean.is_floating_point():
                means.append(mean)
                values.append(now[name].detach().to(mean))
            else:
                mean.copy_(now[name])
        torch._foreach_lerp_(means, values, 1 - decay)  # one call: there are hundreds of them


@dataclass(slots=True, kw_only=True)
class Progress:
    """Progress of a training in plain values, for a checkpoint; a trainer may add its own.

    `epoch` epochs are done, `step` steps of the next, and `updates` in all. `losses` are those of
    validation, `best_epoch` (from 1) the epoch whose weights are kept, None without validation.
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
    checkpoints of a `kind`. All that changes in training is in `progress` and `state`, so that it
    can be resumed. `best` are the weights of the best epoch, on the CPU; trainers move the `bar`.
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
        """Tensors of a checkpoint: "module.KEY", "ema.KEY", "best.KEY", "optimizer.NAME.KEY"."""
        parts = {"module": self.module.state_dict(), "best": self.best or {}}
        if self.ema is not None:
            parts["ema"] = self.ema.module.state_dict()
        states = self.optimizer.state_dict()["state"]
        parts |= {f"optimizer.{name}": states.get(at, {}) for at, name in enumerate(self._names())}
        return {f"{part}.{key}": t for part, found in parts.items() for key, t in found.items()}

    def restore(self, tensors: Mapping[str, Tensor], progress: Mapping[str, Any]) -> None:
        """Go back to the `state` and the `progress` (as JSON values) of a checkpoint."""
        self.module.load_state_dict(tensors_of(tensors, "module"))
        if self.ema is not None:
            self.ema.module.load_state_dict(tensors_of(tensors, "ema"))
        state = {at: tensors_of(tensors, f"optimizer.{n}") for at, n in enumerate(self._names())}
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.best = tensors_of(tensors, "best") or None
        self.progress = records.from_dict(type(self.progress), progress, "progress")

    def write_checkpoint(self, path: Path, identity: Mapping[str, Any]) -> None:
        """Write a `Checkpoint` to `path`; OutputError where it cannot be written."""
        progress, tensors = records.plain(self.progress), self.state()
        Checkpoint(kind=self.kind, identity=identity, progress=progress, tensors=tensors).save(path)

    def resume(self, path: Path, identity: Mapping[str, Any], ranks: Ranks) -> bool:
        """Go on from the checkpoint at `path`, as `Checkpoint.load`; False where there is none."""
        found = Checkpoint.load(path, kind=self.kind, identity=identity)
        if found is not None:
            self.restore(found.tensors, found.progress)
            _logger.info("going on from %s, after %d steps", path, self.progress.updates)
        if not path.parent.is_dir():
            raise OutputError(
                f"there is no folder {path.parent} for the checkpoint; create it first"
            )
        updates = self.progress.updates
        if float(ranks.mean(torch.tensor(float(updates)))) != updates:
            raise OutputError(
                f"the processes do not read the same checkpoint at {path}; expected a shared folder"
            )
        return found is not None

    def _names(self) -> list[str]:
        """Names of the parameters in the order of the optimizer's state."""
        names = {parameter: name for name, parameter in self.module.named_parameters()}
        return [names[p] for group in self.optimizer.param_groups for p in group["params"]]

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


def with_less_memory(
    run: Callable[[], Result], halve: Callable[[torch.cuda.OutOfMemoryError], None]
) -> Result:
    """Result of `run`, called anew after each `halve` as long as CUDA runs out of memory.

    `halve` makes the parts that `run` computes at once smaller, or raises ModelError.
    """
    while True:
        try:
            return run()
        except torch.cuda.OutOfMemoryError as error:
            halve(error)
        # Outside of the handler, so that the failed tensors are gone.
        torch.cuda.empty_cache()
