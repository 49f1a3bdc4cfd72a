"""Folds: cross-validation splits by patient, stratified, saved and loaded as JSON."""

import itertools
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from xmag import files, records
from xmag.errors import InputError, XmagWarning
from xmag.evaluate.extra import optional
from xmag.evaluate.tables import table_pairs
from xmag.metrics.labels import Labels, as_labels, encode, numbered, refuse_continuous

_Codes = NDArray[np.int64]
_FORMAT = records.Format(
    name="xmag.Folds", version=1, writer="Folds.save", remedy="give a file that xmag saved"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """One train-test split: the rows of the cases to fit on, and of those to test on.

    Splits of one `repeat` have test cases of their own; their predictions are put together.
    """

    train: tuple[int, ...]
    test: tuple[int, ...]
    repeat: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Folds:
    """Cross-validation splits of a cohort of `samples` cases.

    Raises InputError where a split is empty on one side, has a case on both, or names a case that
    is not there, and where a case is tested twice in one repeat.
    """

    samples: int
    splits: tuple[Split, ...]

    def __post_init__(self) -> None:
        if not self.splits:
            raise InputError("there are no splits; expected at least one")
        tested: dict[int, set[int]] = {}
        for number, split in enumerate(self.splits):
            self._check(number, split)
            if again := tested.setdefault(split.repeat, set()) & set(split.test):
                raise InputError(
                    f"split {number} tests case {min(again)}, which another split of repeat"
                    f" {split.repeat} tests too; give overlapping splits a repeat each"
                )
            tested[split.repeat] |= set(split.test)

    def _check(self, number: int, split: Split) -> None:
        for side, rows in (("to fit on", split.train), ("to test on", split.test)):
            if not rows:
                raise InputError(f"split {number} has no cases {side}; give fewer folds")
            if len(set(rows)) < len(rows):
                raise InputError(f"split {number} has a case {side} twice; expected each once")
            if strange := [row for row in rows if not 0 <= row < self.samples]:
                raise InputError(
                    f"split {number} names case {strange[0]}; expected rows from 0 to"
                    f" {self.samples - 1}, as there are {self.samples} cases"
                )
        if both := set(split.train) & set(split.test):
            raise InputError(f"split {number} has case {min(both)} on both sides; expected one")

    def __len__(self) -> int:
        return len(self.splits)

    def __repr__(self) -> str:
        return f"<Folds: {len(self)} splits of {self.samples:,} cases>"

    @classmethod
    def stratified(
        cls,
        y: Labels,
        *,
        groups: Labels | None = None,
        folds: int = 5,
        repeats: int = 1,
        random_state: int = 0,
    ) -> "Folds":
        """Stratified k-fold splits by patient (group), `repeats` times.

        Each patient is in one fold, each class is spread evenly; each repeat is shuffled anew.
        scikit-learn's StratifiedGroupKFold, or StratifiedKFold without groups. Raises InputError
        for one class only, a class of one patient, or fewer patients than folds; warns where a
        class has fewer patients than folds, so that some folds lack it.
        """
        labels = as_labels(y, "y")
        refuse_continuous(labels, "y")
        codes, patients = _sorted_codes(labels), None
        if groups is not None:
            patients = _sorted_codes(as_labels(groups, "groups", n=len(codes)))
        _check_options(folds, repeats, random_state)
        _check_counts(labels, codes, np.arange(len(codes)) if patients is None else patients, folds)
        return cls._shuffled(codes, patients, folds, repeats, random_state)

    @classmethod
    def by_patient(
        cls,
        groups: Labels,
        *,
        strata: Labels | None = None,
        folds: int = 5,
        repeats: int = 1,
        random_state: int = 0,
    ) -> "Folds":
        """K-fold splits by patient (group) where there are no classes, `repeats` times.

        `strata`, whole numbers (n,), are spread over the folds as evenly as patients allow, such as
        whether there was an event. Raises InputError for fewer patients than folds.
        """
        patients = numbered(groups, len(groups), "groups")
        strata = np.zeros(len(patients), np.int64) if strata is None else strata
        codes = _sorted_codes(as_labels(strata, "strata", n=len(patients)))
        _check_options(folds, repeats, random_state)
        if (number := len(np.unique(patients))) < folds:
            raise InputError(
                f"there are {number} patients for {folds} folds; give folds={max(number, 2)} or"
                " fewer, or more patients"
            )
        if np.bincount(codes).max() < folds:  # which scikit-learn refuses
            codes[:] = 0
        return cls._shuffled(codes, patients, folds, repeats, random_state)

    @classmethod
    def _shuffled(
        cls, codes: _Codes, patients: _Codes | None, folds: int, repeats: int, random_state: int
    ) -> "Folds":
        kinds = optional("sklearn.model_selection", "making folds")
        kind = kinds.StratifiedKFold if patients is None else kinds.StratifiedGroupKFold
        splits: list[Split] = []
        for repeat, seed in enumerate(np.random.SeedSequence(random_state).generate_state(repeats)):
            splitter = kind(folds, shuffle=True, random_state=int(seed))
            with warnings.catch_warnings():
                # Its warning of a rare class counts cases, and ours, already given, patients.
                warnings.filterwarnings("ignore", "The least populated class", UserWarning)
                pairs = splitter.split(codes, codes, patients)
                splits += [_split(train, test, repeat) for train, test in pairs]
        return cls(samples=len(codes), splits=tuple(splits))

    @classmethod
    def leave_one_group_out(cls, groups: Labels) -> "Folds":
        """Leave-one-patient-out splits: a fold for each group, in order of first appearance.

        Raises InputError for fewer than two of them.
        """
        patients = numbered(groups, len(groups), "groups")
        if (number := len(set(patients.tolist()))) < 2:
            raise InputError(f"groups has {number} different patients; expected at least two")
        each = (patients == one for one in range(number))
        pairs = [(np.flatnonzero(~tested), np.flatnonzero(tested)) for tested in each]
        return cls.from_pairs(pairs, samples=len(patients))

    @classmethod
    def from_pairs(cls, pairs: Sequence[tuple[ArrayLike, ArrayLike]], *, samples: int) -> "Folds":
        """Folds from given splits, each as (rows to fit on, rows to test on).

        They are one repeat if no case is tested twice (a cross-validation), else each is a repeat
        of its own (a Monte-Carlo one). Raises InputError as `Folds` does.
        """
        arrays = [(np.asarray(train), np.asarray(test)) for train, test in pairs]
        for array in itertools.chain(*arrays):
            if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
                raise InputError(
                    f"a split has an array of {array.dtype} with shape {array.shape}; expected row"
                    " numbers, of shape (n,)"
                )
        tested = [row for _, test in arrays for row in test.tolist()]
        disjoint = len(set(tested)) == len(tested)
        splits = [
            _split(train, test, 0 if disjoint else number)
            for number, (train, test) in enumerate(arrays)
        ]
        return cls(samples=samples, splits=tuple(splits))

    @classmethod
    def from_table(
        cls,
        path: str | os.PathLike[str],
        ids: Labels,
        *,
        groups: Labels | None = None,
        id_column: str | None = None,
        tested: Literal["test", "val"] = "test",
    ) -> "Folds":
        """Folds from a table: Patho-Bench's splits (TSV), or a CSV with a column `fold`.

        Columns ``fold_0``, ``fold_1``, ... hold train, val or test, and each is a split: cases of
        ``test`` are tested, those of ``train`` and ``val`` fitted on, since estimators choose their
        own validation set; ``tested="val"`` tests those of ``val``, and leaves those of ``test``
        out. A single column ``fold`` holds the name of the fold that tests a case. A file whose
        name ends in ``.tsv`` has tabs, any other one commas.

        Args:
            path: The table, in UTF-8.
            ids: n ids, of the cases in the order of X: its slides or patients.
            groups: n patients; those of the table's column ``case_id`` or ``patient`` are checked
                as well, where it has one.
            id_column: The column of the ids: by default, the first there is of ``slide_id``,
                ``slide``, ``case_id``, ``patient`` and ``id`` that holds an id of `ids`.
            tested: Which cases are tested.

        Cases that only the table has are left out, with a warning, and those whose value is missing
        in a fold are in neither side of it. Raises InputError for an id of `ids` that the table
        lacks, rows of one id that differ, another value in a fold, and a patient on both sides.
        """
        pairs = table_pairs(Path(path), ids, groups, id_column=id_column, tested=tested)
        return cls.from_pairs(pairs, samples=len(ids))

    def to_dict(self) -> dict[str, Any]:
        """The folds as plain JSON values."""
        return _FORMAT.headed(records.plain(self))

    @classmethod
    def from_dict(cls, content: Any) -> "Folds":
        """The Folds from a dict of `to_dict`; InputError for anything else."""
        return records.from_dict(cls, _FORMAT.opened(content), "folds")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the folds to `path` as JSON; OutputError where it cannot be written."""
        files.write_text(path, _FORMAT.dumps(records.plain(self)) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Folds":
        """Load the Folds from a file of `save`; InputError for another file."""
        return records.from_dict(cls, _FORMAT.load(path), "folds")


def _sorted_codes(labels: Sequence[Any]) -> _Codes:
    """Class codes of labels, int64 (n,), in sorted order as scikit-learn's, where sortable."""
    found = dict.fromkeys(labels)
    try:
        return encode(labels, sorted(found))
    except TypeError:
        return encode(labels, tuple(found))


def _split(train: NDArray[Any], test: NDArray[Any], repeat: int) -> Split:
    return Split(train=tuple(train.tolist()), test=tuple(test.tolist()), repeat=repeat)


def _check_options(folds: int, repeats: int, random_state: int) -> None:
    if folds < 2 or repeats < 1:
        raise InputError(f"folds={folds}, repeats={repeats}; expected at least 2 and at least 1")
    if not isinstance(random_state, Integral) or random_state < 0:
        raise InputError(f"random_state is {random_state!r}; expected an int from 0 on")


def _check_counts(labels: Sequence[Any], codes: _Codes, patients: _Codes, folds: int) -> None:
    names = dict(zip(codes.tolist(), labels, strict=True))
    if len(names) < 2:
        raise InputError(f"y has one class only, {labels[:1]}; expected two classes or more")
    number = len(np.unique(patients))
    few, code = min((len(np.unique(patients[codes == code])), code) for code in range(len(names)))
    name = f"class {names[code]!r}"
    alone = (
        f"{name} has one patient, who cannot be both learned from and tested; leave the class out,"
        " or join it with another"
    )
    # scikit-learn makes no folds where every class has fewer cases than there are folds.
    if number < folds or np.bincount(codes).max() < folds:
        cases = "" if number < folds else f", and no class has {folds} cases"
        remedy = (
            f"{name} has {few}: give folds={few} or fewer, so that each fold has some, or"
            " Folds.leave_one_group_out(groups)"
        )
        raise InputError(
            f"there are {number} patients for {folds} folds{cases}; {alone if few < 2 else remedy}"
        )
    if few < 2:
        raise InputError(alone)
    if few < folds:
        warnings.warn(
            f"{name} has {few} patients for {folds} folds, so that some folds have none of it to"
            " test; fewer folds spread it better",
            XmagWarning,
            stacklevel=4,
        )
