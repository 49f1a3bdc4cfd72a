"""A cohort as a table: slides, labels and patients from a CSV, and the feature file of each."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from xmag.errors import InputError
from xmag.tables import read_csv

_SUFFIXES = (".h5", ".safetensors", ".pt", ".npz")


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """The rows of a cohort. `labels` and `patients` are empty where they were not asked for."""

    name: str
    slides: list[str]
    features: list[Path]
    labels: list[str]
    patients: list[str]

    def counts(self) -> str:
        """How many slides, patients and slides of each class there are, in words."""
        each = ", ".join(f"{label} {self.labels.count(label)}" for label in sorted({*self.labels}))
        return f"{len(self.slides):,} slides of {len({*self.patients}):,} patients: {each}"


def read_table(path: Path, features: str | None, *, labelled: bool = True) -> Table:
    """The cohort that a CSV lists, each slide with the file of its features.

    The file is the one in the column `features`, or that which `xmag extract` wrote for the slide
    into the folder `features`. Raises InputError for a CSV that makes no sense and for a slide
    without features.
    """
    wanted = ("slide", "label", "patient") if labelled else ("slide",)
    rows = _rows(path, wanted)
    folder = None if features is None else Path(features)
    if folder is not None and not folder.is_dir():
        raise InputError(
            f"there is no folder {str(folder)!r}; give --features the folder that xmag extract"
            " wrote to"
        )
    found = [_features_of(row, path, folder) for row in rows]
    _refuse_shared(found, [row["slide"] for row in rows], path)
    return Table(
        name=path.stem,
        slides=[row["slide"] for row in rows],
        features=found,
        labels=[row["label"] for row in rows] if labelled else [],
        patients=[row["patient"] for row in rows] if labelled else [],
    )


def _rows(path: Path, wanted: Sequence[str]) -> list[dict[str, str]]:
    columns, rows = read_csv(path)
    if missing := [name for name in wanted if name not in columns]:
        alone = " (where each slide is a patient of its own, repeat the slide there)"
        raise InputError(
            f"the CSV file {path.name!r} has the columns {columns}; expected the column"
            f" {missing[0]!r} too, with commas between them"
            f"{alone if missing[0] == 'patient' else ''}"
        )
    if not rows:
        raise InputError(f"the CSV file {path.name!r} has no rows; expected one for each slide")
    for line, row in enumerate(rows, start=2):
        if empty := [name for name in wanted if not row[name].strip()]:
            raise InputError(
                f"line {line} of {path.name!r} has no {empty[0]}; fill it in, or remove the line"
            )
    return rows


def _features_of(row: dict[str, str], path: Path, folder: Path | None) -> Path:
    if row.get("features"):
        found = (path.parent if folder is None else folder) / row["features"]
        if found.is_file():
            return found
        raise InputError(
            f"there is no file {str(found)!r}, which {path.name!r} names for {row['slide']!r};"
            f" its column 'features' is relative to the folder of"
            f" {'the CSV' if folder is None else '--features'}"
        )
    if folder is None:
        raise InputError(
            f"{path.name!r} has no column 'features'; give --features, the folder that xmag extract"
            " wrote to"
        )
    for stem in _stems(row):
        for suffix in _SUFFIXES:
            candidate = folder / f"{stem}{suffix}"
            if candidate.is_file():
                return candidate
    raise InputError(
        f"{str(folder)!r} has no features of {row['slide']!r}; extract them first: xmag extract"
        f" {path} -o {folder}"
    )


def _stems(row: dict[str, str]) -> list[str]:
    """Where `extract_cohort` may have put a slide: its id, or the end of its path, longest first.

    How much of the path it kept depends on what it was given. A slide may also be named alone,
    without the suffix of its file.
    """
    if row.get("id"):
        return [row["id"]]
    slide = PurePath(row["slide"].replace("\\", "/"))
    parts = [part for part in slide.parts if part not in (slide.anchor, "..")]
    stems = []
    for first in range(len(parts)):
        end = PurePath(*parts[first:])
        stems += [str(end.with_name(end.stem)), str(end)]
    return stems


def _refuse_shared(files: Sequence[Path], slides: Sequence[str], path: Path) -> None:
    """Raise InputError where two rows have the same features: they would be in two folds."""
    first: dict[Path, str] = {}
    for file, slide in zip(files, slides, strict=True):
        if file in first:
            raise InputError(
                f"{path.name!r} has {first[file]!r} and {slide!r}, which both have the features"
                f" {str(file)!r}; expected each slide once. Name files in a column 'features'"
            )
        first[file] = slide
