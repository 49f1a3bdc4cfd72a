"""Batches of bags: the sampler, padding, and micro-batches that fit into a device's memory."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from xmag.devices import full_precision
from xmag.errors import InputError, ModelError
from xmag.metrics.labels import Floats, Ints
from xmag.mil.bags import Features, by_content, joined
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

    def __init__(self, size: int, rng: np.random.Generator, *, strata: Ints | None = None) -> None:
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


def padded(bags: Sequence[Features], device: torch.device) -> tuple[Tensor, Tensor]:
    """Padded features (B, N, D), zero where padded, and their mask (B, N), True on tiles."""
    longest = max(len(bag) for bag in bags)
    features = np.zeros((len(bags), longest, bags[0].shape[1]), np.float32)
    mask = np.zeros((len(bags), longest), np.bool_)
    for row, bag in enumerate(bags):
        features[row, : len(bag)] = bag
        mask[row, : len(bag)] = True
    return torch.from_numpy(features).to(device), torch.from_numpy(mask).to(device)


def groups_of_like_size(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Indices of bags: `limit` rows once padded, none to more than twice its size, or one bag."""
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
    """Aggregator applied to bags in micro-batches, smaller ones after CUDA runs out of memory.

    All tiles of a case's bags are one bag. With `fuse` (late fusion) each is by itself; it makes
    one row of logits (C,) of theirs, (k, C).
    """

    def __init__(
        self,
        module: nn.Module,
        device: torch.device,
        *,
        outputs: int,
        dtype: torch.dtype = torch.float32,
        fuse: Callable[[Floats], Floats] | None = None,
    ) -> None:
        self.module, self.device, self.outputs, self.dtype = module, device, outputs, dtype
        self.fuse = fuse
        self.limit = _PADDED_TILES
        self._sizes: Sequence[int] = ()

    def batches(self, bags: Sequence[Features]) -> Iterator[Batch]:
        """The micro-batches of a batch; `halve` makes them smaller when memory runs out."""
        sizes = [len(bag) for bag in bags]
        limit = self.limit if getattr(self.module, "batched", False) else 1
        for rows in groups_of_like_size(sizes, limit):
            self._sizes = [sizes[row] for row in rows]
            features, mask = padded([bags[row] for row in rows], self.device)
            yield Batch(rows=rows, features=features, mask=mask)

    def __call__(self, batch: Batch, targets: Tensor | None = None) -> MILOutput:
        """Aggregator output for a micro-batch; ModelError for anything but logits (B, C)."""
        kind, exact = self.device.type, self.dtype == torch.float32
        with full_precision(self.device) if exact else torch.autocast(kind, dtype=self.dtype):
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

    def logits(self, bags: Sequence[Features]) -> Floats:
        """The logits of a case whose bags have tiles, (C,); ModelError if they are not finite."""
        found = self._vectors(bags, "logits")
        return found[0] if len(found) == 1 or self.fuse is None else self.fuse(found)

    def pooled(self, bags: Sequence[Features]) -> Floats:
        """The pooled vector of a case whose bags have tiles, (E,); with late fusion their mean."""
        return np.asarray(self._vectors(bags, "pooled").mean(axis=0))

    def attention(self, bags: Sequence[Features]) -> list[NDArray[np.float32]]:
        """The attention of the tiles of each bag of a case: all together sum to 1."""
        if self.fuse is not None:
            count = max(1, sum(len(bag) > 0 for bag in bags))
            return [self._attention(bag) / np.float32(count) for bag in bags]
        whole, order = joined(bags)
        ends = np.cumsum([len(bags[i]) for i in order])
        parts = np.split(self._attention(whole), ends[:-1])
        return [parts[order.index(i)] for i in range(len(bags))]

    def _vectors(self, bags: Sequence[Features], field: Literal["logits", "pooled"]) -> Floats:
        """A field of the output for a case as one bag, (1, E), or for each bag of it, (k, E)."""
        # By content: what rounding does to a sum does not depend on how bags were listed.
        parts = [joined(bags)[0]] if self.fuse is None else [bags[i] for i in by_content(bags)]
        vectors, name = [], type(self.module).__name__
        for part in parts:
            found = getattr(self._output(part), field)
            if found is None:
                raise InputError(
                    f"the aggregator {name} gives no pooled vectors; let it return"
                    " MILOutput(pooled=...), (B, E)"
                )
            if found.ndim != 2 or len(found) != 1 or not torch.isfinite(found).all():
                raise ModelError(
                    f"the aggregator {name} gave {field} {tuple(found.shape)} for one bag; expected"
                    " (1, E), finite: check its weights and the scale of the features"
                )
            vectors.append(found[0].cpu().double().numpy())
        return np.stack(vectors)

    def _attention(self, bag: Features) -> NDArray[np.float32]:
        scores = self._output(bag).attention
        if scores is None:
            raise InputError(
                f"the aggregator {type(self.module).__name__} has no attention; train with"
                ' aggregator="abmil", "clam_sb" or "transmil"'
            )
        weights: NDArray[np.float32] = scores[0].float().cpu().numpy()
        return weights

    def _output(self, bag: Features) -> MILOutput:
        """Aggregator output for one bag, without gradients."""
        with torch.inference_mode():
            return with_less_memory(lambda: self(next(self.batches([bag]))), self.halve)

    def halve(self, error: torch.cuda.OutOfMemoryError) -> None:
        """Make micro-batches half as large as the last; ModelError where that was one bag."""
        rows = len(self._sizes) * max(self._sizes, default=0)
        if len(self._sizes) <= 1:
            raise ModelError(
                f"{self.device} has no memory left for a bag of {rows} tiles alone ({error}). Free"
                ' some, give max_tiles= (a random part of each bag in training), or device="cpu"'
            ) from error
        self.limit = rows // 2
        _logger.warning("%s is out of memory: going on with %d tiles", self.device, self.limit)
