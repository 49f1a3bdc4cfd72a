import os
import subprocess
import sys
from pathlib import Path

import pytest

import xmag
from xmag.cohort.resume import SEEN_NAME
from xmag.demo import write_demo_slide

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def slide_path(tmp_path: Path) -> Path:
    (tmp_path / "slides").mkdir()
    return write_demo_slide(tmp_path / "slides" / "a.svs", size=(5400, 4500))


def _run(script: str, *arguments: Path | str) -> str:
    command = [sys.executable, EXAMPLES / script, *arguments, "--model", "xmag-mini"]
    return subprocess.run(
        command, check=True, timeout=800, stdout=subprocess.PIPE, text=True
    ).stdout


def test_one_slide(slide_path: Path, tmp_path: Path) -> None:
    printed = _run("extract_one_slide.py", slide_path, tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"a.h5", "a.pt", "a.png"}
    tiles = len(xmag.FeatureBag.load(tmp_path / "out" / "a.h5"))
    assert printed.startswith(f"a: {tiles} tiles at ")


def test_a_cohort_and_again(slide_path: Path, tmp_path: Path) -> None:
    first = _run("extract_cohort.py", slide_path.parent, tmp_path / "out")
    again = _run("extract_cohort.py", slide_path.parent, tmp_path / "out")
    assert first.startswith("done ")
    assert again.startswith("skipped ")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        SEEN_NAME, "a.h5", "a.h5.png", "report.csv"
    }  # fmt: skip


def test_fine_tuning_and_again(tmp_path: Path) -> None:
    lines = ["slide,label,patient"]
    for number, (label, patient) in enumerate(zip("abab", "wxyz", strict=True)):
        write_demo_slide(tmp_path / f"{number}.svs", size=(2700, 2300), seed=number)
        lines.append(f"{number}.svs,{label},{patient}")
    (tmp_path / "cohort.csv").write_text("\n".join(lines))
    command = ("finetune.py", tmp_path / "cohort.csv", tmp_path / "out", "--epochs", "1")
    printed = _run(*command)
    assert printed.startswith("epoch 0: loss ")
    assert printed.splitlines()[-1] in ("0.svs: a", "0.svs: b")
    assert {p.name for p in (tmp_path / "out" / "model").iterdir()} == {
        "model.safetensors", "config.json", "classifier.safetensors", "classifier.json",
    }  # fmt: skip
    assert _run(*command) == printed


def test_a_classifier_with_its_report_and_heatmaps(tmp_path: Path) -> None:
    make = [sys.executable, EXAMPLES / "make_cohort.py", tmp_path]
    subprocess.run([*make, "--slides", "12", "--size", "3800", "2900"], check=True, timeout=800)
    printed = _run(
        "classify_cohort.py", tmp_path / "cohort.csv", tmp_path / "out", "--folds", "3",
        "--epochs", "30",
    )  # fmt: skip
    assert "| AUROC of tumour" in printed
    report = xmag.evaluate.Report.load(tmp_path / "out" / "evaluation")
    assert len(report.results[0].rows) == 12
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "features", "evaluation", "classifier", "00-heatmap.png", "00-gallery.png", "00.geojson",
        "02-heatmap.png", "02-gallery.png", "02.geojson",
    }  # fmt: skip
    assert "02.svs: tumour" in printed


@pytest.fixture(scope="module")
def small_cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cohort")
    make = [sys.executable, EXAMPLES / "make_cohort.py", folder]
    subprocess.run([*make, "--slides", "12", "--size", "2700", "2300"], check=True, timeout=800)
    return folder / "cohort.csv"


def test_encoders_compared(small_cohort: Path, tmp_path: Path) -> None:
    args = ("--models", "xmag-mini", "xmag-mini@4.0", "--folds", "3", "--epochs", "2")
    done = subprocess.run(
        [sys.executable, EXAMPLES / "compare_encoders.py", small_cohort, tmp_path, *args],
        check=True, capture_output=True, text=True, timeout=800,
    )  # fmt: skip
    rows = [
        [c.strip() for c in line.split("|")] for line in done.stdout.splitlines() if "|" in line
    ]
    assert [row[1:3] for row in rows[2:]] == [["xmag-mini", "2"], ["xmag-mini-4.0", "4"]]
    tiles = [float(row[4]) for row in rows[2:]]
    assert 2 < tiles[0] / tiles[1] <= 9
    assert len([*tmp_path.rglob("*.h5")]) == 24


def test_a_closer_look_by_a_second_encoder(small_cohort: Path, tmp_path: Path) -> None:
    printed = _run(
        "closer_look.py", small_cohort, tmp_path / "out", "--tiles", "3",
        "--epochs", "5",
    )  # fmt: skip
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "features", "random-encoder", "closer", "classifier",
    }  # fmt: skip
    assert "slides/03.svs: 3 of " in printed
    every = xmag.FeatureBag.load(tmp_path / "out" / "features" / "03.h5")
    bag = xmag.FeatureBag.load(tmp_path / "out" / "closer" / "03.h5")
    plan = xmag.TilePlan.from_json((tmp_path / "out" / "closer" / "03.json").read_text())
    assert bag.features.shape == (48, 64)
    assert plan.coords.tolist() == bag.coords.tolist()
    # 448 µm are 896 px of 0.5 µm; each tile lies in the one that it is said to lie in.
    inside = bag.coords - every.coords[plan.parent]
    assert sorted(map(tuple, inside.tolist())) == sorted(
        (x, y) for x in range(0, 896, 224) for y in range(0, 896, 224) for _ in range(3)
    )
    loaded = xmag.MILClassifier.load(tmp_path / "out" / "classifier")
    assert f"slides/03.svs: {loaded.predict([bag])[0]}" in printed


def test_tiles_in_scanpy(tmp_path: Path) -> None:
    for package in ("scanpy", "igraph", "anndata"):
        reason = "examples/to_scanpy.py is run in an environment of its own, with scanpy and igraph"
        pytest.importorskip(package, reason=reason)
    write_demo_slide(tmp_path / "a.svs", size=(5400, 4500))
    printed = _run("to_scanpy.py", tmp_path / "a.svs", tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "a.h5ad", "a-umap.png", "a-clusters.png",
    }  # fmt: skip
    assert printed.startswith("a: ")


def test_without_scanpy_the_example_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "scanpy.py").write_text("raise ImportError('no scanpy here')")
    command = [sys.executable, EXAMPLES / "to_scanpy.py", "a.svs", "out"]
    path = {**os.environ, "PYTHONPATH": str(tmp_path)}
    found = subprocess.run(
        command, check=False, env=path, stderr=subprocess.PIPE, text=True, timeout=800
    )
    assert found.returncode == 1
    assert 'pip install "xmag[anndata]" scanpy igraph' in found.stderr


def test_survival_of_patients_with_its_report_and_heatmaps(tmp_path: Path) -> None:
    make = [sys.executable, EXAMPLES / "make_cohort.py", tmp_path, "--survival"]
    subprocess.run([*make, "--slides", "16", "--size", "2300", "1900"], check=True, timeout=800)
    rows = (tmp_path / "cohort.csv").read_text().splitlines()
    assert rows[0] == "slide,time,event,log_hazard,patient"
    assert len(rows) == 17
    printed = _run(
        "survival_cohort.py", tmp_path / "cohort.csv", tmp_path / "out", "--folds", "2",
        "--epochs", "20",
    )  # fmt: skip
    assert "| Harrell's C " in printed
    assert "Harrell's C of the truth itself: 0." in printed
    report = xmag.evaluate.Report.load(tmp_path / "out" / "evaluation")
    assert len(report.results[0].rows) == 8
    assert (tmp_path / "out" / "evaluation" / "kaplan-meier.png").is_file()
    pictures = [path for path in (tmp_path / "out").iterdir() if path.suffix == ".png"]
    assert len(pictures) == 4  # two patients, two slides each
    loaded = xmag.MILSurvival.load(tmp_path / "out" / "model")
    files = [tmp_path / "out" / "features" / f"{number:02}.h5" for number in range(16)]
    risks = loaded.predict([files[first : first + 2] for first in range(0, 16, 2)])
    assert f"risk {max(risks):.2f}" in printed
