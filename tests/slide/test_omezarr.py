"""OME-Zarr: the pixels that were written, what is missing, what is hostile, and its places."""

import gc
import gzip
import json
import pickle
import shutil
import struct
import tracemalloc
from pathlib import Path

import fsspec
import imagecodecs
import numcodecs
import numpy as np
import pytest
import zarr
from support.encoders import ColourEncoder
from support.range_server import serve_folder
from support.slides import shrunk, texture, write_svs
from support.zarr_slides import multiscale, write_by_hand, write_zarr

import xmag
from xmag.errors import (
    ClosedSlideError,
    DamagedSlideError,
    InputError,
    SlideError,
    SlideScaleError,
    UnsupportedSlideError,
)
from xmag.slide import remote
from xmag.slide.pixels import read_level

PIXELS = texture(500, 330)
SECRET = "planted-secret"
BLOSC_3 = zarr.codecs.BloscCodec(cname="zstd", shuffle="bitshuffle")
WRITTEN = {
    "0.4 as bioformats2raw": {"compressors": numcodecs.Blosc(cname="lz4")},
    "0.4 cyx zstd": {"axes": "cyx"},
    "0.4 yxc interleaved": {"axes": "yxc", "channels": 3, "compressors": numcodecs.Zlib()},
    "0.4 two of three channels, Fortran": {"channels": 2, "order": "F"},
    "0.4 not compressed": {"compressors": None, "axes": "czyx"},
    "0.4 gzip": {"compressors": numcodecs.GZip(), "axes": "tcyx", "channels": 3},
    "0.5": {"zarr_format": 3},
    "0.5 blosc": {"zarr_format": 3, "compressors": BLOSC_3, "channels": 3},
    "0.5 transposed": {
        "zarr_format": 3, "axes": "cyx", "channels": 3,
        "filters": zarr.codecs.TransposeCodec(order=(1, 2, 0)),
    },
    "0.5 with checksums": {
        "zarr_format": 3, "compressors": [zarr.codecs.ZstdCodec(), zarr.codecs.Crc32cCodec()],
    },
    "0.5 shards": {"zarr_format": 3, "chunk": 64, "shard": 256, "axes": "cyx"},
    "0.5 shards of gzip": {
        "zarr_format": 3, "chunk": 64, "shard": 128, "axes": "yxc", "channels": 3,
        "compressors": zarr.codecs.GzipCodec(),
    },
    "0.5 chunks larger than the image": {"zarr_format": 3, "chunk": 1024},
}  # fmt: skip


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch):
    monkeypatch.setattr(remote, "_FIRST_PAUSE_S", 0.001)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A slide in 0.4 and one in 0.5 and shards, for tests that only read."""
    folder = tmp_path_factory.mktemp("zarr")
    write_zarr(folder / "slide.zarr", PIXELS, channels=3)
    write_zarr(folder / "shards.zarr", PIXELS, zarr_format=3, axes="cyx", chunk=64, shard=128)
    return folder


def _edit(path: Path, **changes) -> None:
    """Change fields of a JSON file; None removes one."""
    fields = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in fields.items() if value != "gone"}))


def _multiscale(path: Path, **changes) -> None:
    (entry,) = json.loads((path / ".zattrs").read_text())["multiscales"]
    _edit(path / ".zattrs", multiscales=[{**entry, **changes}])


def _read(path: Path):
    with xmag.Slide(path) as slide:
        return slide.read_region((0, 0), slide.dimensions)


@pytest.mark.parametrize("options", WRITTEN.values(), ids=WRITTEN)
def test_pixels_of_all_levels_are_those_that_were_written(tmp_path, options):
    path = write_zarr(tmp_path / "slide.zarr", PIXELS, **options)
    expected = PIXELS
    with xmag.Slide(path) as slide:
        assert (slide.format, slide.mpp, slide.mpp_source) == ("ome-zarr", 0.5, "OME-Zarr scale")
        assert slide.level_downsamples == (1.0, 2.0, 4.0)
        for level, size in enumerate(slide.level_dimensions):
            assert np.array_equal(read_level(slide.reader, level, 1, (0, 0), size), expected)
            stored = zarr.open_array(path / str(level), mode="r")[...]
            assert stored.size == expected.size
            expected = shrunk(expected, 2)


@pytest.mark.parametrize(
    ("options", "pack"),
    [
        ({}, None),
        ({"compressor": None}, bytes),
        ({"compressor": "gzip", "zarr_format": 3}, gzip.compress),
        ({"compressor": None, "zarr_format": 3, "sharded": True}, bytes),
        ({"compressor": "gzip", "zarr_format": 3, "sharded": True}, gzip.compress),
    ],
)
def test_what_the_specifications_say_is_read_where_zarr_wrote_nothing(tmp_path, options, pack):
    options |= {} if pack is None else {"pack": pack}
    path = write_by_hand(tmp_path / "slide.zarr", PIXELS, **options)
    assert np.array_equal(_read(path), PIXELS)
    stored = zarr.open_array(path / "0", mode="r")[...]
    assert np.array_equal(stored.transpose(1, 2, 0), PIXELS)


def test_tiles_at_a_reduced_scale_are_averages(folder):
    expected = shrunk(PIXELS[:328], 4)
    with xmag.Slide(folder / "slide.zarr") as slide:
        reader = slide.reader
        assert reader.levels[0].reductions == (1, 2, 4, 8)
        found = read_level(reader, 0, 4, (0, 0), (125, 82))
    assert np.abs(found.astype(int) - expected).max() <= 1


@pytest.mark.parametrize(
    ("unit", "scale", "mpp"),
    [("nanometer", 250, 0.25), ("millimeter", 0.0005, 0.5), ("micrometer", 0.2425, 0.2425)],
)
def test_the_scale_is_that_of_the_finest_level_in_its_units(tmp_path, unit, scale, mpp):
    path = write_zarr(tmp_path / "slide.zarr", PIXELS, axes="cyx", levels=1)
    _multiscale(path, **multiscale("cyx", 1, scale, unit=unit))
    with xmag.Slide(path) as slide:
        assert slide.mpp == pytest.approx(mpp)


def test_a_transformation_of_all_levels_counts_too_and_the_axes_tell_x_from_y(tmp_path):
    path = write_zarr(tmp_path / "slide.zarr", PIXELS, axes="cyx", levels=1, mpp=1.0)
    _multiscale(path, coordinateTransformations=[{"type": "scale", "scale": [1, 0.25, 0.25]}])
    with xmag.Slide(path) as slide:
        assert slide.mpp == 0.25
    _multiscale(path, coordinateTransformations=[{"type": "scale", "scale": [1, 0.25, 0.5]}])
    with pytest.raises(SlideScaleError, match=r"0\.5 µm wide and 0\.25 µm high"):
        xmag.Slide(path)


def test_without_units_there_is_no_scale(tmp_path):
    path = write_zarr(tmp_path / "slide.zarr", PIXELS, mpp=None)
    with xmag.Slide(path) as slide:
        assert slide.mpp is None
    with xmag.Slide(path, mpp=0.25) as slide:
        assert slide.mpp == 0.25


MISSING = [("slide.zarr", "0/0/0/0/1/1"), ("shards.zarr", "0/c/0/1/1")]


@pytest.mark.parametrize(("name", "chunk"), MISSING)
def test_a_missing_chunk_is_damage_where_zarr_shows_black(folder, tmp_path, name, chunk):
    path = shutil.copytree(folder / name, tmp_path / name)
    (path / chunk).unlink()
    assert (zarr.open_array(path / "0", mode="r")[...] == 0).any()
    with pytest.raises(DamagedSlideError, match="is not there, and the file does not declare"):
        _read(path)


@pytest.mark.parametrize("fill", [0, None, 254, True, "255"])
def test_no_other_fill_value_declares_anything(tmp_path, fill):
    path = write_zarr(tmp_path / "slide.zarr", PIXELS)
    _edit(path / "0/.zarray", fill_value=fill)
    (path / "0/0/1/0/1/1").unlink()
    with pytest.raises(DamagedSlideError):
        _read(path)


@pytest.mark.parametrize("options", [{}, {"zarr_format": 3, "shard": 128, "chunk": 64}])
def test_with_a_fill_value_of_255_what_is_missing_is_white_and_counted(tmp_path, options):
    pixels = PIXELS.copy()
    pixels[128:256, 128:256] = 255
    path = write_zarr(tmp_path / "slide.zarr", pixels, fill=255, levels=1, axes="cyx", **options)
    assert np.array_equal(_read(path), pixels)
    with pytest.warns(xmag.XmagWarning, match="tiles"):
        bag = xmag.extract_features(path, model=_model(0.5), tissue=None)
    tiles = bag.provenance.record["source_tiles"]
    assert tiles["empty"] == (4 if options else 1)


def _model(mpp: float) -> ColourEncoder:
    return ColourEncoder(spec=xmag.TileSpec(size_px=56, mpp=mpp))


@pytest.mark.parametrize("fill", [0, 255])
def test_a_shard_declares_what_its_index_leaves_out(tmp_path, fill):
    pixels = PIXELS.copy()
    pixels[96:192, 64:128] = 255
    path = write_by_hand(
        tmp_path / "slide.zarr", pixels, compressor=None, pack=bytes, zarr_format=3, sharded=True,
        skip=[(1, 1)], fill=fill,
    )  # fmt: skip
    assert np.array_equal(_read(path), pixels)


def test_a_channel_alone_may_be_left_out_where_that_is_declared(tmp_path):
    pixels = PIXELS.copy()
    pixels[:128, :128, 0] = 255
    path = write_zarr(tmp_path / "slide.zarr", pixels, fill=255)
    assert not (path / "0/0/0/0/0/0").exists()
    assert np.array_equal(_read(path), pixels)


def _packers():
    blosc, memcpy = numcodecs.Blosc(cname="zstd"), numcodecs.Blosc(cname="lz4", clevel=0)
    return {
        "blosc": ("blosc", lambda raw: bytes(blosc.encode(raw))),
        "blosc, stored": ("blosc", lambda raw: bytes(memcpy.encode(raw))),
        "zstd": ("zstd", lambda raw: bytes(imagecodecs.zstd_encode(raw))),
        "gzip": ("gzip", gzip.compress),
        "zlib": ("zlib", imagecodecs.zlib_encode),
        "nothing": (None, bytes),
    }


@pytest.mark.parametrize("name", _packers())
@pytest.mark.parametrize("kept", [0, 1, 10, 0.5, -1])
def test_a_short_chunk_is_damage(tmp_path, name, kept):
    coding, pack = _packers()[name]
    path = write_by_hand(tmp_path / "slide.zarr", PIXELS, compressor=coding, pack=pack)
    assert np.array_equal(_read(path), PIXELS)
    chunk = path / "0/0.1.2"
    data = chunk.read_bytes()
    chunk.write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
    with pytest.raises(DamagedSlideError, match=r"level 0|\(0, 1, 2\)"):
        _read(path)


@pytest.mark.parametrize("name", _packers())
def test_a_chunk_that_unpacks_to_more_is_damage_and_takes_no_memory(tmp_path, name):
    coding, pack = _packers()[name]
    path = write_by_hand(tmp_path / "slide.zarr", PIXELS, compressor=coding, pack=pack)
    bomb = pack(bytes(1 << 25))
    if coding is not None and name != "blosc, stored":
        assert len(bomb) < 1 << 18
    (path / "0/0.1.2").write_bytes(bomb)
    tracemalloc.start()
    try:
        with pytest.raises(DamagedSlideError):
            _read(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 23
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["blosc", "zstd"])
def test_a_sector_of_zeros_is_damage_and_black_pixels_are_not(tmp_path, name):
    coding, pack = _packers()[name]
    pixels = PIXELS.copy()
    pixels[100:180, :70] = 0
    path = write_by_hand(tmp_path / "slide.zarr", pixels, compressor=coding, pack=pack)
    assert np.array_equal(_read(path), pixels)
    chunk = path / "0/0.2.3"
    data = bytearray(chunk.read_bytes())
    data[1024:1536] = bytes(512)
    chunk.write_bytes(data)
    with pytest.raises(DamagedSlideError):
        _read(path)


def _shard(path: Path) -> tuple[Path, bytearray]:
    file = path / "0/c/0/0/0"
    return file, bytearray(file.read_bytes())


def test_a_broken_index_of_a_shard_is_damage(folder, tmp_path):
    path = shutil.copytree(folder / "shards.zarr", tmp_path / "checksum.zarr")
    file, data = _shard(path)
    data[-20] ^= 1
    file.write_bytes(data)
    with pytest.raises(DamagedSlideError, match="checksum"):
        _read(path)
    options = {"zarr_format": 3, "compressor": None, "pack": bytes, "sharded": True}
    for number, entry in enumerate([(1 << 62, 10), (0, 1 << 62), (2**64 - 1, 5), (5, 2**64 - 1)]):
        path = write_by_hand(tmp_path / f"{number}.zarr", PIXELS, **options)
        file, data = _shard(path)
        data[-64:-48] = struct.pack("<QQ", *entry)
        file.write_bytes(data)
        with pytest.raises(DamagedSlideError, match="leads beyond"):
            _read(path)
    file.write_bytes(b"short")
    with pytest.raises(DamagedSlideError, match="fewer than"):
        _read(path)


def test_damaged_tiles_can_be_dropped(folder, tmp_path):
    path = shutil.copytree(folder / "slide.zarr", tmp_path / "slide.zarr")
    (path / "0/0/0/0/1/1").write_bytes(b"damaged")
    with pytest.warns(xmag.XmagWarning):
        bag = xmag.extract_features(path, model=_model(0.5), tissue=None, damaged="drop")
    whole = xmag.extract_features(folder / "slide.zarr", model=_model(0.5), tissue=None)
    assert 0 < len(bag) < len(whole)


def _series(path: Path, *names: str, xml: str | None = None) -> Path:
    for number, name in enumerate(names):
        pixels = texture(200 + 50 * number, 150, seed=number)
        write_zarr(path, pixels, name=str(number), levels=1)
        _multiscale(path / str(number), name=name)
    _edit(path / ".zgroup")
    (path / ".zattrs").write_text('{"bioformats2raw.layout": 3}')
    (path / "OME").mkdir()
    series = [str(number) for number in range(len(names))]
    (path / "OME/.zattrs").write_text(json.dumps({"series": series}))
    if xml is not None:
        (path / "OME/METADATA.ome.xml").write_text(xml)
    return path


def test_one_of_several_scans_is_chosen_and_labels_are_none(tmp_path):
    path = _series(tmp_path / "slide.zarr", "", "Macro", "scan of JOHN DOE")
    with pytest.raises(InputError, match=r"region=0 \(200x150 px\), region=1 \(300x150") as caught:
        xmag.Slide(path)
    assert "DOE" not in str(caught.value)
    with xmag.Slide(path, region=1) as slide:
        assert np.array_equal(_whole(slide), texture(300, 150, seed=2))
        assert list(slide.associated_images) == ["macro"]
        macro = slide.associated_images["macro"]
        assert np.array_equal(macro, texture(250, 150, seed=1))
        assert "DOE" not in repr(slide) + str(slide.facts)
        assert slide.properties["multiscales.0.name"] == "scan of JOHN DOE"
        with pickle.loads(pickle.dumps(slide)) as again:
            assert again.dimensions == (300, 150)
    with pytest.raises(InputError, match="region=2 is not in the file"):
        xmag.Slide(path, region=2)
    with xmag.Slide(path / "2") as slide:
        assert slide.dimensions == (300, 150)


def _whole(slide):
    return slide.read_region((0, 0), slide.dimensions)


def test_the_ome_xml_of_bioformats2raw_names_labels_and_the_scale(tmp_path):
    size = 'SizeC="3" SizeZ="1" SizeT="1"'
    rgb = '<Channel SamplesPerPixel="3"/>'
    xml = (
        '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">'
        f'<Image Name="slide"><Pixels {size} PhysicalSizeX="0.4" PhysicalSizeY="0.4">{rgb}'
        f'</Pixels></Image><Image Name="label image"><Pixels {size}>{rgb}</Pixels></Image></OME>'
    )
    path = _series(tmp_path / "slide.zarr", "", "", xml=xml)
    with xmag.Slide(path) as slide:
        assert slide.dimensions == (200, 150)
        assert list(slide.associated_images) == ["label"]
    axes = [{"name": a, "type": "space"} for a in "tczyx"]
    _multiscale(path / "0", axes=axes)
    with xmag.Slide(path) as slide:
        assert (slide.mpp, slide.mpp_source) == (0.4, "OME PhysicalSize")
    (path / "OME/METADATA.ome.xml").write_text(xml.replace(rgb, "<Channel/>" * 3))
    with pytest.raises(UnsupportedSlideError, match="fluorescence"):
        xmag.Slide(path)


def _channels(*colours: str, label: str = "") -> dict:
    return {"channels": [{"color": colour, "label": label} for colour in colours]}


@pytest.mark.parametrize(
    ("omero", "is_read"),
    [
        (_channels("FF0000", "00FF00", "0000ff", label="Channel 0"), True),
        (_channels("#ff0000ff", "#00ff00ff", "#0000ffff", label="Red"), True),
        (_channels("808080", "808080", "808080"), True),
        (_channels("", "", "", label="Cytokeratin"), True),
        (_channels("0000FF", "00FF00", "FF0000"), False),
        (_channels("FF0000", "00FF00", "0000FF", label="Cy5"), False),
        (_channels("FF0000", "00FF00", "0000FF", label="Fluorescence"), False),
    ],
)
def test_channels_that_are_not_red_green_and_blue_are_refused(tmp_path, omero, is_read):
    path = write_zarr(tmp_path / "slide.zarr", PIXELS, levels=1, attributes={"omero": omero})
    if is_read:
        assert np.array_equal(_read(path), PIXELS)
        return
    with pytest.raises(UnsupportedSlideError, match="brightfield"):
        xmag.Slide(path)


def _set_array(**changes):
    return lambda path: _edit(path / "0/.zarray", **changes)


def _set_multiscale(**changes):
    return lambda path: _multiscale(path, **changes)


def _set_attributes(**changes):
    return lambda path: _edit(path / ".zattrs", **changes)


def _paths(name: object):
    steps = [{"type": "scale", "scale": [1, 1, 1, 1, 1]}]
    return _set_multiscale(datasets=[{"path": name, "coordinateTransformations": steps}])


AXES = multiscale("tczyx", 1, 0.5)["axes"]
REFUSED = {
    "a z-stack": (_set_array(shape=[1, 3, 4, 330, 500]), "stack of 4 planes"),
    "times": (_set_array(shape=[2, 3, 1, 330, 500]), "at 2 times"),
    "one channel": (_set_array(shape=[1, 1, 1, 330, 500]), "1 channels"),
    "four channels": (_set_array(shape=[1, 4, 1, 330, 500]), "4 channels"),
    "16 bits": (_set_array(dtype="<u2"), "pixels are <u2"),
    "objects": (_set_array(dtype="|O"), "8-bit"),
    "pickles": (_set_array(filters=[{"id": "pickle"}]), "filters"),
    "another codec": (_set_array(compressor={"id": "pickle"}), "coded with pickle"),
    "a plate": (_set_attributes(plate={}), "plate"),
    "a mask": (_set_attributes(**{"image-label": {}}), "mask"),
    "no pyramid": (_set_attributes(multiscales="gone"), "names no pyramid"),
    "version 0.3": (_set_multiscale(version="0.3"), "0.4 or 0.5"),
    "axes without types": (_set_multiscale(axes=["t", "c", "z", "y", "x"]), "names no axes"),
    "axes of names": (_set_multiscale(axes=[{"name": a} for a in "abcde"]), "axes are not"),
    "a label": (_set_multiscale(name="label image"), "nothing but what is called a label"),
    "huge chunks": (_set_array(chunks=[1, 3, 1, 1 << 20, 1 << 20]), "smaller chunks"),
    "large chunks": (_set_array(chunks=[1, 1, 1, 1 << 14, 1 << 13]), "other chunks"),
    "a huge image": (_set_array(shape=[1, 3, 1, 1 << 31, 1 << 31]), "other chunks"),
    "tiny chunks": (
        _set_array(chunks=[1, 3, 1, 1, 1], shape=[1, 3, 1, 1 << 20, 1 << 20]),
        "other chunks",
    ),
    "affine": (
        _set_multiscale(coordinateTransformations=[{"type": "affine"}]),
        "otherwise than scaled",
    ),
    "a level beside the scan": (
        lambda path: _edit(path / "1/.zarray", shape=[1, 3, 1, 165, 200]),
        "does not show the whole",
    ),
    "levels that grow": (
        lambda path: shutil.copy(path / "0/.zarray", path / "1/.zarray"),
        "does not show the whole",
    ),
}
DAMAGED = {
    "no attributes": lambda path: (path / ".zattrs").unlink(),
    "no array": lambda path: (path / "1/.zarray").unlink(),
    "no JSON": lambda path: (path / ".zattrs").write_text("{"),
    "a list": lambda path: (path / ".zattrs").write_text("[]"),
    "deep JSON": lambda path: (path / ".zattrs").write_text("[" * 200_000),
    "deep attributes": lambda path: (path / ".zattrs").write_text('{"a":' * 100_000),
    "much JSON": lambda path: (path / ".zattrs").write_text(" " * (1 << 23)),
    "no bytes of text": lambda path: (path / ".zattrs").write_bytes(b"\xff" * 100),
    "no shape": _set_array(shape="gone"),
    "an enormous shape": _set_array(shape=[1, 3, 1, 10**30, 10**30]),
    "a negative shape": _set_array(shape=[1, 3, 1, -330, 500]),
    "no px": _set_array(shape=[1, 3, 1, 0, 500]),
    "few axes": _set_array(shape=[330, 500]),
    "chunks of nothing": _set_array(chunks=[1, 3, 1, 0, 128]),
    "chunks of other axes": _set_array(chunks=[128, 128]),
    "half a px": _set_array(shape=[1, 3, 1, 330.5, 500]),
    "no levels": _set_multiscale(datasets=[]),
    "many levels": _set_multiscale(datasets=[{"path": "0"}] * 1000),
    "no list of levels": _set_multiscale(datasets=7),
    "a scale of two": _set_multiscale(
        coordinateTransformations=[{"type": "scale", "scale": [1, 1]}]
    ),
    "an endless scale": _set_multiscale(
        coordinateTransformations=[{"type": "scale", "scale": [1, 1, 1, 1, float("inf")]}]
    ),
    "up": _paths("../other.zarr/0"),
    "up within": _paths("0/../../other.zarr/0"),
    "absolute": _paths("/etc"),
    "hidden": _paths(".git"),
    "backslash": _paths("..\\other.zarr"),
    "query": _paths("0?x=1"),
    "escaped": _paths("%2e%2e/other.zarr"),
    "labels": lambda path: (
        shutil.copytree(path / "0", path / "labels/nuclei"),
        _paths("labels/nuclei")(path),
    ),
    "a number": _paths(0),
    "nothing": _paths(""),
    "no text": _paths(None),
    "a NUL": _paths("a\0b"),
    "a long name": _paths("a" * 5000),
}


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    folder = tmp_path_factory.mktemp("template")
    return write_zarr(folder / "slide.zarr", PIXELS, channels=3, levels=2, name="").parent


@pytest.mark.parametrize(("change", "words"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_slide_is_refused_in_words(template, tmp_path, change, words):
    path = shutil.copytree(template / "slide.zarr", tmp_path / "slide.zarr")
    change(path)
    with pytest.raises(UnsupportedSlideError, match=words):
        xmag.Slide(path)


@pytest.mark.parametrize("change", DAMAGED.values(), ids=DAMAGED)
def test_metadata_that_make_no_sense_are_damage_and_take_no_memory(template, tmp_path, change):
    path = shutil.copytree(template / "slide.zarr", tmp_path / "slide.zarr")
    shutil.copytree(template / "slide.zarr", tmp_path / "other.zarr")
    change(path)
    tracemalloc.start()
    try:
        with pytest.raises(DamagedSlideError, match=r"^slide\.zarr") as caught:
            xmag.Slide(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 26
    finally:
        tracemalloc.stop()
    assert str(tmp_path) not in str(caught.value)
    assert caught.value.__cause__ is None


def _codec(name: str, **configuration) -> dict:
    return {"name": name, "configuration": configuration}


SHARDING = {"codecs": [{"name": "bytes"}], "index_codecs": [_codec("bytes", endian="little")]}
IN_ZARR_3 = {
    "storage transformers": ({"storage_transformers": [{"name": "x"}]}, "an extension of zarr 3"),
    "another grid": ({"chunk_grid": _codec("rectilinear")}, "an extension of zarr 3"),
    "another naming": ({"chunk_key_encoding": _codec("fanout")}, "an extension of zarr 3"),
    "an unknown field": ({"new": {"must_understand": True}}, "an extension of zarr 3"),
    "16 bits": ({"data_type": "uint16"}, "pixels are uint16"),
    "another codec": ({"codecs": [{"name": "bytes"}, _codec("JOHN DOE: pickle")]}, "with others"),
    "no bytes": ({"codecs": [_codec("vlen-utf8")]}, "with vlen-utf8"),
    "two in a row": (
        {"codecs": [{"name": "bytes"}, _codec("gzip"), _codec("zstd")]}, "several compressions",
    ),
    "shards in shards": (
        {"codecs": [_codec("sharding_indexed", chunk_shape=[3, 96, 64],
                           **{**SHARDING, "codecs": [_codec("sharding_indexed")]})]},
        "with sharding_indexed",
    ),
    "shards of many chunks": (
        {"chunk_grid": _codec("regular", chunk_shape=[3, 1 << 16, 1 << 16]),
         "codecs": [_codec("sharding_indexed", chunk_shape=[3, 1, 1], **SHARDING)]},
        "smaller chunks",
    ),
    "shards of parts of chunks": (
        {"codecs": [_codec("sharding_indexed", chunk_shape=[3, 90, 64], **SHARDING)]}, None,
    ),
    "an order of nothing": ({"codecs": [_codec("transpose", order=[0, 0, 1]), _codec("bytes")]},
                            "with bytes"),
    "another separator": ({"chunk_key_encoding": _codec("default", separator="/../")}, None),
    "no codecs": ({"codecs": []}, None),
    "a group": ({"data_type": "gone", "node_type": "group"}, None),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "words"), IN_ZARR_3.values(), ids=IN_ZARR_3)
def test_what_of_zarr_3_is_not_known_is_refused_in_words(tmp_path, changes, words):
    path = write_by_hand(
        tmp_path / "slide.zarr", PIXELS, zarr_format=3, compressor="gzip", pack=gzip.compress
    )
    _edit(path / "0/zarr.json", new={"must_understand": False})
    assert np.array_equal(_read(path), PIXELS)
    _edit(path / "0/zarr.json", **changes)
    kind = DamagedSlideError if words is None else UnsupportedSlideError
    with pytest.raises(kind, match=words) as caught:
        xmag.Slide(path)
    assert "DOE" not in str(caught.value)


def test_a_fifo_or_a_folder_in_the_place_of_a_chunk_is_damage(folder, tmp_path):
    import os

    for make in (os.mkfifo, os.mkdir):
        path = shutil.copytree(folder / "slide.zarr", tmp_path / make.__name__)
        (path / "0/0/0/0/1/1").unlink()
        make(path / "0/0/0/0/1/1")
        with pytest.raises(DamagedSlideError, match="no file"):
            _read(path)


def test_a_folder_of_something_else_is_told(tmp_path, folder):
    with pytest.raises(SlideError, match="is a folder; expected a slide"):
        xmag.Slide(tmp_path)
    (tmp_path / "empty.zarr").mkdir()
    with pytest.raises(DamagedSlideError, match="check the path"):
        xmag.Slide(tmp_path / "empty.zarr")
    for array in ("slide.zarr/0", "shards.zarr/0"):
        with pytest.raises(UnsupportedSlideError, match="open the folder above"):
            xmag.Slide(folder / array)


def test_a_closed_slide_is_told(folder):
    slide = xmag.Slide(folder / "slide.zarr")
    reader = slide.reader
    slide.close()
    slide.close()
    with pytest.raises(ClosedSlideError):
        reader.read_tile_bytes(0, [0])


def test_a_slide_pickles_by_opening_it_again(folder):
    with xmag.Slide(folder / "shards.zarr") as slide:
        data = pickle.dumps(slide)
        assert len(data) < 10_000
        with pickle.loads(data) as again:
            assert np.array_equal(_whole(again), PIXELS)


def test_the_fingerprint_tells_slides_apart(folder, tmp_path):
    with xmag.Slide(folder / "slide.zarr") as slide, xmag.Slide(folder / "shards.zarr") as other:
        assert slide.fingerprint["name"] == "slide.zarr"
        assert slide.fingerprint != other.fingerprint
        copy = shutil.copytree(folder / "slide.zarr", tmp_path / "slide.zarr")
        with xmag.Slide(copy) as again:
            assert again.fingerprint == slide.fingerprint
        write_zarr(tmp_path / "other" / "slide.zarr", 255 - PIXELS, channels=3)
        with xmag.Slide(tmp_path / "other" / "slide.zarr") as another:
            assert another.fingerprint != slide.fingerprint


@pytest.mark.parametrize("name", ["slide.zarr", "shards.zarr"])
@pytest.mark.parametrize("ranges", [True, False])
def test_features_over_http_are_those_of_the_local_folder(folder, name, ranges):
    if name == "shards.zarr" and not ranges:
        return
    model = _model(1.0)
    here = xmag.extract_features(folder / name, model=model, tissue=None)
    with serve_folder(folder) as server:
        server.ranges = ranges
        with xmag.Slide(f"{server.url}/{name}") as slide:
            there = xmag.extract_features(slide, model=model, tissue=None)
            absent = 2 * len(b"no such file")  # the metadata of the other version
            assert server.has_sent(slide.bytes_fetched + absent)
            with pickle.loads(pickle.dumps(slide)) as again:
                assert np.array_equal(_whole(again), PIXELS)
    assert np.array_equal(here.features, there.features)
    assert here.provenance.record["slide"] == there.provenance.record["slide"]
    assert here.provenance.record["source_tiles"] == there.provenance.record["source_tiles"]


def test_a_slide_in_another_store_is_read_the_same_way(folder):
    store = fsspec.filesystem("memory")
    for name in ("slide.zarr", "shards.zarr"):
        store.put(str(folder / name), f"/cohort/{name}", recursive=True)
        with xmag.Slide(f"memory://cohort/{name}") as slide:
            assert np.array_equal(_whole(slide), PIXELS)
            assert slide.bytes_fetched > 0
    store.rm("/cohort/slide.zarr/0/0/0/0/1/1")
    with pytest.raises(DamagedSlideError, match="is not there"):
        _read("memory://cohort/slide.zarr")
    store.rm("/cohort", recursive=True)


def test_a_zip_file_is_read_through_a_chain_of_urls(folder, tmp_path):
    shutil.make_archive(str(tmp_path / "packed"), "zip", folder, "slide.zarr")
    with xmag.Slide(f"zip://slide.zarr::{tmp_path}/packed.zip") as slide:
        assert np.array_equal(_whole(slide), PIXELS)
    # fsspec keeps the file open, and knows no end of it.
    fsspec.filesystem("zip", fo=f"{tmp_path}/packed.zip", use_listings_cache=False).close()
    fsspec.get_filesystem_class("zip").clear_instance_cache()
    gc.collect()


def test_what_goes_wrong_on_the_way_is_told_and_is_no_damage(folder, monkeypatch):
    monkeypatch.setattr(remote, "_TIMEOUT_S", 0.2)
    with serve_folder(folder) as server:
        server.token = SECRET
        url = f"{server.url}/slide.zarr?signature={SECRET}"
        slide = xmag.Slide(url)
        with pytest.raises(DamagedSlideError, match="check the path"):
            xmag.Slide(f"{server.url}/nothing.zarr?signature={SECRET}")
        errors = []
        changes = [{"token": "another"}, {"status": 500}, {"status": 401}]
        for change in [*changes, {"missing_bytes": 5}, {"silent_after": 0}]:
            before = {key: getattr(server, key) for key in change}
            server.__dict__.update(change)
            with pytest.raises(SlideError) as caught:
                slide.read_region((0, 0), (500, 330))
            assert not isinstance(caught.value, DamagedSlideError)
            errors.append(str(caught.value))
            server.__dict__.update(before)
        server.failures = 2
        assert np.array_equal(_whole(slide), PIXELS)
    assert [
        word in text
        for word, text in zip(
            [
                "refuses access",
                "HTTP 500",
                "refuses access (HTTP 401)",
                "cannot be reached",
                "gave no answer in time",
            ],
            errors,
            strict=True,
        )
    ] == [True] * 5, errors
    assert not any(SECRET in text for text in [*errors, repr(slide)])


def test_a_shard_that_is_replaced_while_it_is_read_is_told(folder, tmp_path):
    path = shutil.copytree(folder / "shards.zarr", tmp_path / "slide.zarr")
    with serve_folder(tmp_path) as server, xmag.Slide(f"{server.url}/slide.zarr") as slide:
        slide.read_region((0, 0), (20, 20))
        file, data = _shard(path)
        file.write_bytes(data + bytes(100_000))
        with pytest.raises(SlideError, match="replaced while it was read"):
            slide.read_region((70, 70), (20, 20))


def test_a_cohort_takes_a_folder_of_zarr_as_one_slide(folder, tmp_path):
    slides = tmp_path / "slides"
    shutil.copytree(folder / "slide.zarr", slides / "site" / "b.ome.zarr")
    shutil.copytree(folder / "shards.zarr", slides / "a.zarr")
    write_svs(slides / "c.svs", size=(300, 300), mpp=0.5, power=20)
    (slides / "table.csv").write_text("slide,id\na.zarr,first\nsite/b.ome.zarr,second\n")
    model, store = _model(0.5), fsspec.filesystem("memory")
    store.put(str(slides), "/zarrs", recursive=True)
    given = {
        "folder": (slides, ["a.h5", "c.h5", "site/b.ome.h5"]),
        "table": (slides / "table.csv", ["first.h5", "second.h5"]),
        "list": ([slides / "a.zarr"], ["a.h5"]),
        "one": (slides / "a.zarr", ["a.h5"]),
        "store": ("memory://zarrs", ["a.h5", "c.h5", "site/b.ome.h5"]),
        "one in a store": ("memory://zarrs/site/b.ome.zarr", ["b.ome.h5"]),
    }
    for name, (what, outputs) in given.items():
        out = tmp_path / name
        report = xmag.extract_cohort(what, out, model=model, tissue=None, processes=0)
        assert [row.status for row in report] == ["done"] * len(outputs), (name, report)
        assert sorted(str(p.relative_to(out)) for p in out.rglob("*.h5")) == outputs
        again = xmag.extract_cohort(what, out, model=model, tissue=None, processes=0)
        assert [row.status for row in again] == ["skipped"] * len(outputs)
    store.rm("/zarrs", recursive=True)
    alone = xmag.extract_features(slides / "a.zarr", model=model, tissue=None)
    assert np.array_equal(xmag.FeatureBag.load(tmp_path / "folder/a.h5").features, alone.features)


def test_a_real_slide_gives_the_plan_and_the_features_of_its_svs(shared, tmp_path):
    svs = shared / "slides" / "cmu-1-small-region.svs"
    model = ColourEncoder(spec=xmag.TileSpec(size_px=224, mpp=2.0))
    with xmag.Slide(svs) as slide:
        pixels, mpp = _whole(slide), slide.mpp
        expected = xmag.extract_features(slide, model=model)
        plan = xmag.plan_tiles(slide, model.tile_spec, tissue=xmag.find_tissue(slide))
    path = write_zarr(tmp_path / "slide.zarr", pixels, chunk=240, mpp=mpp, levels=1)
    with xmag.Slide(path) as slide:
        assert slide.mpp == mpp
        found = xmag.extract_features(slide, model=model)
        here = xmag.plan_tiles(slide, model.tile_spec, tissue=xmag.find_tissue(slide))
        assert np.array_equal(_whole(slide), pixels)
    assert np.array_equal(here.coords, plan.coords)
    assert (here.scale, here.tiles, here.cells) == (plan.scale, plan.tiles, plan.cells)
    assert np.array_equal(found.coords, expected.coords)
    # Both are averages of 4 x 4 px, those of the JPEG of what its decoder does not round.
    assert np.abs(found.features - expected.features).max() < 0.5
