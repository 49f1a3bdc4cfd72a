"""CSV tables as people's programs save them, read alike by all commands."""

import csv
import difflib
import io
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from xmag.errors import InputError

_FORMULA = ("=", "+", "-", "@", "\t", "＝", "＋", "－", "＠")
"""First characters of text that a spreadsheet runs; some take the wide forms as well."""

_MISSING = {"", "na", "n/a", "#n/a", "<na>", "nan", "-nan", "nat", "none", "null"}

CONTINUOUS = (
    "each different number would become a class of its own. Classifiers are all there is so far:"
    " MILRegressor, for continuous labels, comes in a later release. Group them into classes, such"
    " as below and above a cutoff"
)
"""Message for labels that are measurements: why they are refused, and the remedy."""

_CLOSE = 0.66
"""Least similarity (difflib's ratio) of a column taken for a misspelt one: mmp for mpp."""


def is_missing(text: str) -> bool:
    """Whether a text stands for a missing value: empty, blank, NA, N/A, nan, None, null, NaT."""
    return text.strip().casefold() in _MISSING


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A row of a CSV table: its values by column, stripped, and the line of the file it is on."""

    table: str
    line: int
    values: Mapping[str, str]

    def get(self, column: str) -> str:
        """The value; "" where it is missing, or the column is."""
        value = self.values.get(column, "")
        return "" if is_missing(value) else value

    def required(self, column: str) -> str:
        """The value; InputError where it is missing."""
        if value := self.get(column):
            return value
        seen = self.values.get(column, "")
        raise InputError(
            f"line {self.line} of {self.table!r} has no {column}"
            f"{f': {seen!r} stands for a missing value' if seen else ''}; fill it in, or remove the"
            f" line{f' (what is really called {seen!r} needs another name)' if seen else ''}"
        )


def read_csv(path: Path, *, required: Sequence[str], optional: Sequence[str] = ()) -> list[Row]:
    """The rows of a CSV file in UTF-8; names of columns are stripped and casefolded.

    Blank rows are left out. Raises InputError for a file that cannot be read or is no CSV, a
    required column that is not there, one that is there twice, one that looks like a misspelt
    column, and a row with more values than there are columns.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True, skipinitialspace=True)
            columns = [name.strip().casefold() for name in next(reader, [])]
            _check_columns(columns, path.name, required, optional)
            return list(_rows(reader, columns, path.name))
    except OSError as error:
        raise InputError(
            f"the CSV file {os.fspath(path)!r} cannot be read: {error.strerror}; check the path"
        ) from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(
            f"the CSV file {path.name!r} is no text in UTF-8 with commas ({error}); save it as"
            " CSV UTF-8"
        ) from error


def csv_text(rows: Iterable[Sequence[object]]) -> str:
    """Rows as CSV text. Spreadsheets run what looks like a formula; such text gets an apostrophe.

    See owasp.org/www-community/attacks/CSV_Injection.
    """
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(
        [_harmless(cell) for cell in row] for row in rows
    )
    return out.getvalue()


def _harmless(cell: object) -> object:
    if not isinstance(cell, str):
        return cell
    cell = cell.replace("\r", "\\r")  # which csv does not quote, and takes for the end of a row
    if not cell.startswith(_FORMULA):
        return cell
    try:
        float(cell)
    except ValueError:
        return f"'{cell}"
    return cell


def _rows(reader: Iterator[list[str]], columns: Sequence[str], table: str) -> Iterator[Row]:
    end = 1
    for cells in reader:
        line, end = end + 1, reader.line_num  # type: ignore[attr-defined]
        values = [cell.strip() for cell in cells]
        if any(values[len(columns) :]):
            raise InputError(
                f"line {line} of {table!r} has {len(values)} values for {len(columns)} columns; put"
                ' a value that holds a comma into double quotes ("a, b.svs"), and write numbers'
                " with a decimal point"
            )
        if any(values):
            values += [""] * (len(columns) - len(values))
            yield Row(table=table, line=line, values=dict(zip(columns, values, strict=False)))


def _check_columns(
    columns: list[str], table: str, required: Sequence[str], optional: Sequence[str]
) -> None:
    known = (*required, *optional)
    for name in known:
        if columns.count(name) > 1:
            raise InputError(
                f"the CSV file {table!r} has the column {name!r} {columns.count(name)} times (case"
                " and blanks do not count); keep one of them"
            )
    absent = [name for name in known if name not in columns]
    for column in columns:
        if column not in known and (meant := _misspelt(column, absent)):
            raise InputError(
                f"the CSV file {table!r} has a column {column!r}; did you mean {meant!r}? Rename it"
                " to that; if it is something else, give it a name that is less alike"
            )
    if missing := [name for name in required if name in absent]:
        alone = " (where each slide is a patient of its own, repeat the slide there)"
        few = len(missing) == len(required)
        raise InputError(
            f"the CSV file {table!r} has the columns {columns}; expected"
            f" {f'a column {missing[0]!r}' if few else f'the column {missing[0]!r} too'}, with"
            f" commas between them{alone if missing[0] == 'patient' else ''}"
        )


def _misspelt(column: str, absent: Sequence[str]) -> str | None:
    """The absent column that a column may be meant to be, if any."""
    if ";" in column or "\t" in column:
        return None  # a whole line, in a file without commas
    longer = [name for name in absent if len(name) > 2]  # an id is too short to be like anything
    words = re.split(r"[^a-z]+", column)
    within = [name for name in longer if name in words]
    return next(iter(within or difflib.get_close_matches(column, longer, 1, _CLOSE)), None)
