"""OME-Zarr slides from known pixels, written by zarr, and chunk by chunk without it."""

import json
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from support.slides import shrunk


def multiscale(axes: str, levels: int, mpp: float | None, *, unit: str = "micrometer") -> dict:
    """The entry of a pyramid whose levels are halves, in arrays called 0, 1, ..."""
    space = {} if mpp is None else {"unit": unit}
    kinds = {"t": {"type": "time"}, "c": {"type": "channel"}}
    datasets = []
    for n in range(levels):
        scale = [(mpp or 1.0) * 2**n if a in "yx" else 1.0 for a in axes]
        steps = [{"type": "scale", "scale": scale}]
        datasets.append({"path": str(n), "coordinateTransformations": steps})
    named = [{"name": a, **kinds.get(a, {"type": "space", **space})} for a in axes]
    return {"axes": named, "datasets": datasets}


def in_axes(pixels, axes: str):
    """(height, width, 3) pixels as an array with these axes, t and z of length 1."""
    planes = pixels.transpose(["yxc".index(a) for a in axes if a in "yxc"])
    return planes[tuple(slice(None) if a in "yxc" else None for a in axes)]


def write_zarr(
    path: Path,
    pixels,
    *,
    zarr_format: int = 2,
    axes: str = "tczyx",
    chunk: int = 128,
    channels: int = 1,
    shard: int | None = None,
    levels: int = 3,
    mpp: float | None = 0.5,
    fill: int | None = 0,
    attributes: dict[str, Any] | None = None,
    name: str = "",
    **options: Any,
) -> Path:
    """The pixels as `zarr` writes them, of which each level is half the one before."""
    import zarr

    group = zarr.open_group(path, mode="a", path=name, zarr_format=zarr_format)
    if zarr_format == 2:
        options["chunk_key_encoding"] = {"name": "v2", "separator": "/"}
    entry = multiscale(axes, levels, mpp)
    for n in range(levels):
        data = in_axes(pixels, axes)
        sides = {"c": channels, "y": chunk, "x": chunk}
        if shard is not None:
            whole = {"c": 3, "y": shard, "x": shard}
            options["shards"] = tuple(whole.get(a, 1) for a in axes)
        array = group.create_array(
            str(n),
            shape=data.shape,
            chunks=tuple(sides.get(a, 1) for a in axes),
            dtype="uint8",
            fill_value=fill,
            **options,
        )
        array[...] = data
        pixels = shrunk(pixels, 2)
    if zarr_format == 2:
        group.attrs.update({"multiscales": [{"version": "0.4", **entry}], **(attributes or {})})
    else:
        ome = {"version": "0.5", "multiscales": [entry], **(attributes or {})}
        group.attrs["ome"] = ome
    return path


def write_by_hand(
    path: Path,
    pixels,
    *,
    zarr_format: int = 2,
    chunk: tuple[int, int] = (96, 64),
    pack: Callable[[bytes], bytes] = zlib.compress,
    compressor: Any = "zlib",
    sharded: bool = False,
    skip: Sequence[tuple[int, int]] = (),
    fill: Any = 0,
    mpp: float = 0.5,
) -> Path:
    """One level of axes cyx with all channels in a chunk of (height, width), byte by byte.

    As the specifications have it (zarr 2: file C.Y.X; zarr 3: c/C/Y/X; shards of 2 x 2 chunks with
    the index at their end), without zarr. `skip` are (row, column) of chunks that are left out.
    """
    height, width, _ = pixels.shape
    array = path / "0"
    array.mkdir(parents=True)
    entry = multiscale("cyx", 1, mpp)
    down, across = -(-height // chunk[0]), -(-width // chunk[1])
    chunks = {}
    for row in range(down):
        for column in range(across):
            part = np.full((3, *chunk), 7, np.uint8)
            y, x = row * chunk[0], column * chunk[1]
            seen = pixels[y : y + chunk[0], x : x + chunk[1]].transpose(2, 0, 1)
            part[:, : seen.shape[1], : seen.shape[2]] = seen
            if (row, column) not in skip:
                chunks[row, column] = pack(part.tobytes())
    shape = {"shape": [3, height, width], "fill_value": fill}
    if zarr_format == 2:
        (path / ".zgroup").write_text('{"zarr_format": 2}')
        (path / ".zattrs").write_text(json.dumps({"multiscales": [{"version": "0.4", **entry}]}))
        coding = None if compressor is None else {"id": compressor}
        fields = {"zarr_format": 2, "chunks": [3, *chunk], "dtype": "|u1", "order": "C"}
        fields |= shape | {"compressor": coding, "filters": None, "dimension_separator": "."}
        (array / ".zarray").write_text(json.dumps(fields))
        for (row, column), data in chunks.items():
            (array / f"0.{row}.{column}").write_bytes(data)
        return path
    ome = {"ome": {"version": "0.5", "multiscales": [entry]}}
    group = {"zarr_format": 3, "node_type": "group", "attributes": ome}
    (path / "zarr.json").write_text(json.dumps(group))
    codecs = [{"name": "bytes"}]
    if compressor is not None:
        codecs.append({"name": compressor, "configuration": {"level": 5}})
    grid = [3, *chunk]
    if sharded:
        codecs = [
            {
                "name": "sharding_indexed",
                "configuration": {
                    "chunk_shape": grid,
                    "codecs": codecs,
                    "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
                    "index_location": "end",
                },
            }
        ]
        grid = [3, 2 * chunk[0], 2 * chunk[1]]
    fields = {
        "zarr_format": 3,
        "node_type": "array",
        "data_type": "uint8",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": grid}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "codecs": codecs,
    } | shape
    (array / "zarr.json").write_text(json.dumps(fields))
    files = chunks
    if sharded:
        files = {}
        for row in range(-(-down // 2)):
            for column in range(-(-across // 2)):
                body, index = b"", b""
                for place in [(2 * row + y, 2 * column + x) for y in (0, 1) for x in (0, 1)]:
                    data = chunks.get(place)
                    index += struct.pack(
                        "<QQ", *((len(body), len(data)) if data else [2**64 - 1] * 2)
                    )
                    body += data or b""
                files[row, column] = body + index
    for (row, column), data in files.items():
        file = array / "c" / "0" / str(row) / str(column)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    return path
