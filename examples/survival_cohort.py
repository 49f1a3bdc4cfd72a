"""Slides of patients and their survival in; a cross-validated model of the risk, its pictures out.

The CSV has the columns slide (relative paths start at its folder), patient, time and event (1: it
happened, 0: censored). A patient may have several slides, which are one case.
examples/make_cohort.py --survival makes one to try this on.
"""

import argparse
import csv
from pathlib import Path

import numpy as np

import xmag
from xmag import draw, evaluate
from xmag.files import atomic_path
from xmag.metrics.survival import harrell_c


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

    # 1. Features. Run again, this does what is missing.
    encoder = xmag.load_model(args.model)
    extracted = xmag.extract_cohort(args.csv, args.out / "features", model=encoder)
    if extracted.failed:
        raise SystemExit(f"{len(extracted.failed)} slides failed; see features/report.csv")
    files = [args.out / "features" / row.output for row in extracted]

    # 2. The slides of a patient are one case: a list of bags.
    slides_of: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        slides_of.setdefault(row["patient"], []).append(place)
    patients = list(slides_of)
    cases = [[files[place] for place in slides_of[patient]] for patient in patients]
    first = [rows[slides_of[patient][0]] for patient in patients]
    y = np.array(
        [(row["event"] == "1", float(row["time"])) for row in first],
        dtype=[("event", bool), ("time", float)],
    )

    # 3. How good is it? Each patient is predicted by a model that has not seen them.
    model = xmag.MILSurvival(epochs=args.epochs, random_state=0)
    report = evaluate.cross_validate(
        model, cases, y, groups=patients, folds=args.folds, random_state=0
    )
    report.save(args.out / "evaluation")
    print(report)
    if "log_hazard" in rows[0]:  # of a planted cohort: what a model that knew all of it would have
        truth = harrell_c(y, [float(row["log_hazard"]) for row in first])
        print(f"\nHarrell's C of the truth itself: {truth:.3f}")

    # 4. The model of all patients, and what it looks at: in the one with the highest risk, and in
    # the one in the middle.
    model.fit(cases, y, groups=patients)
    model.save(args.out / "model")
    risk = model.predict(cases)
    order = np.argsort(-risk)
    for case in (order[0], order[len(order) // 2]):
        name = f"{patients[case]}: risk {risk[case]:.2f}"
        print(name)
        paths = [args.csv.parent / rows[place]["slide"] for place in slides_of[patients[case]]]
        draw_case(model, paths, cases[case], args.out, caption=name)


def draw_case(
    model: xmag.MILSurvival, paths: list[Path], bags: list[Path], out: Path, *, caption: str
) -> None:
    """Writes a heatmap of each slide of a patient; colours mean the same on all of them."""
    case = model.attention(bags)
    for path, attention in zip(paths, case, strict=True):
        with xmag.Slide(path) as slide:
            picture = draw.heatmap(slide, attention, case=case, caption=caption, max_px=900)
        with atomic_path(out / f"{path.stem}-heatmap.png") as temporary:
            picture.save(temporary, format="PNG")


if __name__ == "__main__":
    main()
