"""cross_validate against scikit-learn used by hand, and what it refuses."""

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn import metrics as sk
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from support.cohorts import NearestMeanOfBags, as_bags, cohort

from xmag import metrics
from xmag.bag import FeatureBag
from xmag.errors import InputError, MissingExtraError, XmagWarning
from xmag.evaluate import Folds, Report, cross_validate

_THREE = ("grade 1", "grade 2", "grade 3")


def _pairs(folds: Folds) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(np.array(split.train), np.array(split.test)) for split in folds.splits]


def test_predictions_are_those_of_scikit_learn_by_hand() -> None:
    x, y, groups = cohort(0, names=_THREE)
    report = cross_validate(LogisticRegression(C=0.3), x, y, groups=groups, resamples=50)
    assert report.folds is not None
    scores, decisions = np.zeros((len(y), 3)), np.empty(len(y), dtype=object)
    for train, test in _pairs(report.folds):
        model = LogisticRegression(C=0.3).fit(x[train], np.array(y)[train])
        scores[test], decisions[test] = model.predict_proba(x[test]), model.predict(x[test])
    result = report.results[0]
    np.testing.assert_array_equal(result.scores, scores[result.rows])
    named = [report.classes[place] for place in result.predicted]
    assert named == decisions[result.rows].tolist()
    assert [report.classes[place] for place in result.truth] == [y[row] for row in result.rows]


def test_metrics_are_those_of_scikit_learn_by_hand() -> None:
    x, y, groups = cohort(1, names=_THREE)
    model = LogisticRegression()
    report = cross_validate(model, x, y, groups=groups, classes=_THREE, ordered=True, resamples=50)
    result, folds = report.results[0], _pairs(report.folds or Folds.leave_one_group_out(groups))
    truth, decided = result.truth, result.predicted
    by_hand = {
        "accuracy": sk.accuracy_score(truth, decided),
        "balanced_accuracy": sk.balanced_accuracy_score(truth, decided),
        "weighted_f1": sk.f1_score(truth, decided, average="weighted"),
        "quadratic_kappa": sk.cohen_kappa_score(truth, decided, weights="quadratic"),
    }
    for name, value in by_hand.items():
        assert report.estimate(name).value == pytest.approx(float(value), abs=1e-12)
    for name, scoring in (("auroc_ovr", "roc_auc_ovr"), ("auroc_ovo", "roc_auc_ovo")):
        in_folds = cross_val_score(model, x, y, cv=folds, scoring=scoring)
        assert result.per_split(name) == pytest.approx(in_folds.tolist(), abs=1e-12)
        assert report.estimate(name).value == pytest.approx(in_folds.mean(), abs=0.02)


def test_auroc_is_the_mean_over_folds_weighted_by_their_pairs() -> None:
    x, y, groups = cohort(2)
    report = cross_validate(LogisticRegression(), x, y, groups=groups, folds=4, resamples=50)
    values, pairs = [], []
    for train, test in _pairs(report.folds or Folds.leave_one_group_out(groups)):
        positive = np.array(y)[test] == "LUSC"
        model = LogisticRegression().fit(x[train], np.array(y)[train])
        values.append(sk.roc_auc_score(positive, model.predict_proba(x[test])[:, 1]))
        pairs.append(positive.sum() * (~positive).sum())
    expected = np.average(values, weights=pairs)
    assert report.estimate("auroc_ovr").value == pytest.approx(expected, abs=1e-12)
    assert report.estimate("auroc_ovo").value == pytest.approx(expected, abs=1e-12)


def test_repeats_are_averaged_and_patients_drawn_once_for_all() -> None:
    x, y, groups = cohort(3)
    twice = cross_validate(LogisticRegression(), x, y, groups=groups, repeats=2)
    result = twice.results[0]
    assert len(result.rows) == 2 * len(y) == 2 * result.cases
    in_repeat = []
    for repeat in (0, 1):
        rows = result.repeats == repeat
        in_repeat.append(metrics.balanced_accuracy(result.truth[rows], result.predicted[rows]))
    estimate = twice.estimate("balanced_accuracy")
    assert estimate.value == pytest.approx(np.mean(in_repeat), abs=1e-12)
    # The draws are of patients, so repeats do not narrow the interval as more patients would.
    once = cross_validate(LogisticRegression(), x, y, groups=groups).estimate("balanced_accuracy")
    widths = [e.interval.high - e.interval.low for e in (estimate, once) if e.interval]
    assert widths[0] == pytest.approx(widths[1], rel=0.25)


def test_the_interval_is_that_of_the_metrics_module() -> None:
    x, y, groups = cohort(4)
    report = cross_validate(
        LogisticRegression(), x, y, groups=groups, level=0.9, resamples=300, random_state=5
    )
    result = report.results[0]
    in_order = np.argsort(result.rows)
    expected = metrics.interval(
        metrics.auroc_ovr,
        result.truth[in_order],
        result.scores[in_order],
        groups=groups,
        within=result.splits[in_order],
        level=0.9,
        resamples=300,
        random_state=5,
    )
    assert report.estimate("auroc_ovr").interval == expected


def test_labels_without_information_have_an_auroc_of_one_half() -> None:
    found = []
    for seed in range(60):
        x, y, groups = cohort(seed, patients=40, separation=0.0, most_slides=2)
        report = cross_validate(
            LogisticRegression(), x, y, groups=groups, resamples=1, random_state=seed
        )
        found.append(report.estimate("auroc_ovr").value)
    assert np.mean([value for value in found if value is not None]) == pytest.approx(0.5, abs=0.03)


def test_the_estimator_is_left_alone_and_runs_are_reproducible() -> None:
    x, y, groups = cohort(5)
    model = LogisticRegression()
    before = np.random.get_state()[1].copy()  # noqa: NPY002 (the global state, to be left alone)
    first = cross_validate(model, x, y, groups=groups, resamples=50)
    assert not hasattr(model, "classes_")
    assert first == cross_validate(clone(model), x, y, groups=groups, resamples=50)
    assert first == cross_validate(model, x, y, groups=groups, folds=first.folds, resamples=50)
    assert first != cross_validate(model, x, y, groups=groups, resamples=50, random_state=1)
    np.testing.assert_array_equal(before, np.random.get_state()[1])  # noqa: NPY002


def test_bags_and_paths_serve_and_groups_go_to_a_fit_that_takes_them(tmp_path: Path) -> None:
    x, y, groups = cohort(6, patients=20)
    bags = as_bags(x)
    paths = [str(tmp_path / f"{n}.h5") for n in range(len(bags))]
    for bag, path in zip(bags, paths, strict=True):
        bag.save(path)
    NearestMeanOfBags.fitted.clear()
    options: dict[str, Any] = {"groups": groups, "folds": 3, "resamples": 20}
    of_bags = cross_validate(NearestMeanOfBags(scale=0.5), bags, y, **options)
    assert of_bags == cross_validate(NearestMeanOfBags(scale=0.5), paths, y, **options)
    assert of_bags.folds is not None
    for model, split in zip(NearestMeanOfBags.fitted, of_bags.folds.splits, strict=False):
        assert model.groups_.tolist() == [groups[row] for row in split.train]
        assert model.scale == 0.5
    assert of_bags.settings["parameters"] == {"scale": 0.5}
    # It orders classes by first appearance; the report has them sorted.
    assert of_bags.classes == ("LUAD", "LUSC")
    assert (of_bags.estimate("auroc_ovr").value or 0) > 0.6


@pytest.mark.parametrize(
    "names", [(("a", 1), ("b", 2)), (2.0, 1.0), (7, "seven"), (True, False), (2, 1)]
)
@pytest.mark.parametrize("model", [LogisticRegression(), NearestMeanOfBags()])
def test_labels_may_be_of_any_hashable_kind(names: tuple[Any, Any], model: Any) -> None:
    x, y, groups = cohort(7, patients=24, names=names)
    texts = ["zero" if label == names[0] else "one" for label in y]
    data = as_bags(x) if isinstance(model, NearestMeanOfBags) else x
    options: dict[str, Any] = {"groups": groups, "folds": 3, "resamples": 20}
    report = cross_validate(model, data, y, classes=names, **options)
    expected = cross_validate(model, data, texts, classes=["zero", "one"], **options)
    assert report.classes == names
    for ours, theirs in zip(report.results, expected.results, strict=True):
        np.testing.assert_allclose(ours.scores, theirs.scores, atol=1e-6)
        np.testing.assert_array_equal(ours.truth, theirs.truth)
        assert ours.estimates["balanced_accuracy"] == theirs.estimates["balanced_accuracy"]
    assert Report.from_json(report.to_json()) == report


def test_pipelines_and_searches_serve() -> None:
    x, y, groups = cohort(8, patients=30, separation=2.0)
    search = GridSearchCV(
        make_pipeline(StandardScaler(), LogisticRegression()),
        {"logisticregression__C": [0.1, 1.0]},
        cv=2,
    )
    report = cross_validate(search, x, y, groups=groups, folds=3, resamples=20)
    assert (report.estimate("auroc_ovr").value or 0) > 0.6
    assert report.settings["estimator"] == "GridSearchCV"


def test_leaving_one_patient_out_compares_scores_within_patients() -> None:
    x = np.random.default_rng(0).normal(size=(24, 3))
    y, groups = ["a", "b"] * 12, [f"p{n // 6}" for n in range(24)]
    report = cross_validate(
        LogisticRegression(), x, y, groups=groups, folds=Folds.leave_one_group_out(groups)
    )
    assert len(report.results[0].per_split("auroc_ovr")) == 4
    alone = range(24)
    one_each = cross_validate(
        LogisticRegression(), x, y, groups=alone, folds=Folds.leave_one_group_out(alone)
    )
    estimate = one_each.estimate("auroc_ovr")
    assert estimate.value is None
    assert "no split has cases of two classes" in estimate.reason
    assert one_each.estimate("accuracy").value is not None
    assert "no split has cases of two classes" in str(one_each)


def test_a_patient_on_both_sides_is_refused() -> None:
    x, y, _ = cohort(9, patients=20, most_slides=1)
    groups = [f"p{n}" for n in range(20)]
    folds = Folds.stratified(y, groups=groups, folds=2)
    row, other = folds.splits[0].train[0], folds.splits[0].test[0]
    groups[row] = groups[other]
    with pytest.raises(InputError, match=f"patient '{groups[other]}' is on both sides"):
        cross_validate(LogisticRegression(), x, y, groups=groups, folds=folds)


def test_identical_features_on_both_sides_are_refused(tmp_path: Path) -> None:
    x, y, groups = cohort(10, patients=20, most_slides=1)
    folds = Folds.stratified(y, groups=groups, folds=2)
    row, other = folds.splits[0].train[0], folds.splits[0].test[0]
    x[row] = x[other]
    bags: list[Any] = as_bags(x)
    mixed = list(bags)
    mixed[row].save(tmp_path / "slide.safetensors")
    mixed[row] = str(tmp_path / "slide.safetensors")
    for model, data in (
        (LogisticRegression(), x),
        (NearestMeanOfBags(), bags),
        (NearestMeanOfBags(), mixed),
    ):
        with pytest.raises(InputError, match="has the same features as training case"):
            cross_validate(model, data, y, groups=groups, folds=folds)
    with pytest.warns(XmagWarning, match="flatters") as caught:
        cross_validate(
            LogisticRegression(), x, y, groups=groups, folds=folds, resamples=5,
            on_identical="warn",
        )  # fmt: skip
    assert caught[0].filename == __file__
    together = list(groups)
    together[row] = together[other]
    cross_validate(LogisticRegression(), x, y, groups=together, folds=2, resamples=5)


def test_bags_without_tiles_are_not_identical() -> None:
    _, y, groups = cohort(11, patients=12, most_slides=1)
    empty = FeatureBag(np.zeros((0, 4), np.float32), np.zeros((0, 2)))

    class Constant(NearestMeanOfBags):
        def fit(self, X: Any, y: Any, groups: Any = None) -> "Constant":  # noqa: N803
            self.classes_ = np.unique(y)
            return self

        def predict_proba(self, X: Any) -> np.ndarray:  # noqa: N803
            return np.full((len(X), 2), 0.5)

    report = cross_validate(Constant(), [empty] * 12, y, groups=groups, folds=2, resamples=5)
    assert report.estimate("auroc_ovr").value == 0.5


def test_missing_groups_give_a_warning_that_points_here() -> None:
    x, y, _ = cohort(12, patients=20)
    with pytest.warns(XmagWarning, match="patients are not separated") as caught:
        report = cross_validate(LogisticRegression(), x, y, folds=2, resamples=5)
    assert caught[0].filename == __file__
    assert report.settings["patients_separated"] is False
    assert len(np.unique(report.results[0].patients)) == len(y)


def _bad_scores(value: float) -> Any:
    class Bad(LogisticRegression):
        def predict_proba(self, X: Any) -> np.ndarray:  # noqa: N803
            scores = super().predict_proba(X)
            scores[1, 0] = value
            return np.asarray(scores)

    return Bad()


_X, _Y, _G = cohort(13, patients=12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"estimator": _bad_scores(np.nan)}, "the cohort have nan in row 1 for class 'LUAD'"),
        ({"estimator": _bad_scores(np.inf)}, "have inf in row 1"),
        ({"estimator": LinearSVC()}, "LinearSVC has no predict_proba"),
        ({"estimator": object()}, "object has no fit"),
        ({"y": ["LUAD"] * len(_Y)}, "one class only: all .* cases are 'LUAD'"),
        ({"y": _Y[:-1]}, f"y has {len(_Y) - 1} entries for {len(_Y)} cases"),
        ({"y": [None, *_Y[1:]]}, r"y\[0\] is None"),
        ({"y": ["N/A", *_Y[1:]]}, r"y\[0\] is 'N/A', a missing"),
        ({"y": [f"{_Y[0]} ", *_Y[1:]]}, r"y\[0\] is '.* ', with blanks around it"),
        ({"y": np.linspace(0, 1, len(_Y))}, "y holds .*not whole.*MILRegressor"),
        ({"groups": [f" {_G[0]}", *_G[1:]]}, r"groups\[0\] is ' .*', with blanks"),
        ({"random_state": -1}, "random_state is -1"),
        ({"groups": _G[:-1]}, "groups has"),
        ({"groups": [float("nan"), *_G[1:]]}, r"groups\[0\] is nan"),
        ({"X": 3}, "int, which has no length"),
        ({"X": [], "y": [], "groups": []}, "has no cases"),
        ({"folds": 13}, "12 patients for 13 folds"),
        ({"classes": ["LUAD"]}, "label 'LUSC', which is not in classes"),
        ({"classes": ["LUAD", "LUSC", "SCLC"]}, "no case of class 'SCLC' to fit on"),
        ({"ordered": True}, "needs the order of the classes"),
        ({"folds": Folds.stratified(["a", "b"] * 4, folds=2)}, "the folds are of 8 cases"),
        ({"folds": Folds.stratified(_Y, groups=_G, folds=2), "repeats": 2}, "repeats is 2"),
        ({"level": 95}, "level=95"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    operands = {"estimator": LogisticRegression(), "X": _X, "y": _Y, **change}
    estimator, x, y = operands.pop("estimator"), operands.pop("X"), operands.pop("y")
    options = {"groups": _G, "folds": 2, "resamples": 5, **operands}
    with pytest.raises(InputError, match=message):
        cross_validate(estimator, x, y, **options)


def test_a_training_fold_without_a_class_is_refused() -> None:
    folds = Folds.from_pairs([(range(6), range(6, 12))], samples=12)
    x = np.random.default_rng(0).normal(size=(12, 2))
    with pytest.raises(InputError, match="split 0 of the cohort: there is no case of class 'b'"):
        cross_validate(
            LogisticRegression(), x, ["a"] * 6 + ["a", "b"] * 3, groups=range(12), folds=folds
        )


def test_without_scikit_learn_the_install_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name for name in sys.modules if name.split(".")[0] == "sklearn"]:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=re.escape('pip install "xmag[evaluate]"')):
        cross_validate(NearestMeanOfBags(), as_bags(_X), _Y, groups=_G)
