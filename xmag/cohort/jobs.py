"""What a cohort is made of: which slides, and which file each one's bag goes to."""

import csv
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path, PurePosixPath

from xmag.errors import InputError
from xmag.slide import is_slide_path
from xmag.slide.scale import checked_mpp

FORMATS = ("h5", "safetensors")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A slide to do: its path, the name it has in the report, and where its bag goes."""

    path: Path
    name: str
    output: PurePosixPath
    mpp: float | None


def jobs_of(
    slides: str | PathLike[str] | Iterable[str | PathLike[str]], *, format: str, mpp: float | None
) -> list[Job]:
    """The slides that `extract_cohort` was given, with the outputs they get.

    Raises InputError where there are none, where a CSV makes no sense, or where names collide.
    """
    if format not in FORMATS:
        raise InputError(f"format is {format!r}; expected one of {list(FORMATS)}")
    mpp = checked_mpp(mpp)
    if isinstance(slides, str | PathLike):
        path = Path(slides)
        if path.suffix.lower() == ".csv":
            entries, root = _entries_of_csv(path, mpp), None
        elif path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.is_file() and is_slide_path(p))
            entries, root = [_Entry(p, None, mpp) for p in found], path
        else:
            entries, root = [_Entry(path, None, mpp)], None
    else:
        entries, root = [_Entry(Path(p), None, mpp) for p in slides], None
    if not entries:
        raise InputError(
            f"no slides in {str(slides)!r}; expected a folder with slides, a CSV file with a column"
            " 'slide', or a list of paths"
        )
    if root is None:
        root = _common_folder([entry.path for entry in entries])
    jobs = [_job(entry, root, format) for entry in entries]
    _refuse_collisions(jobs)
    return jobs


@dataclass(frozen=True, slots=True)
class _Entry:
    path: Path
    id: str | None
    mpp: float | None


def _entries_of_csv(path: Path, mpp: float | None) -> list[_Entry]:
    """The rows of a cohort CSV; the paths in it are relative to its folder."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
            columns = list(reader.fieldnames or [])
    except OSError as error:
        raise InputError(
            f"the CSV file {os.fspath(path)!r} cannot be read: {error.strerror}; check the path"
        ) from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(
            f"the CSV file {path.name!r} is no text in UTF-8 with commas ({error}); save it as"
            " CSV UTF-8"
        ) from error
    if "slide" not in columns:
        raise InputError(
            f"the CSV file {path.name!r} has the columns {columns}; expected a column 'slide' (and"
            " optionally 'mpp' and 'id'), with commas between them"
        )
    entries = []
    for line, row in enumerate(rows, start=2):
        if not row["slide"]:
            raise InputError(
                f"line {line} of {path.name!r} names no slide; expected its path: fill it in, or"
                " remove the line"
            )
        try:
            own_mpp = checked_mpp(float(row["mpp"])) if row.get("mpp") else mpp
        except ValueError as error:
            raise InputError(
                f"line {line} of {path.name!r} has mpp {row['mpp']!r}; expected µm per level-0 px"
                " with a decimal point, such as 0.25, or nothing"
            ) from error
        entries.append(_Entry(path.parent / row["slide"], row.get("id") or None, own_mpp))
    return entries


def _common_folder(paths: Sequence[Path]) -> Path:
    return Path(os.path.commonpath([path.absolute().parent for path in paths]))


def _job(entry: _Entry, root: Path, format: str) -> Job:
    below = PurePosixPath(
        os.path.relpath(entry.path.absolute(), root.absolute()).replace("\\", "/")
    )
    if entry.id is None:
        output = below.with_name(f"{below.stem}.{format}")
    elif {"/", "\\", "\0"} & set(entry.id) or entry.id in (".", ".."):
        raise InputError(f"the id {entry.id!r} is not a file name; leave out slashes")
    else:
        output = PurePosixPath(f"{entry.id}.{format}")
    return Job(path=entry.path, name=str(below), output=output, mpp=entry.mpp)


def _refuse_collisions(jobs: Sequence[Job]) -> None:
    """Raise InputError where two slides would be written to one file, on any file system."""
    by_output: dict[str, list[Job]] = {}
    for job in jobs:
        by_output.setdefault(str(job.output).casefold(), []).append(job)
    for same in by_output.values():
        if len(same) > 1:
            names = ", ".join(job.name for job in same)
            raise InputError(
                f"{len(same)} slides would be written to {same[0].output}: {names}; list them in a"
                " CSV file with columns 'slide' and 'id', and give each an id of its own"
            )
