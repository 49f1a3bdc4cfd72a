"""Cases of several bags as samples: tested as one, and leaks of a bag seen."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.cohorts import NearestMeanOfBags, as_bags, cohort

from xmag.bag import FeatureBag
from xmag.errors import InputError, XmagWarning
from xmag.evaluate import Folds, cross_validate, external
from xmag.evaluate.samples import digests

_DATA = cohort(0, patients=24, most_slides=3, separation=2.5)
_PLACES = {one: [n for n, g in enumerate(_DATA.groups) if g == one] for one in _DATA.groups}
_LABELS = [_DATA.y[places[0]] for places in _PLACES.values()]


class OfCases(NearestMeanOfBags):
    """A classifier of cases: of several bags, it sees the mean of their features."""

    def fit(self, X: Sequence[Any], y: Any, groups: Any = None) -> "OfCases":  # noqa: N803
        super().fit([_joined(case) for case in X], y, groups)
        return self

    def predict_proba(self, X: Sequence[Any]) -> np.ndarray:  # noqa: N803
        return super().predict_proba([_joined(case) for case in X])


def _joined(case: Any) -> Any:
    if not isinstance(case, list | tuple):
        return case
    bags = [FeatureBag.load(bag) if isinstance(bag, str | Path) else bag for bag in case]
    return np.concatenate([np.asarray(bag) for bag in bags])


def _cases(bags: list[Any]) -> list[Any]:
    """A case of each patient: a list of bags, or the bag where there is one."""
    cases = [[bags[n] for n in places] for places in _PLACES.values()]
    return [case[0] if len(case) == 1 else case for case in cases]


def test_lists_of_bags_and_bags_may_be_mixed_and_given_as_paths(tmp_path: Path) -> None:
    bags = as_bags(_DATA.x)
    paths = [tmp_path / f"{n}.h5" for n in range(len(bags))]
    for bag, path in zip(bags, paths, strict=True):
        bag.save(path)
    cases = _cases(bags)
    assert {type(case) for case in cases} == {list, FeatureBag}
    options: dict[str, Any] = {"groups": list(_PLACES), "folds": 3, "resamples": 10}
    report = cross_validate(OfCases(), cases, _LABELS, **options)
    assert report.results[0].cases == 24
    assert (report.estimate("auroc_ovr").value or 0) > 0.7
    of_paths = _cases([str(path) for path in paths])
    assert cross_validate(OfCases(), of_paths, _LABELS, **options) == report
    tuples = [tuple(case) if isinstance(case, list) else case for case in cases]
    assert cross_validate(OfCases(), tuples, _LABELS, **options) == report


def test_a_bag_in_cases_on_both_sides_is_refused(tmp_path: Path) -> None:
    bags: list[Any] = as_bags(_DATA.x)
    cases = _cases(bags)
    folds = Folds.stratified(_LABELS, groups=list(_PLACES), folds=2)
    row, other = folds.splits[0].train[0], folds.splits[0].test[0]
    bag = cases[row][0] if isinstance(cases[row], list) else cases[row]
    bag.save(tmp_path / "again.safetensors")
    for again in (bag, np.asarray(bag), str(tmp_path / "again.safetensors")):
        leaking = list(cases)
        whole = cases[other] if isinstance(cases[other], list) else [cases[other]]
        leaking[other] = [*whole, again]
        with pytest.raises(InputError, match="has the same features as training case"):
            cross_validate(OfCases(), leaking, _LABELS, groups=list(_PLACES), folds=folds)
        with pytest.warns(XmagWarning, match="flatters"):
            cross_validate(
                OfCases(), leaking, _LABELS, groups=list(_PLACES), folds=folds, resamples=5,
                on_identical="warn",
            )  # fmt: skip
        cohorts = {"A": (cases, _LABELS, list(_PLACES)), "B": (leaking, _LABELS, range(24))}
        with pytest.raises(InputError, match="trained on A, tested on B: test case 0"):
            external(OfCases(), cohorts, train="A", folds=None)


def test_a_list_of_numbers_is_one_vector_and_a_list_of_bags_has_one_hash_each() -> None:
    bags = as_bags(_DATA.x[:3])
    assert [len(own) for own in digests([bags[0], bags[:2], tuple(bags)])] == [1, 2, 3]
    assert digests([[1.0, 2.0], [3.0, 4.0]])[0] == digests(np.array([[1.0, 2.0]]))[0]
    assert len(digests([[[1.0, 2.0], [3.0, 4.0]]])[0]) == 1  # a bag as nested lists
    empty = FeatureBag(np.zeros((0, 6), np.float32), np.zeros((0, 2)))
    assert len(digests([[bags[0], empty]])[0]) == 1
