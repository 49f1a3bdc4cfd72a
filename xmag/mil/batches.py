"""Padded batches of bags, in micro-batches that fit into a device's memory."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from xmag.devices import full_precision
from xmag.errors import ModelError
from xmag.mil.output import MILOutput

_logger = logging.getLogger("xmag.mil")

_PADDED_TILES = 2**17
"""Initial limit of rows in a padded micro-batch: 400 MB of features 768 wide."""

_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A micro-batch: a few bags of a batch, padded to the longest of them, on the device."""

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


class Runner:
    """Runs an aggregator over bags, with smaller micro-batches after CUDA runs out of memory."""

    def __init__(
        self,
        module: nn.Module,
        device: torch.device,
        *,
        classes: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.module, self.device, self.classes, self.dtype = module, device, classes, dtype
        self.limit = _PADDED_TILES
        self._now: Sequence[int] = ()

    def parts(self, bags: Sequence[NDArray[np.float32]]) -> Iterator[Part]:
        """The micro-batches of a batch; `with_less` makes them smaller when memory runs out."""
        sizes = [len(bag) for bag in bags]
        limit = self.limit if getattr(self.module, "batched", False) else 1
        for rows in groups_of_like_size(sizes, limit):
            self._now = [sizes[row] for row in rows]
            features, mask = padded([bags[row] for row in rows], self.device)
            yield Part(rows=rows, features=features, mask=mask)

    def forward(self, part: Part, labels: Tensor | None = None) -> MILOutput:
        """Aggregator output for a micro-batch; ModelError for anything but logits (B, C)."""
        with self._precision():
            output = self.module(part.features, part.mask, labels)
        expected = (len(part.rows), self.classes)
        logits = getattr(output, "logits", None)
        if not isinstance(logits, Tensor) or tuple(logits.shape) != expected:
            seen = f"logits {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(output)
            raise ModelError(
                f"the aggregator {type(self.module).__name__} returned {seen} for {expected[0]}"
                f" bags; expected a MILOutput with logits {expected}"
            )
        return output  # type: ignore[no-any-return]

    def with_less(self, run: Callable[[], _Result]) -> _Result:
        """Result of `run` (a loop over `parts`), retried with smaller parts when out of memory.

        Raises ModelError where a bag alone does not fit.
        """
        while True:
            try:
                return run()
            except torch.cuda.OutOfMemoryError as error:
                self._shrink(error)
            # Outside of the handler, so that the failed tensors are gone.
            torch.cuda.empty_cache()

    def _shrink(self, error: BaseException) -> None:
        rows = len(self._now) * max(self._now, default=0)
        if len(self._now) <= 1:
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
