"""TIFFs that the fast reader refuses, and slides that others have opened already."""

import io
import pickle
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import fsspec
import imagecodecs
import numpy as np
import openslide
import pytest
import tifffile
import tiffslide
from support import tiff
from support.encoders import ColourEncoder
from support.oracle import difference, level_pixels
from support.range_server import serve_folder
from support.slides import page, resolution_tags, shrunk, strip_page, texture, write_svs

from xmag.errors import (
    ClosedSlideError,
    DamagedSlideError,
    InputError,
    UnsupportedSlideError,
)
from xmag.extract import extract_features
from xmag.slide import Slide
from xmag.slide.pixels import read_level
from xmag.slide.tiff import TiffReader
from xmag.slide.tiffslide import TiffSlideReader

SIZE = (420, 300)
TILE = (128, 96)
DEFLATE, ZSTD, PNG, JPEG_XL, PIXTIFF = 8, 50000, 34933, 50002, 50013
UNSPECIFIED, ASSOCIATED, STRAIGHT = 0, 1, 2

ENCODE = {
    1: lambda part: part.tobytes(),
    5: lambda part: imagecodecs.lzw_encode(part.tobytes()),
    DEFLATE: lambda part: imagecodecs.zlib_encode(part.tobytes()),
    32773: lambda part: imagecodecs.packbits_encode(part.tobytes()),
    ZSTD: lambda part: imagecodecs.zstd_encode(part.tobytes()),
    PIXTIFF: lambda part: imagecodecs.zlib_encode(part.tobytes()),
    PNG: lambda part: imagecodecs.png_encode(np.squeeze(part)),
    JPEG_XL: lambda part: imagecodecs.jpegxl_encode(np.squeeze(part), lossless=True),
    52546: lambda part: imagecodecs.jpegxl_encode(np.squeeze(part), lossless=True),
}


def parts(pixels, tile=TILE):
    """The tiles of `pixels` of any number of samples, padded with 77."""
    width, height = tile
    for y in range(0, pixels.shape[0], height):
        for x in range(0, pixels.shape[1], width):
            whole = np.full((height, width, pixels.shape[2]), 77, np.uint8)
            part = pixels[y : y + height, x : x + width]
            whole[: part.shape[0], : part.shape[1]] = part
            yield whole


def tiled(pixels, compression, *, planar=False, extra=None, tags=None, encode=None, subfiletype=0):
    """A tiled page of these samples; each plane for itself where it is planar."""
    height, width, samples = pixels.shape
    encode = encode or ENCODE[compression]
    cut = list(parts(pixels))
    if planar:
        chunks = [
            encode(np.ascontiguousarray(part[..., n : n + 1]))
            for n in range(samples)
            for part in cut
        ]
    else:
        chunks = [encode(part) for part in cut]
    all_tags = {
        254: (tiff.LONG, subfiletype), 256: (tiff.LONG, width), 257: (tiff.LONG, height),
        258: (tiff.SHORT, [8] * samples), 259: (tiff.SHORT, compression), 262: (tiff.SHORT, 2),
        277: (tiff.SHORT, samples), 284: (tiff.SHORT, 2 if planar else 1),
        322: (tiff.LONG, TILE[0]), 323: (tiff.LONG, TILE[1]), **resolution_tags(0.25),
    }  # fmt: skip
    if extra is not None:
        all_tags[338] = (tiff.SHORT, extra)
    return tiff.Page(all_tags | (tags or {}), chunks)


def write(path, compression, *, pixels=None, levels=(1, 2), **options):
    base = texture(*SIZE) if pixels is None else pixels
    pages = [
        tiled(shrunk(base, k) if k > 1 else base, compression, subfiletype=k > 1, **options)
        for k in levels
    ]
    tiff.write_pages(path, pages)
    return base


def whole_level(slide, level):
    return read_level(slide.reader, level, 1, (0, 0), slide.level_dimensions[level])


def with_alpha(*, multiplied):
    """(pixels on white, RGBA) with an alpha of 0, of 255, and of all between."""
    colours = texture(*SIZE).astype(float)
    alpha = np.tile(np.linspace(-80, 335, SIZE[0]).clip(0, 255).round(), (SIZE[1], 1))[..., None]
    shown = colours * alpha / 255
    stored = np.rint(shown) if multiplied else colours
    rgba = np.concatenate([stored, alpha], 2).astype(np.uint8)
    return np.rint(shown + 255 - alpha).astype(np.uint8), rgba


@pytest.mark.parametrize("planar", [True, False], ids=["planes", "interleaved"])
@pytest.mark.parametrize("compression", ENCODE)
def test_pixels_are_those_of_tifffile_and_of_the_source(tmp_path, compression, planar):
    path = tmp_path / "a.tif"
    base = write(path, compression, planar=planar)
    with Slide(path) as slide, tifffile.TiffFile(path) as other:
        fast = not planar and compression in (1, 5, DEFLATE, 32773, ZSTD)
        assert type(slide.reader) is (TiffReader if fast else TiffSlideReader)
        assert slide.mpp == 0.25
        assert slide.level_dimensions == (SIZE, (210, 150))
        for level in (0, 1):
            theirs = other.pages[level].asarray()
            theirs = np.moveaxis(theirs, 0, -1) if planar else theirs
            ours = whole_level(slide, level)
            assert np.array_equal(ours, theirs)
            assert np.array_equal(ours, shrunk(base, 1 + level))
        half = read_level(slide.reader, 0, 2, (0, 0), (210, 150))
        assert difference(half, shrunk(base, 2)).max() <= 1


@pytest.mark.parametrize("compression", [1, DEFLATE])
def test_planes_are_openslides_too(tmp_path, compression):
    path = tmp_path / "a.tif"
    write(path, compression, planar=True)
    with Slide(path) as slide:
        theirs, alpha = level_pixels(path, SIZE)
        assert (alpha == 255).all()
        assert np.array_equal(whole_level(slide, 0), theirs)


@pytest.mark.parametrize("planar", [True, False], ids=["planes", "interleaved"])
def test_a_predictor_and_planes(tmp_path, planar):
    path = tmp_path / "a.tif"

    def encode(part):
        return imagecodecs.zlib_encode(imagecodecs.delta_encode(part, axis=1).tobytes())

    base = write(path, DEFLATE, planar=planar, encode=encode, tags={317: (tiff.SHORT, 2)})
    with Slide(path) as slide:
        assert np.array_equal(whole_level(slide, 0), base)


@pytest.mark.parametrize("planar", [True, False], ids=["planes", "interleaved"])
@pytest.mark.parametrize("extra", [UNSPECIFIED, ASSOCIATED, STRAIGHT])
def test_alpha_is_on_white(tmp_path, extra, planar):
    path = tmp_path / "a.tif"
    expected, rgba = with_alpha(multiplied=extra != STRAIGHT)
    write(path, DEFLATE, pixels=rgba, levels=(1,), extra=extra, planar=planar)
    with Slide(path) as slide:
        ours = whole_level(slide, 0)
        assert difference(ours, expected).max() <= 1
        theirs, _ = level_pixels(path, SIZE)
        assert difference(ours, theirs).max() <= 1
        assert (ours[:, 0] == 255).all()


def test_alpha_without_a_kind_that_colours_are_not_multiplied_by_is_on_white(tmp_path):
    path = tmp_path / "a.tif"
    expected, rgba = with_alpha(multiplied=False)
    write(path, DEFLATE, pixels=rgba[:, 128:], levels=(1,), extra=UNSPECIFIED)
    with Slide(path) as slide:
        assert difference(whole_level(slide, 0), expected[:, 128:]).max() <= 1


@pytest.mark.parametrize(
    ("extra", "seen"), [(UNSPECIFIED, "0 everywhere"), (ASSOCIATED, "brighter than their alpha")]
)
def test_a_fourth_sample_that_cannot_be_alpha_hides_no_tissue(tmp_path, extra, seen):
    rgbx = np.dstack([texture(*SIZE), np.zeros(SIZE[::-1], np.uint8)])
    write(tmp_path / "a.tif", DEFLATE, pixels=rgbx, levels=(1,), extra=extra)
    with (
        Slide(tmp_path / "a.tif") as slide,
        pytest.raises(DamagedSlideError, match=rf"tile 0 .*{seen}"),
    ):
        whole_level(slide, 0)


def test_bits_in_reverse_order_are_turned(tmp_path):
    path = tmp_path / "a.tif"

    def encode(part):
        return bytes(imagecodecs.bitorder_encode(part.tobytes()))

    base = write(path, 1, encode=encode, levels=(1,), tags={266: (tiff.SHORT, 2)})
    with Slide(path) as slide:
        assert np.array_equal(whole_level(slide, 0), base)
        assert np.array_equal(base, tifffile.imread(path))


def test_an_ome_tiff_in_planes_is_in_colour(tmp_path):
    path, base = tmp_path / "a.ome.tif", texture(*SIZE)
    tifffile.imwrite(
        path, np.moveaxis(base, -1, 0), photometric="rgb", planarconfig="separate", ome=True,
        tile=TILE[::-1], compression="zlib",
        metadata={"axes": "CYX", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5},
    )  # fmt: skip
    with Slide(path) as slide:
        assert (slide.format, slide.mpp) == ("ome-tiff", 0.5)
        assert np.array_equal(whole_level(slide, 0), base)


def test_strips_of_planes_with_a_shorter_last_one(tmp_path):
    path, base = tmp_path / "a.tif", texture(*SIZE)
    tifffile.imwrite(
        path, np.moveaxis(base, -1, 0), photometric="rgb", planarconfig="separate",
        rowsperstrip=64, compression="zlib", resolution=(40_000, 40_000), resolutionunit=3,
    )  # fmt: skip
    with Slide(path) as slide:
        assert np.array_equal(whole_level(slide, 0), base)


def test_tiles_of_png_that_end_with_the_image(tmp_path):
    base = texture(*SIZE)
    whole = tiled(base, PNG)
    width, height = TILE
    whole.chunks = [
        imagecodecs.png_encode(np.ascontiguousarray(base[y : y + height, x : x + width]))
        for y in range(0, SIZE[1], height)
        for x in range(0, SIZE[0], width)
    ]
    tiff.write_pages(tmp_path / "a.tif", [whole])
    with Slide(tmp_path / "a.tif") as slide:
        assert np.array_equal(whole_level(slide, 0), base)


@pytest.mark.parametrize("planar", [True, False], ids=["planes", "interleaved"])
def test_tiles_declared_empty_show_the_finer_level_and_then_white(tmp_path, planar):
    path, base = tmp_path / "a.tif", texture(*SIZE)
    pages = [tiled(base, PNG, planar=planar), tiled(shrunk(base, 2), PNG, planar=planar)]
    for number, index in ((0, 5), (1, 0)):
        chunks = pages[number].chunks
        for at in range(index, len(chunks), len(chunks) // (3 if planar else 1)):
            chunks[at] = None
    tiff.write_pages(path, pages)
    with Slide(path) as slide:
        assert [level.empty_tiles for level in slide.reader.levels] == [1, 1]
        assert (whole_level(slide, 0)[96:192, 128:256] == 255).all()
        shown = read_level(slide.reader, 1, 1, (0, 0), (64, 48))
        assert difference(shown, shrunk(base, 2)[:48, :64]).max() <= 1


def test_a_tile_that_lacks_one_of_its_planes_is_damaged(tmp_path):
    whole = tiled(texture(*SIZE), PNG, planar=True)
    whole.chunks[5] = None
    tiff.write_pages(tmp_path / "a.tif", [whole])
    with (
        Slide(tmp_path / "a.tif") as slide,
        pytest.raises(DamagedSlideError, match="tile 5 of level 0 has 2 of its 3 planes"),
    ):
        whole_level(slide, 0)


CASES = [(n, planar) for n in (DEFLATE, ZSTD, PNG, JPEG_XL) for planar in (True, False)]


@pytest.mark.parametrize(("compression", "planar"), [*CASES, (JPEG_XL, None)])
def test_each_sector_that_is_lost_is_an_error_that_names_the_tile(tmp_path, compression, planar):
    path = tmp_path / "a.tif"
    # Without planes deflate and Zstandard are the fast reader's.
    extra = {} if planar else {"extra": STRAIGHT if compression in (PNG, JPEG_XL) else ASSOCIATED}
    rgba = np.dstack([texture(*SIZE), np.full(SIZE[::-1], 255, np.uint8)])
    lossy = partial(imagecodecs.jpegxl_encode, distance=1.0)
    write(
        path, compression, pixels=rgba if extra else None, levels=(1,), planar=bool(planar),
        encode=lossy if planar is None else None, **extra,
    )  # fmt: skip
    with Slide(path) as slide:
        reader = slide.reader
        assert isinstance(reader, TiffSlideReader)
        (chunk,) = reader.read_tile_bytes(0, [5])
        good = reader.decode(0, chunk, 1)
        head = 4 * (4 if planar else 2)
        rng = np.random.default_rng(0)
        for start in rng.integers(head, len(chunk) - 512, 25):
            lost = chunk[:start] + bytes(512) + chunk[start + 512 :]
            with pytest.raises(DamagedSlideError):
                reader.decode(0, lost, 1)
        assert np.array_equal(reader.decode(0, chunk, 1), good)
    data = path.read_bytes()
    at = data.index(chunk[-700:])
    path.write_bytes(data[:at] + bytes(600) + data[at + 600 :])
    with (
        Slide(path) as slide,
        pytest.raises(DamagedSlideError, match=r"tile 5 \(row 1, column 1\) of level 0"),
    ):
        whole_level(slide, 0)


@pytest.mark.parametrize("compression", [PNG, JPEG_XL])
def test_a_tile_that_says_it_is_huge_takes_no_memory(tmp_path, compression):
    whole = tiled(texture(*SIZE), compression)
    if compression == PNG:
        chunk = bytearray(whole.chunks[0])
        chunk[16:24] = struct.pack(">2I", 1 << 30, 1 << 30)
        seen = "1073741824x1073741824 px"
    else:
        # Not small, and both sides as numbers of 30 bits: selector 3, all bits set.
        bits = 0 | (0b11 | ((1 << 30) - 1) << 2) << 1 | (0b11 | ((1 << 30) - 1) << 2) << 36
        chunk = b"\xff\x0a" + bits.to_bytes(16, "little")
        seen = "1073741824x1073741824 px"
    whole.chunks = [bytes(chunk), *whole.chunks[1:]]
    tiff.write_pages(tmp_path / "a.tif", [whole])
    with Slide(tmp_path / "a.tif") as slide, pytest.raises(DamagedSlideError, match=seen):
        whole_level(slide, 0)


@pytest.mark.parametrize("shape", [(96, 128), (48, 64), (1, 128), (1000, 37), (300, 400), (8, 8)])
@pytest.mark.parametrize("container", [False, True])
def test_the_size_of_a_jpeg_xl_is_read_from_its_header(shape, container):
    from xmag.slide.integrity import jpeg_xl_size

    pixels = np.resize(texture(64, 48), (*shape, 3)).astype(np.uint8)
    stream = imagecodecs.jpegxl_encode(pixels, lossless=True, usecontainer=container)
    assert stream.startswith(b"\0\0\0\x0cJXL ") == container
    assert jpeg_xl_size(stream) == shape[::-1]


def test_an_animation_is_no_tile():
    from xmag.slide.integrity import jpeg_xl_size

    frames = np.stack([texture(*TILE, seed=n) for n in range(3)])
    stream = imagecodecs.jpegxl_encode(frames, lossless=True)
    with pytest.raises(DamagedSlideError, match="animated"):
        jpeg_xl_size(stream)


def jpeg_plane(part):
    return imagecodecs.jpeg8_encode(np.ascontiguousarray(part[..., 0]), level=80)


REFUSED = {
    "JPEG XR": (34934, {"encode": imagecodecs.jpegxr_encode}, "JPEG XR.*lost bytes"),
    "JPEG in planes": (7, {"planar": True, "encode": jpeg_plane}, r"JPEG .*lost bytes"),
    "JPEG 2000 in planes": (
        34712,
        {"planar": True, "encode": lambda p: imagecodecs.jpeg2k_encode(np.squeeze(p))},
        r"JPEG 2000 .*lost bytes",
    ),
    "JPEG of DNG": (
        34892,
        {"encode": lambda p: imagecodecs.jpeg8_encode(p, level=80)},
        r"JPEG .*34892.*lost bytes",
    ),
    "WebP with alpha": (
        50001,
        {"extra": ASSOCIATED, "encode": lambda p: imagecodecs.webp_encode(p, level=80)},
        r"WebP .*lost bytes",
    ),
    "LERC": (34887, {"encode": imagecodecs.lerc_encode}, "compression 34887"),
    "LZMA": (34925, {"encode": lambda p: imagecodecs.lzma_encode(p.tobytes())}, "34925"),
    "YCbCr in planes": (8, {"planar": True, "tags": {262: (tiff.SHORT, 6)}}, "YCBCR"),
    "predictor": (8, {"planar": True, "tags": {317: (tiff.SHORT, 3)}}, "SEPARATE"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_still_refused_says_why(tmp_path, name):
    compression, options, reason = REFUSED[name]
    pixels = with_alpha(multiplied=True)[1] if "extra" in options else None
    write(tmp_path / "a.tif", compression, pixels=pixels, levels=(1,), **options)
    with pytest.raises(UnsupportedSlideError, match=rf"a\.tif: .*{reason}.*Convert"):
        Slide(tmp_path / "a.tif")


SILENT = {
    "JPEG XR": imagecodecs.jpegxr_decode,
    "JPEG in planes": imagecodecs.jpeg_decode,
    "JPEG 2000 in planes": imagecodecs.jpeg2k_decode,
    "JPEG of DNG": imagecodecs.jpeg8_decode,
    "WebP with alpha": imagecodecs.webp_decode,
}


@pytest.mark.parametrize("name", SILENT)
def test_what_is_refused_for_its_decoder_has_a_decoder_that_makes_up_pixels(name):
    """The reason that is given is true: bytes lost from a tile are no error."""
    encode, part, decode = REFUSED[name][1]["encode"], texture(*TILE), SILENT[name]
    if name == "WebP with alpha":
        part = np.dstack([part, part[..., :1]])
    stream = encode(part[..., :1] if name.endswith("planes") else part)
    at = len(stream) * 2 // 3
    length = min(512, len(stream) - at - 20)
    lost = decode(stream[:at] + bytes(length) + stream[at + length :])
    assert lost.shape == decode(stream).shape
    assert (lost != decode(stream)).any()


@pytest.mark.parametrize("compression", [DEFLATE, PNG])
def test_strips_of_no_rows_are_damage(tmp_path, compression):
    whole = tiled(texture(*SIZE), compression, planar=True, tags={278: (tiff.LONG, 0)})
    tags = {code: value for code, value in whole.tags.items() if code not in (322, 323)}
    tiff.write_pages(tmp_path / "a.tif", [tiff.Page(tags, whole.chunks, tiled=False)])
    with pytest.raises(DamagedSlideError, match=r"a\.tif: "):
        Slide(tmp_path / "a.tif")


def test_labels_beside_a_scan_of_png_never_become_levels(tmp_path):
    path, base = tmp_path / "a.tif", texture(*SIZE)
    label = strip_page(texture(90, 60, seed=3), description="label", subfiletype=1)
    pages = [label, tiled(base, PNG), tiled(shrunk(base, 2), PNG)]
    tiff.write_pages(path, pages)
    with Slide(path) as slide:
        assert slide.level_dimensions == (SIZE, (210, 150))
        assert list(slide.associated_images) == ["label"]
        shown = np.asarray(slide.associated_images["label"])
        assert np.array_equal(shown, texture(90, 60, seed=3))


def test_a_slide_that_mixes_codings_keeps_its_jpeg_fast_and_strict(tmp_path):
    path, base = tmp_path / "a.tif", texture(*SIZE)
    pages = [page(base, tile=TILE, color="ycbcr420"), tiled(shrunk(base, 2), JPEG_XL)]
    tiff.write_pages(path, pages)
    with Slide(path) as slide:
        assert isinstance(slide.reader, TiffSlideReader)
        assert difference(whole_level(slide, 0), level_pixels(path, SIZE)[0]).max() <= 1
        assert np.array_equal(whole_level(slide, 1), shrunk(base, 2))
        (chunk,) = slide.reader.read_tile_bytes(0, [0])
        with pytest.raises(DamagedSlideError):
            slide.reader.decode(0, chunk[: len(chunk) // 2], 1)


@pytest.fixture(scope="module")
def png_slide(tmp_path_factory):
    path = tmp_path_factory.mktemp("png") / "a.tif"
    write(path, PNG, pixels=texture(900, 700), tags=resolution_tags(2.0), levels=(1,))
    return path


def test_features_by_threads_after_pickling_and_by_url_are_the_same(png_slide):
    options = {"model": ColourEncoder(), "tissue": None}
    expected = extract_features(png_slide, **options)
    assert len(expected) > 4
    with Slide(png_slide) as slide:
        again = pickle.loads(pickle.dumps(slide))
        with ThreadPoolExecutor(8) as pool:
            bags = list(pool.map(lambda _: extract_features(again, **options), range(8)))
        again.close()
    with serve_folder(png_slide.parent) as server:
        bags.append(extract_features(f"{server.url}/a.tif", **options))
    for bag in bags:
        assert np.array_equal(bag.coords, expected.coords)
        assert np.array_equal(bag.features, expected.features)


def test_tiffslide_is_imported_only_where_it_reads(tmp_path, png_slide):
    write_svs(tmp_path / "a.svs", size=SIZE, levels=(1,))
    code = (
        "import sys, xmag; from xmag import Slide\n"
        f"Slide({str(tmp_path / 'a.svs')!r}).thumbnail()\n"
        "assert not {'tiffslide', 'zarr', 'fsspec'} & set(sys.modules)\n"
        f"Slide({str(png_slide)!r}).thumbnail()\n"
        "assert 'tiffslide' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


OPENED = {
    "TiffSlide": tiffslide.TiffSlide,
    "TiffSlide of a file object": lambda path: tiffslide.TiffSlide(path.open("rb")),
    "OpenSlide": openslide.OpenSlide,
}


@pytest.mark.parametrize("name", OPENED)
def test_an_open_slide_is_the_slide_of_its_file(tmp_path, name):
    path = tmp_path / "a.svs"
    write_svs(path, size=(700, 500), levels=(1, 2, 4))
    other = OPENED[name](path)
    try:
        with Slide(other) as slide, Slide(path) as expected:
            assert (slide.name, slide.mpp, slide.format) == ("a.svs", 0.25, "aperio")
            assert slide.level_dimensions == other.level_dimensions
            assert slide.fingerprint == expected.fingerprint
            assert np.array_equal(
                slide.read_region((300, 200), (200, 200)),
                expected.read_region((300, 200), (200, 200)),
            )
            theirs = np.asarray(other.read_region((0, 0), 2, slide.level_dimensions[2]))
            assert difference(whole_level(slide, 2), theirs[..., :3]).max() <= 2
            with pickle.loads(pickle.dumps(slide)) as again:
                assert again.dimensions == (700, 500)
        # It is still its owner's, and still open.
        assert other.read_region((0, 0), 0, (10, 10)).size == (10, 10)
    finally:
        other.close()
        if name.endswith("object"):
            other.ts_tifffile.filehandle._fh.close()


def test_a_tiffslide_without_a_file_of_this_machine_is_read_through(tmp_path):
    base = write_svs(
        tmp_path / "a.svs", size=(600, 500), levels=(1,), mpp=2.0, power=None, color="rgb444"
    )
    data = (tmp_path / "a.svs").read_bytes()
    store = fsspec.filesystem("memory")
    store.pipe("/slides/a.svs", data)
    with tiffslide.TiffSlide("memory://slides/a.svs") as other, Slide(other) as slide:
        assert (slide.name, slide.mpp, slide.fingerprint) == ("a.svs", 2.0, None)
        assert difference(whole_level(slide, 0), base).mean() < 4
        assert list(slide.associated_images) == ["thumbnail", "label", "macro"]
        with pytest.raises(InputError, match="another process"):
            pickle.dumps(slide)
        expected = extract_features(tmp_path / "a.svs", model=ColourEncoder(), tissue=None)
        with ThreadPoolExecutor(4) as pool:
            run = partial(extract_features, model=ColourEncoder(), tissue=None)
            both = pool.map(run, [slide] * 4)
            regions = pool.map(lambda _: other.read_region((0, 0), 0, (500, 500)), range(4))
            assert all(np.array_equal(bag.features, expected.features) for bag in both)
            assert len({region.tobytes() for region in regions}) == 1
    store.rm("/slides", recursive=True)


def test_damage_under_a_tiffslide_is_an_error_and_not_its_grey(tmp_path):
    write_svs(tmp_path / "a.svs", size=SIZE, levels=(1,))
    with Slide(tmp_path / "a.svs") as slide:
        (tile,) = slide.reader.read_tile_bytes(0, [1])
    data = (tmp_path / "a.svs").read_bytes().replace(tile[-900:], bytes(898) + b"\xff\xd9")
    file = io.BytesIO(data)
    with tiffslide.TiffSlide(file) as other:
        other.read_region((0, 0), 0, SIZE)  # without an error
        with Slide(other) as slide:
            with pytest.raises(DamagedSlideError, match="tile 1 "):
                whole_level(slide, 0)
            file.close()
            with pytest.raises(ClosedSlideError, match="TiffSlide"):
                whole_level(slide, 0)


def test_an_open_slide_that_is_closed_or_has_no_file_is_an_error(tmp_path):
    write_svs(tmp_path / "a.svs", size=SIZE, levels=(1,))
    other = tiffslide.TiffSlide(tmp_path / "a.svs")
    other.close()
    with pytest.raises(ClosedSlideError, match="TiffSlide is closed"):
        Slide(other)
    imagecodecs.imwrite(tmp_path / "a.png", texture(*SIZE))
    with (
        tiffslide.NotTiffSlide(tmp_path / "a.png") as plain,
        pytest.raises(InputError, match="path of its file"),
    ):
        Slide(plain)
