"""The ViT against other implementations of the same arithmetic."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from support.models import (
    TINY,
    TINY_REGISTERS,
    TINY_SWIGLU,
    random_state,
    random_vit,
    to_huggingface,
)
from torch import Tensor, nn

from xmag.errors import InputError
from xmag.vit import CONFIGS, Pooling, ViT, ViTConfig, empty_vit, interpolate_positions

TOLERANCE = 1e-4


def _images(size_px: int = 112, count: int = 2) -> Tensor:
    return torch.randn(count, 3, size_px, size_px, generator=torch.Generator().manual_seed(5))


def _huggingface(config: ViTConfig, state: dict[str, Tensor]) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    options = {
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "mlp_ratio": 4,
        "use_swiglu_ffn": config.mlp == "swiglu",
        "image_size": config.position_grid * config.patch_px,
        "patch_size": config.patch_px,
    }
    if config.registers:
        kind = transformers.Dinov2WithRegistersModel
        settings = transformers.Dinov2WithRegistersConfig(
            **options, num_register_tokens=config.registers
        )
    else:
        kind, settings = transformers.Dinov2Model, transformers.Dinov2Config(**options)
    model = kind(settings).eval()
    fresh = model.state_dict()
    named = to_huggingface(state, major=5 if any("q_proj" in key for key in fresh) else 4)
    named |= {key: t for key, t in fresh.items() if key.endswith("mask_token")}
    model.load_state_dict(named)
    return model


TINY_SIZE = replace(TINY, position_rule="size")
FAMILY = {
    "plain": TINY_SIZE,
    "registers": TINY_REGISTERS,
    "swiglu": replace(TINY_SWIGLU, position_rule="size"),
    "swiglu with registers": replace(TINY_SWIGLU, registers=4, position_rule="size_antialias"),
    "large table": replace(TINY_SIZE, position_grid=37),
}


@pytest.mark.parametrize("config", FAMILY.values(), ids=FAMILY)
@torch.inference_mode()
def test_tokens_equal_those_of_transformers(config: ViTConfig) -> None:
    state = random_state(config)
    theirs = _huggingface(config, state)(_images()).last_hidden_state
    ours = random_vit(config)(_images())
    assert (ours - theirs).abs().max() < TOLERANCE
    assert theirs.std() > 0.5  # and the comparison is about something


@torch.inference_mode()
def test_a_whole_vit_b_equals_that_of_transformers() -> None:
    config = replace(CONFIGS["dinov2_vitb14"], position_rule="size")
    theirs = _huggingface(config, random_state(config))(_images(224, 1)).last_hidden_state
    ours = random_vit(config)(_images(224, 1))
    assert ours.shape == (1, 257, 768)
    assert (ours - theirs).abs().max() < TOLERANCE


POOLED = {
    "plain": TINY_SIZE,
    "registers": TINY_REGISTERS,
    "swiglu": FAMILY["swiglu"],
}


@pytest.mark.parametrize("pooling", ["token", "token+mean", "mean"])
@pytest.mark.parametrize("config", POOLED.values(), ids=POOLED)
@torch.inference_mode()
def test_embeddings_are_the_tokens_of_transformers_pooled(
    config: ViTConfig, pooling: Pooling
) -> None:
    tokens = _huggingface(config, random_state(config))(_images()).last_hidden_state
    token = tokens[:, 0]
    mean = sum(tokens[:, i] for i in range(1 + config.registers, tokens.shape[1])) / 64
    expected = {"token": token, "mean": mean, "token+mean": torch.cat((token, mean), 1)}[pooling]
    pooled = replace(config, pooling=pooling)
    found = random_vit(pooled).embed(_images())
    assert found.shape == (2, pooled.embed_dim) == expected.shape
    assert (found - expected).abs().max() < TOLERANCE


def _swap_q_and_v(state: dict[str, Tensor]) -> None:
    for key, tensor in state.items():
        if ".qkv." in key:
            q, k, v = tensor.chunk(3)
            state[key] = torch.cat((v, k, q))


def _nothing(_: object) -> None:
    """Leaves it as it is."""


def _tanh_gelu(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = F.gelu
    monkeypatch.setattr(F, "gelu", lambda x: exact(x, approximate="tanh"))


MUTATIONS: dict[str, tuple[Callable, Callable, dict]] = {
    "q and v swapped": (_swap_q_and_v, _nothing, {}),
    "tanh GELU": (_nothing, _tanh_gelu, {}),
    "eps 1e-5": (_nothing, _nothing, {"eps": 1e-5}),
    "offset 0": (_nothing, _nothing, {"position_rule": "size"}),
}


@pytest.mark.parametrize("mutation", MUTATIONS.values(), ids=MUTATIONS)
@torch.inference_mode()
def test_a_mutated_model_fails_the_parity_test(
    mutation: tuple[Callable, Callable, dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parity tests above can see every mistake that has to be feared."""
    change_state, change_code, change_config = mutation
    config = replace(CONFIGS["dinov2_vitb14"], depth=2)
    faithful = random_vit(config)(_images(224, 1))
    state = random_state(config)
    change_state(state)
    change_code(monkeypatch)
    mutant = ViT(replace(config, **change_config)).eval()
    mutant.load_state_dict(state)
    assert (mutant(_images(224, 1)) - faithful).abs().max() > 2 * TOLERANCE


def _cubic(distance: float) -> float:
    """Keys' cubic convolution kernel with a = -0.75, torch's choice."""
    a, x = -0.75, abs(distance)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def _resampling_matrix(source: int, target: int, scale: float) -> Tensor:
    """Row i holds the weights of the source samples for target sample i; borders repeat."""
    matrix = torch.zeros(target, source, dtype=torch.float64)
    for i in range(target):
        centre = (i + 0.5) / scale - 0.5
        first = math.floor(centre) - 1
        for j in range(first, first + 4):
            matrix[i, min(max(j, 0), source - 1)] += _cubic(centre - j)
    return matrix


@pytest.mark.parametrize(("rule", "offset"), [("offset", 0.1), ("size", 0.0)])
def test_positions_follow_the_written_out_bicubic_rule(rule: str, offset: float) -> None:
    table = 0.3 * torch.randn(1, 37 * 37, 4, generator=torch.Generator().manual_seed(1))
    rows, columns = (_resampling_matrix(37, n, (n + offset) / 37) for n in (16, 18))
    square = table[0].double().view(37, 37, 4)
    expected = torch.einsum("ir,jc,rcd->ijd", rows, columns, square).reshape(1, -1, 4)
    ours = interpolate_positions(table, (16, 18), rule)
    assert (ours - expected).abs().max() < 1e-5


def test_positions_are_those_of_the_dinov2_hub_code() -> None:
    """facebookresearch/dinov2, DinoVisionTransformer.interpolate_pos_encoding, written out."""
    vit = random_vit(replace(TINY, position_grid=37))
    pos_embed = vit.pos_embed.float()
    side, w0, h0, dim = 37, 16, 16, TINY.width
    sx, sy = float(w0 + 0.1) / side, float(h0 + 0.1) / side
    patches = F.interpolate(
        pos_embed[:, 1:].reshape(1, side, side, dim).permute(0, 3, 1, 2),
        mode="bicubic",
        antialias=False,
        scale_factor=(sx, sy),
    )
    theirs = torch.cat((pos_embed[:, :1], patches.permute(0, 2, 3, 1).view(1, -1, dim)), dim=1)
    assert torch.equal(vit.positions((16, 16)), theirs)


@pytest.mark.parametrize("rule", ["offset", "size", "size_antialias"])
def test_a_table_of_the_right_size_is_left_alone(rule: str) -> None:
    table = torch.randn(1, 25, 3)
    assert interpolate_positions(table, (5, 5), rule) is table


def test_positions_not_square_land_on_their_patches() -> None:
    """Rows are height: a tall image sees the table stretched downwards."""
    ramp = torch.arange(5.0).repeat_interleave(5).view(1, 25, 1)  # the value is the row
    tall = interpolate_positions(ramp, (10, 5), "size").view(10, 5)
    assert torch.allclose(tall, tall[:, :1].expand(10, 5), atol=1e-6)
    assert (tall[1:, 0] > tall[:-1, 0]).all()


@pytest.mark.parametrize("config", [TINY, TINY_SWIGLU, TINY_REGISTERS], ids=lambda c: c.mlp)
@torch.inference_mode()
def test_keeping_only_the_class_token_gives_the_same_class_token(config: ViTConfig) -> None:
    vit = random_vit(config)
    whole, kept = vit(_images()), vit(_images(), keep=1)
    assert kept.shape == (2, 1, 32)
    assert (kept[:, 0] - whole[:, 0]).abs().max() < 1e-5


@torch.inference_mode()
def test_half_precision_sums_the_class_token_in_float32() -> None:
    """Many small steps: rounded to bfloat16 after each, their sum would be off six times as far."""
    half = random_vit(replace(TINY, depth=24)).bfloat16()
    for block in half.blocks:
        block.ls1.gamma.mul_(0.1)
        block.ls2.gamma.mul_(0.1)
    exact = copy.deepcopy(half).float()  # the same weights, rounded as they are
    images = _images(count=8).bfloat16()
    found = half(images, keep=1)
    assert found.dtype == torch.float32
    expected = exact(images.float(), keep=1)
    assert (found - expected).norm(dim=-1).median() < 0.004 * expected.norm(dim=-1).median()


@torch.inference_mode()
def test_positions_worked_out_before_give_the_same_tokens() -> None:
    vit = random_vit(TINY)
    assert torch.equal(vit(_images(), vit.positions((8, 8))), vit(_images()))


@torch.inference_mode()
def test_images_need_not_be_square() -> None:
    images = _images()[:, :, :56]
    assert random_vit(TINY)(images).shape == (2, 1 + 4 * 8, 32)


def test_gradients_reach_every_parameter() -> None:
    vit = random_vit(TINY_REGISTERS).train().requires_grad_(True)
    vit(_images()).square().mean().backward()
    assert [key for key, p in vit.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # some versions of dynamo's own
@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning")
def test_the_graph_is_whole_for_torch_compile() -> None:
    vit = random_vit(TINY)
    report = torch._dynamo.explain(vit)(_images(), vit.positions((8, 8)), keep=1)
    assert report.graph_break_count == 0


@pytest.mark.parametrize(
    ("name", "millions"),
    [  # as timm's table of models and the UNI2-h card state them
        ("dinov2_vits14", 22.06),
        ("dinov2_vitb14", 86.58),
        ("dinov2_vitl14", 304.37),
        ("dinov2_vitg14", 1136.48),
        ("dinov2_vitb14_reg", 86.58),
        ("uni2_h", 681),
    ],
)
def test_named_configurations_have_the_published_number_of_parameters(
    name: str, millions: float
) -> None:
    count = sum(p.numel() for p in empty_vit(CONFIGS[name]).parameters())
    assert count / 1e6 == pytest.approx(millions, rel=1e-3)


def test_an_empty_vit_draws_no_random_numbers() -> None:
    before = torch.get_rng_state()
    empty_vit(CONFIGS["dinov2_vits14"])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"heads": 5}, "no multiple"),
        ({"depth": 0}, "positive int"),
        ({"mlp": "relu"}, "gelu"),
        ({"position_rule": "nearest"}, "offset"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(change: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        replace(TINY, **change)


def test_a_config_survives_json_and_refuses_unknown_fields() -> None:
    assert ViTConfig.from_dict(TINY_REGISTERS.to_dict()) == TINY_REGISTERS
    with pytest.raises(InputError, match="dropout"):
        ViTConfig.from_dict({**TINY.to_dict(), "dropout": 0.1})
    with pytest.raises(InputError, match="width"):
        ViTConfig.from_dict({"depth": 1, "heads": 1, "hidden": 1})


def test_images_that_do_not_divide_into_patches_are_refused() -> None:
    with pytest.raises(InputError, match="multiples of 14"):
        random_vit(TINY)(torch.zeros(1, 3, 100, 112))
