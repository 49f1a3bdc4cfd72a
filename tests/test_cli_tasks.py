"""The commands for other tasks than classes of slides: numbers, survival, cases, their tables."""

import csv
import re

import numpy as np
import pytest

from xmag import evaluate
from xmag.bag import FeatureBag
from xmag.cli import main
from xmag.cli.table import read_table
from xmag.cli.tasks import Target
from xmag.evaluate import Report
from xmag.mil import MILClassifier, MILRegressor, MILSurvival

SLIDES = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Features of two slides a patient, and a CSV of them with columns of every task."""
    out = tmp_path_factory.mktemp("cohort")
    rng = np.random.default_rng(0)
    (out / "features").mkdir()
    lines = ["slide,patient,label,TMB,purity,time,event,msi,her2,grade"]
    for number in range(SLIDES):
        patient = number // 2
        level = patient % 4
        features = rng.normal(size=(10, 6)).astype(np.float32)
        features[0, :3] += level
        coords = np.zeros((10, 2), np.int64)
        FeatureBag(features=features, coords=coords).save(out / "features" / f"{number}.h5")
        purity = "" if patient == 5 else f"{0.2 + 0.1 * level:.1f}"
        values = [f"{level}.5", purity, f"{10 - 2 * level + patient / 20}", str(int(patient != 3))]
        values += [str(level % 2), str(level // 2), str(level)]
        lines.append(f"{number}.svs,p{patient},{'ab'[level // 2]},{','.join(values)}")
    (out / "cohort.csv").write_text("\n".join(lines))
    return out


def run(command, folder, *args):
    args = [folder / "cohort.csv", "--features", folder / "features", *args]
    return main([command, *map(str, args)])


def bags_of(folder):
    return [folder / "features" / f"{number}.h5" for number in range(SLIDES)]


def cases_of(folder):
    files = bags_of(folder)
    return [files[first : first + 2] for first in range(0, SLIDES, 2)]


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def column(rows, name):
    return np.array([float(row[name] or "nan") for row in rows])


TASKS = {
    "regression": ["--task", "regression", "--label", "TMB"],
    "numbers": ["--task", "regression", "--label", "TMB", "purity"],
    "survival": ["--task", "survival"],
}


@pytest.fixture(scope="module")
def trained(folder):
    """The folder of an estimator of each task, by slide."""
    for name, flags in TASKS.items():
        assert run("train", folder, "-o", folder / name, *flags, "--epochs", 8, "--seed", 2) == 0
    return folder


def mine(kind, folder, y):
    groups = [row["patient"] for row in rows_of(folder / "cohort.csv")]
    return kind(epochs=8, random_state=2, progress=False).fit(bags_of(folder), y, groups=groups)


def test_train_makes_the_regressor_that_python_makes(trained):
    rows = rows_of(trained / "cohort.csv")
    expected = mine(MILRegressor, trained, column(rows, "TMB")).predict(bags_of(trained))
    found = MILRegressor.load(trained / "regression").predict(bags_of(trained))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    several = np.stack([column(rows, name) for name in ("TMB", "purity")], axis=1)
    assert np.isnan(several).sum() == 2
    expected = mine(MILRegressor, trained, several).predict(bags_of(trained))
    found = MILRegressor.load(trained / "numbers").predict(bags_of(trained))
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_train_makes_the_survival_model_that_python_makes(trained):
    rows = rows_of(trained / "cohort.csv")
    y = np.stack([column(rows, "event"), column(rows, "time")], axis=1)
    expected = mine(MILSurvival, trained, y).predict(bags_of(trained))
    found = MILSurvival.load(trained / "survival").predict(bags_of(trained))
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_train_says_what_it_learned_from(folder, tmp_path, capsys):
    said = {
        "regression": "tmb 0.5 to 3.5",
        "numbers": "tmb 0.5 to 3.5, purity 0.2 to 0.5 (2 missing)",
        "survival": "22 events, time 4.15 to 10.4",
    }
    for name, flags in TASKS.items():
        assert run("train", folder, "-o", tmp_path / name, *flags, "--epochs", 2) == 0
        printed = capsys.readouterr().out.splitlines()
        words = said[name].replace("tmb", "TMB")
        assert printed[0] == f"trained   on 24 slides of 12 patients: {words}"
        measure = "C" if name == "survival" else "R²"
        assert re.search(rf"epoch \d of 2: validation loss [\d.]+, {measure} -?[\d.]+$", printed[1])


def test_columns_have_the_names_that_are_given(folder, tmp_path):
    text = (folder / "cohort.csv").read_text()
    renamed = text.replace(",time,event,", ",OS days,dead,")
    (tmp_path / "c.csv").write_text(renamed)
    flags = ["--task", "survival", "--time", "OS days", "--event", "Dead", "--epochs", 2]
    args = [tmp_path / "c.csv", "--features", folder / "features", "-o", tmp_path / "m", *flags]
    assert main(["train", *map(str, args)]) == 0
    table = read_table(
        tmp_path / "c.csv", str(folder / "features"), target=Target.load(str(tmp_path / "m"))
    )
    np.testing.assert_array_equal(table.y["time"], column(rows_of(folder / "cohort.csv"), "time"))


def test_predict_writes_a_column_a_number(trained, tmp_path, capsys):
    for name, columns in (("regression", [""]), ("numbers", [" TMB", " purity"])):
        out = tmp_path / f"{name}.csv"
        assert run("predict", trained, "--classifier", trained / name, "-o", out) == 0
        rows = rows_of(out)
        assert [*rows[0]] == ["slide", *(f"prediction{column}" for column in columns)]
        expected = MILRegressor.load(trained / name).predict(bags_of(trained)).reshape(SLIDES, -1)
        found = np.stack([column(rows, f"prediction{c}") for c in columns], axis=1)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    printed = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"0\.svs: -?[\d.]+", printed[0])
    assert re.fullmatch(r"0\.svs: TMB [\d.]+, purity [\d.]+", printed[SLIDES + 1])


def test_predict_writes_risk_and_survival_at_the_times_that_are_asked_for(
    trained, tmp_path, capsys
):
    model = MILSurvival.load(trained / "survival")
    args = ("--classifier", trained / "survival", "-o", tmp_path / "p.csv")
    assert run("predict", trained, *args, "--times", "6", "9.5") == 0
    assert re.match(r"0\.svs: risk -?[\d.]+, survival 0\.\d+ at 6, ", capsys.readouterr().out)
    rows = rows_of(tmp_path / "p.csv")
    assert [*rows[0]] == ["slide", "risk", "survival at 6", "survival at 9.5"]
    np.testing.assert_allclose(column(rows, "risk"), model.predict(bags_of(trained)), atol=1e-6)
    functions = model.predict_survival_function(bags_of(trained))
    shares = [float(one(9.5)) for one in functions]
    np.testing.assert_allclose(column(rows, "survival at 9.5"), shares, atol=1e-6)
    assert run("predict", trained, *args) == 0  # at quarters of the training's times
    last = functions[0].domain[1]
    times = [float(name.split()[-1]) for name in rows_of(tmp_path / "p.csv")[0] if "at" in name]
    np.testing.assert_allclose(times, np.array([1, 2, 3]) * last / 4, rtol=0.05)
    assert run("predict", trained, *args, "--times", "1000") == 2
    assert "which the training knows of" in capsys.readouterr().err


def test_times_are_for_survival(trained, capsys):
    args = ("--classifier", trained / "regression", "--times", "3")
    assert run("predict", trained, *args) == 2
    assert "--times is for survival, but this is a MILRegressor" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--loss", "nll"], "--loss is for --task survival"),
        (["--time", "t"], "--time is for --task survival"),
        (["--task", "regression", "--event", "e"], "--event is for --task survival"),
        (["--task", "survival", "--ordinal"], "--ordinal is for --task classification"),
        (["--task", "survival", "--label", "x"], "--label is not for --task survival"),
        (["--ordinal", "--label", "msi", "her2"], "--ordinal is for one column"),
        (["--label", "msi", "MSI "], "'msi' is named twice"),
        (["--label", "slide"], "'slide' is named twice"),
        (["--label", "stage"], "expected the column 'stage' too"),
        (["--task", "survival", "--time", "event"], "'event' is named twice"),
    ],
)
@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_flags_that_do_not_go_together_are_status_2(
    folder, tmp_path, capsys, command, flags, message
):
    assert run(command, folder, "-o", tmp_path / "m", *flags) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("task", "rows", "message"),
    [
        ("regression", ["x"], "line 2 of 'c.csv' has 'x' as its y; expected a number"),
        ("regression", ["1", "inf"], "line 3 of 'c.csv' has 'inf' as its y"),
        ("regression", ["1", ""], "line 3 of 'c.csv' has no y"),
        ("numbers", ["1,2", ","], "line 3 of 'c.csv' has none of y, z"),
        ("numbers", ["1,2", "1,u"], "line 3 of 'c.csv' has 'u' as its z"),
        ("survival", ["1,3", "yes,4"], "line 3 of 'c.csv' has 'yes' as its y; expected 1 or true"),
        ("survival", ["1,3", "2,4"], "line 3 of 'c.csv' has '2' as its y"),
        ("survival", ["1,-3"], "line 2 of 'c.csv' has '-3' as its z; expected a time from 0 on"),
        ("survival", ["1,3", "0,NA"], "line 3 of 'c.csv' has no z: 'NA' stands for"),
        ("survival", ["1,3", ",4"], "line 3 of 'c.csv' has no y"),
        ("labels", ["1,0", "0,3"], "line 3 of 'c.csv' has '3' as its z; expected 1 or true"),
        ("ordinal", ["1", "low"], "line 3 of 'c.csv' has 'low' as its y; expected a number"),
        ("ordinal", ["1", "1.5"], "line 3 of 'c.csv' has '1.5' as its y; expected a whole number"),
    ],
)
def test_values_that_make_no_sense_are_told_with_their_line(
    folder, tmp_path, capsys, task, rows, message
):
    columns = rows[0].count(",") + 1
    flags = {
        "survival": ["--task", "survival", "--event", "y", "--time", "z"],
        "labels": ["--label", "y", "z"],
        "ordinal": ["--label", "y", "--ordinal"],
    }.get(task, ["--task", "regression", "--label", *"yz"[:columns]])
    text = [f"{n}.svs,p{n},{row}" for n, row in enumerate(rows)]
    header = f"slide,patient,{','.join('yz'[:columns])}"
    (tmp_path / "c.csv").write_text("\n".join([header, *text]))
    args = ["train", tmp_path / "c.csv", "--features", folder / "features", "-o", tmp_path / "m"]
    assert main([*map(str, args), *flags]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("word", ["1", "TRUE", "true", "1.0"])
def test_events_are_read_as_spreadsheets_write_them(folder, tmp_path, word):
    other = {"1": "0", "TRUE": "FALSE", "true": "false", "1.0": "0.0"}[word]
    lines = ["slide,patient,event,time", f"0.svs,p,{word},3", f"1.svs,q,{other},4"]
    (tmp_path / "c.csv").write_text("\n".join(lines))
    target = Target(task="survival", columns=("event", "time"))
    table = read_table(tmp_path / "c.csv", str(folder / "features"), target=target)
    assert table.y["event"].tolist() == [True, False]
    assert table.y["time"].tolist() == [3, 4]


def test_by_patient_the_slides_of_a_patient_are_one_case(folder):
    features, path = str(folder / "features"), folder / "cohort.csv"
    for columns in (("label",), ("msi", "her2")):
        table = read_table(path, features, target=Target(columns=columns), by="patient")
        assert table.features == cases_of(folder)
        assert table.slides[1] == ("2.svs", "3.svs")
        assert table.patients == table.ids == [f"p{number}" for number in range(12)]
        assert len(table.y) == 12
        assert table.name(1) == "p1 (2.svs, 3.svs)"
    numbers = read_table(
        path, features, by="patient", target=Target(task="regression", columns=("TMB", "purity"))
    )
    assert np.isnan(numbers.y[5, 1])  # missing for both slides: no contradiction
    assert np.isnan(numbers.y).sum() == 1
    slides = read_table(path, features)
    assert (slides.features, slides.patients) == (bags_of(folder), [])
    assert len(read_table(path, features, by="patient").features) == 12


@pytest.mark.parametrize(
    ("flags", "column", "said"),
    [
        ([], "label", "label a and label b"),
        (["--task", "regression", "--label", "TMB", "purity"], "purity",
         "tmb 0.5 purity 0.2 and tmb 0.5 purity 7.0"),
        (["--task", "survival"], "event", "event 1 time 10.0 and event 0 time 10.0"),
        (["--label", "msi", "her2"], "her2", "msi 0 her2 0 and msi 0 her2 1"),
    ],
)  # fmt: skip
def test_by_patient_a_contradiction_is_told_with_its_lines(
    folder, tmp_path, capsys, flags, column, said
):
    rows = rows_of(folder / "cohort.csv")
    rows[1][column] = {"label": "b", "purity": "7", "event": "0", "her2": "1"}[column]
    with (tmp_path / "c.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0]])
        writer.writeheader()
        writer.writerows(rows)
    args = ["train", tmp_path / "c.csv", "--features", folder / "features", "-o", tmp_path / "m"]
    assert main([*map(str, args), "--by", "patient", *flags]) == 2
    error = capsys.readouterr().err
    assert "lines 2, 3 of 'c.csv' are of the patient 'p0', who is one case" in error
    assert f"with --by patient, and say {said}; expected the same" in error
    assert error.count("\n") == 1


def test_by_patient_goes_with_a_table_that_has_patients(trained, tmp_path, capsys):
    (tmp_path / "c.csv").write_text("slide\n0.svs\n")
    args = ["--classifier", str(trained / "regression"), "--by", "patient"]
    features = ["--features", str(trained / "features")]
    assert main(["predict", str(tmp_path / "c.csv"), *features, *args]) == 2
    assert "expected the column 'patient' too" in capsys.readouterr().err
    assert main(["predict", str(trained / "features" / "1.h5"), *args]) == 2
    assert "--by patient goes with a CSV" in capsys.readouterr().err


def test_a_model_trained_in_python_has_numbered_columns(trained, tmp_path):
    model = MILRegressor.load(trained / "numbers")
    model.save(tmp_path / "model")
    out = tmp_path / "p.csv"
    assert run("predict", trained, "--classifier", tmp_path / "model", "-o", out) == 0
    assert [*rows_of(out)[0]] == ["slide", "prediction 1", "prediction 2"]


def test_classifiers_are_as_before(folder, tmp_path):
    groups = [row["patient"] for row in rows_of(folder / "cohort.csv")]
    labels = [row["label"] for row in rows_of(folder / "cohort.csv")]
    args = ("-o", tmp_path / "m", "--epochs", 4, "--seed", 2)
    assert run("train", folder, *args, "--task", "classification") == 0
    expected = MILClassifier(epochs=4, random_state=2, progress=False)
    expected.fit(bags_of(folder), labels, groups=groups)
    found = MILClassifier.load(tmp_path / "m").predict_proba(bags_of(folder))
    np.testing.assert_allclose(found, expected.predict_proba(bags_of(folder)), atol=1e-6)


@pytest.mark.parametrize(
    "flags",
    [
        ["--task", "regression"],
        ["--fusion", "late"],
        ["--ordinal"],
        ["--folds-table", "f.tsv"],
        ["--loss", "nll"],
        ["--aggregator", "mean"],
        ["--epochs", "3"],
    ],
)
def test_a_trained_model_takes_no_options_of_training(trained, tmp_path, capsys, flags):
    args = ("--classifier", trained / "regression", "-o", tmp_path / "out", *flags)
    assert run("evaluate", trained, *args) == 2
    said = capsys.readouterr().err
    assert "--classifier tests one that is trained; leave out" in said
    assert said.rstrip().endswith(f"leave out {flags[0]}")


def test_columns_that_are_not_named_stay_those_of_the_training(folder, tmp_path):
    text = (folder / "cohort.csv").read_text()
    (tmp_path / "a.csv").write_text(text.replace(",time,event,", ",months,dead,"))
    (tmp_path / "b.csv").write_text(text.replace(",time,event,", ",OS,dead,"))
    survival = ["--task", "survival", "--time", "months", "--event", "dead"]
    rows = [line.split(",") for line in text.splitlines()]
    grades = [*rows[0], "grade 2"], *([*row, f"{row[-1]}.0"] for row in rows[1:])
    (tmp_path / "c.csv").write_text("\n".join(map(",".join, grades)))
    for train, test, flags, other in (
        ("a.csv", "b.csv", survival, ["--time", "OS"]),
        ("c.csv", "c.csv", ["--label", "grade", "--ordinal"], ["--label", "grade 2"]),
    ):
        out, features = tmp_path / flags[1], ["--features", str(folder / "features")]
        args = ["train", tmp_path / train, *features, "-o", out, "--epochs", 2, *flags]
        assert main([*map(str, args)]) == 0
        for name, more in ((train, []), (test, other)):
            args = ["evaluate", tmp_path / name, *features, "-o", out / name, "--classifier", out]
            assert main([*map(str, args), *more]) == 0
        one, two = (Report.load(out / name).results[0].scores for name in (train, test))
        np.testing.assert_array_equal(one, two)


def test_the_table_of_folds_has_folds_of_its_own(folder, tmp_path, capsys):
    args = ("-o", tmp_path, "--folds-table", tmp_path / "f.tsv", "--folds", 3)
    assert run("evaluate", folder, *args) == 2
    assert "leave out --folds" in capsys.readouterr().err


def known(folder, task):
    """y of each slide, and the patients."""
    rows = rows_of(folder / "cohort.csv")
    patients = [row["patient"] for row in rows]
    if task == "regression":
        return column(rows, "TMB"), patients
    if task == "numbers":
        return np.stack([column(rows, "TMB"), column(rows, "purity")], axis=1), patients
    pairs = zip(column(rows, "event"), column(rows, "time"), strict=True)
    return np.array([*pairs], dtype=[("event", bool), ("time", float)]), patients


KINDS = {"regression": MILRegressor, "numbers": MILRegressor, "survival": MILSurvival}


@pytest.mark.filterwarnings("ignore:epoch 1 of 3 is kept:xmag.errors.XmagWarning")
@pytest.mark.parametrize("fusion", ["early", "late"])
@pytest.mark.parametrize("name", TASKS)
def test_by_patient_the_estimator_is_that_of_cases(folder, tmp_path, capsys, name, fusion):
    y, patients = known(folder, name)
    expected = KINDS[name](epochs=3, random_state=2, progress=False, fusion=fusion)
    expected.fit(cases_of(folder), y[::2], groups=patients[::2])
    args = ("-o", tmp_path / "m", "--epochs", 3, "--seed", 2, "--by", "patient")
    assert run("train", folder, *args, "--fusion", fusion, *TASKS[name]) == 0
    assert "trained   on 12 patients with 24 slides: " in capsys.readouterr().out
    out = tmp_path / "p.csv"
    args = ("--classifier", tmp_path / "m", "-o", out, "--by", "patient")
    assert run("predict", folder, *args) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[1].startswith("p1 (2.svs, 3.svs): ")
    assert printed[-1] == f"12 patients; see {out}"
    rows = rows_of(out)
    assert [row["patient"] for row in rows] == patients[::2]
    assert rows[1]["slides"] == "2.svs; 3.svs"
    columns = {"survival": ["risk"], "regression": ["prediction"]}
    columns = columns.get(name, ["prediction TMB", "prediction purity"])
    found = np.stack([column(rows, c) for c in columns], axis=1)
    wanted = expected.predict(cases_of(folder)).reshape(12, -1)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:epoch 1 of 3 is kept:xmag.errors.XmagWarning")
@pytest.mark.parametrize("name", TASKS)
def test_evaluate_saves_the_report_that_python_makes(folder, tmp_path, capsys, name):
    y, patients = known(folder, name)
    estimator = KINDS[name](epochs=3, random_state=0)
    names = {} if name == "survival" else {"classes": TASKS[name][3:]}
    expected = evaluate.cross_validate(
        estimator, cases_of(folder), y[::2], groups=patients[::2], folds=2, **names
    )
    args = ("-o", tmp_path, "--folds", 2, "--epochs", 3, "--by", "patient")
    assert run("evaluate", folder, *args, *TASKS[name]) == 0
    assert str(expected) in capsys.readouterr().out
    found = Report.load(tmp_path)
    assert found.results == expected.results
    assert found.task == ("survival" if name == "survival" else "regression")
    assert any(path.suffix == ".png" for path in tmp_path.iterdir())


@pytest.mark.parametrize("name", TASKS)
def test_evaluate_tests_what_was_saved_on_the_columns_of_its_training(
    trained, tmp_path, capsys, name
):
    args = ("-o", tmp_path / "out", "--classifier", trained / name)
    assert run("evaluate", trained, *args) == 0
    y, patients = known(trained, name)
    loaded = KINDS[name].load(trained / name)
    names = {} if name == "survival" else {"classes": TASKS[name][3:]}
    expected = evaluate.external(loaded, {"cohort": (bags_of(trained), y, patients)}, **names)
    assert Report.load(tmp_path / "out").results == expected.results
    other = ["--time", "months"] if name == "survival" else ["--label", "stage"]
    assert run("evaluate", trained, *args, *other) == 2
    assert f"expected the column {other[1]!r} too" in capsys.readouterr().err
    assert run("evaluate", trained, *args, "--label" if name == "survival" else "--time", "x") == 2


@pytest.mark.parametrize("by", ["slide", "patient"])
def test_folds_are_those_of_a_table(folder, tmp_path, by):
    lines = [["slide_id", "case_id", "fold_0", "fold_1"]]
    for number in range(SLIDES):
        sides = ["test", "train"] if number < SLIDES // 2 else ["train", "test"]
        lines.append([f"{number}.svs", f"p{number // 2}", *sides])
    (tmp_path / "f.tsv").write_text("\n".join("\t".join(line) for line in lines))
    args = ("-o", tmp_path / "out", "--folds-table", tmp_path / "f.tsv", "--by", by)
    assert run("evaluate", folder, *args, "--epochs", 2) == 0
    half = SLIDES // 2 if by == "slide" else SLIDES // 4
    tests = [split.test for split in Report.load(tmp_path / "out").folds.splits]
    assert tests == [tuple(range(half)), tuple(range(half, 2 * half))]


@pytest.mark.parametrize(
    ("flags", "classes"),
    [
        (["--label", "grade", "--ordinal"], [0, 1, 2, 3]),
        (["--ordinal", "b", "a"], ["b", "a"]),
    ],
)
def test_ordinal_classes_have_the_order_of_numbers_or_the_one_given(
    folder, tmp_path, flags, classes
):
    assert run("train", folder, "-o", tmp_path / "m", "--epochs", 2, *flags) == 0
    loaded = MILClassifier.load(tmp_path / "m")
    assert loaded.classes_.tolist() == classes
    assert loaded.get_params()["ordinal"] in (True, classes)
    args = ("-o", tmp_path / "out", "--epochs", 2, "--folds", 2)
    assert run("evaluate", folder, *args, *flags) == 0
    assert [*Report.load(tmp_path / "out").classes] == classes
    args = ("-o", tmp_path / "out", "--classifier", tmp_path / "m")
    assert run("evaluate", folder, *args) == 0


def test_several_columns_of_classes_are_labels_of_their_own(folder, tmp_path, capsys):
    flags = ["--label", "msi", "her2"]
    assert run("train", folder, "-o", tmp_path / "m", "--epochs", 3, *flags) == 0
    assert "slides of 12 patients: msi 12, her2 12" in capsys.readouterr().out
    out = tmp_path / "p.csv"
    assert run("predict", folder, "--classifier", tmp_path / "m", "-o", out) == 0
    rows = rows_of(out)
    names = ["prediction msi", "probability msi", "prediction her2", "probability her2"]
    assert [*rows[0]] == ["slide", *names]
    loaded = MILClassifier.load(tmp_path / "m")
    found = np.stack([column(rows, name) for name in names[1::2]], axis=1)
    np.testing.assert_allclose(found, loaded.predict_proba(bags_of(folder)), atol=1e-6)
    found = np.stack([column(rows, name) for name in names[::2]], axis=1)
    np.testing.assert_array_equal(found, loaded.predict(bags_of(folder)))
    said = capsys.readouterr().out.splitlines()[0]
    assert re.fullmatch(r"0\.svs: msi [01] \(0\.\d+\), her2 [01] \(0\.\d+\)", said)
    args = ("-o", tmp_path / "out", "--epochs", 2, "--folds", 2)
    assert run("evaluate", folder, *args, *flags) == 0
    assert Report.load(tmp_path / "out").classes == ("msi", "her2")
