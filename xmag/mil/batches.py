"""Batches of bags: the sampler, padding, and micro-batches that fit into a device's memory."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from xmag.devices import full_precision
from xmag.errors import InputError, ModelError
from xmag.mil.bags import Features, Fusion, by_content, joined
from xmag.mil.pooling import MILOutput
from xmag.training import with_less_memory

_logger = logging.getLogger("xmag.mil")

_PADDED_TILES = 2**17
"""Initial limit of rows in a padded micro-batch: 400 MB of features 768 wide."""


class BagSampler:
    """Sampler of the bags of an epoch, as many as there are; iterate it once for each epoch.

    Without `strata` each bag comes once. With the stratum (class) of each bag, int64 (n,), strata
    come equally often, and the bags of one in turn: none comes again before all others of its
    stratum have come, over epochs too.
    """

    def __init__(
        self, size: int, rng: np.random.Generator, *, strata: NDArray[np.int64] | None = None
    ) -> None:
        self._size, self._rng, self._strata = size, rng, strata
        self._decks: dict[int, list[int]] = {}

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[int]:
        if self._strata is None:
            yield from self._rng.permutation(self._size).tolist()
            return
        # Where the strata do not divide an epoch, chance decides which come once more.
        every = np.unique(self._strata)
        turns = np.tile(every, self._size // len(every))
        more = self._rng.permutation(every)[: self._size - len(turns)]
        for turn in self._rng.permutation(np.concatenate([turns, more])).tolist():
            deck = self._decks.setdefault(turn, [])
            if not deck:
                own = np.flatnonzero(self._strata == turn)
                deck.extend(self._rng.permutation(own).tolist())
            yield deck.pop()


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A few bags on the device, padded to the longest of them; `rows` is their place in a list."""

    rows: list[int]
    features: Tensor
    mask: Tensor


def padded(bags: Sequence[NDArray[np.float32]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Padded features (B, N, D), zero where padded, and their mask (B, N), True on tiles."""
    longest = max(len(bag) for bag in bags)
    features = np.zeros((len(bags), longest, bags[0].shape[1]), np.float32)
    mask = np.zeros((len(bags), longest), np.bool_)
    for row, bag in enumerate(bags):
        features[row, : len(bag)] = bag
        mask[row, : len(bag)] = True
    return torch.from_numpy(features).to(device), torch.from_numpy(mask).to(device)


def groups_of_like_size(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Indices of bags, grouped by size: at most `limit` rows once padded to the longest.

    No bag is padded to more than twice its size. A bag that is larger than `limit` is alone.
    """
    groups: list[list[int]] = []
    longest = 0
    for place in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        fits = groups and (len(groups[-1]) + 1) * longest <= limit
        if fits and 2 * sizes[place] >= longest:
            groups[-1].append(place)
        else:
            groups.append([place])
            longest = sizes[place]
    return groups


class BatchedAggregator:
    """Aggregator applied to bags in micro-batches, smaller ones after CUDA runs out of memory."""

    def __init__(
        self,
        module: nn.Module,
        device: torch.device,
        *,
        outputs: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.module, self.device, self.outputs, self.dtype = module, device, outputs, dtype
        self.limit = _PADDED_TILES
        self._sizes: Sequence[int] = ()

    def batches(self, bags: Sequence[NDArray[np.float32]]) -> Iterator[Batch]:
        """The micro-batches of a batch; `halve` makes them smaller when memory runs out."""
        sizes = [len(bag) for bag in bags]
        limit = self.limit if getattr(self.module, "batched", False) else 1
        for rows in groups_of_like_size(sizes, limit):
            self._sizes = [sizes[row] for row in rows]
            features, mask = padded([bags[row] for row in rows], self.device)
            yield Batch(rows=rows, features=features, mask=mask)

    def __call__(self, batch: Batch, targets: Tensor | None = None) -> MILOutput:
        """Aggregator output for a micro-batch; ModelError for anything but logits (B, C)."""
        with self._precision():
            output = self.module(batch.features, batch.mask, targets)
        expected = (len(batch.rows), self.outputs)
        logits = getattr(output, "logits", None)
        if not isinstance(logits, Tensor) or tuple(logits.shape) != expected:
            seen = f"logits {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(output)
            raise ModelError(
                f"the aggregator {type(self.module).__name__} returned {seen} for {expected[0]}"
                f" bags; expected a MILOutput with logits {expected}"
            )
        return output  # type: ignore[no-any-return]

    def output_of(self, bag: NDArray[np.float32]) -> MILOutput:
        """Aggregator output for one bag, without gradients."""
        with torch.inference_mode():
            return with_less_memory(lambda: self(next(self.batches([bag]))), self.halve)

    def logits(self, bag: NDArray[np.float32]) -> NDArray[np.float64]:
        """The logits of one bag that has tiles, (C,); ModelError where they are not finite."""
        logits: NDArray[np.float64] = self.output_of(bag).logits[0].double().cpu().numpy()
        if not np.isfinite(logits).all():
            raise ModelError(
                "the aggregator gave logits that are not finite; check its weights and the scale"
                " of the features"
            )
        return logits

    def attention(self, bag: NDArray[np.float32]) -> NDArray[np.float32]:
        """The attention of the tiles of one bag, (N,); InputError for an aggregator without."""
        scores = self.output_of(bag).attention
        if scores is None:
            raise InputError(
                f"the aggregator {type(self.module).__name__} has no attention; train with"
                ' aggregator="abmil", "clam_sb" or "transmil"'
            )
        weights: NDArray[np.float32] = scores[0].float().cpu().numpy()
        return weights

    def pooled(self, bag: NDArray[np.float32]) -> NDArray[np.float64]:
        """The pooled vector of one bag, (E,); InputError for an aggregator that gives none."""
        pooled = self.output_of(bag).pooled
        name = type(self.module).__name__
        if pooled is None:
            raise InputError(
                f"the aggregator {name} gives no pooled vectors; let it return"
                " MILOutput(pooled=...), (B, E)"
            )
        if pooled.ndim != 2 or len(pooled) != 1 or not torch.isfinite(pooled).all():
            raise ModelError(
                f"the aggregator {name} gave pooled vectors {tuple(pooled.shape)} for one bag;"
                " expected finite ones, (1, E)"
            )
        vector: NDArray[np.float64] = pooled[0].cpu().double().numpy()
        return vector

    def halve(self, error: torch.cuda.OutOfMemoryError) -> None:
        """Make micro-batches half as large as the last; ModelError where that was one bag."""
        rows = len(self._sizes) * max(self._sizes, default=0)
        if len(self._sizes) <= 1:
            raise ModelError(
                f"{self.device} has no memory left for a bag of {rows} tiles alone ({error})."
                " Free some, give max_tiles= (a random part of each bag in training), or"
                ' device="cpu"'
            ) from error
        self.limit = rows // 2
        _logger.warning("%s is out of memory: going on with %d tiles", self.device, self.limit)

    def _precision(self) -> AbstractContextManager[Any]:
        if self.dtype == torch.float32:
            return full_precision(self.device)
        return torch.autocast(self.device.type, dtype=self.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseAggregator:
    """Aggregator applied to cases: to all tiles of a case's bags as one bag, or to each bag.

    With fusion="late", `fuse` makes one row of logits (C,) of those of the bags, (k, C).
    """

    model: BatchedAggregator
    fusion: Fusion
    fuse: Callable[[NDArray[np.float64]], NDArray[np.float64]]

    def logits(self, bags: Sequence[Features]) -> NDArray[np.float64]:
        """The logits of a case whose bags have tiles, (C,)."""
        return self._of(bags, self.model.logits, self.fuse)

    def pooled(self, bags: Sequence[Features]) -> NDArray[np.float64]:
        """The pooled vector of a case whose bags have tiles, (E,); with late fusion their mean."""
        return self._of(bags, self.model.pooled, lambda found: np.asarray(found.mean(axis=0)))

    def width(self, in_dim: int) -> int:
        """The length E of pooled vectors; InputError for an aggregator that gives none."""
        return len(self.model.pooled(np.zeros((1, in_dim), np.float32)))

    def attention(self, bags: Sequence[Features]) -> list[NDArray[np.float32]]:
        """The attention of the tiles of each bag of a case: all together sum to 1."""
        if self.fusion == "late":
            count = max(1, sum(len(bag) > 0 for bag in bags))
            return [self.model.attention(bag) / np.float32(count) for bag in bags]
        whole, order = joined(bags)
        ends = np.cumsum([len(bags[i]) for i in order])
        parts = np.split(self.model.attention(whole), ends[:-1])
        return [parts[order.index(i)] for i in range(len(bags))]

    def _of(
        self,
        bags: Sequence[Features],
        of: Callable[[Features], NDArray[np.float64]],
        fuse: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    ) -> NDArray[np.float64]:
        if self.fusion != "late" or len(bags) == 1:
            return of(joined(bags)[0])
        # By content: what rounding does to a sum does not depend on how bags were listed.
        return fuse(np.stack([of(bags[i]) for i in by_content(bags)]))
