"""Paths that are no slides, files that are plain images, and parts that are not installed."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.oracle import difference
from support.slides import texture, write_svs
from support.vendor_slides import write_ventana

from xmag.errors import (
    ClosedSlideError,
    DamagedSlideError,
    InputError,
    MissingExtraError,
    SlideError,
    SlideScaleError,
    UnsupportedSlideError,
)
from xmag.slide import Slide


def test_a_missing_file(tmp_path):
    with pytest.raises(SlideError, match=r"no file .*nothing\.svs"):
        Slide(tmp_path / "nothing.svs")


def test_a_folder(tmp_path):
    with pytest.raises(SlideError, match="is a folder"):
        Slide(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("name", ["a.svs", "a.mrxs", "a.png"])
def test_a_named_pipe_is_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(UnsupportedSlideError, match=rf"{name} is a named pipe; expected a file"):
        Slide(tmp_path / name)
    (tmp_path / "link.svs").symlink_to("/dev/zero")
    with pytest.raises(UnsupportedSlideError, match=r"link\.svs is a device"):
        Slide(tmp_path / "link.svs")


def test_what_openslide_says_names_no_folder(tmp_path, monkeypatch):
    """Of a Hamamatsu slide it names the picture that is missing, with its whole path."""
    openslide = pytest.importorskip("openslide")
    folder = tmp_path / "secret"
    folder.mkdir()
    (folder / "a.vms").write_text(
        "[Virtual Microscope Specimen]\nNoLayers=1\nNoJpegColumns=1\nNoJpegRows=1\n"
        "ImageFile=x.jpg\nMapFile=m.jpg\nMacroImage=m.jpg\n"
    )
    with pytest.raises(openslide.OpenSlideError, match="secret"):
        openslide.OpenSlide(folder / "a.vms")
    monkeypatch.chdir(tmp_path)
    for given in (folder / "a.vms", Path("secret/a.vms")):
        with pytest.raises(DamagedSlideError, match=r"open m\.jpg: No such file") as caught:
            Slide(given)
        assert caught.value.__cause__ is None
        assert "secret" not in str(caught.value)


def test_an_empty_file(tmp_path):
    (tmp_path / "a.svs").touch()
    with pytest.raises(DamagedSlideError, match=r"a\.svs is empty"):
        Slide(tmp_path / "a.svs")


@pytest.mark.parametrize("content", [b"hello, this is text", bytes(500), b"II*", b"\xff\xd8"])
def test_something_else(tmp_path, content):
    (tmp_path / "a.svs").write_bytes(content)
    with pytest.raises(UnsupportedSlideError, match=r"a\.svs is not a slide"):
        Slide(tmp_path / "a.svs")


@pytest.mark.parametrize("rest", [b"", b"\xff" * 4, b"\x08\0\0\0", b"\x08\0\0\0\x05\0" + bytes(7)])
def test_a_tiff_header_without_a_tiff(tmp_path, rest):
    (tmp_path / "a.svs").write_bytes(b"II*\0" + rest)
    with pytest.raises(SlideError, match=r"a\.svs: .*(truncated or damaged|no image)"):
        Slide(tmp_path / "a.svs")


@pytest.mark.parametrize("name", ["Präparat 7 (höher).svs", "スライド.svs", "a b  c.svs"])
def test_any_name_will_do(tmp_path, name):
    folder = tmp_path / "dossier été"
    folder.mkdir()
    base = write_svs(folder / name, size=(260, 250), levels=(1,), color="rgb444")
    with Slide(str(folder / name)) as slide:
        assert slide.name == name
        assert difference(slide.read_region((0, 0), (260, 250)), base).mean() < 4


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_plain_images_are_read_with_an_mpp(tmp_path, suffix):
    pixels = texture(300, 200)
    Image.fromarray(pixels).save(tmp_path / f"a.{suffix}")
    with Slide(tmp_path / f"a.{suffix}", mpp=0.5) as slide:
        shown = np.asarray(Image.open(tmp_path / f"a.{suffix}"))
        assert difference(slide.read_region((10, 20), (50, 40)), shown[20:60, 10:60]).max() <= 1
        assert slide.read_region((0, 0), (75, 50), mpp=2.0).shape == (50, 75, 3)
    with Slide(tmp_path / f"a.{suffix}") as slide:
        assert slide.mpp is None
        with pytest.raises(SlideScaleError, match="mpp="):
            slide.read_region((0, 0), (75, 50), mpp=2.0)


def test_transparent_png_is_shown_on_white(tmp_path):
    rgba = np.dstack([texture(64, 64), np.zeros((64, 64), np.uint8)])
    Image.fromarray(rgba).save(tmp_path / "a.png")
    with Slide(tmp_path / "a.png") as slide:
        assert (slide.read_region((0, 0), (64, 64)) == 255).all()


@pytest.mark.parametrize(
    ("image", "seen"),
    [
        (Image.new("L", (9, 9)), "8-bit grey"),
        (Image.new("P", (9, 9)), "palette"),
        (Image.new("I;16", (9, 9)), "16-bit grey"),
        (Image.new("LA", (9, 9)), "grey and alpha"),
    ],
)
def test_plain_images_that_are_not_rgb_are_refused(tmp_path, image, seen):
    image.save(tmp_path / "a.png")
    with pytest.raises(UnsupportedSlideError, match=rf"a\.png is a PNG of .*{seen}"):
        Slide(tmp_path / "a.png")


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_jpegs_that_are_not_rgb_are_refused(tmp_path, mode):
    Image.new(mode, (9, 9)).save(tmp_path / "a.jpg")
    with pytest.raises(UnsupportedSlideError, match=r"a\.jpg is a JPEG of (Gray|CMYK|YCCK)"):
        Slide(tmp_path / "a.jpg")


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_cut_image_is_damage(tmp_path, suffix):
    Image.fromarray(texture(300, 200)).save(tmp_path / f"a.{suffix}")
    data = (tmp_path / f"a.{suffix}").read_bytes()
    for share in (0.01, 0.5, 0.95):
        (tmp_path / f"b.{suffix}").write_bytes(data[: max(20, int(len(data) * share))])
        with pytest.raises(DamagedSlideError), Slide(tmp_path / f"b.{suffix}") as slide:
            slide.read_region((0, 0), (10, 10))


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_pillows_limit_is_honoured_and_left_alone(tmp_path, suffix, monkeypatch):
    Image.fromarray(texture(300, 200)).save(tmp_path / f"a.{suffix}")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 59_999)
    with pytest.raises(UnsupportedSlideError, match=r"300x200 px.*59999.*pyramid"):
        Slide(tmp_path / f"a.{suffix}")
    assert Image.MAX_IMAGE_PIXELS == 59_999


def test_a_plain_image_holds_one_scan(tmp_path):
    Image.fromarray(texture(30, 20)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match="one image"):
        Slide(tmp_path / "a.png", region=1)


def test_a_closed_image_says_so(tmp_path):
    Image.fromarray(texture(30, 20)).save(tmp_path / "a.png")
    with Slide(tmp_path / "a.png") as slide:
        reader = slide.reader
    with pytest.raises(ClosedSlideError, match=r"a\.png is closed"):
        reader.read_region(0, (0, 0), (1, 1))


@pytest.fixture
def _no_openslide(monkeypatch):
    monkeypatch.setitem(sys.modules, "openslide", None)


@pytest.mark.usefixtures("_no_openslide")
def test_the_missing_extra_is_named_where_a_format_needs_it(tmp_path):
    write_ventana(tmp_path / "v.bif", grid=(2, 2), overlap=8)
    (tmp_path / "m.mrxs").write_bytes(b"\xff\xd8\xff\xe0" + bytes(200))
    for name in ("v.bif", "m.mrxs"):
        with pytest.raises(MissingExtraError, match=r'pip install "xmag\[openslide\]"'):
            Slide(tmp_path / name)


@pytest.mark.usefixtures("_no_openslide")
def test_an_unknown_file_is_refused_without_the_extra_too(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"hello")
    with pytest.raises(UnsupportedSlideError, match=r"neither TIFF, PNG nor JPEG.*openslide"):
        Slide(tmp_path / "a.txt")
