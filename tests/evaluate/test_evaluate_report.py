"""Reports: equal after JSON, tables that say what they hold, pictures that were drawn."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression
from support.cohorts import cohort

from xmag.errors import InputError, MissingExtraError, OutputError
from xmag.evaluate import Report, confusion_figure, cross_validate, external, roc_figure
from xmag.evaluate.pictures import as_png, curve_of

_NAMES = ("benign", "$x$|_1", "malignant")


@pytest.fixture(scope="module")
def report() -> Report:
    x, y, groups = cohort(0, names=_NAMES)
    return cross_validate(
        LogisticRegression(), x, y, groups=groups, classes=_NAMES, ordered=True,
        repeats=2, folds=3, resamples=100,
    )  # fmt: skip


@pytest.fixture(scope="module")
def across() -> Report:
    cohorts = {name: tuple(cohort(seed, patients=20)) for seed, name in enumerate("AB")}
    return external(LogisticRegression(), cohorts, train=["A", "B"], folds=2, resamples=50)


def test_json_gives_an_equal_report(report: Report, across: Report) -> None:
    for one in (report, across):
        again = Report.from_json(one.to_json())
        assert again == one
        assert again.to_json() == one.to_json()
        assert str(again) == str(one)
    assert report != across
    content = json.loads(report.to_json())
    content["results"][0]["scores"][0][0] += 1e-9
    assert Report.from_json(json.dumps(content)) != report


def test_a_folder_holds_the_report_and_its_pictures(report: Report, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "first"
    report.save(folder)
    pictures = ["calibration.png", "confusion.png", "roc.png"]
    assert sorted(p.name for p in folder.iterdir()) == sorted([*pictures, "report.json"])
    assert Report.load(folder) == report
    for name in pictures:
        with Image.open(folder / name) as picture:
            assert min(picture.size) > 400
            colours = np.unique(np.asarray(picture).reshape(-1, 4), axis=0)
            assert len(colours) > 50
    report.save(folder)
    assert len(list(folder.iterdir())) == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not what Report.save wrote"),
        ("[]", "not what Report.save wrote"),
        ('{"format": "xmag.Folds", "schema_version": 1}', "format 'xmag.Folds'"),
        ('{"format": "xmag.Report", "schema_version": 99}', "reads up to 2; upgrade"),
    ],
)
def test_other_files_are_not_reports(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        Report.from_json(text)
    with pytest.raises(InputError, match=r"report\.json' cannot be read"):
        Report.load(tmp_path)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_takes_no_files_is_named(report: Report, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(OutputError, match="closed"):
        report.save(tmp_path / "closed")


def test_a_file_in_the_place_of_the_folder_is_named(report: Report, tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    with pytest.raises(OutputError, match="cannot be made"):
        report.save(tmp_path / "taken")


def test_labels_that_json_cannot_hold_are_refused() -> None:
    x, y, groups = cohort(1, patients=12, names=(frozenset("a"), frozenset("b")))
    report = cross_validate(
        LogisticRegression(), x, y, groups=groups, folds=2, classes=list(dict.fromkeys(y)),
        resamples=5,
    )  # fmt: skip
    with pytest.raises(InputError, match=r"class frozenset.* which JSON cannot hold"):
        report.to_json()


def test_the_table_of_one_result_has_a_row_for_each_metric(report: Report) -> None:
    lines = report.table().splitlines()
    rows = {line.split("|")[1].strip(): line for line in lines}
    for name, title in (
        ("balanced_accuracy", "balanced accuracy"),
        ("weighted_f1", "weighted F1"),
        ("quadratic_kappa", "quadratic kappa"),
        ("auroc_ovr", "AUROC, one-vs-rest macro"),
        ("auroc_ovo", "AUROC, one-vs-one macro"),
    ):
        estimate = report.estimate(name)
        assert estimate.interval is not None
        low, high = estimate.interval
        assert f"| {estimate.value:.3f} | {low:.3f}–{high:.3f} " in rows[title]
        assert low <= (estimate.value or 0) <= high
    assert "95% interval" in lines[0]
    assert "benign" in str(report)
    assert len({len(line) for line in lines}) == 1


def test_the_table_of_several_results_has_a_row_for_each(across: Report) -> None:
    lines = across.table().splitlines()
    assert len(lines) == 6
    assert "| A          | A (cross-validated) |" in lines[2]
    assert "AUROC of LUSC" in lines[0]
    assert "one-vs" not in lines[0]
    with pytest.raises(InputError, match="no metric 'auc'"):
        across.table("auc")
    with pytest.raises(InputError, match="no metric 'quadratic_kappa'"):
        across.estimate("quadratic_kappa", trained_on="A", tested_on="B")
    with pytest.raises(InputError, match="no metric 'auc'"):
        across.results[0].per_split("auc")


def test_names_cannot_break_the_table() -> None:
    x, y, _ = cohort(2, patients=20)
    model = LogisticRegression().fit(x, y)
    test = cohort(3, patients=20)
    report = external(model, {"a|b\nc": tuple(test), "d": tuple(test)}, resamples=5)
    assert len(report.table().splitlines()) == 4
    assert "a\\|b c" in report.table()


@pytest.mark.parametrize("place", range(3))
def test_the_area_under_a_drawn_curve_is_the_auroc(report: Report, place: int) -> None:
    result = report.results[0]
    curve = curve_of(result, place, sampling=report.sampling)
    assert curve is not None
    assert curve.low is not None
    assert curve.high is not None
    area = np.trapezoid(curve.tpr, curve.fpr)
    # Repeats weigh by their pairs in the curve and equally in the estimate: nearly the same.
    assert area == pytest.approx(result.class_aurocs[place].value, abs=2e-3)
    assert (curve.low <= curve.high).all()
    middle = np.interp(curve.band_fpr, curve.fpr, curve.tpr)
    assert np.mean((curve.low <= middle + 1e-9) & (middle <= curve.high + 1e-9)) > 0.95


def test_the_curve_of_one_repeat_has_exactly_the_auroc_as_its_area() -> None:
    x, y, groups = cohort(4)
    report = cross_validate(LogisticRegression(), x, y, groups=groups, resamples=20)
    curve = curve_of(report.results[0], 1, sampling=report.sampling)
    assert curve is not None
    area = np.trapezoid(curve.tpr, curve.fpr)
    assert area == pytest.approx(report.estimate("auroc_ovr").value, abs=1e-6)


def test_pictures_name_classes_counts_and_intervals(report: Report, across: Report) -> None:
    axes = roc_figure(report).axes[0]
    legend = axes.get_legend()
    assert legend is not None
    texts = [text.get_text() for text in legend.get_texts()]
    for label, estimate, text in zip(_NAMES, report.results[0].class_aurocs, texts, strict=True):
        count = sum(1 for n in report.results[0].counts() if f"n = {n}" in text)
        assert count >= 1
        assert text.startswith(f"{label} (n = ")
        assert text.endswith(str(estimate))
    assert "95% interval" in legend.get_title().get_text()
    axes = confusion_figure(report).axes[0]
    labels = [tick.get_text() for tick in axes.get_yticklabels()]
    assert labels == [
        f"{name}\nn = {n}" for name, n in zip(_NAMES, report.results[0].counts(), strict=True)
    ]
    titles = [axes.get_title() for axes in roc_figure(across).axes]
    assert [t.split("\n")[0] for t in titles] == [
        "A, cross-validated", "A → B", "B → A", "B, cross-validated",
    ]  # fmt: skip


def test_the_confusion_of_repeats_is_their_mean(report: Report) -> None:
    result = report.results[0]
    np.testing.assert_allclose(result.confusion().sum(1), result.counts())


def test_the_same_report_gives_the_same_picture(across: Report) -> None:
    assert as_png(roc_figure(across)) == as_png(roc_figure(across))


def test_pictures_of_what_cannot_be_compared_are_drawn(tmp_path: Path) -> None:
    names = ("a", "b", "c")
    x, y, _ = cohort(5, names=names)
    model = LogisticRegression().fit(x, y)
    part_x, part_y, _ = cohort(6, names=("a", "b"), patients=10)
    part = external(model, {"part": (part_x, part_y, ["p"] * len(part_y))}, resamples=5)
    part.save(tmp_path)
    assert Report.load(tmp_path) == part
    legend = roc_figure(part).axes[0].get_legend()
    assert legend is not None
    assert len(legend.get_texts()) == 2


def test_matplotlib_keeps_its_settings_and_nothing_heavy_is_imported(tmp_path: Path) -> None:
    code = f"""
import sys
import xmag.evaluate
print([m for m in ("torch", "sklearn", "matplotlib", "scipy") if m in sys.modules])
import matplotlib, numpy as np
before = list(dict.items(matplotlib.rcParams))  # reading "backend" by name resolves it
x = np.random.default_rng(0).normal(size=(40, 2))
report = xmag.evaluate.cross_validate(
    xmag.evaluate.SimpleShot(), x, [0, 1] * 20, groups=range(40), resamples=5)
report.save({str(tmp_path)!r})
print(list(dict.items(matplotlib.rcParams)) == before, "matplotlib.pyplot" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], check=True,
                          capture_output=True, text=True)  # fmt: skip
    assert done.stdout.splitlines() == ["[]", "True False"]


def test_without_matplotlib_the_install_is_named(
    report: Report, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    loaded = [name for name in sys.modules if name.split(".")[0] == "matplotlib"]
    for module in ("matplotlib", *loaded):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        MissingExtraError, match=r'needs matplotlib.*pip install "xmag\[evaluate\]"'
    ):
        report.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert "balanced accuracy" in str(report)


def test_a_png_is_a_png(across: Report) -> None:
    picture: Any = Image.open(io.BytesIO(as_png(confusion_figure(across))))
    assert picture.format == "PNG"
