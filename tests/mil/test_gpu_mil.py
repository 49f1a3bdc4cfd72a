"""Training on CUDA: it learns in half precision, repeats itself, and gets by with less memory.

Run it there with: python -m pytest tests/mil/test_gpu_mil.py -m gpu
"""

import logging
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.metrics import roc_auc_score
from support.mil_cohort import outcome_cohort, planted_cohort

from xmag.errors import ModelError
from xmag.mil import MILClassifier, MILRegressor, MILSurvival, load_estimator

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

OPTIONS = {
    "abmil": {"embed_dim": 64, "attention_dim": 32},
    "mean": {"embed_dim": 64},
    "max": {"embed_dim": 64},
    "transmil": {"embed_dim": 64, "heads": 4, "landmarks": 16},
    "clam_sb": {"embed_dim": 64, "attention_dim": 32},
}


def on_gpu(name: str = "abmil", **params: object) -> MILClassifier:
    defaults = {
        "aggregator": name, "aggregator_options": OPTIONS[name], "device": "cuda",
        "random_state": 0, "epochs": 3,
    }  # fmt: skip
    return MILClassifier(**{**defaults, **params})  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_it_learns_in_every_precision(dtype: str) -> None:
    train = planted_cohort(60, seed=0, dim=16, tiles=50)
    test = planted_cohort(100, seed=1, dim=16, tiles=50)
    small = {"embed_dim": 32, "attention_dim": 16}  # as in test_mil_planted.py
    classifier = on_gpu(dtype=dtype, lr=2e-3, epochs=100, aggregator_options=small)
    classifier.fit(train.bags, train.labels, groups=train.patients)
    assert {p.dtype for p in classifier.aggregator_.parameters()} == {torch.float32}
    scores = classifier.predict_proba(test.bags)[:, 1]
    assert roc_auc_score(np.array(test.labels) == "positive", scores) >= 0.97


@pytest.mark.parametrize("name", OPTIONS)
def test_what_cuda_predicts_is_what_the_cpu_predicts(name: str, tmp_path: Path) -> None:
    cohort = planted_cohort(24, dim=16, tiles=50)
    trained = on_gpu(name).fit(cohort.bags, cohort.labels, validation=None)
    trained.save(tmp_path)
    on_cpu = MILClassifier.load(tmp_path, device="cpu")
    expected = on_cpu.predict_proba(cohort.bags)
    np.testing.assert_allclose(trained.predict_proba(cohort.bags), expected, atol=1e-4)
    again = pickle.loads(pickle.dumps(trained))
    np.testing.assert_allclose(again.predict_proba(cohort.bags), expected, atol=1e-4)
    if name not in ("mean", "max"):
        np.testing.assert_allclose(
            trained.attention(cohort.bags[1]).scores, on_cpu.attention(cohort.bags[1]).scores,
            atol=1e-4,
        )  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("task", ["cox", "nll", "regression", "ordinal", "labels"])
def test_every_task_is_trained_on_cuda_and_predicts_the_same_on_the_cpu(
    task: str, dtype: str, tmp_path: Path
) -> None:
    cohort = outcome_cohort(60, seed=0, tiles=50)
    options = {
        "aggregator_options": {"embed_dim": 32, "attention_dim": 16}, "device": "cuda",
        "dtype": dtype, "epochs": 3, "random_state": 0,
    }  # fmt: skip
    labels = np.stack([cohort.drive > 0, cohort.number > 110], axis=1)
    model, y = {
        "cox": (MILSurvival(**options), cohort.survival),
        "nll": (MILSurvival(**options, loss="nll"), cohort.survival),
        "regression": (MILRegressor(**options), cohort.number),
        "ordinal": (MILClassifier(**options, ordinal=True), cohort.grade),
        "labels": (MILClassifier(**options, class_weight="balanced"), labels),
    }[task]
    fits = [clone(model).fit(cohort.bags, y, validation=None) for _ in range(2)]
    assert fits[0].history_ == fits[1].history_
    fits[0].save(tmp_path)
    predict = "predict_proba" if task in ("ordinal", "labels") else "predict"
    found = getattr(fits[0], predict)(cohort.bags)
    on_cpu = load_estimator(tmp_path, device="cpu")
    np.testing.assert_allclose(getattr(on_cpu, predict)(cohort.bags), found, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_seed_repeats_itself_and_leaves_the_generators_alone(name: str) -> None:
    cohort = planted_cohort(24, dim=16, tiles=50)
    torch.cuda.manual_seed_all(3)
    before = [torch.cuda.get_rng_state(i) for i in range(torch.cuda.device_count())]
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    fits = [on_gpu(name).fit(cohort.bags, cohort.labels, validation=None) for _ in range(2)]
    for key, value in fits[0].aggregator_.state_dict().items():
        assert torch.equal(value, fits[1].aggregator_.state_dict()[key]), key
    after = [torch.cuda.get_rng_state(i) for i in range(torch.cuda.device_count())]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert cudnn == (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark)


@pytest.fixture
def little_memory() -> Iterator[None]:
    """1.2 GB of the device for this process."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    held = torch.cuda.memory_reserved(0)
    torch.cuda.set_per_process_memory_fraction((1.2e9 + held) / total)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


@pytest.mark.usefixtures("little_memory")
def test_less_memory_than_a_batch_needs_is_got_by_with(caplog: pytest.LogCaptureFixture) -> None:
    """A batch of 8 bags takes some 3 GB at the default sizes, one bag 0.4 GB."""
    cohort = planted_cohort(16, dim=64, tiles=20_000)
    classifier = on_gpu(aggregator_options=None, dtype="float32", epochs=1)
    with caplog.at_level(logging.WARNING, logger="xmag.mil"):
        classifier.fit(cohort.bags, cohort.labels, validation=None)
    assert "out of memory: going on with" in caplog.text
    assert np.isfinite(classifier.predict_proba(cohort.bags)).all()


@pytest.mark.usefixtures("little_memory")
def test_a_bag_too_large_for_the_device_is_a_clear_error() -> None:
    rng = np.random.default_rng(0)
    bags = [rng.normal(size=(n, 64)).astype(np.float32) for n in (400_000, 10, 10, 10)]
    classifier = on_gpu(aggregator_options=None, dtype="float32", epochs=1)
    with pytest.raises(ModelError, match="no memory left for a bag of 400000 tiles alone"):
        classifier.fit(bags, [0, 1, 0, 1], validation=None)
    classifier.set_params(max_tiles=10_000).fit(bags, [0, 1, 0, 1], validation=None)
