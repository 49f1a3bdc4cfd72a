"""A cohort as a table: slides, labels and patients from a CSV, and the feature file of each."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from xmag.errors import InputError
from xmag.files import Row, read_csv

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
        """Numbers of slides, of patients and of slides of each class, in words."""
        each = ", ".join(f"{label} {self.labels.count(label)}" for label in sorted({*self.labels}))
        return f"{len(self.slides):,} slides of {len({*self.patients}):,} patients: {each}"


def read_table(path: Path, features: str | None, *, labelled: bool = True) -> Table:
    """The cohort that a CSV lists, each slide with the file of its features.

    The file is the one in the column `features`, or that which `xmag extract` wrote for the slide
    into the folder `features`. Raises InputError for a CSV that makes no sense and for a slide
    without features.
    """
    wanted = ("slide", "label", "patient") if labelled else ("slide",)
    rows = read_csv(path, required=wanted, optional=("features", "id"))
    if not rows:
        raise InputError(f"the CSV file {path.name!r} has no rows; expected one for each slide")
    content = {name: [row.required(name) for row in rows] for name in wanted}
    for name in wanted[1:]:
        _refuse_alike(content[name], name, path)
    _refuse_numbers(content.get("label", []), path)
    folder = None if features is None else Path(features)
    if folder is not None and not folder.is_dir():
        raise InputError(
            f"there is no folder {str(folder)!r}; give --features the folder that xmag extract"
            " wrote to"
        )
    found = [_features_of(row, path, folder) for row in rows]
    _refuse_shared(found, content["slide"], path)
    return Table(
        name=path.stem,
        slides=content["slide"],
        features=found,
        labels=content.get("label", []),
        patients=content.get("patient", []),
    )


def _refuse_alike(values: Sequence[str], column: str, path: Path) -> None:
    """Raise InputError for one class or patient that is spelt in two ways: a leak, or two classes.

    Case, blanks and Unicode's compositions do not tell two of them apart.
    """
    first: dict[str, str] = {}
    for value in values:
        key = " ".join(unicodedata.normalize("NFKC", value).casefold().split())
        if first.setdefault(key, value) != value:
            raise InputError(
                f"{path.name!r} has the {column}s {first[key]!r} and {value!r}, which differ in"
                " case or blanks alone; write one in one way, or name two more differently"
            )


def _refuse_numbers(labels: Sequence[str], path: Path) -> None:
    """Raise InputError for labels that are measurements, each of which would become a class."""
    try:
        numbers = [float(label) for label in labels]
    except ValueError:
        return
    from xmag.metrics.labels import CONTINUOUS  # only here: it imports numpy

    if broken := [text for text, n in zip(labels, numbers, strict=True) if not n.is_integer()]:
        raise InputError(
            f"the labels of {path.name!r} are numbers, such as {broken[0]}, which is not whole:"
            f" {CONTINUOUS}. Where they are names of classes, write them as words: grade 1.5"
        )


def _features_of(row: Row, path: Path, folder: Path | None) -> Path:
    slide = row.required("slide")
    if own := row.get("features"):
        found = (path.parent if folder is None else folder) / own
        if found.is_file():
            return found
        raise InputError(
            f"there is no file {str(found)!r}, which {path.name!r} names for {slide!r};"
            f" its column 'features' is relative to the folder of"
            f" {'the CSV' if folder is None else '--features'}"
        )
    if folder is None:
        raise InputError(
            f"{path.name!r} names no file of features for {slide!r}; give --features, the folder"
            " that xmag extract wrote to, or fill in a column 'features'"
        )
    for stem in _stems(row):
        for suffix in _SUFFIXES:
            candidate = folder / f"{stem}{suffix}"
            if candidate.is_file():
                return candidate
    raise InputError(
        f"{str(folder)!r} has no features of {slide!r}; extract them first: xmag extract"
        f" {path} -o {folder}"
    )


def _stems(row: Row) -> list[str]:
    """Names under which `extract_cohort` may have put a slide: id or end of path, longest first.

    How much of the path it kept depends on what it was given. A slide may also be named alone,
    without the suffix of its file.
    """
    if own := row.get("id"):
        return [own]
    slide = PurePath(row.required("slide").replace("\\", "/"))
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
