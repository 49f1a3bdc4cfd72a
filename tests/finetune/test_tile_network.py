"""The encoder that trains, against the frozen one; what is frozen, and how fast the rest learns."""

import pytest
import torch
from support.models import TINY, TINY_REGISTERS, random_encoder, random_tiles

from xmag.encoder import load_model
from xmag.errors import InputError
from xmag.finetune import Settings, exact_backward
from xmag.finetune.network import TileNetwork, freeze, parameter_groups, uses_half
from xmag.mil import aggregator
from xmag.vit import ViT, ViTConfig

CPU = torch.device("cpu")


@pytest.mark.parametrize("config", [TINY, TINY_REGISTERS])
def test_it_embeds_as_the_encoder_does(config: ViTConfig) -> None:
    encoder = random_encoder(config)
    network = TileNetwork(encoder.vit, encoder.config)
    tiles = random_tiles(5)
    assert (network(torch.from_numpy(tiles)) - encoder.embed(tiles)).abs().max() < 1e-5


def test_it_embeds_as_xmag_mini_does() -> None:
    encoder = load_model("xmag-mini", device="cpu")
    network = TileNetwork(encoder.vit, encoder.config)
    tiles = random_tiles(2)
    assert (network(torch.from_numpy(tiles)) - encoder.embed(tiles)).abs().max() < 1e-4


def test_every_parameter_learns_and_the_encoder_stays_as_it_is() -> None:
    encoder = random_encoder(TINY)
    before = {key: t.clone() for key, t in encoder.vit.state_dict().items()}
    network = TileNetwork(encoder.vit, encoder.config)
    network(torch.from_numpy(random_tiles(2))).square().sum().backward()
    for name, parameter in network.vit.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
        with torch.no_grad():
            parameter.add_(1)
    assert all(torch.equal(t, before[key]) for key, t in encoder.vit.state_dict().items())
    assert not any(p.requires_grad for p in encoder.vit.parameters())


def test_the_gradient_is_that_of_finite_differences() -> None:
    encoder = random_encoder(TINY)
    network = TileNetwork(encoder.vit, encoder.config).double()
    tiles = torch.from_numpy(random_tiles(2))
    weight = network.vit.patch_embed.proj.bias
    network(tiles).sin().sum().backward()
    with torch.no_grad():
        values = []
        for step in (1e-4, -1e-4):
            weight[3] += step
            values.append(network(tiles).sin().sum().item())
            weight[3] -= step
    assert (values[0] - values[1]) / 2e-4 == pytest.approx(weight.grad[3].item(), rel=1e-3)


def test_autocast_of_the_caller_changes_nothing() -> None:
    encoder = random_encoder(TINY)
    network = TileNetwork(encoder.vit, encoder.config)
    tiles = torch.from_numpy(random_tiles(2))
    expected = network(tiles)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(network(tiles), expected)


def test_freezing_stops_at_the_block_that_is_named() -> None:
    def trained(blocks: int | None) -> set[str]:
        vit = ViT(TINY)
        freeze(vit, blocks)
        names = [name for name, p in vit.named_parameters() if p.requires_grad]
        return {n.split(".")[0] + (n.split(".")[1] if "blocks" in n else "") for n in names}

    everything = {"cls_token", "pos_embed", "patch_embed", "blocks0", "blocks1", "norm"}
    assert trained(None) == everything
    assert trained(0) == {"blocks0", "blocks1", "norm"}
    assert trained(1) == {"blocks1", "norm"}
    assert trained(2) == set()


@pytest.mark.parametrize("blocks", [-1, 3])
def test_freezing_blocks_that_are_not_there_is_refused(blocks: int) -> None:
    with pytest.raises(InputError, match="0 to 2"):
        freeze(ViT(TINY), blocks)


def test_rates_fall_from_block_to_block_and_vectors_do_not_decay() -> None:
    vit = ViT(ViTConfig(width=32, depth=3, heads=2, hidden=64, position_grid=5, registers=2))
    head = aggregator("mean", in_dim=32, classes=2, embed_dim=8)
    settings = Settings(
        learning_rate=1.0, classifier_learning_rate=7.0, layer_decay=0.5, weight_decay=0.1
    )
    groups = parameter_groups(vit, head, settings)
    found = {
        id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]
    }
    assert len(found) == sum(len(group["params"]) for group in groups)
    of_vit = {name: found[id(p)] for name, p in vit.named_parameters()}
    assert of_vit["norm.weight"] == (1.0, 0.0)
    assert of_vit["blocks.2.attn.qkv.weight"] == (1.0, 0.1)
    assert of_vit["blocks.1.mlp.fc1.weight"] == (0.5, 0.1)
    assert of_vit["blocks.0.mlp.fc1.bias"] == (0.25, 0.0)
    assert of_vit["blocks.0.ls1.gamma"] == (0.25, 0.0)
    assert of_vit["patch_embed.proj.weight"] == (0.125, 0.1)
    for name in ("pos_embed", "cls_token", "register_tokens"):
        assert of_vit[name] == (0.125, 0.0)
    assert {found[id(p)][0] for p in head.parameters()} == {7.0}


def test_what_is_frozen_is_in_no_group() -> None:
    vit = ViT(TINY)
    freeze(vit, 1)
    groups = parameter_groups(vit, torch.nn.Linear(2, 2), Settings())
    learning = {id(p) for group in groups for p in group["params"]}
    assert {id(p) for p in vit.parameters()} & learning == {
        id(p) for name, p in vit.named_parameters() if name.startswith(("blocks.1.", "norm."))
    }


def test_half_precision_is_for_cuda() -> None:
    assert not uses_half("auto", CPU)
    assert not uses_half("float32", CPU)
    with pytest.raises(InputError, match="is for CUDA"):
        uses_half("bfloat16", CPU)
    with pytest.raises(InputError, match="'auto', 'float32', 'bfloat16'"):
        Settings(precision="float16")


def test_half_precision_reaches_every_parameter_and_keeps_float32() -> None:
    encoder = random_encoder(TINY)
    tiles = torch.from_numpy(random_tiles(6))
    gradients = []
    for half in (False, True):
        network = TileNetwork(encoder.vit, encoder.config, half=half)
        exact_backward(
            lambda a, b, of=network: of(tiles[a:b]), 6, lambda f: f.sin().square().sum(), chunk=2
        )  # fmt: skip
        assert network(tiles).dtype == torch.float32
        assert all(p.grad.dtype == torch.float32 for p in network.vit.parameters())
        gradients.append(torch.cat([p.grad.flatten() for p in network.vit.parameters()]))
    difference = (gradients[1] - gradients[0]).norm() / gradients[0].norm()
    assert 1e-4 < difference < 0.1
