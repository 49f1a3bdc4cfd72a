"""Teachers against the models that they wrap, and what no student is to learn from."""

import importlib.util
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.models import TINY, random_encoder, random_tiles, random_vit
from torch import Tensor, nn

import xmag.hub
from xmag.distill.teachers import (
    TILE_SPEC,
    OnlineFeatures,
    Teacher,
    load_teacher,
    module_sha256,
)
from xmag.encoder import Encoder, load_model
from xmag.errors import InputError, MissingExtraError, ModelError
from xmag.geometry import TileSpec
from xmag.hub.fetch import LocalModel
from xmag.hub.registry import KNOWN, ModelConfig
from xmag.hub.weights import file_sha256
from xmag.vit import CONFIGS, ViTConfig

HAS_TIMM = importlib.util.find_spec("timm") is not None
TILES = torch.from_numpy(random_tiles(3))


def encoder_at(mpp: float, config: ViTConfig = TINY, name: str = "random", **options) -> Encoder:
    return Encoder(
        random_vit(config),
        ModelConfig(vit=config, tile_spec=TileSpec(mpp=mpp)),
        provenance={"name": name, "revision": "abc", "weights_sha256": "123", "trained": True},
        **options,
    )


def mean_colours(tiles: Tensor) -> Tensor:
    return tiles.float().mean((1, 2))


def test_an_encoder_teaches_what_it_embeds() -> None:
    encoder = encoder_at(0.5)
    teacher = load_teacher(encoder)
    assert isinstance(teacher, Teacher)
    assert torch.equal(teacher.features(TILES), encoder.embed(TILES))
    assert (teacher.name, teacher.dim, teacher.tile_spec) == ("random", 32, TILE_SPEC)
    assert dict(teacher.identity) == {
        "name": "random",
        "kind": "encoder",
        "revision": "abc",
        "weights_sha256": "123",
        "config": encoder.config.to_dict(),
        "dtype_class": "fp32",
    }
    half = load_teacher(encoder_at(0.5, dtype="bfloat16"))
    assert half.identity["dtype_class"] == "half"
    assert half.features(TILES).dtype == torch.float32


def test_a_model_on_disk_teaches_and_its_folder_is_nobodys_business(tmp_path: Path) -> None:
    encoder = encoder_at(0.5)
    (tmp_path / "teacher").mkdir()
    encoder.save(tmp_path / "teacher")
    teacher = load_teacher(tmp_path / "teacher", device="cpu")
    assert torch.equal(teacher.features(TILES), encoder.embed(TILES))
    assert teacher.name == "teacher"
    assert str(tmp_path) not in str(dict(teacher.identity))
    assert (
        teacher.identity["weights_sha256"]
        == load_model(tmp_path / "teacher", device="cpu").provenance["weights_sha256"]
    )


def test_uni2_h_is_known_to_see_what_a_teacher_sees() -> None:
    known = KNOWN["MahmoodLab/UNI2-h"].config
    thin = replace(known.vit, width=48, depth=1, heads=2, hidden=96)
    teacher = load_teacher(
        Encoder(random_vit(thin), replace(known, vit=thin), provenance={"name": "thin UNI2-h"})
    )
    assert teacher.features(TILES).shape == (3, 48)
    assert CONFIGS["uni2_h"].width == 1536


@pytest.mark.parametrize("mpp", [2.0, 0.25, 0.51])
def test_models_for_another_scale_are_refused_with_the_remedy(mpp: float) -> None:
    with pytest.raises(InputError, match=rf"224 px at {mpp:g} µm/px; .*0\.5 µm/px.*config=Model"):
        load_teacher(encoder_at(mpp))
    with pytest.raises(InputError, match="xmag-mini wants tiles of 224 px at 2 µm/px"):
        load_teacher("xmag-mini", device="cpu")


def test_a_checkpoint_for_no_known_scale_teaches_once_its_scale_is_given(tmp_path: Path) -> None:
    (tmp_path / "teacher").mkdir()
    random_encoder(TINY).save(tmp_path / "teacher")
    with pytest.raises(InputError, match="teacher wants tiles of 224 px at 2 µm/px"):
        load_teacher(tmp_path / "teacher", device="cpu")
    config = ModelConfig(vit=TINY, tile_spec=TileSpec(mpp=0.5))
    teacher = load_teacher(tmp_path / "teacher", device="cpu", config=config)
    assert torch.equal(teacher.features(TILES), random_encoder(TINY).embed(TILES))


def test_a_function_teaches_what_it_returns() -> None:
    teacher = load_teacher(mean_colours, name="colours", dim=3, identity={"version": 2})
    tiles = TILES.repeat(100, 1, 1, 1)  # more than go through at once
    assert torch.equal(teacher.features(tiles), mean_colours(tiles))
    assert dict(teacher.identity) == {"name": "colours", "kind": "function", "version": 2}
    assert teacher.features(TILES[:0]).shape == (0, 3)
    of_numpy = load_teacher(lambda t: t.numpy().mean((1, 2)), name="np", dim=3)
    torch.testing.assert_close(of_numpy.features(TILES), mean_colours(TILES))
    assert load_teacher(teacher) is teacher


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        nn.init.ones_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)

    def forward(self, tiles: Tensor) -> Tensor:
        return self.layer(mean_colours(tiles))


def test_a_module_is_told_from_others_by_its_weights_and_gets_no_gradient() -> None:
    module = Linear()
    teacher = load_teacher(module, name="linear", dim=2)
    assert teacher.identity["weights_sha256"] == module_sha256(Linear())
    assert not teacher.features(TILES).requires_grad
    module.layer.weight.data[0, 0] += 1
    assert module_sha256(module) != teacher.identity["weights_sha256"]
    half = Linear().to(torch.bfloat16)
    assert module_sha256(half) != module_sha256(Linear())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_features_that_are_not_finite_are_an_error(value: float) -> None:
    def function(tiles: Tensor) -> Tensor:
        features = mean_colours(tiles)
        features[1, 2] = value
        return features

    with pytest.raises(ModelError, match=r"bad gave features that are not finite .*tile 1 of 3"):
        load_teacher(function, name="bad", dim=3).features(TILES)


def test_features_of_another_shape_or_type_are_an_error() -> None:
    with pytest.raises(ModelError, match=r"returned torch.float32 \(3, 3\) for 3 .*\(3, 4\)"):
        load_teacher(mean_colours, name="bad", dim=4).features(TILES)
    with pytest.raises(ModelError, match=r"returned torch.int64 \(3, 3\)"):
        load_teacher(lambda t: mean_colours(t).long(), name="bad", dim=3).features(TILES)


def test_other_tiles_are_refused() -> None:
    teacher = load_teacher(mean_colours, name="colours", dim=3)
    for tiles in (TILES.float(), TILES[0], TILES[:, :100], TILES.permute(0, 3, 1, 2)):
        with pytest.raises(InputError, match=r"colours expects uint8 \(M, 224, 224, 3\)"):
            teacher.features(tiles)


def test_what_is_missing_is_named() -> None:
    with pytest.raises(InputError, match=r"needs name= \(now None\) and dim= \(now 3\)"):
        load_teacher(mean_colours, dim=3)
    with pytest.raises(InputError, match="teacher is a int"):
        load_teacher(3)
    teacher = load_teacher(mean_colours, name="colours", dim=3)
    assert OnlineFeatures(teacher).weight == 1.0
    for weight in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(InputError, match="the weight of colours"):
            OnlineFeatures(teacher, weight)


@pytest.mark.skipif(HAS_TIMM, reason="timm is installed")
def test_without_timm_its_teachers_name_the_installation() -> None:
    with pytest.raises(MissingExtraError, match=r"timm:resnet18.*pip install timm"):
        load_teacher("timm:resnet18")


@pytest.mark.skipif(not HAS_TIMM, reason="needs timm")
@pytest.mark.parametrize(("name", "dim"), [("resnet10t", 512), ("vit_tiny_patch16_384", 192)])
def test_models_of_timm_teach_at_224_px(
    name: str, dim: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import timm

    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = timm.create_model(name, pretrained=False, num_classes=0).eval()
    timm.models.save_for_hf(made, tmp_path, safe_serialization=True)
    weights = tmp_path / "model.safetensors"
    located = LocalModel(name=name, weights=weights, config_json=tmp_path / "config.json")
    monkeypatch.setattr(xmag.hub, "locate_model", lambda name, **_: located)
    teacher = load_teacher(f"timm:{name}", device="cpu")
    config = timm.data.resolve_model_data_config(made)
    if hasattr(made, "set_input_size"):
        made.set_input_size((224, 224))
    mean, std = (np.array(config[key], np.float32) for key in ("mean", "std"))
    images = torch.from_numpy((TILES.numpy() / np.float32(255) - mean) / std).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = made(images)
    assert (teacher.name, teacher.dim) == (f"timm:{name}", dim)
    torch.testing.assert_close(teacher.features(TILES), expected, atol=1e-5, rtol=1e-4)
    assert teacher.identity["weights_sha256"] == file_sha256(weights)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_uni2_h_on_a_gpu_takes_tiles_from_either_side() -> None:
    config = KNOWN["MahmoodLab/UNI2-h"].config
    encoder = Encoder(random_vit(config.vit), config, provenance={"name": "U"}, device="cuda")
    teacher = load_teacher(encoder)
    on_gpu = teacher.features(TILES.cuda())
    assert (on_gpu.shape, on_gpu.device.type) == ((3, 1536), "cuda")
    assert torch.equal(teacher.features(TILES), on_gpu.cpu())


def made_here(*, device: object, dtype: object) -> Teacher:
    return load_teacher(
        mean_colours, name="made here", dim=3, identity={"asked": f"{device} {dtype}"}
    )


def test_a_function_by_name_makes_the_teacher() -> None:
    found = load_teacher(f"python:{__name__}:made_here", device="cpu", dtype="float32")
    assert (found.name, found.identity["asked"]) == ("made here", "cpu float32")
    assert torch.equal(found.features(TILES), mean_colours(TILES))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("python:no_such_module:f", "cannot be imported: No module named"),
        ("python:", "cannot be imported"),
        ("python:math:no_such_function", "has no function 'no_such_function'"),
        ("python:math", "expected python:MODULE:FUNCTION"),
    ],
)
def test_a_function_that_is_not_there_is_named(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_teacher(name)
