"""Training fields of the miniature: tissue of four sources, as regions that xmag.distill reads.

    python benchmarks/miniature_fields.py IMAGES FIELDS [--pieces PIECES] [--share 1.0]

IMAGES holds the folders her2st, brecahad, oscc and hgsc. PIECES gets their tissue, glass taken
out, at no more detail than the teacher sees; where it is there already, IMAGES is not read. FIELDS
gets a folder of JPEGs of 896 px for each source, which are at 0.5 µm/px as far as the teacher is
concerned, and fields.json, which says where each was taken. Sources whose images are smaller than
448 µm give sheets: four fields of 448 px, whose seams lie between tiles of the teacher. Each field
is stained otherwise, by factors of its optical density, before any teacher sees it.
"""

import argparse
import json
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from xmag.distill.views import HIGH_MPP, REGION_PX

FIELD_PX = REGION_PX // 2
_BLOCK = 64
"""Px of a block of the tissue mask."""
_BLANK = 253
"""Grey level of a block that was made white."""
_LEAST_TISSUE = 0.93
_FINEST_MPP = 0.4
_QUALITY, _QUALITY_OF_SECTIONS = 82, 58
"""Of WebP; the sections are hard-compressed JPEGs, in which there is no more to keep."""
_STAIN, _DENSITY = 0.25, 0.15
"""Largest relative change of the optical density of each channel, and of all three alike."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Source of fields: its µm/px, the number of regions, and the µm/px that fields are taken at.

    A px of a field is `low` to `high` µm: 0.5 is what is meant, and it varies on purpose, since
    scales are guessed. `sheets` are four fields in a region, for images too small for a whole one.
    """

    mpp: float
    regions: int
    low: float
    high: float
    sheets: bool = False
    sections: bool = False


SOURCES = {
    # From the 200 µm between printed spots.
    "her2st": Source(mpp=0.686, regions=5200, low=0.43, high=0.58, sections=True),
    # By nuclei; images of 205 µm, of which a field of 448 px takes nearly all at 0.457 µm/px.
    "brecahad": Source(mpp=0.2, regions=2400, low=0.40, high=0.457, sheets=True),
    # By nuclei; images of 192 µm.
    "oscc": Source(mpp=0.25, regions=2200, low=0.39, high=0.4285, sheets=True),
    "hgsc": Source(mpp=0.25, regions=1000, low=0.43, high=0.58, sheets=True),
}


@dataclass(frozen=True, slots=True)
class Piece:
    """Tissue of an image: pixels, µm/px, and which blocks of 64 px are tissue."""

    name: str
    pixels: Image.Image
    mpp: float
    tissue: NDArray[np.bool_]

    def share(self, x: int, y: int, side: int) -> float:
        """The share of tissue in a square."""
        x0, y0, x1, y1 = (round(v / _BLOCK) for v in (x, y, x + side, y + side))
        part = self.tissue[y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)]
        return float(part.mean()) if part.size else 0.0


def tissue_blocks(pixels: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Blocks that are dark or textured: tinted glass with faint spots is neither."""
    height, width = (edge // _BLOCK * _BLOCK for edge in pixels.shape[:2])
    grey = pixels[:height:4, :width:4].mean(-1)
    step = _BLOCK // 4
    blocks = grey.reshape(height // _BLOCK, step, width // _BLOCK, step)
    tissue = (blocks.std((1, 3)) > 14) | (blocks.mean((1, 3)) < 170)
    # A block counts where most of those around it do: no dust, no rim, no holes.
    padded = np.pad(tissue.astype(int), 2)
    around = sum(
        padded[y : y + tissue.shape[0], x : x + tissue.shape[1]] for y in range(5) for x in range(5)
    )
    return np.asarray(around >= 8)


def write_pieces(images: Path, pieces: Path) -> None:
    """Write the tissue of all sources: glass white, cropped, at 0.4 µm/px where it is finer."""
    Image.MAX_IMAGE_PIXELS = None  # files that we trust
    for name, source in SOURCES.items():
        (pieces / name).mkdir(parents=True, exist_ok=True)
        for path in sorted((images / name).glob("*.jpg")):
            image = Image.open(path).convert("RGB")
            if source.sections:
                image = _without_glass(np.array(image))
            elif source.mpp < _FINEST_MPP:
                factor = source.mpp / _FINEST_MPP
                size = tuple(round(edge * factor) for edge in image.size)
                image = image.resize(size, Image.Resampling.LANCZOS)
            quality = _QUALITY_OF_SECTIONS if source.sections else _QUALITY
            image.save(pieces / name / f"{path.stem}.webp", quality=quality, method=4)


def _without_glass(pixels: NDArray[np.uint8]) -> Image.Image:
    """A section with all but its tissue white, cropped to it."""
    tissue = tissue_blocks(pixels)
    rows, columns = np.flatnonzero(tissue.any(1)), np.flatnonzero(tissue.any(0))
    box = [edge * _BLOCK for edge in (rows[0], rows[-1] + 1, columns[0], columns[-1] + 1)]
    mask = np.kron(tissue, np.ones((_BLOCK, _BLOCK), bool))
    whole = pixels[: mask.shape[0], : mask.shape[1]].copy()
    whole[~mask] = 255
    return Image.fromarray(whole[box[0] : box[1], box[2] : box[3]])


def read_pieces(pieces: Path, name: str) -> list[Piece]:
    """The pieces of a source, in the order of their names."""
    Image.MAX_IMAGE_PIXELS = None
    source, found = SOURCES[name], []
    for path in sorted((pieces / name).glob("*.webp")):
        image = Image.open(path).convert("RGB")
        pixels = np.asarray(image)
        tissue = np.ones([-(-edge // _BLOCK) for edge in pixels.shape[:2]], bool)
        if source.sections:
            blocks = pixels.reshape(len(tissue), _BLOCK, -1, _BLOCK, 3)
            tissue = blocks.mean((1, 3, 4)) < _BLANK
        found.append(Piece(path.stem, image, max(source.mpp, _FINEST_MPP), tissue))
    return found


def stained(
    pixels: NDArray[np.uint8], rng: np.random.Generator
) -> tuple[NDArray[np.uint8], list[float]]:
    """Pixels with their optical density multiplied, and the factors for R, G and B."""
    *each, common = rng.uniform(-1, 1, 4)
    gains = (1 + _STAIN) ** np.array(each) * (1 + _DENSITY) ** common
    light = np.maximum(np.arange(256), 1)[:, None] / 255
    table = np.rint(255 * light**gains).astype(np.uint8)
    return table[pixels, np.arange(3)], [round(float(gain), 3) for gain in gains]


def drawn(
    pieces: Sequence[Piece], source: Source, side_px: int, rng: np.random.Generator
) -> tuple[NDArray[np.uint8], dict[str, Any]]:
    """A random square of tissue, `side_px` wide, turned and stained; and where it was taken."""
    while True:
        weights = np.array([piece.tissue.sum() for piece in pieces], float)
        piece = pieces[int(rng.choice(len(pieces), p=weights / weights.sum()))]
        mpp = float(rng.uniform(source.low, source.high))
        side = side_px * mpp / piece.mpp
        room = [edge - side for edge in piece.pixels.size]
        if min(room) < 0:
            continue
        x, y = (float(rng.uniform(0, edge)) for edge in room)
        if piece.share(int(x), int(y), int(side)) >= _LEAST_TISSUE:
            break
    box = (x, y, x + side, y + side)
    field = piece.pixels.resize((side_px, side_px), Image.Resampling.LANCZOS, box=box)
    turned = np.rot90(np.asarray(field), int(rng.integers(4)))
    pixels = turned[:, ::-1] if rng.random() < 0.5 else turned
    place = {"image": piece.name, "mpp": round(mpp, 4), "x": round(x), "y": round(y)}
    pixels, place["gains"] = stained(pixels, rng)
    return np.ascontiguousarray(pixels), place


def region(
    pieces: Sequence[Piece], source: Source, rng: np.random.Generator
) -> tuple[NDArray[np.uint8], list[dict[str, Any]]]:
    """A region of 896 px, or a sheet of four fields; and where it was taken."""
    if not source.sheets:
        pixels, place = drawn(pieces, source, REGION_PX, rng)
        return pixels, [place]
    parts = [drawn(pieces, source, FIELD_PX, rng) for _ in range(4)]
    rows = [np.concatenate([parts[at][0], parts[at + 1][0]], axis=1) for at in (0, 2)]
    return np.concatenate(rows), [place for _, place in parts]


_pieces: dict[str, list[Piece]] = {}


def _write_some(
    folder: Path, pieces: Path, name: str, numbers: range
) -> dict[str, list[dict[str, Any]]]:
    """Write some of a source's regions; each is drawn by its own number."""
    if name not in _pieces:
        _pieces[name] = read_pieces(pieces, name)
    places = {}
    for number in numbers:
        rng = np.random.default_rng((18, list(SOURCES).index(name), number))
        pixels, places[f"{name}/{number:04d}"] = region(_pieces[name], SOURCES[name], rng)
        path = folder / name / f"{number:04d}.jpg"
        Image.fromarray(pixels).save(path, quality=95, subsampling=0)
    return places


def write_fields(pieces: Path, folder: Path, *, share: float = 1.0, jobs: int | None = None) -> int:
    """Write the regions of all sources, or a share of them; their number."""
    places: dict[str, Any] = {}
    with ProcessPoolExecutor(jobs) as pool:
        running = []
        for name, source in SOURCES.items():
            (folder / name).mkdir(parents=True, exist_ok=True)
            count = max(4, round(source.regions * share))
            for at in range(0, count, 25):
                part = range(at, min(at + 25, count))
                running.append(pool.submit(_write_some, folder, pieces, name, part))
        for each in running:
            places |= each.result()
    (folder / "fields.json").write_text(json.dumps(places) + "\n")
    return len(places)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("images", type=Path)
    parser.add_argument("fields", type=Path)
    parser.add_argument("--pieces", type=Path)
    parser.add_argument("--share", type=float, default=1.0, help="of the regions, for a trial")
    args = parser.parse_args()
    pieces = args.pieces or args.fields.parent / "pieces"
    if not pieces.is_dir():
        write_pieces(args.images, pieces)
    count = write_fields(pieces, args.fields, share=args.share, jobs=os.cpu_count())
    print(f"{count} regions of {REGION_PX} px, {HIGH_MPP} µm/px as the teacher is told")


if __name__ == "__main__":
    main()
