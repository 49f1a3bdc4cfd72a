"""Slides and their labels in; a cross-validated classifier, its report and its heatmaps out.

The CSV has the columns slide (relative paths start at its folder), label and patient.
examples/make_cohort.py makes one to try this on.
"""

import argparse
import csv
import json
from pathlib import Path

import xmag
from xmag import draw, evaluate
from xmag.files import atomic_path, write_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("csv", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="AI4PATH/XMAG")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=100)
    args = parser.parse_args()
    with args.csv.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    labels, patients = [row["label"] for row in rows], [row["patient"] for row in rows]

    # 1. Features. Run again, this does what is missing.
    encoder = xmag.load_model(args.model)
    extracted = xmag.extract_cohort(args.csv, args.out / "features", model=encoder)
    if extracted.failed:
        raise SystemExit(f"{len(extracted.failed)} slides failed; see features/report.csv")
    files = [args.out / "features" / row.output for row in extracted]

    # 2. How good is it? No patient is in two folds.
    classifier = xmag.MILClassifier(epochs=args.epochs, random_state=0)
    report = evaluate.cross_validate(
        classifier, files, labels, groups=patients, folds=args.folds, random_state=0
    )
    report.save(args.out / "evaluation")
    print(report)

    # 3. The classifier of all slides, and what it looks at.
    classifier.fit(files, labels, groups=patients)
    classifier.save(args.out / "classifier")
    for label in classifier.classes_:
        index = labels.index(label)
        draw_slide(classifier, args.csv.parent / rows[index]["slide"], files[index], args.out)


def draw_slide(classifier: xmag.MILClassifier, path: Path, features: Path, out: Path) -> None:
    """Writes the heatmap, the top tiles, and the tiles for QuPath."""
    attention = classifier.attention(features)
    with xmag.Slide(path) as slide:
        pictures = {
            "heatmap": draw.heatmap(slide, attention, max_px=900),
            "gallery": draw.gallery(slide, attention, count=8, tile_px=160),
        }
    for name, picture in pictures.items():
        with atomic_path(out / f"{path.stem}-{name}.png") as temporary:
            picture.save(temporary, format="PNG")
    write_text(out / f"{path.stem}.geojson", json.dumps(draw.attention_geojson(attention)))
    print(f"{path.name}: {classifier.predict([features])[0]}")


if __name__ == "__main__":
    main()
