"""What speed does to embeddings: scaled decoding, the resampling kernel, half precision.

    python benchmarks/fidelity.py SLIDE... [--model xmag-mini] [--tiles 256] [--device cpu]
                                  [--json OUT] [--jpeg-json OUT]

Each tile is read and embedded in several ways. The error of a way is the distance between its
embedding of a tile and the reference's, as a fraction of the median distance between the reference
embeddings of neighbouring tiles, those that share an edge. (Subtracting the mean embedding from all
of them changes no distance.) The reference decodes in full, averages boxes and computes in float32.

A second table says which way of decoding is nearer to the truth: the same tiles are encoded as JPEG
4:2:0 at twice and four times the model's scale, and decoded in full and at 1/2 or 1/4. Here the
reference is the pixels before they were encoded, box-averaged.
"""

import argparse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from common import report
from numpy.typing import NDArray

from xmag import Encoder, Slide, find_tissue, load_model, plan_tiles
from xmag.geometry import Resample
from xmag.slide.codecs import box_average
from xmag.slide.pixels import read_level, resample

Tiles = NDArray[np.uint8]
Embeddings = NDArray[np.float32]

JPEG_QUALITIES = (75, 90)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("slides", type=Path, nargs="+", metavar="SLIDE")
    parser.add_argument("--model", default="xmag-mini")
    parser.add_argument("--tiles", type=int, default=256, help="of each slide, at most")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--jpeg-json", type=Path, help="of the second table")
    args = parser.parse_args()
    exact, half = (
        load_model(args.model, device=args.device, dtype=dtype) for dtype in ("float32", "bfloat16")
    )
    rows, jpeg_rows = [], []
    for path in args.slides:
        with Slide(path) as slide:
            mpp = nominal_mpp(slide, exact)
        with Slide(path, mpp=mpp) as slide:
            field = choose_field(slide, exact, args.tiles)
            for level, reduction in scaled_decodings(slide, exact):
                where = {"slide": path.stem, "level": f"{slide.level_downsamples[level] * mpp:g}"}
                for errors in level_errors(field, level, reduction, exact, half):
                    rows.append(where | {"tiles": len(field.coords)} | errors)
            for reduction in (2, 4):
                for quality in JPEG_QUALITIES:
                    jpeg_rows += [
                        {"slide": path.stem} | errors
                        for errors in jpeg_errors(field, reduction, quality, exact)
                    ]
    report("fidelity", rows, args.json, model=dict(exact.provenance))
    report("to the pixels before JPEG 4:2:0", jpeg_rows, args.jpeg_json)


def nominal_mpp(slide: Slide, encoder: Encoder) -> float:
    """The µm/px of level 0 of which the model's is a power of two, nearest to the slide's own.

    All ways then read the same footprint, and differ in nothing else.
    """
    wanted = encoder.tile_spec.mpp
    return float(wanted / 2 ** round(np.log2(wanted / (slide.mpp or 0.25))))


def scaled_decodings(slide: Slide, encoder: Encoder) -> Iterator[tuple[int, int]]:
    """Each (level, reduction above 1) whose decoded pixels are at the model's µm/px."""
    for level, shape in enumerate(slide.reader.levels):
        for reduction in shape.reductions:
            mpp = (slide.mpp or 0) * shape.downsample * reduction
            if reduction > 1 and np.isclose(mpp, encoder.tile_spec.mpp, rtol=1e-3):
                yield level, reduction


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """Neighbouring tiles of a slide: level-0 corners (N, 2), level-0 side, output px."""

    slide: Slide
    coords: NDArray[np.int64]
    side: int
    size_px: int

    def read(self, level: int, reduction: int, kernel: Resample, finer: int = 1) -> Tiles:
        """The tiles from a level decoded at 1/`reduction`, uint8 (N, S, S, 3).

        With `finer` they have so many times the px, for the same field.
        """
        size = (finer * self.size_px, finer * self.size_px)
        reader, shape = self.slide.reader, self.slide.reader.levels[level]
        per_px = shape.downsample * reduction
        # Lanczos reaches three output px beyond the tile.
        reach = 3 * self.side / per_px / size[0] + 1

        def tile(corner: NDArray[np.int64]) -> Tiles:
            x0, y0, x1, y1 = np.concatenate([corner, corner + self.side]) / per_px
            x, y = (max(0, int(edge - reach)) for edge in (x0, y0))
            across, down = shape.decoded_size(reduction)
            width, height = min(int(x1 + reach) + 1, across) - x, min(int(y1 + reach) + 1, down) - y
            window = read_level(reader, level, reduction, (x, y), (width, height))
            return resample(window, (x0 - x, y0 - y, x1 - x, y1 - y), size, kernel)

        with ThreadPoolExecutor(2) as pool:
            return np.stack(list(pool.map(tile, self.coords)))

    def neighbour_distance(self, embeddings: Embeddings) -> float:
        """The median distance between the embeddings of tiles that share an edge."""
        number = {(x, y): i for i, (x, y) in enumerate(self.coords.tolist())}
        pairs = [
            (i, number[other])
            for (x, y), i in number.items()
            for other in ((x + self.side, y), (x, y + self.side))
            if other in number
        ]
        one, two = np.array(pairs).T
        return float(np.median(np.linalg.norm(embeddings[one] - embeddings[two], axis=1)))


def choose_field(slide: Slide, encoder: Encoder, count: int) -> Field:
    """At most `count` tiles in the middle of the tissue; overlapping by 7/8 where they are few."""
    tissue, spec = find_tissue(slide), encoder.tile_spec
    plan = plan_tiles(slide, spec, tissue=tissue, min_tissue=0.5)
    if len(plan) < count:
        plan = plan_tiles(slide, spec, tissue=tissue, min_tissue=0.5, overlap=spec.size_px * 7 // 8)
    away = np.abs(plan.coords - np.median(plan.coords, axis=0)).max(axis=1)
    nearest = np.sort(np.argsort(away, kind="stable")[:count])
    return Field(
        slide=slide,
        coords=plan.coords[nearest],
        side=plan.tiles.size_level0,
        size_px=spec.size_px,
    )


def level_errors(
    field: Field, level: int, reduction: int, exact: Encoder, half: Encoder
) -> Iterator[dict[str, Any]]:
    """The errors of scaled decoding, Lanczos and bfloat16 on one level."""
    full = field.read(level, 1, "area")
    reference = embed(exact, full)
    between = field.neighbour_distance(reference)
    ways = (
        (f"decoded at 1/{reduction}", exact, field.read(level, reduction, "area")),
        (f"Lanczos, 1/{reduction}", exact, field.read(level, 1, "lanczos")),
        ("bfloat16", half, full),
    )
    for way, encoder, tiles in ways:
        error = np.linalg.norm(embed(encoder, tiles) - reference, axis=1) / between
        yield {
            "way": way,
            "grey levels": float(np.abs(tiles.astype(int) - full).mean()),
            "median %": 100 * float(np.median(error)),
            "95th %": 100 * float(np.percentile(error, 95)),
        }


def jpeg_errors(
    field: Field, reduction: int, quality: int, exact: Encoder
) -> Iterator[dict[str, Any]]:
    """The errors of full and of scaled decoding, against the pixels that a JPEG was made of."""
    finer = field.read(0, 1, "area", reduction)
    streams = [
        simplejpeg.encode_jpeg(tile, quality=quality, colorsubsampling="420") for tile in finer
    ]
    size = {"min_width": field.size_px, "min_height": field.size_px}
    original = np.stack([box_average(tile, reduction) for tile in finer])
    ways = {
        "in full, box-averaged": [
            box_average(simplejpeg.decode_jpeg(s), reduction) for s in streams
        ],
        f"at 1/{reduction}": [
            simplejpeg.decode_jpeg(s, min_factor=reduction, **size) for s in streams
        ],
    }
    reference = embed(exact, original)
    between = field.neighbour_distance(reference)
    for way, decoded in ways.items():
        tiles = np.stack(decoded)
        error = np.linalg.norm(embed(exact, tiles) - reference, axis=1) / between
        yield {
            "quality": quality,
            "decoded": way,
            "mean shift": float((tiles.astype(int) - original).mean()),
            "median %": 100 * float(np.median(error)),
            "95th %": 100 * float(np.percentile(error, 95)),
        }


def embed(encoder: Encoder, tiles: Tiles, batch_size: int = 64) -> Embeddings:
    """The embeddings of tiles, float32 (N, D)."""
    parts = [tiles[i : i + batch_size] for i in range(0, len(tiles), batch_size)]
    return np.concatenate([encoder.embed(part).cpu().numpy() for part in parts])


if __name__ == "__main__":
    main()
