"""The commands around a classifier: train, predict, evaluate, heatmap, distill."""

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image
from support.vendor_slides import write_scn

from xmag import draw
from xmag.bag import FeatureBag
from xmag.cli import main
from xmag.demo import write_demo_slide
from xmag.encoder import load_model
from xmag.evaluate import Report
from xmag.extract import extract_features
from xmag.finetune import Settings, finetune_slides
from xmag.mil import MILClassifier, MILRegressor, MILSurvival
from xmag.slide import Slide


def write_cohort(folder, *, patients=10, seed=0):
    """Features of two slides a patient, half of them tumours with an own tile, and their CSV."""
    rng = np.random.default_rng(seed)
    (folder / "features" / "a").mkdir(parents=True)
    lines = ["slide,label,patient"]
    for number in range(2 * patients):
        tumour = number // 2 % 2
        features = rng.normal(size=(12, 8)).astype(np.float32)
        features[0, :4] += 4 * tumour
        bag = FeatureBag(features=features, coords=np.zeros((12, 2), np.int64))
        bag.save(folder / "features" / "a" / f"{number}.h5")
        lines.append(
            f"/data/slides/a/{number}.svs,{'tumour' if tumour else 'normal'},p{number // 2}"
        )
    (folder / "cohort.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return write_cohort(tmp_path_factory.mktemp("cohort"))


@pytest.fixture(scope="module")
def classifier(cohort):
    out = cohort / "classifier"
    args = ["train", cohort / "cohort.csv", "--features", cohort / "features", "-o", out]
    assert main([*map(str, args), "--epochs", "15", "--seed", "3"]) == 0
    return out


def lines_of(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_help_of_the_commands_loads_nothing_heavy():
    code = (
        "import sys\nfrom xmag.cli import main\n"
        "for c in ('train', 'predict', 'evaluate', 'heatmap', 'distill'): main([c, '--help'])\n"
        "print([m for m in ('torch', 'numpy', 'PIL', 'tqdm', 'sklearn') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_train_makes_the_classifier_that_python_makes(cohort, classifier):
    rows = lines_of(cohort / "cohort.csv")
    files = [cohort / "features" / "a" / f"{number}.h5" for number in range(len(rows))]
    mine = MILClassifier(epochs=15, random_state=3, progress=False)
    mine.fit(files, [r["label"] for r in rows], groups=[r["patient"] for r in rows])
    loaded = MILClassifier.load(classifier)
    np.testing.assert_array_equal(loaded.predict_proba(files), mine.predict_proba(files))


def test_predict_writes_what_the_classifier_says(cohort, classifier, tmp_path, capsys):
    out = tmp_path / "predictions.csv"
    args = ["predict", cohort / "cohort.csv", "--features", cohort / "features"]
    assert main([*map(str, [*args, "--classifier", classifier, "-o", out])]) == 0
    printed = capsys.readouterr().out.splitlines()
    rows = lines_of(out)
    files = [cohort / "features" / "a" / f"{number}.h5" for number in range(20)]
    expected = MILClassifier.load(classifier)
    for row, label, values in zip(
        rows, expected.predict(files), expected.predict_proba(files), strict=True
    ):
        assert row["prediction"] == label
        shown = [float(row["probability normal"]), float(row["probability tumour"])]
        assert shown == pytest.approx(values.tolist(), abs=1e-6)
    assert rows[3]["slide"] == "/data/slides/a/3.svs"
    assert printed[3].startswith(f"/data/slides/a/3.svs: {rows[3]['prediction']} (normal 0.")
    assert printed[-1] == f"20 slides; see {out}"


def test_predict_takes_feature_files_as_they_are(cohort, classifier, capsys):
    files = [cohort / "features" / "a" / f"{number}.h5" for number in (0, 2)]
    assert main(["predict", *map(str, files), "--classifier", str(classifier)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in printed] == ["0.h5", "2.h5"]


def test_evaluate_cross_validates_and_saves_the_report(cohort, tmp_path, capsys):
    args = ["evaluate", cohort / "cohort.csv", "--features", cohort / "features", "-o", tmp_path]
    assert main([*map(str, args), "--folds", "2", "--repeats", "2", "--epochs", "5"]) == 0
    printed = capsys.readouterr().out
    report = Report.load(tmp_path)
    assert str(report) in printed
    assert len(report.folds) == 4
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"report.json", "roc.png", "confusion.png", "calibration.png"}


def test_evaluate_of_an_external_cohort_trains_nothing(cohort, classifier, tmp_path, capsys):
    write_cohort(tmp_path, patients=6, seed=9)
    args = ["evaluate", tmp_path / "cohort.csv", "--features", tmp_path / "features"]
    args += ["-o", tmp_path / "out", "--classifier", classifier]
    assert main([*map(str, args)]) == 0
    result = Report.load(tmp_path / "out").results[0]
    files = [tmp_path / "features" / "a" / f"{number}.h5" for number in range(12)]
    expected = MILClassifier.load(classifier).predict_proba(files)
    np.testing.assert_allclose(result.scores[np.argsort(result.rows)], expected)
    assert result.tested_on == "cohort"
    args += ["--folds", "3"]
    assert main([*map(str, args)]) == 2
    assert "--folds and --repeats are for cross-validation" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slide,label\na/1.svs,x\n", "expected the column 'patient' too"),
        ("slide,label,patient\n", "has no rows"),
        ("slide,label,patient\na/1.svs,,p\n", "line 2 of 'c.csv' has no label"),
        ("slide,label,patient\na/1.svs,NA,p\n", "has no label: 'NA' stands for a missing value"),
        ("slide,label,patient\na/1.svs,x, nan \n", "has no patient: 'nan' stands for"),
        ("slide,label,patients\na/1.svs,x,p\n", "'patients'; did you mean 'patient'"),
        ("slide,label,patient\na/1.svs,x,p\na/2.svs,X,q\n", "the labels 'x' and 'X'"),
        ("slide,label,patient\na/1.svs,x,A  1\na/2.svs,y,a 1\n", "the patients 'A 1' and 'a 1'"),
        ("slide,label,patient\na/1.svs,1,p\na/2.svs,0.5,q\n", "there is --task regression"),
        ("slide,label,patient\na/99.svs,x,p\n", "extract them first: xmag extract"),
        ("slide,label,patient\na/1.svs,x,p\nb/a/1.svs,y,q\n", "expected each slide once"),
        ("slide,label,patient,features\na/1.svs,x,p,no.h5\n", "which 'c.csv' names for 'a/1.svs'"),
    ],
)
def test_a_table_that_makes_no_sense_is_status_2(cohort, tmp_path, text, message, capsys):
    (tmp_path / "c.csv").write_text(text)
    args = ["train", str(tmp_path / "c.csv"), "--features", str(cohort / "features")]
    assert main([*args, "-o", str(tmp_path / "m")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert re.search(re.escape(message).replace(r"\.\*", ".*"), err)
    assert not (tmp_path / "m").exists()


def test_blanks_make_no_patients_and_no_classes_of_their_own(cohort, classifier, tmp_path, capsys):
    lines = (cohort / "cohort.csv").read_text().splitlines()
    names = ["Slide , label", "Patient"]
    padded = [
        f"{a} , {b} ,{c}  " if n % 2 else f"{a},{b},{c}"
        for n, (a, b, c) in enumerate(line.split(",") for line in lines[1:])
    ]
    (tmp_path / "c.csv").write_text("\n".join([",".join(names), *padded, ",,", ""]))
    args = ["train", tmp_path / "c.csv", "--features", cohort / "features", "-o", tmp_path / "m"]
    assert main([*map(str, args), "--epochs", "15", "--seed", "3"]) == 0
    assert "20 slides of 10 patients: normal 10, tumour 10" in capsys.readouterr().out
    weights = [folder / "classifier.safetensors" for folder in (classifier, tmp_path / "m")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_too_many_folds_for_a_class_name_those_that_can_be_made(cohort, tmp_path, capsys):
    rows = [f"a/{n}.svs,{'T' if n < 2 else 'N'},p{n}" for n in range(6)]
    (tmp_path / "c.csv").write_text("\n".join(["slide,label,patient", *rows]))
    args = ["evaluate", tmp_path / "c.csv", "--features", cohort / "features", "-o", tmp_path / "o"]
    assert main([*map(str, args), "--epochs", "1"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("xmag: error: there are 6 patients for 5 folds")
    assert "class 'T' has 2: give --folds 2 or fewer" in said
    assert said.count("\n") == 1
    assert "Folds." not in said
    assert main([*map(str, args), "--epochs", "1", "--folds", "2"]) == 0


def test_the_cases_of_this_kind_are_told_in_one_line(shared, tmp_path, capsys):
    for table, message in (("two_patients", "--folds 2"), ("spaces", "2 patients for 5 folds")):
        args = ["evaluate", shared / "cases" / f"{table}.csv", "-o", tmp_path]
        assert main([*map(str, args)]) == 2
        said = capsys.readouterr().err
        assert said.startswith("xmag: error: ")
        assert said.count("\n") == 1
        assert message in said


@pytest.mark.parametrize("damage", ["cut", "empty", "another width", "not finite"])
@pytest.mark.parametrize("command", ["train", "predict", "evaluate", "external"])
def test_features_that_make_no_sense_are_one_line_and_status_2(
    cohort, classifier, tmp_path, capsys, damage, command
):
    shutil.copytree(cohort / "features", tmp_path / "features")
    victim = tmp_path / "features" / "a" / "3.h5"
    if damage in ("cut", "empty"):
        victim.write_bytes(victim.read_bytes()[: 500 * (damage == "cut")])
    else:
        with h5py.File(victim, "r+") as file:
            del file["features"]
            width, value = (8, np.inf) if damage == "not finite" else (7, 0.0)
            file["features"] = np.full((12, width), value, np.float32)
    args = [cohort / "cohort.csv", "--features", tmp_path / "features"]
    args += [] if command == "predict" else ["-o", tmp_path / "out"]
    args += ["--classifier", classifier] if command in ("predict", "external") else []
    name = "evaluate" if command == "external" else command
    assert main([name, *map(str, args)]) == 2
    errors = [x for x in capsys.readouterr().err.splitlines() if not x.startswith("xmag: warning")]
    assert len(errors) == 1
    assert errors[0].startswith("xmag: error: ")
    assert "3.h5" in errors[0]


@pytest.mark.parametrize("option", ["--seed", "--repeats", "--folds", "--epochs"])
def test_numbers_that_make_no_sense_are_one_line_and_status_2(cohort, tmp_path, capsys, option):
    args = ["evaluate", cohort / "cohort.csv", "--features", cohort / "features", "-o", tmp_path]
    assert main([*map(str, args), option, "-1"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert option.removeprefix("--") in said


def test_an_external_cohort_of_one_class_is_status_2(cohort, classifier, tmp_path, capsys):
    (tmp_path / "c.csv").write_text("slide,label,patient\na/0.svs,normal,p\na/1.svs,normal,q\n")
    args = ["evaluate", tmp_path / "c.csv", "--features", cohort / "features", "-o", tmp_path / "o"]
    assert main([*map(str, args), "--classifier", str(classifier)]) == 2
    assert "c has one class only: all 2 cases are 'normal'" in capsys.readouterr().err


def test_an_error_that_was_not_foreseen_is_one_line_too(capsys):
    assert main(["info", "a\0b.svs"]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "run it again with -v" in said
    assert main(["info", "a\0b.svs", "-v"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_features_may_be_named_in_the_table(cohort, classifier, tmp_path, capsys):
    name = cohort / "features" / "a" / "1.h5"
    (tmp_path / "c.csv").write_text(f"slide,features\nany,{name}\n")
    assert main(["predict", str(tmp_path / "c.csv"), "--classifier", str(classifier)]) == 0
    assert capsys.readouterr().out.startswith("any: ")
    (tmp_path / "c.csv").write_text("slide\nany\n")
    assert main(["predict", str(tmp_path / "c.csv"), "--classifier", str(classifier)]) == 2
    assert "give --features" in capsys.readouterr().err


def test_ids_and_bare_names_find_their_features(cohort, classifier, tmp_path, capsys):
    args = ["--features", str(cohort / "features" / "a"), "--classifier", str(classifier)]
    (tmp_path / "c.csv").write_text("slide,id\nelsewhere/x.svs,4\n../y/5,\n6.svs,\n")
    assert main(["predict", str(tmp_path / "c.csv"), *args]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_too_few_patients_are_told_in_the_words_of_the_command_line(cohort, tmp_path, capsys):
    (tmp_path / "c.csv").write_text("slide,label,patient\na/0.svs,x,p\na/1.svs,y,q\n")
    args = ["train", str(tmp_path / "c.csv"), "--features", str(cohort / "features")]
    assert main([*args, "-o", str(tmp_path / "m")]) == 2
    err = capsys.readouterr().err
    assert "give more" in err
    assert "validation=" not in err


def test_a_folder_without_a_classifier_is_status_1(cohort, tmp_path, capsys):
    file = str(cohort / "features" / "a" / "1.h5")
    assert main(["predict", file, "--classifier", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("xmag: error: ")


@pytest.fixture(scope="module")
def on_slides(tmp_path_factory):
    """Slides, their features by xmag-mini, and a classifier of these."""
    folder = tmp_path_factory.mktemp("slides")
    for number in range(2):
        write_demo_slide(folder / f"{number}.svs", size=(6300, 4900), seed=number)
    args = ["extract", folder, "-o", folder / "features", "--model", "xmag-mini"]
    assert main([*map(str, args)]) == 0
    bags = [FeatureBag.load(folder / "features" / f"{number}.h5") for number in range(2)]
    clf = MILClassifier(epochs=1, random_state=0, progress=False)
    clf.fit(bags, ["a", "b"], groups=["p", "q"], validation=None)
    clf.save(folder / "classifier")
    return folder


def test_the_gallery_of_heatmap_takes_a_closer_look(on_slides, tmp_path):
    args = ["heatmap", on_slides / "0.svs", "--classifier", on_slides / "classifier"]
    args += ["--features", on_slides / "features", "-o", tmp_path / "x.png", "--gallery-mpp", 1.0]
    assert main([*map(str, args)]) == 0
    clf = MILClassifier.load(on_slides / "classifier")
    with Slide(on_slides / "0.svs") as slide, Image.open(tmp_path / "x-gallery.png") as image:
        attention = clf.attention(on_slides / "features" / "0.h5")
        expected = draw.gallery(slide, attention, mpp=1.0)
        np.testing.assert_array_equal(np.asarray(image.convert("RGB")), np.asarray(expected))


def test_heatmap_extracts_with_the_encoder_of_the_classifier(on_slides, tmp_path, capsys):
    args = ["heatmap", on_slides / "0.svs", "--classifier", on_slides / "classifier"]
    args += ["-o", tmp_path / "x.png", "--gallery", "--geojson"]
    assert main([*map(str, args)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("0.svs: ")
    names = ["x.png", "x-gallery.png", "x.geojson"]
    assert printed[1:] == [f"written   {tmp_path / name}" for name in names]
    clf = MILClassifier.load(on_slides / "classifier")
    attention = clf.attention(on_slides / "features" / "0.h5")
    found = json.loads((tmp_path / "x.geojson").read_text())
    weights = [f["properties"]["measurements"]["Attention"] for f in found["features"]]
    np.testing.assert_allclose(weights, attention.scores, rtol=1e-3)
    with Slide(on_slides / "0.svs") as slide:
        caption = f"predicted: {printed[0].removeprefix('0.svs: ')}"
        expected = np.asarray(draw.heatmap(slide, attention, caption=caption), int)
    with Image.open(tmp_path / "x.png") as image:
        assert np.abs(np.asarray(image, int) - expected).max() <= 1


def test_heatmap_refuses_features_of_another_dtype_than_that_of_the_training(
    on_slides, tmp_path, capsys
):
    args = ["heatmap", on_slides / "0.svs", "--classifier", on_slides / "classifier"]
    args += ["-o", tmp_path / "x.png", "--device", "cpu", "--dtype", "bfloat16"]
    assert main([*map(str, args)]) == 2
    assert "dtype_class: 'half' there, 'fp32' here" in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()


@pytest.fixture(scope="module")
def models(on_slides):
    """Models of numbers and of survival, on the features of the slides."""
    bags = [FeatureBag.load(on_slides / "features" / f"{number}.h5") for number in range(2)]
    for kind, y in ((MILRegressor, [1.5, 3.0]), (MILSurvival, [(1, 2.0), (1, 5.0)])):
        model = kind(epochs=1, random_state=0, progress=False)
        model.fit(bags, np.array(y), groups=["p", "q"], validation=None)
        model.save(on_slides / kind.__name__)
    return on_slides


@pytest.mark.parametrize(
    ("kind", "words"),
    [(MILRegressor, r"-?\d[.\de-]*"), (MILSurvival, r"risk -?[\d.]+, survival [\d.]+ at 1.2, .*")],
)
def test_heatmap_shows_the_attention_of_every_task(models, tmp_path, capsys, kind, words):
    args = ["heatmap", models / "0.svs", "--classifier", models / kind.__name__]
    args += ["--features", models / "features", "-o", tmp_path / "x.png"]  # a folder serves, too
    assert main([*map(str, args)]) == 0
    said = capsys.readouterr().out.splitlines()[0].removeprefix("0.svs: ")
    assert re.fullmatch(words, said)
    attention = kind.load(models / kind.__name__).attention(models / "features" / "0.h5")
    with Slide(models / "0.svs") as slide, Image.open(tmp_path / "x.png") as image:
        expected = draw.heatmap(slide, attention, caption=f"predicted: {said}")
        assert np.abs(np.asarray(image, int) - np.asarray(expected, int)).max() <= 1


@pytest.mark.parametrize("scale", ["rank", "weight"])
def test_heatmap_has_the_scale_that_is_asked_for(on_slides, tmp_path, capsys, scale):
    args = ["heatmap", on_slides / "0.svs", "--classifier", on_slides / "classifier"]
    args += ["--features", on_slides / "features", "-o", tmp_path / "x.png", "--scale", scale]
    assert main([*map(str, args)]) == 0
    out, err = capsys.readouterr()
    caption = f"predicted: {out.splitlines()[0].removeprefix('0.svs: ')}"
    clf = MILClassifier.load(on_slides / "classifier")
    attention = clf.attention(on_slides / "features" / "0.h5")
    assert draw.is_nearly_even(attention) == ("attention is nearly even" in err)
    with Slide(on_slides / "0.svs") as slide, Image.open(tmp_path / "x.png") as image:
        expected = draw.heatmap(slide, attention, caption=caption, scale=scale)
        assert np.abs(np.asarray(image, int) - np.asarray(expected, int)).max() <= 1


def test_heatmaps_of_the_slides_of_a_patient_have_one_scale(models, tmp_path, capsys):
    slides = [models / f"{number}.svs" for number in range(2)]
    args = ["heatmap", *slides, "--classifier", models / "MILSurvival", "--geojson", "--gallery"]
    assert main([*map(str, args), "--features", str(models / "features"), f"-o{tmp_path}"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("0.svs, 1.svs: risk ")
    names = [f"{n}{end}" for n in "01" for end in ("-heatmap.png", "-gallery.png", ".geojson")]
    assert said[1:] == [f"written   {tmp_path / name}" for name in names]
    loaded = MILSurvival.load(models / "MILSurvival")
    case = loaded.attention([models / "features" / f"{number}.h5" for number in range(2)])
    caption = f"predicted: {said[0].removeprefix('0.svs, 1.svs: ')}"
    for path, attention in zip(slides, case, strict=True):
        with Slide(path) as slide, Image.open(tmp_path / f"{path.stem}-heatmap.png") as image:
            expected = draw.heatmap(slide, attention, case=case, caption=caption)
            assert np.abs(np.asarray(image, int) - np.asarray(expected, int)).max() <= 1
        found = json.loads((tmp_path / f"{path.stem}.geojson").read_text())
        assert found == json.loads(json.dumps(draw.attention_geojson(attention, case=case)))


@pytest.mark.parametrize(
    ("slides", "flags", "message"),
    [
        ("01", ["-o", "x.png"], "each slide has a picture; give a folder"),
        ("01", ["--features", "{}/features/0.h5"], "give the folder that xmag extract wrote to"),
        ("00", [], "two of the slides are called alike"),
        ("0", ["--features", "{}"], "extract them first: xmag extract"),
    ],
)
def test_slides_and_files_that_do_not_fit_are_status_2(
    models, tmp_path, monkeypatch, capsys, slides, flags, message
):
    monkeypatch.chdir(tmp_path)
    args = ["heatmap", *(str(models / f"{number}.svs") for number in slides)]
    args += ["--classifier", str(models / "MILSurvival"), *(flag.format(models) for flag in flags)]
    assert main(args) == 2
    assert message in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


def test_heatmap_of_given_features_needs_no_encoder(on_slides, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    args = ["heatmap", on_slides / "0.svs", "--classifier", on_slides / "classifier"]
    args += ["--features", on_slides / "features" / "0.h5"]
    assert main([*map(str, args)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["0-heatmap.png"]
    assert main([*map(str, args), "--model", "xmag-mini"]) == 2
    assert "leave one of them out" in capsys.readouterr().err


def test_heatmap_takes_features_of_other_software_as_far_as_they_say_where_tiles_lie(
    on_slides, tmp_path, capsys
):
    bag = FeatureBag.load(on_slides / "features" / "0.h5")
    bag.export(tmp_path / "stamp.h5", layout="stamp")
    with h5py.File(tmp_path / "stamp.h5", "r+") as file:
        del file.attrs["tiles"]  # which STAMP does not write
    with (
        h5py.File(on_slides / "features" / "0.h5") as ours,
        h5py.File(tmp_path / "trident.h5", "w") as theirs,
    ):
        theirs["features"], theirs["coords"] = ours["features"][:], ours["coords"][:]
        theirs["coords"].attrs.update(ours["coords"].attrs)
    args = ["heatmap", on_slides / "0.svs", "--classifier", on_slides / "classifier"]
    for name in ("trident", "stamp"):
        out = tmp_path / f"{name}.png"
        assert main([*map(str, args), f"--features={out.with_suffix('.h5')}", f"-o{out}"]) == 0
        assert out.is_file()
    bag.export(tmp_path / "clam.pt", layout="clam")
    out = tmp_path / "clam.png"
    assert main([*map(str, args), f"--features={tmp_path / 'clam.pt'}", f"-o{out}"]) == 2
    assert "does not say where its tiles lie (coords is None)" in capsys.readouterr().err
    assert not out.exists()


def test_heatmap_of_the_features_of_another_slide_is_status_2(on_slides, cohort, tmp_path, capsys):
    write_demo_slide(tmp_path / "small.svs", size=(3000, 2000))
    args = ["heatmap", tmp_path / "small.svs", "--classifier", on_slides / "classifier"]
    args += ["--features", on_slides / "features" / "0.h5", "-o", tmp_path / "x.png"]
    assert main([*map(str, args)]) == 2
    assert "give the slide that the features were made from" in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()


def test_scans_of_one_file_have_their_own_features_and_heatmaps(
    on_slides, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    regions = [((60, 40), (700, 560)), ((900, 660), (560, 480))]
    write_scn(Path("two.scn"), regions=regions, canvas=(1600, 1300), levels=(1, 2), mpp=1.0)
    Path("c.csv").write_text("slide,region,label,patient\ntwo.scn,0,a,p\ntwo.scn,1,b,q\n")
    assert main(["extract", "c.csv", "-o", "f", "--model", "xmag-mini"]) == 0
    args = ["--classifier", str(on_slides / "classifier"), "--features", "f"]
    capsys.readouterr()
    assert main(["predict", "c.csv", *args]) == 0
    words = [line.removeprefix("two.scn: ") for line in capsys.readouterr().out.splitlines()]
    assert words[0] != words[1]
    assert main(["heatmap", "two.scn", *args]) == 2
    assert "region=1 (560x480 px)" in capsys.readouterr().err
    pictures = [Path("two-heatmap.png"), Path("two-region1-heatmap.png")]
    for region, picture in enumerate(pictures):
        assert main(["heatmap", "two.scn", *args, "--region", str(region)]) == 0
        assert capsys.readouterr().out.startswith(f"two.scn: {words[region]}\n")
        assert picture.is_file()
    assert pictures[0].read_bytes() != pictures[1].read_bytes()
    args[-1] = "f/two-region1.h5"  # on the same canvas
    assert main(["heatmap", "two.scn", *args, "--region", "0"]) == 2
    assert "are of region 1, but the slide is opened with region 0" in capsys.readouterr().err


def test_heatmap_takes_the_encoder_that_was_fine_tuned_with_the_classifier(
    on_slides, tmp_path, capsys
):
    settings = Settings(epochs=1, ema=None, augmentation=None)
    slides = [on_slides / f"{number}.svs" for number in range(2)]
    tuned = finetune_slides(
        slides, ["a", "b"], groups=["p", "q"], model=load_model("xmag-mini", device="cpu"),
        validation=None, settings=settings, progress=False,
    )  # fmt: skip
    tuned.save(tmp_path / "tuned")
    args = ["heatmap", on_slides / "0.svs", "--classifier", tmp_path / "tuned"]
    assert main([*map(str, args), "-o", str(tmp_path / "x.png"), "--geojson"]) == 0
    bag = extract_features(slides[0], model=tuned.encoder, progress=False)
    a, b = tuned.classifier.predict_proba([bag])[0]
    assert capsys.readouterr().out.splitlines()[0].endswith(f"(a {a:.3f}, b {b:.3f})")
    found = json.loads((tmp_path / "x.geojson").read_text())["features"]
    weights = [feature["properties"]["measurements"]["Attention"] for feature in found]
    np.testing.assert_allclose(weights, tuned.classifier.attention(bag).scores, rtol=1e-3)
    # Features of the encoder as it was are refused.
    args += ["--features", on_slides / "features" / "0.h5", "-o", tmp_path / "y.png"]
    assert main([*map(str, args)]) != 0
    assert not (tmp_path / "y.png").exists()


def test_distill_without_its_file_is_status_2(tmp_path, capsys):
    assert main(["distill", str(tmp_path / "none.toml")]) == 2
    assert capsys.readouterr().err.startswith("xmag: error: ")
