"""Files that are given for the slides of a cohort: regions of interest, and tissue masks."""

import os
import warnings
from collections.abc import Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

from xmag.cohort.jobs import Job
from xmag.errors import InputError, XmagWarning
from xmag.files import sha256_of
from xmag.geometry import polygons_from_geojson
from xmag.masks import MASK_SUFFIXES
from xmag.plan import plan_options
from xmag.urls import Url, place_of

_ROI_SUFFIXES = (".geojson", ".json")
"""QuPath calls them .geojson, others .json."""


def within(jobs: Sequence[Job], roi: str | PathLike[str]) -> list[Job]:
    """The jobs with their regions of interest: of one slide, or from a folder by the slides' ids.

    Raises InputError where a slide has none or several, and for a file that is no GeoJSON of
    polygons. Warns of files that are no slide's.
    """
    files = _files_of(jobs, roi, ("roi", "region of interest", "GeoJSON"), _ROI_SUFFIXES)
    return [
        replace(job, roi=file.absolute(), roi_sha256=_roi_sha256(file))
        for job, file in zip(jobs, files, strict=True)
    ]


def masked(jobs: Sequence[Job], tissue: Any) -> list[Job]:
    """The jobs with their tissue masks, which are given as the regions of `within` are.

    What is in them is read with the slides. Raises InputError where a slide has none or several.
    """
    if not isinstance(tissue, str | PathLike | Url):
        raise InputError(
            f"tissue is a {type(tissue).__name__}; a cohort takes 'auto', None (every tile), or a"
            " folder with a mask of each slide; for a TissueMask use extract_features() on a slide"
        )
    files = _files_of(jobs, tissue, ("tissue", "tissue mask", "GeoJSON or PNG"), MASK_SUFFIXES)
    return [
        replace(job, tissue=file.absolute(), tissue_sha256=_sha256(file))
        for job, file in zip(jobs, files, strict=True)
    ]


def _files_of(
    jobs: Sequence[Job],
    given: str | PathLike[str] | Url,
    words: tuple[str, str, str],
    suffixes: Sequence[str],
) -> list[Path]:
    """The file of each job: the one that is given, or that in a folder which is called as its id.

    `words` are the option's name, what such a file is, and its format.
    """
    name, noun, form = words
    place = place_of(given)
    if not isinstance(place, Path):
        raise InputError(
            f"{name} lies at a URL, {place}; download it: expected files of this machine"
        )
    if place.is_dir():
        return _found_below(place, jobs, noun, suffixes)
    if len(jobs) != 1:
        seen = f"one file for {len(jobs)} slides" if place.exists() else f"{str(place)!r}"
        raise InputError(
            f"{name} is {seen}; expected a folder with a {form} file of each, called as its"
            " slide's id: a.geojson for a.svs"
        )
    if not place.is_file():
        raise InputError(_missing([jobs[0].name], 1, noun, place))
    return [place]


def _found_below(
    folder: Path, jobs: Sequence[Job], noun: str, suffixes: Sequence[str]
) -> list[Path]:
    files, missing = [], []
    for job in jobs:
        stem = folder / job.output.with_suffix("")
        paths = [stem.with_name(f"{stem.name}{suffix}") for suffix in suffixes]
        found = [path for path in paths if path.is_file()]
        if len(found) > 1:
            raise InputError(
                f"{job.name} has several files, {found[0].name} and {found[1].name}; expected one"
                f" {noun} of each slide: take the other out of {folder}"
            )
        if not found:
            missing.append((job.name, paths[0]))
        files += found
    if missing:
        raise InputError(_missing([name for name, _ in missing], len(jobs), noun, missing[0][1]))
    own = {*files}
    others: list[Path] = []
    for place, folders, names in os.walk(folder):
        folders[:] = (name for name in sorted(folders) if not name.endswith(".zarr"))  # of slides
        there = (Path(place, name) for name in sorted(names))
        others += [p for p in there if p.suffix.lower() in suffixes and p not in own]
    if others:
        warnings.warn(
            f"{len(others)} of {len(others) + len(own)} files in {folder.name!r} are no slide's"
            f" {noun}, such as {others[0].relative_to(folder).as_posix()}: expected the ids of"
            " slides, such as a.geojson for a.svs",
            XmagWarning,
            stacklevel=5,
        )
    return files


def _missing(names: Sequence[str], count: int, noun: str, wanted: Path) -> str:
    return (
        f"{len(names)} of {count} slides have no {noun}, such as {names[0]}; expected the file"
        f" {wanted}, or leave those slides out"
    )


def _sha256(file: Path) -> str:
    try:
        return sha256_of(file)
    except OSError as error:
        raise InputError(
            f"{file} cannot be read ({error.strerror or error}); expected a tissue mask"
        ) from None


def _roi_sha256(file: Path) -> str:
    try:
        polygons = polygons_from_geojson(file)
    except InputError as error:
        raise InputError(f"{file}: {error}") from error
    options = plan_options(
        overlap=0, min_tissue=None, border="shift", tissue_method=None, roi=polygons
    )
    return str(options["roi_sha256"])
