"""Which µm/px a slide has, whatever its file says."""

import pickle
import warnings

import numpy as np
import pytest
from support.fake_reader import FakeRegionReader
from support.slides import page, texture, write_svs, write_tiff
from support.tiff import write_pages
from support.vendor_slides import write_ventana

from xmag.errors import InputError, SlideScaleError, XmagWarning
from xmag.geometry import TileSpec
from xmag.slide import Slide
from xmag.slide.openslide import OpenSlideReader
from xmag.slide.reader import Level, ScaleMetadata
from xmag.tissue import TissueMask, find_tissue


def slide_that_says(mpp=None, power=None, *, given=None):
    reader = FakeRegionReader(texture(64, 48))
    if mpp is not None and not isinstance(mpp, tuple):
        mpp = (mpp, mpp)
    reader.metadata = ScaleMetadata(mpp=mpp, mpp_source="file", objective_power=power)
    return Slide.from_reader(reader, name="s.svs", mpp=given)


def test_what_is_given_comes_before_what_the_file_says():
    slide = slide_that_says(0.25, 40, given=0.5)
    assert (slide.mpp, slide.mpp_source) == (0.5, "given")


def test_the_file_comes_before_the_power():
    slide = slide_that_says(0.2425, 40)
    assert (slide.mpp, slide.mpp_source) == (0.2425, "file")


@pytest.mark.parametrize("mpp", [None, 896.0, 0.001])
def test_power_alone_is_used_with_a_warning(mpp):
    with pytest.warns(XmagWarning, match=r"s\.svs gives no usable µm/px.* 0\.25 µm/px .*mpp="):
        slide = slide_that_says(mpp, 40)
    assert (slide.mpp, slide.mpp_source) == (0.25, "objective power")


def test_mpp_wins_over_a_power_that_contradicts_it_with_a_warning():
    with pytest.warns(XmagWarning, match=r"0\.5 µm/px.*power of 40.*about 0\.25.*mpp="):
        slide = slide_that_says(0.5, 40)
    assert slide.mpp == 0.5


@pytest.mark.parametrize("mpp", [0.2, 0.2425, 0.275, 0.32])
def test_no_scanner_is_suspected_for_its_own_idea_of_40x(mpp):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert slide_that_says(mpp, 40).mpp == mpp


def test_px_that_are_not_square_are_refused_unless_mpp_is_given():
    with pytest.raises(SlideScaleError, match=r"0\.25 µm wide and 0\.26 µm high.*mpp="):
        slide_that_says((0.25, 0.26))
    assert slide_that_says((0.25, 0.26), given=0.25).mpp == 0.25
    assert slide_that_says((0.25, 0.252)).mpp == pytest.approx(0.251)


@pytest.mark.parametrize("mpp", [None, 896.0])
def test_without_a_scale_scaled_operations_name_the_remedy(mpp):
    slide = slide_that_says(mpp)
    assert (slide.mpp, slide.mpp_source) == (None, "unknown")
    assert slide.read_region((0, 0), (9, 9)).shape == (9, 9, 3)
    assert slide.thumbnail(max_px=32).size == (32, 24)
    with pytest.raises(SlideScaleError, match=r"s\.svs.*mpp="):
        slide.read_region((0, 0), (2, 2), mpp=2.0)
    with pytest.raises(SlideScaleError, match=r"s\.svs.*mpp="):
        slide.scale_for(TileSpec())


@pytest.mark.parametrize(
    ("mpp", "seen"),
    [(896.0, "896 µm/px"), (28.97, "28.97 µm/px"), ((0.0, 0.0), "0 µm/px"),
     ((0.25, 896.0), r"0\.25 by 896 µm/px"), (float("nan"), "nan µm/px")],
)  # fmt: skip
def test_an_implausible_scale_is_told_as_the_file_says_it(mpp, seen):
    slide = slide_that_says(mpp)
    message = rf"s\.svs says {seen} \(file\).*between 0\.05 and 20.*mpp="
    for scaled in (
        lambda: slide.read_region((0, 0), (2, 2), mpp=2.0),
        lambda: slide.scale_for(TileSpec()),
        lambda: find_tissue(slide),
        lambda: TissueMask.from_array(np.ones((48, 64), bool), slide),
    ):
        with pytest.raises(SlideScaleError, match=message):
            scaled()
    with pytest.warns(XmagWarning, match=rf"as {seen} \(file\) is none.*power of 40; 0\.25"):
        slide_that_says(mpp, 40)


@pytest.mark.shared
def test_a_real_file_that_says_896_um(shared):
    seen = r"bogus_mpp\.tif says 896 µm/px \(TIFF resolution\).*between 0\.05 and 20"
    with Slide(shared / "cases" / "bogus_mpp.tif") as slide:
        with pytest.raises(SlideScaleError, match=seen):
            find_tissue(slide)
        with pickle.loads(pickle.dumps(slide)) as copy, pytest.raises(SlideScaleError, match=seen):
            find_tissue(copy)


@pytest.mark.parametrize("mpp", [0, -1, float("nan"), float("inf"), 0.01, 25])
def test_an_impossible_mpp_is_refused(mpp):
    with pytest.raises(InputError, match=r"mpp is .*expected"):
        slide_that_says(given=mpp)


def test_a_slide_too_coarse_for_what_is_asked_is_refused():
    slide = slide_that_says(4.0)
    with pytest.raises(SlideScaleError, match="never upsampled"):
        slide.read_region((0, 0), (2, 2), mpp=2.0)
    with pytest.raises(SlideScaleError, match="never upsampled"):
        slide.scale_for(TileSpec())


def test_the_scale_of_an_aperio_file_is_read(tmp_path):
    write_svs(tmp_path / "a.svs", size=(300, 300), mpp=0.2525, levels=(1,))
    with Slide(tmp_path / "a.svs") as slide:
        assert (slide.mpp, slide.mpp_source) == (0.2525, "Aperio MPP")


def test_the_warning_points_at_the_line_that_opened_the_slide(tmp_path):
    write_svs(tmp_path / "a.svs", size=(300, 300), mpp=None, levels=(1,))
    with pytest.warns(XmagWarning) as caught, Slide(tmp_path / "a.svs") as slide:
        assert slide.mpp == 0.25
    assert caught[0].filename == __file__


def test_resolution_tags_serve_a_tiff_that_nobody_signed(tmp_path):
    write_tiff(tmp_path / "a.tiff", size=(300, 300), mpp=0.4, levels=(1,))
    with Slide(tmp_path / "a.tiff") as slide:
        assert slide.mpp == pytest.approx(0.4)
        assert slide.mpp_source == "TIFF resolution"


@pytest.mark.parametrize("write", [write_svs, write_ventana], ids=["aperio", "ventana"])
@pytest.mark.parametrize(
    ("stated", "unit", "mpp"),
    [(0.5, 3, 0.5), (0.5, 2, 0.5), (25_400, 2, None), (0.5, 1, None)],
)
def test_a_vendors_file_without_its_own_scale_has_that_of_its_resolution_tags(
    tmp_path, write, stated, unit, mpp
):
    write(tmp_path / "a.tif", mpp=None, power=None, resolution=(stated, unit))
    with Slide(tmp_path / "a.tif") as slide:
        assert slide.mpp == (mpp and pytest.approx(mpp))
        assert slide.mpp_source == ("TIFF resolution" if mpp else "unknown")
        if mpp is None:  # 1 px an inch is what writers put there who have nothing to say
            with pytest.raises(SlideScaleError, match="does not say how large its pixels are"):
                find_tissue(slide)


def test_a_vendors_own_scale_comes_before_its_resolution_tags(tmp_path):
    write_svs(tmp_path / "a.svs", size=(300, 300), mpp=0.25, resolution=(1.0, 3))
    with Slide(tmp_path / "a.svs") as slide:
        assert (slide.mpp, slide.mpp_source) == (0.25, "Aperio MPP")


def test_what_openslide_opens_is_told_as_the_file_says_it(tmp_path):
    write_ventana(tmp_path / "v.bif", grid=(2, 2), overlap=8, mpp=28.97, power=None)
    with Slide(tmp_path / "v.bif") as slide:
        assert isinstance(slide.reader, OpenSlideReader)
        with pytest.raises(SlideScaleError, match=r"v\.bif says 28\.97 µm/px \(OpenSlide mpp-x"):
            find_tissue(slide)


def test_screen_resolution_is_no_scale(tmp_path):
    write_tiff(tmp_path / "a.tiff", size=(300, 300), mpp=25_400 / 72, levels=(1,))
    with Slide(tmp_path / "a.tiff") as slide:
        assert slide.mpp is None


@pytest.mark.parametrize(
    ("sizes", "downsamples"),
    [
        ([(1003, 1101), (250, 275), (62, 68)], [1, 4, 16]),  # Aperio rounds down
        ([(1003, 1101), (251, 276), (63, 69)], [1, 4, 16]),  # others up
        ([(1003, 1101), (400, 441)], [1, (1003 / 400 + 1101 / 441) / 2]),
    ],
)
def test_downsamples_are_whole_wherever_rounded_sizes_allow_it(tmp_path, sizes, downsamples):
    pages = [
        page(texture(*size), tile=(256, 256), subfiletype=int(number > 0), description="Aperio")
        for number, size in enumerate(sizes)
    ]
    write_pages(tmp_path / "a.svs", pages)
    with Slide(tmp_path / "a.svs") as slide:
        assert slide.level_downsamples == pytest.approx(downsamples)


def test_level_counts_its_tiles():
    level = Level(size=(1000, 500), downsample=1.0, tile_size=(256, 256))
    assert (level.tiles_across, level.tiles_down) == (4, 2)
    assert level.decoded_size(8) == (125, 62)
