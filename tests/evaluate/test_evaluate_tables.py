"""Folds from tables: Patho-Bench's splits, a column of folds, and what they refuse."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from xmag.errors import InputError, XmagWarning
from xmag.evaluate import Folds, cross_validate

_ROWS = (
    # case_id, slide_id, label, fold_0, fold_2, fold_10
    ("P1", "P1-a", "wild", "train", "test", "train"),
    ("P1", "P1-b", "wild", "train", "test", "train"),
    ("P2", "P2-a", "mutant", "val", "train", "test"),
    ("P3", "P3-a", "wild", "test", "train", "train"),
    ("P4", "P4-a", "mutant", "test", "val", "val"),
)
_HEAD = ("case_id", "slide_id", "KRAS_mutation", "fold_0", "fold_2", "fold_10")
_SLIDES = [row[1] for row in _ROWS]


def _table(folder: Path, rows: Any = _ROWS, head: Any = _HEAD, name: str = "k=all.tsv") -> Path:
    path = folder / name
    tab = "\t" if name.endswith(".tsv") else ","
    path.write_text("\n".join(map(tab.join, [head, *rows])) + "\n", encoding="utf-8")
    return path


def test_each_column_of_patho_bench_is_a_split_in_the_order_of_its_number(tmp_path: Path) -> None:
    folds = Folds.from_table(_table(tmp_path), _SLIDES)
    assert [split.train for split in folds.splits] == [(0, 1, 2), (2, 3, 4), (0, 1, 3, 4)]
    assert [split.test for split in folds.splits] == [(3, 4), (0, 1), (2,)]
    assert folds.samples == 5
    backwards = Folds.from_table(_table(tmp_path), _SLIDES[::-1])
    assert backwards.splits[0].test == (0, 1)


def test_ids_may_be_patients_of_several_slides(tmp_path: Path) -> None:
    folds = Folds.from_table(_table(tmp_path), ["P4", "P3", "P2", "P1"])
    assert folds.splits[1].test == (3,)
    assert folds.samples == 4


def test_splits_that_test_a_case_twice_are_repeats(tmp_path: Path) -> None:
    rows = [(*row[:4], row[3], row[3]) for row in _ROWS]
    folds = Folds.from_table(_table(tmp_path, rows), _SLIDES)
    assert [split.repeat for split in folds.splits] == [0, 1, 2]


def test_val_is_fitted_on_or_tested_on(tmp_path: Path) -> None:
    (split,) = Folds.from_table(_one_split(tmp_path), _SLIDES, tested="val").splits
    assert (split.train, split.test) == ((0, 1), (2,))
    path = _one_split(tmp_path, test="val")
    with pytest.raises(InputError, match=r"fold_0 .* no case of 'test' .* tested='val'"):
        Folds.from_table(path, _SLIDES)
    assert Folds.from_table(path, _SLIDES, tested="val").splits[0].test == (2, 3, 4)
    with pytest.raises(InputError, match=r"fold_0 .* no case of 'train'"):
        Folds.from_table(_one_split(tmp_path, train="val"), _SLIDES, tested="val")


def _one_split(folder: Path, **renamed: str) -> Path:
    rows = [(*row[:3], renamed.get(row[3], row[3])) for row in _ROWS]
    return _table(folder, rows, _HEAD[:4])


def test_a_column_of_folds_names_the_fold_that_tests_a_case(tmp_path: Path) -> None:
    rows = [("a", "10"), ("b", "2"), ("c", "10"), ("d", "1"), ("e", "")]
    path = _table(tmp_path, rows, ("slide", "fold"), "folds.csv")
    folds = Folds.from_table(path, list("abcde"))
    assert [split.test for split in folds.splits] == [(3,), (1,), (0, 2)]
    assert folds.splits[0].train == (0, 1, 2)
    assert {split.repeat for split in folds.splits} == {0}


@pytest.mark.parametrize(
    ("values", "tested", "message"),
    [
        (("train", "test", "train"), "test", r"holds \['test', 'train'\]; .* call it fold_0"),
        (("0", "1", "0"), "val", "tested is 'val'"),
    ],
)
def test_a_column_of_folds_is_none_of_sides(
    values: tuple[str, ...], tested: Any, message: str, tmp_path: Path
) -> None:
    path = _table(tmp_path, zip("abc", values, strict=True), ("slide", "fold"), "folds.csv")
    with pytest.raises(InputError, match=message):
        Folds.from_table(path, list("abc"), tested=tested)


def test_missing_values_leave_a_case_out_of_a_split(tmp_path: Path) -> None:
    rows = [("P5", "P5-a", "wild", "", "train", "nan"), *_ROWS]
    folds = Folds.from_table(_table(tmp_path, rows), ["P5-a", *_SLIDES])
    assert 0 not in folds.splits[0].train + folds.splits[0].test
    assert 0 in folds.splits[1].train


def test_numbers_serve_as_ids_and_a_column_may_be_named(tmp_path: Path) -> None:
    rows = [("1", "x", "0"), ("2", "y", "1"), ("3", "z", "1")]
    path = _table(tmp_path, rows, ("number", "slide", "fold"), "folds.csv")
    folds = Folds.from_table(path, np.array([3, 1, 2]), id_column="number")
    assert [split.test for split in folds.splits] == [(1,), (0, 2)]
    assert Folds.from_table(path, ["z", "x", "y"]) == folds


def test_cases_that_only_the_table_has_are_left_out_with_a_warning(tmp_path: Path) -> None:
    with pytest.warns(XmagWarning, match=r"1 of 5 ids .* first 'P2-a'") as caught:
        folds = Folds.from_table(_one_split(tmp_path), [*_SLIDES[:2], *_SLIDES[3:]])
    assert caught[0].filename == __file__
    assert folds.samples == 4


def test_folds_of_a_table_serve_in_a_cross_validation(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [(f"p{n // 2}", f"s{n}", str(n // 2 % 3)) for n in range(24)]
    path = _table(tmp_path, rows, ("patient", "slide", "fold"), "folds.csv")
    folds = Folds.from_table(path, [row[1] for row in rows])
    report = cross_validate(
        LogisticRegression(), rng.normal(size=(24, 2)), [n // 2 % 2 for n in range(24)],
        groups=[row[0] for row in rows], folds=folds, resamples=5,
    )  # fmt: skip
    assert report.folds == folds


def _changed(place: int, column: int, value: str) -> list[tuple[str, ...]]:
    rows = [list(row) for row in _ROWS]
    rows[place][column] = value
    return [tuple(row) for row in rows]


@pytest.mark.parametrize(
    ("rows", "head", "ids", "options", "message"),
    [
        (_ROWS, _HEAD, [*_SLIDES, "P9-a"], {}, r"'P9-a' is not in the column slide_id .*1 such"),
        (_ROWS, _HEAD, ["x"], {}, "no id, such as 'x', is in .*'slide_id', 'case_id'"),
        (_ROWS, _HEAD, [*_SLIDES, "P1-a"], {}, "'P1-a' twice"),
        (_changed(0, 3, "test"), _HEAD, _SLIDES, {}, "fold_0 .* patient 'P1' on both sides"),
        (_changed(0, 3, "test"), _HEAD, ["P1", "P2"], {}, "rows of case_id 'P1' .* fold_0"),
        (_changed(2, 4, "training"), _HEAD, _SLIDES, {}, "fold_2 .*holds 'training'"),
        (_ROWS, ("a", "b", "c", "d", "e", "f"), _SLIDES, {}, "which one has the ids"),
        (_ROWS, (*_HEAD[:3], "d", "e", "f"), _SLIDES, {}, "expected fold_0, fold_1"),
        (_ROWS, _HEAD, _SLIDES, {"groups": [1, 2, 3, 4, 1]}, "patient 1 on both sides"),
        (_ROWS, _HEAD, _SLIDES, {"groups": [1]}, "groups has 1 entries"),
        (_ROWS, _HEAD, _SLIDES, {"id_column": "slide"}, "no column 'slide'"),
        (_ROWS, _HEAD, _SLIDES, {"tested": "all"}, "tested is 'all'"),
        ((), _HEAD, _SLIDES, {}, "no rows"),
    ],
)
def test_what_does_not_fit_is_named(
    rows: Any, head: Any, ids: Any, options: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        Folds.from_table(_table(tmp_path, rows, head), ids, **options)


def test_a_patient_on_both_sides_of_a_column_of_folds_is_refused(tmp_path: Path) -> None:
    rows = [("p", "a", "0"), ("p", "b", "1"), ("q", "c", "0")]
    path = _table(tmp_path, rows, ("patient", "slide", "fold"), "folds.csv")
    with pytest.raises(InputError, match=r"0 of 'folds\.csv' has patient 'p' on both sides"):
        Folds.from_table(path, list("abc"))


def test_tables_are_read_as_those_of_the_commands_are(tmp_path: Path) -> None:
    path = _table(tmp_path, [("a", "0"), ("b", "1")], (" Slide", "FOLD"), "folds.csv")
    folds = Folds.from_table(path, ["a", "b"])
    assert [split.test for split in folds.splits] == [(0,), (1,)]
    assert Folds.from_table(path, ["a", "b"], id_column="Slide ") == folds
    path.write_text("slide,fold\na,0\nb, c,1\n")
    with pytest.raises(InputError, match=r"line 3 of 'folds\.csv' has 3 values for 2 columns"):
        Folds.from_table(path, ["a", "b"])


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.tsv' cannot be read"):
        Folds.from_table(tmp_path / "none.tsv", ["a"])
    (tmp_path / "bad.csv").write_bytes(b"slide,fold\n\xff\xfe,1\n")
    with pytest.raises(InputError, match=r"bad\.csv' is no text in UTF-8"):
        Folds.from_table(tmp_path / "bad.csv", ["a"])
