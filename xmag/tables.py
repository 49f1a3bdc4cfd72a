"""CSV files as people's programs save them."""

import csv
import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from xmag.errors import InputError

_FORMULA = ("=", "+", "-", "@", "\t", "＝", "＋", "－", "＠")
"""What text begins with that a spreadsheet runs; some take the wide forms as well."""


def read_csv(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """The columns and the rows of a CSV file in UTF-8; "" where a row is too short.

    Raises InputError where it cannot be read or is something else.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, restval="")
            rows = list(reader)
            return list(reader.fieldnames or []), rows
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
