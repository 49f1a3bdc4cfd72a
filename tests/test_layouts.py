"""Checkpoints in anyone's layout load to the same parameters, whole or not at all."""

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.models import TINY, TINY_REGISTERS, TINY_SWIGLU, random_state, to_huggingface, to_timm
from torch import Tensor

from xmag.encoder import load_model
from xmag.errors import InputError, WeightsError
from xmag.geometry import TileSpec
from xmag.hub.layouts import to_vit_state
from xmag.hub.weights import file_sha256, read_tensors
from xmag.vit import ViTConfig

State = dict[str, Tensor]


def _as_is(state: State, config: ViTConfig) -> State:
    return state


def _chunked(state: State, config: ViTConfig) -> State:
    """As DINOv2's training code saves a model whose blocks are grouped two by two."""
    parts = {key: key.split(".") for key in state}
    return {
        ".".join(["blocks", str(int(p[1]) // 2), *p[1:]]) if p[0] == "blocks" else key: state[key]
        for key, p in parts.items()
    }


LAYOUTS: dict[str, tuple[str, Callable[[State, ViTConfig], State]]] = {
    "dinov2": ("dinov2", _as_is),
    "dinov2 in chunks": ("dinov2", _chunked),
    "timm": ("timm", to_timm),
    "transformers 4": ("huggingface", lambda state, _: to_huggingface(state, major=4)),
    "transformers 5": ("huggingface", lambda state, _: to_huggingface(state, major=5)),
}
PREFIXES = ("", "model.", "module.", "student.backbone.", "state_dict.model.", "dinov2.")


def _equal(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("config", [TINY_REGISTERS, TINY_SWIGLU], ids=lambda c: c.mlp)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_under_every_prefix_gives_the_same_parameters(
    layout: str, config: ViTConfig, prefix: str
) -> None:
    state = random_state(config)
    expected_layout, convert = LAYOUTS[layout]
    tensors = {prefix + key: t for key, t in convert(state, config).items()}
    found = to_vit_state(tensors, config, where="test")
    assert _equal(found.state, state)
    assert (found.layout, found.prefix) == (expected_layout, prefix)


@pytest.mark.parametrize("registers", [False, True])
def test_what_transformers_saves_loads_and_computes_the_same(
    registers: bool, tmp_path: Path
) -> None:
    """Through its own files: names on disk are not those in memory."""
    transformers = pytest.importorskip("transformers")
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    picture = {"image_size": 70, "patch_size": 14, "layerscale_value": 0.5}
    if registers:
        config = transformers.Dinov2WithRegistersConfig(**size, **picture, use_swiglu_ffn=True)
        model = transformers.Dinov2WithRegistersModel(config)
    else:
        model = transformers.Dinov2Model(transformers.Dinov2Config(**size, **picture))
    model.eval().save_pretrained(tmp_path)
    encoder = load_model(tmp_path, device="cpu")
    images = torch.randn(2, 3, 112, 112)
    with torch.inference_mode():
        theirs = model(images).last_hidden_state
        assert (encoder.vit(images) - theirs).abs().max() < 1e-4
    assert encoder.provenance["key_layout"] == "huggingface"
    assert encoder.provenance["config_source"] == "read"


@pytest.mark.parametrize("saved", ["save_pretrained", "state dict"])
def test_a_vit_of_transformers_loads_and_computes_the_same(saved: str, tmp_path: Path) -> None:
    """Without LayerScale, patches of 16 px, and a pooler that no embedding depends on."""
    transformers = pytest.importorskip("transformers")
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.ViTConfig(**size, intermediate_size=96, image_size=64, patch_size=16)
    model = transformers.ViTModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # at their start blocks and norms do next to nothing
            parameter.mul_(8 if parameter.ndim == 2 else 1).add_(0.2 * torch.randn(parameter.shape))
    model.save_pretrained(tmp_path)
    if saved == "state dict":  # by its names in memory, which need not be those on disk
        (tmp_path / "model.safetensors").unlink()
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="at which µm/px"):
        load_model(tmp_path, device="cpu")
    half = [0.5, 0.25, 0.125]
    beside = {"do_normalize": True, "image_mean": half, "image_std": half}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(beside))
    encoder = load_model(tmp_path, tile_spec=TileSpec(mpp=0.5, size_px=96), device="cpu")
    assert encoder.config.mean == encoder.config.std == tuple(half)
    assert not encoder.config.vit.layer_scale
    assert encoder.config.vit.patch_px == 16
    images = torch.randn(2, 3, 96, 96)
    with torch.inference_mode():
        theirs = model(images, interpolate_pos_encoding=True).last_hidden_state
        assert theirs.std() > 0.5
        assert (encoder.vit(images) - theirs).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_positions_of_registers_are_added_to_them(dtype: torch.dtype) -> None:
    """timm without no_embed_class: its table has rows for class, registers and patches."""
    state = {key: t.to(dtype) for key, t in random_state(TINY_REGISTERS).items()}
    rows = torch.randn(1, 4, 32).to(dtype)
    table = state["pos_embed"]
    timm = to_timm(state, TINY_REGISTERS)
    timm["pos_embed"] = torch.cat((table[:, :1], rows, table[:, 1:]), dim=1)
    found = to_vit_state(timm, TINY_REGISTERS, where="test")
    assert found.layout == "timm"
    assert torch.equal(found.state["pos_embed"], table.float())
    expected = state["register_tokens"].float() + rows.float()
    assert torch.equal(found.state["register_tokens"], expected)


def test_a_timm_table_without_class_position_loads_as_one_of_zero() -> None:
    state = random_state(TINY_REGISTERS)
    timm = to_timm(state, TINY_REGISTERS)
    timm["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
    timm["pos_embed"] = state["pos_embed"][:, 1:]
    found = to_vit_state(timm, TINY_REGISTERS, where="test").state
    assert torch.equal(found["pos_embed"][:, 1:], state["pos_embed"][:, 1:])
    total = found["cls_token"] + found["pos_embed"][:, :1]
    assert torch.equal(total, state["cls_token"] + state["pos_embed"][:, :1])


def _under(prefix: str, seed: int, config: ViTConfig = TINY) -> State:
    return {prefix + key: t for key, t in random_state(config, seed).items()}


WIDE = replace(TINY, width=64)
TRAINING = {
    "ema beside student": {"student": _under("", 1), "ema": _under("", 0)},
    "student_ema beside a wider teacher": {
        "epoch": 3,
        "student": _under("backbone.", 1),
        "student_ema": {"module": _under("backbone.", 0)},
        "teacher": _under("", 2, WIDE),
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]},
    },
    "flat keys": {"state_dict": {**_under("student.", 1), **_under("ema_student.", 0)}},
    "teacher of the same shape (DINOv2)": {
        "student": _under("backbone.", 1),
        "teacher": _under("backbone.", 0),
    },
    "student beside a wider teacher, no average": {
        "student": _under("", 0),
        "teacher": _under("", 2, WIDE),
    },
    "heads beside the model": {
        "state_dict": {**_under("model.", 0), "head_global.0.weight": torch.zeros(3, 3)}
    },
}


@pytest.mark.parametrize("checkpoint", TRAINING.values(), ids=TRAINING)
def test_a_training_checkpoint_gives_the_averaged_student(
    checkpoint: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "last.pth"
    torch.save(checkpoint, path)
    found = to_vit_state(read_tensors(path), TINY, where="test")
    assert _equal(found.state, random_state(TINY, 0))


def test_what_was_left_out_is_named() -> None:
    tensors = {**_under("model.", 0), "head_global.0.weight": torch.zeros(3)}
    assert to_vit_state(tensors, TINY, where="test").left_out == ("head_global.0",)


def test_two_models_that_nothing_tells_apart_are_refused() -> None:
    with pytest.raises(WeightsError, match=r"2 models.*'a\.', 'b\.'"):
        to_vit_state({**_under("a.", 0), **_under("b.", 1)}, TINY, where="test")


def test_half_precision_weights_load_as_float32() -> None:
    state = {key: t.to(torch.bfloat16) for key, t in random_state(TINY).items()}
    found = to_vit_state(state, TINY, where="test").state
    assert {t.dtype for t in found.values()} == {torch.float32}
    assert torch.equal(found["norm.weight"], state["norm.weight"].float())


def _spoil(key: str, change: Callable[[Tensor], Tensor]) -> State:
    state = random_state(TINY)
    return {**state, key: change(state[key])}


def _without(*gone: str) -> State:
    return {key: t for key, t in random_state(TINY).items() if key not in gone}


def _with_value(value: float) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.index_fill(0, torch.tensor([1]), value)


REFUSED: dict[str, tuple[State, str]] = {
    "missing keys": (
        _without("norm.bias", "blocks.1.ls2.gamma"),
        r"missing: blocks\.1\.ls2\.gamma, norm\.bias.*config=",
    ),
    "unexpected keys": (
        {**random_state(TINY), "head.weight": torch.zeros(2), "blocks.7.x": torch.zeros(1)},
        r"unexpected: blocks\.7\.x, head\.weight",
    ),
    "misshapen keys": (
        _spoil("blocks.0.mlp.fc1.weight", lambda t: t[:5]),
        r"misshapen: blocks\.0\.mlp\.fc1\.weight \(5, 32\) for \(128, 32\)",
    ),
    "a transposed matrix": (_spoil("blocks.0.mlp.fc2.weight", lambda t: t.T), "misshapen"),
    "another table": (_spoil("pos_embed", lambda t: t[:, :17]), r"pos_embed \(1, 17, 32\)"),
    "nan": (_spoil("blocks.0.attn.qkv.bias", _with_value(float("nan"))), r"finite.*qkv\.bias"),
    "inf": (_spoil("norm.weight", _with_value(float("inf"))), r"finite.*norm\.weight"),
    "integers": (_spoil("norm.weight", lambda t: t.to(torch.int64)), r"finite floating-point"),
    "no ViT": ({"fc.weight": torch.zeros(2)}, r"no ViT.*fc\.weight"),
    "registers that the config lacks": (random_state(TINY_REGISTERS), r"register_tokens"),
    "nothing": ({}, "no tensors|no ViT"),
}


@pytest.mark.parametrize(("state", "said"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_that_do_not_fit_are_refused_with_the_list(
    state: State, said: str, suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"w{suffix}"
    if suffix == ".pth":
        torch.save(state, path)
    else:
        save_file({key: t.contiguous() for key, t in state.items()}, path)
    with pytest.raises(WeightsError, match=said):
        load_model(path, config=TINY, device="cpu")


class _Intruder:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_a_pickle_with_code_in_it_is_refused_and_not_run(tmp_path: Path) -> None:
    path, trace = tmp_path / "w.bin", tmp_path / "ran"
    torch.save({**random_state(TINY), "extra": _Intruder(trace)}, path)
    with pytest.raises(WeightsError, match=r"never run.*safetensors"):
        read_tensors(path)
    assert not trace.exists()
    path.write_bytes(pickle.dumps(_Intruder(trace), protocol=2))
    with pytest.raises(WeightsError, match=r"never run"):
        read_tensors(path)
    assert not trace.exists()


def test_pickles_need_a_torch_that_reads_them_safely(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "w.bin"
    torch.save(random_state(TINY), path)
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.9.1"))
    with pytest.raises(WeightsError, match=r"2\.9\.1.*CVE-2026-24747.*2\.10.*safetensors"):
        read_tensors(path)
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.10.0+cpu"))
    assert _equal(read_tensors(path), random_state(TINY))


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("kept", [0.0, 0.0001, 0.5, 0.999])
def test_a_truncated_file_is_refused(suffix: str, kept: float, tmp_path: Path) -> None:
    path = tmp_path / f"w{suffix}"
    state = random_state(TINY)
    if suffix == ".bin":
        torch.save(state, path)
    else:
        save_file(state, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(WeightsError, match=r"w\.(safetensors|bin)"):
        read_tensors(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_a_file_of_something_else_is_refused(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"w{suffix}"
    path.write_bytes(b"<html>404</html>" * 100)
    with pytest.raises(WeightsError, match="w"):
        read_tensors(path)


def test_a_cached_file_that_does_not_match_its_hub_hash_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "w.safetensors"
    save_file(random_state(TINY), source)
    blob = tmp_path / "blobs" / file_sha256(source)
    blob.parent.mkdir()
    shutil.move(source, blob)
    source.symlink_to(blob)
    assert file_sha256(source) == blob.name
    damaged = bytearray(blob.read_bytes())
    damaged[-1] ^= 1
    blob.write_bytes(damaged)
    with pytest.raises(WeightsError, match=r"damaged.*Delete"):
        file_sha256(source)
