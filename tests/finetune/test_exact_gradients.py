"""The gradient of a bag, chunk by chunk, against one backward pass through one graph."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from support.models import TINY, random_encoder, random_tiles
from torch import Tensor, nn

from xmag.devices import seeded
from xmag.finetune import exact_backward
from xmag.finetune.gradients import embed_all, seed_of, spans
from xmag.finetune.network import TileNetwork
from xmag.mil import aggregator, training_loss
from xmag.training.augmentation import draw

CPU = torch.device("cpu")
COUNT, CHUNK = 11, 4
TILES = torch.from_numpy(random_tiles(COUNT))
LABEL = torch.tensor([1])


class Dropping(nn.Module):
    """The tile network with dropout on its input and on its output."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tile_network()
        self.hidden = nn.Linear(32, 32)
        self.drop = nn.Dropout(0.4)

    def forward(self, tiles: Tensor) -> Tensor:
        return self.hidden(self.drop(self.inner(tiles)))


def tile_network() -> TileNetwork:
    encoder = random_encoder(TINY)
    return TileNetwork(encoder.vit, encoder.config)


def abmil(dropout: float) -> nn.Module:
    with seeded(1, CPU):
        return aggregator(
            "abmil", in_dim=32, classes=2, embed_dim=16, attention_dim=8, dropout=dropout
        ).train()


def encoding(network: nn.Module) -> Callable[[int, int], Tensor]:
    def encode(start: int, stop: int) -> Tensor:
        with seeded(seed_of("encoder", start), CPU):
            return network(TILES[start:stop])

    return encode


def losing(head: nn.Module) -> Callable[[Tensor], Tensor]:
    def loss_of(features: Tensor) -> Tensor:
        with seeded(seed_of("aggregator"), CPU):
            mask = torch.ones(1, len(features), dtype=torch.bool)
            return training_loss(head(features.unsqueeze(0), mask), LABEL)

    return loss_of


def gradients(*modules: nn.Module) -> list[Tensor]:
    found = [
        torch.zeros_like(p) if p.grad is None else p.grad.clone()  # CLAM: layers of other classes
        for module in modules
        for p in module.parameters()
    ]
    for module in modules:
        module.zero_grad()
    return found


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= 1e-4 * other.abs().max().clamp(min=1e-3)


@pytest.mark.parametrize("name", ["abmil", "mean", "max", "transmil", "clam_sb"])
def test_every_aggregator_gets_the_gradients_of_the_whole_bag(name: str) -> None:
    network = tile_network()
    with seeded(0, CPU):
        head = aggregator(name, in_dim=32, classes=2, embed_dim=16, dropout=0.0).train()

    def loss_of(features: Tensor) -> Tensor:
        mask = torch.ones(1, len(features), dtype=torch.bool)
        return training_loss(head(features.unsqueeze(0), mask, LABEL), LABEL)

    expected_loss = loss_of(network(TILES))
    expected_loss.backward()
    expected = gradients(network.vit, head)
    loss = exact_backward(encoding(network), COUNT, loss_of, chunk=CHUNK)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-6)
    assert_close(gradients(network.vit, head), expected)


@pytest.mark.parametrize("chunk", [1, 4, 11, 64])
def test_with_dropout_the_reference_is_the_same_chunks_and_draws_in_one_graph(chunk: int) -> None:
    network, head = Dropping().train(), abmil(dropout=0.5)
    encode, loss_of = encoding(network), losing(head)
    loss_of(torch.cat([encode(a, b) for a, b in spans(COUNT, chunk)])).backward()
    expected = gradients(network.inner.vit, network.hidden, head)
    exact_backward(encode, COUNT, loss_of, chunk=chunk)
    assert_close(gradients(network.inner.vit, network.hidden, head), expected)


def test_draws_that_do_not_replay_give_other_gradients() -> None:
    """The test above would notice."""
    network, head = Dropping().train(), abmil(dropout=0.0)
    exact_backward(encoding(network), COUNT, losing(head), chunk=CHUNK)
    replayed = gradients(network.inner.vit, network.hidden, head)
    with seeded(0, CPU):
        exact_backward(
            lambda a, b: network(TILES[a:b]), COUNT, losing(head), chunk=CHUNK
        )  # fmt: skip
    others = gradients(network.inner.vit, network.hidden, head)
    worst = max(
        float((a - b).abs().max() / b.abs().max())
        for a, b in zip(others, replayed, strict=True)
        if b.abs().max() > 1e-3
    )
    assert worst > 0.1


def test_augmented_tiles_are_the_same_in_both_passes() -> None:
    network, head = tile_network(), abmil(dropout=0.0)
    draws = draw(3, 0, range(COUNT), 0)
    losing(head)(network(TILES, draws)).backward()
    expected = gradients(network.vit, head)
    exact_backward(
        lambda a, b: network(TILES[a:b], draws[a:b]), COUNT, losing(head), chunk=CHUNK
    )  # fmt: skip
    assert_close(gradients(network.vit, head), expected)


def test_gradients_add_to_those_that_are_there() -> None:
    network, head = tile_network(), abmil(dropout=0.0)
    exact_backward(encoding(network), COUNT, losing(head), chunk=CHUNK)
    once = [p.grad.clone() for p in network.vit.parameters()]
    exact_backward(encoding(network), COUNT, losing(head), chunk=CHUNK)
    assert_close([p.grad for p in network.vit.parameters()], [2 * g for g in once])


def test_a_frozen_encoder_leaves_the_aggregator_to_learn() -> None:
    network, head = tile_network().requires_grad_(False), abmil(dropout=0.0)
    losing(head)(network(TILES)).backward()
    expected = gradients(head)
    exact_backward(encoding(network), COUNT, losing(head), chunk=CHUNK)
    assert_close(gradients(head), expected)
    assert all(p.grad is None for p in network.parameters())


class Held:
    """A saved tensor, counted for as long as its graph keeps it."""

    alive = peak = 0

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.bytes = tensor, tensor.numel() * tensor.element_size()
        Held.alive += self.bytes
        Held.peak = max(Held.peak, Held.alive)

    def __del__(self) -> None:
        Held.alive -= self.bytes


@contextmanager
def counted() -> Iterator[None]:
    """Count the bytes that graphs made inside keep for their backward pass."""
    Held.alive = Held.peak = 0
    with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
        yield


def peak_of(count: int, *, exact: bool) -> int:
    network, head = tile_network(), abmil(dropout=0.25)
    tiles = TILES[:1].expand(count, -1, -1, -1)
    with counted():
        if exact:
            exact_backward(lambda a, b: network(tiles[a:b]), count, losing(head), chunk=4)
        else:
            losing(head)(network(tiles)).backward()
    assert Held.alive == 0
    return Held.peak


def test_what_graphs_keep_does_not_grow_with_the_bag() -> None:
    small, large = peak_of(8, exact=True), peak_of(64, exact=True)
    assert large == small
    assert peak_of(64, exact=False) > 7 * peak_of(8, exact=False)
    assert peak_of(64, exact=False) > 12 * large


def test_all_embeddings_come_without_a_graph_whatever_the_chunk() -> None:
    network = tile_network()
    whole = network(TILES).detach()
    for chunk in (1, 4, 64):
        features = embed_all(encoding(network), COUNT, chunk=chunk)
        assert not features.requires_grad
        assert (features - whole).abs().max() < 1e-5


def test_seeds_differ_with_every_part_of_their_key() -> None:
    keys = [("a", 0, 1), ("a", 1, 0), ("b", 0, 1), ("a", 0, 1, 0), ("a", 0, "1"), (0, 1)]
    seeds = [seed_of(*key) for key in keys]
    assert len(set(seeds)) == len(keys)
    assert seed_of("a", 0, 1) == seeds[0]
    assert all(0 <= seed < 2**63 for seed in seeds)
