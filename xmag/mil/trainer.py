"""Trainer of an aggregator: optimizer steps, validation, and the best epoch's weights."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xmag.errors import ModelError
from xmag.mil.bags import BagDataset
from xmag.mil.batches import BagSampler, BatchedAggregator
from xmag.mil.heads import Head, training_loss
from xmag.progress import progress_bar
from xmag.training import best_epoch, warmup_cosine, warn_of_early_best

Epoch = dict[str, float | int | None]
"""Metrics of an epoch; None where a value does not exist, as an AUROC of one class."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Training hyperparameters; see MILClassifier."""

    epochs: int
    patience: int
    batch_size: int
    lr: float
    weight_decay: float
    max_tiles: int | None
    progress: bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Best:
    """The best epoch so far, and its weights."""

    epoch: int
    state: dict[str, Tensor]


class Trainer:
    """Trainer of an aggregator and its head; updates `best` and `history` after each epoch.

    Draws from torch's default generators for dropout, and from `rng` for everything else.
    """

    def __init__(
        self,
        model: BatchedAggregator,
        head: Head,
        train: BagDataset,
        validation: BagDataset | None,
        settings: Settings,
        *,
        sampler: BagSampler,
        rng: np.random.Generator,
    ) -> None:
        self.model, self.head, self.train, self.validation = model, head, train, validation
        self.settings, self.sampler = settings, sampler
        self.history: list[Epoch] = []
        self.best: Best | None = None
        self._rng = rng
        self._steps = math.ceil(len(train) / settings.batch_size)
        self._optimizer = torch.optim.AdamW(
            model.module.parameters(), lr=settings.lr, weight_decay=settings.weight_decay
        )
        self._scaler = torch.amp.GradScaler("cuda", enabled=model.dtype == torch.float16)

    def run(self) -> None:
        """Train until the last epoch, or until early stopping by `patience`."""
        settings = self.settings
        bar = progress_bar(settings.progress, total=settings.epochs, desc="training", unit="epoch")
        with bar:
            for epoch in range(1, settings.epochs + 1):
                row: Epoch = {"epoch": epoch, "train_loss": self._train_epoch(epoch)}
                row |= self._validate()
                row["lr"] = self._lr(epoch * self._steps - 1)
                self.history.append(row)
                self._keep_best()
                bar.set_postfix({k: v for k, v in row.items() if k != "epoch" and v is not None})
                bar.update()
                if self.best is not None and epoch - self.best.epoch >= settings.patience:
                    break
        if self.validation is not None and self.best is not None:
            warn_of_early_best(
                self.best.epoch, trained=len(self.history), epochs=settings.epochs, stacklevel=3
            )

    def _keep_best(self) -> None:
        losses = [row["validation_loss"] for row in self.history]
        known = [float(loss) for loss in losses if loss is not None]
        # Without validation the latest weights are the best there are.
        if not known or best_epoch(known, epochs=self.settings.epochs) == len(losses):
            state = {k: v.detach().clone() for k, v in self.model.module.state_dict().items()}
            self.best = Best(epoch=len(losses), state=state)

    def _lr(self, step: int) -> float:
        total = self.settings.epochs * self._steps
        warmup = min(self._steps, total // 10)
        return self.settings.lr * warmup_cosine(step, total=total, warmup=warmup)

    def _train_epoch(self, epoch: int) -> float:
        """Train one epoch; returns the mean loss of its bags, each computed before its step."""
        self.model.module.train()
        size, order = self.settings.batch_size, list(self.sampler)
        total = 0.0
        for step in range(self._steps):
            for group in self._optimizer.param_groups:
                group["lr"] = self._lr((epoch - 1) * self._steps + step)
            rows = order[step * size : (step + 1) * size]
            loss = self._step(rows)
            if not math.isfinite(loss):
                raise ModelError(
                    f"the training loss became {loss} in epoch {epoch}; try a smaller lr than"
                    f' {self.settings.lr}, dtype="float32", or features of a smaller scale'
                )
            total += loss * len(rows)
        return total / len(order)

    def _step(self, rows: Sequence[int]) -> float:
        model, scaler = self.model, self._scaler
        bags = [self._some_tiles(self.train[row]) for row in rows]
        targets = torch.from_numpy(self.train.targets[rows]).to(model.device)
        weights = torch.from_numpy(self.train.weights[rows]).to(model.device, torch.float32)

        def gradients() -> Tensor:
            self._optimizer.zero_grad(set_to_none=True)
            total = torch.zeros((), dtype=torch.float32, device=model.device)
            for batch in model.batches(bags):
                here, weight = targets[batch.rows], weights[batch.rows]
                loss = training_loss(model(batch, here), here, weight, losses=self.head.losses)
                # The parts of a batch add up to the loss that it has as a whole.
                loss = loss * (weight.sum() / weights.sum())
                torch.autograd.backward(scaler.scale(loss))
                total += loss.detach()
            return total

        loss = model.with_less(gradients)
        scaler.step(self._optimizer)
        scaler.update()
        return float(loss)

    def _some_tiles(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        most = self.settings.max_tiles
        if most is None or len(features) <= most:
            return features
        return features[np.sort(self._rng.choice(len(features), most, replace=False))]

    def _validate(self) -> Epoch:
        data = self.validation
        if data is None:
            return dict.fromkeys(self.head.metric_names)
        self.model.module.eval()
        exact = BatchedAggregator(self.model.module, self.model.device, outputs=self.model.outputs)
        logits = np.stack([exact.logits(data[index]) for index in range(len(data))])
        found = self.head.metrics(logits, data.targets, data.weights)
        loss = found["validation_loss"]
        if loss is None or not math.isfinite(loss):
            raise ModelError(
                f"the validation loss became {loss}; try a smaller lr than {self.settings.lr}"
            )
        return found
