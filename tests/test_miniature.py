"""The scores of benchmarks/miniature.py against scikit-learn, and which images it reads."""

import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import miniature_data
import miniature_scores


def test_the_mean_over_seeds_is_that_of_scikit_learns_balanced_accuracy() -> None:
    rng = np.random.default_rng(0)
    classes = np.array(["a", "b", "c"])[rng.integers(3, size=60)]
    predicted = [np.where(rng.random(60) < 0.6, classes, "a") for _ in range(3)]
    found = miniature_scores.summary([p == classes for p in predicted], classes)
    expected = [balanced_accuracy_score(classes, p) for p in predicted]
    assert found["seeds"] == pytest.approx(expected)
    assert found["value"] == pytest.approx(np.mean(expected))
    assert found["low"] < found["value"] < found["high"]


def test_a_difference_is_that_of_the_two_values_and_zero_of_a_model_with_itself() -> None:
    rng = np.random.default_rng(1)
    classes = np.repeat(["a", "b", "c"], 20)
    good, poor = rng.random(60) < 0.9, rng.random(60) < 0.3
    found = miniature_scores.summary([good], classes, minus=[poor])
    alone = [miniature_scores.summary([hit], classes)["value"] for hit in (good, poor)]
    assert found["value"] == pytest.approx(alone[0] - alone[1])
    same = miniature_scores.summary([good], classes, minus=[good])
    assert (same["value"], same["low"], same["high"]) == (0, 0, 0)


def test_probes_never_see_the_patient_left_out() -> None:
    """Labels that only the left-out rows could teach are not learned."""
    rng = np.random.default_rng(2)
    x = rng.normal(size=(40, 8)).astype(np.float32)
    classes = np.repeat(["a", "b"], 20)
    held_out = np.arange(40) % 2 == 0
    x[~held_out, 0] += np.where(classes[~held_out] == "a", 9, -9)
    x[held_out, 0] += np.where(classes[held_out] == "a", -9, 9)
    found = miniature_scores.hits(x, classes, held_out)
    # Standardised, the one telling dimension weighs no more than the seven of noise.
    diluted = found.pop("probe, standardised")
    assert diluted.mean() <= 0.1
    assert not any(hit.any() for hit in found.values())


@pytest.mark.shared
def test_the_images_are_sixty_of_four_patients(shared: Path) -> None:
    images = miniature_data.read_images(shared / "images" / "osteosarcoma")
    assert tuple(images.pixels.shape) == (60, 1024, 1024, 3)
    names, counts = np.unique(images.patients, return_counts=True)
    assert dict(zip(names.tolist(), counts.tolist(), strict=True)) == {
        "Case-3": 19, "Case-4": 15, "Case-48": 18, "P9": 8,
    }  # fmt: skip
