"""Splits in tables: Patho-Bench's TSV files, and CSV files with a column of folds."""

import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from xmag.errors import InputError, XmagWarning
from xmag.files import Row, read_csv
from xmag.metrics.labels import Labels, as_labels

_IDS = ("slide_id", "slide", "case_id", "patient", "id")
_PATIENTS = ("case_id", "patient")
_SIDES = ("train", "val", "test")

Pair = tuple[NDArray[np.int64], NDArray[np.int64]]


def table_pairs(
    path: Path, ids: Labels, groups: Labels | None, *, id_column: str | None, tested: str
) -> list[Pair]:
    """The splits in a table, each as (rows to fit on, rows to test on) of `ids`."""
    if tested not in ("test", "val"):
        raise InputError(f"tested is {tested!r}; expected 'test' or 'val'")
    if not (rows := read_csv(path)):
        raise InputError(f"the table {path.name!r} has no rows; expected one for each case")
    there = list(rows[0].values)
    names = [str(one) for one in as_labels(ids, "ids")]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"ids has {twice!r} twice; expected each case once")
    column = _id_column(path, rows, names, id_column)
    columns = [name for name in there if re.fullmatch(r"fold_\d+", name)]
    columns.sort(key=lambda name: int(name.removeprefix("fold_")))
    if not columns and "fold" not in there:
        raise InputError(
            f"{path.name!r} has the columns {there}; expected fold_0, fold_1, ... with"
            " train, val or test, or a column fold with the fold that tests each case"
        )
    found = _of_ids(path, rows, names, column, columns or ["fold"])
    patients = [] if groups is None else [as_labels(groups, "groups", n=len(names))]
    own = next((name for name in _PATIENTS if name in there and name != column), None)
    if own is not None:
        patients.append([row.get(own) or None for row in found])
    if columns:
        pairs = [_sides(path, found, fold, tested=tested) for fold in columns]
    else:
        folds = np.array([row.get("fold") for row in found])
        kept = {*folds.tolist()} - {""}
        if kept & {*_SIDES} or tested != "test":
            seen = f"tested is {tested!r}" if tested != "test" else f"it holds {sorted(kept)}"
            raise InputError(
                f"the column fold of {path.name!r} is for the fold that tests each case, such as 0"
                f" to 4, but {seen}; where each case is of train, val or test, call it fold_0"
            )
        columns = sorted(kept, key=lambda name: (len(name), name))  # 10 comes after 9
        pairs = [
            (np.flatnonzero(np.isin(folds, [*kept - {name}])), np.flatnonzero(folds == name))
            for name in columns
        ]
    for known in patients:
        for name, (train, test) in zip(columns, pairs, strict=True):
            fitted = {known[row] for row in train.tolist()} - {None}
            if shared := [known[row] for row in test.tolist() if known[row] in fitted]:
                raise InputError(
                    f"{name} of {path.name!r} has patient {shared[0]!r} on both sides; keep all"
                    " cases of a patient on one side"
                )
    return pairs


def _id_column(path: Path, rows: list[Row], ids: Sequence[str], given: str | None) -> str:
    columns = list(rows[0].values)
    if given is not None:
        if (name := given.strip().casefold()) not in columns:
            raise InputError(f"{path.name!r} has no column {given!r}; expected one of {columns}")
        return name
    there = [name for name in _IDS if name in columns]
    for name in there:
        if {row.get(name) for row in rows} & set(ids):
            return name
    raise InputError(
        f"no id, such as {ids[0]!r}, is in {there} of {path.name!r}; give ids as they stand there"
        f" ({rows[0].get(there[0])!r}), or id_column="
        if there
        else f"{path.name!r} has the columns {columns}; say which one has the ids: id_column="
    )


def _of_ids(
    path: Path, rows: list[Row], ids: Sequence[str], column: str, folds: Sequence[str]
) -> list[Row]:
    """The row of each id; of several rows (slides of a patient), which have to agree, the first."""
    found: dict[str, Row] = {}
    for row in rows:
        first = found.setdefault(row.get(column), row)
        if differs := [name for name in folds if first.get(name) != row.get(name)]:
            raise InputError(
                f"rows of {column} {row.get(column)!r} in {path.name!r} differ in {differs[0]}:"
                f" {first.get(differs[0])!r} and {row.get(differs[0])!r}; expected one side for all"
                " of them"
            )
    if missing := [one for one in ids if one not in found]:
        raise InputError(
            f"{missing[0]!r} is not in the column {column} of {path.name!r} ({len(missing)} such"
            " ids in all); leave such cases out of X, y and groups, or add them to the table"
        )
    if unused := [one for one in found if one not in set(ids)]:
        warnings.warn(
            f"{len(unused)} of {len(found)} ids of {path.name!r} are not among the cases, first"
            f" {unused[0]!r}; the folds are made without them",
            XmagWarning,
            stacklevel=4,
        )
    return [found[one] for one in ids]


def _sides(path: Path, rows: list[Row], fold: str, *, tested: str) -> Pair:
    sides = [row.get(fold) for row in rows]
    for side, row in zip(sides, rows, strict=True):
        if side not in (*_SIDES, ""):
            raise InputError(
                f"{fold} of {path.name!r} holds {side!r} (line {row.line}); expected train, val,"
                " test, or nothing"
            )
    fitted = ("train", "val") if tested == "test" else ("train",)
    train, test = (np.flatnonzero(np.isin(sides, names)) for names in (fitted, (tested,)))
    for name, found in (("train", train), (tested, test)):
        if not len(found):
            other = "; tested='val' tests those of val" if "val" in sides and name == "test" else ""
            raise InputError(
                f"{fold} of {path.name!r} has no case of {name!r} among the {len(rows)} cases;"
                f" expected some{other}"
            )
    return train, test
