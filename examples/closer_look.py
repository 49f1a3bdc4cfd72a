"""Two stages: attention at 5x chooses tiles, and a second encoder sees these alone, at 20x.

The CSV has the columns slide (relative paths start at its folder), label and patient.
examples/make_cohort.py makes one to try this on. Without --second the second encoder is a small
ViT with random weights, which runs without a network and knows nothing of tissue.

The classifier whose attention chooses the tiles has seen the labels of all slides. To measure how
good the second one is, choose the tiles of each fold by a classifier of the other folds.
"""

import argparse
import csv
from pathlib import Path

import numpy as np
import torch

import xmag
from xmag import draw
from xmag.encoder import Encoder
from xmag.files import atomic_path, write_text
from xmag.hub.registry import ModelConfig
from xmag.vit import ViT, ViTConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("csv", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="AI4PATH/XMAG", help="that sees all tiles, at 5x")
    parser.add_argument("--second", help="model that sees the chosen ones, at a finer scale")
    parser.add_argument("--tiles", type=int, default=25, help="to choose on each slide")
    parser.add_argument("--epochs", type=int, default=100)
    args = parser.parse_args()
    with args.csv.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    labels, patients = [row["label"] for row in rows], [row["patient"] for row in rows]
    (args.out / "closer").mkdir(parents=True, exist_ok=True)

    # 1. All tiles, and a classifier with attention.
    encoder = xmag.load_model(args.model)
    extracted = xmag.extract_cohort(args.csv, args.out / "features", model=encoder)
    if extracted.failed:
        raise SystemExit(f"{len(extracted.failed)} slides failed; see features/report.csv")
    files = [args.out / "features" / row.output for row in extracted]
    classifier = xmag.MILClassifier(epochs=args.epochs, random_state=0)
    classifier.fit(files, labels, groups=patients)

    # 2. The tiles with most attention, closer, by the second encoder.
    second = xmag.load_model(args.second or save_random_encoder(args.out / "random-encoder"))
    bags = []
    for row, features in zip(rows, files, strict=True):
        attention = classifier.attention(features)
        with xmag.Slide(args.csv.parent / row["slide"]) as slide:
            # The plan that extract_cohort made: row i of the features is its tile i.
            plan = xmag.plan_tiles(slide, encoder.tile_spec, tissue=xmag.find_tissue(slide))
            top = np.argsort(-attention.scores)[: args.tiles]
            closer = plan.zoom(top, mpp=second.tile_spec.mpp)
            bag = xmag.extract_features(slide, model=second, plan=closer)
            picture = draw.gallery(slide, attention, count=6, mpp=second.tile_spec.mpp)
        bag.save(args.out / "closer" / f"{features.stem}.h5")
        write_text(args.out / "closer" / f"{features.stem}.json", closer.to_json())
        with atomic_path(args.out / "closer" / f"{features.stem}.png") as temporary:
            picture.save(temporary, format="PNG")
        print(
            f"{row['slide']}: {len(top)} of {len(plan)} tiles, {len(bag)} at {closer.tiles.mpp:g}"
        )
        bags.append(bag)

    # 3. A classifier of what the second encoder saw.
    final = xmag.MILClassifier(epochs=args.epochs, random_state=0)
    final.fit(bags, labels, groups=patients)
    final.save(args.out / "classifier")
    for row, label in zip(rows, final.predict(bags), strict=True):
        print(f"{row['slide']}: {label}")


def save_random_encoder(folder: Path) -> Path:
    """Writes a small ViT for tiles of 224 px at 0.5 µm/px, untrained, and returns its folder."""
    config = ViTConfig(width=64, depth=2, heads=2, hidden=256, position_grid=16)
    torch.manual_seed(0)
    vit = ViT(config)
    for name, parameter in vit.named_parameters():
        if name.endswith("gamma"):
            torch.nn.init.ones_(parameter)  # at the 1e-5 of a fresh ViT all tiles look alike
    about = {"name": "random-encoder", "trained": False}
    folder.mkdir(exist_ok=True)
    spec = xmag.TileSpec(mpp=0.5)
    Encoder(vit, ModelConfig(vit=config, tile_spec=spec), provenance=about).save(folder)
    return folder


if __name__ == "__main__":
    main()
