"""Atomic writes, folders and CSV tables: a file is whole under its final name, or not there.

The bytes go to a temporary file in the same folder, to the disk (fsync), through a check, and only
then under the final name (os.replace). A run that is killed leaves the old file, or none, and
perhaps a temporary one: hidden, unique, ending in ``.xmag-tmp``, never read, safe to delete.

A URL is written to from a temporary file of this machine, checked there, and read back: whole or
not at all where the store keeps that promise, as object stores do.

CSV tables are written by `csv_text`, and read by `read_csv` as people's programs save them.
"""

import csv
import errno
import hashlib
import io
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from xmag import records
from xmag.errors import InputError, OutputError, XmagError
from xmag.urls import Place, Url, place_of, readable, retold

_TEMP_SUFFIX = ".xmag-tmp"

_REMEDIES = {
    errno.ENOSPC: "free some space there, or write elsewhere",
    errno.EDQUOT: "your quota there is used up: free some space, or write elsewhere",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f), or write to another file system",
    errno.EROFS: "the file system is read-only: write elsewhere",
    errno.EACCES: "write to a folder that you own, or ask for write permission",
    errno.EPERM: "write to a folder that you own, or ask for write permission",
    errno.ENOENT: "create the folder first",
    errno.ENOTDIR: "something on the path is a file, not a folder: write elsewhere",
    errno.EISDIR: "it is a folder: give the path of a file",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.EIO: "the disk or the network failed: look at it, then write again",
}
_STORAGE_FAILURES = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
_PLACE_FAILURES = {
    getattr(errno, name)
    for name in (
        "ENOSPC", "EDQUOT", "EROFS", "EIO", "ENODEV", "ENXIO", "ESTALE", "ENOTCONN", "ESHUTDOWN",
        "ETIMEDOUT", "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH", "EREMOTEIO",
    )
    if hasattr(errno, name)
}  # fmt: skip
_OLD_S = 24 * 3600
_HEAD_BYTES = 4096

_FORMULA = ("=", "+", "-", "@", "\t", "＝", "＋", "－", "＠")
"""First characters of text that a spreadsheet runs; some take the wide forms as well."""
_MISSING = {"", "na", "n/a", "#n/a", "<na>", "nan", "-nan", "nat", "none", "null"}
_BESIDE = {"", "um", "m", "px", "x", "y", "path", "file"}
"""Words beside the name of a column that leave its meaning: "mpp (µm)", but not "mpp_source"."""
_CLOSE = 0.8
"""Least similarity (difflib's ratio) of a column taken for a misspelt one; future has 0.71."""


@contextmanager
def atomic_path(
    path: str | os.PathLike[str] | Url,
    *,
    validate: Callable[[Path], object] | None = None,
    inside: Place | None = None,
) -> Iterator[Path]:
    """A temporary path to write to; what is there at the end becomes `path`, whole or not at all.

    The temporary file exists already, empty, so that a place that cannot be written to is known
    before anything is computed. Its name does not have the suffix of `path` (a leftover must not
    look like a result), so a writer that goes by suffix has to be told the format. `validate` is
    called with the temporary path once it is written; what it raises stops the replacement. A
    symbolic link is written through, unless it leads out of the folder `inside`. Raises OutputError
    where the path cannot be written, and leaves what was there before untouched on every error.
    """
    place = place_of(path)
    if isinstance(place, Url):
        with tempfile.TemporaryDirectory(prefix="xmag-", ignore_cleanup_errors=True) as folder:
            temp = Path(folder, "new")
            temp.touch()
            yield temp
            if validate is not None:
                validate(temp)
            with retold(OutputError, place):
                place.write(temp.read_bytes())
        return
    final = Path(os.path.realpath(place)) if inside is None else linked_to(place, inside)
    temp = final.parent / f".{os.getpid()}-{secrets.token_hex(8)}{_TEMP_SUFFIX}"
    try:
        if final.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(final))
        temp.touch(exist_ok=False)  # with the rights that the umask gives; tempfile's are 0600
        yield temp
        with _blamed_on(place), temp.open("rb+") as file:  # as Windows syncs what it may write
            os.fsync(file.fileno())
        if validate is not None:
            validate(temp)
        temp.replace(final)
        _sync_folder(final.parent)
    except OSError as error:
        ours = str(error.filename) in (str(temp), str(final))
        if ours or error.errno in _STORAGE_FAILURES:
            raise cannot_write(place, error) from error
        raise
    finally:
        with suppress(OSError):
            temp.unlink()


def write_bytes(
    path: str | os.PathLike[str] | Url,
    data: bytes,
    *,
    validate: Callable[[Path], object] | None = None,
    inside: Place | None = None,
) -> None:
    """Write `data` to `path`, whole or not at all; see `atomic_path`."""
    place = place_of(path)
    whole = atomic_path(place, validate=validate, inside=inside)
    with whole as temp, _blamed_on(place), temp.open("wb") as file:
        file.write(data)


@contextmanager
def _blamed_on(place: Place) -> Iterator[None]:
    """Context that turns errors of writing and syncing, which name no file, into OutputError."""
    try:
        yield
    except OSError as error:
        raise cannot_write(place, error) from error


def write_text(
    path: str | os.PathLike[str] | Url, text: str, *, inside: Place | None = None
) -> None:
    """Write `text` to `path` as UTF-8 with its line ends as they are, whole or not at all.

    What is no Unicode, as in the names of some files, is written as `readable` has it.
    """
    write_bytes(path, readable(text).encode("utf-8", "backslashreplace"), inside=inside)


def linked_to(path: Path, folder: Place) -> Path:
    """The file that is written for `path`: itself, or the target of the symbolic link it is.

    Raises OutputError where that leads out of `folder`: whoever may write to a shared folder could
    send a file of this user's elsewhere. Links in the folders above it are its owner's.
    """
    final = Path(os.path.realpath(path))
    beside = Path(os.path.realpath(path.parent), path.name)
    if final != beside and not final.is_relative_to(os.path.realpath(str(folder))):
        raise OutputError(
            f"{path} is a symbolic link to {final}, which lies outside of {folder}; expected a file"
            " or nothing: remove the link, or write to another folder"
        )
    return final


def require_own(place: Place, folder: Place, is_own: Callable[[bytes], bool]) -> None:
    """Raise OutputError where what lies at a place that xmag writes to is somebody else's.

    That is a file whose first bytes `is_own` does not know, what is no file, and what `linked_to`
    refuses. An empty file is nobody's.
    """
    if isinstance(place, Url):
        with retold(OutputError, place):
            head = place.read()[:_HEAD_BYTES] if place.exists() else b""
    else:
        final = linked_to(place, folder)
        if not os.path.lexists(final):
            return
        if not final.is_file():
            raise OutputError(
                f"{place} is there already and is no file; remove it, or write to another folder"
            )
        try:
            with final.open("rb") as file:
                head = file.read(_HEAD_BYTES)
        except OSError as error:
            raise cannot_write(place, error) from error
    if head and not is_own(head):
        raise OutputError(
            f"{place} is there already, and it is not one that xmag wrote; move it away, or write"
            " to another folder"
        )


def refuse_special(path: Path, kind: type[XmagError]) -> None:
    """Raise `kind` for what is neither file nor folder: reading it might never end, or begin."""
    with suppress(OSError):  # whoever opens it says why
        mode = path.stat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            what = "named pipe" if stat.S_ISFIFO(mode) else "device or socket"
            raise kind(f"{path.name} is a {what}; expected a file: copy what it gives to one")


def cannot_write(path: Place, error: OSError) -> OutputError:
    """The error that says why `path` cannot be written, and what to do about it."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    remedy = _REMEDIES.get(error.errno or 0, "write elsewhere")
    told = OutputError(f"cannot write {path}: {reason}; {remedy}")
    told.__cause__ = error
    return told


def is_of_the_place(error: BaseException) -> bool:
    """Whether an OutputError is of the disk or share, and not of this one file: full, or gone."""
    number = getattr(error.__cause__, "errno", None)
    return isinstance(error, OutputError) and number in _PLACE_FAILURES


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files of xmag that nobody has written to for a day; writers need seconds."""
    with suppress(OSError):
        for leftover in folder.glob(f".*{_TEMP_SUFFIX}"):
            with suppress(OSError):
                if time.time() - leftover.lstat().st_mtime > _OLD_S:
                    leftover.unlink()


def sha256_of(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of everything in a file, in hex."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_folder(folder: str | os.PathLike[str] | Url) -> None:
    """Make a folder and those above it, if they are not there; OutputError where that fails."""
    place = place_of(folder)
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"the folder {place} cannot be made: {error.strerror}; give another one"
        ) from error


@contextmanager
def local_copy(place: Place, kind: type[XmagError]) -> Iterator[Path]:
    """A path of this machine with the content of a file: itself, or a copy that goes away.

    Raises `kind` where a URL cannot be read.
    """
    if isinstance(place, Path):
        yield place
        return
    with retold(kind, place):
        data = place.read()
    with tempfile.TemporaryDirectory(prefix="xmag-", ignore_cleanup_errors=True) as folder:
        copy = Path(folder, "copy")
        try:
            copy.write_bytes(data)
        except OSError as error:
            raise kind(
                f"{place} cannot be copied to {tempfile.gettempdir()} ({error.strerror}): free some"
                " space there, or set TMPDIR"
            ) from error
        yield copy


def remove_folder(place: Place) -> None:
    """Remove a folder of xmag's own and the files in it, as far as that can be done."""
    if isinstance(place, Path):
        shutil.rmtree(place, ignore_errors=True)
        return
    with suppress(XmagError), retold(OutputError, place):
        for url in place.files_below():
            url.remove()


def _sync_folder(folder: Path) -> None:
    """Bring the new name to the disk; at most the old one comes back in a power cut without it."""
    with suppress(OSError):  # Windows opens no folder, and some network file systems sync none
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


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


def read_csv(
    path: Path, *, required: Sequence[str] = (), optional: Sequence[str] = ()
) -> list[Row]:
    """The rows of a CSV file in UTF-8; names of columns are stripped and casefolded.

    A file whose name ends in ``.tsv`` has tabs in place of commas. Blank rows are left out. Raises
    InputError for a file that cannot be read or is no CSV, a required column that is not there, one
    that is there twice, one that looks like a misspelt column, and a row with more values than
    there are columns.
    """
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True, skipinitialspace=True, delimiter=delimiter)
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
    csv.writer(out, lineterminator="\n").writerows(map(_harmless, row) for row in rows)
    return out.getvalue()


def _harmless(cell: object) -> object:
    if not isinstance(cell, str):
        return cell
    cell = cell.replace("\r", "\\r")  # which csv does not quote, and takes for the end of a row
    if not cell.startswith(_FORMULA):
        return cell
    with suppress(ValueError):
        float(cell)
        return cell
    return f"'{cell}"


def without_apostrophe(cell: str) -> str:
    """The text that `csv_text` put an apostrophe before."""
    return cell[1:] if cell.startswith("'") and cell[1:].startswith(_FORMULA) else cell


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
    words = set(re.split(r"[^a-z]+", column))
    alike = [name for name in longer if name in words and words - {name} <= _BESIDE]
    alike += [name for name in longer if set(name) == set(column)]  # mmp, too short for a ratio
    return alike[0] if alike else records.nearest(column, longer, _CLOSE)
