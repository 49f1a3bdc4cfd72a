"""Cohorts side by side, against scikit-learn used by hand."""

from typing import Any

import numpy as np
import pytest
from sklearn import metrics as sk
from sklearn.linear_model import LogisticRegression
from support.cohorts import cohort

from xmag import metrics
from xmag.errors import InputError, XmagWarning
from xmag.evaluate import cross_validate, external

_COHORTS = {
    name: tuple(cohort(seed, patients=30, shift=0.2 * seed))
    for seed, name in enumerate(("Berlin", "Rochester", "TCGA"))
}
_FEW: dict[str, Any] = {"resamples": 30}


def test_a_fitted_estimator_is_tested_on_each_cohort() -> None:
    x, y, _ = _COHORTS["Berlin"]
    model = LogisticRegression().fit(x, y)
    others = {name: _COHORTS[name] for name in ("Rochester", "TCGA")}
    report = external(model, others, resamples=200)
    assert [(r.trained_on, r.tested_on) for r in report.results] == [
        ("", "Rochester"),
        ("", "TCGA"),
    ]
    for name, (test_x, test_y, groups) in others.items():
        scores = model.predict_proba(test_x)[:, 1]
        found = report.estimate("auroc_ovr", tested_on=name)
        assert found.value == pytest.approx(
            sk.roc_auc_score(np.array(test_y) == "LUSC", scores), abs=1e-12
        )
        assert found.interval == metrics.interval(
            metrics.auroc_ovr, test_y, scores, groups=groups, resamples=200
        )


def test_each_cohort_in_turn_is_trained_on() -> None:
    report = external(LogisticRegression(), _COHORTS, train=list(_COHORTS), folds=3, **_FEW)
    assert len(report.results) == 9
    for trained, (x, y, groups) in _COHORTS.items():
        model = LogisticRegression().fit(x, y)
        for tested, (test_x, test_y, _) in _COHORTS.items():
            found = report.estimate("balanced_accuracy", trained_on=trained, tested_on=tested)
            if tested != trained:
                expected = sk.balanced_accuracy_score(test_y, model.predict(test_x))
                assert found.value == pytest.approx(float(expected), abs=1e-12)
            else:
                own = cross_validate(LogisticRegression(), x, y, groups=groups, folds=3, **_FEW)
                assert found == own.estimate("balanced_accuracy")


def test_the_table_across_institutions() -> None:
    report = external(LogisticRegression(), _COHORTS, train=["TCGA", "Berlin"], folds=None, **_FEW)
    lines = report.table("auroc_ovr").splitlines()
    assert lines[0].split("|")[2:5] == [
        f" tested on {name}".ljust(len(part))
        for name, part in zip(
            ("Berlin", "Rochester", "TCGA"), lines[0].split("|")[2:5], strict=True
        )
    ]
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["TCGA", "Berlin"]
    cells = [[cell.strip() for cell in line.split("|")[2:-1]] for line in lines[2:]]
    for row, trained in zip(cells, ("TCGA", "Berlin"), strict=True):
        for cell, tested in zip(row, _COHORTS, strict=True):
            if trained == tested:
                assert cell == ""
            else:
                found = report.estimate("auroc_ovr", trained_on=trained, tested_on=tested)
                assert cell == str(found)
    with pytest.raises(InputError, match=r"choose one of these pairs: \[\('TCGA', 'Berlin'\)"):
        report.estimate("auroc_ovr")


def test_a_cohort_that_lacks_a_class_has_no_auroc_and_says_why() -> None:
    names = ("a", "b", "c")
    x, y, _ = cohort(0, names=names)
    model = LogisticRegression().fit(x, y)
    two = cohort(1, names=("a", "b"), patients=20)
    report = external(model, {"full": tuple(cohort(2, names=names)), "part": tuple(two)}, **_FEW)
    lacking = report.estimate("auroc_ovr", tested_on="part")
    assert (lacking.value, lacking.interval) == (None, None)
    assert report.estimate("balanced_accuracy", tested_on="part").value is not None
    assert report.estimate("auroc_ovr", tested_on="full").value is not None
    assert "Tested on part: no case of class 'c'." in str(report)
    part = next(r for r in report.results if r.tested_on == "part")
    assert part.class_aurocs[0].value is not None
    assert part.class_aurocs[2].value is None


def test_one_patient_has_a_value_and_no_interval() -> None:
    x, y, _ = cohort(0)
    model = LogisticRegression().fit(x, y)
    test_x, test_y, _ = cohort(1, patients=10)
    report = external(model, {"one": (test_x, test_y, ["p"] * len(test_y))}, **_FEW)
    found = report.estimate("accuracy")
    assert found.value is not None
    assert found.interval is None
    assert "1 patient to resample" in str(report)


def _renamed(name: str, to: str) -> list[str]:
    return [to if label == "LUSC" else label for label in _COHORTS[name][1]]


@pytest.mark.parametrize(
    ("estimator", "cohorts", "options", "message"),
    [
        (LogisticRegression(), _COHORTS, {}, "has no classes_, so it is not fitted"),
        (LogisticRegression(), {}, {}, "cohorts is empty"),
        (
            LogisticRegression(),
            _COHORTS,
            {"train": "Mayo"},
            "train is 'Mayo'; expected one or more",
        ),
        (LogisticRegression(), _COHORTS, {"train": []}, "expected one or more"),
        (LogisticRegression(), {"A": _COHORTS["TCGA"][0]}, {"train": "A"}, "is ndarray; expected"),
        (
            LogisticRegression(),
            {"A": _COHORTS["TCGA"], "B": (_COHORTS["Berlin"][0] + 1, *_COHORTS["Berlin"][1:])},
            {"train": "A", "classes": ["LUAD"]},
            "label 'LUSC', which is not in classes",
        ),
        (
            LogisticRegression(),
            {
                "A": _COHORTS["TCGA"],
                "B": (_COHORTS["Berlin"][0], _renamed("Berlin", "SCLC"), _COHORTS["Berlin"][2]),
            },
            {"train": "A", "folds": None},
            "trained on A: there is no case of class 'SCLC'",
        ),
        (
            LogisticRegression(),
            {"A": _COHORTS["TCGA"], "B": (*_COHORTS["Berlin"][:2], _COHORTS["Berlin"][1])},
            {"train": "A", "folds": None, "ordered": True},
            "needs the order",
        ),
        (
            LogisticRegression(),
            {"A": _COHORTS["TCGA"], "B": (_COHORTS["TCGA"][0] + 1, *_COHORTS["TCGA"][1:])},
            {"train": "A"},
            "trained on A, tested on B: patient .* is on both sides .* put the cohort's name",
        ),
        (
            LogisticRegression(),
            {"A": _COHORTS["TCGA"], "B": (*_COHORTS["TCGA"][:2], range(len(_COHORTS["TCGA"][1])))},
            {"train": "B"},
            "trained on B, tested on A: test case 0 has the same features as training case 0",
        ),
        (
            LogisticRegression(),
            {"A": (np.ones((4, 2)), ["LUAD"] * 4, range(4))},
            {"train": "A"},
            "A has one class only: all 4 cases are 'LUAD'",
        ),
    ],
)
def test_bad_input_is_named(
    estimator: Any, cohorts: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        external(estimator, cohorts, **options, **_FEW)


def test_a_label_that_a_fitted_estimator_does_not_know_is_refused() -> None:
    x, y, _ = _COHORTS["Berlin"]
    model = LogisticRegression().fit(x, y)
    data = {"TCGA": (_COHORTS["TCGA"][0], _renamed("TCGA", "SCLC"), _COHORTS["TCGA"][2])}
    with pytest.raises(InputError, match="label 'SCLC', which is not in classes"):
        external(model, data, **_FEW)
    with pytest.raises(InputError, match="label 'SCLC', which LogisticRegression does not know"):
        external(model, data, classes=["LUAD", "LUSC", "SCLC"], **_FEW)
    three = LogisticRegression().fit(x, ["SCLC", *y[1:]])
    with pytest.raises(InputError, match="knows the class 'SCLC', which is not in classes"):
        external(three, {"TCGA": _COHORTS["TCGA"]}, classes=["LUAD", "LUSC"], **_FEW)


def test_missing_groups_give_a_warning_that_points_here() -> None:
    x, y, _ = _COHORTS["Berlin"]
    model = LogisticRegression().fit(x, y)
    with pytest.warns(XmagWarning, match="patients are not separated") as caught:
        external(model, {"TCGA": _COHORTS["TCGA"][:2]}, **_FEW)
    assert caught[0].filename == __file__


def test_identical_features_may_be_meant_and_the_warning_points_here() -> None:
    x, y, _ = _COHORTS["TCGA"]
    cohorts = {"A": _COHORTS["TCGA"], "B": (x, y, range(len(y)))}
    with pytest.warns(XmagWarning, match="trained on B, tested on A: .* flatters") as caught:
        report = external(
            LogisticRegression(), cohorts, train="B", folds=None, on_identical="warn", **_FEW
        )
    assert caught[0].filename == __file__
    assert [(r.trained_on, r.tested_on) for r in report.results] == [("B", "A")]


def test_a_cohort_is_fitted_once_for_all_others() -> None:
    class Counted(LogisticRegression):
        fits = 0

        def fit(self, X: Any, y: Any) -> Any:  # noqa: N803
            Counted.fits += 1
            return super().fit(X, y)

    external(Counted(), _COHORTS, train=list(_COHORTS), folds=2, **_FEW)
    assert Counted.fits == 3 + 3 * 2
