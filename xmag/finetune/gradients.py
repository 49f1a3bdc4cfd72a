"""Exact gradients of a whole bag by gradient caching, and seeds of replayable draws."""

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

Encode = Callable[[int, int], Tensor]
"""Encoder of tiles: (start, stop) -> embeddings (stop - start, D), the same at every call."""

LossOf = Callable[[Tensor], Tensor]
"""Loss of a bag: embeddings (N, D) -> a scalar."""


def exact_backward(encode: Encode, count: int, loss_of: LossOf, *, chunk: int) -> Tensor:
    """Loss of a bag of `count` tiles; adds its exact gradients to `.grad`, by gradient caching.

    They are those of ``loss_of(all embeddings).backward()``, but no more than `chunk` tiles have a
    graph at any time: all are embedded without one, the loss gives the gradient at the embeddings,
    and each chunk is embedded again and takes its part of that gradient on. That is exact by the
    chain rule as long as `encode` gives the same for the same tiles, its random draws included.

    Two forward passes instead of one, except where the bag is a single chunk. Gradient caching is
    described by Gao et al. 2021 (arXiv 2101.06983) for contrastive losses.
    """
    if count <= chunk:
        loss = loss_of(encode(0, count))
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()
    features = embed_all(encode, count, chunk=chunk).requires_grad_()
    loss = loss_of(features)
    loss.backward()  # type: ignore[no-untyped-call]
    assert features.grad is not None
    for start, stop in spans(count, chunk):
        embedded = encode(start, stop)
        if embedded.requires_grad:  # a frozen encoder has nothing to learn
            embedded.backward(features.grad[start:stop])  # type: ignore[no-untyped-call]
    return loss.detach()


@torch.no_grad()
def embed_all(encode: Encode, count: int, *, chunk: int) -> Tensor:
    """Embeddings of `count` tiles, (N, D), without a graph, `chunk` tiles at a time."""
    return torch.cat([encode(start, stop) for start, stop in spans(count, chunk)])


def spans(count: int, chunk: int) -> list[tuple[int, int]]:
    """The (start, stop) of consecutive chunks of `count` tiles."""
    return [(start, min(start + chunk, count)) for start in range(0, count, chunk)]


def seed_of(*key: int | str) -> int:
    """Random seed derived from `key` by a hash: the same on every machine."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1
