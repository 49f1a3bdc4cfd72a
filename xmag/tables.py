"""CSV files as people's programs save them."""

import csv
import os
from pathlib import Path

from xmag.errors import InputError


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
