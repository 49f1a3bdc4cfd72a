"""Slides and their labels in; an encoder and a classifier that were trained together out.

The CSV has the columns slide (relative paths start at its folder), label and patient. Stopped and
started again, it goes on where it was. Several GPUs: torchrun --nproc-per-node=4 finetune.py ...
"""

import argparse
import csv
from pathlib import Path

import xmag
from xmag.progress import tell


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("csv", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="AI4PATH/XMAG")
    parser.add_argument("--epochs", type=int, default=20)
    args = parser.parse_args()
    tell(None, "loading PyTorch")  # the first use of xmag.finetune does, which takes seconds
    with args.csv.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    slides = [args.csv.parent / row["slide"] for row in rows]
    args.out.mkdir(parents=True, exist_ok=True)

    result = xmag.finetune.finetune_slides(
        slides,
        [row["label"] for row in rows],
        groups=[row["patient"] for row in rows],
        model=args.model,
        settings=xmag.finetune.Settings(epochs=args.epochs),
        checkpoint=args.out / "checkpoint.safetensors",
    )
    for row in result.history:
        print(
            f"epoch {row.epoch}: loss {row.train_loss:.3f}, validation loss"
            f" {row.validation_loss:.3f}, {row.tiles} tiles in {row.seconds:.1f} s"
        )
    result.save(args.out / "model")

    # Later, or elsewhere: the folder is a model and a classifier.
    encoder = xmag.load_model(args.out / "model", dtype=result.encoder.dtype)
    classifier = xmag.MILClassifier.load(args.out / "model")
    bag = xmag.extract_features(slides[0], model=encoder)
    print(f"{rows[0]['slide']}: {classifier.predict([bag])[0]}")


if __name__ == "__main__":
    main()
