"""Slides with known tissue: stained texture on a shaded, noisy, JPEG-compressed glass background.

Canvases are 8 µm/px. Texture is optical density (natural log, per channel) that multiplies the
light of the glass, as stain does; ink multiplies it too. Real texture comes from the images beside
the repository, with other patients in the "tuning" than in the "held-out" cases.
"""

import io
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage
from support.fake_reader import FakeTileReader

from xmag.slide import Slide
from xmag.slide.reader import Pixels

SHARED = Path(__file__).parents[3] / "shared"
MPP = 8.0
MASK_PX = 4
"""Canvas px per mask px: 32 µm."""

Field = NDArray[np.float32]
Bools = NDArray[np.bool_]
Texture = Callable[[np.random.Generator, tuple[int, int]], Field]

HAEMATOXYLIN = np.array([0.65, 0.70, 0.29], np.float32)
EOSIN = np.array([0.07, 0.99, 0.11], np.float32)
DAB = np.array([0.27, 0.57, 0.78], np.float32)
"""Stain vectors of Ruifrok and Johnston, 2001."""
HAEMATOXYLINS = {"tuning": HAEMATOXYLIN, "held-out": np.array([0.72, 0.63, 0.28], np.float32)}
"""The held-out one is bluer, as counterstains often are."""

INKS = {
    "tuning": {"blue": (40, 80, 175), "green": (30, 135, 85), "red": (205, 40, 55)},
    "held-out": {"blue": (60, 120, 190), "green": (55, 120, 60), "red": (190, 30, 40)},
}
BLACK_INK = (38, 36, 42)

_IMAGES = {
    ("tuning", "he"): [
        "Non-Viable-Tumor___Case-3-A17-18676-13247_116",
        "Non-Viable-Tumor___Case-3-A17-26576-11618_103",
        "Non-Viable-Tumor___Case-3-A8-27422-14386_120",
        "Non-Viable-Tumor___Case-4-C24-16355-22492_115",
        "Viable___Case-4-C27-32431-19828_114",
        "Viable___Case-4-C28-27016-13463_105",
        "Non-Tumor___Case-4-C22-42649-20389_117",
    ],
    ("held-out", "he"): [
        "Non-Tumor___Case-48-P5-C20-44108-28521_119",
        "Non-Tumor___P9-B12-30770-23009_108",
        "Non-Tumor___P9-B7-22066-28200_115",
        "Viable___Case-48-P5-C14-54171-23668_115",
        "Viable___Case-48-P5-C20-33672-6381_119",
        "Viable___Case-48-P5-C23-54011-19464_110",
        "Viable___Case-48-P5-C22-46689-25261_112",
    ],
    ("tuning", "fat"): ["Non-Tumor___Case-3-A18-11012-16647_113"],
    ("held-out", "fat"): ["Non-Tumor___P9-B28-22141-15533_111"],
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """Pixels at 8 µm/px with what is true of them at 32 µm/px."""

    name: str
    half: str
    pixels: Pixels
    truth: Bools
    ink: Bools

    @property
    def overview(self) -> Pixels:
        """The pixels at 32 µm/px."""
        return np.asarray(Image.fromarray(self.pixels).reduce(MASK_PX))

    def slide(self) -> Slide:
        """The case as a slide of 8 µm/px."""
        return Slide.from_reader(FakeTileReader(self.pixels, mpp=MPP), name=self.name)


def generated_texture(rng: np.random.Generator, shape: tuple[int, int]) -> Field:
    """H&E-like density: eosin that varies over 100 µm, haematoxylin in specks."""
    eosin = 0.35 + 0.2 * _smooth_noise(rng, shape, 12) + 0.1 * _smooth_noise(rng, shape, 2)
    nuclei = np.clip(0.35 + 0.5 * _smooth_noise(rng, shape, 1), 0, None)
    density = eosin[..., None] * EOSIN + nuclei[..., None] * HAEMATOXYLIN
    return np.clip(density, 0, None).astype(np.float32)


def generated_fat(rng: np.random.Generator, shape: tuple[int, int]) -> Field:
    """Density of fatty marrow: membranes about 6 µm thick around clear cells 110 µm wide, and cells
    of the marrow in clumps between them."""
    pitch = 110 / MPP
    corners = np.mgrid[0 : shape[0] : pitch, 0 : shape[1] : pitch].reshape(2, -1).T
    points = corners + rng.uniform(-0.4, 0.4, corners.shape) * pitch + pitch / 2
    points = np.clip(points, 0, (shape[0] - 1, shape[1] - 1)).astype(int)
    seeds = np.zeros(shape, np.int32)
    seeds[tuple(points.T)] = np.arange(1, len(points) + 1)
    nearest = ndimage.distance_transform_edt(
        seeds == 0, return_distances=False, return_indices=True
    )
    cells = seeds[tuple(nearest)]
    membranes = ndimage.maximum_filter(cells, 2) != ndimage.minimum_filter(cells, 2)
    clumps = membranes & (_smooth_noise(rng, shape, 6) > 1)
    amount = 0.3 * membranes + 1.2 * ndimage.binary_dilation(clumps)
    return (amount[..., None] * (0.6 * EOSIN + 0.3 * HAEMATOXYLIN)).astype(np.float32)


def real_texture(half: str, kind: str) -> Texture:
    """Density of the osteosarcoma images of one half, as a mosaic of flipped and turned images."""
    patches = [
        _density_of(SHARED / "images/osteosarcoma" / f"{name}.jpg", round(MPP / 0.5))
        for name in _IMAGES[half, kind]
    ]
    return mosaic(patches)


def cmu_texture() -> Texture:
    """Density of dermis and epidermis cut from the CMU slide."""
    import openslide

    with openslide.OpenSlide(SHARED / "slides/cmu-1-small-region.svs") as slide:
        crops = [slide.read_region(xy, 0, (400, 560)) for xy in ((900, 1500), (740, 2380))]
    return mosaic([_density(np.asarray(c.convert("RGB").reduce(16))) for c in crops])


def mosaic(patches: Sequence[Field]) -> Texture:
    """A texture that lays the patches side by side, in random order and orientation."""

    def texture(rng: np.random.Generator, shape: tuple[int, int]) -> Field:
        side = min(min(p.shape[:2]) for p in patches)
        canvas = np.zeros((shape[0] + side, shape[1] + side, 3), np.float32)
        for y in range(0, shape[0], side):
            for x in range(0, shape[1], side):
                patch = patches[rng.integers(len(patches))][:side, :side]
                canvas[y : y + side, x : x + side] = np.rot90(
                    patch[:, :: rng.choice((1, -1))], rng.integers(4)
                )
        return canvas[: shape[0], : shape[1]]

    return texture


def scaled(texture: Texture, factor: float) -> Texture:
    """The texture with its density multiplied: pale staining."""
    return lambda rng, shape: factor * texture(rng, shape)


def restained(texture: Texture, stain: NDArray[np.float32], strength: float) -> Texture:
    """The texture's structure in another stain, over a weak haematoxylin counterstain."""

    def restain(rng: np.random.Generator, shape: tuple[int, int]) -> Field:
        amount = texture(rng, shape).mean(2)
        where = np.clip(0.5 + 0.6 * _smooth_noise(rng, shape, 20), 0, 1)
        colour = where[..., None] * stain + 0.4 * (1 - where[..., None]) * HAEMATOXYLIN
        return (strength * amount[..., None] * colour / 0.55).astype(np.float32)

    return restain


def blobs(
    rng: np.random.Generator, shape: tuple[int, int], count: int, radius_um: tuple[float, float]
) -> Field:
    """Coverage in [0, 1] of ragged, elongated pieces with edges about 30 µm wide."""
    coverage = np.zeros(shape, np.float32)
    yy, xx = np.mgrid[: shape[0], : shape[1]].astype(np.float32)
    for _ in range(count):
        long_px = rng.uniform(*radius_um) / MPP
        short_px = long_px * rng.uniform(0.4, 0.9)
        cy, cx = (rng.uniform(min(long_px, s / 2), max(s - long_px, s / 2)) for s in shape)
        turn = rng.uniform(0, np.pi)
        u = (xx - cx) * np.cos(turn) + (yy - cy) * np.sin(turn)
        v = (yy - cy) * np.cos(turn) - (xx - cx) * np.sin(turn)
        angle = np.arctan2(v / short_px, u / long_px)
        ragged = 1 + sum(
            rng.normal(0, 0.25 / n) * np.cos(n * angle + rng.uniform(0, 2 * np.pi))
            for n in range(2, 9)
        )
        margin_px = (ragged - np.hypot(u / long_px, v / short_px)) * short_px
        coverage = np.maximum(coverage, np.clip(0.5 + margin_px / (30 / MPP), 0, 1))
    return coverage


def stroke(
    shape: tuple[int, int], points_um: Sequence[tuple[float, float]], width_um: float
) -> Field:
    """Coverage in [0, 1] of a marker stroke along (x, y) points, with edges 60 µm wide."""
    yy, xx = np.mgrid[: shape[0], : shape[1]].astype(np.float32) * MPP
    distance = np.full(shape, np.inf, np.float32)
    for (x0, y0), (x1, y1) in itertools.pairwise(points_um):
        length2 = (x1 - x0) ** 2 + (y1 - y0) ** 2
        along = np.clip(((xx - x0) * (x1 - x0) + (yy - y0) * (y1 - y0)) / length2, 0, 1)
        nearest = np.hypot(xx - x0 - along * (x1 - x0), yy - y0 - along * (y1 - y0))
        distance = np.minimum(distance, nearest)
    return np.clip(0.5 + (width_um / 2 - distance) / 60, 0, 1).astype(np.float32)


@dataclass(kw_only=True)
class Scene:
    """A slide in the making: light falls through glass, tissue and ink; then the camera."""

    rng: np.random.Generator
    shape: tuple[int, int] = (800, 1000)
    glass: tuple[float, float, float] = (243, 242, 243)
    shading: float = 0.06
    noise: float = 3.0
    dust: int = 0
    quality: int = 75

    def __post_init__(self) -> None:
        self.density = np.zeros((*self.shape, 3), np.float32)
        self.coverage = np.zeros(self.shape, np.float32)
        self.ink = np.zeros(self.shape, np.float32)
        self.padding = np.zeros(self.shape, np.int16)

    def add_tissue(self, texture: Texture, coverage: Field) -> None:
        """Lay tissue of this texture where `coverage` says."""
        light = 1 - coverage[..., None] * (1 - np.exp(-texture(self.rng, self.shape)))
        self.density -= np.log(light)
        self.coverage = np.maximum(self.coverage, coverage)

    def add_ink(self, colour: tuple[int, int, int], coverage: Field) -> None:
        """Draw over what is there; the ink is a little streaky."""
        streaks = np.clip(0.93 + 0.07 * _smooth_noise(self.rng, self.shape, 4), 0, 1)
        light = 1 - (coverage * streaks)[..., None] * (1 - np.maximum(colour, 1) / 255)
        self.density -= np.log(light).astype(np.float32)
        self.ink = np.maximum(self.ink, coverage)

    def add_border(self, px: int, value: int, sides: str) -> None:
        """Cover `px` on the sides named (of "nesw") with a constant: a border, or padding."""
        spans = {"n": np.s_[:px], "s": np.s_[-px:], "w": np.s_[:, :px], "e": np.s_[:, -px:]}
        for side in sides:
            self.padding[spans[side]] = value + 1

    def finish(self, name: str, half: str) -> Case:
        """The slide as the scanner stores it, and the truth about it."""
        yy, xx = (
            g / (s - 1)
            for g, s in zip(np.mgrid[: self.shape[0], : self.shape[1]], self.shape, strict=True)
        )
        tilt = self.rng.uniform(0, 2 * np.pi)
        shade = 1 - self.shading * (
            0.5 * (1 + np.cos(tilt) * (2 * xx - 1) / 1.5 + np.sin(tilt) * (2 * yy - 1) / 1.5)
            + 0.5 * ((2 * xx - 1) ** 2 + (2 * yy - 1) ** 2) / 2
        )
        light = np.array(self.glass) * shade[..., None] * np.exp(-self.density)
        light *= self._dust()[..., None]
        light += self.rng.normal(0, self.noise, light.shape)
        padded = self.padding > 0
        light[padded] = (self.padding[padded] - 1)[:, None]
        pixels = _through_jpeg(np.clip(light, 0, 255).astype(np.uint8), self.quality)
        pixels[self.padding == 256] = 255
        ink = _block_mean(self.ink) >= 0.5
        tissue = _block_mean(np.where(padded, 0, self.coverage)) >= 0.5
        return Case(name=name, half=half, pixels=pixels, truth=tissue & ~ink, ink=ink)

    def _dust(self) -> Field:
        light = np.ones(self.shape, np.float32)
        yy, xx = np.mgrid[: self.shape[0], : self.shape[1]]
        for _ in range(self.dust):
            cy, cx = self.rng.uniform(0, self.shape[0]), self.rng.uniform(0, self.shape[1])
            radius = self.rng.uniform(10, 60) / MPP
            spot = np.clip(radius - np.hypot(yy - cy, xx - cx), 0, 1)
            light *= 1 - spot.astype(np.float32) * self.rng.uniform(0.2, 0.8)
        return light


def truth_cases(half: str, he: Texture, fat: Texture) -> Iterator[Case]:
    """Slides with tissue of every kind; each differs between the halves in all that is random."""
    seed = {"tuning": 1000, "held-out": 2000}[half]
    big, small = (900, 1800), (500, 900)

    def scene(number: int, **options: object) -> Scene:
        return Scene(rng=np.random.default_rng(seed + number), **options)  # type: ignore[arg-type]

    s = scene(1)
    s.add_tissue(he, blobs(s.rng, s.shape, 3, big))
    yield s.finish("H&E", half)
    s = scene(2, glass=(240, 232, 237), shading=0.15, dust=40, noise=5)
    s.add_tissue(he, blobs(s.rng, s.shape, 3, big))
    yield s.finish("H&E, dust, tinted and shaded glass", half)
    s = scene(3, shading=0.1)
    s.add_tissue(scaled(he, 0.3), blobs(s.rng, s.shape, 3, big))
    yield s.finish("pale H&E", half)
    s = scene(4)
    cover = blobs(s.rng, s.shape, 3, big)
    for part, factor in ((slice(0, 500), 1.3), (slice(500, None), 0.25)):
        only = np.zeros_like(cover)
        only[:, part] = cover[:, part]
        s.add_tissue(scaled(he, factor), only)
    yield s.finish("dark beside pale H&E", half)
    s = scene(5, dust=15)
    s.add_tissue(he, blobs(s.rng, s.shape, 8, (250, 500)))
    yield s.finish("biopsy fragments", half)
    s = scene(6)
    s.add_tissue(restained(he, DAB, 1.0), blobs(s.rng, s.shape, 3, big))
    yield s.finish("DAB and haematoxylin", half)
    s = scene(9)
    s.add_tissue(restained(he, DAB, 2.2), blobs(s.rng, s.shape, 3, big))
    yield s.finish("dark DAB and haematoxylin", half)
    s = scene(7, shading=0.08)
    s.add_tissue(restained(he, 0.4 * HAEMATOXYLINS[half], 0.8), blobs(s.rng, s.shape, 3, big))
    yield s.finish("pale haematoxylin only", half)
    s = scene(8)
    s.add_tissue(fat, blobs(s.rng, s.shape, 2, big))
    yield s.finish("fat", half)
    s = scene(30)
    s.add_tissue(generated_fat, blobs(s.rng, s.shape, 2, big))
    yield s.finish("fatty marrow, generated", half)
    for number, (name, colour) in enumerate({**INKS[half], "black": BLACK_INK}.items(), 10):
        s = scene(number)
        cover = blobs(s.rng, s.shape, 2, small)
        s.add_tissue(he, cover)
        for line in _strokes_beside(s.rng, cover):
            s.add_ink(colour, stroke(s.shape, line, s.rng.uniform(500, 900)))
        yield s.finish(f"{name} pen", half)
    s = scene(20)
    s.add_tissue(he, blobs(s.rng, s.shape, 3, big))
    s.add_border(60, 4, "nw")
    s.add_border(100, 255, "es")
    yield s.finish("black border, white padding", half)
    s = scene(21)
    cover = blobs(s.rng, s.shape, 2, big)
    cover[:, :400] = 1
    s.add_tissue(he, cover)
    yield s.finish("tissue up to the edge", half)
    s = scene(22, shape=(256, 256))
    s.add_tissue(he, np.ones(s.shape, np.float32))
    yield s.finish("nothing but tissue", half)
    s = scene(23, shape=(256, 256))
    s.add_tissue(scaled(he, 0.4), np.ones(s.shape, np.float32))
    yield s.finish("nothing but pale tissue", half)


def empty_cases(half: str) -> Iterator[Case]:
    """Slides without any tissue."""
    seed = {"tuning": 3000, "held-out": 4000}[half]

    def scene(number: int, **options: object) -> Scene:
        return Scene(rng=np.random.default_rng(seed + number), **options)  # type: ignore[arg-type]

    yield scene(1, shading=0, noise=0).finish("blank", half)
    yield scene(2, noise=10, quality=40).finish("noisy white", half)
    yield scene(3, noise=6, dust=60, shading=0.2, glass=(235, 228, 232)).finish(
        "dusty, shaded", half
    )
    s = scene(4)
    s.add_border(800, 255, "n")
    yield s.finish("white padding only", half)
    s = scene(5)
    s.add_border(80, 3, "nesw")
    yield s.finish("black border, no tissue", half)
    for number, (name, colour) in enumerate({**INKS[half], "black": BLACK_INK}.items(), 10):
        s = scene(number)
        s.add_ink(colour, stroke(s.shape, [(900, 900), (5000, 1500), (6500, 5200)], 700))
        yield s.finish(f"{name} pen, no tissue", half)


def iou(a: Bools, b: Bools) -> float:
    """Intersection over union; 1 for two empty masks."""
    union = np.count_nonzero(a | b)
    return np.count_nonzero(a & b) / union if union else 1.0


def otsu(pixels: Pixels, *, saturation: bool = False) -> Bools:
    """Tissue by Otsu's threshold (1979) on grey, or on HSV saturation."""
    mode, sign = ("HSV", 1) if saturation else ("L", -1)
    values = np.asarray(Image.fromarray(pixels).convert(mode)).astype(int)
    values = values[..., 1] if saturation else values
    counts = np.bincount(values.ravel(), minlength=256).astype(float)
    below, mean = np.cumsum(counts), np.cumsum(counts * np.arange(256))
    above = below[-1] - below
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (mean / below - (mean[-1] - mean) / above) ** 2
    threshold = int(np.nanargmax(np.where((below > 0) & (above > 0), between, -1)))
    return values > threshold if sign > 0 else values <= threshold


def shared_cases(half: str) -> list[Case]:
    """All slides of one half with real texture; the held-out half has the CMU slide's as well."""
    cases = list(truth_cases(half, real_texture(half, "he"), real_texture(half, "fat")))
    if half == "held-out":
        scene = Scene(rng=np.random.default_rng(2040), shading=0.1, dust=20)
        scene.add_tissue(cmu_texture(), blobs(scene.rng, scene.shape, 3, (900, 1800)))
        cases.append(scene.finish("H&E of another scanner", half))
    return [*cases, *empty_cases(half)]


def drawn_by_hand(name: str, shape: tuple[int, int], downsample: float) -> Bools:
    """The tissue of a real slide as outlined by eye, as a mask of this shape and scale."""
    rings = json.loads((Path(__file__).parents[1] / "data" / f"tissue-{name}.json").read_text())
    height, width = (round(s * downsample) for s in shape)
    canvas = Image.new("L", (width, height))
    for kind, value in (("tissue", 255), ("glass", 0)):
        for ring in rings[kind]:
            ImageDraw.Draw(canvas).polygon([tuple(corner) for corner in ring], fill=value)
    covered = canvas.resize(shape[::-1], Image.Resampling.BOX)
    return np.asarray(covered) >= 128


def _strokes_beside(rng: np.random.Generator, coverage: Field) -> list[list[tuple[float, float]]]:
    """One stroke over glass along the top, one whose edge runs along the tissue."""
    rows, columns = np.nonzero(coverage > 0.5)
    left, top, bottom = columns.min() * MPP, rows.min() * MPP, rows.max() * MPP
    glass = [(800.0, 500.0), (4000.0, 350.0), (7000.0, 600.0)]
    beside = [(left - 150, top), (left - 200, (top + bottom) / 2), (left - 150, bottom)]
    jitter = rng.uniform(-60, 60, (3, 2))
    return [glass, [(x + a, y + b) for (x, y), (a, b) in zip(beside, jitter, strict=True)]]


def _density_of(path: Path, reduction: int) -> Field:
    with Image.open(path) as image:
        return _density(np.asarray(image.convert("RGB").reduce(reduction)))


def _density(pixels: Pixels) -> Field:
    """Optical density over the glass of these scans, which is grey 243."""
    return np.clip(-np.log(np.maximum(pixels, 1) / 243), 0, None).astype(np.float32)


def _smooth_noise(rng: np.random.Generator, shape: tuple[int, int], sigma: float) -> Field:
    """Gaussian noise of unit variance with structure about `sigma` px wide."""
    noise = ndimage.gaussian_filter(rng.normal(size=shape), sigma)
    return (noise / noise.std()).astype(np.float32)


def _block_mean(values: Field) -> Field:
    height, width = (s // MASK_PX for s in values.shape)
    cut = values[: height * MASK_PX, : width * MASK_PX]
    return cut.reshape(height, MASK_PX, width, MASK_PX).mean((1, 3))


def _through_jpeg(pixels: Pixels, quality: int) -> Pixels:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return np.array(Image.open(buffer))
