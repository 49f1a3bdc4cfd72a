"""On a CUDA device: cohorts through decoding processes and full batches, and compiled encoders.

Run it there with: python -m pytest tests/test_gpu_cohort.py -m gpu
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from support.fake_reader import noise
from support.models import random_encoder, random_tiles
from support.slides import write_svs

from xmag.bag import FeatureBag
from xmag.cohort import extract_cohort
from xmag.encoder import Encoder, TileStream
from xmag.vit import CONFIGS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return random_encoder(CONFIGS["dinov2_vits14"], device="cuda", dtype="float32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("slides")
    for number, width in enumerate((1800, 6000, 300, 9000, 4000)):
        write_svs(root / f"{number}.svs", size=(width, 4000), mpp=0.25)
    (root / "broken.svs").write_bytes(b"II*\0")
    return root


@pytest.mark.parametrize("batch_size", [3, 256])
def test_batches_across_slides_change_no_slide(
    encoder: Encoder, folder: Path, tmp_path: Path, batch_size: int
) -> None:
    reports = [
        extract_cohort(
            folder,
            tmp_path / str(processes),
            model=encoder,
            tissue=None,
            batch_size=batch_size,
            processes=processes,
        )
        for processes in (0, 3)
    ]
    assert [row.status for row in reports[0]] == [row.status for row in reports[1]]
    assert [row.tiles for row in reports[0]] == [3, 12, 0, 15, 9, 0]
    for here in reports[0]:
        if here.status == "done":
            one, other = (FeatureBag.load(tmp_path / n / here.output) for n in ("0", "3"))
            assert np.array_equal(one.coords, other.coords)
            assert np.abs(one.features - other.features).max() < 1e-4


def test_chunks_of_any_size_come_back_whole_and_in_order(encoder: Encoder) -> None:
    stream: TileStream[int] = TileStream(encoder, batch_size=16)
    chunks = [random_tiles(n, seed=n) for n in (1, 40, 16, 0, 7, 33)]
    found, copied = [], []
    for number, tiles in enumerate(chunks):
        memory = torch.from_numpy(tiles).pin_memory()
        stream.put(number, memory, on_copied=lambda n=number: copied.append(n))  # type: ignore[misc]
        found += stream.landed()
    found += stream.finish()
    assert [number for number, _ in found] == list(range(6))
    assert copied == list(range(6))
    for number, features in found:
        expected = encoder.embed(chunks[number]).cpu().numpy()
        assert features.shape == expected.shape
        assert np.abs(features - expected).max(initial=0) < 1e-4


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:TensorFloat32")  # by its compiler
def test_a_compiled_encoder_gives_the_same_for_any_batch(encoder: Encoder) -> None:
    compiled = encoder.compiled(batch_size=8)
    tiles = noise(224, 224 * 19).reshape(19, 224, 224, 3)
    for count in (8, 1, 19):
        difference = compiled.embed(tiles[:count]) - encoder.embed(tiles[:count])
        assert difference.abs().max() < 1e-3
    assert compiled.provenance == encoder.provenance


@pytest.mark.parametrize("processes", [0, 3])
def test_several_models_in_one_pass_give_what_each_gives_alone(
    encoder: Encoder, folder: Path, tmp_path: Path, processes: int
) -> None:
    other = random_encoder(CONFIGS["dinov2_vits14"], seed=1, device="cuda", dtype="float32")
    models = [encoder.named("one"), other.named("other")]
    report = extract_cohort(
        folder, tmp_path / "both", model=models, tissue=None, batch_size=8, processes=processes
    )
    assert [row.status for row in report].count("done") == 8
    for model in models:
        name = model.provenance["name"]
        alone = extract_cohort(folder, tmp_path / name, model=model, tissue=None, processes=0)
        for row in alone:
            if row.status == "done":
                bag = FeatureBag.load(tmp_path / "both" / name / row.output)
                expected = FeatureBag.load(tmp_path / name / row.output)
                assert np.array_equal(bag.coords, expected.coords)
                assert np.abs(bag.features - expected.features).max() < 1e-4
