"""Jobs of a cohort: its slides, and the output file of each one's bag."""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, Literal, NamedTuple, TypeVar
from unicodedata import normalize

from xmag.cores import usable_cores
from xmag.encoder import TileEncoder
from xmag.errors import InputError
from xmag.extract import Transform, fingerprint_of
from xmag.files import Row, read_csv
from xmag.geometry import TileSpec
from xmag.grid import Border
from xmag.masks import GIVEN_METHOD
from xmag.plan import check_grid, plan_options
from xmag.slide import checked_region, is_omezarr, is_slide_path, scan_stem
from xmag.slide.dicom_files import is_dicom, series_below
from xmag.slide.dicomweb import is_series
from xmag.slide.scale import checked_mpp
from xmag.tiles.children import PROCESSES_SUPPORTED, Limits
from xmag.tiles.decoding import Damaged
from xmag.tiles.stream import check_damaged
from xmag.tissue import TISSUE_METHOD
from xmag.urls import Place, Url, common_parts, place_of, readable, retold, shown

FORMATS = ("h5", "safetensors")

Made = TypeVar("Made")

_RESERVED = re.compile(
    r'[<>:"/\\|?*\x00-\x1f]|\A\.*\Z|\A(con|prn|aux|nul|con(in|out)\$|(com|lpt)[1-9¹²³]) *(\.|\Z)',
    re.IGNORECASE,
)
"""Names no output may have on any system, or on Windows (os.path.isreserved of Python 3.13)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Job of a cohort: the path of a slide, its name in the report, and the output for its bag.

    `model` is the name of its model where there are several, and of the folder of that one's bags.
    `roi` is the GeoJSON file of its region of interest, and `roi_sha256` what plans record of it;
    `tissue` and `tissue_sha256` are the same of its tissue mask, where that is given.
    """

    path: Place
    name: str
    output: PurePosixPath
    mpp: float | None
    model: str = ""
    region: int | None = None
    roi: Path | None = None
    roi_sha256: str | None = None
    tissue: Path | None = None
    tissue_sha256: str | None = None

    def of_models(self, models: Iterable[str]) -> tuple["Job", ...]:
        """The jobs of each of these models on this slide."""
        return tuple(
            replace(self, model=name, output=PurePosixPath(name) / self.output) for name in models
        )


def jobs_of(
    slides: str | PathLike[str] | Iterable[str | PathLike[str]],
    *,
    format: str,
    mpp: float | None,
    region: int | None = None,
) -> list[Job]:
    """The slides that `extract_cohort` was given, with the outputs they get.

    Raises InputError where there are none, where a CSV makes no sense, or where names collide.
    """
    if format not in FORMATS:
        raise InputError(f"format is {format!r}; expected one of {list(FORMATS)}")
    mpp, region = checked_mpp(mpp), checked_region(region)
    root: Place | None = None
    if isinstance(slides, str | PathLike | Url):
        place = place_of(slides)
        if place.suffix.lower() == ".csv":
            entries = _entries_of_csv(place, mpp, region)
        elif (found := _slides_below(place)) is not None:
            # A slide that is this folder itself has no name below it.
            root = place.parent if place in found else place
            entries = [_Entry(p, None, mpp, region) for p in found]
        else:
            entries = [_Entry(place, None, mpp, region)]
    else:
        entries = [_Entry(place_of(p), None, mpp, region) for p in slides]
    if not entries:
        told = shown(slides) if isinstance(slides, str | PathLike) else str(slides)
        raise InputError(
            f"no slides in {told!r}; expected a folder with slides, a CSV file with a"
            " column 'slide', or a list of paths"
        )
    jobs = []
    for entry, below in zip(entries, _names([entry.path for entry in entries], root), strict=True):
        if entry.id is None:
            stem = _stem(below, entry.path)
            output = below.with_name(f"{scan_stem(stem, entry.region)}.{format}")
        elif _RESERVED.search(entry.id):
            raise InputError(
                f"the id {entry.id!r} is not a file name on every system; expected one without"
                ' slashes, control characters and <>:"|?*, and none that Windows keeps for devices,'
                " such as CON, AUX, NUL and COM1"
            )
        else:
            output = PurePosixPath(f"{entry.id}.{format}")
        jobs.append(
            Job(
                path=entry.path,
                name=str(below),
                output=output,
                mpp=entry.mpp,
                region=entry.region,
            )
        )
    _refuse_collisions(jobs)
    return jobs


def by_model(
    model: Any, made: Callable[[Any], Made], encoder: Callable[[Made], TileEncoder]
) -> dict[str, Made]:
    """Things made of one model, under "", or of each of several, under the names of their folders.

    Raises InputError for no models, and as `folder_of` does.
    """
    if not isinstance(model, Sequence) or isinstance(model, str):
        return {"": made(model)}
    found: dict[str, Made] = {}
    for one in map(made, model):
        found[folder_of(encoder(one), found)] = one
    if not found:
        raise InputError("model is an empty list; expected a model, or several")
    return found


def folder_of(encoder: TileEncoder, taken: Iterable[str] = ()) -> str:
    """The name of the folder of a model's features: the last part of its own, as a file name.

    Raises InputError for one that no folder may have, and for one like those that are taken.
    """
    told = str(encoder.provenance.get("name") or type(encoder).__name__)
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", PurePath(told).name).strip(".")
    if _RESERVED.search(name) or name.lower().endswith(".csv"):
        raise InputError(
            f"no folder for the features of {told!r} can be called {name!r} on every system;"
            " give the model another name: encoder.named('mine')"
        )
    if name.casefold() in map(str.casefold, taken):
        raise InputError(
            f"two models would write to the folder {name!r}; give one of them another name:"
            " encoder.named('other')"
        )
    return name


def _stem(below: PurePosixPath, place: Place) -> str:
    """The name of a slide without its suffix; dots in those of DICOM slides are none."""
    is_folder = isinstance(place, Path) and place.is_dir() and is_dicom(place)
    return below.name if is_folder or is_series(place) else below.stem


class _Entry(NamedTuple):
    path: Place
    id: str | None
    mpp: float | None
    region: int | None


def _slides_below(place: Place) -> Sequence[Place] | None:
    """The slides in a folder, in order; None where it is not one, or is a slide itself."""
    if is_series(place):
        return None
    if is_slide_path(place) and (isinstance(place, Url) or is_omezarr(place)):
        return None
    if isinstance(place, Path):
        return sorted([*_walk(place), *series_below(place)]) if place.is_dir() else None
    with retold(InputError, place):
        found = dict.fromkeys(_whole(url, len(place.parts)) for url in place.files_below())
    return [url for url in found if is_slide_path(url)]


def _walk(folder: Path) -> Iterator[Path]:
    """The slides below a folder; an OME-Zarr, which is a folder of many files, is one."""
    for parent, folders, files in os.walk(folder):
        found = [path for name in files if is_slide_path(path := Path(parent, name))]
        yield from (path for path in found if path.is_file())
        for name in folders[:]:
            if is_slide_path(path := Path(parent, name)) and is_omezarr(path):
                folders.remove(name)
                yield path


def _whole(url: Url, depth: int) -> Url:
    """The OME-Zarr that a file is a part of, or the file; its first `depth` parts are the root."""
    found, above = url, url
    while ".zarr/" in above.text.lower() and len(above.parts) > depth + 1:
        above = above.parent
        found = above if is_slide_path(above) else found
    return found


def _entries_of_csv(path: Place, mpp: float | None, region: int | None) -> list[_Entry]:
    """The rows of a cohort CSV; the paths in it are relative to its folder."""
    if isinstance(path, Url):
        raise InputError(
            f"the CSV file {path} lies at a URL; download it: a file of this machine may list URLs"
        )
    entries = []
    for row in read_csv(path, required=("slide",), optional=("mpp", "region", "id")):
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
        entries.append(_Entry(slide, row.get("id") or None, scale, region_of(row, region)))
    return entries


def region_of(row: Row, default: int | None = None) -> int | None:
    """The scan in the column `region` of a row; InputError where it is no number."""
    text = row.get("region")
    try:
        number = float(text) if text else None  # tables with gaps have 1.0 for 1
        whole = None if number is None else int(number)
    except (ValueError, OverflowError):
        number, whole = -1.0, -1
    if number != whole or (whole is not None and whole < 0):
        raise InputError(
            f"line {row.line} of {row.table!r} has region {text!r}; expected the number of a scan"
            " in its file, from 0 on, or nothing"
        )
    return default if whole is None else whole


def _names(places: Sequence[Place], root: Place | None) -> list[PurePosixPath]:
    """The path of each slide below the folder that they share, those at URLs among themselves."""
    # Without "..", which would lead out of the output folder; links are not followed.
    absolute = [os.path.abspath(place) for place in places if isinstance(place, Path)]  # noqa: PTH100
    folders = [os.path.split(path)[0] for path in absolute]
    folder = root if isinstance(root, Path) else Path(os.path.commonpath(folders or ["."]))
    urls = [place for place in places if isinstance(place, Url)]
    depth = len([p for p in root.parts if p]) if isinstance(root, Url) else common_parts(urls)
    names = []
    for place in places:
        if isinstance(place, Path):
            below = readable(os.path.relpath(str(place), folder)).replace("\\", "/")
            names.append(PurePosixPath(below))
            continue
        parts = [part for part in place.parts[depth:] if part]
        if not parts or {".", ".."} & set(parts) or any("\\" in part for part in parts):
            raise InputError(f"the URL {place} names no file by a plain path; give it without '..'")
        names.append(PurePosixPath(*parts))
    return names


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Settings of a cohort, the same for every slide. `encoders` are by the `model` of a job."""

    encoders: Mapping[str, TileEncoder]
    out: Place
    tissue: Literal["auto", "given"] | None
    overlap: int
    min_tissue: float | None
    border: Border
    overlay: bool
    batch_size: int | None
    processes: int | None
    slide_timeout: float | None
    memory_limit: int | None
    damaged: Damaged
    on_mismatch: Literal["error", "redo"]
    transform: Transform | None

    def __post_init__(self) -> None:
        check_damaged(self.damaged)
        if any(encoder.tile_spec != self.spec for encoder in self.encoders.values()):
            told = "; ".join(f"{name}: {e.tile_spec}" for name, e in self.encoders.items())
            raise InputError(
                f"the models look at different tiles, which are not read in one pass ({told});"
                " extract the features of each by itself, or let xmag.evaluate.compare() do that"
            )
        check_grid(self.spec, **self._grid)
        if self.batch_size is not None and self.batch_size < 1:
            raise InputError(f"batch_size is {self.batch_size!r}; expected at least 1, or None")
        if self.on_mismatch not in ("error", "redo"):
            raise InputError(f"on_mismatch is {self.on_mismatch!r}; expected 'error' or 'redo'")
        if self.processes is not None and not (
            isinstance(self.processes, int) and self.processes >= 0
        ):
            raise InputError(f"processes is {self.processes!r}; expected 0 or more, or None")
        if self.processes and not PROCESSES_SUPPORTED:
            raise InputError(
                f"processes is {self.processes}, but this system has no decoding processes; use 0"
            )
        if self.limits != Limits() and (self.processes == 0 or not PROCESSES_SUPPORTED):
            raise InputError(
                "slide_timeout and memory_limit hold for decoding processes, and there are none"
                " here; expected processes to be at least 1, or no limits"
            )

    @property
    def spec(self) -> TileSpec:
        """Specification of the tiles, the same for all models."""
        return next(iter(self.encoders.values())).tile_spec

    @property
    def limits(self) -> Limits:
        """Limits of time and memory for one slide."""
        return Limits(slide_timeout=self.slide_timeout, memory_limit=self.memory_limit)

    def processes_for(self, slides: int) -> int:
        """Number of decoding processes for so many slides: those asked for, or those that pay.

        One a core where a GPU embeds faster than threads of one process decode. Elsewhere one: it
        keeps up, and a slide that crashes it does not take this process down.
        """
        if self.processes is not None:
            return min(self.processes, slides)
        if not PROCESSES_SUPPORTED:
            return 0
        devices = (getattr(encoder, "device", None) for encoder in self.encoders.values())
        on_cuda = any(getattr(device, "type", "cpu") == "cuda" for device in devices)
        return min(usable_cores(), slides) if on_cuda else min(1, slides)

    def fingerprint(self, model: str) -> dict[str, Any]:
        """The fingerprint that a bag of this model, made with these settings, has."""
        methods = {None: None, "auto": TISSUE_METHOD, "given": GIVEN_METHOD}
        options = plan_options(**self._grid, tissue_method=methods[self.tissue])
        return fingerprint_of(self.encoders[model], options, self.transform)

    @property
    def _grid(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("overlap", "min_tissue", "border")}
