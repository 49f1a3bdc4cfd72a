"""Each aggregator against its equations (support/mil_equations.py), and what holds for all bags."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import mil_equations as equations
from torch import nn

from xmag.errors import InputError
from xmag.mil import AGGREGATORS, MILOutput, aggregator, aggregator_config, training_loss
from xmag.mil.clam import smooth_svm

D, C, TOLERANCE = 5, 3, 1e-5

SMALL = {
    "abmil": {"embed_dim": 6, "attention_dim": 4},
    "mean": {"embed_dim": 6},
    "max": {"embed_dim": 6},
    "transmil": {"embed_dim": 8, "heads": 2, "landmarks": 4},
    "clam_sb": {"embed_dim": 6, "attention_dim": 4, "k_sample": 2},
}
BATCHED = ("abmil", "mean", "max")

Reference = Callable[[dict[str, np.ndarray], np.ndarray], tuple[np.ndarray, np.ndarray | None]]

REFERENCES: dict[str, Reference] = {
    "abmil": equations.abmil,
    "mean": equations.mean,
    "max": equations.maximum,
    "transmil": lambda w, x: equations.transmil(w, x, heads=2, landmarks=4),
    "clam_sb": equations.abmil,
}


def make(name: str, *, classes: int = C, seed: int = 0, **options: object) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return aggregator(name, in_dim=D, classes=classes, **{**SMALL[name], **options}).eval()


def bag(tiles: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(tiles, D, generator=torch.Generator().manual_seed(seed))


def alone(module: nn.Module, tiles: torch.Tensor, label: int | None = None) -> MILOutput:
    labels = None if label is None else torch.tensor([label])
    output: MILOutput = module(tiles[None], torch.ones(1, len(tiles), dtype=torch.bool), labels)
    return output


def weights_of(module: nn.Module) -> dict[str, np.ndarray]:
    return {k: v.double().numpy().copy() for k, v in module.state_dict().items()}


@pytest.mark.parametrize("tiles", [1, 2, 7, 30])
@pytest.mark.parametrize("name", AGGREGATORS)
def test_an_aggregator_is_its_equations(name: str, tiles: int) -> None:
    module, features = make(name), bag(tiles)
    logits, attention = REFERENCES[name](weights_of(module), features.double().numpy())
    with torch.no_grad():
        output = alone(module, features)
    assert output.logits.shape == (1, C)
    np.testing.assert_allclose(output.logits[0], logits, atol=TOLERANCE)
    if attention is None:
        assert output.attention is None
    else:
        assert output.attention is not None
        np.testing.assert_allclose(output.attention[0], attention, atol=TOLERANCE)


def loss_written_out(name: str, label: int, **options: object) -> Callable[..., float]:
    if name == "clam_sb":
        settings = {"bag_weight": 0.7, "subtyping": False, "instance_loss": "svm", **options}
        return lambda w, x: equations.clam_loss(w, x, label, k=2, **settings)
    return lambda w, x: equations.cross_entropy(REFERENCES[name](w, x)[0], label)


CASES = [
    *((name, {}) for name in AGGREGATORS),
    ("clam_sb", {"subtyping": True}),
    ("clam_sb", {"instance_loss": "ce", "bag_weight": 0.5}),
]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_loss_and_gradients_are_those_of_the_equations(name: str, options: dict) -> None:
    """The reference's gradients are central differences in float64, good to 1e-8."""
    module, features, label = make(name, **options), bag(7).requires_grad_(), 1
    loss = training_loss(alone(module, features, label), torch.tensor([label]))
    loss.backward()
    written = loss_written_out(name, label, **options)
    w, x = weights_of(module), features.detach().double().numpy()
    assert float(loss.detach()) == pytest.approx(written(w, x), abs=TOLERANCE)
    rng = np.random.default_rng(0)
    found = {key: p.grad for key, p in module.named_parameters()} | {"features": features.grad}
    for key, gradient in found.items():
        array = x if key == "features" else w[key]
        for place in rng.permutation(array.size)[:16]:
            index = np.unravel_index(place, array.shape)
            kept, values = array[index], []
            for step in (1e-6, -1e-6):
                array[index] = kept + step
                values.append(written(w, x))
            array[index] = kept
            expected = (values[0] - values[1]) / 2e-6
            actual = 0.0 if gradient is None else float(gradient[index])
            assert actual == pytest.approx(expected, abs=TOLERANCE), (key, index)


@pytest.mark.parametrize("name", BATCHED)
def test_padding_changes_neither_results_nor_gradients(name: str) -> None:
    sizes = [4, 1, 9, 0]
    bags = [bag(size, seed) for seed, size in enumerate(sizes)]
    labels = torch.tensor([0, 1, 2, 1])
    module = make(name)
    features = torch.full((len(bags), 12, D), 1e4)  # what padding holds is never looked at
    mask = torch.zeros(len(bags), 12, dtype=torch.bool)
    for row, tiles in enumerate(bags):
        features[row, : len(tiles)] = tiles
        mask[row, : len(tiles)] = True
    together = module(features, mask)
    training_loss(together, labels).backward()
    batch = {key: p.grad.clone() for key, p in module.named_parameters()}
    module.zero_grad()
    for row, tiles in enumerate(bags):
        output = alone(module, tiles)
        torch.testing.assert_close(together.logits[row], output.logits[0], atol=1e-6, rtol=1e-5)
        if output.attention is not None:
            torch.testing.assert_close(together.attention[row, : len(tiles)], output.attention[0])
            assert not together.attention[row, len(tiles) :].any()
        (training_loss(output, labels[row : row + 1]) / len(bags)).backward()
    for key, parameter in module.named_parameters():
        torch.testing.assert_close(batch[key], parameter.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", ["transmil", "clam_sb"])
def test_padding_of_a_single_bag_changes_nothing(name: str) -> None:
    module, tiles = make(name), bag(30)
    features = torch.cat([tiles, torch.full((6, D), 1e4)])[None]
    mask = torch.arange(36)[None] < 30
    padded, plain = module(features, mask, torch.tensor([1])), alone(module, tiles, 1)
    torch.testing.assert_close(padded.logits, plain.logits)
    torch.testing.assert_close(padded.attention[:, :30], plain.attention)
    assert not padded.attention[:, 30:].any()
    if plain.loss is not None:
        torch.testing.assert_close(padded.loss, plain.loss)
    assert not module.batched


@settings(max_examples=30)
@given(name=st.sampled_from([*BATCHED, "clam_sb"]), seed=st.integers(0, 2**31), data=st.data())
def test_permuting_a_bag_permutes_its_attention_and_nothing_else(
    name: str, seed: int, data: st.DataObject
) -> None:
    tiles = bag(data.draw(st.integers(1, 40)), seed)
    order = torch.tensor(data.draw(st.permutations(range(len(tiles)))))
    module = make(name, seed=seed)
    with torch.no_grad():
        plain, permuted = alone(module, tiles), alone(module, tiles[order])
    torch.testing.assert_close(permuted.logits, plain.logits, atol=1e-5, rtol=1e-5)
    if plain.attention is not None:
        torch.testing.assert_close(
            permuted.attention, plain.attention[:, order], atol=1e-6, rtol=1e-4
        )


def test_the_order_of_tiles_matters_to_transmil() -> None:
    module, tiles = make("transmil"), bag(9)
    with torch.no_grad():
        difference = alone(module, tiles).logits - alone(module, tiles.flip(0)).logits
    assert difference.abs().max() > 1e-3


@pytest.mark.parametrize("name", AGGREGATORS)
def test_a_bag_without_tiles_gives_finite_logits_and_gradients(name: str) -> None:
    module = make(name).train()
    output = alone(module, bag(0), 1)
    training_loss(output, torch.tensor([1])).backward()
    assert torch.isfinite(output.logits).all()
    if name != "transmil":
        torch.testing.assert_close(output.logits[0], module.head.bias)
    assert output.attention is None or output.attention.shape == (1, 0)
    for parameter in module.parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all()


@pytest.mark.parametrize("name", AGGREGATORS)
def test_attention_sums_to_one(name: str) -> None:
    for tiles in (1, 2, 50):
        with torch.no_grad():
            attention = alone(make(name), bag(tiles) * 30).attention
        if name in ("mean", "max"):
            assert attention is None
        else:
            assert float(attention.sum()) == pytest.approx(1, abs=1e-5)
            assert (attention >= 0).all()


def test_clam_takes_half_of_a_small_bag_as_evidence_and_none_of_a_single_tile() -> None:
    module, w = make("clam_sb", k_sample=8), None
    for tiles, k in ((6, 3), (7, 3), (16, 8)):
        features = bag(tiles)
        w = weights_of(module)
        loss = training_loss(alone(module, features, 2), torch.tensor([2]))
        expected = equations.clam_loss(
            w, features.double().numpy(), 2, k=k, bag_weight=0.7, subtyping=False,
            instance_loss="svm",
        )  # fmt: skip
        assert float(loss.detach()) == pytest.approx(expected, abs=TOLERANCE)
    assert float(alone(module, bag(1), 2).loss.detach()) == 0


def test_the_smooth_svm_loss_tends_to_the_hinge_loss() -> None:
    """At scores so far apart that one term dominates: max over j of margin + s_j - s_y."""
    logits = torch.tensor([[50.0, 0.0], [0.0, 50.0], [60.0, 10.0]])
    loss = smooth_svm(logits, torch.tensor([0, 0, 1]))
    assert float(loss) == pytest.approx((0 + 51 + 51) / 3, abs=1e-5)


@pytest.mark.parametrize("name", AGGREGATORS)
def test_the_default_sizes_are_those_of_the_papers(name: str) -> None:
    module = aggregator(name, in_dim=768, classes=2)
    found = aggregator_config(module)["options"]
    assert found == {
        "abmil": {"embed_dim": 512, "attention_dim": 384, "dropout": 0.25},
        "mean": {"embed_dim": 512, "dropout": 0.25},
        "max": {"embed_dim": 512, "dropout": 0.25},
        "transmil": {"embed_dim": 512, "heads": 8, "landmarks": 256, "dropout": 0.1},
        "clam_sb": {
            "embed_dim": 512, "attention_dim": 256, "dropout": 0.25, "k_sample": 8,
            "bag_weight": 0.7, "subtyping": False, "instance_loss": "svm",
        },
    }[name]  # fmt: skip
    assert alone_logits(module, 768).shape == (1, 2)


def alone_logits(module: nn.Module, dim: int) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = module(torch.zeros(1, 3, dim), torch.ones(1, 3).bool()).logits
    return logits


@pytest.mark.parametrize("name", AGGREGATORS)
def test_a_description_makes_the_same_aggregator_again(name: str) -> None:
    module = make(name)
    config = aggregator_config(module)
    again = aggregator(config["name"], in_dim=D, classes=C, **config["options"]).eval()
    again.load_state_dict(module.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(alone(again, bag(9)).logits, alone(module, bag(9)).logits)


def test_dropout_is_drawn_in_training_alone() -> None:
    for name in AGGREGATORS:
        module, tiles = make(name, dropout=0.5), bag(9)
        with torch.no_grad():
            assert torch.equal(alone(module, tiles).logits, alone(module, tiles).logits)
            module.train()
            drawn = torch.cat([alone(module, tiles).logits for _ in range(10)])
            assert (drawn.std(dim=0) > 0).all()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("abmill", {}, "aggregator is 'abmill'; expected one of 'abmil', 'mean'"),
        (3, {}, "aggregator is 3"),
        ("abmil", {"embed": 3}, "no option 'embed'; expected one of .*'embed_dim'"),
        ("abmil", {"embed_dim": 0}, "embed_dim of 'abmil' is 0; expected an int"),
        ("abmil", {"embed_dim": True}, "embed_dim of 'abmil' is True"),
        ("abmil", {"dropout": 1.0}, "dropout of 'abmil' is 1.0"),
        ("abmil", {"dropout": float("nan")}, "dropout of 'abmil' is nan"),
        ("abmil", {"in_dim": 0}, "in_dim is 0"),
        ("abmil", {"classes": 1}, "classes is 1; expected an int from 2"),
        ("transmil", {"embed_dim": 20}, "embed_dim of 'transmil' is 20 and heads is 8"),
        ("clam_sb", {"bag_weight": 0}, "bag_weight of 'clam_sb' is 0"),
        ("clam_sb", {"subtyping": 1}, "subtyping of 'clam_sb' is 1"),
        ("clam_sb", {"instance_loss": "hinge"}, "instance_loss of 'clam_sb' is 'hinge'"),
        (nn.Linear(1, 1), {"dropout": 0.1}, "options .* beside a module"),
    ],
)
def test_what_makes_no_sense_is_refused(name: object, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        aggregator(name, **{"in_dim": 4, "classes": 2, **options})  # type: ignore[arg-type]


def test_a_module_of_ones_own_cannot_be_described() -> None:
    with pytest.raises(InputError, match="a Linear, which xmag cannot describe"):
        aggregator_config(nn.Linear(1, 1))
