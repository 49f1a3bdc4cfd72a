"""`properties` and `associated_images`: what a file holds beside its scan."""

import gc
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile
from PIL import Image, PngImagePlugin
from support.fake_reader import FakeRegionReader, noise
from support.range_server import serve_folder
from support.slides import JPEG, encode_jpeg, page, strip_page, texture, write_svs, write_tiff
from support.tiff import ASCII, write_pages
from support.vendor_slides import write_ndpi, write_ome, write_philips, write_scn, write_ventana

import xmag
from xmag.errors import ClosedSlideError, DamagedSlideError, UnsupportedSlideError

REAL = ("cmu-1-small-region.svs", "tcga-cr-7395-01a-01-ts1.svs")
LABEL = texture(120, 90, seed=7)


def write_named(path: Path) -> None:
    """A pyramid with pages that say what they are, and one that does not."""
    base = texture(700, 500)
    pages = [
        page(base, tile=(128, 128)),
        page(base[::2, ::2].copy(), tile=(128, 128), subfiletype=1),
        strip_page(LABEL, description="Label", subfiletype=1),
        page(texture(130, 150, seed=2), tile=(64, 64), color="lzw", subfiletype=9),
        strip_page(texture(80, 70, seed=3)),
    ]
    write_pages(path, pages)


WRITERS: dict[str, tuple[Callable[[Path], object], set[str]]] = {
    "s.svs": (write_svs, {"thumbnail", "label", "macro"}),
    "p.tiff": (write_philips, {"label", "macro"}),
    "l.scn": (write_scn, {"macro"}),
    "v.bif": (write_ventana, {"label"}),
    "h.ndpi": (write_ndpi, {"macro"}),
    "o.ome.tif": (write_ome, {"label"}),
    "g.tif": (write_named, {"label", "macro", "other"}),
    "t.tif": (write_tiff, set()),
    "strips.tif": (lambda path: write_pages(path, [strip_page(texture(300, 200))]), set()),
}
"""Slides of each vendor, and the images in them beside the scan."""


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slides")
    for name, (write, _) in WRITERS.items():
        write(folder / name)
    return folder


def opened(path: Path) -> xmag.Slide:
    return xmag.Slide(path, mpp=0.25, region=0)


@pytest.mark.parametrize("name", WRITERS)
def test_associated_images_are_those_that_tifffile_decodes(slides: Path, name: str) -> None:
    with tifffile.TiffFile(slides / name) as tiff, opened(slides / name) as slide:
        images = dict(slide.associated_images)
        assert images.keys() == WRITERS[name][1]
        pages = [np.asarray(found.asarray()) for found in tiff.pages]
        for image in images.values():
            assert image.mode == "RGB"
            same = [p for p in pages if p.shape == (image.height, image.width, 3)]
            assert any(np.abs(p.astype(int) - np.asarray(image)).max() <= 2 for p in same)


@pytest.mark.parametrize("name", ["s.svs", "p.tiff", "l.scn", "h.ndpi"])
def test_associated_images_are_openslides(slides: Path, name: str) -> None:
    with openslide.OpenSlide(slides / name) as theirs, opened(slides / name) as slide:
        assert set(slide.associated_images) == set(theirs.associated_images)
        for kind, image in slide.associated_images.items():
            expected = np.asarray(theirs.associated_images[kind].convert("RGB"), int)
            assert np.abs(expected - np.asarray(image)).max() <= 2


@pytest.mark.parametrize("name", ["s.svs", "t.tif"])
def test_properties_are_openslides(slides: Path, name: str) -> None:
    check_properties(slides / name)


@pytest.mark.shared
@pytest.mark.parametrize("name", REAL)
def test_real_properties_are_openslides(shared: Path, name: str) -> None:
    check_properties(shared / "slides" / name)


def check_properties(path: Path) -> None:
    with openslide.OpenSlide(path) as theirs, xmag.Slide(path) as slide:
        found = dict(slide.properties)
        for key, value in theirs.properties.items():
            if key.startswith("aperio.") or (key.startswith("tiff.") and key in found):
                assert found[key].strip() == value.strip()
        assert ("tiff.ImageDescription" in found) == (path.suffix == ".svs")


@pytest.mark.shared
@pytest.mark.parametrize("name", REAL)
def test_real_associated_images_are_openslides(shared: Path, name: str) -> None:
    path = shared / "slides" / name
    with openslide.OpenSlide(path) as theirs, xmag.Slide(path) as slide:
        assert set(slide.associated_images) == set(theirs.associated_images)
        for kind, image in slide.associated_images.items():
            expected = np.asarray(theirs.associated_images[kind].convert("RGB"), int)
            assert np.abs(expected - np.asarray(image)).max() <= 2


def test_texts_of_the_first_page_are_there_where_that_is_no_level(slides: Path) -> None:
    with opened(slides / "v.bif") as slide:
        assert "<iScan" in slide.properties["tiff.page-0.XMP"]
        assert "EncodeInfo" in slide.properties["tiff.XMP"]
        assert slide.properties["tiff.page-0.Software"].startswith("ScanOutputManager")


def test_openslides_own_formats_have_openslides(tmp_path: Path) -> None:
    path = tmp_path / "overlap.bif"
    write_ventana(path, grid=(3, 2), tile=128, levels=(1, 2), overlap=8)
    with openslide.OpenSlide(path) as theirs, xmag.Slide(path) as slide:
        assert dict(slide.properties) == dict(theirs.properties)
        assert set(slide.associated_images) == set(theirs.associated_images) == {"macro"}
        expected = np.asarray(theirs.associated_images["macro"].convert("RGB"))
        assert np.array_equal(np.asarray(slide.associated_images["macro"]), expected)
        images = slide.associated_images
    with pytest.raises(ClosedSlideError):
        images["macro"]


def test_plain_images_have_their_texts_and_no_other_image(tmp_path: Path) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("Title", "a section")
    info.add_text("Comment", "packed", zip=True)
    Image.fromarray(noise(60, 50)).save(tmp_path / "a.png", pnginfo=info)
    Image.fromarray(noise(60, 50)).save(tmp_path / "a.jpg", comment=b"of a section")
    with xmag.Slide(tmp_path / "a.png") as slide:
        assert dict(slide.properties) == {"png.Title": "a section", "png.Comment": "packed"}
        assert dict(slide.associated_images) == {}
    with xmag.Slide(tmp_path / "a.jpg") as slide:
        assert dict(slide.properties) == {"jpeg.comment": "of a section"}


def test_a_text_that_unpacks_to_more_than_any_is_refused(tmp_path: Path) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "x" * 20_000_000, zip=True)
    pixels = noise(60, 50)
    Image.fromarray(pixels).save(tmp_path / "a.png", pnginfo=info)
    with xmag.Slide(tmp_path / "a.png") as slide:
        assert np.array_equal(slide.read_region((0, 0), (60, 50)), pixels)
        with pytest.raises(DamagedSlideError, match=r"a\.png is damaged \(ValueError\)"):
            _ = slide.properties


def test_a_reader_without_them_has_none() -> None:
    slide = xmag.Slide.from_reader(FakeRegionReader(noise(50, 40)), name="fake")
    assert dict(slide.properties) == {}
    assert dict(slide.associated_images) == {}


def test_a_closed_slide_reads_nothing_more(slides: Path) -> None:
    slide = opened(slides / "s.svs")
    images = slide.associated_images
    slide.close()
    with pytest.raises(ClosedSlideError):
        images["label"]
    with pytest.raises(ClosedSlideError):
        _ = slide.properties
    with pytest.raises(ClosedSlideError):
        _ = slide.associated_images


def test_only_what_is_asked_for_is_read(
    slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A label that cannot be decoded does no harm until it is looked up, nor to the others."""
    data = bytearray((slides / "g.tif").read_bytes())
    with tifffile.TiffFile(slides / "g.tif") as tiff:
        macro = tiff.pages[3]
        data[macro.dataoffsets[0] : macro.dataoffsets[0] + 40] = b"\xff" * 40
    (tmp_path / "g.tif").write_bytes(data)
    with opened(tmp_path / "g.tif") as slide:
        slide.thumbnail(max_px=64)
        images = slide.associated_images
        assert np.array_equal(np.asarray(images["label"]), LABEL)
        with pytest.raises(DamagedSlideError, match=r"^g\.tif, macro: "):
            images["macro"]
    wanted = ["label", "macro"]
    with opened(slides / "g.tif") as slide:
        reader = slide.reader
        read: list[object] = []
        taken = reader.source.read_many
        monkeypatch.setattr(reader.source, "read_many", lambda r: read.append(r) or taken(r))
        slide.read_region((0, 0), (60, 60))
        _ = dict(slide.properties)
        names = list(slide.associated_images)
        assert len(read) == 1
        assert {*wanted} < {*names}


def test_a_label_that_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    label = page(LABEL, tile=(128, 128), description="Label", size=(120, 90))
    label.tags |= {256: (4, 100_000), 257: (4, 90_000)}
    write_pages(tmp_path / "s.tif", [page(texture(300, 200), tile=(128, 128)), label])
    with (
        opened(tmp_path / "s.tif") as slide,
        pytest.raises(UnsupportedSlideError, match="100000x90000 px; expected at most"),
    ):
        _ = slide.associated_images["label"]


def test_neither_a_repr_nor_a_pickle_holds_any_of_it(slides: Path) -> None:
    with opened(slides / "s.svs") as slide:
        properties, images = slide.properties, slide.associated_images
        assert properties["aperio.AppMag"] == "40"
        assert images["label"].size == (120, 90)
        assert repr(properties) == f"<{len(properties)} properties of 's.svs'>"
        assert repr(images) == "<3 associated images of 's.svs'>"
        assert b"Aperio Image Library" not in pickle.dumps(slide)
        del properties, images
        gc.collect()
        assert "Aperio Image Library" not in repr(vars(slide.reader))


def test_a_remote_slide_has_them_too(slides: Path, tmp_path: Path) -> None:
    shutil.copy(slides / "s.svs", tmp_path / "s.svs")
    with (
        serve_folder(tmp_path) as server,
        xmag.Slide(f"{server.url}/s.svs") as there,
        opened(slides / "s.svs") as here,
    ):
        assert dict(there.properties) == dict(here.properties)
        for kind, image in here.associated_images.items():
            assert there.associated_images[kind] == image


def test_a_jpeg_label_in_strips_is_read(tmp_path: Path) -> None:
    label = strip_page(LABEL, rows=64, description="Label")
    strips = [
        encode_jpeg(LABEL[:64].copy(), "ycbcr420"),
        encode_jpeg(LABEL[64:].copy(), "ycbcr420"),
    ]
    label.tags |= {259: (3, JPEG), 262: (3, 6), 530: (3, [2, 2]), 305: (ASCII, "x")}
    label.chunks = strips
    write_pages(tmp_path / "s.tif", [page(texture(300, 200), tile=(128, 128)), label])
    with tifffile.TiffFile(tmp_path / "s.tif") as tiff, opened(tmp_path / "s.tif") as slide:
        expected = tiff.pages[1].asarray().astype(int)
        assert np.abs(expected - np.asarray(slide.associated_images["label"])).max() <= 2
