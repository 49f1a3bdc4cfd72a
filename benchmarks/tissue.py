"""Tissue on slides with known truth: `find_tissue` against Otsu, pens, and the time it takes.

    python benchmarks/tissue.py
    python benchmarks/tissue.py --picture docs/images/tissue-generated.png

Needs the folder of real data, ../shared, beside the repository; without it there is nothing to
measure. Thresholds were tuned on the "tuning" half; the "held-out" half has other patients, shapes,
inks and another haematoxylin.
"""

import statistics
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support.tissue_cases import (
    BLACK_INK,
    INKS,
    SHARED,
    Case,
    Scene,
    blobs,
    drawn_by_hand,
    generated_fat,
    iou,
    otsu,
    real_texture,
    scaled,
    shared_cases,
    stroke,
)

from xmag.draw import overlay
from xmag.slide import Slide
from xmag.slide.reader import Pixels
from xmag.tissue import find_tissue

REAL_SLIDES = {"cmu-1-small-region": None, "tcga-cr-7395-01a-01-ts1": 0.5}


def main() -> None:
    if not SHARED.is_dir():
        print(f"skipped: there is no {SHARED.name} folder beside the repository")
        return
    if sys.argv[1:2] == ["--picture"]:
        draw_picture(Path(sys.argv[2]))
        return
    for half in ("tuning", "held-out"):
        cases = shared_cases(half)
        print(f"\n{half} half: IoU\n")
        print("| case | xmag | Otsu, grey | Otsu, saturation | tissue kept | pen left out |")
        print("|---|---|---|---|---|---|")
        for case in cases:
            if case.truth.any():
                print(truth_row(case))
        empty = [case for case in cases if not case.truth.any()]
        wrong = [case.name for case in empty if find_tissue(case.slide()).mask.any()]
        print(f"\nSlides without tissue: {len(empty)}; with a mask that is not empty: {wrong or 0}")
    print("\nReal slides, against outlines drawn by hand\n")
    print("| slide | xmag | Otsu, grey | Otsu, saturation | tissue kept |\n|---|---|---|---|---|")
    for name, mpp in REAL_SLIDES.items():
        print(real_row(name, mpp))
    print_times()


def draw_picture(path: Path) -> None:
    """The picture of the docs: much of what is hard, on one slide."""
    scene = Scene(rng=np.random.default_rng(7), glass=(240, 232, 237), shading=0.12, dust=25)
    piece = blobs(scene.rng, (480, 1000), 2, (1500, 2000))
    cover = np.pad(piece, ((40, 280), (0, 0)))
    he = real_texture("held-out", "he")
    for columns, factor in ((np.s_[:, :500], 1.2), (np.s_[:, 500:], 0.3)):
        half = np.zeros_like(cover)
        half[columns] = cover[columns]
        scene.add_tissue(scaled(he, factor), half)
    fat = blobs(scene.rng, (200, 400), 1, (900, 1100))
    scene.add_tissue(generated_fat, np.pad(fat, ((380, 220), (540, 60))))
    for place, colour in enumerate([*INKS["held-out"].values(), BLACK_INK]):
        x, y = 700.0 + 1850 * place, 5300.0
        line = [(x, y), (x + 600, y + 450), (x + 1200, y + 50)]
        scene.add_ink(colour, stroke(scene.shape, line, 300))
    scene.add_border(40, 4, "w")
    scene.add_border(40, 255, "n")
    with scene.finish("generated", "held-out").slide() as slide:
        overlay(slide, tissue=find_tissue(slide), max_px=800).save(path, optimize=True)


def truth_row(case: Case) -> str:
    mask = find_tissue(case.slide()).mask
    pen = f"{1 - mask[case.ink].mean():.1%}" if case.ink.any() else ""
    scores = ious(mask, case.overview, case.truth)
    return f"| {case.name} | {scores} | {mask[case.truth].mean():.1%} | {pen} |"


def real_row(name: str, mpp: float | None) -> str:
    with Slide(SHARED / "slides" / f"{name}.svs", mpp=mpp) as slide:
        tissue = find_tissue(slide)
        height, width = tissue.mask.shape
        overview = slide.read_region((0, 0), (width, height), mpp=tissue.mpp)
    drawn = drawn_by_hand(name, tissue.mask.shape, tissue.downsample)
    return f"| {name} | {ious(tissue.mask, overview, drawn)} | {tissue.mask[drawn].mean():.1%} |"


def ious(mask: np.ndarray, overview: Pixels, truth: np.ndarray) -> str:
    others = (otsu(overview), otsu(overview, saturation=True))
    return " | ".join(f"{iou(found, truth):.3f}" for found in (mask, *others))


class Overview:
    """Pixels of 32 µm that cost nothing to read, so that what is timed is the method."""

    name, mpp = "overview", 32.0

    def __init__(self, pixels: Pixels) -> None:
        self.pixels = pixels
        self.dimensions = pixels.shape[1], pixels.shape[0]

    def read_region(self, *_: tuple[int, int], **__: float) -> Pixels:
        return self.pixels


def print_times() -> None:
    pixels = np.tile(shared_cases("tuning")[0].overview, (4, 4, 1))[:650, :800]
    for factor in (1, 2):
        overview = Overview(np.tile(pixels, (factor, factor, 1)))
        seconds, outline = [], []
        for _ in range(9):
            start = time.process_time()
            tissue = find_tissue(overview)  # type: ignore[arg-type]
            seconds.append(time.process_time() - start)
            tissue.to_geojson()
            outline.append(time.process_time() - start - seconds[-1])
        height, width = tissue.mask.shape
        print(
            f"\n{width}x{height} px: {statistics.median(seconds) * 1000:.0f} ms,"
            f" to_geojson {statistics.median(outline) * 1000:.0f} ms"
            " (CPU time, medians of 9; without reading the pixels)"
        )


if __name__ == "__main__":
    main()
