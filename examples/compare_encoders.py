"""Encoders on the same slides, folds and classifier: accuracy beside what each costs.

The CSV has the columns slide (relative paths start at its folder), label and patient.
examples/make_cohort.py makes one to try this on. A model may look at another scale than its own:
"NAME@0.5" is given tiles at 0.5 µm/px, and so are models that say no scale themselves, such as
"timm:vit_small_patch16_224.augreg_in21k@0.5". `xmag compare` is the same on the command line, for
models at their own scale.
"""

import argparse
import csv
from pathlib import Path

import xmag
from xmag import evaluate
from xmag.encoder import Encoder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("csv", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--models", nargs="+", default=["xmag-mini", "xmag-mini@1.0"])
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=100)
    args = parser.parse_args()
    with args.csv.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    comparison = evaluate.compare(
        (args.csv, [row["label"] for row in rows], [row["patient"] for row in rows]),
        models=[encoder_of(name) for name in args.models],
        out=args.out,
        estimator=xmag.MILClassifier(epochs=args.epochs, random_state=0),
        folds=args.folds,
    )
    comparison.save(args.out)
    print(comparison)


def encoder_of(model: str) -> Encoder:
    """The encoder of "NAME" or "NAME@MPP", called by both, as is the folder of its features."""
    name, _, mpp = model.partition("@")
    if not mpp:
        return xmag.load_model(name)
    return xmag.load_model(name, tile_spec=xmag.TileSpec(mpp=float(mpp))).named(f"{name}-{mpp}")


if __name__ == "__main__":
    main()
