"""Many slides in, a folder of bags and a report out; what is done already is not done again."""

import csv
import io
import logging
import math
import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from os import PathLike
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from xmag import draw, files
from xmag.bag import FeatureBag
from xmag.encoder import TileEncoder
from xmag.errors import BagError, InputError, MismatchError, OutputError, XmagError
from xmag.extract import Transform, embed_plan, fingerprint_of, progress_bar, resolve_encoder
from xmag.plan import plan_options, plan_tiles
from xmag.provenance import Provenance
from xmag.slide import Slide, is_slide_path
from xmag.tissue import TISSUE_METHOD, find_tissue

logger = logging.getLogger(__name__)

Status = Literal["done", "skipped", "empty", "failed"]

FORMATS = ("h5", "safetensors")
REPORT_NAME = "report.csv"
_REPORT_EVERY_S = 2.0
"""Seconds between writings of the report while a cohort runs: cheap, and never far behind."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CohortRow:
    """What became of one slide.

    `status` is "done", "skipped" (it was there already), "empty" (no tile; a valid empty bag was
    written) or "failed" (`error` says why). `output` is relative to the output folder, `seconds` is
    0 for what was skipped.
    """

    slide: str
    status: Status
    tiles: int = 0
    seconds: float = 0.0
    error: str = ""
    output: str = ""


@dataclass(frozen=True, slots=True)
class CohortReport(Sequence[CohortRow]):
    """The rows of a cohort, in the order of its slides."""

    rows: tuple[CohortRow, ...]

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def failed(self) -> tuple[CohortRow, ...]:
        """The rows of slides that could not be done."""
        return tuple(row for row in self.rows if row.status == "failed")

    def counts(self) -> dict[str, int]:
        """How many slides have each status."""
        return dict(Counter(row.status for row in self.rows))

    def to_csv(self) -> str:
        """The report as CSV text with a header."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        names = [field.name for field in fields(CohortRow)]
        writer.writerow(names)
        for row in self.rows:
            values = {name: getattr(row, name) for name in names}
            writer.writerow({**values, "seconds": f"{row.seconds:.2f}"}.values())
        return out.getvalue()


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A slide to do: its path, the name it has in the report, and where its bag goes."""

    path: Path
    name: str
    output: PurePosixPath
    mpp: float | None


def extract_cohort(
    slides: str | PathLike[str] | Iterable[str | PathLike[str]],
    out: str | PathLike[str],
    *,
    model: TileEncoder | str | None = None,
    format: Literal["h5", "safetensors"] = "h5",
    tissue: Literal["auto"] | None = "auto",
    mpp: float | None = None,
    overlap: int = 0,
    min_tissue: float = 0.25,
    overlay: bool = False,
    batch_size: int | None = None,
    on_mismatch: Literal["error", "redo"] = "error",
    progress: bool | None = None,
    transform: Transform | None = None,
) -> CohortReport:
    """The report of extracting the features of many slides into a folder.

    Each slide's bag goes to ``out/<path below the slides' common folder>.<format>``;
    ``report.csv`` beside them is kept up to date. A slide that cannot be done becomes a row with
    its error, and the others go on. Running it again does only what is missing: a bag counts as
    done if it is valid and was made from the same slide with the same model, tiles and
    preprocessing.

    Args:
        slides: A folder (searched for slides), a CSV file, a list of paths, or one path. The CSV
            has a column ``slide`` (relative paths start at the CSV's folder) and optionally
            ``mpp`` (µm/px of level 0, where the file's own is missing or wrong) and ``id`` (names
            the output instead of the path).
        out: The folder to write to; made if it is not there.
        model: An encoder, a name or path for `load_model`, or None for the default model.
        format: "h5" or "safetensors".
        tissue: "auto" finds the tissue of each slide, None takes every tile.
        mpp: µm/px of level 0 for every slide that has none in the CSV, whatever its file says.
        overlap: Output px that neighbouring tiles share.
        min_tissue: Smallest fraction of a tile's area that is tissue.
        overlay: Also write ``<output>.png``, a thumbnail with the tissue outline and the tiles.
        batch_size: Tiles a batch.
        on_mismatch: What to do with a valid bag that was made with something else: "error" raises
            before any work, "redo" makes it again.
        progress: Show a bar on stderr; None does on a terminal and in a notebook.
        transform: Applied to each batch of tiles, for instance to normalise stains.

    Raises:
        InputError: No slides, a CSV without the column, names that collide.
        MismatchError: Bags in `out` were made with something else (see `on_mismatch`).
        OutputError: `out` cannot be written to.
    """
    settings = _Settings(
        encoder=resolve_encoder(model),
        out=Path(out),
        tissue=tissue,
        overlap=overlap,
        min_tissue=min_tissue,
        overlay=overlay,
        batch_size=batch_size,
        on_mismatch=on_mismatch,
        transform=transform,
    )
    jobs = jobs_of(slides, format=format, mpp=mpp)
    rows: dict[str, CohortRow] = {}
    with _ReportFile(settings.out / REPORT_NAME, jobs, rows) as report:
        found = {job.name: _existing(job, settings) for job in jobs}
        with progress_bar(progress, total=len(jobs), desc="slides", unit="slide") as bar:
            for job in jobs:
                row = _do(job, found[job.name], settings)
                rows[job.name] = row
                logger.info("%s: %s %s", row.slide, row.status, row.error)
                report.update()
                bar.update()
                bar.set_postfix(Counter(r.status for r in rows.values()))
    return CohortReport(tuple(rows[job.name] for job in jobs))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Settings:
    """What is the same for every slide of a cohort."""

    encoder: TileEncoder
    out: Path
    tissue: Literal["auto"] | None
    overlap: int
    min_tissue: float
    overlay: bool
    batch_size: int | None
    on_mismatch: Literal["error", "redo"]
    transform: Transform | None

    def __post_init__(self) -> None:
        if self.tissue not in ("auto", None):
            raise InputError(
                f"tissue is {self.tissue!r}; a cohort takes 'auto' or None (every tile); for a mask"
                " of your own use extract_features() on each slide"
            )
        if self.on_mismatch not in ("error", "redo"):
            raise InputError(f"on_mismatch is {self.on_mismatch!r}; expected 'error' or 'redo'")

    @property
    def fingerprint(self) -> dict[str, Any]:
        """The fingerprint that a bag made with these settings has."""
        method = None if self.tissue is None else TISSUE_METHOD
        options = plan_options(
            overlap=self.overlap, min_tissue=self.min_tissue, tissue_method=method
        )
        return fingerprint_of(self.encoder, options, self.transform)


def _existing(job: Job, settings: _Settings) -> FeatureBag | None:
    """The valid bag that is there already, None if there is none (or a broken one).

    Raises MismatchError if it was made with something else and that is not to be redone.
    """
    path = settings.out / job.output
    if not path.exists():
        return None
    try:
        bag = FeatureBag.load(path)
    except BagError as error:
        logger.warning("%s is not a valid bag and is made again: %s", job.output, error)
        return None
    expected = Provenance(fingerprint=settings.fingerprint, record={})
    if bag.provenance is None:
        differences = ["it has no provenance: another program wrote it"]
    else:
        differences = bag.provenance.differences(expected)
    if not differences:
        return bag
    if settings.on_mismatch == "redo":
        return None
    raise MismatchError(
        f"{job.output} is there already, but was made differently:\n  "
        + "\n  ".join(differences)
        + "\nGive on_mismatch='redo' to make such files again, or another output folder"
    )


def _do(job: Job, existing: FeatureBag | None, settings: _Settings) -> CohortRow:
    """The row of one slide, done now unless its bag is there already."""
    start = time.monotonic()
    try:
        status, tiles = _extract(job, existing, settings)
    # Whatever is wrong with one slide is the error of its row, not the end of the others.
    except Exception as error:
        logger.debug("%s failed", job.name, exc_info=True)
        reason = str(error) if isinstance(error, XmagError) else f"{type(error).__name__}: {error}"
        return CohortRow(
            slide=job.name, status="failed", seconds=time.monotonic() - start, error=reason
        )
    return CohortRow(
        slide=job.name,
        status=status,
        tiles=tiles,
        seconds=0.0 if status == "skipped" else time.monotonic() - start,
        output=str(job.output),
    )


def _extract(job: Job, existing: FeatureBag | None, settings: _Settings) -> tuple[Status, int]:
    """Make what is missing of one slide's outputs; what became of it, and its number of tiles."""
    output = settings.out / job.output
    picture = output.with_name(output.name + ".png")
    with Slide(job.path, mpp=job.mpp) as slide:
        if existing is not None and not _is_of(existing, slide, settings, job):
            existing = None
        if existing is not None and (picture.exists() or not settings.overlay):
            return "skipped", len(existing)
        mask = find_tissue(slide) if settings.tissue == "auto" else None
        plan = plan_tiles(
            slide,
            settings.encoder.tile_spec,
            tissue=mask,
            overlap=settings.overlap,
            min_tissue=settings.min_tissue,
        )
        output.parent.mkdir(parents=True, exist_ok=True)
        if settings.overlay:
            with files.atomic_path(picture) as path:
                draw.overlay(slide, tissue=mask, plan=plan).save(path, format="PNG")
        if existing is not None:
            return "skipped", len(existing)
        bag = embed_plan(
            slide,
            plan,
            settings.encoder,
            batch_size=settings.batch_size,
            progress=False,
            transform=settings.transform,
        )
    bag.save(output)
    return ("done" if len(bag) else "empty"), len(bag)


def _is_of(bag: FeatureBag, slide: Slide, settings: _Settings, job: Job) -> bool:
    """Whether a bag was made from this slide's content, at this scale."""
    assert bag.provenance is not None  # a bag without one is a mismatch already
    record = bag.provenance.record
    then = (record["slide"], record["scale"]["level0_mpp"])
    now = (slide.fingerprint, slide.mpp)
    if then == now:
        return True
    if settings.on_mismatch == "redo":
        return False
    raise MismatchError(
        f"{job.output} is there already, but was made from other content or at another scale: it"
        f" says {then}, the slide {now}; give on_mismatch='redo' to make it again"
    )


class _ReportFile:
    """Keeps ``report.csv`` up to date while the rows come in, and complete at the end."""

    def __init__(self, path: Path, jobs: Sequence[Job], rows: Mapping[str, CohortRow]) -> None:
        self._path, self._jobs, self._rows = path, jobs, rows
        self._written_at = -math.inf

    def __enter__(self) -> "_ReportFile":
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"the output folder {self._path.parent} cannot be made: {error}; name another one"
            ) from error
        # Written before any work, so that a folder that takes no files is found out at once.
        self._write()
        return self

    def __exit__(self, *_: object) -> None:
        self._write()

    def update(self) -> None:
        """Write the report, unless that was done a moment ago."""
        if time.monotonic() - self._written_at > _REPORT_EVERY_S:
            self._write()

    def _write(self) -> None:
        rows = [self._rows[job.name] for job in self._jobs if job.name in self._rows]
        files.write_text(self._path, CohortReport(tuple(rows)).to_csv())
        self._written_at = time.monotonic()


def jobs_of(
    slides: str | PathLike[str] | Iterable[str | PathLike[str]], *, format: str, mpp: float | None
) -> list[Job]:
    """The slides that `extract_cohort` was given, with the outputs they get.

    Raises InputError where there are none, where a path is not there, or where names collide.
    """
    if format not in FORMATS:
        raise InputError(f"format is {format!r}; expected one of {list(FORMATS)}")
    if isinstance(slides, str | PathLike):
        path = Path(slides)
        if path.suffix.lower() == ".csv":
            entries, root = _entries_of_csv(path, mpp)
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


def _entries_of_csv(path: Path, mpp: float | None) -> tuple[list[_Entry], Path | None]:
    """The rows of a cohort CSV; the paths in it are relative to its folder."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
            columns = list(reader.fieldnames or [])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"the CSV file {path.name!r} cannot be read: {error}") from error
    if "slide" not in columns:
        raise InputError(
            f"the CSV file {path.name!r} has the columns {columns}; expected a column 'slide' (and"
            " optionally 'mpp' and 'id')"
        )
    entries = []
    for line, row in enumerate(rows, start=2):
        if not row["slide"]:
            raise InputError(f"line {line} of {path.name!r} has no slide")
        own_mpp = mpp
        if row.get("mpp"):
            try:
                own_mpp = float(row["mpp"])
            except ValueError as error:
                raise InputError(
                    f"line {line} of {path.name!r} has mpp {row['mpp']!r}; expected µm/px, or"
                    " nothing"
                ) from error
        entries.append(_Entry(path.parent / row["slide"], row.get("id") or None, own_mpp))
    return entries, None


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
