"""One slide in; a feature file, an overlay picture and a tensor for CLAM out."""

import argparse
from pathlib import Path

import xmag


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("slide", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="AI4PATH/XMAG")
    parser.add_argument("--mpp", type=float, help="µm/px of level 0, if the file does not say")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    name = args.slide.stem

    encoder = xmag.load_model(args.model)
    with xmag.Slide(args.slide, mpp=args.mpp) as slide:
        tissue = xmag.find_tissue(slide)
        plan = xmag.plan_tiles(slide, encoder.tile_spec, tissue=tissue, min_tissue=0.25)
        bag = xmag.extract_features(slide, model=encoder, plan=plan)
        picture = xmag.draw.overlay(slide, tissue=tissue, plan=plan)

    bag.save(args.out / f"{name}.h5")
    bag.export(args.out / f"{name}.pt", layout="clam")
    picture.save(args.out / f"{name}.png")
    print(f"{name}: {len(bag)} tiles at {plan.scale.mpp:.3g} µm/px, {tissue.fraction:.0%} tissue")


if __name__ == "__main__":
    main()
