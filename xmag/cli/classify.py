"""The commands around an estimator of any task: train, predict, evaluate, heatmap."""

import json
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from xmag import draw
from xmag.bag import FeatureBag
from xmag.cli.console import ALL_DONE, counted, write
from xmag.cli.table import By, Table, features_in, read_table
from xmag.cli.tasks import (
    ESTIMATORS,
    Estimator,
    Target,
    classes_of,
    own_labels,
    predictions,
    saved_target,
    target_of,
)
from xmag.encoder import Encoder, load_model
from xmag.errors import InputError
from xmag.extract import extract_features
from xmag.files import atomic_path, csv_text, make_folder, write_text
from xmag.hub.registry import DEFAULT_MODEL, MINI
from xmag.mil import load_estimator
from xmag.slide import Slide, scan_stem

_SEEN = {
    "validation_loss": "validation loss",
    "validation_auroc": "AUROC",
    "validation_balanced_accuracy": "balanced accuracy",
    "validation_quadratic_kappa": "quadratic kappa",
    "validation_r2": "R²",
    "validation_concordance": "C",
}


def train(
    csv: Path,
    out: str,
    *,
    features: str | None = None,
    by: By = "slide",
    random_state: int = 0,
    **options: Any,
) -> int:
    """Train an estimator, with these options of its class, and save it."""
    target, options = target_of(options)
    table = read_table(csv, features, target=target, by=by)
    estimator = ESTIMATORS[target.task](random_state=random_state, **options)
    estimator.fit(table.features, table.y, groups=table.patients)
    estimator.save(out)
    target.save(out)
    epochs = estimator.history_
    best = next(row for row in epochs if row["epoch"] == estimator.best_epoch_)
    seen = [f"{text} {best[k]:.3f}" for k, text in _SEEN.items() if best.get(k) is not None]
    slides, patients = sum(map(len, table.slides)), len({*table.patients})
    cohort = f"{slides:,} slides of {patients:,} patients"
    if by == "patient":
        cohort = f"{patients:,} patients with {slides:,} slides"
    write(sys.stdout, f"trained   on {cohort}: {target.summary(table.values)}")
    write(sys.stdout, f"kept      epoch {best['epoch']} of {len(epochs)}: {', '.join(seen)}")
    write(sys.stdout, f"written   {out}")
    return ALL_DONE


def predict(
    inputs: list[Path],
    classifier: str,
    *,
    features: str | None = None,
    by: By = "slide",
    times: list[float] | None = None,
    device: str = "auto",
    out: str | None = None,
) -> int:
    """Predict the cases of one CSV, or the slides whose feature files are given."""
    tables = [path for path in inputs if path.suffix.lower() == ".csv"]
    if tables and len(inputs) > 1:
        raise InputError(f"{tables[0]} is given beside other files; expected one CSV, or features")
    if tables:
        table = read_table(tables[0], features, by=by)
    elif features is not None or by == "patient":
        flag = "--by patient" if features is None else "--features"
        raise InputError(f"{flag} goes with a CSV; feature files are given as they are")
    else:
        table = Table.of_files(inputs)
    loaded = load_estimator(classifier, device=device)
    found = predictions(loaded, table.features, target=Target.load(classifier), times=times)
    if out is not None:
        rows = [[*(["patient", "slides"] if by == "patient" else ["slide"]), *found.columns]]
        for case, (slides, *values) in enumerate(
            zip(table.slides, *found.columns.values(), strict=True)
        ):
            who = [table.patients[case]] if by == "patient" else []
            rows.append([*who, "; ".join(slides), *values])
        write_text(out, csv_text(rows))
    for case, words in enumerate(found.words):
        write(sys.stdout, f"{table.name(case)}: {words}")
    if out is not None:
        write(sys.stdout, f"{counted(len(found.words), by)}; see {out}")
    return ALL_DONE


def evaluate(
    csv: Path,
    out: str,
    *,
    features: str | None = None,
    classifier: str | None = None,
    by: By = "slide",
    folds: int | None = None,
    repeats: int | None = None,
    folds_table: Path | None = None,
    random_state: int = 0,
    **options: Any,
) -> int:
    """Cross-validate, with these options of an estimator, or test one; save the report."""
    given = {"folds": folds, "repeats": repeats, "folds_table": folds_table}
    splits: dict[str, Any] = {name: n for name, n in given.items() if n is not None}
    of_training = {*splits, *options} - {"label", "time", "event", "device"}
    if classifier is not None and of_training:
        flags = ", ".join(f"--{name}".replace("_", "-") for name in sorted(of_training))
        raise InputError(
            "--folds and --repeats are for cross-validation, and other flags for training, but"
            f" --classifier tests one that is trained; leave out {flags}"
        )
    saved = None
    if classifier is not None:
        saved = saved_target(classifier, options, device=options.pop("device", "auto"))
    target, options = target_of(options) if saved is None else (saved[1], {})
    table = read_table(csv, features, target=target, by=by)
    from xmag import evaluate as evaluation  # needs the extra

    make_folder(out)  # before training, so that one that cannot be written to fails early
    if saved is None:
        if folds_table is not None:
            if len(splits) > 1:
                raise InputError("--folds-table has folds of its own; leave out --folds, --repeats")
            folded = evaluation.Folds.from_table(folds_table, table.ids, groups=table.patients)
            splits = {"folds": folded}
        report = evaluation.cross_validate(
            ESTIMATORS[target.task](random_state=random_state, **options),
            table.features,
            table.y,
            groups=table.patients,
            random_state=random_state,
            **splits,
            **classes_of(target, options),
        )
    else:
        cohort = (table.features, own_labels(saved[0], table.y), table.patients)
        report = evaluation.external(
            saved[0], {csv.stem: cohort}, random_state=random_state, **classes_of(target, options)
        )
    report.save(out)
    write(sys.stdout, str(report))
    write(sys.stdout, f"see {Path(out) / 'report.json'}, and the pictures beside it")
    return ALL_DONE


def compare(
    csv: Path,
    models: list[str],
    out: str,
    *,
    external: list[Path] | None = None,
    random_state: int = 0,
    **options: Any,
) -> int:
    """Compare encoders on a cohort, and on others; save the table and its picture."""
    given = ("folds", "repeats", "metric", "mpp", "region", "gpus", "finetune", "device", "dtype")
    more = {name: options.pop(name) for name in given if name in options}
    if "device" in more:
        options["device"] = more["device"]
    target, options = target_of(options)

    def cohort_of(path: Path) -> tuple[Any, ...]:
        table = read_table(path, None, target=target, with_features=False)
        return path, table.y, table.patients

    from xmag import evaluate as evaluation  # needs the extra

    found = evaluation.compare(
        cohort_of(csv),
        models=models,
        out=out,
        external={path.stem: cohort_of(path) for path in external or ()},
        estimator=ESTIMATORS[target.task](random_state=random_state, **options),
        random_state=random_state,
        **more,
        **classes_of(target, options),
    )
    found.save(out)
    write(sys.stdout, str(found))
    write(sys.stdout, f"see {Path(out) / 'compare.csv'}, and the picture beside it")
    return ALL_DONE


def heatmap(
    slides: list[str],
    classifier: str,
    *,
    features: str | None = None,
    out: str | None = None,
    model: str | None = None,
    gallery: bool = False,
    gallery_mpp: float | None = None,
    geojson: bool = False,
    scale: draw.Scale = "rank",
    device: str = "auto",
    dtype: str | None = None,
    mpp: float | None = None,
    region: int | None = None,
) -> int:
    """Draw the attention of an estimator over a slide, or over those of one case."""
    for flag, given in (("--model", model), ("--dtype", dtype)):
        if features is not None and given is not None:
            raise InputError(f"--features and {flag} are given; leave one of them out")
    loaded = load_estimator(classifier, device=device)
    paths = _pictures(slides, out, region)
    with ExitStack() as stack:
        opened = [stack.enter_context(Slide(slide, mpp=mpp, region=region)) for slide in slides]
        if features is None:
            encoder = _encoder(loaded, classifier, model, device=device, dtype=dtype)
            bags = [extract_features(slide, model=encoder) for slide in opened]
        else:
            files = _features_of(slides, Path(features), region)
            bags = [FeatureBag.load(f).on(slide) for f, slide in zip(files, opened, strict=True)]
            for file, bag in zip(files, bags, strict=True):
                _require_scan(file, bag, region)
        bag_or_bags = bags if len(bags) > 1 else bags[0]
        found = loaded.attention(bag_or_bags)
        case = found if isinstance(found, list) else [found]
        (words,) = predictions(loaded, [bag_or_bags], target=Target.load(classifier)).words
        written: list[Path] = []
        for path, slide, attention in zip(paths, opened, case, strict=True):
            stem = path.stem.removesuffix("-heatmap")
            caption = f"predicted: {words}"
            options: dict[str, Any] = {"case": case, "scale": scale}
            pictures = {path: draw.heatmap(slide, attention, caption=caption, **options)}
            if gallery or gallery_mpp is not None:
                name = path.with_name(f"{stem}-gallery.png")
                pictures[name] = draw.gallery(slide, attention, mpp=gallery_mpp, **options)
            for file, picture in pictures.items():
                with atomic_path(file) as temporary:
                    picture.save(temporary, format="PNG")
            written += pictures
            if geojson:
                written.append(path.with_name(f"{stem}.geojson"))
                write_text(written[-1], json.dumps(draw.attention_geojson(attention, case=case)))
    write(sys.stdout, f"{', '.join(slide.name for slide in opened)}: {words}")
    if draw.is_nearly_even(case[0], case):
        write(sys.stderr, "xmag: attention is nearly even: all tiles got about as much")
    for file in written:
        write(sys.stdout, f"written   {file}")
    return ALL_DONE


def _pictures(slides: list[str], out: str | None, region: int | None) -> list[Path]:
    """The file of each slide's picture: `out` itself, or below it for several slides."""
    names = [f"{scan_stem(Path(slide).stem, region)}-heatmap.png" for slide in slides]
    if len(slides) == 1:
        return [Path(names[0] if out is None else out)]
    if len({*names}) < len(names):
        raise InputError(f"two of the slides are called alike: {', '.join(slides)}; rename one")
    if out is not None and Path(out).suffix.lower() == ".png":
        raise InputError(f"--out is {out!r}, but each slide has a picture; give a folder")
    if out is not None:
        make_folder(out)
    return [Path(out or ".", name) for name in names]


def _features_of(slides: list[str], features: Path, region: int | None) -> list[Path]:
    """The features of each slide: the file given, or those in the folder given."""
    if not features.is_dir():
        if len(slides) > 1:
            raise InputError(
                f"--features is {str(features)!r}, but there are {len(slides)} slides; give the"
                " folder that xmag extract wrote to"
            )
        return [features]
    found = {slide: features_in(features, slide, region=region) for slide in slides}
    if missing := [slide for slide, file in found.items() if file is None]:
        raise InputError(
            f"{str(features)!r} has no features of {missing[0]!r}; extract them first: xmag"
            f" extract {missing[0]} -o {features}"
        )
    return [file for file in found.values() if file is not None]


def _require_scan(file: Path, bag: FeatureBag, region: int | None) -> None:
    """Raise InputError for features of another scan: those of a file may lie on one canvas."""
    slide = None if bag.provenance is None else bag.provenance.record.get("slide")
    made = 0 if slide is None else slide.get("region", 0)
    if slide is not None and made != (region or 0):
        raise InputError(
            f"the features {str(file)!r} are of region {made}, but the slide is opened with region"
            f" {region or 0}; give the --region that they were made from"
        )


def _encoder(
    estimator: Estimator, folder: str, model: str | None, *, device: str, dtype: str | None
) -> Encoder:
    """The encoder whose features the estimator takes, in the precision that it takes.

    That is known for certain by its weights alone; any other is refused when its bag is used.
    """
    wanted = estimator.fingerprint_ or {}
    if dtype is None:
        dtype = "float32" if wanted.get("dtype_class") == "fp32" else "auto"
    load = partial(load_model, device=device, dtype=dtype)
    if model is not None:
        return load(model)
    if (Path(folder) / "model.safetensors").is_file():
        return load(folder)
    mini = load(MINI)
    if mini.provenance["weights_sha256"] == wanted.get("weights_sha256"):
        return mini
    return load(DEFAULT_MODEL)
