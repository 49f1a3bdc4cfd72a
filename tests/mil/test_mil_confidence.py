"""Temperature and novelty, against scikit-learn's."""

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.calibration import _TemperatureScaling
from sklearn.covariance import LedoitWolf
from sklearn.metrics import roc_auc_score

from xmag.errors import InputError
from xmag.mil.confidence import Novelty, fit_temperature


def _logits(seed: int, classes: int, *, sharpness: float) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    true = rng.normal(size=(300, classes)) * 1.5
    targets = np.array([rng.choice(classes, p=row) for row in softmax(true, axis=1)])
    return true * sharpness, targets


@pytest.mark.parametrize("classes", [2, 3, 6])
@pytest.mark.parametrize("sharpness", [0.3, 1, 4])
def test_the_temperature_is_scikit_learns(classes, sharpness):
    logits, targets = _logits(0, classes, sharpness=sharpness)
    theirs = _TemperatureScaling().fit(logits, targets)
    assert fit_temperature(logits, targets) == pytest.approx(1 / theirs.beta_, rel=1e-6)


def test_the_temperature_undoes_what_made_logits_too_sharp():
    logits, targets = _logits(1, 3, sharpness=4)
    assert fit_temperature(logits, targets) == pytest.approx(4, rel=0.2)


def test_logits_that_are_always_right_get_the_lowest_temperature():
    logits = np.eye(3)[[0, 1, 2, 0]] * 5
    assert fit_temperature(logits, np.array([0, 1, 2, 0])) == pytest.approx(np.exp(-10), rel=1e-3)


@pytest.mark.parametrize(("count", "width"), [(30, 5), (20, 60), (200, 12)])
def test_the_covariance_is_ledoit_and_wolfs(count, width):
    rng = np.random.default_rng(count)
    vectors = rng.normal(size=(count, width)) @ rng.normal(size=(width, width)) + 3
    found = Novelty.of(vectors, groups=np.arange(count), rng=np.random.default_rng(0))
    theirs = LedoitWolf().fit(vectors)
    np.testing.assert_allclose(found.covariance, theirs.covariance_, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(found.mean, theirs.location_)


@pytest.mark.parametrize("count", [20, 50, 200])
def test_a_shifted_cohort_is_novel_and_an_unshifted_one_is_not(count):
    rng = np.random.default_rng(7)
    mixing = rng.normal(size=(64, 64)) / 8

    def cohort(n: int, *, shift: float) -> np.ndarray:
        return (rng.normal(size=(n, 64)) + shift * np.eye(64)[0]) @ mixing

    found = Novelty.of(cohort(count, shift=0), groups=np.arange(count), rng=rng)
    same, new, far = (found.percentiles(cohort(300, shift=s)) for s in (0, 0, 12))
    is_new = np.repeat([False, True], 300)
    assert roc_auc_score(is_new, np.concatenate([same, far])) >= 0.9
    assert 0.4 <= roc_auc_score(is_new, np.concatenate([same, new])) <= 0.6
    # A case like those of the training is at any percentile.
    assert 35 <= np.median(same) <= 75


def test_slides_of_a_patient_are_no_reference_for_each_other():
    """Twins would otherwise be found near each other, and every new patient far away."""
    rng = np.random.default_rng(0)
    patients = rng.normal(size=(20, 30))
    vectors = np.repeat(patients, 3, axis=0) + 0.01 * rng.normal(size=(60, 30))
    found = Novelty.of(vectors, groups=np.repeat(np.arange(20), 3), rng=rng)
    assert np.median(found.percentiles(rng.normal(size=(200, 30)))) < 97


def test_too_few_patients_are_an_error():
    with pytest.raises(InputError, match="9 patients"):
        Novelty.of(np.eye(9), groups=np.arange(9), rng=np.random.default_rng(0))
