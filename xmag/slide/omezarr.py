"""OME-Zarr: pyramids of 8-bit RGB in NGFF 0.4 (zarr 2) and 0.5 (zarr 3), in folders and at URLs."""

import hashlib
import math
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from xmag.errors import ClosedSlideError, DamagedSlideError, UnsupportedSlideError, XmagError
from xmag.slide import metadata, zarr_array
from xmag.slide.codecs import MAX_TILE_PX, box_average, reductions
from xmag.slide.integrity import MAX_LEVEL_PX, MAX_TILES, check_level, damaged, named
from xmag.slide.layouts import only_associated
from xmag.slide.pixels import read_whole
from xmag.slide.reader import Level, Pixels, ScaleMetadata, choose_scan, downsample
from xmag.slide.remote import RemoteFolder
from xmag.slide.zarr_array import UNSTORED, Folder, LocalFolder, ZarrArray
from xmag.urls import Place, Url, readable

_MAX_XML = 1 << 24
_MAX_IMAGES, _MAX_LEVELS = 100, 64
_SAMPLES, _SAMPLE_BYTES = 8, 1 << 16
"""Tiles of the finest and of the coarsest level that are hashed, and the most bytes of each."""

_NAME = re.compile(r"(?!\.)[\w.+ -]{1,100}(/(?!\.)[\w.+ -]{1,100}){0,7}", re.ASCII)
"""Name of a group or an array: no way out of its folder, and nothing that means more in a URL."""
_UM_PER_UNIT = {
    "angstrom": 1e-4, "nanometer": 1e-3, "micrometer": 1.0, "millimeter": 1e3, "centimeter": 1e4,
    "meter": 1e6, **metadata.UM_PER_UNIT,
}  # fmt: skip
_COLOUR = re.compile("#?([0-9a-f]{6})([0-9a-f]{2})?", re.IGNORECASE)
_RGB = ["FF0000", "00FF00", "0000FF"]
_STAIN = re.compile(
    r"\b(dapi|hoechst|[ft]?ritc|fitc|[ecm]?[gyr]fp|cy ?[3-7]|alexa|af ?\d{3}|texas|opal|draq)|fluo",
    re.IGNORECASE,
)
"""Names of channels of fluorescence."""
_PARSE_ERRORS = (
    XmagError, LookupError, TypeError, ValueError, ArithmeticError, RecursionError, AttributeError,
    NotImplementedError, ElementTree.ParseError,
)  # fmt: skip
"""Errors of ours, and of Python on metadata that make no sense."""


@dataclass(frozen=True, slots=True)
class _Image:
    """An image of an OME-Zarr: its group, the attributes of that, and its entry in them.

    `stated` is what an OME-XML beside it says of it.
    """

    group: str
    zarr_format: int
    attributes: Mapping[str, Any]
    multiscale: Mapping[str, Any]
    stated: metadata.OmeImage | None = None

    @property
    def associated(self) -> str | None:
        """The kind of image beside the scan that it calls itself, such as "label"."""
        names = [str(self.multiscale.get("name", "")), self.stated.name if self.stated else ""]
        return next(filter(None, map(metadata.associated_kind, names)), None)

    @property
    def axes(self) -> str:
        """The letters of its axes; UnsupportedSlideError where they are not of an RGB image."""
        listed = self.multiscale.get("axes")
        if not (listed and isinstance(listed, list) and isinstance(listed[0], dict)):
            raise UnsupportedSlideError(
                "it names no axes, as versions of OME-Zarr before 0.4; xmag reads 0.4 and 0.5"
            )
        names = [axis["name"] for axis in listed]
        if len(names) != len(set(names)) or not {"y", "x"} <= set(names) <= set("tczyx"):
            raise UnsupportedSlideError("its axes are not y, x, c and at most t and z")
        if "c" not in names:
            raise UnsupportedSlideError(
                "it has no channels (axis c), so it is grey; xmag reads RGB (brightfield) slides"
            )
        return "".join(names)

    def array_names(self) -> list[str]:
        """Names of the arrays of its levels, finest first."""
        listed = self.multiscale["datasets"]
        if not 0 < len(listed) <= _MAX_LEVELS:
            raise damaged(f"it lists {len(listed)} levels; expected 1 to {_MAX_LEVELS}")
        return [_below(self.group, dataset["path"]) for dataset in listed]

    def scale(self) -> ScaleMetadata:
        """µm/px of its finest level, or else those in the OME-XML."""
        fallback = self.stated.scale if self.stated else ScaleMetadata()
        steps = [
            *self.multiscale["datasets"][0].get("coordinateTransformations", []),
            *(self.multiscale.get("coordinateTransformations") or []),
        ]
        if any(step["type"] not in ("scale", "translation", "identity") for step in steps):
            raise UnsupportedSlideError("its levels are transformed otherwise than scaled")
        sizes = []
        for at in map(self.axes.index, "xy"):
            um = _UM_PER_UNIT.get(self.multiscale["axes"][at].get("unit"))
            if um is None:
                return fallback
            for scale in [step["scale"] for step in steps if step["type"] == "scale"]:
                um *= dict(zip(self.axes, scale, strict=True))[self.axes[at]]
            if not 0 < um < math.inf:
                raise ValueError("a px of it has no size")
            sizes.append(um)
        return replace(fallback, mpp=(sizes[0], sizes[1]), mpp_source="OME-Zarr scale")

    def check_colours(self) -> None:
        """Raise UnsupportedSlideError where its channels are not red, green and blue."""
        channels = (self.attributes.get("omero") or {}).get("channels") or []
        matches = [_COLOUR.fullmatch(str(channel.get("color"))) for channel in channels]
        colours = [match[1].upper() for match in matches if match]
        stained = any(_STAIN.search(str(channel.get("label", ""))) for channel in channels)
        separate = self.stated is not None and self.stated.planes > 1
        # Some writers give all channels the same colour, or none.
        if stained or separate or (len(set(colours)) > 1 and colours != _RGB):
            raise UnsupportedSlideError(
                "its channels are not red, green and blue, but, by their names or colours, separate"
                " ones, as of fluorescence; xmag reads brightfield scans in colour"
            )


class OmeZarrReader:
    """A TileReader over the chunks of one image of an OME-Zarr."""

    format = "ome-zarr"

    def __init__(
        self, place: Place, *, region: int | None = None, image: _Image | None = None
    ) -> None:
        self._place, self._closed = place, False
        self.source: Folder = RemoteFolder(place) if isinstance(place, Url) else LocalFolder(place)
        try:
            with named(place.name):
                self._open(region, image)
        except _PARSE_ERRORS as error:
            self.close()
            if isinstance(error, XmagError):
                raise
            # Without the error itself, which may hold some of what was written of the patient.
            raise damaged(
                f"{place.name}: its metadata make no sense ({type(error).__name__})"
            ) from None

    def _open(self, region: int | None, image: _Image | None) -> None:
        if image is None:
            images = _images(self.source)
            self._associated = [image for image in images if image.associated]
            scans = [image for image in images if not image.associated]
            if not scans:
                raise only_associated()
            sizes = [self._arrays_of(scan, scan.array_names()[:1])[0].size for scan in scans]
            image = scans[choose_scan(sizes, region)]
            image.check_colours()
        self._image = image
        self._arrays = self._arrays_of(image, image.array_names())
        self._indexes = dict[tuple[int, str], NDArray[np.uint64] | None]()
        self.levels: tuple[Level, ...] = tuple(map(self._level, range(len(self._arrays))))
        self.metadata = image.scale()

    def _arrays_of(self, image: _Image, names: Sequence[str]) -> list[ZarrArray]:
        return zarr_array.read_arrays(self.source, names, image.zarr_format, image.axes)

    def _level(self, number: int) -> Level:
        """A level of the slide, checked."""
        array, base = self._arrays[number], self._arrays[0]
        tile = (array.chunk_side("x"), array.chunk_side("y"))
        level = Level(
            size=array.size,
            downsample=downsample(base.size, array.size),
            tile_size=tile,
            reductions=reductions(tile),
        )
        check_level(number, level)
        if array.side("t") > 1 or array.side("z") > 1:
            raise UnsupportedSlideError(
                f"it is a stack of {array.side('z')} planes at {array.side('t')} times; xmag reads"
                " slides of one focal plane"
            )
        if array.side("c") != 3:
            raise UnsupportedSlideError(
                f"it has {array.side('c')} channels; xmag reads RGB (brightfield) slides"
            )
        pixels, tiles = math.prod(level.size), level.tiles_across * level.tiles_down
        if pixels > MAX_LEVEL_PX or tiles > MAX_TILES or math.prod(tile) > MAX_TILE_PX:
            raise UnsupportedSlideError(
                f"level {number} is {level.size[0]}x{level.size[1]} px in chunks of"
                f" {tile[0]}x{tile[1]}; expected at most {MAX_LEVEL_PX} px, {MAX_TILES} chunks,"
                f" and {MAX_TILE_PX} px a chunk. Write it again in other chunks"
            )
        (width, height), (w, h) = base.size, level.size
        smaller = number == 0 or (w, h) < self._arrays[number - 1].size
        similar = (w - 1) * height <= (h + 1) * width and (h - 1) * width <= (w + 1) * height
        if not (smaller and similar):
            raise UnsupportedSlideError(
                f"level {number}, of {w}x{h} px, does not show the whole of the first, of"
                f" {width}x{height} px, smaller; xmag reads pyramids, finest level first"
            )
        return level

    def read_tile_bytes(self, level: int, indices: Sequence[int]) -> list[bytes | None]:
        """The chunks of tiles, joined; None for a tile that is declared empty."""
        if self._closed:
            raise ClosedSlideError(f"{self._place.name} is closed; open the slide again")
        array, across = self._arrays[level], self.levels[level].tiles_across
        tiles = [array.chunks_of_tile(*divmod(index, across)) for index in indices]
        chunks = [chunk for tile in tiles for chunk in tile]
        if array.shard is None:
            names = [array.name_of(chunk) for chunk in chunks]
            found = self.source.read_files(names, array.most_bytes + 1)
            for chunk, data in zip(chunks, found, strict=True):
                self._check(level, chunk, None if data is None else len(data))
        else:
            found = self._read_shards(level, chunks)
        following = iter(found)
        return [_joined([next(following) for _ in tile]) for tile in tiles]

    def _check(self, level: int, chunk: tuple[int, ...], length: int | None) -> None:
        """Raise DamagedSlideError for a chunk of this length; None where there is no file of it."""
        array = self._arrays[level]
        place = f"chunk {chunk} (axes {array.axes}) of level {level}"
        if length is None and not array.declares_empties:
            raise DamagedSlideError(
                f"{place} is not there, and the file does not declare what it leaves out white, by"
                " a fill value of 255. Copy it again; if its writer left out chunks of zeros, write"
                " it with them (write_empty_chunks of zarr)"
            )
        if length is not None and not 0 < length <= array.most_bytes:
            raise damaged(f"{place} has {length} bytes; expected 1 to {array.most_bytes}")

    def _read_shards(self, level: int, chunks: Sequence[tuple[int, ...]]) -> list[bytes | None]:
        array, found = self._arrays[level], list[bytes | None]([None] * len(chunks))
        by_shard = dict[str, list[tuple[int, int]]]()
        for number, chunk in enumerate(chunks):
            pairs = list(zip(chunk, array.per_shard, strict=True))
            name = array.name_of(tuple(at // count for at, count in pairs))
            inner = np.ravel_multi_index([at % count for at, count in pairs], array.per_shard)
            by_shard.setdefault(name, []).append((number, int(inner)))
        for name, members in by_shard.items():
            if (level, name) not in self._indexes:
                self._indexes[level, name] = array.index(self.source, name)
            index = self._indexes[level, name]
            if index is None:
                self._check(level, chunks[members[0][0]], None)
                continue
            places = [(number, *index[inner].tolist()) for number, inner in members]
            # What the index of a shard that is there leaves out is declared empty.
            stored = [place for place in places if place[1:] != (UNSTORED, UNSTORED)]
            for number, _, length in stored:
                self._check(level, chunks[number], length)
            stored.sort(key=lambda place: place[1])
            parts = self.source.read_parts(name, [place[1:] for place in stored])
            for place, data in zip(stored, parts, strict=True):
                found[place[0]] = data
        return found

    def decode(self, level: int, data: bytes, reduction: int) -> Pixels:
        """The pixels of one tile at 1/`reduction`, in full tile size."""
        planes = list[NDArray[np.uint8]]()
        try:
            for chunk in _split(data):
                pixels = self._arrays[level].pixels(chunk)
                if pixels.shape[2] == 3 and pixels.strides[2] == 1:
                    return box_average(pixels, reduction)
                # Averaging planes is faster than bringing their px side by side first.
                planes += [box_average(plane, reduction) for plane in np.moveaxis(pixels, 2, 0)]
        except (RuntimeError, ValueError, MemoryError, struct.error) as error:
            raise DamagedSlideError(f"a chunk of it cannot be unpacked: {error}") from None
        return np.stack(planes[:3], axis=-1)

    def fingerprint(self) -> dict[str, Any]:
        """Name, bytes of all pixels in memory, and a hash of a sample of the chunks.

        That is of the sizes of levels, and of the first bytes of tiles of the finest and of the
        coarsest, evenly spaced.
        """
        digest = hashlib.sha256(repr([level.size for level in self.levels]).encode())
        for number in sorted({0, len(self.levels) - 1}):
            tiles = self.levels[number].tiles_across * self.levels[number].tiles_down
            picked = sorted({tiles * n // _SAMPLES for n in range(_SAMPLES)})
            for data in self.read_tile_bytes(number, picked):
                digest.update((data or b"")[:_SAMPLE_BYTES])
        return {
            "name": readable(self._place.name),
            "size_bytes": sum(3 * math.prod(level.size) for level in self.levels),
            "content_sample_sha256": digest.hexdigest(),
        }

    def read_properties(self) -> Mapping[str, str]:
        """The texts of the image's attributes, each named by its place in them."""
        return dict(_texts(self._image.attributes))

    def associated_images(self) -> Mapping[str, Callable[[], Pixels]]:
        """Functions that read the images beside the scan."""
        return {str(image.associated): partial(self._read, image) for image in self._associated}

    def _read(self, image: _Image) -> Pixels:
        opened = closing(OmeZarrReader(self._place, image=image))
        with opened as reader, named(self._place.name):
            return read_whole(reader)

    def close(self) -> None:
        """Release what was opened. Closing twice is fine."""
        self._closed = True
        self.source.close()


def is_omezarr(place: Place) -> bool:
    """Whether a folder holds a group of zarr, or a URL names one: no request is made."""
    if isinstance(place, Url):
        return any(part.lower().endswith(".zarr") for part in place.parts)
    is_named = place.suffix.lower() == ".zarr"
    names = ("zarr.json", ".zattrs", ".zgroup", ".zarray")
    return place.is_dir() and (is_named or any((place / name).exists() for name in names))


def _images(folder: Folder) -> list[_Image]:
    """The images in an OME-Zarr; UnsupportedSlideError where it is something else."""
    zarr_format, attributes = _attributes(folder, "")
    if "plate" in attributes or "well" in attributes or "image-label" in attributes:
        raise UnsupportedSlideError(
            "it is a plate of wells, or a mask (image-label); xmag reads images of slides"
        )
    if "multiscales" in attributes:
        return _images_of("", zarr_format, attributes, None)
    if "bioformats2raw.layout" not in attributes:
        raise UnsupportedSlideError(
            "it is a zarr that names no pyramid (multiscales); expected OME-Zarr 0.4 or 0.5"
        )
    (xml,) = folder.read_files(["OME/METADATA.ome.xml"], _MAX_XML + 1)
    if xml is not None and len(xml) > _MAX_XML:
        raise damaged(f"its OME-XML has more than {_MAX_XML} bytes")
    stated = [] if xml is None else metadata.ome_images(xml.decode())
    series = _attributes(folder, "OME", missing={})[1].get("series")
    names = [str(n) for n in range(len(stated) or 1)] if series is None else list(series)
    if not 0 < len(names) <= _MAX_IMAGES:
        raise UnsupportedSlideError(
            f"it lists {len(names)} images; expected 1 to {_MAX_IMAGES}. Open one of its folders"
        )
    images = []
    for number, name in enumerate(names):
        group = _below("", name)
        said = stated[number] if len(stated) == len(names) else None
        images += _images_of(group, *_attributes(folder, group), said)
    return images


def _images_of(
    group: str, zarr_format: int, attributes: Mapping[str, Any], stated: metadata.OmeImage | None
) -> list[_Image]:
    listed = attributes["multiscales"]
    versions = {attributes.get("version"), *(entry.get("version") for entry in listed)} - {None}
    if not versions <= {"0.4", "0.5"}:
        raise UnsupportedSlideError("it is no OME-Zarr of version 0.4 or 0.5, which xmag reads")
    if not 0 < len(listed) <= _MAX_IMAGES:
        raise damaged(f"a group of it lists {len(listed)} images")
    return [_Image(group, zarr_format, attributes, entry, stated) for entry in listed]


def _attributes(
    folder: Folder, group: str, missing: Mapping[str, Any] | None = None
) -> tuple[int, Mapping[str, Any]]:
    """(version of zarr, what a group says of itself); DamagedSlideError where it says nothing."""
    start = f"{group}/" if group else ""
    names = ("zarr.json", ".zattrs", ".zarray")
    third, second, array = zarr_array.read_documents(folder, [start + name for name in names])
    if array is not None or (third is not None and third["node_type"] == "array"):
        raise UnsupportedSlideError(
            "it is an array of zarr alone; expected OME-Zarr: open the folder above it"
        )
    if third is not None:
        return 3, third.get("attributes", {}).get("ome", {})
    if second is None and missing is None:
        raise DamagedSlideError(
            "there is no zarr.json and no .zattrs, which say what it holds; check the path, or copy"
            " it again"
        )
    return 2, missing or {} if second is None else second


def _below(group: str, name: object) -> str:
    """The name of what lies in a group; DamagedSlideError where it leads out of it."""
    if not (isinstance(name, str) and _NAME.fullmatch(name)) or "labels" in name.split("/"):
        raise damaged("it names an array or a group by what is no plain path below it")
    return f"{group}/{name}" if group else name


def _texts(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """(place, text) of what is no list or mapping in JSON."""
    if isinstance(value, Mapping | list):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, item in items:
            yield from _texts(item, f"{name}.{key}" if name else str(key))
    elif value is not None:
        yield name, str(value)


def _joined(chunks: Sequence[bytes | None]) -> bytes | None:
    """The chunks of a tile as one, each behind its length, -1 for none; None for none at all."""
    if not any(chunk is not None for chunk in chunks):
        return None
    lengths = [-1 if chunk is None else len(chunk) for chunk in chunks]
    return b"".join(
        [struct.pack(f"<B{len(chunks)}q", len(chunks), *lengths), *filter(None, chunks)]
    )


def _split(data: bytes) -> Iterator[bytes | None]:
    """The chunks that `_joined` put together."""
    lengths = struct.unpack_from(f"<{data[0]}q", data, 1)
    at = 1 + 8 * len(lengths)
    for length in lengths:
        yield None if length < 0 else data[at : at + length]
        at += max(length, 0)
