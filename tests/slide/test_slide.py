"""What a Slide promises to whoever holds one."""

import gc
import pickle
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import closing
from multiprocessing import get_context

import numpy as np
import pytest
from support.fake_reader import FakeTileReader, noise
from support.oracle import difference
from support.slides import shrunk, write_svs

from xmag.errors import ClosedSlideError, DamagedSlideError, InputError
from xmag.geometry import TileSpec
from xmag.slide import Slide
from xmag.slide.tiff import LocalSource


@pytest.fixture(scope="module")
def svs(tmp_path_factory):
    path = tmp_path_factory.mktemp("slide") / "a.svs"
    base = write_svs(path, color="rgb444", size=(1300, 900), levels=(1, 4))
    return path, base


def test_attributes(svs):
    path, _ = svs
    with Slide(path) as slide:
        assert slide.dimensions == (1300, 900)
        assert slide.level_dimensions == ((1300, 900), (325, 225))
        assert slide.level_downsamples == (1.0, 4.0)
        assert (slide.mpp, slide.format, slide.name) == (0.25, "aperio", "a.svs")
        assert repr(slide) == "<Slide 'a.svs' aperio 1300x900 px, 0.25 µm/px>"
        assert slide.fingerprint["name"] == "a.svs"
        assert slide.fingerprint["size_bytes"] == path.stat().st_size


@pytest.mark.parametrize("name", ["mpp", "dimensions", "reader", "format"])
def test_a_slide_cannot_be_changed(svs, name):
    with Slide(svs[0]) as slide, pytest.raises(AttributeError):
        setattr(slide, name, 1)


def test_a_region_is_height_by_width_and_its_corner_is_x_y(svs):
    path, base = svs
    with Slide(path) as slide:
        pixels = slide.read_region((200, 100), (321, 123))
    assert pixels.shape == (123, 321, 3)
    assert pixels.dtype == np.uint8
    assert difference(pixels, base[100:223, 200:521]).mean() < 3


@pytest.mark.parametrize(
    ("xy", "size", "mpp"),
    [
        ((-1, 0), (10, 10), None),
        ((0, 0), (1301, 10), None),
        ((1291, 0), (10, 10), None),
        ((0, 891), (10, 10), None),
        ((0, 0), (163, 10), 2.0),
        ((1300 - 79, 0), (10, 10), 2.0),
    ],
)
def test_a_region_that_leaves_the_slide_is_refused(svs, xy, size, mpp):
    with Slide(svs[0]) as slide, pytest.raises(InputError, match="1300x900 px"):
        slide.read_region(xy, size, mpp=mpp)


@pytest.mark.parametrize("size", [(0, 5), (5, -1)])
def test_an_empty_region_is_refused(svs, size):
    with Slide(svs[0]) as slide, pytest.raises(InputError, match="at least 1 px"):
        slide.read_region((0, 0), size)


@pytest.mark.parametrize(
    ("xy", "size"), [((0.5, 0), (5, 5)), ((0, 0), (5, 5.5)), ((0, 0, 0), (5, 5)), (None, (5, 5))]
)
def test_px_are_whole_and_in_pairs(svs, xy, size):
    with Slide(svs[0]) as slide, pytest.raises(InputError, match="two whole numbers of px"):
        slide.read_region(xy, size, mpp=1.0)


def test_numbers_of_numpy_serve_as_px(svs):
    with Slide(svs[0]) as slide:
        pixels = slide.read_region(np.array([3, 5]), np.array([7, 9]))
        assert np.array_equal(pixels, slide.read_region((3, 5), (7, 9)))


def test_a_thumbnail_without_px_is_refused(svs):
    with Slide(svs[0]) as slide, pytest.raises(InputError, match="max_px is 0"):
        slide.thumbnail(max_px=0)


@pytest.mark.parametrize("mpp", [0, -2.0, float("nan")])
def test_an_impossible_scale_is_refused(svs, mpp):
    with Slide(svs[0]) as slide, pytest.raises(InputError, match="µm/px"):
        slide.read_region((0, 0), (5, 5), mpp=mpp)


def test_the_last_region_that_fits_is_read(svs):
    with Slide(svs[0]) as slide:
        assert slide.read_region((1300 - 80, 900 - 80), (10, 10), mpp=2.0).shape == (10, 10, 3)
        assert slide.read_region((1299, 899), (1, 1)).shape == (1, 1, 3)


def test_a_region_off_the_grid_of_a_reduction_is_not_blurred():
    base = noise(320, 320)
    slide = Slide.from_reader(FakeTileReader(base, tile=(64, 64)), name="n")
    found = slide.read_region((4, 12), (30, 20), mpp=2.0)
    assert difference(found, shrunk(base[12:172, 4:244], 8)).max() <= 1


def test_scales_are_chosen_from_levels_and_reductions(svs):
    with Slide(svs[0]) as slide:
        scale = slide.scale_for(TileSpec())
        assert (scale.level, scale.reduction, scale.mpp) == (1, 2, 2.0)


@pytest.mark.parametrize(
    ("max_px", "size"), [(325, (325, 225)), (100, (100, 69)), (5000, (1300, 900))]
)
def test_a_thumbnail_shows_the_whole_slide(svs, max_px, size):
    path, base = svs
    with Slide(path) as slide:
        image = slide.thumbnail(max_px=max_px)
    assert image.size == size
    if size[0] == 325:
        assert difference(np.asarray(image), shrunk(base, 4)).mean() < 3


def test_a_large_thumbnail_is_made_in_bands(monkeypatch):
    from xmag.slide import pixels

    slide = Slide.from_reader(FakeTileReader(noise(700, 900), reductions=(1,)), name="n")
    whole = np.asarray(slide.thumbnail(max_px=70))
    monkeypatch.setattr(pixels, "_MAX_DECODED_PX", 700 * 40)
    assert np.array_equal(np.asarray(slide.thumbnail(max_px=70)), whole)


def test_a_closed_slide_says_so_and_may_be_closed_again(svs):
    slide = Slide(svs[0])
    reader = slide.reader
    slide.close()
    slide.close()
    for use in (
        lambda: slide.read_region((0, 0), (1, 1)),
        lambda: slide.read_region((0, 0), (1, 1), mpp=2.0),
        slide.thumbnail,
        lambda: slide.reader,
        lambda: pickle.dumps(slide),
        lambda: reader.read_tile_bytes(0, [0]),
    ):
        with pytest.raises(ClosedSlideError, match=r"a\.svs is closed"):
            use()
    assert slide.dimensions == (1300, 900)


def test_a_slide_closes_when_its_block_fails(svs):
    with pytest.raises(RuntimeError), Slide(svs[0]) as slide:
        raise RuntimeError
    with pytest.raises(ClosedSlideError):
        slide.read_region((0, 0), (1, 1))


def test_no_file_stays_open_where_opening_fails(tmp_path):
    write_svs(tmp_path / "a.svs", size=(300, 300), levels=(1,))
    (tmp_path / "b.svs").write_bytes(
        (tmp_path / "a.svs").read_bytes().replace(b"= 0.25", b"= x.25")
    )
    for path, options in ((tmp_path / "a.svs", {"region": 3}), (tmp_path / "a.svs", {"mpp": -1.0})):
        with pytest.raises(InputError):
            Slide(path, **options)
    gc.collect()  # a ResourceWarning, or the fixture that counts descriptors, would tell


def read_in_child(slide: Slide):
    return slide.mpp, slide.mpp_source, slide.read_region((40, 40), (50, 50))


def test_a_slide_pickles_by_opening_the_file_again(svs):
    with Slide(svs[0], mpp=0.3) as slide:
        with pickle.loads(pickle.dumps(slide)) as copy:
            assert copy.reader is not slide.reader
            assert (copy.mpp, copy.mpp_source, copy.name) == (0.3, "given", "a.svs")
            assert np.array_equal(read_in_child(copy)[2], read_in_child(slide)[2])
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            mpp, source, pixels = pool.submit(read_in_child, slide).result()
        assert (mpp, source) == (0.3, "given")
        assert np.array_equal(pixels, slide.read_region((40, 40), (50, 50)))


def test_a_relative_path_still_holds_after_a_change_of_folder(svs, monkeypatch, tmp_path):
    monkeypatch.chdir(svs[0].parent)
    with Slide("a.svs") as slide:
        data = pickle.dumps(slide)
    monkeypatch.chdir(tmp_path)
    with pickle.loads(data) as copy:
        assert copy.dimensions == (1300, 900)


@pytest.mark.parametrize("read", ["_read", "_seek_and_read"], ids=["as it is", "without pread"])
def test_one_slide_in_8_threads(svs, read, monkeypatch):
    path, _ = svs
    monkeypatch.setattr(LocalSource, "_read", getattr(LocalSource, read))
    corners = [(x, y) for x in range(0, 1000, 90) for y in range(0, 600, 90)]
    barrier = threading.Barrier(8)
    with Slide(path) as slide:
        expected = [slide.read_region(xy, (37, 53), mpp=1.0) for xy in corners]

        def read_all(_: int):
            barrier.wait()
            return [slide.read_region(xy, (37, 53), mpp=1.0) for xy in corners]

        with ThreadPoolExecutor(8) as pool:
            for found in pool.map(read_all, range(8)):
                assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def test_damage_is_reported_with_level_and_tile_and_never_made_up(tmp_path):
    path = tmp_path / "a.svs"
    write_svs(path, size=(700, 500), levels=(1,))
    with Slide(path) as slide:
        (data,) = slide.reader.read_tile_bytes(0, [4])
    content = path.read_bytes()
    assert content.count(data) == 1
    middle = content.index(data) + len(data) // 2
    end = content.index(data) + len(data)
    path.write_bytes(content[:middle] + bytes(end - middle) + content[end:])
    with Slide(path) as slide:
        with pytest.raises(DamagedSlideError, match=r"tile 4 \(row 1, column 1\) of level 0"):
            slide.read_region((250, 250), (10, 10))
        assert slide.read_region((0, 0), (240, 240)).shape == (240, 240, 3)


def test_bytes_beyond_the_end_of_the_file_are_damage(tmp_path):
    path = tmp_path / "a.svs"
    write_svs(path, size=(300, 300), levels=(1,))
    with Slide(path) as slide:
        (data,) = slide.reader.read_tile_bytes(0, [0])
        offset = path.read_bytes().index(data)
        with path.open("r+b") as file:
            file.truncate(offset + 100)
        with pytest.raises(DamagedSlideError, match=r"a\.svs should hold .* ends after"):
            slide.read_region((0, 0), (10, 10))


def test_a_slide_from_a_reader_has_no_file(svs):
    slide = Slide.from_reader(FakeTileReader(noise(64, 64), tile=(32, 32)), name="n", mpp=0.5)
    assert (slide.mpp, slide.fingerprint, slide.name) == (0.5, None, "n")
    assert pickle.loads(pickle.dumps(slide)).dimensions == (64, 64)


@pytest.mark.parametrize("gap", [0, 3, 64, 65, 5000])
def test_neighbouring_ranges_are_those_read_one_by_one(tmp_path, gap):
    content = np.random.default_rng(gap).bytes(200_000)
    (tmp_path / "a").write_bytes(content)
    sizes = [1, 400, 0, 17_000, 30, 12_345]
    starts = np.cumsum([7, *(size + gap for size in sizes[:-1])]).tolist()
    in_order = list(zip(starts, sizes, strict=True))
    with closing(LocalSource(tmp_path / "a")) as source:
        # In order, backwards, twice the same, and one that reaches into the one before.
        for ranges in (in_order, in_order[::-1], in_order * 2, [(0, 900), (500, 900), (1400, 9)]):
            assert source.read_many(ranges) == [content[at : at + size] for at, size in ranges]
        with pytest.raises(
            DamagedSlideError, match="100 bytes at offset 199950, but ends after 50"
        ):
            source.read_many([(199_900, 50), (199_950, 100)])
