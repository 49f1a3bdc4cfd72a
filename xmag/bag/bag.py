"""FeatureBag: the embeddings of a slide, the coordinates of their tiles, and provenance."""

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from xmag import records
from xmag.bag import exports, formats
from xmag.bag.exports import Canvas, MicrometreTiles, Pictured
from xmag.bag.formats import SUFFIXES, Content, damaged
from xmag.colours import component_colours, principal_components
from xmag.errors import BagError, InputError, OutputError, SlideScaleError, XmagError
from xmag.files import local_copy, write_bytes
from xmag.geometry import TileGeometry
from xmag.notebook import Shown, canvas_picture
from xmag.provenance import Provenance
from xmag.urls import Place, Url, base_name, place_of

if TYPE_CHECKING:  # extras
    from anndata import AnnData
    from PIL.Image import Image
    from wsidata import WSIData

SCHEMA_VERSION = 1
"""Version of the file format; changes when an older xmag could no longer read it."""

_FORMAT = "xmag.FeatureBag"
_OUR_SUFFIXES = (".h5", ".safetensors")
_EXPORT_SUFFIXES = {"clam": ".pt", "stamp": ".h5"}

Layout = Literal["clam", "stamp"]


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class FeatureBag(Shown):
    """The embeddings of one slide: row i of `features` belongs to the tile at `coords[i]`.

    Attributes:
        features: float32 (N, D), finite.
        coords: int64 (N, 2), top-left corner (x, y) of each tile, level-0 px; None where a file
            of other software does not say.
        provenance: What made the features; None for a file of other software.
        tiles: Size and scale of the tiles; None where a file does not say.
        tiles_um: Where the tiles lie in µm, from a file of STAMP, which does not say the scale of
            its slide; `on` makes `coords` and `tiles` of it.

    The arrays are read-only copies. Other dtypes are converted where nothing is lost. Raises
    BagError for shapes that do not fit, and for values that are not finite or would change.
    ``numpy.asarray(bag)`` is `features`, ``len(bag)`` is N.
    """

    features: NDArray[np.float32]
    coords: NDArray[np.int64] | None
    provenance: Provenance | None = None
    tiles: TileGeometry | None = None
    tiles_um: MicrometreTiles | None = None

    def __post_init__(self) -> None:
        features = _lossless(self.features, np.dtype(np.float32), "features")
        object.__setattr__(self, "features", features)
        if self.tiles_um is not None:
            _require_places(features, self.tiles_um.coords)
        if self.coords is not None:
            coords = _lossless(self.coords, np.dtype(np.int64), "coords")
            _require_places(features, coords)
            object.__setattr__(self, "coords", coords)

    def __len__(self) -> int:
        return len(self.features)

    def __array__(
        self, dtype: np.dtype[Any] | None = None, copy: bool | None = None
    ) -> NDArray[Any]:
        return np.array(self.features, dtype=dtype, copy=copy)

    def __repr__(self) -> str:
        model, share = self._recorded("model"), self.coverage
        by = "" if model is None else f", by {base_name(model)}"
        of = "" if share is None else f", {share:.0%} of the tissue"
        return f"<FeatureBag of {len(self)} tiles, {self.features.shape[1]} features each{by}{of}>"

    def _picture(self) -> "Image | None":
        if self.coords is None or self.tiles is None:
            return None
        scores, _ = principal_components(np.asarray(self.features, np.float64))
        tiles = self.coords, self.tiles.size_level0, component_colours(scores)
        return canvas_picture(self.tiles.level0_size, tiles=tiles)

    def __reduce__(self) -> tuple[type["FeatureBag"], tuple[Any, ...]]:
        # Arrays come out of a pickle writable; going through the constructor mends that.
        parts = (self.features, self.coords, self.provenance, self.tiles, self.tiles_um)
        return FeatureBag, parts

    def on(self, slide: Canvas) -> "FeatureBag":
        """The bag with tile geometry that its file left out, completed from the slide.

        STAMP writes µm and leaves out the scale of the slide: its corners become level-0 px,
        rounded to whole ones. TRIDENT writes magnifications, which are rounded: its tiles get the
        slide's µm/px. Any other bag is returned as it is. Raises SlideScaleError where µm meet a
        slide without a scale, and InputError where tiles would lie outside of the slide.
        """
        if self.coords is not None or (um := self.tiles_um) is None:
            tiles, mpp = self.tiles, slide.mpp
            if self.provenance is not None or tiles is None or mpp is None:
                return self
            if tiles.level0_size != slide.dimensions or math.isclose(tiles.level0_mpp, mpp):
                return self
            exact = mpp * tiles.size_level0 / tiles.size_px
            return replace(self, tiles=replace(tiles, level0_mpp=mpp, mpp=exact))
        if slide.mpp is None:
            raise SlideScaleError(
                f"the bag has its tiles in µm, and {slide.name!r} does not say how many µm a px"
                " has; give Slide(path, mpp=)"
            )
        coords = np.rint(um.coords / slide.mpp)
        if len(coords) and not ((coords >= 0) & (coords < slide.dimensions)).all():
            raise InputError(
                f"the bag has tiles from {um.coords.min(axis=0)} to {um.coords.max(axis=0)} µm, and"
                f" {slide.name!r} has {slide.dimensions} px of {slide.mpp:g} µm; give the slide"
                " that the features were made from"
            )
        if um.size_px is None:
            return replace(self, coords=coords, tiles=None)
        tiles = TileGeometry(
            size_px=um.size_px, mpp=um.size_um / um.size_px, overlap_px=0,
            size_level0=max(1, round(um.size_um / slide.mpp)),
            level0_mpp=slide.mpp, level0_size=slide.dimensions,
        )  # fmt: skip
        return replace(self, coords=coords, tiles=tiles)

    @property
    def coverage(self) -> float | None:
        """The share of the slide's tissue under tiles, 0 to 1; None where none is recorded."""
        tissue = self.provenance.record.get("tissue") if self.provenance else None
        share = tissue.get("coverage") if isinstance(tissue, Mapping) else None
        return None if share is None else float(share)

    def mean(self, **options: Any) -> NDArray[np.float32]:
        """The mean embedding of the slide, float32 (D,); BagError for a bag without tiles.

        It is a vector of a slide that needs no training, for `evaluate.LinearProbe` and the like.
        Zeros would be a place among slides, and so a bag without tiles has none.
        ``numpy.mean(bag)`` calls it with `options`, and gets what NumPy makes of `features`.
        """
        if options:
            return np.mean(self.features, **options)  # type: ignore[no-any-return]
        if not len(self):
            raise BagError("the bag has no tiles, and so no mean; leave the slide out")
        return np.asarray(self.features.mean(axis=0, dtype=np.float64), np.float32)

    def to_anndata(self, slide: Pictured | None = None) -> "AnnData":
        """The bag as an AnnData, which scanpy, squidpy and wsidata open: a row for each tile.

        X has the features, ``obsm["spatial"]`` the centres of the tiles in level-0 px, obs their
        corners `x` and `y`, and ``uns["provenance"]`` what `Provenance.from_json` reads. With the
        open `slide`, ``uns["spatial"]`` has its thumbnail and the scale factors of scanpy's plots.
        All of it survives ``write_h5ad``. Raises BagError where the tiles' places or size are
        unknown, and MissingExtraError without the package anndata.
        """
        return exports.to_anndata(self, slide)

    def to_wsidata(
        self, wsi: "WSIData", *, name: str | None = None, tile_key: str = "tiles"
    ) -> str:
        """Add the bag to the slide's `WSIData`, as LazySlide's feature extraction does.

        ``wsi.shapes[tile_key]`` gets the tiles as squares in level-0 px, and ``wsi.tables`` the
        features under ``f"{name}_{tile_key}"``, which is returned; `name` is that of the model
        where it is not given. Tiles that are there already are kept, so that bags of several models
        may share them. Raises InputError where others have that name, BagError where the slide has
        another size, the bag no tiles or no places, and MissingExtraError without wsidata.
        """
        if name is None:  # without what SpatialData refuses in a name
            model = Path(self._recorded("model") or "features").name
            name = re.sub(r"[^A-Za-z0-9_.-]", "_", model)
        table = f"{name}_{tile_key}"
        exports.to_wsidata(self, wsi, table=table, tile_key=tile_key)
        return table

    def _recorded(self, what: str) -> str | None:
        """The name of the "slide" or the "model" in the record."""
        entry = self.provenance.record.get(what) if self.provenance else None
        name = entry.get("name") if isinstance(entry, Mapping) else None
        return None if name is None else str(name)

    def save(self, path: str | os.PathLike[str] | Url) -> None:
        """Write the whole bag to `path`, by its suffix as ``.h5`` or ``.safetensors``.

        The file is read back and compared before it gets its name; the same bag gives the same
        bytes. `path` may be a URL, such as "s3://bucket/slide.h5". Raises InputError for another
        suffix, BagError for a bag without coords, and OutputError where it cannot be written.
        """
        save_bag(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str] | Url) -> "FeatureBag":
        """The bag in an ``.h5`` or ``.safetensors`` file that `save` wrote, or in a foreign file.

        Foreign files are those of CLAM, TRIDENT, STAMP and slide2vec, also ``.pt`` and ``.npz``:
        an array or tensor (N, D) or (1, N, D), called `features` or `feats` where it has a name.
        Their bags have no provenance, and `coords`, `tiles` or `tiles_um` as far as the file says
        where tiles lie; what is missing is named where it is needed. Float64 is rounded to float32.
        No code in a file is run. Raises InputError for another suffix, and BagError for a file that
        is damaged, no bag, or of a newer schema.
        """
        place = place_of(path)
        _require_suffix(place, SUFFIXES)
        if isinstance(place, Path) and not place.is_file():
            raise BagError(f"there is no file {str(place)!r}; give the path of a feature file")
        with local_copy(place, formats.UnreadableBagError) as local:
            is_ours = True
            try:
                content = formats.decode(local, place.suffix)
                is_ours = "format" in content.header
                return _bag(content)
            except XmagError as error:
                kind = type(error) if isinstance(error, BagError) else BagError
                kind = kind if is_ours else formats.ForeignBagError
                raise kind(f"{place}: {error}") from error

    def export(self, path: str | os.PathLike[str] | Url, *, layout: Layout) -> None:
        """Write the features for other software; unlike `save`, it does not keep everything.

        Layout "clam" is a ``.pt`` with the features as a float32 tensor (N, D), which CLAM looks
        for as ``pt_files/<slide>.pt``. Layout "stamp" is an ``.h5`` with `feats` in float16 and
        `coords` in µm. Raises InputError for another suffix or layout, BagError where the bag lacks
        tiles or a feature exceeds float16, and OutputError where it cannot be written.
        """
        if layout not in _EXPORT_SUFFIXES:
            raise InputError(f"layout is {layout!r}; expected one of {sorted(_EXPORT_SUFFIXES)}")
        place = place_of(path)
        if place.suffix != _EXPORT_SUFFIXES[layout]:
            raise InputError(
                f"cannot export layout {layout!r} to {str(place)!r}; expected a path that ends"
                f" in {_EXPORT_SUFFIXES[layout]!r}"
            )
        clam = Content(features=self.features)
        _write(place, clam if layout == "clam" else exports.stamp_content(self))


def _lossless(values: Any, dtype: np.dtype[Any], name: str) -> NDArray[Any]:
    """A copy of `values` in `dtype`; BagError where that would change one, or one is not finite."""
    array = np.asarray(values)
    if array.dtype.kind not in "iuf" or array.ndim != 2:
        raise BagError(
            f"{name} are an array of {array.dtype} with shape {array.shape}; expected {dtype} with"
            " one row for each tile"
        )
    _require_rows(np.isfinite(array), array, name, "finite values; make the features again")
    with np.errstate(over="ignore", invalid="ignore"):
        converted = np.array(array, dtype=dtype, order="C")
        exact = converted == array
    remedy = f"what {dtype} can hold; round with .astype('{dtype}') if that is meant"
    _require_rows(exact, array, name, remedy)
    converted.flags.writeable = False
    return converted


def _require_rows(fits: NDArray[np.bool_], array: NDArray[Any], name: str, expected: str) -> None:
    if not fits.all():
        row, column = np.argwhere(~fits)[0]
        raise BagError(
            f"{name} hold {array[row, column]} in row {row} ({np.count_nonzero(~fits)} such values"
            f" in all); expected {expected}"
        )


def _require_places(features: NDArray[Any], coords: NDArray[Any]) -> None:
    if coords.shape != (len(features), 2):
        raise BagError(
            f"a bag has features of shape {features.shape} and coords of shape {coords.shape};"
            " expected (N, D) and (N, 2) with the same N"
        )


def _require_suffix(place: Place, known: Collection[str], more: str = "") -> None:
    if place.suffix not in known:
        *first, last = map(repr, known)
        raise InputError(
            f"{str(place)!r} ends in {place.suffix!r}; expected {', '.join(first)} or {last}{more}"
        )


def save_bag(
    bag: FeatureBag,
    path: str | os.PathLike[str] | Url,
    *,
    check: Callable[[], object] = lambda: None,
    inside: Place | None = None,
) -> None:
    """Save a bag; `check` is called just before the file gets its name, and may raise instead.

    `inside` is the folder that a symbolic link may not lead out of.
    """
    place = place_of(path)
    _require_suffix(place, _OUR_SUFFIXES, " (for other layouts there is export)")
    coords = exports.placed(bag, "save")
    header = {"format": _FORMAT, "schema_version": str(SCHEMA_VERSION)}
    if bag.provenance is not None:
        header["provenance"] = bag.provenance.to_json()
    if bag.tiles is not None:
        header["tiles"] = exports.tiles_text(bag.tiles)
    header["bag_sha256"] = _digest(bag.features, coords, header)
    attributes = exports.trident_attributes(bag.tiles, bag._recorded("slide") or place.name)
    content = Content(
        features=bag.features, coords=coords, header=header, coords_attributes=attributes
    )
    _write(place, content, check, inside)


def _write(
    place: Place,
    content: Content,
    check: Callable[[], object] = lambda: None,
    inside: Place | None = None,
) -> None:
    data = formats.encode(content, place.suffix)

    def validate(temp: Path) -> None:
        check()
        if temp.read_bytes() != data:
            raise OutputError(
                f"what was written to {place} does not read back the same; the disk of this machine"
                " fails: write elsewhere"
            )

    write_bytes(place, data, validate=validate, inside=inside)


def _digest(features: NDArray[Any], coords: NDArray[Any], header: Mapping[str, str]) -> str:
    """SHA-256 of a bag's content; neither format would notice a value that changed."""
    digest = hashlib.sha256()
    for array in (features, coords):
        digest.update(f"{array.shape} {array.dtype.str}".encode())
        digest.update(np.ascontiguousarray(array).data)
    digest.update(json.dumps({k: header[k] for k in sorted(header) if k != "bag_sha256"}).encode())
    return digest.hexdigest()


def _bag(content: Content) -> FeatureBag:
    header, features, coords = content.header, content.features, content.coords
    if header.get("format") != _FORMAT and "bag_sha256" not in header:
        return FeatureBag(**exports.read_foreign(content, _tiles(header)))
    version = header.get("schema_version", "")
    if version.isdecimal() and int(version) > SCHEMA_VERSION:
        raise formats.NewerBagError(records.newer("the file", int(version), SCHEMA_VERSION))
    if coords is None or header.get("bag_sha256") != _digest(features, coords, header):
        raise damaged("its content does not have the checksum that it had when it was written")
    text = header.get("provenance")
    provenance = None if text is None else Provenance.from_json(text)
    return FeatureBag(features, coords, provenance, _tiles(header))


def _tiles(header: Mapping[str, str]) -> TileGeometry | None:
    if (text := header.get("tiles")) is None:
        return None
    try:
        return TileGeometry.from_dict(records.loads(text))
    except ValueError as error:
        raise damaged(f"its tiles cannot be read: {error}") from error
