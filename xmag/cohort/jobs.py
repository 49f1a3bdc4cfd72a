"""Jobs of a cohort: its slides, and the output file of each one's bag."""

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path, PurePosixPath
from unicodedata import normalize

from xmag.errors import InputError
from xmag.files import read_csv
from xmag.slide import is_slide_path
from xmag.slide.scale import checked_mpp
from xmag.urls import Place, Url, common_parts, place_of, readable, retold, shown

FORMATS = ("h5", "safetensors")

_RESERVED = re.compile(
    r'[<>:"/\\|?*\x00-\x1f]|\A\.*\Z|\A(con|prn|aux|nul|con(in|out)\$|(com|lpt)[1-9¹²³]) *(\.|\Z)',
    re.IGNORECASE,
)
"""Names no output may have on any system, or on Windows (os.path.isreserved of Python 3.13)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Job of a cohort: the path of a slide, its name in the report, and the output for its bag."""

    path: Place
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
    root: Place | None = None
    if isinstance(slides, str | PathLike | Url):
        place = place_of(slides)
        if place.suffix.lower() == ".csv":
            entries = _entries_of_csv(place, mpp)
        elif (found := _slides_below(place)) is not None:
            entries, root = [_Entry(p, None, mpp) for p in found], place
        else:
            entries = [_Entry(place, None, mpp)]
    else:
        entries = [_Entry(place_of(p), None, mpp) for p in slides]
    if not entries:
        told = shown(slides) if isinstance(slides, str | PathLike) else str(slides)
        raise InputError(
            f"no slides in {told!r}; expected a folder with slides, a CSV file with a"
            " column 'slide', or a list of paths"
        )
    names = _names([entry.path for entry in entries], root)
    jobs = [_job(entry, name, format) for entry, name in zip(entries, names, strict=True)]
    _refuse_collisions(jobs)
    return jobs


@dataclass(frozen=True, slots=True)
class _Entry:
    path: Place
    id: str | None
    mpp: float | None


def _slides_below(place: Place) -> Sequence[Place] | None:
    """The slides in a folder, in order; None where it is not one."""
    if isinstance(place, Path):
        if not place.is_dir():
            return None
        return sorted(p for p in place.rglob("*") if p.is_file() and is_slide_path(p))
    if is_slide_path(place):
        return None
    with retold(InputError, place):
        return [url for url in place.files_below() if is_slide_path(url)]


def _entries_of_csv(path: Place, mpp: float | None) -> list[_Entry]:
    """The rows of a cohort CSV; the paths in it are relative to its folder."""
    if isinstance(path, Url):
        raise InputError(
            f"the CSV file {path} lies at a URL; download it: a file of this machine may list URLs"
        )
    entries = []
    for row in read_csv(path, required=("slide",), optional=("mpp", "id")):
        slide = place_of(row.required("slide"))
        slide = path.parent / slide if isinstance(slide, Path) else slide
        own_mpp = row.get("mpp")
        try:
            scale = checked_mpp(float(own_mpp)) if own_mpp else mpp
        except ValueError as error:
            raise InputError(
                f"line {row.line} of {path.name!r} has mpp {own_mpp!r}; expected µm per level-0 px"
                " with a decimal point, such as 0.25, or nothing"
            ) from error
        entries.append(_Entry(slide, row.get("id") or None, scale))
    return entries


def _names(places: Sequence[Place], root: Place | None) -> list[PurePosixPath]:
    """The path of each slide below the folder that they share, those at URLs among themselves."""
    paths = [place for place in places if isinstance(place, Path)]
    urls = [place for place in places if isinstance(place, Url)]
    if isinstance(root, Path) or not paths:
        folder = root
    else:
        folder = Path(os.path.commonpath([_absolute(path).parent for path in paths]))
    depth = len([p for p in root.parts if p]) if isinstance(root, Url) else common_parts(urls)
    return [
        _below_url(place, depth) if isinstance(place, Url) else _below(place, folder)
        for place in places
    ]


def _absolute(path: Path) -> Path:
    """The path from the root, without `..`, which would lead out of the output folder."""
    return Path(os.path.abspath(path))  # noqa: PTH100 (resolve would follow links)


def _below(path: Path, folder: Place | None) -> PurePosixPath:
    assert isinstance(folder, Path)
    return PurePosixPath(readable(os.path.relpath(path, folder)).replace("\\", "/"))


def _below_url(url: Url, depth: int) -> PurePosixPath:
    parts = [part for part in url.parts[depth:] if part]
    if not parts or {".", ".."} & set(parts) or any("\\" in part for part in parts):
        raise InputError(f"the URL {url} names no file by a plain path; give it without '..'")
    return PurePosixPath(*parts)


def _job(entry: _Entry, below: PurePosixPath, format: str) -> Job:
    if entry.id is None:
        output = below.with_name(f"{below.stem}.{format}")
    elif _RESERVED.search(entry.id):
        raise InputError(
            f"the id {entry.id!r} is not a file name on every system; expected one without slashes,"
            ' control characters and <>:"|?*, and none that Windows keeps for devices, such as CON,'
            " AUX, NUL and COM1"
        )
    else:
        output = PurePosixPath(f"{entry.id}.{format}")
    return Job(path=entry.path, name=str(below), output=output, mpp=entry.mpp)


def _refuse_collisions(jobs: Sequence[Job]) -> None:
    """Raise InputError where two slides would be written to one file, on any file system.

    Some know no upper case, and some no difference between "é" and "e" with an accent: names are
    compared by canonical caseless matching (Unicode 16.0, section 3.13, D145).
    """
    by_output: dict[str, list[Job]] = {}
    for job in jobs:
        folded = normalize("NFD", normalize("NFD", str(job.output)).casefold())
        by_output.setdefault(folded, []).append(job)
    for same in by_output.values():
        if len(same) > 1:
            names = ", ".join(job.name for job in same)
            raise InputError(
                f"{len(same)} slides would be written to {same[0].output}: {names}; list them in a"
                " CSV file with columns 'slide' and 'id', and give each an id of its own"
            )
