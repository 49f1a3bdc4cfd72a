"""Metrics against tables done by hand, published values, brute force and scikit-learn."""

import itertools
import math
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
from scipy.stats import rankdata
from sklearn import metrics as sk

from xmag import metrics
from xmag.errors import InputError
from xmag.metrics.labels import Cases
from xmag.metrics.ranking import mean_roc

GRADES = ("normal", "benign", "suspect", "cancer")
BOYD = np.array([[21, 12, 0, 0], [4, 17, 1, 0], [3, 9, 15, 2], [0, 0, 0, 1]])
"""Two radiologists on 85 xeromammograms (Boyd et al. 1982; the example of Stata's `kap`)."""


def _from_table(table: np.ndarray, names: tuple[str, ...]) -> tuple[list[str], list[str]]:
    pairs = [
        (names[row], names[column])
        for row, column in np.ndindex(*table.shape)
        for _ in range(table[row, column])
    ]
    return [a for a, _ in pairs], [b for _, b in pairs]


def _random_cases(rng: np.random.Generator, *, ties: bool) -> tuple[int, np.ndarray, np.ndarray]:
    classes = int(rng.integers(2, 6))
    y = np.concatenate([np.arange(classes), rng.integers(0, classes, rng.integers(5, 60))])
    scores = rng.dirichlet(np.ones(classes), len(y))
    if ties:  # to sixteenths, and still summing to exactly 1
        parts = rng.multinomial(16, np.ones(classes) / classes, size=len(y))
        scores = parts / 16
    return classes, y, scores


def test_a_table_done_by_hand() -> None:
    y_true = ["a"] * 4 + ["b"] * 4 + ["c"] * 2
    y_pred = ["a", "a", "a", "b", "b", "b", "c", "c", "c", "a"]
    table = [[3, 1, 0], [0, 2, 2], [1, 0, 1]]
    np.testing.assert_array_equal(metrics.confusion_matrix(y_true, y_pred), table)
    assert metrics.accuracy(y_true, y_pred) == pytest.approx(0.6, abs=1e-12)
    recalls = Fraction(3, 4) + Fraction(2, 4) + Fraction(1, 2)
    assert metrics.balanced_accuracy(y_true, y_pred) == pytest.approx(float(recalls / 3), abs=1e-12)
    f1 = (Fraction(6, 8), Fraction(4, 7), Fraction(2, 5))
    weighted = (4 * f1[0] + 4 * f1[1] + 2 * f1[2]) / 10
    assert metrics.weighted_f1(y_true, y_pred) == pytest.approx(float(weighted), abs=1e-12)
    # Costs 1 for neighbours and 4 for a and c; totals of rows 4 4 2, of columns 4 3 3.
    observed = 1 * (1 + 0 + 2 + 0) + 4 * (0 + 1)
    expected = Fraction(1 * (4 * 3 + 4 * 4 + 4 * 3 + 2 * 3) + 4 * (4 * 3 + 2 * 4), 10)
    kappa = metrics.quadratic_kappa(y_true, y_pred, classes=["a", "b", "c"])
    assert kappa == pytest.approx(float(1 - observed / expected), abs=1e-12)


def test_kappa_of_the_published_table_of_radiologists() -> None:
    y_true, y_pred = _from_table(BOYD, GRADES)
    kappa = metrics.quadratic_kappa(y_true, y_pred, classes=GRADES)
    assert kappa == pytest.approx(0.6714, abs=5e-5)  # Stata [R] kappa, kap rada radb, wgt(w2)
    assert metrics.accuracy(y_true, y_pred) == pytest.approx(0.6353, abs=5e-5)


def test_auroc_of_the_published_ratings_of_ct_images() -> None:
    normal, abnormal = (33, 6, 6, 11, 2), (3, 2, 2, 11, 33)
    y = [False] * sum(normal) + [True] * sum(abnormal)
    ratings = [r for counts in (normal, abnormal) for r in range(5) for _ in range(counts[r])]
    # Hanley and McNeil 1982, Radiology 143, 29-36, table I and page 31.
    assert metrics.auroc(y, np.array(ratings)) == pytest.approx(0.893, abs=5e-4)


def test_values_of_the_scikit_learn_documentation() -> None:
    y_true = ["cat", "dog", "pig", "cat", "dog", "pig"]
    y_pred = ["cat", "pig", "dog", "cat", "cat", "dog"]
    assert metrics.weighted_f1(y_true, y_pred) == pytest.approx(4 / 15, abs=1e-12)
    assert metrics.balanced_accuracy([0, 1, 0, 0, 1, 0], [0, 1, 0, 0, 0, 1]) == 0.625
    assert metrics.auroc_ovr([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8]) == 0.75


def test_one_vs_one_by_hand() -> None:
    y = ["a", "a", "b", "b", "c", "c"]
    scores = np.array(
        [[0.8, 0.1, 0.1], [0.4, 0.4, 0.2], [0.4, 0.5, 0.1],
         [0.1, 0.6, 0.3], [0.6, 0.2, 0.2], [0.2, 0.4, 0.4]]
    )  # fmt: skip
    # In order, of 4 pairs each: a over b by the scores of a, b over a by those of b, and so on.
    in_order = {"ab": 3.5, "ba": 4, "ac": 3, "ca": 3.5, "bc": 4, "cb": 3}
    assert metrics.auroc_ovo(y, scores) == pytest.approx(sum(in_order.values()) / 24, abs=1e-12)
    # Of 8 pairs: a class over both others.
    one_vs_rest = (6.5 + 8 + 6.5) / 24
    assert metrics.auroc_ovr(y, scores) == pytest.approx(one_vs_rest, abs=1e-12)


@pytest.mark.parametrize("seed", range(100))
def test_decisions_equal_scikit_learn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    classes, y, _ = _random_cases(rng, ties=False)
    p = np.where(rng.random(len(y)) < 0.5, y, rng.integers(0, classes, len(y)))
    order = list(range(classes))
    pairs = [
        (metrics.accuracy(y, p), sk.accuracy_score(y, p)),
        (metrics.balanced_accuracy(y, p), sk.balanced_accuracy_score(y, p)),
        (metrics.weighted_f1(y, p), sk.f1_score(y, p, average="weighted", zero_division=0)),
        (
            metrics.quadratic_kappa(y, p, classes=order),
            sk.cohen_kappa_score(y, p, labels=order, weights="quadratic"),
        ),
    ]
    for ours, theirs in pairs:
        assert ours == pytest.approx(float(theirs), abs=1e-12)
    np.testing.assert_array_equal(metrics.confusion_matrix(y, p), sk.confusion_matrix(y, p))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(60))
def test_scores_equal_scikit_learn_with_and_without_ties(seed: int, ties: bool) -> None:
    classes, y, scores = _random_cases(np.random.default_rng(seed), ties=ties)
    theirs = scores[:, 1] if classes == 2 else scores
    for ours, kind in ((metrics.auroc_ovr, "ovr"), (metrics.auroc_ovo, "ovo")):
        expected = sk.roc_auc_score(y, theirs, multi_class=kind, average="macro")
        assert ours(y, scores) == pytest.approx(float(expected), abs=1e-12)
    place = seed % classes
    curve = metrics.roc_curve(y, scores, positive=place)
    fpr, tpr, thresholds = sk.roc_curve(y == place, scores[:, place], drop_intermediate=False)
    np.testing.assert_allclose(curve.fpr, fpr, atol=1e-12)
    np.testing.assert_allclose(curve.tpr, tpr, atol=1e-12)
    np.testing.assert_array_equal(curve.thresholds, thresholds)
    area = np.trapezoid(curve.tpr, curve.fpr)
    assert metrics.auroc(y, scores, positive=place) == pytest.approx(float(area), abs=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_one_vs_one_is_equation_7_of_hand_and_till(seed: int) -> None:
    classes, y, scores = _random_cases(np.random.default_rng(seed), ties=True)

    def a_hat(i: int, j: int) -> float:  # equation 3: (S0 - n0 (n0 + 1) / 2) / (n0 n1)
        both = (y == i) | (y == j)
        ranks = rankdata(scores[both, i])[y[both] == i]
        n0, n1 = (y == i).sum(), (y == j).sum()
        return float((ranks.sum() - n0 * (n0 + 1) / 2) / (n0 * n1))

    pairs = itertools.combinations(range(classes), 2)
    total = sum((a_hat(i, j) + a_hat(j, i)) / 2 for i, j in pairs)
    expected = 2 * total / (classes * (classes - 1))
    assert metrics.auroc_ovo(y, scores) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_within_compares_pairs_of_the_same_fold_only(seed: int) -> None:
    rng = np.random.default_rng(seed)
    y, folds = rng.integers(0, 2, 40), rng.integers(0, 4, 40)
    scores = rng.integers(0, 6, 40) + folds  # each fold with a scale of its own
    in_order = pairs = 0.0
    for a, b in itertools.product(range(40), repeat=2):
        if y[a] == 1 and y[b] == 0 and folds[a] == folds[b]:
            pairs += 1
            in_order += 1.0 if scores[a] > scores[b] else 0.5 * (scores[a] == scores[b])
    found = metrics.auroc(y, scores, within=[f"fold {f}" for f in folds])
    assert found == pytest.approx(in_order / pairs, abs=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_the_mean_curve_is_that_of_scikit_learn_in_each_fold(seed: int) -> None:
    rng = np.random.default_rng(seed)
    y, folds, weights = (rng.integers(0, n, 40) for n in (2, 4, 4))
    scores = rng.random((40, 2))  # of no ties, where scikit-learn drops points of no weight
    cases = Cases(truth=y, classes=(0, 1), scores=scores, within=folds)
    grid = np.linspace(0, 1, 51) + 1e-6  # beside the steps
    expected, total = np.zeros(51), 0.0
    for rows in (folds == fold for fold in range(4)):
        positive, negative = (weights[rows & (y == label)].sum() for label in (1, 0))
        if pairs := positive * negative:
            fpr, tpr, _ = sk.roc_curve(
                y[rows], scores[rows, 1], sample_weight=weights[rows], drop_intermediate=False
            )
            expected += pairs * np.interp(grid, fpr, tpr)
            total += pairs
    _, found = mean_roc(cases, np.stack([weights, 0 * y]), 1, grid)
    np.testing.assert_allclose(found[0], expected / total, atol=1e-12)
    assert np.isnan(found[1]).all()
    fpr, tpr = mean_roc(cases, None, 1)
    area = np.trapezoid(np.append(0.0, tpr), np.append(0.0, fpr))
    assert area == pytest.approx(metrics.auroc(y, scores, within=folds), abs=1e-6)


def test_labels_of_any_hashable_kind_in_a_given_order() -> None:
    low, high = ("grade", 1), frozenset({"grade 2"})
    y, p = [low, high, high, low], [low, high, low, low]
    assert metrics.balanced_accuracy(y, p, classes=[low, high]) == 0.75
    assert metrics.auroc([True, False, True], [0.9, 0.1, 0.4]) == 1.0
    scores = [0.2, 0.9, 0.6, 0.4]
    assert metrics.auroc_ovr(y, scores, classes=[low, high]) == 1.0
    assert metrics.auroc_ovr(y, scores, classes=[high, low]) == 0.0
    with pytest.raises(InputError, match=r"frozenset, tuple cannot be sorted; .* classes="):
        metrics.balanced_accuracy(y, p)


def test_the_order_of_classes_decides_kappa() -> None:
    y, p = ["low", "mid", "high"] * 3, ["low", "mid", "mid"] * 3
    by_order = metrics.quadratic_kappa(y, p, classes=["low", "mid", "high"])
    assert by_order != pytest.approx(metrics.quadratic_kappa(y, p, classes=["mid", "low", "high"]))
    with pytest.raises(InputError, match="needs the order of the classes"):
        metrics.quadratic_kappa(y, p)


def test_a_grade_that_nobody_has_keeps_its_neighbours_apart() -> None:
    y, p = [0, 0, 2, 2, 3], [0, 2, 2, 0, 3]
    expected = sk.cohen_kappa_score(y, p, labels=[0, 1, 2, 3], weights="quadratic")
    assert metrics.quadratic_kappa(y, p, classes=range(4)) == pytest.approx(expected, abs=1e-12)
    assert metrics.quadratic_kappa(y, p, classes=[0, 2, 3]) != pytest.approx(expected)


def test_what_is_answered_where_a_class_is_missing() -> None:
    y, p = ["a", "a", "b"], ["a", "c", "b"]
    assert metrics.balanced_accuracy(y, p) == 0.75  # the mean of a and b; nobody has c
    assert metrics.balanced_accuracy(["a", "a"], ["a", "b"]) == 0.5
    assert metrics.weighted_f1(y, p) == pytest.approx((2 * 2 / 3 + 1) / 3)
    assert metrics.quadratic_kappa(["a"] * 3, ["a", "a", "b"], classes=["a", "b"]) == 0.0
    with pytest.raises(InputError, match="have and were given the class 'a'"):
        metrics.quadratic_kappa(["a"] * 3, ["a"] * 3, classes=["a", "b"])
    scores = np.full((3, 3), 1 / 3)
    for metric in (metrics.auroc_ovr, metrics.auroc_ovo):
        with pytest.raises(InputError, match="no case is of class 'c'"):
            metric(y, scores, classes=["a", "b", "c"])
    with pytest.raises(InputError, match="one class only, 'a'"):
        metrics.auroc_ovr(["a", "a"], [0.1, 0.2])
    with pytest.raises(InputError, match="0 of 2 cases are of class 'b'"):
        metrics.roc_curve(["a", "a"], [0.1, 0.2], classes=["a", "b"])
    with pytest.raises(InputError, match="the same value of within"):
        metrics.auroc_ovr(["a", "b"], [0.1, 0.2], within=[0, 1])


def test_constant_scores_tell_nothing() -> None:
    y = [0, 1, 2, 0, 1, 2, 2]
    assert metrics.auroc_ovr(y, np.ones((7, 3))) == 0.5
    assert metrics.auroc_ovo(y, np.ones((7, 3))) == 0.5
    curve = metrics.roc_curve([0, 1, 1], [3.0, 3.0, 3.0])
    np.testing.assert_array_equal([curve.fpr, curve.tpr], [[0, 1], [0, 1]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.accuracy([], []), "empty"),
        (lambda: metrics.accuracy([0, 1], [0]), "1 entries for 2 cases"),
        (lambda: metrics.accuracy([0, None], [0, 1]), r"y_true\[1\] is None, a missing value"),
        (lambda: metrics.accuracy([0.0, math.nan], [0, 1]), r"y_true\[1\] is nan, a missing"),
        (lambda: metrics.accuracy([[0], [1]], [0, 1]), "cannot be hashed"),
        (lambda: metrics.accuracy(np.zeros((2, 2)), [0, 1]), "one label for each case"),
        (lambda: metrics.accuracy("ab", ["a", "b"]), "one label for each case"),
        (lambda: metrics.accuracy([0, 1], [0, 2], classes=[0, 1]), "y_pred has the label 2"),
        (lambda: metrics.accuracy([0, 2], [0, 1], classes=[0, 1]), "y_true has the label 2"),
        (lambda: metrics.accuracy([0, 1], [0, 1], classes=[0, 1, 1]), "1 more than once"),
        (lambda: metrics.auroc_ovr([0, 1], [0.1, math.nan]), "nan in row 1"),
        (lambda: metrics.auroc_ovr([0, 1], [[0.1, 1], [1, math.inf]]), "inf in row 1 for class 1"),
        (lambda: metrics.auroc_ovr([0, 1], [0.1, 0.2, 0.3]), "3 entries for 2 cases"),
        (lambda: metrics.auroc_ovr([0, 1, 2], [0.1, 0.2, 0.3]), r"expected \(3, 3\)"),
        (lambda: metrics.auroc_ovr([0, 1], ["a", "b"]), "not numbers"),
        (lambda: metrics.auroc([0, 1, 2], np.eye(3)), "say which one"),
        (lambda: metrics.auroc([0, 1, 2], np.eye(3), positive=4), "not one of"),
        (lambda: metrics.auroc_ovr([0, 1], [1, 2], within=[0]), "within has 1 entries"),
    ],
)
def test_operands_that_do_not_fit_are_named(call: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()  # type: ignore[operator]


def test_metrics_need_numpy_alone() -> None:
    code = (
        "import sys, xmag.metrics;"
        "print([m for m in ('torch', 'sklearn', 'scipy', 'matplotlib', 'PIL') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("seed", range(5))
def test_average_precision_is_that_of_scikit_learn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    y, within = rng.integers(0, 2, 60), rng.integers(0, 2, 60)
    for scores in (rng.normal(size=60), rng.integers(0, 5, 60).astype(float)):
        found = metrics.average_precision(y, scores)
        assert found == pytest.approx(sk.average_precision_score(y, scores), abs=1e-12)
        parts = [sk.average_precision_score(y[within == w], scores[within == w]) for w in (0, 1)]
        expected = np.average(parts, weights=[y[within == w].sum() for w in (0, 1)])
        found = metrics.average_precision(y, scores, within=within)
        assert found == pytest.approx(expected, abs=1e-12)
    with pytest.raises(InputError, match="60 of 60 cases are of class 1"):
        metrics.average_precision([1] * 60, rng.normal(size=60), classes=[0, 1])
