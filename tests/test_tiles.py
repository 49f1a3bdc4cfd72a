"""Tiles against a brute-force crop of the whole image."""

import threading
from itertools import islice

import numpy as np
import pytest
from PIL import Image
from support.fake_reader import FakeRegionReader, FakeTileReader, box_average, noise

from xmag.errors import DamagedSlideError, InputError
from xmag.geometry import TileSpec
from xmag.plan import TilePlan, plan_tiles
from xmag.slide import Slide
from xmag.tiles import read_tiles


def area_average(pixels, box, size):
    """The mean over each output pixel's footprint, one pixel after the other, by definition."""
    x0, y0, x1, y1 = box

    def weights(low, high, count, length):
        edges = low + (high - low) * np.arange(count + 1) / count
        table = np.zeros((count, length))
        for i in range(count):
            for j in range(int(edges[i]), min(int(np.ceil(edges[i + 1])), length)):
                table[i, j] = max(0.0, min(edges[i + 1], j + 1) - max(edges[i], j))
        return table / table.sum(axis=1, keepdims=True)

    rows, columns = weights(y0, y1, size, len(pixels)), weights(x0, x1, size, pixels.shape[1])
    return np.einsum("lk,ikc->ilc", columns, np.tensordot(rows, pixels.astype(float), 1))


def read_all(slide, plan, **options):
    batches = list(read_tiles(slide, plan, **options))
    if not batches:
        return np.empty((0, 2), np.int64), np.empty((0, 1, 1, 3), np.uint8)
    return tuple(np.concatenate(parts) for parts in zip(*batches, strict=True))


@pytest.fixture
def spec():
    return TileSpec(size_px=56)


@pytest.mark.parametrize("overlap", [0, 13])
@pytest.mark.parametrize("tile", [(64, 64), (48, 96), (1024, 16)])
def test_tiles_at_a_reduced_scale_are_the_box_average_of_the_image(spec, tile, overlap):
    image = noise(2003, 1510)
    reader = FakeTileReader(image, tile=tile)
    slide = Slide.from_reader(reader, name="fake")
    plan = plan_tiles(slide, spec, overlap=overlap)
    assert plan.scale.reduction == 8
    whole = box_average(image, 8)

    coords, tiles = read_all(slide, plan, batch_size=7, threads=3)

    assert np.array_equal(coords, plan.coords)
    for (x, y), found in zip(coords // 8, tiles, strict=True):
        assert np.array_equal(found, whole[y : y + 56, x : x + 56])


def test_each_source_tile_is_read_and_decoded_once(spec):
    reader = FakeTileReader(noise(3000, 2000), tile=(240, 240))
    slide = Slide.from_reader(reader, name="fake")
    read_all(slide, plan_tiles(slide, spec), batch_size=5, threads=4)
    assert set(reader.read.values()) == {1}
    assert set(reader.decoded.values()) == {1}


def test_source_tiles_that_no_tile_touches_are_not_read(spec):
    reader = FakeTileReader(noise(3000, 2000), tile=(240, 240))
    slide = Slide.from_reader(reader, name="fake")
    plan = plan_tiles(slide, spec, roi=square(900, 900, 1300, 1300))
    read_all(slide, plan)
    wanted = {
        (y // 240) * 13 + x // 240
        for x0, y0 in plan.coords.tolist()
        for x in range(x0, x0 + 448)
        for y in range(y0, y0 + 448, 7)
    }
    assert set(reader.read) == wanted


@pytest.mark.parametrize("resample", ["area", "lanczos"])
def test_tiles_between_scales_are_resampled_to_exactly_the_wanted_one(spec, resample):
    image = noise(1500, 1300)
    slide = Slide.from_reader(FakeTileReader(image, tile=(64, 64), mpp=0.275), name="fake")
    spec = TileSpec(size_px=56, mpp_tolerance=0.01, resample=resample)
    plan = plan_tiles(slide, spec)
    assert plan.tiles.mpp == 2.0
    reduction = plan.scale.reduction
    assert reduction == {"area": 2, "lanczos": 1}[resample]
    whole, side = box_average(image, reduction), 56 * plan.scale.factor

    coords, tiles = read_all(slide, plan, batch_size=4)

    assert len(coords) == 4 * 4  # the last of each row and column moved inwards
    for corner, found in zip(coords, tiles, strict=True):
        x, y = np.minimum(corner / reduction, np.array([1500, 1300]) // reduction - side)
        box = (x, y, x + side, y + side)
        if resample == "area":
            expected = area_average(whole, box, 56)
            assert np.abs(found - expected).max() <= 0.51
        else:
            # Pixels outside the tile have no part in it, as in the training data.
            x0, y0, x1, y1 = int(x), int(y), int(np.ceil(x + side)), int(np.ceil(y + side))
            inner = (x - x0, y - y0, x - x0 + side, y - y0 + side)
            crop = Image.fromarray(whole[y0:y1, x0:x1])
            expected = np.asarray(crop.resize((56, 56), Image.Resampling.LANCZOS, box=inner))
            assert np.abs(found.astype(int) - expected).max() <= 1


def test_readers_without_tiles_give_the_same(spec):
    image = noise(900, 700)
    spec = TileSpec(size_px=56, mpp=0.5)
    plain = Slide.from_reader(FakeRegionReader(image), name="fake")
    tiled = Slide.from_reader(FakeTileReader(image, reductions=(1,)), name="fake")
    for found, expected in zip(
        read_all(plain, plan_tiles(plain, spec), batch_size=3),
        read_all(tiled, plan_tiles(tiled, spec), batch_size=3),
        strict=True,
    ):
        assert np.array_equal(found, expected)


def test_batch_size_and_threads_change_nothing(spec):
    slide = Slide.from_reader(FakeTileReader(noise(2500, 2000)), name="fake")
    plan = plan_tiles(slide, spec)
    coords, tiles = read_all(slide, plan, batch_size=1, threads=1)
    for batch_size, threads in [(2, 8), (10, 2), (1000, 1)]:
        other_coords, other = read_all(slide, plan, batch_size=batch_size, threads=threads)
        assert np.array_equal(other_coords, coords)
        assert np.array_equal(other, tiles)


def test_the_last_batch_is_short_and_no_batch_is_empty(spec):
    slide = Slide.from_reader(FakeTileReader(noise(2240, 448)), name="fake")
    sizes = [len(tiles) for _, tiles in read_tiles(slide, plan_tiles(slide, spec), batch_size=2)]
    assert sizes == [2, 2, 1]


def test_canvas_that_the_file_declares_empty_is_white(spec):
    image = noise(960, 960)
    reader = FakeTileReader(image, tile=(64, 64), origin=(480, 480), canvas=(1920, 1920))
    slide = Slide.from_reader(reader, name="fake")
    canvas = np.full((240, 240, 3), 255, np.uint8)
    canvas[60:180, 60:180] = box_average(image, 8)
    coords, tiles = read_all(slide, plan_tiles(slide, spec))
    for (x, y), found in zip(coords // 8, tiles, strict=True):
        assert np.array_equal(found, canvas[y : y + 56, x : x + 56])


def test_a_missing_tile_is_white_at_the_base(spec):
    image = noise(960, 960)
    reader = FakeTileReader(image, tile=(240, 240), missing=[5])
    slide = Slide.from_reader(reader, name="fake")
    expected = image.copy()
    expected[240:480, 240:480] = 255
    expected = box_average(expected, 8)
    coords, tiles = read_all(slide, plan_tiles(slide, spec))
    for (x, y), found in zip(coords // 8, tiles, strict=True):
        assert np.array_equal(found, expected[y : y + 56, x : x + 56])


def test_damage_is_an_error_that_names_the_place_and_leaves_no_thread(spec):
    reader = FakeTileReader(noise(3000, 2000), damaged=[40])
    slide = Slide.from_reader(reader, name="fake.svs")
    with pytest.raises(DamagedSlideError, match=r"fake\.svs.*tile 40 .*of level 0.*end early"):
        read_all(slide, plan_tiles(slide, spec), threads=4)
    assert not [t for t in threading.enumerate() if t.name.startswith("xmag-tiles")]


def test_stopping_early_stops_the_threads_and_the_reading(spec):
    reader = FakeTileReader(noise(4000, 4000), tile=(64, 64))
    slide = Slide.from_reader(reader, name="fake")
    stream = read_tiles(slide, plan_tiles(slide, spec), batch_size=4, threads=2)
    list(islice(stream, 2))
    stream.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("xmag-tiles")]
    assert len(reader.read) < 0.2 * 63 * 63


def test_memory_holds_a_band_not_the_slide(spec):
    """Decoding runs only so far ahead of who asks for the tiles."""
    reader = FakeTileReader(noise(4000, 8000), tile=(80, 80))
    slide = Slide.from_reader(reader, name="fake")
    stream = read_tiles(slide, plan_tiles(slide, spec), batch_size=8, threads=2)
    for number, _ in enumerate(stream, start=1):
        rows_needed = (number + 1) * 448 / 80  # a batch is a row of tiles, and one is read ahead
        rows_read = max(reader.read) // 50 + 1
        assert rows_read <= rows_needed + 4


def test_a_plan_of_another_slide_is_refused(spec):
    slide = Slide.from_reader(FakeTileReader(noise(2000, 2000)), name="one")
    other = Slide.from_reader(FakeTileReader(noise(2000, 1999)), name="other")
    with pytest.raises(InputError, match="make a plan for this slide"):
        read_tiles(other, plan_tiles(slide, spec))


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"threads": 0}])
def test_impossible_options_are_refused(spec, options):
    slide = Slide.from_reader(FakeTileReader(noise(500, 500)), name="fake")
    with pytest.raises(InputError, match="expected at least 1"):
        read_tiles(slide, plan_tiles(slide, spec), **options)


def test_a_plan_from_json_reads_the_same(spec):
    slide = Slide.from_reader(FakeTileReader(noise(2000, 2000)), name="fake")
    plan = plan_tiles(slide, spec, overlap=5)
    again = TilePlan.from_json(plan.to_json())
    for found, expected in zip(read_all(slide, again), read_all(slide, plan), strict=True):
        assert np.array_equal(found, expected)


def square(x0, y0, x1, y1):
    ring = [[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]]
    return {"type": "Polygon", "coordinates": [ring]}
