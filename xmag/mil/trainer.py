"""Trainer of an aggregator on bags: optimizer steps, validation, history."""

import copy
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xmag.errors import ModelError
from xmag.mil.bags import BagDataset
from xmag.mil.batches import BagSampler, BatchedAggregator
from xmag.mil.heads import Head, weighted_loss
from xmag.training import Loop, Schedule, with_less_memory

if TYPE_CHECKING:
    from xmag.mil.estimator import MILEstimator

Epoch = dict[str, float | int | None]
"""Metrics of an epoch; None where a value does not exist, as an AUROC of one class."""


class BagTrainer(Loop[list[int]]):
    """Trainer of an aggregator and its head; a batch is the indices of bags in `train`.

    Epochs, rates and sizes are those of the estimator `params`. Draws from torch's default
    generators for dropout, and from `rng` for everything else. Without validation the best epoch is
    the last that was completed.
    """

    def __init__(
        self,
        model: BatchedAggregator,
        head: Head,
        train: BagDataset,
        validation: BagDataset | None,
        params: "MILEstimator[Any]",
        *,
        sampler: BagSampler,
        rng: np.random.Generator,
    ) -> None:
        steps = math.ceil(len(train) / params.batch_size)
        total, weights = params.epochs * steps, model.module.parameters()
        super().__init__(
            model.module,
            torch.optim.AdamW(weights, lr=params.lr, weight_decay=params.weight_decay),
            schedule=Schedule(total=total, warmup=min(steps, total // 10)),
            epochs=params.epochs,
            patience=params.patience,
        )
        self.model, self.head, self.train, self.validation = model, head, train, validation
        self.params, self.sampler = params, sampler
        self.history: list[Epoch] = []
        self._rng, self._loss_sum = rng, 0.0
        self.objective = head.objective(train.targets, model.device)
        self._scaler = torch.amp.GradScaler("cuda", enabled=model.dtype == torch.float16)

    def steps(self, epoch: int) -> list[list[int]]:  # noqa: ARG002
        """The batches of an epoch, as the sampler draws them."""
        order, size = list(self.sampler), self.params.batch_size
        return [order[start : start + size] for start in range(0, len(order), size)]

    def step(self, batch: Sequence[int]) -> None:
        """Take an optimizer step; its loss is computed before."""
        model, scaler = self.model, self._scaler
        self.module.train()
        bags = [self._some_tiles(self.train[index]) for index in batch]
        labels = None
        if self.head.has_labels:  # which an aggregator may have an auxiliary loss of
            labels = torch.from_numpy(self.train.targets[batch]).to(model.device)
        weights = torch.from_numpy(self.train.weights[batch]).to(model.device, torch.float32)

        def gradients() -> Tensor:
            self.optimizer.zero_grad(set_to_none=True)
            total = torch.zeros((), dtype=torch.float32, device=model.device)
            for part in model.batches(bags):
                here = None if labels is None else labels[part.rows]
                weight, rows = weights[part.rows], [batch[row] for row in part.rows]
                output = model(part, here)
                loss = weighted_loss(output, self.objective(output.logits, rows), weight)
                # The parts of a batch add up to the loss that it has as a whole.
                loss = loss * (weight.sum() / weights.sum())
                torch.autograd.backward(scaler.scale(loss))
                total += loss.detach()
            return total

        loss = float(with_less_memory(gradients, model.halve))
        scaler.step(self.optimizer)
        scaler.update()
        if not math.isfinite(loss):
            raise ModelError(
                f"the training loss became {loss} in epoch {self.progress.epoch + 1}; try a smaller"
                f' lr than {self.params.lr}, dtype="float32", or features of a smaller scale'
            )
        self._loss_sum += loss * len(batch)

    def end_epoch(self) -> float | None:
        """Validate and record an epoch; the validation loss, None without validation."""
        epoch = self.progress.epoch + 1
        found = self._validate()
        row = {
            "epoch": epoch,
            "train_loss": self._loss_sum / len(self.sampler),
            **found,
            "lr": self.optimizer.param_groups[0]["lr"],
        }
        self._loss_sum = 0.0
        self.history.append(row)
        self.bar.set_postfix({k: v for k, v in row.items() if k != "epoch" and v is not None})
        self.bar.update()
        if self.validation is None:
            self.best, self.progress.best_epoch = copy.deepcopy(self.module.state_dict()), epoch
        return found["validation_loss"]

    def _validate(self) -> dict[str, float | None]:
        data = self.validation
        if data is None:
            return dict.fromkeys(("validation_loss", *self.head.metric_names))
        self.module.eval()
        exact = BatchedAggregator(self.module, self.model.device, outputs=self.model.outputs)
        logits = np.stack([exact.logits([data[index]]) for index in range(len(data))])
        found = self.head.validate(logits, data.targets, data.weights)
        if not math.isfinite(found["validation_loss"]):
            raise ModelError(
                f"the validation loss became {found['validation_loss']}; try a smaller lr than"
                f" {self.params.lr}"
            )
        return found

    def _some_tiles(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        most = self.params.max_tiles
        if most is None or len(features) <= most:
            return features
        return features[np.sort(self._rng.choice(len(features), most, replace=False))]
