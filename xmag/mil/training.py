"""Trainer of an aggregator: optimizer steps, validation, and the best epoch's weights."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from xmag.errors import ModelError
from xmag.mil.batches import Runner
from xmag.mil.cohort import Cohort
from xmag.mil.output import training_loss
from xmag.mil.sampling import Order, Sampling
from xmag.mil.scoring import auroc, balanced_accuracy, log_sum_exp, logits_of
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
    sampling: Sampling
    max_tiles: int | None
    progress: bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Best:
    """The best epoch so far, and its weights."""

    epoch: int
    state: dict[str, Tensor]


class Trainer:
    """Trainer of `module` on `train`; updates `best` and `history` after each epoch.

    Draws from torch's default generators for dropout, and from `rng` for everything else.
    """

    def __init__(
        self,
        module: nn.Module,
        train: Cohort,
        validation: Cohort | None,
        settings: Settings,
        *,
        classes: int,
        device: torch.device,
        dtype: torch.dtype,
        rng: np.random.Generator,
    ) -> None:
        self.module, self.train, self.validation = module, train, validation
        self.settings, self.device, self.classes = settings, device, classes
        self.history: list[Epoch] = []
        self.best: Best | None = None
        self._rng = rng
        self._order = Order(train.labels, settings.sampling, rng)
        self._runner = Runner(module, device, classes=classes, dtype=dtype)
        self._steps = math.ceil(len(train) / settings.batch_size)
        self._optimizer = torch.optim.AdamW(
            module.parameters(), lr=settings.lr, weight_decay=settings.weight_decay
        )
        self._scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)

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
            state = {k: v.detach().clone() for k, v in self.module.state_dict().items()}
            self.best = Best(epoch=len(losses), state=state)

    def _lr(self, step: int) -> float:
        total = self.settings.epochs * self._steps
        warmup = min(self._steps, total // 10)
        return self.settings.lr * warmup_cosine(step, total=total, warmup=warmup)

    def _train_epoch(self, epoch: int) -> float:
        """Train one epoch; returns the mean loss of its bags, each computed before its step."""
        self.module.train()
        size, order = self.settings.batch_size, self._order.epoch()
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

    def _step(self, rows: NDArray[np.int64]) -> float:
        bags = [self._some_tiles(self.train.features(row)) for row in rows]
        labels = torch.from_numpy(self.train.labels[rows]).to(self.device)
        weights = torch.from_numpy(self.train.weights[rows]).to(self.device, torch.float32)

        def gradients() -> Tensor:
            self._optimizer.zero_grad(set_to_none=True)
            total = torch.zeros((), dtype=torch.float32, device=self.device)
            for part in self._runner.parts(bags):
                here = labels[part.rows], weights[part.rows]
                output = self._runner.forward(part, here[0])
                # The parts of a batch add up to the loss that it has as a whole.
                loss = training_loss(output, *here) * (here[1].sum() / weights.sum())
                torch.autograd.backward(self._scaler.scale(loss))
                total += loss.detach()
            return total

        loss = self._runner.with_less(gradients)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        return float(loss)

    def _some_tiles(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        most = self.settings.max_tiles
        if most is None or len(features) <= most:
            return features
        return features[np.sort(self._rng.choice(len(features), most, replace=False))]

    def _validate(self) -> Epoch:
        names = ("validation_loss", "validation_auroc", "validation_balanced_accuracy")
        if self.validation is None:
            return dict.fromkeys(names)
        self.module.eval()
        exact = Runner(self.module, self.device, classes=self.classes)
        logits = logits_of(exact, self.validation)
        labels, weights = self.validation.labels, self.validation.weights
        losses = log_sum_exp(logits) - logits[np.arange(len(labels)), labels]
        loss = float((weights * losses).sum() / weights.sum())
        if not math.isfinite(loss):
            raise ModelError(
                f"the validation loss became {loss}; try a smaller lr than {self.settings.lr}"
            )
        values = (loss, auroc(labels, logits), balanced_accuracy(labels, logits))
        return dict(zip(names, values, strict=True))
