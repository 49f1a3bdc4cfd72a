"""The commands around a classifier: train, predict, evaluate, heatmap."""

import json
import sys
from pathlib import Path
from typing import Any

from xmag import draw
from xmag.bag import FeatureBag
from xmag.cli.console import ALL_DONE, counted, write
from xmag.cli.table import Table, read_table
from xmag.encoder import Encoder, load_model
from xmag.errors import InputError
from xmag.extract import extract_features
from xmag.files import atomic_path, csv_text, make_folder, write_text
from xmag.hub.registry import DEFAULT_MODEL, MINI
from xmag.mil import MILClassifier
from xmag.slide import Slide

_SEEN = {
    "validation_loss": "validation loss",
    "validation_auroc": "AUROC",
    "validation_balanced_accuracy": "balanced accuracy",
}


def train(
    csv: Path, out: str, *, features: str | None = None, random_state: int = 0, **options: Any
) -> int:
    """Train a classifier, with these options of `MILClassifier`, and save it."""
    table = read_table(csv, features)
    classifier = MILClassifier(random_state=random_state, **options)
    classifier.fit(table.features, table.labels, groups=table.patients)
    classifier.save(out)
    epochs = classifier.history_
    best = next(row for row in epochs if row["epoch"] == classifier.best_epoch_)
    seen = [f"{text} {best[k]:.3f}" for k, text in _SEEN.items() if best.get(k) is not None]
    each = ", ".join(f"{c} {table.labels.count(c)}" for c in sorted({*table.labels}))
    write(
        sys.stdout,
        f"trained   on {len(table.slides):,} slides of {len({*table.patients}):,} patients: {each}",
    )
    write(sys.stdout, f"kept      epoch {best['epoch']} of {len(epochs)}: {', '.join(seen)}")
    write(sys.stdout, f"written   {out}")
    return ALL_DONE


def predict(
    inputs: list[Path], classifier: str, *, features: str | None = None, out: str | None = None
) -> int:
    """Predict the slides of one CSV, or those whose feature files are given."""
    tables = [path for path in inputs if path.suffix.lower() == ".csv"]
    if tables and len(inputs) > 1:
        raise InputError(f"{tables[0]} is given beside other files; expected one CSV, or features")
    if tables:
        table = read_table(tables[0], features, labelled=False)
        slides, files = table.slides, table.features
    elif features is not None:
        raise InputError("--features goes with a CSV; feature files are given as they are")
    else:
        slides, files = [path.name for path in inputs], inputs
    loaded = MILClassifier.load(classifier)
    probabilities = loaded.predict_proba(files)
    classes = [str(label) for label in loaded.classes_.tolist()]
    if out is not None:
        rows = [["slide", "prediction", *(f"probability {label}" for label in classes)]]
        for slide, row in zip(slides, probabilities, strict=True):
            rows.append([slide, classes[row.argmax()], *(f"{p:.6f}" for p in row)])
        write_text(out, csv_text(rows))
    for slide, row in zip(slides, probabilities, strict=True):
        write(sys.stdout, f"{slide}: {_said(classes, row)}")
    if out is not None:
        write(sys.stdout, f"{counted(len(slides), 'slide')}; see {out}")
    return ALL_DONE


def _said(classes: list[Any], probabilities: Any) -> str:
    """A prediction in words: the class, and the probability of each."""
    each = ", ".join(f"{c} {p:.3f}" for c, p in zip(classes, probabilities, strict=True))
    return f"{classes[probabilities.argmax()]} ({each})"


def evaluate(
    csv: Path,
    out: str,
    *,
    features: str | None = None,
    classifier: str | None = None,
    folds: int | None = None,
    repeats: int | None = None,
    random_state: int = 0,
    **options: Any,
) -> int:
    """Cross-validate, with these options of `MILClassifier`, or test one; save the report."""
    given = {"folds": folds, "repeats": repeats}
    splits: dict[str, Any] = {name: n for name, n in given.items() if n is not None}
    if classifier is not None and splits:
        raise InputError(
            "--folds and --repeats are for cross-validation, but --classifier tests one that is"
            " trained; leave one of them out"
        )
    table = read_table(csv, features)
    from xmag import evaluate as evaluation  # needs the extra

    make_folder(out)  # before training, so that one that cannot be written to fails early
    if classifier is None:
        report = evaluation.cross_validate(
            MILClassifier(random_state=random_state, **options),
            table.features,
            table.labels,
            groups=table.patients,
            random_state=random_state,
            **splits,
        )
    else:
        loaded = MILClassifier.load(classifier)
        cohort = (table.features, _own_labels(loaded, table), table.patients)
        report = evaluation.external(loaded, {csv.stem: cohort}, random_state=random_state)
    report.save(out)
    write(sys.stdout, str(report))
    write(sys.stdout, f"see {Path(out) / 'report.json'}, roc.png and confusion.png")
    return ALL_DONE


def _own_labels(classifier: MILClassifier, table: Table) -> list[Any]:
    """The labels as the classifier has them: one trained in Python may have numbers."""
    own = {str(label): label for label in classifier.classes_.tolist()}
    if unknown := sorted({*table.labels} - {*own}):
        raise InputError(
            f"the cohort has the label {unknown[0]!r}, but the classifier knows {sorted(own)};"
            " expected the same names: change the CSV"
        )
    return [own[label] for label in table.labels]


def heatmap(
    slide: str,
    classifier: str,
    *,
    features: str | None = None,
    out: str | None = None,
    model: str | None = None,
    gallery: bool = False,
    geojson: bool = False,
    mpp: float | None = None,
) -> int:
    """Draw the attention of a classifier over a slide."""
    if features is not None and model is not None:
        raise InputError("--features and --model are given; leave one of them out")
    loaded = MILClassifier.load(classifier)
    path = Path(f"{Path(slide).stem}-heatmap.png" if out is None else out)
    stem = path.stem.removesuffix("-heatmap")
    with Slide(slide, mpp=mpp) as opened:
        if features is None:
            bag = extract_features(opened, model=_encoder(loaded, classifier, model))
        else:
            bag = FeatureBag.load(features).on(opened)
        attention = loaded.attention(bag)
        pictures = {path: draw.heatmap(opened, attention)}
        if gallery:
            pictures[path.with_name(f"{stem}-gallery.png")] = draw.gallery(opened, attention)
    written = [*pictures]
    for file, picture in pictures.items():
        with atomic_path(file) as temporary:
            picture.save(temporary, format="PNG")
    if geojson:
        written.append(path.with_name(f"{stem}.geojson"))
        write_text(written[-1], json.dumps(draw.attention_geojson(attention)))
    said = _said(loaded.classes_.tolist(), loaded.predict_proba([bag])[0])
    write(sys.stdout, f"{opened.name}: {said}")
    for file in written:
        write(sys.stdout, f"written   {file}")
    return ALL_DONE


def _encoder(classifier: MILClassifier, folder: str, model: str | None) -> Encoder:
    """The encoder whose features the classifier takes, in the precision that it takes.

    That is known for certain by its weights alone; any other is refused when its bag is used.
    """
    wanted = classifier.fingerprint_ or {}
    dtype = "float32" if wanted.get("dtype_class") == "fp32" else "auto"
    if model is not None:
        return load_model(model, dtype=dtype)
    if (Path(folder) / "model.safetensors").is_file():
        return load_model(folder, dtype=dtype)
    mini = load_model(MINI, dtype=dtype)
    if mini.provenance["weights_sha256"] == wanted.get("weights_sha256"):
        return mini
    return load_model(DEFAULT_MODEL, dtype=dtype)
