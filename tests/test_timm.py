"""Models of timm: plain ViTs, which xmag runs itself, and others, which timm runs."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import random_state, random_tiles
from support.timm_models import BY_TIMM, PLAIN, SMALL, WHOLE, Case, timm_model
from torch import Tensor, nn

import xmag.hub.configs
from xmag.distill.teachers import load_teacher
from xmag.encoder import Encoder, load_model
from xmag.encoder.timm import TimmEncoder
from xmag.errors import InputError, MissingExtraError, ModelError, WeightsError
from xmag.geometry import TileSpec
from xmag.hub.configs import TimmConfig, resolve_config
from xmag.hub.fetch import LocalModel
from xmag.hub.registry import ModelConfig
from xmag.vit import CONFIGS, ViTConfig

DATA = Path(__file__).parent / "data" / "timm"
MADE = sorted(path.name for path in DATA.iterdir()) if DATA.exists() else []
TOLERANCE = 1e-4

try:
    import timm
except (ImportError, RuntimeError) as error:  # RuntimeError: of a torchvision that does not fit
    timm, REASON = None, f"timm cannot be imported: {error}"
else:
    REASON = ""
needs_timm = pytest.mark.skipif(timm is None, reason=REASON)


def _loaded(folder: Path, size_px: int, **options: Any) -> Encoder:
    spec = TileSpec(mpp=0.5, size_px=size_px)
    return load_model(folder, tile_spec=spec, device="cpu", **options)


def _size_px(folder: Path) -> int:
    return int(json.loads((folder / "config.json").read_text())["model_args"]["img_size"])


def _with_pooling(encoder: Encoder, pooling: str) -> ModelConfig:
    return replace(encoder.config, vit=replace(encoder.config.vit, pooling=pooling))


@pytest.mark.skipif(not MADE, reason="tests/data/make_timm_models.py was not run")
@pytest.mark.parametrize("name", MADE)
def test_what_timm_saved_gives_the_embeddings_that_timm_computed(name: str) -> None:
    expected, size_px = load_file(DATA / name / "expected.safetensors"), _size_px(DATA / name)
    tiles = random_tiles(3, size_px)
    encoder = _loaded(DATA / name, size_px)
    assert expected["embedding"].std() > 0.5
    assert (encoder.embed(tiles) - expected["embedding"]).abs().max() < TOLERANCE
    both = _loaded(DATA / name, size_px, config=_with_pooling(encoder, "token+mean"))
    assert both.embed_dim == 2 * encoder.config.vit.width
    assert (both.embed(tiles) - expected["token+mean"]).abs().max() < TOLERANCE
    assert encoder.provenance["config_source"] == "given"
    assert encoder.provenance["config"] == encoder.config.to_dict()


def _saved(model: nn.Module, folder: Path, args: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    timm.models.save_for_hf(model, folder, safe_serialization=True, model_args=args)
    return folder


def _images(tiles: Any, about: dict[str, Any], device: str = "cpu") -> Tensor:
    mean, std = torch.tensor(about["mean"]), torch.tensor(about["std"])
    return ((torch.from_numpy(tiles) / 255 - mean) / std).permute(0, 3, 1, 2).to(device)


@needs_timm
@pytest.mark.parametrize("case", [*PLAIN.values(), *WHOLE.values()], ids=[*PLAIN, *WHOLE])
@torch.inference_mode()
def test_a_plain_vit_equals_that_of_timm(case: Case, tmp_path: Path) -> None:
    architecture, args = case
    model = timm_model(architecture, args)
    size_px = args.get("img_size", model.pretrained_cfg["input_size"][-1])
    encoder = _loaded(_saved(model, tmp_path, args), size_px)
    assert type(encoder) is Encoder
    tiles = random_tiles(2, size_px)
    tokens = model.forward_features(_images(tiles, model.pretrained_cfg))
    expected = model.forward_head(tokens, pre_logits=True)
    assert expected.std() > 0.3
    assert (encoder.embed(tiles) - expected).abs().max() < TOLERANCE
    patches = encoder.embed_tokens(tiles)[1]
    assert (patches - tokens[:, model.num_prefix_tokens :]).abs().max() < TOLERANCE


@needs_timm
@pytest.mark.parametrize("case", [PLAIN["registers"], PLAIN["registers with positions"]])
@torch.inference_mode()
def test_tiles_of_another_size_get_the_positions_that_timm_gives_them(
    case: Case, tmp_path: Path
) -> None:
    architecture, args = case
    model = timm_model(architecture, args)
    folder, size_px = _saved(model, tmp_path, args), 112
    model.set_input_size((size_px, size_px))
    tiles = random_tiles(2, size_px)
    expected = model(_images(tiles, model.pretrained_cfg))
    assert (_loaded(folder, size_px).embed(tiles) - expected).abs().max() < TOLERANCE


@needs_timm
@pytest.mark.parametrize("case", BY_TIMM.values(), ids=BY_TIMM)
@torch.inference_mode()
def test_another_architecture_is_run_by_timm(case: Case, tmp_path: Path) -> None:
    architecture, args = case
    model = timm_model(architecture, args)
    size_px = args.get("img_size", 224)
    encoder = _loaded(_saved(model, tmp_path, args), size_px)
    assert type(encoder) is TimmEncoder
    tiles = random_tiles(2, size_px)
    expected = model(_images(tiles, model.pretrained_cfg))
    assert encoder.embed_dim == expected.shape[1]
    assert (encoder.embed(tiles) - expected).abs().max() < TOLERANCE


@needs_timm
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.inference_mode()
def test_a_vit_s_16_on_a_gpu_equals_that_of_timm(tmp_path: Path) -> None:
    model = timm_model(*WHOLE["ViT-S/16"])
    folder, tiles = _saved(model, tmp_path, {}), random_tiles(5)
    expected = model(_images(tiles, model.pretrained_cfg))
    spec = TileSpec(mpp=0.5)
    exact = load_model(folder, tile_spec=spec, device="cuda", dtype="float32").embed(tiles).cpu()
    assert (exact - expected).abs().max() < TOLERANCE
    half = load_model(folder, tile_spec=spec, device="cuda", dtype="bfloat16")
    cosine = torch.nn.functional.cosine_similarity(half.embed(tiles).cpu(), expected)
    assert cosine.min() > 0.99
    streamed = [x for _, x in half.embed_stream([(torch.zeros(5, 2).long().numpy(), tiles)])]
    assert (torch.from_numpy(streamed[0]) - half.embed(tiles).cpu()).abs().max() < 1e-3


@needs_timm
def test_names_of_timm_lead_to_their_repository_and_config(tmp_path: Path) -> None:
    values = xmag.hub.configs.timm_values("timm:vit_small_patch16_224")
    assert values["hf_hub_id"] == "timm/vit_small_patch16_224.augreg_in21k_ft_in1k"
    found = resolve_config("w", values, None, TileSpec(mpp=0.5)).config
    assert isinstance(found, ModelConfig)
    assert found.mean == (0.5, 0.5, 0.5)
    with pytest.raises(ModelError, match="timm"):
        xmag.hub.configs.timm_values("timm:vit_small_patch16_224.no_such_tag")
    with pytest.raises(ModelError, match="timm knows no 'no_such_model'"):
        xmag.hub.configs.timm_values("timm:no_such_model")


# Without timm.

S16 = ViTConfig(
    width=384, depth=12, heads=6, hidden=1536, patch_px=16, position_grid=14,
    position_rule="size_antialias", layer_scale=False,
)  # fmt: skip
ARCHITECTURES: dict[str, tuple[dict[str, Any], ViTConfig]] = {
    "vit_small_patch16_224": ({}, S16),
    "vit_base_patch16_384": (
        {"model_args": {"img_size": 384, "num_classes": 0, "dynamic_img_size": True}},
        replace(S16, width=768, heads=12, hidden=3072, position_grid=24),
    ),
    "vit_large_patch16_224": (
        {"model_args": {"init_values": 1e-5}},  # as that of UNI
        replace(S16, width=1024, depth=24, heads=16, hidden=4096, layer_scale=True),
    ),
    "vit_base_patch14_reg4_dinov2": (
        {"pretrained_cfg": {"input_size": [3, 518, 518]}},
        replace(CONFIGS["dinov2_vitb14_reg"], class_position=False),
    ),
    "vit_giant_patch14_dinov2": (
        {"model_args": {"img_size": 224, "patch_size": 16, "embed_dim": 1536, "depth": 40,
                        "num_heads": 24, "mlp_ratio": 5.33334}},  # as that of Prov-GigaPath
        replace(CONFIGS["dinov2_vitg14"], patch_px=16, position_grid=14,
                position_rule="size_antialias"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_config_of_a_plain_vit_is_read_without_timm(architecture: str) -> None:
    values, vit = ARCHITECTURES[architecture]
    values = {"architecture": architecture, "global_pool": "token", **values}
    found = resolve_config("folder", values, None, TileSpec(mpp=0.5, size_px=112 * 16))
    assert found.config.vit == vit  # type: ignore[union-attr]


def test_both_sides_of_an_image_are_one_where_they_are_alike() -> None:
    values = {"architecture": "vit_base_patch16_384", "model_args": {"img_size": [384, 384]}}
    found = resolve_config("folder", values, None, TileSpec(mpp=0.5, size_px=384)).config
    assert found.vit.position_grid == 24  # type: ignore[union-attr]
    values["model_args"] = {"img_size": [384, 320]}
    with pytest.raises(WeightsError, match=r"size_px is \[384, 320\]"):
        resolve_config("folder", values, None, TileSpec(mpp=0.5, size_px=384))


def test_a_config_of_timm_as_it_once_was_gives_its_normalisation() -> None:
    old = {"architecture": "vit_small_patch16_224", "input_size": [3, 224, 224], "mean": [0.5] * 3,
           "std": [0.25] * 3}  # fmt: skip
    found = resolve_config("folder", old, None, TileSpec(mpp=1.0)).config
    assert (found.mean, found.std, found.tile_spec.mpp) == ((0.5,) * 3, (0.25,) * 3, 1.0)


@pytest.mark.parametrize(
    ("architecture", "args"),
    [
        ("resnet18", {}),
        ("vit_small_patch16_rope_224", {}),
        ("vit_base_patch16_clip_224", {}),
        ("vit_small_patch16_224", {"pre_norm": True}),
        ("vit_small_patch16_224", {"class_token": False}),
        ("vit_small_patch16_224", {"qkv_bias": False}),
        ("vit_small_patch16_224", {"global_pool": "avg"}),
        ("vit_small_patch16_224", {"global_pool": "map"}),
        ("vit_small_patch16_224", {"something_new": 3}),
    ],
)
def test_what_is_no_plain_vit_is_left_to_timm(architecture: str, args: dict[str, Any]) -> None:
    values = {"architecture": architecture, "model_args": args}
    found = resolve_config("folder", values, None, TileSpec(mpp=0.5)).config
    assert isinstance(found, TimmConfig)
    assert json.loads(found.model_args) == args


TINY16 = replace(S16, width=16, depth=2, heads=2, hidden=64, position_grid=4)
ARGS = {**SMALL, "num_classes": 0}


def _folder(tmp_path: Path, state: dict[str, Tensor], **config: Any) -> Path:
    save_file(state, tmp_path / "model.safetensors")
    values = {"architecture": "vit_small_patch16_224", "model_args": ARGS, **config}
    (tmp_path / "config.json").write_text(json.dumps(values))
    return tmp_path


def test_a_classifier_of_timm_is_left_out_and_its_vit_loads(tmp_path: Path) -> None:
    state = random_state(TINY16)
    head = {"head.weight": torch.zeros(5, 16), "head.bias": torch.zeros(5)}
    encoder = _loaded(_folder(tmp_path, {**state, **head}), 64)
    assert encoder.config.vit == TINY16
    assert torch.equal(encoder.vit.norm.weight, state["norm.weight"])


def test_without_a_scale_a_model_of_timm_is_refused(tmp_path: Path) -> None:
    folder = _folder(tmp_path, random_state(TINY16))
    with pytest.raises(InputError, match=r"at which µm/px.*64 px.*tile_spec=TileSpec\(mpp=0\.5"):
        load_model(folder, device="cpu")


@pytest.mark.parametrize("size_px", [60, 63])
def test_tiles_that_are_no_multiple_of_the_patch_are_refused(size_px: int, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"{size_px} px do not divide into patches of 16 px"):
        _loaded(_folder(tmp_path, random_state(TINY16)), size_px)


SPOILED: dict[str, tuple[dict[str, Any], str]] = {
    "missing": ({"blocks.1.norm1.bias": None}, r"missing: blocks\.1\.norm1\.bias"),
    "extra": ({"blocks.0.ls1.gamma": torch.ones(16)}, r"unexpected: blocks\.0\.ls1\.gamma"),
    "misshapen": ({"norm.weight": torch.ones(8)}, r"misshapen: norm\.weight \(8,\) for \(16,\)"),
    "another patch": ({"patch_embed.proj.weight": torch.ones(16, 3, 14, 14)}, "misshapen"),
    "NaN": ({"norm.bias": torch.full((16,), float("nan"))}, r"not finite.*norm\.bias"),
}


@pytest.mark.parametrize(("change", "said"), SPOILED.values(), ids=SPOILED)
def test_weights_that_do_not_fit_their_config_are_refused(
    change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    state = {**random_state(TINY16), **change}
    folder = _folder(tmp_path, {key: t for key, t in state.items() if t is not None})
    with pytest.raises(WeightsError, match=said):
        _loaded(folder, 64)


class _Means(nn.Module):
    """Stands for a module of timm: a linear map of the mean colour."""

    pretrained_cfg = {"classifier": "fc", "input_size": (3, 64, 64)}  # noqa: RUF012

    def __init__(self, pooled: bool = True) -> None:
        super().__init__()
        self.proj, self.pooled = nn.Linear(3, 5), pooled

    def forward(self, images: Tensor) -> Tensor:
        assert images.shape[-1] == 64, f"{images.shape[-1]} doesn't match model (64)"
        return self.proj(images.mean((2, 3)) if self.pooled else images.mean(3).mT)


MEANS = {"proj.weight": torch.arange(15.0).reshape(5, 3) / 7, "proj.bias": torch.ones(5)}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """What a stand-in for timm was asked to create: only its interface is tested here."""
    calls: list[tuple[str, dict[str, Any]]] = []

    def create_model(name: str, **options: Any) -> nn.Module:
        calls.append((name, options))
        return _Means(pooled=options.get("global_pool") != "")

    stand_in = SimpleNamespace(create_model=create_model, __version__="0")
    monkeypatch.setitem(sys.modules, "timm", stand_in)  # type: ignore[arg-type]
    return calls


def test_the_adapter_normalises_and_takes_what_timm_returns(
    tmp_path: Path, asked: list[tuple[str, dict[str, Any]]]
) -> None:
    about = {"mean": [0.5, 0.4, 0.3], "std": [0.1, 0.2, 0.3], "input_size": [3, 64, 64]}
    config = {"architecture": "means", "model_args": {"kernel": 3}, "pretrained_cfg": about}
    state = {**MEANS, "fc.weight": torch.zeros(2, 5)}
    before = torch.get_rng_state()
    encoder = _loaded(_folder(tmp_path, state, **config), 64)
    assert torch.equal(torch.get_rng_state(), before)
    assert asked == [("means", {"pretrained": False, "kernel": 3, "num_classes": 0})]
    tiles = random_tiles(3, 64)
    colours = torch.from_numpy(tiles).double().mean((1, 2)) / 255
    expected = (colours - torch.tensor(about["mean"])) / torch.tensor(about["std"])
    expected = expected.float() @ MEANS["proj.weight"].T + 1
    assert (encoder.embed(tiles) - expected).abs().max() < 1e-5
    assert encoder.embed(tiles[:0]).shape == (0, encoder.embed_dim) == (0, 5)
    assert encoder.tile_spec == TileSpec(mpp=0.5, size_px=64)
    assert encoder.provenance["key_layout"] == "timm"
    assert json.loads(json.dumps(dict(encoder.provenance))) == encoder.provenance
    assert "means" in encoder.pooling
    for refused in (lambda: encoder.config, lambda: encoder.vit, lambda: encoder.save(tmp_path)):
        with pytest.raises(InputError, match=r"is run by timm \(means\)"):
            refused()
    with pytest.raises(InputError, match="no patch tokens"):
        encoder.embed_tokens(tiles)


@pytest.mark.parametrize(
    ("change", "args", "size_px", "said"),
    [
        ({"proj.bias": None}, {}, 64, r"missing: proj\.bias$"),
        ({"other": torch.ones(1)}, {}, 64, r"unexpected: other$"),
        ({"proj.bias": torch.ones(4)}, {}, 64, r"misshapen: proj\.bias \(4,\) for \(\d+,\)$"),
        ({"proj.bias": torch.full((5,), float("inf"))}, {}, 64, "not finite"),
        ({}, {}, 128, r"does not take tiles of 128 px .*doesn't match model \(64\)"),
        ({}, {"global_pool": ""}, 64, r"\(1, 64, 5\) for a tile, not pooled"),
    ],
)
def test_the_adapter_refuses_what_does_not_fit(
    change: dict[str, Any],
    args: dict[str, Any],
    size_px: int,
    said: str,
    tmp_path: Path,
    asked: object,
) -> None:
    state = {key: t for key, t in {**MEANS, **change}.items() if t is not None}
    folder = _folder(tmp_path, state, architecture="means", model_args=args)
    with pytest.raises((InputError, WeightsError), match=said):
        _loaded(folder, size_px)


def _no_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)


def test_without_timm_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _no_timm(monkeypatch)
    with pytest.raises(MissingExtraError, match=r"pip install 'xmag\[timm\]'"):
        _loaded(_folder(tmp_path, MEANS, architecture="means"), 64)
    with pytest.raises(MissingExtraError, match=r"pip install timm.*with the tag"):
        load_model("timm:vit_small_patch16_224", tile_spec=TileSpec(mpp=0.5))


@pytest.mark.parametrize("name", ["timm:vit_small_patch16_224.some_tag", "hf-hub:timm/x", "timm/x"])
def test_a_plain_vit_by_name_needs_no_timm(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _no_timm(monkeypatch)
    folder = _folder(tmp_path, random_state(TINY16))

    def locate(name: str, **options: Any) -> LocalModel:
        return LocalModel(
            name=name, weights=folder / "model.safetensors", config_json=folder / "config.json"
        )

    monkeypatch.setattr(xmag.hub, "locate_model", locate)
    encoder = load_model(name, tile_spec=TileSpec(mpp=0.5, size_px=64), device="cpu")
    assert encoder.embed_dim == 16
    assert encoder.provenance["name"] in ("timm/vit_small_patch16_224.some_tag", name)


def test_a_model_of_timm_teaches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _no_timm(monkeypatch)
    state = random_state(replace(TINY16, position_grid=14))
    folder = _folder(tmp_path, state, model_args={**ARGS, "img_size": 224})
    weights, config = folder / "model.safetensors", folder / "config.json"
    located = LocalModel(name="timm/x", weights=weights, config_json=config)
    monkeypatch.setattr(xmag.hub, "locate_model", lambda name, **_: located)
    teacher = load_teacher("timm:vit_small_patch16_224.some_tag", device="cpu")
    expected = _loaded(folder, 224).embed(random_tiles(2))
    assert (teacher.name, teacher.dim) == ("timm:vit_small_patch16_224.some_tag", 16)
    assert torch.equal(teacher.features(torch.from_numpy(random_tiles(2))), expected)
