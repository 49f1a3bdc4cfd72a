"""Metrics of numbers against scikit-learn and scipy."""

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sk

from xmag.errors import InputError
from xmag.metrics import regression

NAMES = ("r2", "mae", "rmse", "pearson", "spearman")
ORACLES = {
    "r2": sk.r2_score,
    "mae": sk.mean_absolute_error,
    "rmse": sk.root_mean_squared_error,
    "pearson": lambda y, p: stats.pearsonr(y, p).statistic,
    "spearman": lambda y, p: stats.spearmanr(y, p).statistic,
}


def _cases(seed: int, *, ties: bool, n: int = 40) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 8, n).astype(float) if ties else rng.normal(3, 2, n)
    return truth, truth * 0.5 + (rng.integers(0, 4, n) if ties else rng.normal(size=n))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_values_are_those_of_other_packages(name, seed, ties):
    truth, predicted = _cases(seed, ties=ties)
    expected = float(ORACLES[name](truth, predicted))
    assert getattr(regression, name)(truth, predicted) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_missing_truth_is_left_out(name):
    truth, predicted = _cases(1, ties=False)
    gaps = truth.copy()
    gaps[::3] = np.nan
    known = ~np.isnan(gaps)
    metric = getattr(regression, name)
    assert metric(gaps, predicted) == metric(truth[known], predicted[known])


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_repeated_cases(name):
    truth, predicted = _cases(2, ties=True)
    weights = np.random.default_rng(0).integers(0, 4, (6, len(truth)))
    found = getattr(regression, f"{name}s")(truth, predicted, weights.astype(float))
    for value, row in zip(found, weights, strict=True):
        rows = np.repeat(np.arange(len(truth)), row)
        expected = float(ORACLES[name](truth[rows], predicted[rows]))
        assert value == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("constant", [2.0, 0.1])  # three times 0.1 have another mean, by rounding
@pytest.mark.parametrize("name", ["r2", "pearson", "spearman"])
def test_a_constant_truth_has_no_such_value(name, constant):
    with pytest.raises(InputError, match="does not exist"):
        getattr(regression, name)([constant] * 3, [1.0, 2.0, 3.0])


@pytest.mark.parametrize("constant", [2.0, 0.1])
@pytest.mark.parametrize("name", ["pearson", "spearman"])
def test_a_constant_prediction_has_no_correlation(name, constant):
    with pytest.raises(InputError, match="does not exist"):
        getattr(regression, name)([1.0, 2.0, 3.0], [constant] * 3)


@pytest.mark.parametrize("name", ["r2", "pearson", "spearman"])
def test_draws_of_a_constant_have_no_such_value(name):
    """Of three cases or one: what rounding leaves of their spread is none."""
    weights = np.array([[1.0, 1, 1, 0], [0, 3, 0, 0], [1, 0, 0, 1], [0, 0, 0, 0]])
    found = getattr(regression, f"{name}s")(
        np.array([0.1, 0.1, 0.1, 0.7]), np.array([0.3, 0.1, 0.2, 0.9]), weights
    )
    assert np.isnan(found).tolist() == [True, True, False, True]


@pytest.mark.parametrize(
    ("truth", "predicted", "words"),
    [
        ([1.0, 2.0], [1.0], "shape"),
        ([[1.0, 2.0]], [[1.0, 2.0]], "one after the other"),
        ([1.0, np.nan], [1.0, 2.0], "two or more"),
        ([1.0, np.inf], [1.0, 2.0], "not finite"),
        ([1.0, 2.0], [1.0, np.nan], "not finite"),
    ],
)
def test_operands_that_make_no_sense_are_refused(truth, predicted, words):
    with pytest.raises(InputError, match=words):
        regression.mae(truth, predicted)
