"""Trainer of encoder and aggregator: steps over slides, validation, and checkpoints."""

import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from xmag.devices import seeded
from xmag.errors import ModelError, OutputError, XmagWarning
from xmag.finetune.cohort import Cohort, shards, steps_of_epoch
from xmag.finetune.gradients import embed_all, exact_backward, seed_of
from xmag.finetune.network import Network, parameter_groups
from xmag.finetune.settings import Mode, Settings
from xmag.finetune.tilestore import TileStore
from xmag.mil import training_loss
from xmag.progress import ProgressOption
from xmag.training import Ema, Loop, Progress, Ranks, Schedule, with_less_memory
from xmag.training.augmentation import draw

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Epoch:
    """Metrics of an epoch.

    Losses are means over slides, weighted by class. Validation metrics are None without validation,
    and the AUROC also where only one class validates. `tiles` is the number trained on.
    """

    epoch: int
    train_loss: float
    validation_loss: float | None = None
    validation_auroc: float | None = None
    validation_balanced_accuracy: float | None = None
    tiles: int
    seconds: float


@dataclass(slots=True, kw_only=True)
class FinetuneProgress(Progress):
    """Progress of a run: also the sums of all ranks in the epoch, and the epochs before it."""

    loss_sum: float = 0.0
    tiles: int = 0
    history: list[Epoch] = field(default_factory=list)


class Trainer(Loop[list[list[int]]]):
    """Trainer on one rank, which has the `stores` of its slides, by their index in `cohort`."""

    kind = "fine-tuning"
    module: Network
    progress: FinetuneProgress

    def __init__(
        self,
        network: Network,
        cohort: Cohort,
        stores: Mapping[int, TileStore],
        *,
        settings: Settings,
        mode: Mode,
        seed: int,
        ranks: Ranks,
        device: torch.device,
    ) -> None:
        self.settings, self.device = settings, device
        self.cohort, self._stores = cohort, stores
        self._mode, self._seed, self._ranks = mode, seed, ranks
        self._shards = shards(cohort.train, cohort.targets, world=ranks.world)
        self._chunk = settings.chunk_tiles or (64 if device.type == "cuda" else 16)
        self._path: Path | None = None
        self._identity: Mapping[str, Any] = {}
        self._kept = "there is no checkpoint yet"
        network = network.to(device)
        updates = settings.epochs * len(self.steps(0))
        super().__init__(
            network,
            torch.optim.AdamW(parameter_groups(network.encoder.vit, network.aggregator, settings)),
            # One step more than there are: the last one would have a rate of zero.
            schedule=Schedule(total=updates + 1, warmup=round(settings.warmup * updates)),
            epochs=settings.epochs,
            patience=settings.patience,
            checkpoint_steps=settings.checkpoint_steps,
            ema=None if settings.ema is None else Ema(network, decay=settings.ema),
            progress=FinetuneProgress(),
        )
        self._parameters = [p for group in self.optimizer.param_groups for p in group["params"]]

    def train(
        self, path: Path | None, identity: Mapping[str, Any], progress: ProgressOption
    ) -> None:
        """Train to the end, from the checkpoint at `path` (of `identity`) if it is there."""
        self._path, self._identity = path, identity
        if path is not None and self.resume(path, identity, self._ranks):
            self._kept = f"the checkpoint {path} is kept"
        try:
            self.run(progress, total=self._slides_left(), desc=self.kind, unit="slide")
        except KeyboardInterrupt as stop:
            again = "make the same call again to go on from it"
            remedy = again if path else "give checkpoint= a path"
            raise KeyboardInterrupt(
                f"interrupted in epoch {self.progress.epoch}; {self._kept}: {remedy}"
            ) from stop

    def save(self) -> None:
        """Save a checkpoint, if this rank does; a warning where it cannot be written."""
        now = self.progress
        if self._path is None or not self._ranks.leads:
            return
        try:
            self.write_checkpoint(self._path, self._identity)
        except OutputError as error:
            # Training is worth more than this checkpoint, and the one before is still there.
            warnings.warn(
                f"no checkpoint of epoch {now.epoch}, step {now.step}: {error}. Training goes on;"
                f" {self._kept}",
                XmagWarning,
                stacklevel=2,
            )
        else:
            where = f"epoch {now.epoch}, step {now.step}"
            self._kept = f"the checkpoint {self._path} of {where}, is kept"

    def steps(self, epoch: int) -> list[list[list[int]]]:
        """The batches of an epoch: for each step, for each rank, its slides."""
        each = self.settings.slides_per_step
        return steps_of_epoch(self._shards, slides_per_step=each, seed=self._seed, epoch=epoch)

    def step(self, batch: list[list[int]]) -> None:
        """Take an optimizer step on the slides of all ranks."""
        now, mine, slides = self.progress, batch[self._ranks.rank], sum(map(len, batch))
        self.module.train()
        gradients = [torch.zeros_like(parameter) for parameter in self._parameters]
        sums = torch.zeros(2, dtype=torch.float64)
        for slide in mine:
            sums += with_less_memory(partial(self._backward, slide, slides), self._halve)
            for parameter, gradient in zip(self._parameters, gradients, strict=True):
                if parameter.grad is not None:  # an aggregator may leave a layer out
                    gradient.add_(parameter.grad)
        # The sums, and not the means: ranks have parts of one loss.
        for parameter, total in zip(self._parameters, self._ranks.sums(gradients), strict=True):
            parameter.grad = total
        loss, tiles = self._ranks.sum(sums).tolist()
        now.loss_sum, now.tiles = now.loss_sum + loss * slides, now.tiles + round(tiles)
        if self.settings.clip is not None:
            nn.utils.clip_grad_norm_(self._parameters, self.settings.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update(self.module, step=now.updates + 1)
        self.bar.update(len(mine))

    def end_epoch(self) -> float | None:
        """Validate and record an epoch; the validation loss, None without validation."""
        now = self.progress
        validation = self._validate() if self.cohort.validation else {}
        now.history.append(
            Epoch(
                epoch=now.epoch,
                train_loss=now.loss_sum / len(self.cohort.train),
                **validation,
                tiles=now.tiles,
                seconds=self.seconds() - sum(row.seconds for row in now.history),
            )
        )
        now.loss_sum, now.tiles = 0.0, 0
        return validation.get("validation_loss")

    def _slides_left(self) -> int:
        """Slides that this rank still has to process, if training does not stop early."""
        now, rank = self.progress, self._ranks.rank
        done = sum(len(step[rank]) for step in self.steps(now.epoch)[: now.step])
        return (self.epochs - now.epoch) * len(self._shards[rank]) - done

    def _backward(self, slide: int, slides_in_step: int) -> Tensor:
        """Backward pass of a slide: its share of the step's loss, and its number of tiles, (2,)."""
        self.optimizer.zero_grad()  # of the slide before, or of a try that ran out of memory
        store, rows = self._stores[slide], self._rows(slide)
        key = self._seed, self.progress.epoch, slide
        target = self.cohort.targets[slide]
        label = torch.tensor([target], device=self.device)
        # Over the number of slides, and not over the sum of their weights, in which the weight of
        # a single slide would cancel.
        weight = self.cohort.weights[target] / slides_in_step
        draws = None
        if (augmentation := self.settings.augmentation) is not None:
            seed = seed_of("augment", self._seed)
            draws = draw(seed, self.progress.epoch, rows, slide, augmentation=augmentation)

        def encode(start: int, stop: int) -> Tensor:
            with seeded(seed_of("encoder", *key, start), self.device):
                part = None if draws is None else draws[start:stop]
                return self.module.encoder(store.read(rows[start:stop]), part)  # type: ignore[no-any-return]

        def loss_of(features: Tensor) -> Tensor:
            with seeded(seed_of("aggregator", *key), self.device):
                return weight * training_loss(self.module.classify(features, label), label)

        loss = exact_backward(encode, len(rows), loss_of, chunk=self._chunk).item()
        if not np.isfinite(loss):
            raise ModelError(
                f"the loss is {loss} at slide {store.name!r}, epoch {self.progress.epoch}; lower"
                ' the learning rates, or give precision="float32"'
            )
        return torch.tensor([loss, len(rows)], dtype=torch.float64)

    def _rows(self, slide: int) -> "np.ndarray[Any, np.dtype[np.int64]]":
        """Indices of the tiles to train on: all, or a sample without replacement."""
        count, most = len(self._stores[slide]), self.settings.sampled_tiles
        if self._mode == "exact" or count <= most:
            return np.arange(count)
        seed = seed_of("sample", self._seed, self.progress.epoch, slide)
        drawn = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        return np.sort(drawn[:most].numpy())

    def _validate(self) -> dict[str, float | None]:
        """Validation loss, AUROC and balanced accuracy of the current (EMA) network."""
        slides, cohort = self.cohort.validation, self.cohort
        network = cast(Network, self.averaged).eval()
        found = torch.zeros(len(slides), len(cohort.head.classes), dtype=torch.float64)
        for place in range(self._ranks.rank, len(slides), self._ranks.world):
            logits_of = partial(self._logits, network, slides[place])
            found[place] = with_less_memory(logits_of, self._halve)
        logits = self._ranks.sum(found).numpy()
        labels = np.array([cohort.targets[i] for i in slides])
        weights = np.array(cohort.weights)[labels]
        return cohort.head.validate(logits, labels, weights)

    @torch.no_grad()
    def _logits(self, network: Network, slide: int) -> Tensor:
        store = self._stores[slide]

        def encode(start: int, stop: int) -> Tensor:
            return network.encoder(store.read(slice(start, stop)))  # type: ignore[no-any-return]

        return network.classify(embed_all(encode, len(store), chunk=self._chunk)).logits[0].cpu()

    def _halve(self, error: torch.cuda.OutOfMemoryError) -> None:
        """Halve the chunks; ModelError where they are of a single tile."""
        if self._chunk == 1:
            raise ModelError(
                f"{self.device} has no memory left for the graph of a single tile ({error}). Free"
                " some, use a smaller model or frozen_blocks=, or, if the slides have very many"
                ' tiles, mode="sampled"'
            ) from error
        self.optimizer.zero_grad()
        self._chunk = (self._chunk + 1) // 2
        _logger.warning(
            "%s is out of memory: going on with chunks of %d tiles", self.device, self._chunk
        )
