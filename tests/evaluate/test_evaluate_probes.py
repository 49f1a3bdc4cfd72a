"""Linear probe, k-NN and SimpleShot against scikit-learn used by hand."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import sklearn
import torch
from sklearn import metrics as sk
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, normalize
from support.cohorts import cohort

from xmag.errors import InputError, XmagWarning
from xmag.evaluate import (
    LinearProbe,
    NearestNeighbours,
    Report,
    SimpleShot,
    cross_validate,
    knn,
    linear_probe,
    probe,
    simpleshot,
)

_NAMES = ("tumour", "stroma", "necrosis")
_TRAIN, _TEST = cohort(0, names=_NAMES), cohort(1, names=_NAMES, patients=40)
_PROBES: list[tuple[Any, Any]] = [
    ("linear", LinearProbe()),
    ("knn", NearestNeighbours()),
    ("simpleshot", SimpleShot()),
]


def _report(method: Any, **options: Any) -> Report:
    options = {"groups": _TEST.groups, "resamples": 30, **options}
    return probe(_TRAIN.x, _TRAIN.y, _TEST.x, _TEST.y, method=method, **options)


def test_the_linear_probe_is_that_of_scikit_learn_by_hand() -> None:
    # Patho-Bench: LogisticRegression(C=embedding_dim * num_classes / 100); UNI's cost is the same.
    model = LogisticRegression(C=6 * 3 / 100, max_iter=1000).fit(_TRAIN.x, _TRAIN.y)
    report = _report("linear")
    result = report.results[0]
    np.testing.assert_allclose(result.scores, model.predict_proba(_TEST.x), atol=1e-12)
    assert report.classes == tuple(model.classes_)
    decided, truth = model.predict(_TEST.x), np.array(_TEST.y)
    expected = {
        "balanced_accuracy": sk.balanced_accuracy_score(truth, decided),
        "weighted_f1": sk.f1_score(truth, decided, average="weighted"),
        "accuracy": sk.accuracy_score(truth, decided),
        "auroc_ovr": sk.roc_auc_score(truth, model.predict_proba(_TEST.x), multi_class="ovr"),
        "auroc_ovo": sk.roc_auc_score(truth, model.predict_proba(_TEST.x), multi_class="ovo"),
    }
    for name, value in expected.items():
        assert report.estimate(name).value == pytest.approx(float(value), abs=1e-12)
    assert report.settings["C"] == 0.18
    assert report.settings["iterations"] == int(model.n_iter_[0])


def test_a_pipeline_with_routing_scores_as_without() -> None:
    pipeline = make_pipeline(FunctionTransformer(), LinearProbe())
    expected = cross_val_score(pipeline, _TRAIN.x, _TRAIN.y)
    with sklearn.config_context(enable_metadata_routing=True):
        np.testing.assert_array_equal(cross_val_score(pipeline, _TRAIN.x, _TRAIN.y), expected)
    weights = np.arange(len(_TEST.y)) + 0.5
    model = LinearProbe().fit(_TRAIN.x, _TRAIN.y)
    weighed = sk.accuracy_score(_TEST.y, model.predict(_TEST.x), sample_weight=weights)
    assert model.score(_TEST.x, _TEST.y, sample_weight=weights) == pytest.approx(weighed)


def test_two_classes_and_half_precision_are_taken_as_scikit_learn_takes_them() -> None:
    train, test = cohort(2), cohort(3)
    for dtype in (np.float32, np.float64):
        x, test_x = train.x.astype(dtype), test.x.astype(dtype)
        model = LogisticRegression(C=6 * 2 / 100, max_iter=1000).fit(x, train.y)
        probe = LinearProbe().fit(x, train.y)
        np.testing.assert_allclose(
            probe.predict_proba(test_x), model.predict_proba(test_x), atol=1e-12
        )
        assert probe.predict(test_x).tolist() == model.predict(test_x).tolist()
        assert probe.score(test_x, test.y) == model.score(test_x, test.y)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("k", [1, 20])
def test_knn_is_that_of_scikit_learn_by_hand(metric: Any, center: bool, k: int) -> None:
    mean = _TRAIN.x.mean(0) * center
    model = KNeighborsClassifier(n_neighbors=k, metric=metric).fit(_TRAIN.x - mean, _TRAIN.y)
    report = _report("knn", k=k, metric=metric, center=center)
    expected = model.predict_proba(_TEST.x - mean)
    np.testing.assert_allclose(report.results[0].scores, expected, atol=1e-12)
    decided = sk.balanced_accuracy_score(_TEST.y, model.predict(_TEST.x - mean))
    assert report.estimate("balanced_accuracy").value == pytest.approx(float(decided), abs=1e-12)


def test_simpleshot_is_the_nearest_centroid_of_centred_directions() -> None:
    mean = _TRAIN.x.mean(0)
    model = NearestCentroid().fit(normalize(_TRAIN.x - mean), _TRAIN.y)
    result = _report("simpleshot").results[0]
    decided = [result.classes[place] for place in result.predicted]
    assert decided == model.predict(normalize(_TEST.x - mean)).tolist()
    queries = normalize(_TEST.x - mean)
    squared = ((queries[:, None] - model.centroids_) ** 2).sum(2)
    odds = np.exp(-squared)
    np.testing.assert_allclose(result.scores, odds / odds.sum(1, keepdims=True), atol=1e-12)


@pytest.mark.parametrize(("method", "estimator"), _PROBES)
def test_function_and_estimator_agree(method: Any, estimator: Any) -> None:
    fitted = clone(estimator).fit(_TRAIN.x, _TRAIN.y)
    scores = _report(method).results[0].scores
    np.testing.assert_array_equal(scores, fitted.predict_proba(_TEST.x))


@pytest.mark.parametrize(
    ("alias", "method"), [(linear_probe, "linear"), (knn, "knn"), (simpleshot, "simpleshot")]
)
def test_an_alias_is_the_probe_of_its_method(alias: Callable[..., Report], method: Any) -> None:
    options: dict[str, Any] = {"k": 3} if method == "knn" else {}
    assert alias(**_changed(**options)) == _report(method, resamples=5, **options)


@pytest.mark.parametrize(("_method", "estimator"), _PROBES)
def test_probes_are_estimators_of_scikit_learn(_method: Any, estimator: Any) -> None:
    assert clone(estimator).get_params() == estimator.get_params()
    values = cross_val_score(estimator, _TRAIN.x, _TRAIN.y, cv=3)
    report = cross_validate(
        estimator, _TRAIN.x, _TRAIN.y, groups=_TRAIN.groups, folds=3, resamples=10
    )
    assert report.estimate("accuracy").value == pytest.approx(values.mean(), abs=0.15)
    if estimator.get_params():
        name = next(iter(estimator.get_params()))
        search = GridSearchCV(estimator, {name: [5, 30]} if name == "k" else {name: [500]}, cv=3)
        assert search.fit(_TRAIN.x, _TRAIN.y).best_params_[name] in (5, 30, 500)
    with pytest.raises(InputError, match="has no parameter 'depth'"):
        estimator.set_params(depth=3)


@pytest.mark.parametrize(("_method", "estimator"), _PROBES)
def test_labels_of_any_kind_and_embeddings_as_tensors_and_lists(
    _method: Any, estimator: Any
) -> None:
    by_text = clone(estimator).fit(_TRAIN.x, _TRAIN.y)
    named = [("class", _NAMES.index(label)) for label in _TRAIN.y]
    by_tuple = clone(estimator).fit(torch.from_numpy(_TRAIN.x), named)
    place = [list(by_tuple.classes_).index(("class", _NAMES.index(c))) for c in by_text.classes_]
    np.testing.assert_allclose(
        by_tuple.predict_proba(list(_TEST.x))[:, place], by_text.predict_proba(_TEST.x), atol=1e-4
    )
    assert by_tuple.predict(_TEST.x)[0] in [("class", n) for n in range(3)]


def test_too_few_iterations_are_said() -> None:
    with pytest.warns(ConvergenceWarning):
        report = _report("linear", max_iter=1)
    assert report.settings["iterations"] == 1


def _changed(**change: Any) -> dict[str, Any]:
    return {
        "train_x": _TRAIN.x, "train_y": _TRAIN.y, "test_x": _TEST.x, "test_y": _TEST.y,
        "groups": _TEST.groups, "resamples": 5, **change,
    }  # fmt: skip


_WITH_NAN = _TEST.x.copy()
_WITH_NAN[3, 1] = np.nan


@pytest.mark.parametrize("method", ["linear", "knn", "simpleshot"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"test_x": _WITH_NAN}, "not finite in 1 rows, first in row 3"),
        ({"train_x": _TRAIN.x[:, 0]}, r"shape \(\d+,\); expected embeddings"),
        ({"test_x": _TEST.x[:, :5]}, "X has 5 features, and .* fitted on 6"),
        ({"train_y": _TRAIN.y[:-1]}, "the training set: y has"),
        ({"test_y": _TEST.y[:-1]}, "the test set: y has"),
        ({"groups": _TEST.groups[:-1]}, "the test set: groups has"),
        ({"train_y": ["tumour"] * len(_TRAIN.y), "test_y": ["tumour"] * len(_TEST.y)}, "one class"),
        ({"test_y": ["fat", *_TEST.y[1:]]}, "label 'fat', which the training set does not"),
        ({"train_groups": [_TEST.groups[0], *_TRAIN.groups[1:]]}, "patient '1-0' is on both sides"),
        ({"test_x": np.vstack([_TRAIN.x[5], _TEST.x[1:]])}, "test case 0 .* training case 5"),
        ({"ordered": True}, "needs the order"),
        ({"method": "svm"}, r"method is 'svm'; expected one of \('linear', 'knn', 'simpleshot'\)"),
        ({"depth": 3}, "has no parameter 'depth'"),
    ],
)
def test_bad_input_is_named(method: Any, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        probe(**_changed(**{"method": method, **change}))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"k": 0}, "k is 0"), ({"k": 999}, "k is 999"), ({"metric": "l1"}, "l1")],
)
def test_options_of_knn_that_make_no_sense_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        probe(method="knn", **_changed(**options))


def test_a_probe_that_is_not_fitted_says_so() -> None:
    for _, estimator in _PROBES:
        for name in ("predict_proba", "predict_log_proba", "predict"):
            with pytest.raises(InputError, match="is not fitted"):
                getattr(clone(estimator), name)(_TEST.x)


def test_identical_embeddings_may_be_meant() -> None:
    again = np.vstack([_TRAIN.x[5], _TEST.x[1:]])
    with pytest.warns(XmagWarning, match="the same features") as caught:
        probe(**_changed(test_x=again, on_identical="warn"))
    assert caught[0].filename == __file__


def test_missing_groups_give_a_warning_that_points_here() -> None:
    for function in (probe, linear_probe, knn, simpleshot):
        with pytest.warns(XmagWarning, match="patients are not separated") as caught:
            function(**_changed(groups=None))
        assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        probe(**_changed())
