"""On a CUDA device: parity with timm and with the CPU, and the stream of batches.

Run it there with: python -m pytest tests/test_gpu_parity.py -m gpu
The comparisons with timm run on the CPU as well, where timm is installed.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support.models import random_encoder, random_state, random_tiles, random_vit, to_timm

from xmag.encoder import Encoder
from xmag.errors import ModelError
from xmag.vit import CONFIGS, ViTConfig

TOLERANCE = 1e-4
VIT_B = CONFIGS["dinov2_vitb14"]
HAS_CUDA = torch.cuda.is_available()
DEVICES = [
    pytest.param("cpu", id="cpu"),
    pytest.param("cuda", marks=pytest.mark.gpu, id="cuda"),
]


@pytest.fixture(autouse=True)
def _cuda_where_it_is_asked_for(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu") and not HAS_CUDA:
        pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def _exact_float32() -> Iterator[None]:
    """The references compute in true float32; ours has to without being told."""
    before = torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cudnn.allow_tf32 = before


def _timm(name: str, config: ViTConfig, **options: Any) -> torch.nn.Module:
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, pretrained=False, num_classes=0, **options)
    model.load_state_dict(to_timm(random_state(config), config))
    return model.eval()


def _difference(ours: torch.nn.Module, theirs: torch.nn.Module, device: str) -> float:
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(3)).to(device)
    with torch.inference_mode():
        found = ours.to(device)(images)
        torch.backends.cudnn.allow_tf32 = False
        expected = theirs.to(device).forward_features(images)
    assert expected.std() > 0.5
    return float((found - expected).abs().max())


@pytest.mark.parametrize("device", DEVICES)
def test_vit_b_equals_that_of_timm(device: str) -> None:
    """timm's table here is of 224 px: how it is resized is the next test."""
    config = replace(VIT_B, position_grid=16)
    theirs = _timm("vit_base_patch14_dinov2", config, img_size=224)
    assert _difference(random_vit(config), theirs, device) < TOLERANCE


@pytest.mark.parametrize("device", DEVICES)
def test_vit_b_equals_that_of_timm_with_its_own_table_resized(device: str) -> None:
    config = replace(VIT_B, position_rule="size_antialias")
    theirs = _timm("vit_base_patch14_dinov2", config, img_size=518, dynamic_img_size=True)
    assert _difference(random_vit(config), theirs, device) < TOLERANCE


@pytest.mark.parametrize(
    ("device", "depth"),
    [
        pytest.param("cpu", 2, id="cpu, 2 blocks"),
        pytest.param("cuda", 24, marks=pytest.mark.gpu, id="cuda, whole"),
    ],
)
def test_uni2_h_equals_that_of_timm(device: str, depth: int) -> None:
    """By the keyword arguments that the card of MahmoodLab/UNI2-h states."""
    timm = pytest.importorskip("timm")
    config = replace(CONFIGS["uni2_h"], depth=depth)
    theirs = _timm(
        "vit_giant_patch14_224",
        config,
        img_size=224,
        patch_size=14,
        depth=depth,
        num_heads=24,
        init_values=1e-5,
        embed_dim=1536,
        mlp_ratio=2.66667 * 2,
        no_embed_class=True,
        mlp_layer=timm.layers.SwiGLUPacked,
        act_layer=torch.nn.SiLU,
        reg_tokens=8,
        dynamic_img_size=True,
    )
    assert _difference(random_vit(config), theirs, device) < TOLERANCE


@pytest.fixture(scope="module")
def on_gpu() -> Encoder:
    if not HAS_CUDA:
        pytest.skip("needs a CUDA device")
    return random_encoder(VIT_B, device="cuda", dtype="float32")


@pytest.mark.gpu
def test_cuda_equals_the_cpu(on_gpu: Encoder) -> None:
    tiles = random_tiles(4)
    expected = random_encoder(VIT_B).embed(tiles)
    assert (on_gpu.embed(tiles).cpu() - expected).abs().max() < TOLERANCE


@pytest.mark.gpu
def test_float32_is_float32_whatever_cudnn_is_allowed(on_gpu: Encoder) -> None:
    tiles = random_tiles(4)
    torch.backends.cudnn.allow_tf32 = True
    loose = on_gpu.embed(tiles)
    torch.backends.cudnn.allow_tf32 = False
    assert (on_gpu.embed(tiles) - loose).abs().max() < 1e-6


@pytest.mark.gpu
def test_float32_features_do_not_depend_on_the_batch_size(on_gpu: Encoder) -> None:
    tiles = random_tiles(65)
    whole = on_gpu.embed(tiles)
    for size in (1, 7, 32):
        parts = [on_gpu.embed(tiles[i : i + size]) for i in range(0, len(tiles), size)]
        assert (torch.cat(parts) - whole).abs().max() < TOLERANCE


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_close(on_gpu: Encoder, dtype: str) -> None:
    tiles = random_tiles(16)
    exact = on_gpu.embed(tiles)
    half = random_encoder(VIT_B, device="cuda", dtype=dtype).embed(tiles)
    spread = (exact - exact.mean(dim=0)).norm(dim=1).median()
    assert (half - exact).norm(dim=1).median() / spread < 0.1


@pytest.mark.gpu
def test_auto_takes_cuda_and_bfloat16() -> None:
    found = random_encoder(device="auto", dtype="auto")
    native = torch.cuda.get_device_capability() >= (8, 0)
    assert found.device.type == "cuda"
    assert found.dtype == (torch.bfloat16 if native else torch.float16)


def _batches(sizes: list[int]) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(np.full((n, 2), i), random_tiles(n, seed=i)) for i, n in enumerate(sizes)]


@pytest.mark.gpu
def test_a_stream_gives_what_embed_gives(on_gpu: Encoder) -> None:
    batches = _batches([32, 32, 0, 5, 32, 1, 32, 32])
    found = list(on_gpu.embed_stream(iter(batches)))
    assert len(found) == len(batches)
    for (coords, tiles), (same, features) in zip(batches, found, strict=True):
        assert np.array_equal(coords, same)
        assert features.shape == (len(tiles), 768)
        assert np.abs(features - on_gpu.embed(tiles).cpu().numpy()).max(initial=0) < 1e-5


@pytest.mark.gpu
def test_a_stream_leaves_the_callers_stream_and_modes_alone(on_gpu: Encoder) -> None:
    before = torch.cuda.current_stream()
    stream = on_gpu.embed_stream(_batches([4] * 6))
    next(stream)
    assert torch.cuda.current_stream() == before
    assert not torch.is_inference_mode_enabled()
    stream.close()


@pytest.mark.gpu
def test_running_out_of_memory_halves_the_batch(on_gpu: Encoder) -> None:
    batches = _batches([512, 512])
    expected = [on_gpu.embed(tiles).cpu().numpy() for _, tiles in batches]
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(
        (torch.cuda.memory_allocated() + 700 * 2**20) / total
    )
    try:
        found = list(on_gpu.embed_stream(batches))
        assert torch.cuda.memory_stats()["num_ooms"] > 0
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    for (_, features), wanted in zip(found, expected, strict=True):
        assert np.abs(features - wanted).max() < TOLERANCE


@pytest.mark.gpu
def test_no_memory_for_a_single_tile_is_an_error(on_gpu: Encoder) -> None:
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_allocated() / total)
    try:
        with pytest.raises(ModelError, match="single tile"):
            on_gpu.embed(random_tiles(4096))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # it says that it is a prototype
def test_nothing_synchronises_the_device_while_batches_are_submitted(on_gpu: Encoder) -> None:
    list(on_gpu.embed_stream(_batches([8, 8])))  # first-use work is over
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = list(on_gpu.embed_stream(_batches([8] * 6)))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(found) == 6
