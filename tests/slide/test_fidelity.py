"""Pixels at 2.0 µm/px, against OpenSlide's pixels averaged over the same footprint."""

from functools import lru_cache

import numpy as np
import pytest
from support.oracle import difference, level_pixels, on_white, openslide
from support.slides import shrunk, write_svs

from xmag.errors import SlideScaleError
from xmag.geometry import TileSpec
from xmag.slide import Slide
from xmag.slide.pixels import read_box, read_level, resample

SIZE = (1400, 1150)


@pytest.fixture(scope="module")
def slide_of(tmp_path_factory):
    """A function from colour and levels to the path of such a slide, and the pixels of its base."""
    folder = tmp_path_factory.mktemp("fidelity")

    @lru_cache
    def written(color: str, levels: tuple[int, ...] = (1,)):
        path = folder / f"{color}-{len(levels)}.svs"
        return path, write_svs(path, color=color, levels=levels, size=SIZE)

    return written


openslide_level = lru_cache(level_pixels)


def averaged(path, level_size, downsample, xy, mpp_ratio, size):
    """OpenSlide's level, averaged over what each of `size` px at `xy` in level-0 px covers."""
    pixels, _ = openslide_level(path, level_size)
    box = [
        v / downsample for v in (*xy, *(c + s * mpp_ratio for c, s in zip(xy, size, strict=True)))
    ]
    height, width = (np.linspace(box[1 - a], box[3 - a], size[1 - a] + 1) for a in (0, 1))

    def integral(edges, values):
        """The integral of px values (first axis) up to each edge."""
        sums = np.concatenate([np.zeros((1, *values.shape[1:])), np.cumsum(values, axis=0)])
        whole = np.minimum(np.floor(edges).astype(int), len(values) - 1)
        part = (edges - whole).reshape(-1, *[1] * (values.ndim - 1))
        return sums[whole] + part * values[whole]

    rows = np.diff(integral(height, pixels.astype(float)), axis=0)
    both = np.diff(integral(width, rows.swapaxes(0, 1)), axis=0).swapaxes(0, 1)
    return both / np.diff(height)[0] / np.diff(width)[0]


@pytest.mark.parametrize("color", ["ycbcr420", "ycbcr422", "rgb444"])
@pytest.mark.parametrize("levels", [(1, 4), (1,)], ids=["pyramid", "base only"])
@pytest.mark.parametrize("mpp", [0.2425, 0.2525, 0.275, 0.499, 0.5026])
def test_scaled_regions_are_openslides_pixels_averaged(slide_of, mpp, levels, color):
    path, _ = slide_of(color, levels)
    with Slide(path, mpp=mpp) as slide:
        scale = slide.scale_for(TileSpec(mpp=2.0, mpp_tolerance=0))
        level, downsample = slide.level_dimensions[scale.level], levels[scale.level]
        for xy in ((0, 0), (333, 222)):
            ratio = 2.0 / mpp
            size = tuple(int((side - at) / ratio) for side, at in zip(SIZE, xy, strict=True))
            found = slide.read_region(xy, size, mpp=2.0)
            expected = averaged(path, level, downsample, xy, ratio, size)
            assert np.abs(found - expected).mean() <= 2


@pytest.mark.parametrize("color", ["ycbcr420", "ycbcr422", "ycbcr444", "rgb444"])
@pytest.mark.parametrize(("mpp", "reduction"), [(0.2425, 8), (0.25, 8), (0.499, 4), (1.0, 2)])
def test_a_level_read_as_it_is_shows_the_footprint_of_its_own_mpp(slide_of, mpp, reduction, color):
    path, _ = slide_of(color)
    with Slide(path, mpp=mpp) as slide:
        scale = slide.scale_for(TileSpec())
        assert (scale.reduction, scale.mpp) == (reduction, pytest.approx(mpp * reduction))
        size = slide.reader.levels[0].decoded_size(reduction)
        found = read_level(slide.reader, 0, reduction, (0, 0), size)
    expected = averaged(path, SIZE, 1, (0, 0), reduction, size)
    assert np.abs(found - expected).mean() <= 1


def error_beside_borders(error, tile: float):
    """(mean error in px beside the border of a source tile, mean error elsewhere)."""
    beside = np.zeros(error.shape[:2], bool)
    for axis in (0, 1):
        px = np.arange(error.shape[axis])
        near = np.isin(px, [round(k * tile) + d for k in range(1, 40) for d in (-1, 0)])
        beside |= near[:, None] if axis == 0 else near[None, :]
    return error[beside].mean(), error[~beside].mean()


@pytest.mark.parametrize("color", ["ycbcr420", "ycbcr422", "rgb444"])
@pytest.mark.parametrize("ratio", [4.0, 8.0, 7.27, 3.98])
def test_there_is_no_seam_at_the_borders_of_source_tiles(slide_of, color, ratio):
    path, base = slide_of(color)
    size = (int(SIZE[0] / ratio), int(SIZE[1] / ratio))
    box = (0, 0, size[0] * ratio, size[1] * ratio)
    with Slide(path) as slide:
        found = slide.read_region((0, 0), size, mpp=0.25 * ratio)
    # Against the pixels before they were tiled: the borders are in OpenSlide's pixels as well.
    error = difference(found, resample(base, box, size, "area"))
    beside, elsewhere = error_beside_borders(error, 240 / ratio)
    assert beside <= elsewhere * 1.15 + 0.1


def test_a_planted_shift_of_a_quarter_px_would_be_noticed(slide_of):
    path, _ = slide_of("rgb444")
    size = (125, 125)
    expected = averaged(path, SIZE, 1, (80, 80), 8, size)
    with Slide(path) as slide:
        right = read_box(slide.reader, 0, 4, (80, 80, 1080, 1080), size)
        wrong = read_box(slide.reader, 0, 4, (82, 80, 1082, 1080), size)
    assert np.abs(right - expected).mean() < 0.5
    assert np.abs(wrong - expected).mean() > 2


def test_tiffslide_agrees_on_native_pixels(tmp_path):
    tiffslide = pytest.importorskip("tiffslide")
    path = tmp_path / "a.svs"
    write_svs(path, color="ycbcr420", size=(700, 560), levels=(1, 4))
    with Slide(path) as slide, tiffslide.TiffSlide(path) as other:
        assert slide.mpp == pytest.approx(other.properties["tiffslide.mpp-x"])
        for level, size in enumerate(other.level_dimensions):
            theirs = np.asarray(other.read_region((0, 0), level, size).convert("RGB"))
            ours = read_level(slide.reader, level, 1, (0, 0), size)
            assert difference(ours, theirs).max() <= 2  # its decoder rounds chroma its own way


@pytest.mark.shared
@pytest.mark.parametrize(
    "name", ["cmu-1-small-region.svs", "tcga-cr-7395-01a-01-ts1.svs"], ids=["jpeg", "jpeg2000"]
)
def test_real_slides_are_openslides_at_every_level(shared, name):
    path = shared / "slides" / name
    with Slide(path) as slide, openslide.OpenSlide(path) as other:
        assert slide.level_dimensions == other.level_dimensions
        for level, (width, height) in enumerate(slide.level_dimensions):
            for x, y in (
                (0, 0),
                (width // 2 - 301, height // 2 - 203),
                (width - 450, height - 410),
            ):
                # From the corner, as OpenSlide would round a place to px of its own downsample.
                theirs, _ = on_white(other.read_region((0, 0), level, (x + 440, y + 400)))
                ours = read_level(slide.reader, level, 1, (x, y), (440, 400))
                assert difference(ours, theirs[y:, x:]).max() <= 1


@pytest.mark.shared
def test_the_real_jpeg_slide_at_2_um(shared):
    path = shared / "slides" / "cmu-1-small-region.svs"
    with Slide(path) as slide:
        assert (slide.mpp, slide.mpp_source, slide.format) == (0.499, "Aperio MPP", "aperio")
        size = (500, 700)
        found = slide.read_region((100, 100), size, mpp=2.0)
    expected = averaged(path, (2220, 2967), 1, (100, 100), 2.0 / 0.499, size)
    assert np.abs(found - expected).mean() <= 1


@pytest.mark.shared
def test_the_real_jpeg_2000_slide_wants_an_mpp(shared):
    path = shared / "slides" / "tcga-cr-7395-01a-01-ts1.svs"
    with Slide(path) as slide:
        assert slide.mpp is None
        with pytest.raises(SlideScaleError, match=r"tcga.*mpp="):
            slide.read_region((0, 0), (100, 100), mpp=2.0)
    with Slide(path, mpp=0.5) as slide:
        found = slide.read_region((2000, 1800), (400, 300), mpp=2.0)
    # The file's own coarser level is not the average of its base, so that is what is averaged.
    expected = averaged(path, (2221, 1783), 2, (2000, 1800), 4, (400, 300))
    assert np.abs(found - expected).mean() <= 1


def test_the_reduced_levels_of_the_writer_are_what_the_tests_take_them_for(tmp_path):
    base = write_svs(tmp_path / "a.svs", color="rgb444", size=(960, 480), levels=(1, 4), quality=98)
    level, _ = level_pixels(tmp_path / "a.svs", (240, 120))
    assert difference(level, shrunk(base, 4)).mean() < 1
