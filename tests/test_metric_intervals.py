"""Bootstrap intervals: against repeated cases, a closed form, and the truth of simulations."""

import time
from collections.abc import Callable
from statistics import NormalDist

import numpy as np
import pytest
from scipy.stats import binom
from sklearn import metrics as sk

from xmag import metrics
from xmag.errors import InputError
from xmag.metrics.bootstrap import METRICS, drawn_weights
from xmag.metrics.labels import Cases


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("seed", range(5))
def test_a_weight_is_a_repeated_case(name: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    n, classes = 50, 2 + seed % 3
    y = np.concatenate([np.arange(classes), rng.integers(0, classes, n - classes)])
    predicted = rng.integers(0, classes, n)
    scores = rng.integers(0, 5, (n, classes)).astype(float)
    within = rng.integers(0, 2, n)
    cases = Cases(
        truth=y, classes=tuple(range(classes)), predicted=predicted, scores=scores, within=within
    )
    weights = next(drawn_weights(y, rng.permutation(n) // 2, resamples=20, random_state=seed))[:20]
    found = METRICS[name].values(cases, weights)
    options = {"within": within} if METRICS[name].of_scores else {}
    hats = scores if METRICS[name].of_scores else predicted
    for row, value in zip(weights.astype(int), found, strict=True):
        rows = np.repeat(np.arange(n), row)
        expected = getattr(metrics, name)(
            y[rows], hats[rows], classes=range(classes), **{k: v[rows] for k, v in options.items()}
        )
        assert value == pytest.approx(expected, abs=1e-12)


def test_the_interval_of_accuracy_is_that_of_the_binomial() -> None:
    y, p = np.zeros(80, int), np.zeros(80, int)
    y[::2], p[::2] = 1, 1
    p[:24] = 1 - y[:24]
    low, high = metrics.interval(metrics.accuracy, y, p, resamples=20_000, level=0.9)
    assert low == pytest.approx(binom.ppf(0.05, 80, 56 / 80) / 80, abs=1 / 80)
    assert high == pytest.approx(binom.ppf(0.95, 80, 56 / 80) / 80, abs=1 / 80)


def test_copies_of_a_case_add_nothing_when_they_are_of_one_patient() -> None:
    rng = np.random.default_rng(0)
    y, scores = rng.integers(0, 2, 60), rng.normal(size=60)
    once = metrics.interval(metrics.auroc_ovr, y, scores)
    rows = np.repeat(np.arange(60), 3)
    grouped = metrics.interval(
        metrics.auroc_ovr, y[rows], scores[rows], groups=[f"patient {row}" for row in rows]
    )
    assert tuple(grouped) == pytest.approx(tuple(once), abs=1e-12)
    ignored = metrics.interval(metrics.auroc_ovr, y[rows], scores[rows])
    assert ignored.high - ignored.low < 0.75 * (once.high - once.low)


def test_any_function_of_cases_has_an_interval() -> None:
    rng = np.random.default_rng(1)
    y = rng.integers(0, 2, 50)
    scores = rng.normal(y, 1.0)
    groups = rng.integers(0, 20, 50)
    ours = metrics.interval(metrics.auroc_ovr, y, scores, groups=groups, resamples=200)
    theirs = metrics.interval(sk.roc_auc_score, y, scores, groups=groups, resamples=200)
    assert tuple(ours) == pytest.approx(tuple(theirs), abs=1e-12)
    kappa = metrics.interval(
        metrics.quadratic_kappa, y, scores > 0.5, classes=[0, 1], resamples=200
    )
    assert metrics.quadratic_kappa(y, scores > 0.5, classes=[0, 1]) in kappa
    with pytest.raises(InputError, match="needs the order"):
        metrics.interval(metrics.quadratic_kappa, y, scores > 0.5)


def test_seeds_decide_and_global_random_state_stays() -> None:
    y, p = [0, 1] * 20, [0, 0, 1, 1] * 10
    before = np.random.get_state()[1].copy()  # noqa: NPY002 (the global state, to be left alone)
    first = metrics.interval(metrics.accuracy, y, p, random_state=3)
    assert first == metrics.interval(metrics.accuracy, y, p, random_state=3)
    generator = np.random.default_rng(3)
    assert first == metrics.interval(metrics.accuracy, y, p, random_state=generator)
    seeds = {metrics.interval(metrics.accuracy, y, p, random_state=s) for s in range(20)}
    assert len(seeds) > 1
    np.testing.assert_array_equal(before, np.random.get_state()[1])  # noqa: NPY002


def test_draws_that_lack_a_class_are_drawn_again() -> None:
    y = np.array([0] * 30 + [1] * 2 + [2])
    for weights, _ in zip(
        drawn_weights(y, np.arange(33), resamples=100, random_state=0), range(5), strict=False
    ):
        assert len(weights)
        totals = np.stack([weights[:, y == label].sum(1) for label in range(3)])
        assert totals.min() > 0
    found = metrics.interval(metrics.auroc_ovr, y, np.random.default_rng(0).random((33, 3)))
    assert 0 <= found.low <= found.high <= 1


def test_an_interval_that_cannot_be_is_refused() -> None:
    with pytest.raises(InputError, match="1 patient to resample"):
        metrics.interval(metrics.accuracy, [0, 1], [0, 1], groups=["a", "a"])
    with pytest.raises(InputError, match="hardly any draw of 40 patients has all 40 classes"):
        metrics.interval(metrics.accuracy, range(40), range(40))
    for options in ({"level": 95}, {"resamples": 0}, {"groups": ["a"]}):
        with pytest.raises(InputError):
            metrics.interval(metrics.accuracy, [0, 1], [0, 1], **options)  # type: ignore[arg-type]


def test_a_thousand_resamples_of_500_slides_are_fast() -> None:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 500)
    scores = rng.normal(y, 1.0)
    start = time.process_time()
    metrics.interval(metrics.auroc_ovr, y, scores, groups=np.arange(500) // 2)
    assert time.process_time() - start < 0.5  # 0.02 s on a quiet core


def _coverage(covers: Callable[[int], bool], simulations: int) -> float:
    return float(np.mean([covers(seed) for seed in range(simulations)]))


@pytest.mark.parametrize("most_slides", [1, 4])
def test_intervals_cover_the_truth_95_of_100_times(most_slides: int) -> None:
    """200 patients, AUROC 0.8. benchmarks/interval_coverage.py does it in full."""
    shift = NormalDist().inv_cdf(0.8) * 2**0.5

    def covers(seed: int, *, by_patient: bool = True) -> bool:
        rng = np.random.default_rng(seed)
        patients = np.repeat(np.arange(200), rng.integers(1, most_slides + 1, 200))
        y = rng.permutation(np.arange(200) % 2)[patients]
        alike = rng.normal(size=200)[patients] * 0.6**0.5
        scores = shift * y + alike + rng.normal(size=len(y)) * 0.4**0.5
        groups = patients if by_patient else None
        return 0.8 in metrics.interval(
            metrics.auroc_ovr, y, scores, groups=groups, resamples=400, random_state=seed
        )

    # With 400 simulations the standard error is 1.1%.
    assert 0.93 <= _coverage(covers, 400) <= 0.97
    if most_slides > 1:
        assert _coverage(lambda seed: covers(seed, by_patient=False), 100) < 0.9
