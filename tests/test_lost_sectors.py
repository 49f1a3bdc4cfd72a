"""Sectors of 512 bytes that read as zeros: in tiles, and in the tables that say where tiles lie."""

import io
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from fuzz.structure import chunks_of
from fuzz.tiffs import Editor
from PIL import Image, ImageFile
from support.slides import encode_jpeg, strip_page, texture, write_svs, write_tiff
from support.tiff import Page, write_pages
from support.vendor_slides import write_ndpi

from xmag.errors import DamagedSlideError
from xmag.slide import Slide, integrity

SECTOR = 512
SIZE = (700, 500)


def write_strips(path: Path) -> None:
    """A page in strips of JPEG, each with its own tables."""
    pixels = texture(*SIZE)
    page = strip_page(pixels, rows=64)
    strips = [
        encode_jpeg(np.ascontiguousarray(pixels[y : y + 64]), "ycbcr420")
        for y in range(0, SIZE[1], 64)
    ]
    tags = page.tags | {259: (3, 7), 262: (3, 6), 530: (3, [2, 2])}
    write_pages(path, [Page(tags, strips, tiled=False)])


def write_pillow(path: Path, **options: object) -> None:
    """Tiles whose Huffman tables are made for each of them."""
    base = texture(*SIZE)
    base[:, :200] = 243
    write_tiff(path, size=SIZE, levels=(1,), tile=(256, 256), pixels=base)
    editor = Editor(path.read_bytes())
    with Slide(path) as slide:
        for index, chunk in enumerate(
            chunks_of(editor.pristine, editor.map, editor.map.directories[0])
        ):
            data = slide.reader.read_tile_bytes(0, [index])[0]
            pixels = Image.fromarray(slide.reader.decode(0, data, 1))
            stream = io.BytesIO()
            pixels.save(stream, "jpeg", quality=90, **options)
            editor.put(chunk.offset_at, chunk.offset_size, editor.append(stream.getvalue()))
            editor.put(chunk.length_at, chunk.length_size, len(stream.getvalue()))
    path.write_bytes(bytes(editor.data))


WRITERS: dict[str, Callable[[Path], object]] = {
    "small.tif": partial(write_tiff, size=SIZE, levels=(1,), tile=(112, 112)),
    "a.tif": partial(write_tiff, size=SIZE, levels=(1,), tile=(256, 256), shared_tables=True),
    "422.tif": partial(write_tiff, size=SIZE, levels=(1,), color="ycbcr422"),
    "rgb.tif": partial(write_tiff, size=SIZE, levels=(1,), color="rgb444"),
    "optimised.tif": partial(write_pillow, optimize=True),
    "progressive.tif": partial(write_pillow, progressive=True),
    "strips.tif": write_strips,
    "a.ndpi": partial(write_ndpi, size=(640, 480), levels=(1,)),
}


@pytest.mark.parametrize("name", WRITERS)
def test_no_zeroed_sector_of_a_jpeg_becomes_pixels(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    WRITERS[name](path)
    whole, damaged = path.read_bytes(), 0
    with Slide(path, mpp=0.25) as slide, path.open("r+b", buffering=0) as file:
        reader = slide.reader
        count = reader.levels[0].tiles_across * reader.levels[0].tiles_down
        places = list(zip(reader._offsets[0], reader._lengths[0], strict=True))
        expected = [reader.decode(0, d, 1) for d in reader.read_tile_bytes(0, range(count))]
        for at in range(0, len(whole), SECTOR):
            hit = [i for i, (o, n) in enumerate(places) if o < at + SECTOR and at < o + n]
            os.pwrite(file.fileno(), bytes(len(whole[at : at + SECTOR])), at)
            for index in hit:
                try:
                    pixels = reader.decode(0, reader.read_tile_bytes(0, [index])[0], 1)
                except DamagedSlideError:
                    damaged += 1
                else:
                    np.testing.assert_array_equal(pixels, expected[index], f"{name} {index} {at}")
            os.pwrite(file.fileno(), whole[at : at + SECTOR], at)
    assert damaged > 100


def test_a_plain_jpeg_with_a_zeroed_sector_is_damaged(tmp_path: Path) -> None:
    stream = encode_jpeg(texture(512, 512), "ycbcr420")
    found = []
    for at in range(1024, len(stream) - SECTOR, 1500):
        path = tmp_path / f"{at}.jpg"
        path.write_bytes(stream[:at] + bytes(SECTOR) + stream[at + SECTOR :])
        with Slide(path) as slide, pytest.raises(DamagedSlideError, match="is damaged") as error:
            slide.read_region((0, 0), (10, 10))
        found.append("stretch of 122 zeros" in str(error.value))
    assert len(found) > 30
    assert all(found)


def test_the_limit_is_that_of_the_standard_tables() -> None:
    # ITU-T T.81, tables K.3 to K.6: of luma, zeros are "no step" (2 bits) and 63 times a value of
    # -1 (2 + 1 bits); of chroma, "no step" and "end of block" (2 bits each).
    luma, chroma = 2 + 63 * 3, 2 + 2
    for color, bits in (
        ("ycbcr420", 4 * luma + 2 * chroma + luma),
        ("ycbcr422", 2 * luma + 2 * chroma + luma),
    ):
        stream = encode_jpeg(texture(64, 64), color)
        header = stream[: integrity._end_of_header(stream)]
        assert len(integrity._unexplained(header)) == bits // 8 + 2


def _patterns() -> dict[str, np.ndarray]:
    y, x = np.mgrid[0:256, 0:256]
    return {
        "black": x * 0, "glass": x * 0 + 243, "white": x * 0 + 255, "ramp": 255 - x,
        "ramp down": 255 - y, "diagonal": (510 - x - y) // 2, "shade": 255 - x // 16,
        "saw": 255 - (x % 64) * 4, "checks": ((x // 8 + y // 8) % 2) * 255,
        "lines": (x % 2) * 255, "points": ((x % 8 == 0) & (y % 8 == 0)) * 255,
        "noise": np.random.default_rng(0).integers(0, 256, (256, 256)),
    }  # fmt: skip


@pytest.mark.parametrize("name", _patterns())
def test_flat_and_regular_images_are_not_taken_for_damaged(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageFile, "MAXBLOCK", 1 << 22)
    grey = _patterns()[name]
    for pixels in (np.stack([grey] * 3, -1), np.stack([grey, 255 - grey, grey // 2], -1)):
        image = Image.fromarray(pixels.astype(np.uint8))
        for quality in (10, 75, 100):
            for subsampling in ("4:4:4", "4:2:0"):
                for options in ({}, {"optimize": True}, {"progressive": True}):
                    stream = io.BytesIO()
                    image.save(stream, "jpeg", quality=quality, subsampling=subsampling, **options)
                    integrity.check_jpeg(stream.getvalue() + bytes(4096))  # padded, as by some


@pytest.mark.shared
def test_no_jpeg_of_real_tissue_is_taken_for_damaged(shared: Path) -> None:
    with Slide(shared / "slides" / "cmu-1-small-region.svs") as slide:
        level = slide.reader.levels[0]
        for data in slide.reader.read_tile_bytes(0, range(level.tiles_across * level.tiles_down)):
            slide.reader.decode(0, data, 2)
    paths = sorted((shared / "images").rglob("*.jpg"))
    assert len(paths) > 100
    for path in paths:
        integrity.check_jpeg(path.read_bytes())


def zero_table(path: Path, code: int, *, tiles: range) -> None:
    """Zero entries of the list of offsets (324) or byte counts (325) of a slide's first level."""
    editor = Editor(path.read_bytes())
    chunks = chunks_of(editor.pristine, editor.map, editor.map.directories[0])
    for index in tiles:
        chunk = chunks[index]
        at, size = {
            324: (chunk.offset_at, chunk.offset_size), 325: (chunk.length_at, chunk.length_size)
        }[code]  # fmt: skip
        editor.put(at, size, 0)
    path.write_bytes(bytes(editor.data))


@pytest.mark.parametrize("code", [324, 325])
@pytest.mark.parametrize("color", ["ycbcr420", "raw"])
def test_a_lost_sector_of_a_table_of_tiles_is_damage(tmp_path: Path, code: int, color: str) -> None:
    path = tmp_path / "a.tif"
    write_tiff(path, size=SIZE, levels=(1,), tile=(64, 64), color=color)
    zero_table(path, code, tiles=range(10, 20))
    with Slide(path) as slide:
        assert slide.reader.read_tile_bytes(0, [9, 20])
        for index in range(10, 20):
            with pytest.raises(DamagedSlideError, match="table of tiles is lost"):
                slide.reader.read_tile_bytes(0, [9, index])
        with pytest.raises(DamagedSlideError, match=r"a\.tif|tile 10 "):
            slide.thumbnail()


def test_tiles_that_are_declared_empty_are_counted(tmp_path: Path) -> None:
    # With neither bytes nor an offset, in any format; in Aperio's, whatever the offset is.
    write_tiff(tmp_path / "a.tif", size=SIZE, levels=(1, 2), missing={0: [3, 4]}, tile=(64, 64))
    write_svs(tmp_path / "a.svs", size=SIZE, levels=(1, 4))
    zero_table(tmp_path / "a.svs", 325, tiles=range(1, 4))
    for name, counts in (("a.tif", [2, 0]), ("a.svs", [3, 0])):
        with Slide(tmp_path / name) as slide:
            assert [level.empty_tiles for level in slide.reader.levels] == counts
            assert slide.reader.read_tile_bytes(0, [3]) == [None]
