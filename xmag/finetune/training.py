"""Trainer of encoder and aggregator: steps, validation, best weights; resumes exactly."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from xmag.devices import full_precision, seeded
from xmag.errors import ModelError
from xmag.finetune.augment import draw
from xmag.finetune.cohort import Cohort, shards, steps_of_epoch
from xmag.finetune.gradients import embed_all, exact_backward, seed_of
from xmag.finetune.network import TileNetwork, parameter_groups
from xmag.finetune.settings import Mode, Settings
from xmag.finetune.tilestore import TileStore
from xmag.mil import MILOutput, training_loss
from xmag.mil.heads import class_metrics
from xmag.training import Ema, Ranks, best_epoch, warmup_cosine, warn_of_early_best

_logger = logging.getLogger(__name__)

T = TypeVar("T")


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
class Progress:
    """Progress of a run (epoch, step, history), in plain values for a checkpoint."""

    epoch: int = 0
    step: int = 0
    updates: int = 0
    loss_sum: float = 0.0
    tiles: int = 0
    seconds: float = 0.0
    best_epoch: int | None = None
    history: list[Epoch] = field(default_factory=list)


class Network(nn.Module):
    """The trained module: the encoder, and the aggregator on its embeddings."""

    def __init__(self, encoder: TileNetwork, aggregator: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.aggregator = aggregator

    def classify(self, features: Tensor, labels: Tensor | None = None) -> MILOutput:
        """Aggregator output for one bag of embeddings (N, D), computed in float32."""
        mask = torch.ones(1, len(features), dtype=torch.bool, device=features.device)
        with full_precision(features.device):
            return self.aggregator(features.unsqueeze(0), mask, labels)  # type: ignore[no-any-return]


class Trainer:
    """Trainer on one rank; `run` continues from `progress`.

    `stores` has the tiles of this rank's slides, by their index in `cohort`.
    """

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
        self.network = network.to(device)
        self.settings = settings
        self.progress = Progress()
        self.best: dict[str, Tensor] | None = None
        self.ema = None if settings.ema is None else Ema(network, decay=settings.ema)
        self._cohort, self._stores = cohort, stores
        self._mode, self._seed = mode, seed
        self._ranks, self.device = ranks, device
        self.chunk = settings.chunk_tiles or (64 if device.type == "cuda" else 16)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(
                network.encoder.vit,
                network.aggregator,
                learning_rate=settings.learning_rate,
                classifier_learning_rate=settings.classifier_learning_rate,
                layer_decay=settings.layer_decay,
                weight_decay=settings.weight_decay,
            )
        )
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self._shards = shards(cohort.train, cohort.targets, world=ranks.world)

    def result(self) -> Network:
        """The network with the best weights, in eval mode; those of the EMA where there is one."""
        final = self.network if self.ema is None else self.ema.module
        assert isinstance(final, Network)
        if self.best is not None:
            final.load_state_dict(self.best)
        return final.eval()

    def run(self, on_checkpoint: Callable[[], None], on_slides: Callable[[int], object]) -> None:
        """Train to the end; `on_checkpoint` is called wherever a run can be resumed."""
        while not self._is_done():
            self._run_epoch(on_checkpoint, on_slides)
            on_checkpoint()
        now = self.progress
        if now.best_epoch is not None and self._ranks.leads:
            warn_of_early_best(
                now.best_epoch + 1, trained=now.epoch, epochs=self.settings.epochs, stacklevel=4
            )

    def slides_left(self) -> int:
        """Slides that this rank still has to process, if training does not stop early."""
        now, rank = self.progress, self._ranks.rank
        done = sum(len(step[rank]) for step in self.steps(now.epoch)[: now.step])
        return (self.settings.epochs - now.epoch) * len(self._shards[rank]) - done

    def _is_done(self) -> bool:
        now, patience = self.progress, self.settings.patience
        tired = (
            patience is not None
            and now.best_epoch is not None
            and now.step == 0
            and now.epoch - 1 - now.best_epoch >= patience
        )
        return now.epoch >= self.settings.epochs or tired

    def _run_epoch(
        self, on_checkpoint: Callable[[], None], on_slides: Callable[[int], object]
    ) -> None:
        now, every = self.progress, self.settings.checkpoint_steps
        steps = self.steps(now.epoch)
        started = time.perf_counter() - now.seconds
        while now.step < len(steps):
            mine = steps[now.step][self._ranks.rank]
            self._step(mine, slides_in_step=sum(map(len, steps[now.step])), total=len(steps))
            now.step += 1
            now.seconds = time.perf_counter() - started
            on_slides(len(mine))
            if every and now.step % every == 0 and now.step < len(steps):
                on_checkpoint()
        self._end_epoch(started)

    def steps(self, epoch: int) -> list[list[list[int]]]:
        """The batches of an epoch: for each step, for each rank, its slides."""
        return steps_of_epoch(
            self._shards,
            slides_per_step=self.settings.slides_per_step,
            seed=self._seed,
            epoch=epoch,
        )

    def _step(self, slides: Sequence[int], *, slides_in_step: int, total: int) -> None:
        """One optimizer step on the slides of all ranks; `slides` are those of this rank."""
        now, settings = self.progress, self.settings
        self.network.train()
        gradients: list[Tensor | None] = [None] * len(self.parameters)
        for slide in slides:
            loss, tiles = self._with_less_memory(
                lambda slide=slide: self._backward(slide, slides_in_step)  # type: ignore[misc]
            )
            self._collect(gradients)
            now.loss_sum += loss * slides_in_step
            now.tiles += tiles
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            # An aggregator may leave a layer out, and a process may have no slide in the last step.
            parameter.grad = torch.zeros_like(parameter) if gradient is None else gradient
        self._sum_over_processes()
        if settings.clip is not None:
            nn.utils.clip_grad_norm_(self.parameters, settings.clip)
        updates = settings.epochs * total
        # One step more than there are: the last one would have a rate of zero.
        factor = warmup_cosine(
            now.updates, total=updates + 1, warmup=round(settings.warmup * updates)
        )
        for group in self.optimizer.param_groups:
            group["lr"] = factor * group["peak"]
        self.optimizer.step()
        self.optimizer.zero_grad()
        now.updates += 1
        if self.ema is not None and settings.ema is not None:
            # The first weights, which know nothing, would otherwise stay in the average for long.
            self.ema.decay = min(settings.ema, (1 + now.updates) / (10 + now.updates))
            self.ema.update(self.network)

    def _backward(self, slide: int, slides_in_step: int) -> tuple[float, int]:
        """Backward pass of a slide: its share of the step's loss, and its number of tiles."""
        self.optimizer.zero_grad()  # of a try that ran out of memory
        store, rows, key = self._stores[slide], self._rows(slide), self._key(slide)
        target = self._cohort.targets[slide]
        label = torch.tensor([target], device=self.device)
        # Over the number of slides, and not over the sum of their weights, in which the weight of
        # a single slide would cancel.
        weight = self._cohort.weights[target] / slides_in_step
        augmentation = self.settings.augmentation
        draws = (
            None
            if augmentation is None
            else draw(augmentation, len(store), seed=seed_of("augment", *key))[rows]
        )

        def encode(start: int, stop: int) -> Tensor:
            with seeded(seed_of("encoder", *key, start), self.device):
                tiles = store.read(rows[start:stop].numpy())
                part = None if draws is None else draws[start:stop]
                return self.network.encoder(tiles, part)  # type: ignore[no-any-return]

        def loss_of(features: Tensor) -> Tensor:
            with seeded(seed_of("aggregator", *key), self.device):
                return weight * training_loss(self.network.classify(features, label), label)

        loss = exact_backward(encode, len(rows), loss_of, chunk=self.chunk).item()
        if not loss - loss == 0:  # NaN or infinite
            raise ModelError(
                f"the loss is {loss} at slide {store.name!r}, epoch {self.progress.epoch}; lower"
                ' the learning rates, or give precision="float32"'
            )
        return loss, len(rows)

    def _key(self, slide: int) -> tuple[int, int, int]:
        return self._seed, self.progress.epoch, slide

    def _rows(self, slide: int) -> Tensor:
        """Indices of the tiles to train on: all, or a sample without replacement."""
        count = len(self._stores[slide])
        if self._mode == "exact" or count <= self.settings.sampled_tiles:
            return torch.arange(count)
        rng = torch.Generator().manual_seed(seed_of("sample", *self._key(slide)))
        drawn = torch.randperm(count, generator=rng)[: self.settings.sampled_tiles]
        return drawn.sort().values

    def _collect(self, gradients: list[Tensor | None]) -> None:
        """Accumulate `.grad` into `gradients`, and clear it."""
        for i, parameter in enumerate(self.parameters):
            found, before = parameter.grad, gradients[i]
            gradients[i] = (
                found if before is None else before if found is None else before.add_(found)
            )
            parameter.grad = None

    def _sum_over_processes(self) -> None:
        """All-reduce the gradients by sum, and not by mean: ranks have parts of one loss."""
        if self._ranks.world == 1:
            return
        flat = torch.cat([p.grad.flatten() for p in self.parameters if p.grad is not None])
        total = self._ranks.mean(flat) * self._ranks.world
        parts = torch.split(total, [p.numel() for p in self.parameters])
        for parameter, part in zip(self.parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)

    def _end_epoch(self, started: float) -> None:
        now = self.progress
        sums = torch.tensor([now.loss_sum, now.tiles], dtype=torch.float64, device=self.device)
        loss_sum, tiles = (self._ranks.mean(sums) * self._ranks.world).tolist()
        validation = self._validate() if self._cohort.validation else {}
        now.history.append(
            Epoch(
                epoch=now.epoch,
                train_loss=loss_sum / len(self._cohort.train),
                **validation,
                tiles=round(tiles),
                seconds=time.perf_counter() - started,
            )
        )
        self._keep_best()
        now.epoch += 1
        now.step, now.loss_sum, now.tiles, now.seconds = 0, 0.0, 0, 0.0

    def _keep_best(self) -> None:
        losses = [row.validation_loss for row in self.progress.history]
        known = [loss for loss in losses if loss is not None]
        if not known or best_epoch(known, epochs=self.settings.epochs) < len(losses):
            return
        source = self.network if self.ema is None else self.ema.module
        # On the CPU, so that the best weights take no room on the GPU.
        self.best = {k: t.detach().to("cpu", copy=True) for k, t in source.state_dict().items()}
        self.progress.best_epoch = self.progress.epoch

    def _validate(self) -> dict[str, float | None]:
        """Validation loss, AUROC and balanced accuracy of the current (EMA) network."""
        network = self.network if self.ema is None else self.ema.module
        assert isinstance(network, Network)
        network.eval()
        slides, cohort = self._cohort.validation, self._cohort
        found = torch.zeros(
            len(slides), len(cohort.classes), dtype=torch.float64, device=self.device
        )
        for place in range(self._ranks.rank, len(slides), self._ranks.world):
            found[place] = self._with_less_memory(
                lambda slide=slides[place]: self._logits(network, slide)  # type: ignore[misc]
            )
        logits = (self._ranks.mean(found) * self._ranks.world).cpu().numpy()
        labels = np.array([cohort.targets[i] for i in slides])
        weights = np.array(cohort.weights)[labels]
        return class_metrics(logits, labels, weights)

    @torch.no_grad()
    def _logits(self, network: Network, slide: int) -> Tensor:
        store = self._stores[slide]
        features = embed_all(
            lambda start, stop: network.encoder(store.read(slice(start, stop))),
            len(store),
            chunk=self.chunk,
        )
        return network.classify(features).logits[0].double()

    def _with_less_memory(self, run: Callable[[], T]) -> T:
        """Result of `run`, retried with half the chunk where CUDA is out of memory."""
        while True:
            try:
                return run()
            except torch.cuda.OutOfMemoryError as error:
                if self.chunk == 1:
                    raise ModelError(
                        f"{self.device} has no memory left for the graph of a single tile"
                        f" ({error}). Free some, use a smaller model or frozen_blocks=, or, if the"
                        ' slides have very many tiles, mode="sampled"'
                    ) from error
            # Outside of the handler, so that the failed tensors are gone.
            self.optimizer.zero_grad()
            self.chunk = (self.chunk + 1) // 2
            torch.cuda.empty_cache()
            _logger.warning(
                "%s is out of memory: going on with chunks of %d tiles", self.device, self.chunk
            )
