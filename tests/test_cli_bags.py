"""The commands on what xmag wrote: info, export, check."""

import shutil

import h5py
import numpy as np
import pytest
import torch

import xmag
from xmag.cli import main
from xmag.demo import write_demo_slide


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with slides, and one with features of each."""
    folder = tmp_path_factory.mktemp("cohort")
    (folder / "slides").mkdir()
    write_demo_slide(folder / "slides" / "a.svs", size=(3000, 2400))
    write_demo_slide(folder / "slides" / "b.svs", size=(3000, 2400), seed=1)
    args = ["--model", "xmag-mini", "--processes", "0"]
    assert main(["extract", str(folder / "slides"), "-o", str(folder / "features"), *args]) == 0
    return folder


@pytest.fixture
def features(made, tmp_path):
    return shutil.copytree(made / "features", tmp_path / "features")


def test_info_of_several_slides_goes_on_after_one_that_is_broken(made, tmp_path, capsys):
    (tmp_path / "broken.svs").write_bytes(b"II*\0" + bytes(100))
    slides = [made / "slides" / "a.svs", tmp_path / "broken.svs", made / "slides" / "b.svs"]
    assert main(["info", *map(str, slides)]) == 2
    out, err = capsys.readouterr()
    assert [line for line in out.splitlines() if line.startswith("slide ")] == [
        "slide     a.svs",
        "slide     b.svs",
    ]
    assert err.startswith("xmag: error: broken.svs: ")
    assert err.count("\n") == 1


def test_info_of_features_says_what_made_them(made, capsys):
    path = made / "features" / "a.h5"
    assert main(["info", str(path)]) == 0
    lines = dict(
        line.split(None, 1) for line in capsys.readouterr().out.splitlines() if line[0] > " "
    )
    with h5py.File(path) as file:
        rows, width = file["features"].shape
    assert lines["features"] == "a.h5"
    assert lines["tiles"] == f"{rows}, {width} features each"
    assert lines["model"].startswith("xmag-mini, weights a5c321236231")
    assert lines["slide"] == "a.svs"
    assert lines["coverage"].endswith("% of the tissue")


def test_info_of_features_of_other_software(tmp_path, capsys):
    torch.save(torch.zeros(5, 8), tmp_path / "a.pt")
    assert main(["info", str(tmp_path / "a.pt")]) == 0
    out = capsys.readouterr().out
    assert "5, 8 features each" in out
    assert "there is no provenance" in out


def test_info_of_a_cohort_lists_what_failed(made, tmp_path, capsys):
    slides = shutil.copytree(made / "slides", tmp_path / "slides")
    (slides / "broken.svs").write_bytes(b"II*\0" + bytes(100))
    args = ["--model", "xmag-mini", "--processes", "0"]
    assert main(["extract", str(slides), "-o", str(tmp_path / "features"), *args]) == 1
    capsys.readouterr()
    assert main(["info", str(tmp_path / "features")]) == 0
    out = capsys.readouterr().out
    assert "slides    3: 2 done, 1 failed\n" in out
    assert "failed    broken.svs: " in out


def test_info_of_a_classifier_says_what_it_predicts(tmp_path, capsys):
    rng = np.random.default_rng(0)
    bags = [rng.normal(size=(4, 8)).astype(np.float32) for _ in range(8)]
    clf = xmag.MILClassifier(epochs=1, random_state=0)
    clf.fit(bags, ["benign", "tumour"] * 4, groups=[*range(8)]).save(tmp_path / "model")
    assert main(["info", str(tmp_path / "model")]) == 0
    out = capsys.readouterr().out
    assert "estimator MILClassifier(" in out
    assert "classes   benign, tumour\n" in out


def test_export_writes_the_layout_that_is_asked_for(made, tmp_path, capsys):
    bag = xmag.FeatureBag.load(made / "features" / "a.h5")
    args = ["export", str(made / "features" / "a.h5")]
    assert main([*args, "-o", str(tmp_path / "a.pt"), "--layout", "clam"]) == 0
    assert f"{len(bag)} tile" in capsys.readouterr().out
    found = torch.load(tmp_path / "a.pt", weights_only=True)
    assert np.array_equal(found.numpy(), bag.features)
    assert main([*args, "-o", str(tmp_path / "a.h5"), "--layout", "stamp"]) == 0
    with h5py.File(tmp_path / "a.h5") as file:
        assert file["feats"].shape == bag.features.shape
    assert main([*args, "-o", str(tmp_path / "b.h5"), "--layout", "clam"]) == 2
    assert "expected a path that ends in '.pt'" in capsys.readouterr().err
    assert main([*args, "-o", str(tmp_path / "b.h5")]) == 2


def test_check_of_whole_features_is_status_0(features, capsys):
    assert main(["check", str(features)]) == 0
    count = sum(len(xmag.FeatureBag.load(path)) for path in features.glob("*.h5"))
    assert capsys.readouterr().out == f"2 bags with {count} tiles: whole, finite, of one model\n"


def test_check_finds_a_value_that_changed_and_a_file_that_is_missing(features, capsys):
    with h5py.File(features / "a.h5", "r+") as file:
        file["features"][0, 0] += 1
    (features / "b.h5").unlink()
    assert main(["check", str(features)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "fault     b.svs: b.h5 is missing; extract it again"
    assert lines[1].startswith("fault     a.h5: ")
    assert "checksum" in lines[1]
    assert lines[2] == "1 bag with 0 tiles: 2 faults"


def test_check_finds_values_that_are_not_finite_in_files_without_a_checksum(tmp_path, capsys):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["features"] = np.full((2, 4), np.nan, np.float32)
        file["coords"] = np.zeros((2, 2), np.int64)
    assert main(["check", str(tmp_path)]) == 1
    assert "features hold nan in row 0" in capsys.readouterr().out


def test_check_finds_features_of_another_model(made, features, capsys):
    args = ["extract", str(made / "slides" / "b.svs"), "-o", str(features), "--redo"]
    args += ["--model", "xmag-mini", "--processes", "0"]
    assert main([*args, "--dtype", "bfloat16"]) == 0
    capsys.readouterr()
    assert main(["check", str(features)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert "dtype_class: " in lines[0]


def test_check_of_no_features_is_wrong_use(tmp_path, capsys):
    assert main(["check", str(tmp_path)]) == 2
    assert main(["check", str(tmp_path / "none")]) == 2
    assert "there is no folder" in capsys.readouterr().err
