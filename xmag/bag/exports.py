"""Layouts of other software: STAMP's is written, and those of CLAM, TRIDENT and STAMP are read."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from xmag.bag.formats import Content, ForeignBagError
from xmag.errors import BagError, InputError, MissingExtraError
from xmag.geometry import TileGeometry

if TYPE_CHECKING:  # extras, and Pillow
    from anndata import AnnData
    from PIL.Image import Image
    from wsidata import WSIData

    from xmag.bag.bag import FeatureBag

_THUMBNAIL_PX = 1024

_STAMP_UM, _STAMP_PX = 256.0, 224
"""Side in µm and px of the tiles in STAMP's oldest files, which do not record it."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MicrometreTiles:
    """Tile coordinates in µm, from a file that does not record the scale of the slide.

    Attributes:
        coords: float64 (N, 2), top-left corner (x, y) of each tile, µm.
        size_um: Side of a tile.
        size_px: Side of a tile in output px; None where the file does not say.
    """

    coords: NDArray[np.float64]
    size_um: float
    size_px: int | None


class Canvas(Protocol):
    """Protocol of a slide for `FeatureBag.on`: its name, size and scale."""

    @property
    def name(self) -> str:
        """Base name of the file."""

    @property
    def dimensions(self) -> tuple[int, int]:
        """(width, height) in level-0 px."""

    @property
    def mpp(self) -> float | None:
        """The µm/px of level 0; None where nobody knows."""


class Pictured(Canvas, Protocol):
    """Protocol of a slide to draw: a Slide, or the facts kept of one that is not open here."""

    def thumbnail(self, *, max_px: int) -> "Image":
        """The whole slide, with at most `max_px` px on its longer side."""


def placed(bag: "FeatureBag", what: str) -> NDArray[np.int64]:
    """The coords of a bag; BagError, which says `what` needs them, where it has none."""
    if bag.coords is None:
        remedy = "give FeatureBag(bag.features, coords, tiles=) what another file says of them"
        if bag.tiles_um is not None:
            remedy = "it has them in µm, and bag.on(slide) places them on their slide"
        raise BagError(f"{what} needs the places of the tiles, and bag.coords is None: {remedy}")
    return bag.coords


def placed_tiles(bag: "FeatureBag", what: str) -> tuple[NDArray[np.int64], TileGeometry]:
    """The coords and the tiles of a bag; BagError, which says `what` needs them, without them."""
    coords = placed(bag, what)
    if bag.tiles is None:
        raise BagError(
            f"{what} needs to know the size of its tiles, and bag.tiles is None; give"
            " FeatureBag(..., tiles=), or take a bag that xmag made"
        )
    return coords, bag.tiles


def to_anndata(bag: "FeatureBag", slide: Pictured | None) -> "AnnData":
    """The AnnData of a bag, laid out as scanpy's; see `FeatureBag.to_anndata`."""
    coords, tiles = placed_tiles(bag, "to_anndata")
    try:
        import pandas as pd
        from anndata import AnnData
    except ImportError as error:
        raise MissingExtraError(
            'to_anndata needs the package anndata; run pip install "xmag[anndata]"'
        ) from error
    if slide is not None:
        _require_size(tiles, slide.dimensions, slide.name)

    def names(values: Iterable[str]) -> Any:
        # Not of pandas' own type of texts, which older versions of anndata cannot read.
        return pd.Index(list(values), dtype=object)

    # Tiles of a closer look stand twice at a place, where those they are under overlap.
    seen, places = Counter[tuple[int, int]](), list[str]()
    for x, y in coords.tolist():
        places.append(f"{x}_{y}" + (f"-{seen[x, y]}" if seen[x, y] else ""))
        seen[x, y] += 1
    table = AnnData(
        X=bag.features.copy(),
        obs=pd.DataFrame(coords, columns=["x", "y"], index=names(places)),
        var=pd.DataFrame(index=names(map(str, range(bag.features.shape[1])))),
    )
    table.obsm["spatial"] = coords + tiles.side_level0 / 2
    table.uns.update(_made_by(bag, tiles))
    if slide is not None:  # scanpy and squidpy fail on scale factors without a picture
        image = np.asarray(slide.thumbnail(max_px=_THUMBNAIL_PX))
        scale = image.shape[1] / slide.dimensions[0]
        scales = {"tissue_hires_scalef": scale, "spot_diameter_fullres": tiles.side_level0}
        picture = {"images": {"hires": image}, "scalefactors": scales}
        table.uns["spatial"] = {Path(slide.name).stem: picture}
    return table


def to_wsidata(bag: "FeatureBag", wsi: "WSIData", *, table: str, tile_key: str) -> None:
    """Add tiles and features to a WSIData; see `FeatureBag.to_wsidata`.

    Names and columns are those of LazySlide's tile_tissues and feature_extraction.
    """
    coords, tiles = placed_tiles(bag, "to_wsidata")
    try:
        from geopandas import GeoDataFrame
        from shapely import box
        from spatialdata.models import ShapesModel
        from wsidata import TileSpec
        from wsidata.io import add_features
    except ImportError as error:
        raise MissingExtraError(
            'to_wsidata needs the package wsidata; run pip install "xmag[wsidata]"'
        ) from error
    height, width = wsi.properties.shape
    _require_size(tiles, (width, height), wsi.name)
    if not len(coords):
        raise BagError("the bag has no tiles, which SpatialData cannot hold; leave it out")
    side = tiles.side_level0
    ends = np.hstack([coords, coords + side])
    if tile_key in wsi.shapes:
        there = wsi.shapes[tile_key].bounds.to_numpy()
        if there.shape != ends.shape or not np.allclose(there, ends, rtol=0, atol=1):
            raise InputError(f"the WSIData has other {tile_key!r}; give another tile_key=")
    else:
        squares = {"tile_id": np.arange(len(coords)), "geometry": box(*ends.T)}
        wsi.shapes[tile_key] = ShapesModel.parse(GeoDataFrame(squares))
        spec = TileSpec.from_wsidata(
            wsi, tiles.size_px, tiles.size_px - tiles.overlap_px,
            mpp=tiles.mpp, slide_mpp=tiles.level0_mpp,
        )  # fmt: skip
        # It cuts the decimals off 447.9999 px, which may be 448 in another order of operations.
        spec.base_downsample *= 1 + 1e-9
        spec.ops_downsample *= 1 + 1e-9
        wsi.attrs.setdefault(wsi.TILE_SPEC_KEY, {})[tile_key] = spec.to_dict()
    add_features(
        wsi, table, tile_key, bag.features.copy(),
        obsm={"spatial": coords + side / 2}, uns=_made_by(bag, tiles),
    )  # fmt: skip


def _made_by(bag: "FeatureBag", tiles: TileGeometry) -> dict[str, str]:
    """Geometry and provenance of a bag for `uns`, as JSON texts."""
    made = {} if bag.provenance is None else {"provenance": bag.provenance.to_json()}
    return {"tiles": tiles_text(tiles), **made}


def tiles_text(tiles: TileGeometry) -> str:
    """The geometry of tiles as JSON."""
    return json.dumps(tiles.to_dict(), sort_keys=True, allow_nan=False)


def _require_size(tiles: TileGeometry, size: tuple[int, int], name: str) -> None:
    if tuple(size) != tiles.level0_size:
        raise BagError(
            f"the bag is of a slide of {tiles.level0_size} px, and {name!r} has {size}; give the"
            " slide that the features were made from"
        )


def trident_attributes(tiles: TileGeometry | None, name: str) -> dict[str, Any]:
    """TRIDENT's attributes of `coords`; magnifications are 10 / mpp, and not rounded."""
    if tiles is None:
        return {}
    width, height = tiles.level0_size
    return {
        "patch_size": tiles.size_px,
        "patch_size_level0": tiles.size_level0,
        "level0_magnification": 10 / tiles.level0_mpp,
        "target_magnification": 10 / tiles.mpp,
        "overlap": tiles.overlap_px,
        "name": Path(name).stem.encode(errors="replace").decode(),
        "savetodir": "",  # a folder of whoever made the file, which is nobody's business
        "level0_width": width,
        "level0_height": height,
    }


def stamp_content(bag: "FeatureBag") -> Content:
    """Features as STAMP loads them: `feats` float16 and `coords` float32 in µm.

    STAMP takes the scale from the root attributes `unit`, `tile_size_um` and `tile_size_px`. Its
    `stamp_version` is left out, since STAMP refuses files of a version newer than its own. The
    attribute `tiles` is ours, and says what STAMP's leave out. Raises BagError for a feature that
    float16 cannot hold.
    """
    coords, tiles = placed_tiles(bag, "export")
    with np.errstate(over="ignore"):
        half = bag.features.astype(np.float16)
    if not np.isfinite(half).all():
        row, column = np.argwhere(~np.isfinite(half))[0]
        raise BagError(
            f"features hold {bag.features[row, column]} in row {row}; expected at most 65504, which"
            " is all that STAMP's float16 holds: scale the features, or use another layout"
        )
    return Content(
        features=half,
        features_name="feats",
        coords=(coords * tiles.level0_mpp).astype(np.float32),
        header={"tiles": tiles_text(tiles)},
        attributes={
            "extractor": bag._recorded("model") or "unknown",
            "unit": "um",
            "tile_size_um": tiles.size_px * tiles.mpp,
            "tile_size_px": tiles.size_px,
        },
    )


def read_foreign(content: Content, tiles: TileGeometry | None) -> dict[str, Any]:
    """The fields of a FeatureBag, as far as a foreign file has them.

    `tiles` are those of our own export for STAMP. Float64 is rounded to float32 where it fits.
    Raises ForeignBagError for STAMP's file of one embedding for a whole slide or patient.
    """
    stamp = content.attributes
    if "encoder" in stamp:
        raise ForeignBagError(
            "the file holds STAMP's embedding of a whole slide or patient; expected a row for each"
            " tile: give the file that the tiles' features are in"
        )
    features = _without_batch_axis(content.features)
    if features.dtype.kind == "f" and features.dtype.itemsize > 4:
        with np.errstate(over="ignore"):
            narrow = features.astype(np.float32)
        features = narrow if np.isfinite(narrow).all() else features
    found = {"features": features, "coords": None}
    if content.coords is None:
        return found
    coords = _without_batch_axis(content.coords)
    if content.features_name == "features" and not {"unit", "tile_size_um"} & set(stamp):
        return found | {"coords": coords, "tiles": _trident_tiles(content.coords_attributes)}
    in_um = _micrometres(coords, stamp)
    if tiles is None or in_um is None:
        return found | {"tiles_um": in_um}
    return found | {"coords": np.rint(in_um.coords / tiles.level0_mpp), "tiles": tiles}


def _without_batch_axis(array: NDArray[Any]) -> NDArray[Any]:
    """The array without the leading axis of length 1 that some tools write."""
    return array[0] if array.ndim == 3 and len(array) == 1 else array


def _trident_tiles(attributes: Mapping[str, float | None]) -> TileGeometry | None:
    """The geometry that TRIDENT writes on `coords`; None where it is not all there.

    Its magnifications are 10 / mpp, and as a rule rounded: a slide of 0.4993 µm/px is "20", and
    its tiles of 256 px at "10" are 512 px of level 0. So µm/px are approximate, and px exact.
    """

    def whole(key: str) -> int:
        value = attributes[key]
        if value is None or value != int(value):
            raise ValueError(value)
        return int(value)

    try:
        tiles = TileGeometry.from_dict({
            "size_px": whole("patch_size"),
            "mpp": 10 / float(attributes["target_magnification"] or 0),
            "size_level0": whole("patch_size_level0"),
            "level0_mpp": 10 / float(attributes["level0_magnification"] or 0),
            "overlap_px": whole("overlap") if "overlap" in attributes else 0,
            "level0_size": (whole("level0_width"), whole("level0_height")),
        })  # fmt: skip
    except (KeyError, TypeError, ValueError, ArithmeticError):
        return None
    rounding = abs(tiles.size_px * tiles.mpp / tiles.level0_mpp - tiles.size_level0)
    return tiles if rounding < 1 and tiles.size_level0 > 0 else None


def _micrometres(
    coords: NDArray[Any], attributes: Mapping[str, float | None]
) -> MicrometreTiles | None:
    """Coords of STAMP in µm, by its own rules (modeling/data.py, get_coords); None without a unit.

    It has written `tile_size_um`; `tile_size` with the unit "um"; and before that neither, with
    tiles of 256 µm in steps of 224.
    """
    if coords.ndim != 2 or coords.dtype.kind not in "iuf" or not np.isfinite(coords).all():
        raise ForeignBagError(
            f"coords are an array of {coords.dtype} with shape {coords.shape}; expected a finite"
            " (x, y) for each tile"
        )
    size_um, px = attributes.get("tile_size_um"), attributes.get("tile_size_px")
    if size_um is None and "unit" in attributes:
        size_um = attributes.get("tile_size")
    values = np.asarray(coords, np.float64)
    if size_um is None and "unit" not in attributes:
        steps = [d for axis in values.T for d in np.diff(np.unique(axis)).tolist()]
        if round(attributes.get("tile_size") or min(steps, default=0)) != _STAMP_PX:
            return None
        values, size_um, px = values / _STAMP_PX * _STAMP_UM, _STAMP_UM, _STAMP_PX
    if size_um is None or not 0 < size_um < float("inf"):
        return None
    size_px = int(px) if px is not None and 0 < px == px // 1 < float("inf") else None
    return MicrometreTiles(coords=values, size_um=size_um, size_px=size_px)
