"""The commands on feature files: train, predict, evaluate."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xmag.cli.arguments import Commands, add_training
from xmag.cli.console import ALL_DONE, counted, write
from xmag.cli.table import Table, read_table
from xmag.errors import InputError

if TYPE_CHECKING:
    from xmag.mil import MILClassifier

_FEATURES_HELP = "the folder that xmag extract wrote to (or: a column 'features' in the CSV)"
_TRAIN_EPILOG = """\
CSV has the columns slide, label and patient. A fifth of the patients is held out to choose the
epoch whose weights are kept; xmag evaluate tells how good such a classifier is.

example:
  xmag train cohort.csv --features features -o classifier
"""
_EVALUATE_EPILOG = """\
CSV has the columns slide, label and patient; no patient is in two folds. FOLDER gets report.json,
roc.png and confusion.png. With --classifier, the cohort is an external one: nothing is trained.

examples:
  xmag evaluate cohort.csv --features features -o evaluation
  xmag evaluate other.csv --features others --classifier classifier -o external
"""


def add_commands(commands: Commands) -> None:
    """Add train, predict and evaluate to the commands."""
    raw = argparse.RawDescriptionHelpFormatter
    train = commands.add_parser(
        "train", help="train a classifier on the features of slides", epilog=_TRAIN_EPILOG,
        formatter_class=raw, allow_abbrev=False,
    )  # fmt: skip
    train.add_argument("csv", metavar="CSV", type=Path, help="columns: slide, label, patient")
    train.add_argument("--features", metavar="DIR", help=_FEATURES_HELP)
    train.add_argument("-o", "--out", metavar="MODEL", required=True, help="the folder to write")
    add_training(train)
    train.set_defaults(run=_train)

    predict = commands.add_parser(
        "predict", help="predict the labels of slides from their features", allow_abbrev=False
    )
    predict.add_argument(
        "inputs", metavar="CSV|FILE", nargs="+", type=Path,
        help="a CSV with a column slide, or feature files",
    )  # fmt: skip
    predict.add_argument("--features", metavar="DIR", help=_FEATURES_HELP)
    predict.add_argument("--classifier", metavar="MODEL", required=True, help="of xmag train")
    predict.add_argument("-o", "--out", metavar="CSV", help="also write the predictions there")
    predict.set_defaults(run=_predict)

    evaluate = commands.add_parser(
        "evaluate", help="cross-validate, or test a classifier on an external cohort",
        epilog=_EVALUATE_EPILOG, formatter_class=raw, allow_abbrev=False,
    )  # fmt: skip
    evaluate.add_argument("csv", metavar="CSV", type=Path, help="columns: slide, label, patient")
    evaluate.add_argument("--features", metavar="DIR", help=_FEATURES_HELP)
    evaluate.add_argument("-o", "--out", metavar="FOLDER", required=True, help="where to write")
    evaluate.add_argument("--folds", metavar="N", type=int, help="default: 5")
    evaluate.add_argument("--repeats", metavar="N", type=int, help="default: 1")
    evaluate.add_argument(
        "--classifier", metavar="MODEL", help="test this one instead of training others"
    )
    add_training(evaluate)
    evaluate.set_defaults(run=_evaluate)


def _train(args: argparse.Namespace) -> int:
    table = read_table(args.csv, args.features)
    classifier = _new_classifier(args)
    classifier.fit(table.features, table.labels, groups=table.patients)
    classifier.save(args.out)
    write(sys.stdout, f"trained   on {table.counts()}")
    best = next(row for row in classifier.history_ if row["epoch"] == classifier.best_epoch_)
    write(
        sys.stdout, f"kept      epoch {best['epoch']} of {len(classifier.history_)}: {_seen(best)}"
    )
    write(sys.stdout, f"written   {args.out}")
    return ALL_DONE


def _seen(epoch: dict[str, Any]) -> str:
    """Validation loss and metrics of an epoch, in words."""
    names = {
        "validation_loss": "validation loss",
        "validation_auroc": "AUROC",
        "validation_balanced_accuracy": "balanced accuracy",
    }
    values = [f"{text} {epoch[k]:.3f}" for k, text in names.items() if epoch.get(k) is not None]
    return ", ".join(values)


def _predict(args: argparse.Namespace) -> int:
    from xmag.files import csv_text, write_text

    table = _to_predict(args.inputs, args.features)
    classifier = _load(args.classifier)
    probabilities = classifier.predict_proba(table.features)
    classes = [str(label) for label in classifier.classes_.tolist()]
    rows = [
        [slide, classes[row.argmax()], *(f"{p:.6f}" for p in row)]
        for slide, row in zip(table.slides, probabilities, strict=True)
    ]
    if args.out is not None:
        columns = ["slide", "prediction", *(f"probability {label}" for label in classes)]
        write_text(args.out, csv_text([columns, *rows]))
    for (slide, predicted, *_), row in zip(rows, probabilities, strict=True):
        each = ", ".join(f"{label} {p:.3f}" for label, p in zip(classes, row, strict=True))
        write(sys.stdout, f"{slide}: {predicted} ({each})")
    if args.out is not None:
        write(sys.stdout, f"{counted(len(rows), 'slide')}; see {args.out}")
    return ALL_DONE


def _to_predict(inputs: Sequence[Path], features: str | None) -> Table:
    """The slides of one CSV, or those whose feature files are given."""
    tables = [path for path in inputs if path.suffix.lower() == ".csv"]
    if tables and len(inputs) > 1:
        raise InputError(f"{tables[0]} is given beside other files; expected one CSV, or features")
    if tables:
        return read_table(tables[0], features, labelled=False)
    if features is not None:
        raise InputError("--features goes with a CSV; feature files are given as they are")
    names = [path.name for path in inputs]
    return Table(name="", slides=names, features=list(inputs), labels=[], patients=[])


def _evaluate(args: argparse.Namespace) -> int:
    if args.classifier is not None and (args.folds is not None or args.repeats is not None):
        raise InputError(
            "--folds and --repeats are for cross-validation, but --classifier tests one that is"
            " trained; leave one of them out"
        )
    table = read_table(args.csv, args.features)
    from xmag import evaluate  # needs the extra
    from xmag.files import make_folder

    make_folder(args.out)  # before training, so that one that cannot be written to fails early
    if args.classifier is None:
        report = evaluate.cross_validate(
            _new_classifier(args),
            table.features,
            table.labels,
            groups=table.patients,
            folds=5 if args.folds is None else args.folds,
            repeats=1 if args.repeats is None else args.repeats,
            random_state=args.seed,
        )
    else:
        classifier = _load(args.classifier)
        cohort = (table.features, _own_labels(classifier, table), table.patients)
        report = evaluate.external(classifier, {table.name: cohort}, random_state=args.seed)
    report.save(args.out)
    write(sys.stdout, str(report))
    write(sys.stdout, f"see {Path(args.out) / 'report.json'}, roc.png and confusion.png")
    return ALL_DONE


def _new_classifier(args: argparse.Namespace) -> "MILClassifier":
    from xmag.mil import MILClassifier

    return MILClassifier(aggregator=args.aggregator, epochs=args.epochs, random_state=args.seed)


def _load(path: str) -> "MILClassifier":
    from xmag.mil import MILClassifier

    return MILClassifier.load(path)


def _own_labels(classifier: "MILClassifier", table: Table) -> list[Any]:
    """The labels as the classifier has them: one trained in Python may have numbers."""
    own = {str(label): label for label in classifier.classes_.tolist()}
    if unknown := sorted({*table.labels} - {*own}):
        raise InputError(
            f"the cohort has the label {unknown[0]!r}, but the classifier knows {sorted(own)};"
            " expected the same names: change the CSV"
        )
    return [own[label] for label in table.labels]
