"""Folds: by patient, stratified, reproducible, kept in a file, and refused where they cannot be."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from sklearn.model_selection import StratifiedGroupKFold
from support.cohorts import cohort

from xmag.errors import InputError, XmagWarning
from xmag.evaluate import Folds, Split

_DATA = cohort(0, names=("a", "b", "c"))


def _stratified(**options: object) -> Folds:
    return Folds.stratified(_DATA.y, groups=_DATA.groups, **options)  # type: ignore[arg-type]


def test_each_case_is_tested_once_a_repeat_and_each_patient_is_on_one_side() -> None:
    folds = _stratified(folds=4, repeats=3)
    assert len(folds) == 12
    for repeat in range(3):
        splits = [split for split in folds.splits if split.repeat == repeat]
        tested = sorted(row for split in splits for row in split.test)
        assert tested == list(range(len(_DATA.y)))
        for split in splits:
            assert sorted(split.train + split.test) == tested
            sides = ({_DATA.groups[row] for row in side} for side in (split.train, split.test))
            assert not set.intersection(*sides)


def test_classes_are_spread_evenly_over_folds() -> None:
    for split in _stratified().splits:
        counts = Counter(_DATA.y[row] for row in split.test)
        for label in "abc":
            assert abs(counts[label] - _DATA.y.count(label) / 5) < 5


def test_folds_are_those_of_scikit_learn() -> None:
    seed = int(np.random.SeedSequence(7).generate_state(1)[0])
    splitter = StratifiedGroupKFold(3, shuffle=True, random_state=seed)
    expected = [
        (tuple(train.tolist()), tuple(test.tolist()))
        for train, test in splitter.split(np.zeros(len(_DATA.y)), _DATA.y, _DATA.groups)
    ]
    found = [(split.train, split.test) for split in _stratified(folds=3, random_state=7).splits]
    assert found == expected


def test_seeds_decide_and_repeats_differ() -> None:
    assert _stratified(random_state=1) == _stratified(random_state=1)
    assert _stratified(random_state=1) != _stratified(random_state=2)
    folds = _stratified(repeats=2)
    first, second = ([s.test for s in folds.splits if s.repeat == r] for r in (0, 1))
    assert first != second
    assert folds.splits[:5] == _stratified().splits


def test_without_groups_each_case_is_its_own_patient() -> None:
    folds = Folds.stratified([0, 1] * 10, folds=5)
    assert [len(split.test) for split in folds.splits] == [4] * 5


def test_leaving_one_patient_out() -> None:
    folds = Folds.leave_one_group_out(["x", "y", "x", "z"])
    assert [split.test for split in folds.splits] == [(0, 2), (1,), (3,)]
    assert folds.splits[1].train == (0, 2, 3)
    with pytest.raises(InputError, match="1 different patients"):
        Folds.leave_one_group_out(["x", "x"])


def test_pairs_made_elsewhere_are_one_repeat_if_no_case_is_tested_twice() -> None:
    pairs = [(np.array([0, 1]), np.array([2])), ([2, 1], [0])]
    assert [s.repeat for s in Folds.from_pairs(pairs, samples=3).splits] == [0, 0]
    twice = [([0, 1], [2]), ([0], [1, 2])]
    assert [s.repeat for s in Folds.from_pairs(twice, samples=3).splits] == [0, 1]


def test_folds_are_kept_in_a_file(tmp_path: Path) -> None:
    folds = _stratified(repeats=2)
    folds.save(tmp_path / "folds.json")
    assert Folds.load(tmp_path / "folds.json") == folds
    assert [path.name for path in tmp_path.iterdir()] == ["folds.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("{}", "not what Folds.save wrote"),
        ('{"format": "xmag.Folds", "schema_version": 2}', "reads up to 1; upgrade"),
        ('{"format": "xmag.Folds", "schema_version": 1, "samples": 2}', "splits is missing"),
        ("[]", "not what Folds.save wrote"),
    ],
)
def test_other_files_are_not_folds(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "folds.json"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        Folds.load(path)
    with pytest.raises(InputError, match=r"none\.json' cannot be read"):
        Folds.load(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([([0, 1], [1])], "case 1 on both sides"),
        ([([0, 1], [])], "no cases to test on"),
        ([([], [1])], "no cases to fit on"),
        ([([0], [3])], "names case 3; expected rows from 0 to 2"),
        ([([0], [-1])], "names case -1"),
        ([([0, 0], [1])], "case to fit on twice"),
        ([([0], [0.5])], "row numbers"),
        ([], "no splits"),
    ],
)
def test_splits_that_make_no_sense_are_refused(pairs: list, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Folds.from_pairs(pairs, samples=3)


def test_a_case_is_tested_once_in_a_repeat() -> None:
    split = Split(train=(0,), test=(1,))
    with pytest.raises(InputError, match="split 1 tests case 1, which another split"):
        Folds(samples=2, splits=(split, split))


@pytest.mark.parametrize(
    ("y", "groups", "folds", "message"),
    [
        ("aaaa", "1234", 2, "one class only"),
        ("aabb", "1122", 3, "2 patients for 3 folds"),
        ("aaab", "1234", 2, "class 'b' has one patient"),
        ("aabb", "123", 2, "groups has 3 entries for 4 cases"),
        ("aabb", "1234", 1, "at least 2"),
        ("aabbbb", "123456", 5, "no class has 5 cases; class 'a' has 2: give folds=2 or fewer"),
        ([0.5, 1.5, 0.5, 1.5], "1234", 2, "not whole.*MILRegressor"),
    ],
)
def test_cohorts_that_cannot_be_split_are_refused(
    y: str, groups: str, folds: int, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        Folds.stratified(list(y), groups=list(groups), folds=folds)


def test_a_class_of_few_patients_gives_one_warning() -> None:
    y, groups = list("aaaaaabb"), list("12345678")
    with pytest.warns(XmagWarning, match="class 'b' has 2 patients for 4 folds") as caught:
        Folds.stratified(y, groups=groups, folds=4)
    assert len(caught) == 1
