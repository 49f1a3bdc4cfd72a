"""Regression, survival and several labels, against scikit-learn and scikit-survival by hand."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lifelines.statistics import multivariate_logrank_test
from scipy import stats
from sklearn import metrics as sk
from sklearn.dummy import DummyRegressor
from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sksurv import metrics as sksurv_metrics
from sksurv.linear_model import CoxPHSurvivalAnalysis, IPCRidge
from sksurv.svm import FastSurvivalSVM
from sksurv.util import Surv

from xmag import metrics
from xmag.errors import InputError
from xmag.evaluate import Folds, Report, cross_validate, external
from xmag.mil.regressor import MILRegressor
from xmag.mil.survival import MILSurvival

_N = 120
_PATIENTS = np.repeat(np.arange(_N // 2), 2)
_RNG = np.random.default_rng(0)
_X = _RNG.normal(size=(_N, 4)) + 0.7 * _RNG.normal(size=(_N // 2, 4))[_PATIENTS]
_NUMBERS = np.stack([_X[:, 0] + _RNG.normal(size=_N), 100 * _X[:, 1] - _X[:, 2]], axis=1)
_NUMBERS[::9, 0] = np.nan
_LABELS = (_X[:, :3] + _RNG.normal(size=(_N, 3)) > 0.4).astype(int)
_TIMES = np.ceil(_RNG.exponential(24 * np.exp(-_X[:, 0]))), np.ceil(_RNG.exponential(40, _N))
_END = 40  # of the study, as scikit-survival takes no times beyond those of the training
_SURVIVAL = Surv.from_arrays(
    _TIMES[0] <= np.minimum(_TIMES[1], _END - 1), np.minimum(np.minimum(*_TIMES), _END)
)
_COX = CoxPHSurvivalAnalysis(alpha=0.1)
_FEW: dict[str, Any] = {"groups": _PATIENTS, "resamples": 20}


def _splits(report: Report) -> list[tuple[np.ndarray, np.ndarray]]:
    assert report.folds is not None
    return [(np.array(split.train), np.array(split.test)) for split in report.folds.splits]


def test_concordances_are_means_over_splits_weighted_by_their_comparable_pairs() -> None:
    report = cross_validate(_COX, _X, _SURVIVAL, folds=4, **_FEW)
    assert report.task == report.settings["task"] == "survival"
    harrell, uno, pairs, uno_pairs = [], [], [], []
    for train, test in _splits(report):
        risk = CoxPHSurvivalAnalysis(alpha=0.1).fit(_X[train], _SURVIVAL[train]).predict(_X[test])
        event, time = (_SURVIVAL[test][name] for name in _SURVIVAL.dtype.names)
        found = sksurv_metrics.concordance_index_censored(event, time, risk)
        harrell.append(found[0])
        pairs.append(sum(found[1:4]))
        uno.append(
            sksurv_metrics.concordance_index_ipcw(_SURVIVAL[train], _SURVIVAL[test], risk)[0]
        )
        weights = sksurv_metrics.CensoringDistributionEstimator().fit(_SURVIVAL[train])
        of_event = weights.predict_ipcw(_SURVIVAL[test]) ** 2
        later = (time > time[:, None]) | ((time == time[:, None]) & ~event)
        uno_pairs.append(of_event @ (later & event[:, None]).sum(1))
    expected = np.average(harrell, weights=pairs)
    assert report.estimate("harrell_c").value == pytest.approx(expected, abs=1e-9)
    assert report.results[0].per_split("harrell_c") == pytest.approx(harrell, abs=1e-9)
    expected = np.average(uno, weights=uno_pairs)
    assert report.estimate("uno_c").value == pytest.approx(expected, abs=1e-9)
    assert report.results[0].per_split("uno_c") == pytest.approx(uno, abs=1e-9)


def test_the_brier_score_is_that_of_scikit_survival() -> None:
    report = cross_validate(_COX, _X, _SURVIVAL, folds=3, **_FEW)
    values, sizes = [], []
    for train, test in _splits(report):
        model = CoxPHSurvivalAnalysis(alpha=0.1).fit(_X[train], _SURVIVAL[train])
        low, high = np.quantile(_SURVIVAL[test]["time"], (0.1, 0.9))
        times = np.linspace(low, min(high, np.nextafter(_END, 0)), 100)
        shares = np.stack([one(times) for one in model.predict_survival_function(_X[test])])
        values.append(
            sksurv_metrics.integrated_brier_score(_SURVIVAL[train], _SURVIVAL[test], shares, times)
        )
        sizes.append(len(test))
    result = report.results[0]
    assert result.per_split("integrated_brier_score") == pytest.approx(values, abs=1e-9)
    expected = np.average(values, weights=sizes)
    assert report.estimate("integrated_brier_score").value == pytest.approx(expected, abs=1e-9)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:lifelines", "ignore:Starting with pandas")
def test_risk_groups_are_cut_at_the_median_of_the_training() -> None:
    report = cross_validate(_COX, _X, _SURVIVAL, folds=3, **_FEW)
    high = np.zeros(_N, int)
    for train, test in _splits(report):
        model = CoxPHSurvivalAnalysis(alpha=0.1).fit(_X[train], _SURVIVAL[train])
        high[test] = model.predict(_X[test]) > np.median(model.predict(_X[train]))
    seen, groups = report.results[0].risk_groups()
    np.testing.assert_array_equal(groups, high)
    np.testing.assert_array_equal(seen.time, _SURVIVAL["time"])
    test = multivariate_logrank_test(seen.time, groups, seen.event)
    estimate = report.estimate("log_rank")
    assert estimate.value == pytest.approx(test.p_value, rel=1e-6)
    assert estimate.interval is None
    assert "for a patient of its own" in str(report)


def test_folds_of_survival_spread_events_and_those_of_numbers_their_quarters() -> None:
    event = _SURVIVAL["event"]
    for _, test in _splits(cross_validate(_COX, _X, _SURVIVAL, **_FEW)):
        assert abs(event[test].mean() - event.mean()) < 0.1
    y = _NUMBERS[:, 1]
    report = cross_validate(LinearRegression(), _X, y, **_FEW)
    spread = [np.mean(y[test] < np.median(y)) for _, test in _splits(report)]
    assert np.ptp(spread) < 0.2
    for train, test in _splits(report):
        assert not set(_PATIENTS[train]) & set(_PATIENTS[test])


def test_numbers_have_the_metrics_of_scikit_learn_without_missing_values() -> None:
    y = _NUMBERS[:, 0]
    report = cross_validate(RandomForestRegressor(10, random_state=0), _X, y, folds=3, **_FEW)
    predicted, per_fold, sizes = np.zeros(_N), [], []
    for train, test in _splits(report):
        known = train[~np.isnan(y[train])]
        model = RandomForestRegressor(10, random_state=0).fit(_X[known], y[known])
        predicted[test] = model.predict(_X[test])
        of_test = test[~np.isnan(y[test])]
        per_fold.append(np.corrcoef(y[of_test], predicted[of_test])[0, 1])
        sizes.append(len(of_test))
    known = ~np.isnan(y)
    truth, guess = y[known], predicted[known]
    for name, value in {
        "r2": sk.r2_score(truth, guess),
        "mae": sk.mean_absolute_error(truth, guess),
        "rmse": sk.root_mean_squared_error(truth, guess),
        "pearson": np.average(per_fold, weights=sizes),
    }.items():
        found = report.estimate(name)
        assert found.value == pytest.approx(float(value), abs=1e-9)
        assert found.interval is not None
        assert found.interval.low < value < found.interval.high
    assert report.results[0].of_each == {}
    assert "y 106 known" in str(report)


def test_several_targets_have_a_row_each_and_a_mean() -> None:
    report = cross_validate(
        KNeighborsRegressor(3), _X, np.nan_to_num(_NUMBERS), classes=["TIL", "Ki-67"], **_FEW
    )
    truth, guess = report.results[0].truth, report.results[0].predicted
    each = [e.value for e in report.results[0].of_each["r2"]]
    assert each == pytest.approx(sk.r2_score(truth, guess, multioutput="raw_values"), abs=1e-9)
    assert report.estimate("r2").value == pytest.approx(sk.r2_score(truth, guess), abs=1e-9)
    assert "R², mean over targets" in str(report)
    rows = str(report).split("| target")[1].splitlines()
    assert rows[2].startswith("| TIL ")
    assert rows[3].startswith("| Ki-67 ")


def test_missing_values_of_one_target_are_masked() -> None:
    class Zero(LinearRegression):
        def fit(self, X: Any, y: Any) -> Any:  # noqa: N803
            assert np.isnan(y).any()  # it says itself what it does with them
            return self

        def predict(self, X: Any) -> np.ndarray:  # noqa: N803
            return np.zeros((len(X), 2))

    report = cross_validate(Zero(), _X, _NUMBERS, **_FEW)
    expected = [np.nanmean(np.abs(_NUMBERS[:, 0])), np.abs(_NUMBERS[:, 1]).mean()]
    assert [e.value for e in report.results[0].of_each["mae"]] == pytest.approx(expected)
    assert report.results[0].counts().tolist() == [106, 120]
    assert Report.from_json(report.to_json()) == report


def test_a_constant_prediction_has_no_correlation_and_says_why() -> None:
    report = cross_validate(DummyRegressor(), _X, _NUMBERS[:, 1], **_FEW)
    estimate = report.estimate("pearson")
    assert estimate.value is None
    assert "two different known values and predictions" in estimate.reason
    assert (report.estimate("r2").value or 0) < 0


@pytest.mark.parametrize(
    "model", [RandomForestClassifier(20, random_state=0), KNeighborsClassifier(9)]
)
def test_labels_have_the_metrics_of_scikit_learn(model: Any) -> None:
    report = cross_validate(model, _X, _LABELS, folds=3, classes=["ER", "PR", "HER2"], **_FEW)
    assert report.task == "multilabel"
    values: dict[str, list[list[float]]] = {"auroc": [], "average_precision": []}
    pairs, positives = [], []
    for train, test in _splits(report):
        found = model.fit(_X[train], _LABELS[train]).predict_proba(_X[test])
        scores = np.stack([part[:, 1] for part in found], axis=1)
        truth = _LABELS[test]
        values["auroc"].append(sk.roc_auc_score(truth, scores, average=None))
        values["average_precision"].append(sk.average_precision_score(truth, scores, average=None))
        pairs.append(truth.sum(0) * (1 - truth).sum(0))
        positives.append(truth.sum(0))
    for name, weights in (("auroc", pairs), ("average_precision", positives)):
        expected = np.average(values[name], axis=0, weights=np.array(weights))
        each = [e.value for e in report.results[0].of_each[name]]
        assert each == pytest.approx(expected.tolist(), abs=1e-9)
        assert report.estimate(name).value == pytest.approx(expected.mean(), abs=1e-9)
    assert "| ER " in str(report)


def test_an_ordinal_estimator_has_quadratic_kappa_without_asking() -> None:
    class Ordinal(LogisticRegression):
        ordinal: Any = True

    grades = np.digitize(_X[:, 0], (-0.5, 0.5))
    report = cross_validate(Ordinal(), _X, grades, **_FEW)
    result = report.results[0]
    expected = sk.cohen_kappa_score(result.truth, result.predicted, weights="quadratic")
    assert report.estimate("quadratic_kappa").value == pytest.approx(expected)
    texts = [("low", "middle", "high")[grade] for grade in grades]
    with pytest.raises(InputError, match="needs the order of the classes"):
        cross_validate(Ordinal(), _X, texts, **_FEW)
    Ordinal.ordinal = ("low", "middle", "high")
    named = cross_validate(Ordinal(), _X, texts, **_FEW)
    assert named.classes == ("low", "middle", "high")
    truth, predicted = named.results[0].truth, named.results[0].predicted
    expected = sk.cohen_kappa_score(truth, predicted, weights="quadratic")
    assert named.estimate("quadratic_kappa").value == pytest.approx(expected)


def test_estimators_without_survival_functions_have_all_but_the_brier_score() -> None:
    model = FastSurvivalSVM(max_iter=50, random_state=0)
    report = cross_validate(model, _X, _SURVIVAL, **_FEW)
    assert report.task == "survival"
    assert (report.estimate("harrell_c").value or 0) > 0.6
    estimate = report.estimate("integrated_brier_score")
    assert estimate.value is None
    assert "no survival functions" in estimate.reason
    assert Report.from_json(report.to_json()) == report


def test_event_and_time_may_be_two_columns() -> None:
    columns = np.stack([_SURVIVAL["event"], _SURVIVAL["time"]], axis=1).astype(float)
    assert cross_validate(_COX, _X, columns, **_FEW) == cross_validate(_COX, _X, _SURVIVAL, **_FEW)


def test_the_sign_of_the_risk_is_that_of_the_estimator() -> None:
    class Backwards(CoxPHSurvivalAnalysis):
        def predict(self, X: Any) -> np.ndarray:  # noqa: N803
            return np.asarray(-super().predict(X))

    right, wrong = (
        cross_validate(model, _X, _SURVIVAL, **_FEW) for model in (_COX, Backwards(alpha=0.1))
    )
    value = right.estimate("harrell_c").value
    assert wrong.estimate("harrell_c").value == pytest.approx(1 - (value or 0))


def test_models_that_predict_the_time_say_so_themselves() -> None:
    searched = GridSearchCV(IPCRidge(), {"alpha": [0.1, 1]}, cv=2)
    for model in (IPCRidge(), make_pipeline(StandardScaler(), IPCRidge()), searched):
        report = cross_validate(model, _X, _SURVIVAL, **_FEW)
        assert (report.estimate("harrell_c").value or 0) > 0.6


def test_the_interval_is_that_of_the_metrics_module() -> None:
    report = cross_validate(_COX, _X, _SURVIVAL, **_FEW)
    result = report.results[0]
    order = np.argsort(result.rows)
    expected = metrics.interval(
        metrics.harrell_c, _SURVIVAL, result.scores[order, 0], groups=_PATIENTS,
        within=result.splits[order], resamples=20,
    )  # fmt: skip
    assert report.estimate("harrell_c").interval == expected
    report = cross_validate(LinearRegression(), _X, _NUMBERS[:, 1], **_FEW)
    guess = report.results[0].predicted[np.argsort(report.results[0].rows), 0]
    expected = metrics.interval(metrics.r2, _NUMBERS[:, 1], guess, groups=_PATIENTS, resamples=20)
    assert report.estimate("r2").interval == expected


@pytest.mark.parametrize("metric", [metrics.auroc, sk.roc_auc_score])
def test_an_interval_within_folds_is_refused_where_it_would_compare_all(metric: Any) -> None:
    within = np.arange(_N) % 5
    with pytest.raises(InputError, match=r"called for each draw without it; .* auroc_ovr"):
        metrics.interval(metric, _LABELS[:, 0], _X[:, 0], within=within, resamples=5)
    found = metrics.interval(
        metrics.auroc_ovr, _LABELS[:, 0], _X[:, 0], within=within, groups=_PATIENTS, resamples=5
    )
    assert metrics.auroc(_LABELS[:, 0], _X[:, 0], within=within) in found


@pytest.mark.parametrize(
    ("metric", "truth", "hats"),
    [
        ("harrell_c", _SURVIVAL, _X[:, 0]),
        ("spearman", _NUMBERS[:, 1], _X[:, 1]),
        ("mae", _NUMBERS[:, 1], _X[:, 1]),
    ],
)
def test_intervals_equal_those_of_drawing_rows_one_by_one(
    metric: str, truth: Any, hats: np.ndarray
) -> None:
    function = getattr(metrics, metric)
    found = metrics.interval(function, truth, hats, groups=_PATIENTS, resamples=40)
    rng, values = np.random.default_rng(0), []
    patients = _N // 2
    for draw in rng.integers(patients, size=(2083, patients))[:40]:
        rows = np.concatenate([np.flatnonzero(one == _PATIENTS) for one in draw])
        values.append(function(truth[rows], hats[rows]))
    assert list(found) == pytest.approx(np.quantile(values, (0.025, 0.975)), abs=1e-9)


@pytest.mark.parametrize(
    ("metric", "by"),
    [("pearson", stats.pearsonr), ("spearman", stats.spearmanr), ("r2", sk.r2_score)],
)
def test_draws_of_one_number_have_no_correlation_and_no_r2_and_are_drawn_again(
    metric: str, by: Any
) -> None:
    # A mean of several 0.23 may be another number, and their variance 1e-34.
    truth, hats = np.array([0.23, 0.23, 0.23, 0.23, 0.3]), np.array([0.2, 0.3, 0.1, 0.1, 0.5])
    found = metrics.interval(getattr(metrics, metric), truth, hats, resamples=300)
    rng, values = np.random.default_rng(0), list[float]()
    while len(values) < 300:
        for rows in rng.integers(5, size=(300, 5)):
            if len({*truth[rows]}) > 1 and len({*hats[rows]}) > 1:
                values.append(float(np.ravel(by(truth[rows], hats[rows]))[0]))
    assert list(found) == pytest.approx(np.quantile(values[:300], (0.025, 0.975)), abs=1e-9)
    with pytest.raises(InputError, match="is one number"):
        getattr(metrics, metric)([0.23] * 5, hats)


def _shares(seed: int) -> tuple[Any, Any, Any]:
    rows = np.flatnonzero(np.isin(_PATIENTS % 3, seed))
    return _X[rows] + 0.01 * seed, rows, [f"{seed}-{p}" for p in _PATIENTS[rows]]


@pytest.mark.parametrize(
    ("model", "y"),
    [
        (_COX, _SURVIVAL),
        (LinearRegression(), _NUMBERS[:, 1]),
        (KNeighborsClassifier(5), _LABELS),
    ],
)
def test_cohorts_side_by_side(model: Any, y: Any, tmp_path: Path) -> None:
    cohorts = {}
    for seed, name in enumerate("AB"):
        x, rows, groups = _shares(seed)
        cohorts[name] = (x, y[rows], groups)
    across = external(model, cohorts, train=["A", "B"], folds=2, resamples=10)
    assert [(r.trained_on, r.tested_on) for r in across.results] == [
        ("A", "A"), ("A", "B"), ("B", "A"), ("B", "B"),
    ]  # fmt: skip
    across.save(tmp_path)
    assert Report.load(tmp_path) == across
    # Two slides a patient: the test takes them for two patients.
    assert ("The log-rank test takes each case" in str(across)) == (across.task == "survival")
    model.fit(*cohorts["A"][:2])
    alone = external(model, {"B": cohorts["B"]}, resamples=10)
    fitted = across.results[1]
    np.testing.assert_allclose(alone.results[0].scores, fitted.scores)
    np.testing.assert_array_equal(alone.results[0].truth, fitted.truth)


def test_a_fitted_survival_model_is_cut_at_the_median_of_the_cohort() -> None:
    model = CoxPHSurvivalAnalysis(alpha=0.1).fit(_X[:60], _SURVIVAL[:60])
    report = external(model, {"rest": (_X[60:], _SURVIVAL[60:], _PATIENTS[60:])}, resamples=10)
    _, groups = report.results[0].risk_groups()
    assert groups.sum() == 30
    risk = model.predict(_X[60:])
    expected = sksurv_metrics.concordance_index_ipcw(_SURVIVAL[60:], _SURVIVAL[60:], risk)[0]
    assert report.estimate("uno_c").value == pytest.approx(expected, abs=1e-9)


def test_reports_of_version_1_are_read_and_are_of_classification() -> None:
    path = Path(__file__).parents[1] / "data" / "report-version-1.json"
    text = path.read_text(encoding="utf-8")
    report = Report.from_json(text)
    assert report.task == "classification"
    assert json.loads(text)["schema_version"] == 1
    found = report.estimate("quadratic_kappa")
    assert str(found) == "0.375 (-0.086 to 0.739)"
    assert report.results[0].class_aurocs[1].value == report.estimate("auroc_ovr").value
    assert Report.from_json(report.to_json()) == report
    assert report.results[0].per_split("accuracy") == (0.75, 0.625)


def test_mil_estimators_serve_and_settings_say_how_they_were_made() -> None:
    rng = np.random.default_rng(1)
    bags = [row + 0.1 * rng.normal(size=(5, 4)).astype(np.float32) for row in _X[:40]]
    options: dict[str, Any] = {
        "epochs": 2, "aggregator": "mean", "device": "cpu", "progress": False, "random_state": 0,
    }  # fmt: skip
    few = {"groups": _PATIENTS[:40], "folds": 2, "resamples": 5}
    report = cross_validate(MILSurvival(loss="nll", **options), bags, _SURVIVAL[:40], **few)
    assert report.task == "survival"
    assert report.estimate("integrated_brier_score").value is not None
    assert report.settings["parameters"]["loss"] == "nll"
    assert report.settings["parameters"]["aggregator"] == "mean"
    report = cross_validate(MILRegressor(**options), bags, _NUMBERS[:40], **few)
    assert report.task == "regression"
    assert len(report.results[0].of_each["r2"]) == 2


@pytest.mark.parametrize(
    ("model", "y", "options", "message"),
    [
        (LinearRegression(), ["a"] * _N, {}, "no numbers.*give a classifier"),
        (LinearRegression(), np.full(_N, np.inf), {}, "infinite values"),
        (LinearRegression(), np.ones(_N), {}, "split 0 .* 1 different known values of target 'y'"),
        (LinearRegression(), _NUMBERS[:-1], {}, r"shape \(119, 2\) for 120 cases"),
        (LinearRegression(), _NUMBERS, {"classes": ["one"]}, "but y has 2 columns"),
        (_COX, _SURVIVAL[:-1], {}, "119 entries for 120 cases"),
        (_COX, _NUMBERS, {}, "events of the cohort: y hold"),
        (_COX, Surv.from_arrays([False] * _N, range(_N)), {}, "no case to fit on has an event"),
        (_COX, _SURVIVAL, {"classes": ["a", "b"]}, "there are none in survival"),
        (_COX, _SURVIVAL, {"ordered": True}, "ordered=True is for classes, .* survival; leave it"),
        (LinearRegression(), _NUMBERS, {"ordered": True, "classes": "ab"}, "is regression"),
        (_COX, _SURVIVAL, {"folds": 61}, "60 patients for 61 folds"),
        (GaussianNB(), _LABELS * 0, {}, "all cases to fit on have 0 of label 0"),
        (LogisticRegression(), _NUMBERS, {}, r"has shape \(120, 2\)"),
    ],
)
def test_bad_input_is_named(model: Any, y: Any, options: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        cross_validate(model, _X, y, **{**_FEW, **options})


def test_predictions_that_are_not_finite_are_refused() -> None:
    class Bad(LinearRegression):
        def predict(self, X: Any) -> np.ndarray:  # noqa: N803
            return np.full(len(X), np.nan)

    with pytest.raises(InputError, match="predictions of the cohort hold 24 values"):
        cross_validate(Bad(), _X, _NUMBERS[:, 1], **_FEW)


def test_folds_may_be_given() -> None:
    folds = Folds.leave_one_group_out(_PATIENTS)
    report = cross_validate(LinearRegression(), _X, _NUMBERS[:, 1], folds=folds, **_FEW)
    assert report.folds == folds
    by_patient = Folds.by_patient(_PATIENTS, folds=4, repeats=2, random_state=3)
    assert len(by_patient) == 8
    assert by_patient == Folds.by_patient(_PATIENTS, folds=4, repeats=2, random_state=3)
    with pytest.raises(InputError, match="random_state is -1"):
        Folds.by_patient(_PATIENTS, random_state=-1)
    with pytest.raises(InputError, match="strata has 3 entries for 120 cases"):
        Folds.by_patient(_PATIENTS, strata=[0, 1, 1])


def test_repeats_are_averaged_and_a_case_has_the_risk_group_of_most() -> None:
    report = cross_validate(_COX, _X, _SURVIVAL, repeats=3, folds=3, **_FEW)
    result = report.results[0]
    assert result.cases == _N
    values = []
    for repeat in range(3):
        rows = result.repeats == repeat
        times = Surv.from_arrays(result.truth[rows, 0] > 0, result.truth[rows, 1])
        scores, within = result.scores[rows, 0], result.splits[rows]
        values.append(_harrell(times, scores, within))
    assert report.estimate("harrell_c").value == pytest.approx(np.mean(values))
    seen, groups = result.risk_groups()
    assert len(seen) == len(groups) == _N
    votes = np.bincount(result.rows, result.predicted)
    np.testing.assert_array_equal(groups, votes > 1)


def _harrell(times: Any, risk: np.ndarray, within: np.ndarray) -> float:
    """Harrell's C written out: pairs of one split, of which the first has the event earlier."""
    event, time = (times[name] for name in times.dtype.names)
    right = pairs = 0.0
    for i, j in np.argwhere(within[:, None] == within):
        if event[i] and (time[i] < time[j] or (time[i] == time[j] and not event[j])):
            pairs += 1
            right += 0.5 if risk[i] == risk[j] else float(risk[i] > risk[j])
    return right / pairs


@pytest.mark.parametrize(
    ("model", "name", "middle"), [(_COX, "harrell_c", 0.5), (LinearRegression(), "pearson", 0.0)]
)
def test_shuffled_truth_has_no_signal(model: Any, name: str, middle: float) -> None:
    found = []
    for seed in range(40):
        order = np.random.default_rng(seed).permutation(_N)
        y = _SURVIVAL[order] if name == "harrell_c" else _NUMBERS[order, 1]
        report = cross_validate(model, _X, y, groups=_PATIENTS, resamples=1, random_state=seed)
        found.append(report.estimate(name).value or 0)
    assert np.mean(found) == pytest.approx(middle, abs=0.03)
