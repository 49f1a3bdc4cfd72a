"""A cohort as a table: cases, what is known of them, and patients from a CSV; feature files."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any, Literal, Self

from xmag.cli.tasks import Target, Value
from xmag.cohort.jobs import region_of
from xmag.errors import InputError
from xmag.files import Row, read_csv
from xmag.slide import scan_stem

By = Literal["slide", "patient"]

_SUFFIXES = (".h5", ".safetensors", ".pt", ".npz")


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """The cases of a cohort: slides, or patients with theirs.

    `slides` are those of each case, and `features` their files: one, or a list by patient. `ids`
    are what other tables call the cases: the patient, or the slide or its id.
    `values` are what is known of each case, and `y` the same as `fit` takes it; these and
    `patients` are empty where they were not asked for.
    """

    slides: list[tuple[str, ...]]
    features: list[Any]
    ids: list[str]
    values: list[Value]
    y: Any
    patients: list[str]

    @classmethod
    def of_files(cls, files: Sequence[Path]) -> Self:
        """The table of slides of which the files of features are known alone."""
        names = [path.name for path in files]
        slides: list[tuple[str, ...]] = [(name,) for name in names]
        return cls(slides=slides, features=[*files], ids=names, values=[], y=[], patients=[])

    def name(self, case: int) -> str:
        """The name of a case: its slide, or its patient and the slides."""
        slides = ", ".join(self.slides[case])
        by_patient = isinstance(self.features[case], list)
        return f"{self.patients[case]} ({slides})" if by_patient else slides


def read_table(
    path: Path,
    features: str | None,
    *,
    target: Target | None = None,
    by: By = "slide",
    with_features: bool = True,
) -> Table:
    """The cohort that a CSV lists, each slide with the file of its features.

    The file is the one in the column `features`, or that which `xmag extract` wrote for the slide
    into the folder `features`. Without a `target`, nothing needs to be known of the slides; where
    they are not `with_features`, none are looked for. By "patient", the slides of a patient are one
    case. Raises InputError for a CSV that makes no
    sense, a slide without features, and a patient of whom two rows say different things.
    """
    columns = () if target is None else tuple(map(_as_header, target.columns))
    with_patients = target is not None or by == "patient"
    wanted = ("slide", *columns, *(("patient",) if with_patients else ()))
    if twice := [name for name in wanted if wanted.count(name) > 1]:
        raise InputError(f"the column {twice[0]!r} is named twice; expected another one")
    rows = read_csv(path, required=wanted, optional=("features", "region", "id"))
    if not rows:
        raise InputError(f"the CSV file {path.name!r} has no rows; expected one for each slide")
    slides = [row.required("slide") for row in rows]
    ids = [row.get("id") or row.required("slide") for row in rows]
    values: list[Value] = []
    if target is not None:
        values = [replace(target, columns=columns).value(row) for row in rows]
    patients = [row.required("patient") for row in rows] if with_patients else []
    _refuse_alike(patients, "patient", path)
    if target is not None and target.task == "classification" and len(columns) == 1:
        labels = [str(label) for (label,) in values]
        _refuse_alike(labels, columns[0], path)
        if not target.ordinal:
            _refuse_numbers(labels, path)
    files = [Path(slide) for slide in slides]
    if with_features:
        files = _files_of(rows, path, None if features is None else Path(features))
    together: dict[str | int, list[int]] = {}
    for place in range(len(rows)):
        together.setdefault(patients[place] if by == "patient" else place, []).append(place)
    cases = [*together.values()]
    for places in cases if values else ():
        _refuse_contradictions([rows[n] for n in places], columns, [values[n] for n in places])
    values = [values[places[0]] for places in cases] if values else []
    return Table(
        slides=[tuple(slides[n] for n in places) for places in cases],
        features=[[files[n] for n in places] for places in cases] if by == "patient" else files,
        ids=[*dict.fromkeys(patients)] if by == "patient" else ids,
        values=values,
        y=[] if target is None else target.array(values),
        patients=[patients[places[0]] for places in cases] if with_patients else [],
    )


def features_in(
    folder: Path, slide: str, own: str = "", *, region: int | None = None
) -> Path | None:
    """The features that `xmag extract` wrote for a slide into a folder; None where there are none.

    They are called as the id that the slide has of its `own`, or as the end of its path, and by
    the scan that is not its file's first.
    """
    for stem in [own] if own else [scan_stem(stem, region) for stem in _stems(slide)]:
        for suffix in _SUFFIXES:
            candidate = folder / f"{stem}{suffix}"
            if candidate.is_file():
                return candidate
    return None


def _as_header(column: str) -> str:
    """The name of a column as `read_csv` has it."""
    return column.strip().casefold()


def _refuse_contradictions(
    rows: Sequence[Row], columns: Sequence[str], values: Sequence[Value]
) -> None:
    """Raise InputError for rows of one patient that do not say the same."""
    if len({str(value) for value in values}) == 1:  # as text, NaN equals itself
        return
    lines = ", ".join(str(row.line) for row in rows[:8])
    first, other = values[0], next(v for v in values if str(v) != str(values[0]))
    said = (" ".join(f"{c} {v}" for c, v in zip(columns, v, strict=True)) for v in (first, other))
    raise InputError(
        f"lines {lines} of {rows[0].table!r} are of the patient {rows[0].get('patient')!r}, who is"
        f" one case with --by patient, and say {' and '.join(said)}; expected the same of each:"
        " correct them, or leave out --by patient"
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
        broken = [label for label in labels if not float(label).is_integer()]
    except ValueError:
        return
    if broken:
        raise InputError(
            f"the labels of {path.name!r} are numbers, such as {broken[0]}, which is not whole:"
            " each different number would become a class of its own. For numbers there is --task"
            " regression; where they are names of classes, write them as words: grade 1.5"
        )


def _files_of(rows: Sequence[Row], path: Path, folder: Path | None) -> list[Path]:
    """The file of each row's features; InputError where two have the same."""
    if folder is not None and not folder.is_dir():
        raise InputError(
            f"there is no folder {str(folder)!r}; give --features the folder that xmag extract"
            " wrote to"
        )
    slide_of: dict[Path, str] = {}
    for row in rows:
        file, slide = _features_of(row, path, folder), row.required("slide")
        if file in slide_of:  # they would be in two folds
            raise InputError(
                f"{path.name!r} has {slide_of[file]!r} and {slide!r}, which both have the features"
                f" {str(file)!r}; expected each slide once. Name files in a column 'features'"
            )
        slide_of[file] = slide
    return [*slide_of]


def _features_of(row: Row, path: Path, folder: Path | None) -> Path:
    slide = row.required("slide")
    if own := row.get("features"):
        named = (path.parent if folder is None else folder) / own
        if named.is_file():
            return named
        raise InputError(
            f"there is no file {str(named)!r}, which {path.name!r} names for {slide!r};"
            f" its column 'features' is relative to the folder of"
            f" {'the CSV' if folder is None else '--features'}"
        )
    if folder is None:
        raise InputError(
            f"{path.name!r} names no file of features for {slide!r}; give --features, the folder"
            " that xmag extract wrote to, or fill in a column 'features'"
        )
    if found := features_in(folder, slide, row.get("id"), region=region_of(row)):
        return found
    raise InputError(
        f"{str(folder)!r} has no features of {slide!r}; extract them first: xmag extract"
        f" {path} -o {folder}"
    )


def _stems(slide: str) -> list[str]:
    """Names under which `extract_cohort` may have put a slide: ends of its path, longest first.

    How much of the path it kept depends on what it was given. A slide may also be named alone,
    without the suffix of its file.
    """
    path = PurePath(slide.replace("\\", "/"))
    parts = [part for part in path.parts if part not in (path.anchor, "..")]
    ends = [PurePath(*parts[first:]) for first in range(len(parts))]
    return [str(stem) for end in ends for stem in (end.with_name(end.stem), end)]
