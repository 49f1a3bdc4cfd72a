"""Pictures of survival, numbers, labels and calibration: what is drawn is what was computed."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from lifelines import KaplanMeierFitter
from sklearn.calibration import calibration_curve
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sksurv.linear_model import CoxPHSurvivalAnalysis
from sksurv.util import Surv
from support.cohorts import cohort

from xmag.errors import InputError
from xmag.evaluate import (
    Estimate,
    Report,
    calibration_figure,
    confusion_figure,
    cross_validate,
    external,
    kaplan_meier_figure,
    roc_figure,
    scatter_figure,
)
from xmag.evaluate.pictures import as_png, calibration_of

_RNG = np.random.default_rng(0)
_N = 100
_X = _RNG.normal(size=(_N, 3))
_TIME, _CENSORED = np.ceil(_RNG.exponential(20 * np.exp(-_X[:, 0]))), _RNG.integers(1, 60, _N)
_Y = Surv.from_arrays(_TIME <= _CENSORED, np.minimum(_TIME, _CENSORED))
_FEW: dict[str, Any] = {"groups": range(_N), "resamples": 20, "folds": 3}


@pytest.fixture(scope="module")
def survival() -> Report:
    return cross_validate(CoxPHSurvivalAnalysis(alpha=0.1), _X, _Y, **_FEW)


@pytest.fixture(scope="module")
def numbers() -> Report:
    y = np.stack([_X[:, 0] + 0.1 * _X[:, 1] ** 2, 9 * _X[:, 2] + _RNG.normal(size=_N)], axis=1)
    y[::10, 1] = np.nan

    class Fitted(LinearRegression):
        def fit(self, X: Any, y: Any) -> Any:  # noqa: N803
            return super().fit(X, np.nan_to_num(y))

    return cross_validate(Fitted(), _X, y, classes=["TIL", "$Ki_67"], **_FEW)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:lifelines", "ignore:Starting with pandas")
def test_curves_of_risk_groups_are_those_of_lifelines(survival: Report) -> None:
    axes = kaplan_meier_figure(survival).axes[0]
    legend = axes.get_legend()
    assert legend is not None
    seen, groups = survival.results[0].risk_groups()
    drawn = [line for line in axes.get_lines() if line.get_drawstyle() == "steps-post"]
    for group, line, text in zip((1, 0), drawn, legend.get_texts(), strict=True):
        own = groups == group
        fitted = KaplanMeierFitter().fit(seen.time[own], seen.event[own])
        x, y = (np.asarray(values) for values in line.get_data())
        np.testing.assert_allclose(y, fitted.predict(x).to_numpy(), atol=1e-12)
        name = "high risk" if group else "low risk"
        events = int(seen.event[own].sum())
        assert text.get_text() == f"{name} (n = {own.sum()}, events {events})"
    p = survival.estimate("log_rank").value
    assert p is not None
    expected = "log-rank p < 0.001" if p < 0.001 else f"log-rank p = {p:.3f}"
    assert legend.get_title().get_text() == expected


@pytest.mark.parametrize(
    ("p", "cell", "title"),
    [
        (3e-9, "< 0.001", "log-rank p < 0.001"),
        (0.00096, "< 0.001", "log-rank p < 0.001"),
        (0.0012, "0.001", "log-rank p = 0.001"),
        (0.4, "0.400", "log-rank p = 0.400"),
        (None, "–", ""),
    ],
)
def test_tables_and_pictures_show_the_same_p(
    survival: Report, p: float | None, cell: str, title: str
) -> None:
    (result,) = survival.results
    result = replace(result, estimates={**result.estimates, "log_rank": Estimate(value=p)})
    report = replace(survival, results=(result,))
    (row,) = [line for line in report.table().splitlines() if "log-rank" in line]
    assert [text.strip() for text in row.split("|")[2:4]] == [cell, "–"]
    other = replace(result, tested_on="another")
    several = replace(survival, results=(result, other))
    assert [row.split("|")[-2].strip() for row in several.table().splitlines()[2:]] == [cell] * 2
    assert f"| {cell} " in several.table("log_rank")
    assert kaplan_meier_figure(report).axes[0].get_legend().get_title().get_text() == title


def test_numbers_at_risk_stand_under_the_ticks(survival: Report) -> None:
    axes = kaplan_meier_figure(survival).axes[0]
    seen, groups = survival.results[0].risk_groups()
    ticks = [float(tick) for tick in axes.get_xticks()]
    texts = [(text.get_position(), text.get_text()) for text in axes.texts]
    rows = {name: y for (_, y), name in texts if name in ("high risk", "low risk")}
    for group, name in ((1, "high risk"), (0, "low risk")):
        found = {x: text for (x, y), text in texts if y == rows[name] and text != name}
        own = seen.time[groups == group]
        assert found == {tick: str((own >= tick).sum()) for tick in ticks}


def test_a_group_without_cases_is_drawn() -> None:
    model = CoxPHSurvivalAnalysis(alpha=0.1).fit(_X, _Y)
    same = np.repeat(_X[:1], 10, axis=0)
    report = external(model, {"same": (same, _Y[:10], range(10))}, resamples=5)
    assert report.estimate("log_rank").value is None
    assert "log-rank" not in "".join(
        text.get_text() for axes in kaplan_meier_figure(report).axes for text in axes.texts
    )


def test_a_scatter_has_the_known_cases_and_the_line_of_equality(numbers: Report) -> None:
    figure = scatter_figure(numbers)
    assert len(figure.axes) == 2
    result = numbers.results[0]
    for place, axes in enumerate(figure.axes):
        truth, guess = result.truth[:, place], result.predicted[:, place]
        points = np.asarray(axes.collections[0].get_offsets())
        expected = np.stack([truth, guess], axis=1)[~np.isnan(truth)]
        np.testing.assert_allclose(points, expected)
        x, y = (np.asarray(values) for values in axes.get_lines()[0].get_data())
        np.testing.assert_array_equal(x, y)
        assert axes.get_xlim() == axes.get_ylim()
        assert f"R² {result.of_each['r2'][place]}" in axes.texts[0].get_text()
    assert figure.axes[1].get_xlabel() == "$Ki_67, true"


def test_each_label_has_a_curve_with_its_auroc() -> None:
    y = (_X + _RNG.normal(size=_X.shape) > 0).astype(int)
    for names in (["ER", "PR", "HER2"], ["ER", "PR"]):
        report = cross_validate(
            KNeighborsClassifier(9), _X, y[:, : len(names)], classes=names, **_FEW
        )
        result = report.results[0]
        legend = roc_figure(report).axes[0].get_legend()
        assert legend is not None
        texts = [text.get_text() for text in legend.get_texts()]
        assert texts == [
            f"{name} (n = {count}): {estimate}"
            for name, count, estimate in zip(
                names, result.counts(), result.class_aurocs, strict=True
            )
        ]
        lines = roc_figure(report).axes[0].get_lines()[1:]
        for line, estimate in zip(lines, result.class_aurocs, strict=True):
            x, y_drawn = line.get_data()
            assert np.trapezoid(y_drawn, x) == pytest.approx(estimate.value, abs=1e-6)


def test_calibration_is_that_of_scikit_learn_in_bins_of_as_many_cases() -> None:
    x, y, groups = cohort(0, patients=60)
    x, y, groups = x[:100], y[:100], groups[:100]
    report = cross_validate(LogisticRegression(), x, y, groups=groups, resamples=5)
    result = report.results[0]
    mean, share, count = calibration_of(result, 1)
    expected = calibration_curve(result.truth, result.scores[:, 1], n_bins=10, strategy="quantile")
    assert count.tolist() == [10] * 10
    np.testing.assert_allclose((share, mean), expected, atol=1e-12)
    axes = calibration_figure(report).axes[0]
    points = axes.get_lines()[1].get_data()
    np.testing.assert_allclose(points, (mean, share))


def test_pictures_of_another_task_are_refused(survival: Report, numbers: Report) -> None:
    for draw in (roc_figure, confusion_figure, calibration_figure, scatter_figure):
        with pytest.raises(InputError, match="the task of the report is survival"):
            draw(survival)
    with pytest.raises(InputError, match="is regression, which has no Kaplan-Meier"):
        kaplan_meier_figure(numbers)
    with pytest.raises(InputError, match="no confusion matrix"):
        numbers.results[0].confusion()
    with pytest.raises(InputError, match="no risk groups"):
        numbers.results[0].risk_groups()


def test_the_same_report_gives_the_same_picture(survival: Report, numbers: Report) -> None:
    assert as_png(kaplan_meier_figure(survival)) == as_png(kaplan_meier_figure(survival))
    assert as_png(scatter_figure(numbers)) == as_png(scatter_figure(numbers))
