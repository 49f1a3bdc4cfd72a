"""One slide in; its tiles as .h5ad, and pictures of their clusters by scanpy out.

Needs more than xmag: pip install "xmag[anndata]" scanpy igraph
"""

import argparse
from pathlib import Path

import xmag

try:
    import igraph  # noqa: F401  (scanpy's leiden needs it)
    import scanpy
except ImportError as error:
    raise SystemExit(
        f'{error}: this example needs pip install "xmag[anndata]" scanpy igraph'
    ) from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("slide", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="AI4PATH/XMAG")
    parser.add_argument("--mpp", type=float, help="µm/px of level 0, if the file does not say")
    parser.add_argument("--overlap", type=int, default=0, help="px that neighbouring tiles share")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    name = args.slide.stem

    encoder = xmag.load_model(args.model)
    with xmag.Slide(args.slide, mpp=args.mpp) as slide:
        tissue = xmag.find_tissue(slide)
        plan = xmag.plan_tiles(slide, encoder.tile_spec, tissue=tissue, overlap=args.overlap)
        bag = xmag.extract_features(slide, model=encoder, plan=plan)
        table = bag.to_anndata(slide)

    scanpy.pp.neighbors(table, n_neighbors=min(15, len(bag) - 1), use_rep="X")
    scanpy.tl.umap(table)
    scanpy.tl.leiden(table, flavor="igraph", n_iterations=2)
    table.write_h5ad(args.out / f"{name}.h5ad")

    options = {"color": "leiden", "show": False, "return_fig": True}
    scanpy.pl.umap(table, **options).savefig(args.out / f"{name}-umap.png", bbox_inches="tight")
    # A circle as wide as the step from tile to tile. scanpy warns that squidpy does this as well:
    # squidpy.pl.spatial_scatter(table, color="leiden", shape="square").
    step = 1 - args.overlap / encoder.tile_spec.size_px
    spatial = scanpy.pl.spatial(table, size=step, alpha=0.6, **options)
    spatial.savefig(args.out / f"{name}-clusters.png", bbox_inches="tight", dpi=150)
    print(f"{name}: {len(bag)} tiles in {table.obs['leiden'].nunique()} clusters")


if __name__ == "__main__":
    main()
