"""One file of each container, as OpenSlide shows it, and what is refused in each."""

import copy
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from support import tiff
from support.oracle import difference, level_pixels
from support.slides import page, shrunk, strip_page, texture, tiles_of, write_svs, write_tiff
from support.vendor_slides import (
    philips_xml,
    write_ndpi,
    write_ome,
    write_philips,
    write_scn,
    write_ventana,
)

from xmag.errors import (
    DamagedSlideError,
    InputError,
    SlideError,
    UnsupportedSlideError,
    XmagWarning,
)
from xmag.slide import Slide
from xmag.slide.openslide import OpenSlideReader, check_brightfield
from xmag.slide.pixels import read_level
from xmag.slide.tiff import TiffReader
from xmag.tissue import find_tissue


def whole_level(slide: Slide, level: int):
    return read_level(slide.reader, level, 1, (0, 0), slide.level_dimensions[level])


def assert_like_openslide(path: Path, *, levels: int, region: int | None = None):
    """Each level has OpenSlide's size, and its pixels wherever OpenSlide has any."""
    with Slide(path, region=region) as slide:
        assert isinstance(slide.reader, TiffReader)
        assert len(slide.level_dimensions) == levels
        for level, size in enumerate(slide.level_dimensions):
            expected, alpha = level_pixels(path, size)
            error = difference(whole_level(slide, level), expected)[alpha == 255]
            assert error.size > 0
            assert error.max() <= 1


@pytest.mark.parametrize(
    "color", ["ycbcr420", "ycbcr422", "ycbcr444", "rgb444", "j2k-rgb", "j2k-ycbcr"]
)
def test_aperio(tmp_path, color):
    write_svs(tmp_path / "a.svs", color=color, size=(700, 560), levels=(1, 4))
    assert_like_openslide(tmp_path / "a.svs", levels=2)


@pytest.mark.parametrize("bigtiff", [False, True])
def test_generic_tiff_and_bigtiff(tmp_path, bigtiff):
    write_tiff(tmp_path / "a.tiff", bigtiff=bigtiff, size=(900, 700))
    assert_like_openslide(tmp_path / "a.tiff", levels=3)


@pytest.mark.parametrize("color", ["raw", "lzw", "deflate", "zstd"])
def test_lossless_tiff(tmp_path, color):
    base = write_tiff(tmp_path / "a.tiff", color=color, size=(600, 500), levels=(1, 2))
    assert_like_openslide(tmp_path / "a.tiff", levels=2)
    with Slide(tmp_path / "a.tiff") as slide:
        assert np.array_equal(whole_level(slide, 0), base)


def test_webp_tiff(tmp_path):
    base = write_tiff(tmp_path / "a.tiff", color="webp", size=(600, 500), levels=(1, 2))
    with Slide(tmp_path / "a.tiff") as slide:
        assert np.array_equal(whole_level(slide, 0), base)


def test_philips_with_sparse_tiles_and_padded_levels(tmp_path):
    write_philips(tmp_path / "p.tiff", missing={0: [0, 1, 8, 9], 1: [0]})
    assert_like_openslide(tmp_path / "p.tiff", levels=3)
    with Slide(tmp_path / "p.tiff") as slide:
        assert slide.format == "philips"
        assert slide.level_dimensions == ((2048, 1536), (1024, 768), (512, 384))
        assert slide.mpp == pytest.approx(0.25)
        assert (slide.read_region((0, 0), (512, 512)) == 255).all()
        assert (whole_level(slide, 1)[:256, :256] == 255).all()


def test_leica_with_two_scans_wants_to_know_which(tmp_path):
    write_scn(tmp_path / "s.scn")
    with pytest.raises(
        InputError, match=r"s\.scn: .*2 scans.*region=0 \(900x700 px\), region=1 \(700x520 px\)"
    ):
        Slide(tmp_path / "s.scn")
    for region in (2, -1, "0"):
        with pytest.raises(InputError, match=rf"region={region!r} is not in .*it holds region=0"):
            Slide(tmp_path / "s.scn", region=region)


@pytest.mark.parametrize(
    ("region", "corner", "size"), [(0, (300, 200), (900, 700)), (1, (1500, 1100), (700, 520))]
)
def test_a_leica_scan_lies_where_openslide_has_it(tmp_path, region, corner, size):
    write_scn(tmp_path / "s.scn")
    with Slide(tmp_path / "s.scn", region=region) as slide:
        assert slide.format == "leica"
        assert slide.dimensions == (2600, 2000)
        assert slide.mpp == pytest.approx(0.25)
        for level, factor in enumerate((1, 4)):
            expected, alpha = level_pixels(tmp_path / "s.scn", slide.level_dimensions[level])
            ours = whole_level(slide, level)
            (x, y), (width, height) = (tuple(v // factor for v in pair) for pair in (corner, size))
            scan = (slice(y, y + height), slice(x, x + width))
            assert (alpha[scan] == 255).all()
            assert difference(ours[scan], expected[scan]).max() <= 1
            elsewhere = np.ones(ours.shape[:2], bool)
            elsewhere[scan] = False
            assert (ours[elsewhere] == 255).all()


def test_leica_with_one_scan_at_a_place_that_is_no_multiple_of_anything(tmp_path):
    write_scn(tmp_path / "s.scn", canvas=(2601, 2003), regions=[((301, 203), (800, 600))])
    assert_like_openslide(tmp_path / "s.scn", levels=2)


def test_a_scan_off_the_grid_of_a_reduction_is_not_reduced_in_decoding(tmp_path):
    write_scn(tmp_path / "s.scn", levels=(1,), regions=[((301, 204), (800, 600))])
    with Slide(tmp_path / "s.scn") as slide:
        assert slide.reader.levels[0].reductions == (1,)
        found = slide.read_region((301, 204), (90, 70), mpp=2.0)
        native = slide.read_region((301, 204), (720, 560))
    assert difference(found, shrunk(native, 8)).max() <= 1


def test_what_openslide_leaves_transparent_is_white(tmp_path):
    write_scn(tmp_path / "s.scn")
    reader = OpenSlideReader(tmp_path / "s.scn")
    assert (reader.read_region(0, (0, 0), (300, 200)) == 255).all()
    assert (reader.read_region(0, (300, 200), (300, 200)) < 255).any()
    reader.close()


def test_ventana_without_overlap_is_read_natively(tmp_path):
    write_ventana(tmp_path / "v.bif", grid=(4, 3))
    assert_like_openslide(tmp_path / "v.bif", levels=3)
    with Slide(tmp_path / "v.bif") as slide:
        assert (slide.format, slide.mpp) == ("ventana", 0.25)


def test_ventana_with_overlap_is_left_to_openslide(tmp_path):
    write_ventana(tmp_path / "v.bif", grid=(4, 3), overlap=8)
    with Slide(tmp_path / "v.bif") as slide:
        assert isinstance(slide.reader, OpenSlideReader)
        assert (slide.format, slide.mpp) == ("ventana", 0.25)
        for level, size in enumerate(slide.level_dimensions):
            expected, _ = level_pixels(tmp_path / "v.bif", size)
            assert np.array_equal(whole_level(slide, level), expected)


def test_hamamatsu(tmp_path):
    write_ndpi(tmp_path / "n.ndpi")
    assert_like_openslide(tmp_path / "n.ndpi", levels=2)
    with Slide(tmp_path / "n.ndpi") as slide:
        assert slide.format == "hamamatsu"
        assert slide.mpp == pytest.approx(0.25)
        assert slide.level_downsamples == (1.0, 4.0)


def test_hamamatsu_macro_is_no_level_and_power_is_read(tmp_path):
    write_ndpi(tmp_path / "n.ndpi", mpp=0.9)
    with pytest.warns(XmagWarning, match="power of 40"), Slide(tmp_path / "n.ndpi") as slide:
        assert slide.level_dimensions == ((1280, 960), (320, 240))


@pytest.mark.parametrize("unit", ["µm", "nm", "mm"])
def test_ome_tiff_with_several_scans(tmp_path, unit):
    contents = write_ome(tmp_path / "o.ome.tiff", unit=unit, color="lzw")
    with pytest.raises(InputError, match=r"region=0 \(1300x900 px\), region=1 \(800x700 px"):
        Slide(tmp_path / "o.ome.tiff")
    for region, pixels in enumerate(contents):
        with Slide(tmp_path / "o.ome.tiff", region=region) as slide:
            assert slide.format == "ome-tiff"
            assert slide.mpp == pytest.approx(0.25)
            assert slide.level_downsamples == (1.0, 2.0, 4.0)
            assert np.array_equal(whole_level(slide, 0), pixels)


def test_ome_tiff_with_one_scan_needs_no_region(tmp_path):
    write_ome(tmp_path / "o.ome.tiff", sizes=[(700, 500)])
    with Slide(tmp_path / "o.ome.tiff") as slide:
        expected, _ = level_pixels(tmp_path / "o.ome.tiff", (700, 500))  # its first page
        assert difference(whole_level(slide, 0), expected).max() <= 1


def test_several_scans_in_a_generic_tiff(tmp_path):
    pages = [page(texture(*size), color="lzw") for size in ((500, 300), (400, 410))]
    tiff.write_pages(tmp_path / "a.tiff", pages)
    with pytest.raises(InputError, match=r"region=0 \(500x300 px\), region=1 \(400x410 px\)"):
        Slide(tmp_path / "a.tiff")
    with Slide(tmp_path / "a.tiff", region=1) as slide:
        assert np.array_equal(whole_level(slide, 0), texture(400, 410))


def test_levels_in_sub_ifds_of_a_generic_tiff(tmp_path):
    base = page(texture(500, 300), color="lzw")
    base.sub_pages = [page(texture(250, 150), color="lzw", subfiletype=1)]
    tiff.write_pages(tmp_path / "a.tiff", [base])
    with Slide(tmp_path / "a.tiff") as slide:
        assert slide.level_dimensions == ((500, 300), (250, 150))


def test_strips_are_read_as_tiles_of_full_width(tmp_path):
    pixels = texture(333, 250)
    tiff.write_pages(tmp_path / "a.tiff", [strip_page(pixels, rows=64)])
    with Slide(tmp_path / "a.tiff", mpp=0.5) as slide:
        assert np.array_equal(whole_level(slide, 0), pixels)
        assert slide.read_region((0, 0), (80, 60), mpp=2.0).shape == (60, 80, 3)


def test_labels_and_macros_are_never_levels(tmp_path):
    write_svs(tmp_path / "a.svs", size=(500, 400), levels=(1, 4))
    with Slide(tmp_path / "a.svs") as slide:
        assert slide.level_dimensions == ((500, 400), (125, 100))


APERIO = "Aperio Image Library v11.2.1 \r\n"
NAMES = {
    "aperio": [
        f"{APERIO}label 40x32", f"{APERIO}macro 40x32", f"{APERIO}LABEL", "label",
        f"{APERIO}640x512 -> 40x32 - |AppMag = 40|Filename = 7", f"{APERIO}thumbnail 40x32",
    ],
    "tiff": ["Label", "label image", "Macro -offset=(0,0)-pixelsize=(0.03,0.03)", "Thumbnail"],
    "philips": ["Label", "Macro -offset=(0,0)-pixelsize=(0.03,0.03)"],
}  # fmt: skip


@lru_cache
def pyramid(vendor):
    """The pages of a slide of 640x512 px (padded for Philips) and levels at 1/2 and 1/4."""
    base = texture(640, 512)
    descriptions = [
        f"{APERIO}640x512 [0,0 640x512] (128x128){arrow} JPEG/RGB Q=30|AppMag = 40|MPP = 0.25"
        f"|Filename = label|User = macro"
        for arrow in ("", " -> 320x256", " -> 160x128")
    ]
    if vendor != "aperio":
        descriptions = [philips_xml((1, 2, 4), 0.25) if vendor == "philips" else "", "", ""]
    tags = {305: (tiff.ASCII, "Philips DP v1.0")} if vendor == "philips" else {}
    return [
        page(
            shrunk(base, 2**number), tile=(128, 128), description=description, tags=tags,
            subfiletype=int(number > 0 and vendor == "tiff"),
        )
        for number, description in enumerate(descriptions)
    ]  # fmt: skip


def three_levels(path, pages):
    """Write the pages; the slide in them has those three levels, and shows them."""
    tiff.write_pages(path, pages)
    base = texture(640, 512)
    with Slide(path, mpp=0.25) as slide:
        assert slide.level_dimensions == ((640, 512), (320, 256), (160, 128))
        for level in range(3):
            assert difference(whole_level(slide, level), shrunk(base, 2**level)).mean() < 10
        thumbnail = np.asarray(slide.thumbnail(max_px=40))
        assert difference(thumbnail, shrunk(base, 16)).mean() < 10  # a label is 41 off


@pytest.mark.parametrize("stored", ["ycbcr420", "lzw", "strips"])
@pytest.mark.parametrize(
    ("vendor", "name"), [(vendor, name) for vendor, names in NAMES.items() for name in names]
)
def test_what_is_called_a_label_is_no_level_wherever_it_stands(tmp_path, vendor, name, stored):
    pixels = texture(40, 32, seed=7)  # of the slide's own shape
    pages = pyramid(vendor)
    # The first page of a Philips slide says what it is.
    for place in range(int(vendor == "philips"), 4):
        options = {"description": name, "subfiletype": place % 2}
        label = (
            strip_page(pixels, **options)
            if stored == "strips"
            else page(pixels, tile=(128, 128), color=stored, **options)
        )
        three_levels(tmp_path / f"{place}.tif", [*pages[:place], label, *pages[place:]])


@pytest.mark.parametrize("place", [1, 2, 3])
@pytest.mark.parametrize(
    ("size", "color", "subfiletype"),
    [((40, 32), "ycbcr420", 9), ((40, 32), "lzw", 1), ((50, 32), "ycbcr420", 1)],
    ids=["macro bit", "lossless", "other shape"],
)
@pytest.mark.parametrize("vendor", ["aperio", "tiff"])
def test_a_label_without_a_name_is_told_by_what_else_it_is(
    tmp_path, vendor, size, color, subfiletype, place
):
    pixels = texture(*size, seed=7)
    label = page(pixels, tile=(128, 128), color=color, subfiletype=subfiletype)
    pages = pyramid(vendor)
    three_levels(tmp_path / "a.tif", [*pages[:place], label, *pages[place:]])


def test_a_nameless_thumbnail_in_strips_before_the_scan_is_no_scan(tmp_path):
    three_levels(tmp_path / "a.tif", [strip_page(texture(100, 32)), *pyramid("tiff")])


def test_a_nameless_tiled_label_before_the_scan_is_not_taken_for_it(tmp_path):
    label = page(texture(50, 40, seed=7), tile=(128, 128), color="lzw")
    tiff.write_pages(tmp_path / "a.tif", [label, *pyramid("tiff")])
    with pytest.raises(InputError, match=r"region=0 \(50x40 px\), region=1 \(640x512 px\)"):
        Slide(tmp_path / "a.tif")


@pytest.mark.parametrize("vendor", ["aperio", "tiff"])
def test_a_file_of_labels_alone_is_refused(tmp_path, vendor):
    label = page(texture(50, 40), tile=(128, 128), description=NAMES[vendor][0])
    tiff.write_pages(tmp_path / "a.tif", [label])
    with pytest.raises(UnsupportedSlideError, match=r"label.*macro.*thumbnail"):
        Slide(tmp_path / "a.tif")


@pytest.mark.parametrize("subs", ["ome", "tiff"])
def test_a_label_among_sub_pages_is_no_level(tmp_path, subs):
    (base, *levels), name = copy.deepcopy(pyramid("tiff")), NAMES["tiff"][0]
    label = page(texture(50, 32, seed=7), tile=(128, 128), color="lzw", subfiletype=1)
    named = page(texture(40, 32, seed=7), tile=(128, 128), description=name, subfiletype=1)
    base.sub_pages = [label, *levels, named]
    if subs == "ome":
        base.tags[270] = (tiff.ASCII, ome_xml((640, 512)))
    three_levels(tmp_path / "a.tif", [base])


@pytest.mark.shared
def test_a_tiled_label_after_the_levels_of_an_aperio_slide(shared):
    with Slide(shared / "cases" / "svs_tiled_label.svs") as slide:
        assert slide.level_dimensions == ((1536, 1280), (384, 320))
        assert find_tissue(slide).fraction > 0.9
        seen, base = np.asarray(slide.thumbnail(max_px=96)), whole_level(slide, 0)
    assert difference(seen, shrunk(base, 16)).mean() < 6


def ome_xml(*sizes, names=(), channels=(), extra=""):
    """An OME-XML that lists an image of each size, each with one TiffData without a place."""
    images = "".join(
        f'<Image ID="Image:{number}" Name="{names[number] if names else number}">'
        f'<Pixels Type="uint8" SizeX="{width}" SizeY="{height}" SizeC="3" SizeZ="1" SizeT="1"'
        f' DimensionOrder="XYCZT" PhysicalSizeX="0.25" PhysicalSizeY="0.25"{extra}>'
        f"{''.join(channels)}<TiffData/></Pixels></Image>"
        for number, (width, height) in enumerate(sizes)
    )
    return f'<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">{images}</OME>'


@pytest.mark.parametrize("channels", [(), ("<Channel/>",) * 3, ('<Channel SamplesPerPixel="1"/>',)])
def test_ome_tiff_with_one_interleaved_page_of_three_channels_is_in_colour(tmp_path, channels):
    pixels = [texture(300, 260), texture(280, 240, seed=1)]
    pages = [page(part, tile=(128, 128), color="lzw") for part in pixels]
    pages[0].tags[270] = (tiff.ASCII, ome_xml((300, 260), (280, 240), channels=channels))
    tiff.write_pages(tmp_path / "o.ome.tif", pages)
    for region in (0, 1):
        with Slide(tmp_path / "o.ome.tif", region=region) as slide:
            assert slide.mpp == 0.25
            assert np.array_equal(whole_level(slide, 0), pixels[region])


def test_ome_tiff_with_a_page_a_channel_is_still_refused(tmp_path):
    tags = {277: (tiff.SHORT, 1), 258: (tiff.SHORT, 8), 262: (tiff.SHORT, 1)}
    pages = [page(texture(200, 200), color="raw", tags=tags) for _ in range(3)]
    pages[0].tags[270] = (tiff.ASCII, ome_xml((200, 200)))
    tiff.write_pages(tmp_path / "o.ome.tif", pages)
    with pytest.raises(UnsupportedSlideError, match=r"3 planes.*channels"):
        Slide(tmp_path / "o.ome.tif")


@pytest.mark.parametrize(
    "name", ["Macrophage CD68", "label-free 20x", "Overview of B7", "Labeled", "CD3 double label"]
)
def test_an_ome_image_is_no_macro_for_how_its_name_begins(tmp_path, name):
    pages = [page(texture(*size), tile=(128, 128)) for size in ((300, 260), (90, 60))]
    xml = ome_xml((300, 260), (90, 60), names=(name, "slide 7 macro image"))
    pages[0].tags[270] = (tiff.ASCII, xml)
    tiff.write_pages(tmp_path / "o.ome.tif", pages)
    with Slide(tmp_path / "o.ome.tif") as slide:
        assert slide.dimensions == (300, 260)


def test_an_ome_tiff_of_labels_alone_says_so(tmp_path):
    label = page(texture(90, 60), tile=(128, 128), description=ome_xml((90, 60), names=("label",)))
    tiff.write_pages(tmp_path / "o.ome.tif", [label])
    with pytest.raises(UnsupportedSlideError, match=r"label.*macro.*thumbnail"):
        Slide(tmp_path / "o.ome.tif")


@pytest.mark.parametrize(
    "write",
    [
        lambda path: write_scn(path, regions=[((0, 0), (300, 300))], z_planes=3),
        lambda path: write_ndpi(path, size=(640, 320), levels=(1,), z_planes=3),
        lambda path: write_ome(path, sizes=[(300, 300)], z_planes=3),
        lambda path: tiff.write_pages(path, [page(texture(300, 300))] * 3),
        lambda path: tiff.write_pages(path, [page(texture(300, 300), description="Aperio")] * 3),
    ],
    ids=["scn", "ndpi", "ome", "tiff", "aperio"],
)
def test_z_stacks_are_refused(tmp_path, write, request):
    suffix = {"scn": "scn", "ndpi": "ndpi"}.get(request.node.callspec.id, "tiff")
    write(tmp_path / f"z.{suffix}")
    with pytest.raises(UnsupportedSlideError, match=r"3 (images|planes).*z-stack.*focal plane"):
        Slide(tmp_path / f"z.{suffix}")


@pytest.mark.parametrize(
    ("tags", "seen"),
    [
        ({65441: (tiff.LONG, 1), 65434: (tiff.ASCII, "DAPI")}, "capture mode 1"),
        ({65441: (tiff.LONG, 17)}, "capture mode 17"),
        ({65434: (tiff.ASCII, "FITC")}, "filter set"),
    ],
)
def test_fluorescence_of_hamamatsu_is_refused(tmp_path, tags, seen):
    write_ndpi(tmp_path / "f.ndpi", size=(640, 320), tags=tags)
    with pytest.raises(UnsupportedSlideError, match=rf"f\.ndpi: .*{seen}.*fluorescence"):
        Slide(tmp_path / "f.ndpi")


def test_brightfield_of_hamamatsu_says_so_and_is_read(tmp_path):
    tags = {65441: (tiff.LONG, 0), 65434: (tiff.ASCII, " ")}
    write_ndpi(tmp_path / "b.ndpi", size=(640, 320), tags=tags)
    with Slide(tmp_path / "b.ndpi") as slide:
        assert slide.dimensions == (640, 320)


def test_fluorescence_of_mirax_is_refused():
    name = "mirax.GENERAL.SLIDE_TYPE"
    check_brightfield({name: "SLIDE_TYPE_BRIGHTFIELD"})
    check_brightfield({})
    with pytest.raises(UnsupportedSlideError, match="fluorescence"):
        check_brightfield({name: "SLIDE_TYPE_FLUORESCENCE"})


def test_fluorescence_is_refused(tmp_path):
    write_scn(tmp_path / "f.scn", illumination="fluorescence")
    with pytest.raises(UnsupportedSlideError, match="brightfield"):
        Slide(tmp_path / "f.scn")


@pytest.mark.parametrize(
    ("tags", "seen"),
    [
        ({258: (tiff.SHORT, [16, 16, 16])}, "3 sample.* of uint16"),
        ({258: (tiff.SHORT, 8), 277: (tiff.SHORT, 1), 262: (tiff.SHORT, 1)}, "1 sample.* of uint8"),
        (
            {258: (tiff.SHORT, 8), 277: (tiff.SHORT, 1), 262: (tiff.SHORT, 3),
             320: (tiff.SHORT, [0] * 768)},
            "PALETTE",
        ),
        ({258: (tiff.SHORT, [32] * 3), 339: (tiff.SHORT, [3] * 3)}, "3 sample.* of float32"),
        ({262: (tiff.SHORT, 8)}, "CIELAB"),
        ({262: (tiff.SHORT, 6)}, "YCbCr in TIFF compression 1"),
    ],
    ids=["16-bit", "grey", "palette", "float", "lab", "ycbcr"],
)  # fmt: skip
def test_pixels_that_are_not_8_bit_rgb_are_refused(tmp_path, tags, seen):
    tiff.write_pages(tmp_path / "a.tiff", [page(texture(200, 200), color="raw", tags=tags)])
    with pytest.raises(UnsupportedSlideError, match=rf"a\.tiff: .*{seen}"):
        Slide(tmp_path / "a.tiff")


def test_a_compression_that_is_not_read_is_named(tmp_path):
    tags = {259: (tiff.SHORT, 34887)}
    tiff.write_pages(tmp_path / "a.tiff", [page(texture(200, 200), color="raw", tags=tags)])
    with pytest.raises(UnsupportedSlideError, match=r"a\.tiff: .*34887"):
        Slide(tmp_path / "a.tiff")


@pytest.mark.parametrize("tile", [(0, 256), (1 << 20, 1 << 20)])
def test_absurd_tile_sizes_are_refused(tmp_path, tile):
    tags = {322: (tiff.LONG, tile[0]), 323: (tiff.LONG, tile[1])}
    tiff.write_pages(tmp_path / "a.tiff", [page(texture(200, 200), color="raw", tags=tags)])
    with pytest.raises(SlideError, match=r"a\.tiff"):
        Slide(tmp_path / "a.tiff")


@pytest.mark.parametrize("size", [(1 << 31, 1 << 31), (2000, 200)])
def test_a_size_that_the_tiles_do_not_fill_is_damage(tmp_path, size):
    tiff.write_pages(tmp_path / "a.tiff", [page(texture(200, 200), color="raw", size=size)])
    with pytest.raises(DamagedSlideError, match=r"needs \d+ tiles, but the file lists 1"):
        Slide(tmp_path / "a.tiff")


@pytest.mark.parametrize("suffix", ["svs", "scn", "tiff", "bif", "ndpi"])
def test_a_file_cut_anywhere_is_refused_or_read_and_never_anything_else(tmp_path, suffix):
    whole, cut = tmp_path / f"whole.{suffix}", tmp_path / f"cut.{suffix}"
    writers = {
        "svs": lambda: write_svs(whole, size=(500, 400), levels=(1, 4)),
        "scn": lambda: write_scn(whole, regions=[((0, 0), (500, 400))], canvas=(600, 500)),
        "tiff": lambda: write_philips(whole, size=(500, 400)),
        "bif": lambda: write_ventana(whole, grid=(2, 2)),
        "ndpi": lambda: write_ndpi(whole, size=(1280, 160)),
    }
    writers[suffix]()
    data = whole.read_bytes()
    with Slide(whole, mpp=0.25) as slide:
        expected = [whole_level(slide, level) for level in range(len(slide.level_dimensions))]
    refused = 0
    for length in np.linspace(1, len(data) - 1, 60).astype(int):
        cut.write_bytes(data[:length])
        try:
            with Slide(cut, mpp=0.25) as slide:
                for level, pixels in enumerate(expected):
                    assert np.array_equal(whole_level(slide, level), pixels)
        except SlideError:
            refused += 1
    assert refused > 40


def test_damaged_bytes_anywhere_never_crash_the_parser(tmp_path):
    write_svs(tmp_path / "a.svs", size=(300, 260), levels=(1,))
    data = (tmp_path / "a.svs").read_bytes()
    rng = np.random.default_rng(0)
    directories = data.index(b"Aperio") - 400
    for _ in range(150):
        broken = bytearray(data)
        at = rng.integers(0, 8) if rng.random() < 0.1 else rng.integers(directories, len(data))
        broken[at] = rng.integers(0, 256)
        (tmp_path / "b.svs").write_bytes(broken)
        try:
            with Slide(tmp_path / "b.svs", mpp=0.25) as slide:
                slide.read_region((0, 0), (1, 1))
        except SlideError:
            pass


def test_padding_of_edge_tiles_is_never_seen(tmp_path):
    base = write_tiff(tmp_path / "a.tiff", color="raw", size=(300, 260), levels=(1,))
    assert any((tile == 128).any() for tile in tiles_of(base, (256, 256)))
    with Slide(tmp_path / "a.tiff") as slide:
        assert np.array_equal(slide.read_region((200, 200), (100, 60)), base[200:, 200:])
