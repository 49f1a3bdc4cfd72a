"""Survival metrics against scikit-survival, lifelines, and what is written out by hand."""

import itertools
import math

import numpy as np
import pytest
from lifelines import KaplanMeierFitter
from lifelines.statistics import multivariate_logrank_test
from scipy import stats
from sksurv import metrics as sk
from sksurv.compare import compare_survival
from sksurv.nonparametric import kaplan_meier_estimator
from sksurv.util import Surv

from xmag.errors import InputError
from xmag.metrics.survival import (
    as_survival,
    brier_score,
    concordances,
    harrell_c,
    integrated_brier_score,
    kaplan_meier,
    log_rank,
    uno_c,
)


def _cohort(seed: int, *, n: int = 60, ties: bool, censored: float = 0.4) -> np.ndarray:
    rng = np.random.default_rng(seed)
    time = rng.integers(1, 12, n).astype(float) if ties else rng.exponential(5, n) + 0.01
    event = rng.random(n) >= censored
    event[0] = True
    return Surv.from_arrays(event=event, time=time)


def _risk(seed: int, n: int, *, ties: bool) -> np.ndarray:
    rng = np.random.default_rng(seed + 1000)
    return rng.integers(0, 5, n).astype(float) if ties else rng.normal(size=n)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_harrells_c_is_scikit_survivals(seed, ties):
    y = _cohort(seed, ties=ties)
    risk = _risk(seed, len(y), ties=ties)
    expected = sk.concordance_index_censored(y["event"], y["time"], risk)[0]
    assert harrell_c(y, risk) == pytest.approx(expected, abs=1e-12)


def test_harrells_c_of_three_cases_by_hand():
    # The event at 2 comes before 3 and 5; the censoring at 3 says nothing of 5.
    y = [(1, 2.0), (0, 3.0), (1, 5.0)]
    assert harrell_c(y, [3, 2, 1]) == 1
    assert harrell_c(y, [1, 2, 3]) == 0
    assert harrell_c(y, [2, 2, 1]) == 0.75
    assert harrell_c(y, [0, 0, 0]) == 0.5


def test_of_equal_times_only_an_event_and_a_censored_one_are_compared():
    assert harrell_c([(1, 2.0), (0, 2.0)], [1, 0]) == 1
    with pytest.raises(InputError, match="no two cases can be compared"):
        harrell_c([(1, 2.0), (1, 2.0)], [1, 0])


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("tau", [None, 6.5])
@pytest.mark.parametrize("seed", range(6))
def test_unos_c_is_scikit_survivals(seed, ties, tau):
    train, y = _cohort(seed + 50, n=90, ties=ties), _cohort(seed, ties=ties)
    y = y[y["time"] <= train["time"].max() / 2]
    risk = _risk(seed, len(y), ties=ties)
    expected = sk.concordance_index_ipcw(train, y, risk, tau=tau)[0]
    assert uno_c(y, risk, train=train, tau=tau) == pytest.approx(expected, abs=1e-10)


def test_without_censoring_unos_c_is_harrells():
    y = _cohort(3, ties=True, censored=0)
    risk = _risk(3, len(y), ties=True)
    assert uno_c(y, risk) == pytest.approx(harrell_c(y, risk), abs=1e-12)


def test_an_event_after_all_of_the_training_is_an_error():
    train = [(0, 1.0), (0, 2.0)]
    with pytest.raises(InputError, match="tau="):
        uno_c([(1, 3.0), (1, 4.0)], [1, 0], train=train)


@pytest.mark.parametrize("seed", range(4))
def test_weights_are_repeated_cases(seed):
    """As a bootstrap draws them: a case of weight 3 is there three times."""
    rng = np.random.default_rng(seed)
    y, survival = _cohort(seed, n=30, ties=True), as_survival(_cohort(seed, n=30, ties=True))
    risk, weights = _risk(seed, 30, ties=True), rng.integers(0, 4, (5, 30)).astype(float)
    found = concordances(survival, risk, weights)
    for value, row in zip(found, weights.astype(int), strict=True):
        rows = np.repeat(np.arange(30), row)
        assert value == pytest.approx(harrell_c(y[rows], risk[rows]), abs=1e-12)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_the_brier_score_is_scikit_survivals(seed, ties):
    train, y = _cohort(seed + 20, n=100, ties=ties), _cohort(seed, ties=ties)
    y = y[y["time"] < train["time"].max()]
    first, last = np.quantile(y["time"], [0.1, 0.8])
    times = np.linspace(max(first, y["time"].min()), last, 9) + 1e-3
    rng = np.random.default_rng(seed)
    predicted = np.sort(rng.random((len(y), len(times))), axis=1)[:, ::-1]
    _, expected = sk.brier_score(train, y, predicted, times)
    np.testing.assert_allclose(brier_score(y, predicted, times, train=train), expected, atol=1e-12)
    whole = sk.integrated_brier_score(train, y, predicted, times)
    found = integrated_brier_score(y, predicted, times, train=train)
    assert found == pytest.approx(whole, abs=1e-12)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_the_kaplan_meier_estimate_is_that_of_two_packages(seed, ties):
    y = _cohort(seed, ties=ties)
    found = kaplan_meier(y)
    times, shares = kaplan_meier_estimator(y["event"], y["time"])
    np.testing.assert_array_equal(found.times, times)
    np.testing.assert_allclose(found.survival, shares, atol=1e-12)
    fitted = KaplanMeierFitter().fit(y["time"], y["event"])
    ends = fitted.confidence_interval_.loc[found.times].to_numpy()
    inside = (found.survival > 0) & (found.survival < 1)
    np.testing.assert_allclose(found.low[inside], ends[inside, 0], atol=1e-6)
    np.testing.assert_allclose(found.high[inside], ends[inside, 1], atol=1e-6)
    np.testing.assert_array_equal(found.at_risk, fitted.event_table.loc[found.times]["at_risk"])


def test_a_step_function_holds_from_its_time_on():
    found = kaplan_meier([(1, 2.0), (0, 3.0), (1, 5.0)])
    np.testing.assert_allclose(found.at([0, 2, 2.5, 4.9, 5, 9]), [1, 2 / 3, 2 / 3, 2 / 3, 0, 0])
    np.testing.assert_array_equal(found.at_risk_at([0, 2, 2.5, 3, 5, 5.1]), [3, 3, 2, 2, 1, 0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning:lifelines", "ignore:Starting with pandas")
@pytest.mark.parametrize("groups", [2, 3, 5])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_the_log_rank_test_is_that_of_two_packages(seed, ties, groups):
    y = _cohort(seed, n=80, ties=ties)
    labels = np.random.default_rng(seed + 7).integers(0, groups, len(y))
    found = log_rank(y, [f"group {label}" for label in labels])
    statistic, p_value = compare_survival(y, labels)
    other = multivariate_logrank_test(y["time"], labels, y["event"])
    assert found.groups == groups
    assert found.statistic == pytest.approx(statistic, abs=1e-8)
    assert found.statistic == pytest.approx(other.test_statistic, abs=1e-6)
    assert found.p_value == pytest.approx(p_value, abs=1e-10)


@pytest.mark.parametrize("degrees", range(1, 9))
def test_the_tail_of_chi_squared_is_scipys(degrees):
    from xmag.metrics.survival import _chi_squared

    for value in (0, 0.1, 1, 3.84, 20, 200):
        expected = stats.chi2.sf(value, degrees)
        assert _chi_squared(value, degrees) == pytest.approx(expected, rel=1e-9)


def test_what_scikit_survival_makes_is_taken_and_so_are_two_columns():
    y = _cohort(0, ties=True)
    table = np.column_stack([y["event"], y["time"]])
    for given in (y, table, table.tolist(), as_survival(y)):
        np.testing.assert_array_equal(as_survival(given).event, y["event"])
        np.testing.assert_array_equal(as_survival(given).time, y["time"])


@pytest.mark.parametrize(
    ("y", "words"),
    [
        ([(12.5, 1), (8, 0)], "first column is the event"),
        ([1, 2, 3], "shape"),
        ([(1, math.nan), (0, 1)], "a time of y is nan"),
        ([(1, -3.0), (0, 1)], "-3"),
        (np.array([("dead", 3.0)], dtype=[("event", "U9"), ("time", "f8")]), "event"),
        (np.zeros((2, 3)), r"\(n, 2\)"),
    ],
)
def test_other_targets_are_refused_and_the_error_says_why(y, words):
    with pytest.raises(InputError, match=words):
        as_survival(y)


def test_errors_say_what_is_missing():
    nobody = [(0, 1.0), (0, 2.0)]
    with pytest.raises(InputError, match="has an event"):
        harrell_c(nobody, [1, 2])
    with pytest.raises(InputError, match="has an event"):
        log_rank(nobody, ["a", "b"])
    with pytest.raises(InputError, match="two or more to compare"):
        log_rank([(1, 1.0), (1, 2.0)], ["a", "a"])
    with pytest.raises(InputError, match="one finite number for each"):
        harrell_c([(1, 1.0), (1, 2.0)], [1])
    with pytest.raises(InputError, match="one finite number for each"):
        harrell_c([(1, 1.0), (1, 2.0)], [1, math.nan])


@pytest.mark.parametrize("times", [[3, 2], [0.5, 2], [2, 9], []])
def test_times_without_cases_around_them_are_refused(times):
    y = [(1, 1.0), (0, 4.0), (1, 9.0)]
    with pytest.raises(InputError, match="rising times from 1 to below 9"):
        brier_score(y, np.full((3, len(times)), 0.5), times, train=y)


def test_the_share_of_right_pairs_is_what_brute_force_counts():
    y, risk = _cohort(9, n=25, ties=True), _risk(9, 25, ties=True)
    right = pairs = 0.0
    for (one, time), (other, later) in itertools.permutations(
        zip(zip(y["event"], risk, strict=True), y["time"], strict=True), 2
    ):
        if one[0] and (later > time or (later == time and not other[0])):
            pairs += 1
            right += 0.5 if one[1] == other[1] else one[1] > other[1]
    assert harrell_c(y, risk) == pytest.approx(right / pairs, abs=1e-12)
