"""On a CUDA device: exact gradients, flat memory, recovery from too little of it, half precision.

Run it there with: python -m pytest tests/finetune/test_gpu_finetuning.py -m gpu
"""

import gc
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.finetuning import LABELS, PATIENTS, QUICK, small_encoder, stores
from support.models import random_encoder, random_tiles
from torch import Tensor, nn

from xmag.encoder import load_model
from xmag.finetune import Augmentation, Settings, TileStore, exact_backward, finetune_slides
from xmag.finetune.network import TileNetwork
from xmag.mil import MILClassifier, aggregator, training_loss
from xmag.training.augmentation import draw
from xmag.vit import CONFIGS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LABEL = torch.tensor([1])


@pytest.fixture(autouse=True)
def _memory_is_given_back() -> Iterator[None]:
    yield
    gc.collect()
    torch.cuda.empty_cache()


def network_and_head(*, half: bool) -> tuple[TileNetwork, nn.Module]:
    encoder = random_encoder(CONFIGS["dinov2_vits14"])
    torch.manual_seed(0)
    head = aggregator("abmil", in_dim=384, classes=2, dropout=0.0)
    return TileNetwork(encoder.vit, encoder.config, half=half).cuda(), head.cuda()


def loss_with(head: nn.Module):
    def loss_of(features: Tensor) -> Tensor:
        mask = torch.ones(1, len(features), dtype=torch.bool, device="cuda")
        return training_loss(head(features.unsqueeze(0), mask), LABEL.cuda())

    return loss_of


def relative_differences(
    network: nn.Module, head: nn.Module, expected: list[Tensor]
) -> list[float]:
    found = [p.grad for m in (network, head) for p in m.parameters()]
    # A bias that softmax cancels has a gradient of nothing but rounding.
    least = 1e-6 * float(torch.stack([b.norm() for b in expected]).norm())
    return [
        float((a - b).norm() / b.norm().clamp(min=least))
        for a, b in zip(found, expected, strict=True)
    ]


@pytest.mark.parametrize(("half", "most"), [(False, 1e-4), (True, 1e-2)])
def test_chunks_give_the_gradients_of_the_whole_bag(half: bool, most: float) -> None:
    network, head = network_and_head(half=half)
    tiles = torch.from_numpy(random_tiles(40))
    draws = draw(0, 0, range(40), 0)
    loss_with(head)(network(tiles, draws)).backward()
    expected = [p.grad.clone() for m in (network, head) for p in m.parameters()]
    network.zero_grad()
    head.zero_grad()
    exact_backward(
        lambda a, b: network(tiles[a:b], draws[a:b]), 40, loss_with(head), chunk=16
    )  # fmt: skip
    assert max(relative_differences(network, head, expected)) < most


def peak_of(count: int) -> int:
    network, head = network_and_head(half=True)
    tiles = torch.from_numpy(random_tiles(1)).expand(count, -1, -1, -1)
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        exact_backward(lambda a, b: network(tiles[a:b]), count, loss_with(head), chunk=32)
    return torch.cuda.max_memory_allocated()


def test_peak_memory_does_not_grow_with_the_bag() -> None:
    small, large = peak_of(128), peak_of(2048)
    features = 2048 * 384 * 4
    assert large < small + 10 * features


def test_a_gpu_that_is_too_small_for_the_chunk_is_enough_for_half_of_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    encoder = random_encoder(CONFIGS["dinov2_vits14"], device="cuda", dtype="float32")
    slides = [TileStore(random_tiles(256, seed=n), f"slide {n}") for n in range(2)]
    settings = Settings(epochs=1, slides_per_step=1, chunk_tiles=256, ema=None)
    total = torch.cuda.get_device_properties(0).total_memory
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, 6 * 2**30 / total))
    try:
        with caplog.at_level(logging.WARNING, "xmag"):
            result = finetune_slides(
                slides, [0, 1], model=encoder, validation=None, settings=settings, progress=False
            )
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "going on with chunks of 128 tiles" in caplog.text
    assert result.history[0].tiles == 512


def test_half_precision_learns_and_its_folder_predicts_the_same(tmp_path: Path) -> None:
    settings = Settings(**{**QUICK.to_dict(), "epochs": 6, "augmentation": Augmentation()})
    result = finetune_slides(
        stores(), LABELS, model=small_encoder(device="cuda"), groups=PATIENTS, settings=settings,
        progress=False,
    )  # fmt: skip
    assert result.encoder.dtype == torch.bfloat16
    assert result.exact_encoder.dtype == torch.float32
    assert result.history[-1].train_loss < result.history[0].train_loss
    result.save(tmp_path)
    encoder, classifier = load_model(tmp_path, device="cuda"), MILClassifier.load(tmp_path)
    bags = [encoder.embed(store.tiles).cpu().numpy() for store in stores()]
    made = [result.encoder.embed(store.tiles).cpu().numpy() for store in stores()]
    difference = classifier.predict_proba(bags) - result.classifier.predict_proba(made)
    assert abs(difference).max() < 1e-5
    assert encoder.provenance["weights_sha256"] == result.encoder.provenance["weights_sha256"]
