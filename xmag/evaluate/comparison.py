"""Comparison of encoders on one cohort: accuracy in the same folds, and what each costs."""

import hashlib
import json
import os
import re
import shutil
import time
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from xmag import files, records
from xmag.cohort import CohortReport, extract_cohort
from xmag.cohort.jobs import Job, folder_of, jobs_of
from xmag.draw.page import as_cells, document, table, write_page
from xmag.encoder import TileEncoder, load_model
from xmag.errors import InputError, XmagWarning
from xmag.evaluate.end_to_end import EndToEnd, can_be_finetuned, check_end_to_end
from xmag.evaluate.folds import Folds
from xmag.evaluate.pictures import as_png, cost_figure
from xmag.evaluate.report import HEADLINES, Report, markdown
from xmag.evaluate.results import Estimate, Result, difference, shown
from xmag.evaluate.samples import taken
from xmag.evaluate.tasks import name_of, task_of
from xmag.evaluate.validation import cross_validate, external
from xmag.extract import resolve_encoder
from xmag.finetune import Settings
from xmag.metrics.bootstrap import TASKS
from xmag.mil import MILClassifier
from xmag.notebook import Shown
from xmag.urls import Url, place_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Cohort = tuple[Any, ...]
"""Slides as `extract_cohort` takes them, y, and optionally groups; a case each."""

INTERNAL = "internal"
_COSTS = ("tiles a slide", "GFLOP a slide", "slides a minute", "MB a slide")
FROZEN, END_TO_END = "frozen", "end to end"
_FORMAT = records.Format(
    name="xmag.Comparison", version=1, writer="Comparison.save", remedy="compare again"
)
_JSON_NAME = "compare.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedModel:
    """Costs of one model of a comparison, and its accuracy, frozen or trained end to end.

    Attributes:
        model: Its name, and that of its folder.
        training: "frozen", or "end to end": the encoder was fine-tuned with the classifier.
        mpp: µm/px of its tiles.
        parameters: Number of its parameters; None where it is no torch module.
        tiles: Tiles a slide, on average.
        gflop: GFLOP a slide, a multiply-add counting as two; None as for `parameters`.
        slides_per_minute: Slides extracted a minute, from the first slide's opening to the last
            one's file, of those that calls that ended have done; None where there is none.
        megabytes: Of feature files, 10^6 bytes a slide.
        estimates: The metric, by cohort; "internal" is the cross-validation.
        differences: The metric less that of the first model, with an interval by bootstrap of the
            patients, the same for both; by cohort.
    """

    model: str
    training: str
    mpp: float
    parameters: int | None
    tiles: float
    gflop: float | None
    slides_per_minute: float | None
    megabytes: float
    estimates: Mapping[str, Estimate]
    differences: Mapping[str, Estimate]

    @property
    def label(self) -> str:
        """The model as tables and pictures name it."""
        return self.model if self.training == FROZEN else f"{self.model}, {self.training}"


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Comparison(Shown):
    """Models compared on one cohort; ``print(comparison)`` shows the table.

    Attributes:
        metric: Name of the metric.
        title: Its title.
        models: A row for each model, in the order given, and for each that was fine-tuned.
        reports: By model, those of `cross_validate` and, with external cohorts, of `external`; of
            one that was fine-tuned, as "<model>, end to end".
    """

    metric: str
    title: str
    models: tuple[ComparedModel, ...]
    reports: Mapping[str, tuple[Report, ...]]

    def __str__(self) -> str:
        return self.to_markdown()

    def __repr__(self) -> str:
        found = [f"{one.label} {shown(one.estimates[INTERNAL].value)}" for one in self.models]
        return f"<Comparison of {len(found)} models, {self.title}: {', '.join(found)}>"

    def to_markdown(self) -> str:
        """The table: models, their costs, and the metric with its interval in each cohort."""
        return markdown(self._rows())

    def _rows(self) -> list[list[str]]:
        first, rows = self.models[0], [["model", "µm/px", "parameters", *_COSTS]]
        for cohort in first.estimates:
            rows[0] += [f"{self.title}, {cohort}", f"less {first.model}, {cohort}"]
        for one in self.models:
            size = None if one.parameters is None else one.parameters / 1e6
            costs = map(shown, (one.gflop, one.slides_per_minute, one.megabytes))
            cells = [one.label, f"{one.mpp:g}", f"{shown(size)} M", f"{one.tiles:,.1f}", *costs]
            for cohort, estimate in one.estimates.items():
                cells += [str(estimate), "" if one is first else str(one.differences[cohort])]
            rows.append(cells)
        return rows

    def to_csv(self) -> str:
        """The same as CSV text, with the numbers as they are."""
        names = [item.name for item in fields(ComparedModel)][:-2]  # estimates and differences
        rows: list[list[Any]] = [[*names]]
        for cohort in self.models[0].estimates:
            for name in (f"{cohort} {self.metric}", f"{cohort} difference"):
                rows[0] += [name, f"{name} low", f"{name} high"]
        for one in self.models:
            row = [getattr(one, name) for name in names]
            for cohort, estimate in one.estimates.items():
                for found in (estimate, one.differences[cohort]):
                    row += [found.value, *(found.interval or (None, None))]
            rows.append(["" if value is None else value for value in row])
        return files.csv_text(rows)

    def to_json(self) -> str:
        """The table as JSON; the reports are beside, in the folders of the models."""
        content = {"metric": self.metric, "title": self.title, "models": self.models}
        return _FORMAT.dumps(records.plain(content)) + "\n"

    def figure(self) -> "Figure":
        """Figure of the metric against GFLOP a slide; MissingExtraError without matplotlib."""
        return cost_figure(self)

    def to_html(self, path: str | os.PathLike[str] | Url) -> None:
        """Write table and picture as one HTML file; see `Report.to_html`."""
        head, *rows = self._rows()
        figures = {f"{self.title} against the cost of a slide": as_png(self.figure())}
        tables = [table(head, as_cells(rows))]
        title = f"Comparison of {len(self.models)} models"
        write_page(place_of(path), document(title=title, tables=tables, figures=figures))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``compare.csv``, ``.md``, ``.png`` and ``.json`` to `folder`, which is made."""
        picture = as_png(self.figure())
        files.make_folder(folder)
        texts = {".csv": self.to_csv(), ".md": self.to_markdown() + "\n", ".json": self.to_json()}
        for suffix, text in texts.items():
            files.write_text(Path(folder, _JSON_NAME).with_suffix(suffix), text)
        files.write_bytes(Path(folder, "compare.png"), picture)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "Comparison":
        """Load the Comparison of a folder of `save`, without its `reports`; InputError for none."""
        values = _FORMAT.load(Path(folder) / _JSON_NAME)
        with _FORMAT.reading(_JSON_NAME):
            models = tuple(_from_json(model) for model in values["models"])
            return cls(metric=values["metric"], title=values["title"], models=models, reports={})


def _from_json(values: dict[str, Any]) -> ComparedModel:
    of_cohorts = {
        name: {cohort: records.from_dict(Estimate, one) for cohort, one in values[name].items()}
        for name in ("estimates", "differences")
    }
    return records.from_dict(ComparedModel, values | of_cohorts)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Extracted:
    """The features of one model in each cohort, and what they cost."""

    folder: Path
    model: TileEncoder | str
    is_vit: bool
    mpp: float
    parameters: int | None
    gflop_per_tile: float | None
    reports: Mapping[str, CohortReport]

    def bags(self, cohort: str) -> list[str]:
        folder = self.folder / _folder(cohort)
        return [str(folder / row.output) for row in self.reports[cohort]]


def compare(
    cohort: Cohort,
    *,
    models: Sequence[TileEncoder | str],
    out: str | os.PathLike[str],
    external: Mapping[str, Cohort] | None = None,
    estimator: Any = None,
    metric: str | None = None,
    folds: int | Folds = 5,
    repeats: int = 1,
    classes: Sequence[Hashable] | None = None,
    ordered: bool = False,
    level: float = 0.95,
    resamples: int = 1000,
    random_state: int = 0,
    finetune: Settings | bool = False,
    device: str = "auto",
    dtype: str = "auto",
    **extraction: Any,
) -> Comparison:
    """Comparison of encoders on a cohort: the same slides, folds and estimator, accuracy and cost.

    Each model's features go to ``out/<model>/internal/...`` and ``out/<model>/<cohort>/...``, one
    model after the other, so that the slides a minute are its own; its reports go beside them. The
    same call again does what is missing. A slide that some model cannot be given, or that has no
    tile for it, is left out for all, with a warning. Metrics are those of `cross_validate` and, of
    models fitted on the whole cohort, of `external`, with the same options.

    Args:
        cohort: ``(slides, y)`` or ``(slides, y, groups)``: slides as `extract_cohort` takes them,
            and of each, in that order, the label and the patient as `cross_validate` takes them.
        models: Encoders, or names or paths for `load_model`; differences are to the first. Those
            given by name are held in memory one at a time.
        out: The folder to write to.
        external: Other cohorts by name, likewise, for models that are fitted on the first.
        estimator: As `cross_validate` takes it; by default ``MILClassifier(random_state=0)``, with
            the `random_state` given.
        metric: A name of `xmag.metrics`; by default AUROC, R², or Harrell's C.
        folds: As for `cross_validate`, the same for all models.
        repeats: As for `cross_validate`.
        classes: As for `cross_validate`.
        ordered: As for `cross_validate`.
        level: Share that the intervals hold.
        resamples: Draws of patients for the intervals.
        random_state: Seed of folds and draws.
        finetune: True, or the settings, also to train each model end to end in each fold, with the
            aggregator of `estimator`, a MILClassifier: a row more for it, of the same cost. Models
            that are no ViT of xmag's have none, with a warning.
        device: Of models given by name, as for `load_model`.
        dtype: Likewise; fine-tuning has its own precision.
        extraction: Options of `extract_cohort`.

    Raises InputError for operands that do not fit each other, models whose folders would be called
    alike, and no slides that all models have features of; and what `extract_cohort` and
    `cross_validate` raise.
    """
    cohorts = {INTERNAL: cohort, **(external or {})}
    if not models or len(cohorts) < 1 + len(external or {}):
        raise InputError(
            f"there are {len(models)} models, and external cohorts {list(external or {})}; expected"
            f" a model or more, and names other than {INTERNAL!r}"
        )
    estimator = MILClassifier(random_state=random_state) if estimator is None else estimator
    task = task_of(estimator, cohort[1])
    metric = HEADLINES[task.name] if metric is None else metric
    if metric not in TASKS[task.name] or TASKS[task.name][metric].is_test:
        raise InputError(f"metric is {metric!r}; expected one of {list(TASKS[task.name])}")
    if finetune is not False:
        check_end_to_end(estimator, extraction)
    load = partial(load_model, device=device, dtype=dtype)
    found = dict(_extracted(models, cohorts, Path(out), extraction, load=load))
    if finetune is not False and (others := [n for n, one in found.items() if not one.is_vit]):
        warnings.warn(
            f"{', '.join(others)}: no ViT of xmag's, which alone is fine-tuned; such a model has a"
            " row with the frozen encoder alone",
            XmagWarning,
            stacklevel=2,
        )
    kept = {name: _kept(name, content, found) for name, content in cohorts.items()}
    options = {"classes": classes, "ordered": ordered, "level": level, "resamples": resamples}
    options["random_state"] = random_state
    if not isinstance(folds, Folds):
        rows_kept = kept[INTERNAL]
        labels, groups = (_part(x, rows_kept) for x in (*cohort, None)[1:3])
        read = task.read(labels, "the cohort", len(rows_kept))
        folds = task.folds(read, groups, folds, repeats=repeats, random_state=random_state)
    reports: dict[str, tuple[Report, ...]] = {}
    rows: list[ComparedModel] = []
    for name, one in found.items():
        data = {
            label: tuple(_part(x, kept[label]) for x in (one.bags(label), *content[1:]))
            for label, content in cohorts.items()
        }
        reports[name] = _reports(one.folder, data, estimator, folds, options)
        rows.append(_row(name, one, reports[name], reports, metric))
        if finetune is not False and one.is_vit:
            folder = one.folder / "finetuning"
            settings = Settings() if finetune is True else finetune
            trained = EndToEnd(
                model=one.model, slides=_slides_of(one, cohorts, extraction), like=estimator,
                settings=settings, extraction=extraction, folder=folder, random_state=random_state,
                device=device,
            )  # fmt: skip
            tuned = _reports(one.folder, data, trained, folds, options, name="end-to-end.json")
            shutil.rmtree(folder, ignore_errors=True)  # checkpoints, which are large
            row = replace(_row(name, one, tuned, reports, metric), training=END_TO_END)
            reports[row.label] = tuned
            rows.append(row)
    return Comparison(
        metric=metric,
        title=TASKS[task.name][metric].title.split(",")[0],
        models=tuple(rows),
        reports=reports,
    )


def _slides_of(
    one: _Extracted, cohorts: Mapping[str, Cohort], extraction: Mapping[str, Any]
) -> dict[str, Job]:
    """The slide of each bag of a model."""
    options = {name: extraction.get(name) for name in ("mpp", "region")}
    form = extraction.get("format", "h5")
    return {
        bag: job
        for label, content in cohorts.items()
        for bag, job in zip(
            one.bags(label), jobs_of(content[0], format=form, **options), strict=True
        )
    }


def _part(values: Any, rows: Sequence[int]) -> Any:
    return values if values is None or len(values) == len(rows) else taken(values, rows)


def _folder(cohort: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "_", cohort)


def _extracted(
    models: Sequence[TileEncoder | str],
    cohorts: Mapping[str, Cohort],
    out: Path,
    extraction: Mapping[str, Any],
    *,
    load: Callable[[str | os.PathLike[str]], TileEncoder],
) -> Iterator[tuple[str, _Extracted]]:
    """The features of each model; those that are there already are kept."""
    names: list[str] = []
    for model in models:
        encoder = load(model) if isinstance(model, str | os.PathLike) else resolve_encoder(model)
        name = folder_of(encoder, names)
        names.append(name)
        parameters, gflop = costs_of(encoder)
        reports = {}
        for label, (given, *_) in cohorts.items():
            start = time.monotonic()
            place = out / name / _folder(label)
            reports[label] = extract_cohort(given, place, model=encoder, **extraction)
            spent = time.monotonic() - start
            if done := sum(row.status in ("done", "empty") for row in reports[label]):
                slides, seconds = _speed(out / name)
                text = json.dumps({"slides": slides + done, "seconds": seconds + spent})
                files.write_text(out / name / "speed.json", text + "\n")
        yield name, _Extracted(
            folder=out / name, mpp=encoder.tile_spec.mpp, parameters=parameters,
            gflop_per_tile=gflop, reports=reports, model=model, is_vit=can_be_finetuned(encoder),
        )  # fmt: skip


def costs_of(encoder: TileEncoder) -> tuple[int | None, float | None]:
    """Parameters of an encoder and GFLOP of a tile, by torch's counter; None without a module."""
    parts = [encoder, *getattr(encoder, "__dict__", {}).values()]
    module = next((part for part in parts if isinstance(part, nn.Module)), None)
    if module is None:
        return None, None
    side = encoder.tile_spec.size_px
    # The counter knows the products that attention is made of, and not every fused kernel.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        encoder.embed(np.zeros((1, side, side, 3), np.uint8))
    return sum(p.numel() for p in module.parameters()), counter.get_total_flops() / 1e9


def _speed(folder: Path) -> tuple[int, float]:
    """Slides that were extracted up to now, and the seconds that it took."""
    with suppress(OSError, ValueError, TypeError, LookupError):
        read = json.loads((folder / "speed.json").read_text())
        return int(read["slides"]), float(read["seconds"])
    return 0, 0.0


def _kept(name: str, content: Cohort, found: Mapping[str, _Extracted]) -> list[int]:
    """The slides of a cohort that every model has tiles of."""
    tables = {model: one.reports[name] for model, one in found.items()}
    count = len(next(iter(tables.values())))
    if len(content[1]) != count:
        raise InputError(f"{name} has {count} slides and {len(content[1])} labels; give as many")
    missing: dict[int, str] = {}
    for model, rows in tables.items():
        for place, row in enumerate(rows):
            if row.status not in ("done", "skipped") or not row.tiles:
                missing.setdefault(place, f"{row.slide} ({model}: {row.error or 'no tiles'})")
    if len(missing) == count:
        raise InputError(f"no slide of {name} has features of every model; first {missing[0]}")
    if missing:
        warnings.warn(
            f"{len(missing)} of {count} slides of {name} are left out for all models, first"
            f" {next(iter(missing.values()))}",
            XmagWarning,
            stacklevel=3,
        )
    return [place for place in range(count) if place not in missing]


def _reports(
    folder: Path,
    data: Mapping[str, Cohort],
    estimator: Any,
    folds: Folds,
    options: Mapping[str, Any],
    *,
    name: str = "evaluation.json",
) -> tuple[Report, ...]:
    """The reports of one model, of an earlier call where all that they rest on is the same.

    Bags are compared by size and time of writing.
    """
    bags = [Path(bag) for content in data.values() for bag in content[0]]
    stats = [(bag.name, bag.stat().st_size, bag.stat().st_mtime_ns) for bag in bags]
    parameters = estimator.get_params(deep=False) if hasattr(estimator, "get_params") else {}
    about = [version("xmag"), name_of(estimator), parameters, [*data], stats, options]
    about += [folds.to_dict(), [[np.asarray(x).tolist() for x in c[1:]] for c in data.values()]]
    key = hashlib.sha256(repr(about).encode()).hexdigest()
    path = folder / name
    with suppress(OSError, ValueError, TypeError, LookupError, InputError):
        earlier = json.loads(path.read_text())
        if earlier["key"] == key:
            return tuple(map(Report.from_json, earlier["reports"]))
    x, y, groups = (*data[INTERNAL], None)[:3]
    reports = [cross_validate(estimator, x, y, groups=groups, folds=folds, **options)]
    if len(data) > 1:
        reports.append(external(estimator, data, train=INTERNAL, folds=None, **options))
    content = {"key": key, "reports": [report.to_json() for report in reports]}
    files.write_text(path, json.dumps(content) + "\n")
    return tuple(reports)


def _row(
    name: str,
    one: _Extracted,
    reports: Sequence[Report],
    of_all: Mapping[str, Sequence[Report]],
    metric: str,
) -> ComparedModel:
    sizes = [
        (row.tiles, Path(bag).stat().st_size)
        for cohort, report in one.reports.items()
        for row, bag in zip(report, one.bags(cohort), strict=True)
        if row.output and row.tiles
    ]
    tiles, size = np.mean(sizes, axis=0).tolist()
    slides, seconds = _speed(one.folder)
    own, reference = _results(reports), _results(next(iter(of_all.values())))
    return ComparedModel(
        model=name,
        training=FROZEN,
        mpp=one.mpp,
        parameters=one.parameters,
        tiles=tiles,
        gflop=None if one.gflop_per_tile is None else tiles * one.gflop_per_tile,
        slides_per_minute=60 * slides / seconds if seconds else None,
        megabytes=size / 1e6,
        estimates={cohort: result.estimates[metric] for cohort, result in own.items()},
        differences={
            cohort: difference(result, reference[cohort], metric, reports[0].sampling)
            for cohort, result in own.items()
        },
    )


def _results(reports: Sequence[Report]) -> dict[str, Result]:
    """The results by the cohort that was tested."""
    internal, *others = reports
    found = {result.tested_on: result for report in others for result in report.results}
    return {INTERNAL: internal.results[0], **found}
