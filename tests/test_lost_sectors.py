"""Sectors of 512 bytes that read as zeros: in tiles, and in the tables that say where tiles lie.

And what becomes of bags that were made before such a slide was repaired.
"""

import contextlib
import csv
import hashlib
import io
import os
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from fuzz.structure import chunks_of
from fuzz.tiffs import Editor
from PIL import Image, ImageFile
from support.encoders import ColourEncoder
from support.range_server import serve_folder
from support.slides import encode_jpeg, strip_page, texture, write_svs, write_tiff
from support.tiff import Page, write_pages
from support.vendor_slides import write_ndpi

from xmag.bag import FeatureBag
from xmag.cohort import CohortRow, extract_cohort
from xmag.cohort.resume import SEEN_NAME
from xmag.errors import DamagedSlideError, XmagWarning
from xmag.extract import extract_features
from xmag.geometry import TileSpec
from xmag.plan import plan_tiles
from xmag.provenance import file_fingerprint
from xmag.slide import Slide, integrity
from xmag.tiles.decoding import Reading
from xmag.tiles.stream import read_rows, reading_of
from xmag.tissue import find_tissue

ENCODER = ColourEncoder()
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


for coding in ("j2k-rgb", "j2k-ycbcr", "webp", "zstd", "deflate", "lzw"):
    WRITERS[f"{coding}.tif"] = partial(
        write_tiff, size=(500, 300), levels=(1,), tile=(112, 112), color=coding
    )


@pytest.mark.parametrize("name", WRITERS)
def test_no_zeroed_sector_becomes_pixels(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    WRITERS[name](path)
    whole, damaged = path.read_bytes(), 0
    with Slide(path, mpp=0.25) as slide, path.open("r+b", buffering=0) as file:
        reader = slide.reader
        count = reader.levels[0].tiles_across * reader.levels[0].tiles_down
        chunks = reader.read_tile_bytes(0, range(count))
        assert all(whole.count(chunk) == 1 for chunk in chunks)
        places = [(whole.index(chunk), len(chunk)) for chunk in chunks]
        expected = [reader.decode(0, chunk, 1) for chunk in chunks]
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
    assert damaged > 50


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
        header = stream[: integrity.end_of_header(stream)]
        assert len(integrity.limits(header)[1]) == bits // 8 + 2


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


def run(slides: object, out: Path, **options: Any) -> CohortRow:
    options = {"model": ENCODER, "tissue": None, "processes": 0} | options
    row: CohortRow = extract_cohort(slides, out, **options)[0]  # type: ignore[arg-type]
    return row


def recorded(path: Path) -> dict[str, Any]:
    """What the bag at `path` records of its slide's tiles."""
    bag = FeatureBag.load(path)
    assert bag.provenance is not None
    return dict(bag.provenance.record["source_tiles"])


def test_tiles_lost_from_the_table_of_an_aperio_file_are_warned_of_and_counted(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.svs"
    write_svs(path, size=(2000, 1900), levels=(1, 4, 16))
    model = ColourEncoder(spec=TileSpec(mpp=0.25, size_px=224))
    with Slide(path) as slide:
        mask = find_tissue(slide)
    assert extract_features(path, model=model).provenance.record["source_tiles"]["empty"] == 0
    zero_table(path, 325, tiles=range(20, 24))
    told = r"4 of the source tiles of 'a\.svs' .* have no bytes, .* overview shows tissue"
    for tissue in ("auto", mask, None):
        with pytest.warns(XmagWarning, match=told):
            bag = extract_features(path, model=model, tissue=tissue)
        assert bag.provenance.record["source_tiles"]["empty"] == 4
    for processes in (0, 1):
        out = tmp_path / f"out{processes}"
        for status in ("done", "skipped"):
            with contextlib.ExitStack() as stack:
                if status == "done":
                    stack.enter_context(pytest.warns(XmagWarning, match=told))
                row = run(path, out, model=model, processes=processes)
            assert (row.status, row.empty_source_tiles) == (status, 4)
        assert recorded(out / "a.h5")["empty"] == 4
        with (out / "report.csv").open(newline="") as file:
            assert [r["empty_source_tiles"] for r in csv.DictReader(file)] == ["4"]


def test_what_is_declared_empty_beside_the_tissue_is_no_reason_to_warn(tmp_path: Path) -> None:
    path, base = tmp_path / "a.svs", np.full((1900, 2000, 3), 255, np.uint8)
    base[:, :960] = texture(960, 1900)
    missing = [index for index in range(8 * 9) if index % 9 >= 5]
    write_svs(path, levels=(1, 4), pixels=base, missing={0: missing})
    model = ColourEncoder(spec=TileSpec(mpp=0.25, size_px=224))
    with warnings.catch_warnings():
        warnings.simplefilter("error", XmagWarning)
        for tissue in ("auto", None):
            record = extract_features(path, model=model, tissue=tissue).provenance.record
            assert record["source_tiles"]["empty"] == len(missing)


def test_a_jpeg_whose_components_have_no_samples_is_damaged(tmp_path: Path) -> None:
    out = io.BytesIO()
    # Its tables are of a flat image, whose blocks may all be zeros: how many there are counts.
    Image.new("RGB", (64, 64), (128, 128, 128)).save(out, "JPEG", optimize=True, quality=50)
    data = bytearray(out.getvalue())
    frame = data.index(b"\xff\xc0")
    for component in range(3):
        data[frame + 11 + 3 * component] &= 0x0F
    integrity.check_jpeg(bytes(data))
    (tmp_path / "a.jpg").write_bytes(data)
    with pytest.raises(DamagedSlideError), Slide(tmp_path / "a.jpg", mpp=2.0) as slide:
        slide.read_region((0, 0), (64, 64))


def test_the_hash_of_what_was_read_is_the_same_however_it_was_read(tmp_path: Path) -> None:
    path = tmp_path / "a.svs"
    write_svs(path, size=(2000, 1900), levels=(1, 4))
    with Slide(path) as slide:
        plan = plan_tiles(slide, ENCODER.tile_spec)
        under = [0, 1, 2, 3, 4, 5]  # 3 x 2 source tiles
        tiles = slide.reader.read_tile_bytes(1, under)
        found = {reading_of(slide, plan).sha256}
        for batch_size, threads in ((1, 1), (7, 3), (100, 2)):
            readings: list[Reading] = []
            options = {"batch_size": batch_size, "threads": threads, "note": readings.append}
            assert sum(len(rows) for rows, _ in read_rows(slide, plan, **options)) == len(plan)
            found |= {reading.sha256 for reading in readings}
        # Of where the tiles lie, and of the bytes of the source tiles under them, in their order.
        level = slide.reader.levels[1]
        corners = np.rint(plan.coords / (level.downsample * plan.scale.reduction))
        digest = hashlib.sha256(corners.astype("<i8").tobytes())
        lengths = np.array([len(tile) for tile in tiles], "<i8").tobytes()
        read = hashlib.sha256(lengths + b"".join(tiles)).digest()  # up to 8 of them together
        digest.update(under[0].to_bytes(8, "little") + read)
    found.add(digest.hexdigest())
    record = extract_features(path, model=ENCODER, tissue=None).provenance.record
    found.add(record["source_tiles"]["sha256"])
    for processes in (0, 2):
        run(path, tmp_path / f"{processes}", processes=processes)
        found.add(recorded(tmp_path / f"{processes}" / "a.h5")["sha256"])
    assert len(found) == 1


def spoil(path: Path, *, repair: bytes | None = None) -> bytes:
    """Zero a sector that no sample of the fingerprint sees, or repair it; the whole file before.

    The slide is not compressed, so that only its pixels change.
    """
    whole = path.read_bytes()
    at = len(whole) * 7 // 30 // SECTOR * SECTOR
    sector = bytes(SECTOR) if repair is None else repair[at : at + SECTOR]
    before, stamp = file_fingerprint(path), path.stat().st_mtime_ns
    path.write_bytes(whole[:at] + sector + whole[at + SECTOR :])
    os.utime(path, ns=(stamp, stamp + 5_000_000_000))
    assert file_fingerprint(path) == before
    assert path.read_bytes() != whole
    return whole


def write_raw(path: Path) -> None:
    write_tiff(path, size=(2100, 1400), levels=(1,), color="raw", mpp=2.0)


@pytest.mark.parametrize("processes", [0, 1])
def test_a_slide_repaired_at_the_same_size_does_not_keep_its_bag(
    tmp_path: Path, processes: int
) -> None:
    path, out = tmp_path / "a.tif", tmp_path / "out"
    write_raw(path)
    whole = spoil(path)
    assert run(path, out, processes=processes).status == "done"
    assert run(path, out, processes=processes).status == "skipped"
    stale = FeatureBag.load(out / "a.h5")
    spoil(path, repair=whole)
    refused = run(path, out, processes=processes)
    assert refused.status == "failed"
    assert "the bytes of its tiles are others" in refused.error
    assert run(path, out, processes=processes, on_mismatch="redo").status == "done"
    fresh = FeatureBag.load(out / "a.h5")
    expected = extract_features(path, model=ENCODER, tissue=None)
    np.testing.assert_array_equal(fresh.features, expected.features)
    assert (fresh.features != stale.features).any()
    assert run(path, out, processes=processes).status == "skipped"


@pytest.mark.parametrize("processes", [0, 1])
def test_a_slide_that_was_only_touched_keeps_its_bag_and_is_read_again_once(
    tmp_path: Path, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = tmp_path / "a.tif", tmp_path / "out"
    write_raw(path)
    run(path, out, processes=processes)
    seen = (out / SEEN_NAME).read_text()
    made = (out / "a.h5").read_bytes()
    os.utime(path, (1, 1))
    assert run(path, out, processes=processes).status == "skipped"
    assert (out / SEEN_NAME).read_text().startswith(seen)
    monkeypatch.setattr("xmag.tiles.decoder.reading_of", None)
    seen = (out / SEEN_NAME).read_text()
    assert run(path, out, processes=processes).status == "skipped"
    assert (out / SEEN_NAME).read_text() == seen
    assert len(seen.split()) > 2
    assert (out / "a.h5").read_bytes() == made


def test_without_the_hidden_file_bags_count_as_before_and_it_is_made_again(tmp_path: Path) -> None:
    path, out = tmp_path / "a.tif", tmp_path / "out"
    write_raw(path)
    run(path, out)
    lines = (out / SEEN_NAME).read_text()
    stamp = str(path.stat().st_mtime_ns)
    # It may be when a patient was scanned: nowhere else.
    assert stamp in lines
    assert [p.name for p in out.iterdir() if stamp.encode() in p.read_bytes()] == [SEEN_NAME]
    for content in (None, lines[: len(lines) // 2], "[]\n{}\nnull\n" + lines, "\0\xff"):
        (out / SEEN_NAME).unlink()
        if content is not None:
            (out / SEEN_NAME).write_text(content)
        assert run(path, out).status == "skipped"
        assert lines.strip() in (out / SEEN_NAME).read_text()


def test_a_hidden_file_of_another_user_is_neither_followed_nor_waited_for(tmp_path: Path) -> None:
    path, target = tmp_path / "a.tif", tmp_path / "private"
    write_raw(path)
    target.write_text("private")
    for name, plant in (("link", lambda p: p.symlink_to(target)), ("fifo", os.mkfifo)):
        out = tmp_path / name
        out.mkdir()
        plant(out / SEEN_NAME)
        assert [run(path, out).status for _ in range(2)] == ["done", "skipped"]
    assert target.read_text() == "private"


def test_slides_at_urls_are_told_apart_by_what_their_store_says_of_them(tmp_path: Path) -> None:
    path, out = tmp_path / "slides" / "a.tif", tmp_path / "out"
    path.parent.mkdir()
    write_raw(path)
    with serve_folder(path.parent) as server:
        url = f"{server.url}/a.tif"
        whole = spoil(path)
        assert [run(url, out).status for _ in range(2)] == ["done", "skipped"]
        spoil(path, repair=whole)
        assert "the bytes of its tiles are others" in run(url, out).error
        assert run(url, out, on_mismatch="redo").status == "done"
    # A store, for the slides and for the bags.
    store = fsspec.filesystem("memory")
    url, out = "memory://sectors/a.tif", "memory://sectors/out"  # type: ignore[assignment]
    store.pipe_file("/sectors/a.tif", spoil(path))
    assert [run(url, out).status for _ in range(2)] == ["done", "skipped"]
    store.pipe_file("/sectors/a.tif", path.read_bytes())
    assert "the bytes of its tiles are others" in run(url, out).error
    store.rm("/sectors", recursive=True)
