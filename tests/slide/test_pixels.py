"""Windows out of tiles, tiles out of nothing, and the two kernels."""

import threading

import numpy as np
import pytest
from PIL import Image
from support.fake_reader import FakeRegionReader, FakeTileReader, box_average, noise
from support.oracle import difference, level_pixels
from support.slides import shrunk, write_svs, write_tiff

from xmag.errors import DamagedSlideError
from xmag.slide import Slide
from xmag.slide.pixels import empty_tile, read_box, read_level, resample


def area_by_brute_force(pixels, box, size):
    """Each output px as the mean of a 64 times finer picture."""
    fine = 64
    rows = np.floor(box[1] + (np.arange(size[1] * fine) + 0.5) * (box[3] - box[1]) / size[1] / fine)
    columns = np.floor(
        box[0] + (np.arange(size[0] * fine) + 0.5) * (box[2] - box[0]) / size[0] / fine
    )
    tall = pixels[rows.astype(int)].reshape(size[1], fine, -1, 3).mean(axis=1)
    return tall[:, columns.astype(int)].reshape(size[1], size[0], fine, 3).mean(axis=2)


@pytest.mark.parametrize("tile", [(16, 16), (240, 240), (40, 24)])
@pytest.mark.parametrize("reduction", [1, 2, 8])
def test_windows_are_cut_from_the_tiles_they_touch(tile, reduction):
    pixels = noise(150, 101)
    reader = FakeTileReader(pixels, tile=tile)
    whole = box_average(pixels, reduction)
    rng = np.random.default_rng(0)
    for _ in range(30):
        x, y = (int(rng.integers(0, side)) for side in whole.shape[1::-1])
        width = int(rng.integers(1, whole.shape[1] - x + 1))
        height = int(rng.integers(1, whole.shape[0] - y + 1))
        window = read_level(reader, 0, reduction, (x, y), (width, height))
        assert np.array_equal(window, whole[y : y + height, x : x + width])


def test_each_tile_under_a_window_is_decoded_once_and_no_other():
    reader = FakeTileReader(noise(160, 160), tile=(16, 16))
    read_level(reader, 0, 1, (17, 33), (30, 20))
    assert dict(reader.decoded) == dict.fromkeys([21, 22, 31, 32], 1)


def test_canvas_without_tiles_is_white():
    pixels = noise(64, 48)
    reader = FakeTileReader(pixels, tile=(16, 16), origin=(24, 8), canvas=(160, 120))
    window = read_level(reader, 0, 2, (0, 0), (80, 60))
    expected = np.full((60, 80, 3), 255, np.uint8)
    expected[4:28, 12:44] = box_average(pixels, 2)
    assert np.array_equal(window, expected)
    assert (read_level(reader, 0, 1, (100, 100), (50, 20)) == 255).all()


def test_readers_without_tiles_are_asked_for_the_window():
    pixels = noise(64, 48)
    assert np.array_equal(
        read_level(FakeRegionReader(pixels), 0, 1, (10, 20), (30, 15)), pixels[20:35, 10:40]
    )


def test_a_missing_tile_of_the_base_is_white():
    reader = FakeTileReader(noise(64, 64), tile=(32, 32), missing=[1])
    window = read_level(reader, 0, 1, (0, 0), (64, 64))
    assert (window[:32, 32:] == 255).all()
    assert not (window[32:] == 255).all()
    assert empty_tile(reader, 0, 1, 4).shape == (8, 8, 3)


@pytest.mark.parametrize("reduction", [1, 2])
def test_a_missing_tile_shows_the_finer_level(tmp_path, reduction):
    base = write_tiff(
        tmp_path / "a.tiff", color="raw", size=(2048, 1024), levels=(1, 2, 8), missing={2: [0]}
    )
    with Slide(tmp_path / "a.tiff") as slide:
        window = read_level(
            slide.reader, 2, reduction, (0, 0), (256 // reduction, 128 // reduction)
        )
    assert difference(window, shrunk(base, 8 * reduction)).max() <= 1  # rounded three times


def test_a_tile_that_is_missing_everywhere_is_white_in_between(tmp_path):
    write_tiff(
        tmp_path / "a.tiff", color="raw", size=(1024, 1024), levels=(1, 2),
        missing={0: [0, 1, 4], 1: [0]},
    )  # fmt: skip
    with Slide(tmp_path / "a.tiff") as slide:
        window = read_level(slide.reader, 1, 1, (0, 0), (256, 256))
    assert (window[:128] == 255).all()
    assert (window[:, :128] == 255).all()
    assert (window[128:, 128:] < 255).any()


def test_a_missing_aperio_tile_looks_like_openslides(tmp_path):
    write_svs(tmp_path / "a.svs", color="rgb444", size=(1920, 960), levels=(1, 2), missing={1: [1]})
    with Slide(tmp_path / "a.svs") as slide:
        ours = read_level(slide.reader, 1, 1, (0, 0), (960, 480))
    theirs, _ = level_pixels(tmp_path / "a.svs", (960, 480))
    present = np.ones(ours.shape[:2], bool)
    present[:240, 240:480] = False
    assert difference(ours, theirs)[present].max() <= 1
    # OpenSlide shows the finer level through a filter, a px away; the place is the same.
    here, there = (box_average(p[:240, 240:480], 16).astype(int) for p in (ours, theirs))
    assert difference(here, there).mean() < 12
    assert np.corrcoef(here.ravel(), there.ravel())[0, 1] > 0.9


def test_damage_names_the_tile():
    reader = FakeTileReader(noise(64, 64), tile=(16, 16), damaged=[6])
    with pytest.raises(
        DamagedSlideError, match=r"tile 6 \(row 1, column 2\) of level 0.*end early"
    ):
        read_level(reader, 0, 1, (0, 0), (64, 64))


def test_a_window_of_many_tiles_is_the_same_and_leaves_no_thread():
    pixels = noise(320, 320)
    reader = FakeTileReader(pixels, tile=(16, 16))
    before = threading.active_count()
    assert np.array_equal(read_level(reader, 0, 1, (0, 0), (320, 320)), pixels)
    assert dict(reader.decoded) == dict.fromkeys(range(400), 1)
    broken = FakeTileReader(pixels, tile=(16, 16), damaged=[387, 41, 206])
    with pytest.raises(DamagedSlideError, match=r"tile 41 \(row 2, column 1\)"):
        read_level(broken, 0, 1, (0, 0), (320, 320))
    assert threading.active_count() == before


@pytest.mark.parametrize(
    ("box", "size"),
    [
        ((0, 0, 40, 30), (40, 30)),  # as it is
        ((4, 2, 36, 26), (8, 6)),  # whole blocks
        ((0.25, 1.5, 36.75, 27.0), (9, 11)),
        ((3.1, 2.7, 35.3, 29.4), (31, 26)),  # barely reduced
        ((10, 10, 11.5, 12.5), (1, 1)),
        ((5.5, 5.5, 15.5, 15.5), (10, 10)),  # half a px off
    ],
)
def test_area_is_the_mean_over_what_each_px_covers(box, size):
    pixels = noise(40, 30)
    found = resample(pixels, box, size, "area")
    expected = area_by_brute_force(pixels, box, size)
    assert found.shape == (size[1], size[0], 3)
    # The brute force knows a px edge to 1/64, the result is rounded.
    assert difference(found, expected).max() <= 4
    assert np.abs(found - expected).mean() <= 0.8
    exact = all(float(edge).is_integer() for edge in box)
    assert not exact or np.abs(found - expected).max() <= 0.5


def test_area_keeps_a_constant_and_the_mean():
    assert (
        resample(np.full((50, 50, 3), 201, np.uint8), (0.3, 0.7, 47.9, 49.1), (13, 17), "area")
        == 201
    ).all()
    pixels = noise(200, 200)
    found = resample(pixels, (0, 0, 200, 200), (37, 41), "area")
    assert found.mean() == pytest.approx(pixels.mean(), abs=0.3)


def test_area_does_not_depend_on_what_lies_outside_the_box():
    pixels = noise(60, 60)
    other = pixels.copy()
    other[:10] = other[50:] = other[:, :10] = other[:, 50:] = 0
    box, size = (10.0, 10.0, 50.0, 50.0), (17, 19)
    assert np.array_equal(resample(pixels, box, size, "area"), resample(other, box, size, "area"))


def test_a_box_that_leaves_the_pixels_shows_the_pixels_at_its_edge():
    pixels = noise(20, 20)
    found = resample(pixels, (15.5, 15.5, 20.5, 20.5), (5, 5), "area")
    assert np.array_equal(
        found[-1, -1], resample(pixels, (19.5, 19.5, 20, 20), (1, 1), "area")[0, 0]
    )


def test_lanczos_is_pillows():
    pixels = noise(100, 80)
    box = (3.25, 4.5, 95.0, 77.75)
    expected = Image.fromarray(pixels).resize((40, 31), Image.Resampling.LANCZOS, box=box)
    assert np.array_equal(resample(pixels, box, (40, 31), "lanczos"), np.asarray(expected))


@pytest.mark.parametrize("bands", [False, True])
def test_a_box_of_a_level_is_the_same_however_it_is_read(bands, monkeypatch):
    from xmag.slide import pixels as module

    image = noise(300, 260)
    reader = FakeTileReader(image, tile=(64, 64))
    if bands:
        monkeypatch.setattr(module, "_MAX_DECODED_PX", 3000)
    box = (20.0, 31.0, 280.0, 241.0)
    found = read_box(reader, 0, 1, box, (70, 57))
    expected = resample(image, box, (70, 57), "area")
    assert difference(found, expected).max() <= 1  # the edges of bands are rounded elsewhere
    assert (found != expected).mean() < 0.01
