"""The Encoder: what goes in, what comes out, and what it leaves alone."""

import hashlib
import json
import os
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.models import (
    TINY,
    TINY_REGISTERS,
    random_encoder,
    random_state,
    random_tiles,
    random_vit,
)

import xmag.encoder
from xmag.encoder import Encoder, TileEncoder, default_encoder, load_model
from xmag.errors import InputError, ModelError, OutputError, WeightsError, XmagWarning
from xmag.extract import fingerprint_of
from xmag.geometry import TileSpec
from xmag.hub.registry import MINI_WEIGHTS, ModelConfig
from xmag.provenance import Provenance


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return random_encoder(TINY_REGISTERS)


def test_an_embedding_is_the_normalised_class_token(encoder: Encoder) -> None:
    tiles = random_tiles(3)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    images = torch.from_numpy(((tiles / 255 - mean) / std).transpose(0, 3, 1, 2)).float()
    with torch.inference_mode():
        tokens = random_vit(TINY_REGISTERS)(images)
    embedded = encoder.embed(tiles)
    assert (embedded.shape, embedded.dtype) == ((3, 32), torch.float32)
    assert (embedded - tokens[:, 0]).abs().max() < 1e-5
    again, patches = encoder.embed_tokens(tiles)
    assert patches.shape == (3, 256, 32)
    assert (
        patches - tokens[:, 5:]
    ).abs().max() < 1e-5  # the class token and 4 registers come first
    assert (again - embedded).abs().max() < 1e-5


def test_an_encoder_pools_as_its_configuration_says(encoder: Encoder, tmp_path: Path) -> None:
    pooled = random_encoder(replace(TINY_REGISTERS, pooling="token+mean"))
    tiles = random_tiles(3)
    token, patches = encoder.embed_tokens(tiles)
    expected = torch.cat((token, patches.mean(1)), 1)
    assert pooled.embed_dim == 64
    assert (pooled.embed(tiles) - expected).abs().max() < 1e-5
    assert torch.equal(pooled.embed_tokens(tiles)[0], token)
    assert pooled.embed(tiles[:0]).shape == (0, 64)
    pooled.save(tmp_path)
    again = load_model(tmp_path, device="cpu")
    assert (again.pooling, again.embed_dim) == ("token+mean", 64)


def test_embeddings_pooled_otherwise_are_not_mixed(encoder: Encoder) -> None:
    pooled = random_encoder(replace(TINY_REGISTERS, pooling="mean"))
    token, mean = (Provenance(fingerprint_of(e, {}, None), {}) for e in (encoder, pooled))
    assert "pooling" not in token.fingerprint  # as it was before there was another
    assert token.differences(mean) == ["pooling: 'mean' there, nothing here"]


def test_patch_tokens_are_in_the_order_of_the_pixels(encoder: Encoder) -> None:
    """Without blocks or positions a token knows its own patch alone."""
    state = random_state(TINY)
    for key in state:
        if key.endswith("gamma") or key == "pos_embed":
            state[key].zero_()
    vit = random_vit(TINY)
    vit.load_state_dict(state)
    blind = Encoder(vit, ModelConfig(vit=TINY), provenance={})
    tile = np.zeros((1, 224, 224, 3), np.uint8)
    tile[:, 14 * 3 : 14 * 4, 14 * 9 : 14 * 10] = 255  # row 3, column 9
    patches = blind.embed_tokens(tile)[1][0]
    different = (patches - patches[0]).abs().amax(dim=1) > 1e-3
    assert different.nonzero().flatten().tolist() == [3 * 16 + 9]


def test_arrays_and_tensors_of_any_memory_layout_give_the_same(encoder: Encoder) -> None:
    tiles = random_tiles(2)
    expected = encoder.embed(tiles)
    read_only = tiles.copy()
    read_only.setflags(write=False)
    mirrored_twice = tiles[:, ::-1].copy()[:, ::-1]
    channels_first = torch.from_numpy(tiles).permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    for same in (torch.from_numpy(tiles), read_only, mirrored_twice, channels_first):
        assert torch.equal(encoder.embed(same), expected)


def test_no_tiles_give_no_embeddings(encoder: Encoder) -> None:
    none = random_tiles(0)
    assert encoder.embed(none).shape == (0, 32)
    assert [part.shape for part in encoder.embed_tokens(none)] == [(0, 32), (0, 256, 32)]


@pytest.mark.parametrize(
    ("tiles", "said"),
    [
        (random_tiles(1)[0], r"shape \(224, 224, 3\); expected uint8.*tile\[None\]"),
        (
            random_tiles(1).transpose(0, 3, 1, 2),
            r"\(1, 3, 224, 224\); expected.*\(B, 224, 224, 3\)",
        ),
        (random_tiles(1, 196), r"\(1, 196, 196, 3\)"),
        (random_tiles(1).astype(np.float32) / 255, "dtype float32.*uint8.*the encoder does it"),
        (torch.zeros(1, 224, 224, 3), r"dtype torch\.float32"),
        ([[1]], "tiles are a list"),
    ],
)
def test_tiles_that_are_none_are_refused(encoder: Encoder, tiles: object, said: str) -> None:
    with pytest.raises(InputError, match=said):
        encoder.embed(tiles)  # type: ignore[arg-type]


def test_embeddings_do_not_depend_on_the_batch_size(encoder: Encoder) -> None:
    tiles = random_tiles(5)
    single = torch.cat([encoder.embed(tiles[i : i + 1]) for i in range(5)])
    assert (encoder.embed(tiles) - single).abs().max() < 1e-4


def test_eight_threads_get_what_one_gets(encoder: Encoder) -> None:
    batches = [random_tiles(2, seed=seed) for seed in range(16)]
    expected = [encoder.embed(batch) for batch in batches]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(encoder.embed, batches))
    for one, other in zip(expected, found, strict=True):
        assert (one - other).abs().max() < 1e-5


def test_embeddings_can_enter_a_training_graph(encoder: Encoder) -> None:
    head = torch.nn.Linear(32, 1)
    head(encoder.embed(random_tiles(2))).sum().backward()
    assert head.weight.grad is not None


def test_the_callers_torch_is_left_as_it_was(encoder: Encoder) -> None:
    def state() -> list[object]:
        return [
            torch.get_num_threads(),
            torch.get_num_interop_threads(),
            torch.backends.cuda.matmul.allow_tf32,
            torch.backends.cudnn.allow_tf32,
            torch.get_float32_matmul_precision(),
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.get_default_dtype(),
            torch.get_rng_state().tolist(),
            np.random.get_state()[1].tolist(),  # noqa: NPY002 (the state that others may rely on)
            dict(os.environ),
            list(warnings.filters),
        ]

    before = state()
    load_model("xmag-mini")
    encoder.embed(random_tiles(2))
    stream = encoder.embed_stream([(np.zeros((1, 2), np.int64), random_tiles(1))] * 2)
    next(stream)
    assert state() == before  # also while a stream is suspended


def test_the_callers_defaults_do_not_reach_the_model(encoder: Encoder) -> None:
    tiles = random_tiles(1)
    expected = encoder.embed(tiles)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(encoder.embed(tiles), expected)
            assert load_model("xmag-mini").embed(tiles).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_an_encoder_is_frozen(encoder: Encoder) -> None:
    assert not encoder.vit.training
    assert not any(p.requires_grad for p in encoder.vit.parameters())
    with pytest.raises(AttributeError):
        encoder.tile_spec = TileSpec()  # type: ignore[misc]
    with pytest.raises(TypeError):
        encoder.provenance["name"] = "another"  # type: ignore[index]


def test_a_stream_gives_every_batch_in_order(encoder: Encoder) -> None:
    batches = [(np.full((n, 2), n), random_tiles(n, seed=n)) for n in (3, 1, 0, 2)]
    found = list(encoder.embed_stream(iter(batches)))
    assert [coords.tolist() for coords, _ in found] == [c.tolist() for c, _ in batches]
    for (_, tiles), (_, features) in zip(batches, found, strict=True):
        assert isinstance(features, np.ndarray)
        assert features.dtype == np.float32
        assert np.array_equal(features, encoder.embed(tiles).numpy())


def test_a_stream_takes_batches_only_as_they_are_wanted(encoder: Encoder) -> None:
    taken = []

    def batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for i in range(10):
            taken.append(i)
            yield np.zeros((1, 2), np.int64), random_tiles(1)

    next(encoder.embed_stream(batches()))
    assert len(taken) < 6


def _small_memory(encoder: Encoder, fits: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let the model run out of memory on more than `fits` tiles; gives the sizes it was asked."""
    asked: list[int] = []
    inner = encoder._forward.forward

    def forward(tiles: torch.Tensor, keep: int | None = None) -> torch.Tensor:
        asked.append(len(tiles))
        if len(tiles) > fits:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return inner(tiles, keep)

    monkeypatch.setattr(encoder._forward, "forward", forward)
    return asked


def test_a_batch_that_does_not_fit_into_memory_is_halved(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiles = random_tiles(9)
    expected = encoder.embed(tiles)
    asked = _small_memory(encoder, 3, monkeypatch)
    assert (encoder.embed(tiles) - expected).abs().max() < 1e-5
    assert asked == [9, 5, 3, 3, 3]


def test_memory_too_small_for_one_tile_is_an_error(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    _small_memory(encoder, 0, monkeypatch)
    with pytest.raises(ModelError, match=r"single tile.*bfloat16"):
        encoder.embed(random_tiles(2))


def test_half_precision_comes_close(encoder: Encoder) -> None:
    half = random_encoder(TINY_REGISTERS, dtype="bfloat16")
    tiles = random_tiles(4)
    assert half.dtype == torch.bfloat16
    assert half.embed(tiles).dtype == torch.float32
    assert 1e-4 < (half.embed(tiles) - encoder.embed(tiles)).abs().max() < 0.2


def test_auto_means_float32_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    found = load_model("xmag-mini", device="auto", dtype="auto")
    assert (found.device, found.dtype) == (torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(
    ("capability", "expected"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16)]
)
def test_auto_means_bfloat16_where_cuda_has_it(
    capability: tuple[int, int], expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert xmag.devices.resolve_dtype("auto", torch.device("cuda", 0)) == expected


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"device": "gpu"}, 'device=.gpu. is unknown; expected "auto"'),
        ({"dtype": "int8"}, "dtype='int8' is unknown"),
        ({"dtype": torch.int8}, "dtype=torch.int8 is unknown"),
        ({"config": "dinov2_vitb14"}, "ships with xmag and takes no config="),
        ({"revision": "main"}, "no revision="),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        load_model("xmag-mini", **{"device": "cpu", **options})


def test_cuda_without_cuda_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="sees no CUDA device"):
        load_model("xmag-mini", device="cuda")


def test_the_mini_model_is_trained_and_comes_without_a_warning() -> None:
    mini = load_model("xmag-mini", device="cpu")
    assert mini.provenance["trained"] is True
    assert (mini.embed_dim, mini.tile_spec) == (384, TileSpec(mpp=2.0, size_px=224))
    assert all(p.dtype == torch.float32 for p in mini.vit.parameters())


def test_the_mini_model_is_the_file_whose_hash_is_pinned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = MINI_WEIGHTS.read_bytes()
    assert len(data) <= 12_000_000
    found = load_model("xmag-mini", device="cpu").provenance["weights_sha256"]
    assert found == hashlib.sha256(data).hexdigest()
    damaged = tmp_path / "mini.safetensors"
    damaged.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    monkeypatch.setattr(xmag.hub.fetch, "MINI_WEIGHTS", damaged)
    with pytest.raises(WeightsError, match=r"is damaged.*Install xmag again"):
        load_model("xmag-mini", device="cpu")


@pytest.mark.parametrize("config", [TINY, TINY_REGISTERS], ids=["plain", "registers"])
def test_a_saved_encoder_loads_as_the_same(config: object, tmp_path: Path) -> None:
    spec = TileSpec(mpp=1.0, size_px=112, resample="lanczos")
    made = ModelConfig(vit=config, tile_spec=spec, mean=(0.5, 0.5, 0.5))  # type: ignore[arg-type]
    about = {"name": "mine", "terms": "CC0", "trained": True}
    encoder = Encoder(random_vit(config), made, provenance=about)  # type: ignore[arg-type]
    encoder.save(tmp_path)
    again = load_model(tmp_path, device="cpu")
    assert again.config == made
    assert torch.equal(again.embed(random_tiles(2, 112)), encoder.embed(random_tiles(2, 112)))
    assert again.provenance["terms"] == "CC0"
    assert sorted(load_file(tmp_path / "model.safetensors")) == sorted(random_state(config))  # type: ignore[arg-type]


def test_a_model_saved_as_untrained_says_so_when_it_is_loaded(tmp_path: Path) -> None:
    about = {"name": "mine", "trained": False}
    Encoder(random_vit(TINY), ModelConfig(vit=TINY), provenance=about).save(tmp_path)
    with pytest.warns(XmagWarning, match="UNTRAINED") as caught:
        assert load_model(tmp_path, device="cpu").provenance["trained"] is False
    assert caught[0].filename == __file__


def test_saving_where_nothing_can_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError):
        random_encoder().save(tmp_path / "file")


def test_the_provenance_is_complete_and_plain_json(tmp_path: Path) -> None:
    random_encoder().save(tmp_path)
    (tmp_path / "config.json").unlink()
    provenance = load_model(tmp_path, config=TINY, device="cpu").provenance
    assert json.loads(json.dumps(dict(provenance))) == provenance
    assert set(provenance) == {
        *("name", "revision", "weights_sha256", "key_layout", "config", "config_source"),
        *("terms", "trained"),
    }
    assert provenance["config_source"] == "given"
    assert provenance["key_layout"] == "dinov2"
    assert provenance["config"]["vit"] == TINY.to_dict()


def test_a_bare_file_that_is_no_vit_b_asks_for_its_config(tmp_path: Path) -> None:
    random_encoder().save(tmp_path)
    with pytest.raises(WeightsError, match=r"misshapen.*Give config="):
        load_model(tmp_path / "model.safetensors", device="cpu")


def test_loading_draws_no_random_numbers(tmp_path: Path) -> None:
    random_encoder().save(tmp_path)
    before = torch.get_rng_state()
    load_model(tmp_path, device="cpu")
    assert torch.equal(torch.get_rng_state(), before)


def test_the_default_encoder_is_loaded_once_by_however_many_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded = []
    together = threading.Barrier(8)

    def load() -> Encoder:
        loaded.append(threading.get_ident())
        return random_encoder()

    def ask(_: int) -> Encoder:
        together.wait()
        return default_encoder()

    monkeypatch.setattr(xmag.encoder.loading, "load_model", load)
    xmag.encoder.loading._load_default.cache_clear()
    try:
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(ask, range(8)))
    finally:
        xmag.encoder.loading._load_default.cache_clear()
    assert len(loaded) == 1
    assert all(one is found[0] for one in found)


def test_encoders_are_recognised_by_what_they_offer(encoder: Encoder) -> None:
    assert isinstance(encoder, TileEncoder)
    assert not isinstance(object(), TileEncoder)


def test_tiles_that_do_not_divide_into_patches_are_refused() -> None:
    with pytest.raises(InputError, match="250 px do not divide"):
        ModelConfig(vit=TINY, tile_spec=TileSpec(size_px=250))
    with pytest.raises(InputError, match="do not normalise"):
        replace(ModelConfig(vit=TINY), std=(1.0, 0.0, 1.0))
