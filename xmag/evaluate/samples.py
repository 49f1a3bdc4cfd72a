"""Evaluation datasets: cases X of any type, with labels and patients, checked for leakage."""

import hashlib
import os
import warnings
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from xmag import files
from xmag.bag import SUFFIXES, FeatureBag
from xmag.bag.formats import ForeignBagError
from xmag.errors import InputError, XmagWarning
from xmag.evaluate.folds import Folds
from xmag.evaluate.tasks import CLASSIFICATION, Task
from xmag.metrics.labels import Labels, as_labels

OnIdentical = Literal["raise", "warn"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Samples:
    """Cases of a dataset, or of a part of it, with labels and patients, of checked lengths.

    Attributes:
        name: The name of the dataset in messages.
        data: All of its cases: a list, an array, or whatever can be indexed.
        rows: int64 (n,), the rows of these cases in it.
        y: Their labels: a tuple, or an array (n, ...), as the task has them.
        groups: Their patients; None where they are not known.
        task: What is predicted.
        columns: Names of targets or labels, where `y` has them.
        whole: What this is a part of; None for all cases.
    """

    name: str
    data: Any
    rows: NDArray[np.int64]
    y: Any
    groups: tuple[Hashable, ...] | None
    task: Task
    columns: tuple[Hashable, ...] | None = None
    whole: "Samples | None" = None

    @classmethod
    def of(
        cls, x: Any, y: Any, groups: Labels | None, *, name: str, task: Task = CLASSIFICATION
    ) -> "Samples":
        """Make Samples; InputError unless there is one label and one patient for each case."""
        try:
            n = len(x)
        except TypeError as error:
            raise InputError(
                f"{name}: X is of {type(x).__name__}, which has no length; give a list or an array"
            ) from error
        labels = task.read(y, f"{name}: y", n)
        if n == 0:
            raise InputError(f"{name} has no cases; expected at least one of each class")
        patients = None if groups is None else tuple(as_labels(groups, f"{name}: groups", n=n))
        columns = getattr(y, "columns", None)  # of a table, or a column of one
        if columns is None and isinstance(getattr(y, "name", None), str):
            columns = [y.name]
        return cls(
            name=name, data=x, rows=np.arange(n), y=labels, groups=patients, task=task,
            columns=None if columns is None else tuple(columns),
        )  # fmt: skip

    def part(self, rows: Sequence[int]) -> "Samples":
        """The cases of these rows."""
        groups = None if self.groups is None else tuple(self.groups[row] for row in rows)
        y = taken(self.y, rows)
        labels = tuple(y) if isinstance(y, list) else y
        return replace(self, rows=self.rows[list(rows)], y=labels, groups=groups, whole=self)

    def __len__(self) -> int:
        return len(self.y)

    @property
    def x(self) -> Any:
        """The cases: rows of a table or array, or a list from a sequence."""
        return taken(self.data, self.rows.tolist())

    @cached_property
    def digests(self) -> NDArray[np.object_]:
        """Hashes of the features of the bags of each case, object (n,) of tuples."""
        return digests(self.data) if self.whole is None else self.whole.digests[self.rows]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trial:
    """Cases to fit one model on, and others to test it on, of the same dataset or another.

    `name` is the trial in messages; splits of one `repeat` have test cases of their own.
    """

    name: str
    train: Samples
    test: Samples
    repeat: int = 0

    @classmethod
    def of_folds(cls, folds: Folds, data: Samples) -> list["Trial"]:
        """A trial for each split of a dataset; InputError where the folds are of other cases."""
        if folds.samples != len(data):
            raise InputError(
                f"the folds are of {folds.samples} cases and {data.name} has {len(data)}; make"
                " folds for these cases"
            )
        return [
            cls(
                name=f"split {number} of {data.name}",
                train=data.part(split.train), test=data.part(split.test), repeat=split.repeat,
            )
            for number, split in enumerate(folds.splits)
        ]  # fmt: skip

    @classmethod
    def across(cls, train: Samples, test: Samples) -> "Trial":
        """A trial of two datasets."""
        return cls(name=f"trained on {train.name}", train=train, test=test)

    @property
    def within(self) -> bool:
        """Whether both sides are of one dataset."""
        return self.test.name == self.train.name

    def check(
        self, order: tuple[Hashable, ...], *, on_identical: OnIdentical, stacklevel: int
    ) -> None:
        """Raise InputError for leakage, and where a class or an event is missing to fit on.

        Leakage is a patient on both sides, or a test case with the features of a training case, or
        a bag with those of one of its bags; with ``on_identical="warn"`` the latter is a warning.
        """
        where = self.name if self.within else f"{self.name}, tested on {self.test.name}"
        known = set(self.train.groups or ())
        if shared := dict.fromkeys(g for g in self.test.groups or () if g in known):
            raise InputError(
                f"{where}: patient {next(iter(shared))!r} is on both sides ({len(shared)} such"
                " patients in all); keep all cases of a patient on one side, and if these are"
                " different people with the same number, put the cohort's name before it"
            )
        # Places of training and test cases with the same features, or a bag with the same.
        places = {one: place for place, own in enumerate(self.train.digests) for one in own}
        same = ([one for one in own if one in places] for own in self.test.digests)
        if found := [(places[ones[0]], at) for at, ones in enumerate(same) if ones]:
            message = (
                f"{where}: test case {found[0][1]} has the same features as training case"
                f" {found[0][0]} (counted from 0; {len(found)} such test cases in all)"
            )
            if on_identical == "raise":
                raise InputError(
                    f"{message}; leave out duplicates, or give them the same patient in groups."
                    " Where equal features are no accident, as with empty tiles:"
                    ' on_identical="warn"'
                )
            text = f"{message}, which flatters the result"
            warnings.warn(text, XmagWarning, stacklevel=stacklevel)
        if reason := self.train.task.lacking(self.train.y, order):
            raise InputError(f"{self.name}: {reason}")


def warn_without_groups(*, stacklevel: int) -> None:
    """Warn that no groups were given, so that each case counts as a patient of its own."""
    warnings.warn(
        "groups were not given, so patients are not separated: slides of one patient may be on both"
        " sides of a split, and intervals take each case for a patient of its own; give groups=,"
        " the patient of each case",
        XmagWarning,
        stacklevel=stacklevel + 1,
    )


def agreed_classes(
    parts: Sequence[Samples], classes: Labels | None, *, ordered: bool
) -> tuple[Hashable, ...]:
    """The order of classes of all parts; the names of labels or targets, for such a task.

    Raises InputError for an unknown label, a part of one class, and where the order is needed
    (`ordered`) and not given, or there is none.
    """
    task = parts[0].task
    if ordered and task.name != "classification":
        raise InputError(f"ordered=True is for classes, but the task is {task.name}; leave it out")
    if ordered and classes is None:
        raise InputError("ordered=True needs the order of the classes, lowest first, in classes=")
    return task.order(parts, classes)


def taken(values: Any, rows: Sequence[int]) -> Any:
    """Some rows of a table or an array, or a list of the values of a sequence."""
    if hasattr(values, "iloc"):
        return values.iloc[list(rows)]
    return values[list(rows)] if hasattr(values, "shape") else [values[row] for row in rows]


def digests(x: Any) -> NDArray[np.object_]:
    """Hashes of the features of each case, object (n,): a tuple, with one for each of its bags.

    Bags, arrays and tensors are digested by value, feature files by what is in them, other files by
    their bytes. Bags without tiles have no features and are never identical.
    """
    rows: Any = x.to_numpy() if hasattr(x, "to_numpy") else x
    found = np.empty(len(x), dtype=object)
    for place in range(len(x)):
        case, bags = rows[place], [rows[place]]
        first = case[0] if isinstance(case, list | tuple) and case else None
        if isinstance(first, str | os.PathLike | FeatureBag) or getattr(first, "ndim", 0) == 2:
            bags = list(case)  # a list of numbers is one vector
        found[place] = tuple(one for one in map(_digest, bags) if one is not None)
    return found


def _digest(case: Any) -> bytes | None:
    if isinstance(case, str | os.PathLike):
        path = Path(case)
        if not path.is_file():
            return os.fsencode(case)
        try:
            case = FeatureBag.load(path) if path.suffix in SUFFIXES else None
        except ForeignBagError:
            case = None
        if case is None:
            return files.sha256_of(path).encode()
    if hasattr(case, "detach"):  # a tensor, which may be on a GPU, or bfloat16
        case = case.detach().cpu().double()
    array = np.asarray(case)
    if array.dtype.kind not in "biuf" or array.size == 0:
        return None
    values = np.ascontiguousarray(array, dtype=np.float64)
    digest = hashlib.blake2b(values.data, digest_size=16)
    digest.update(str(values.shape).encode())
    return digest.digest()
