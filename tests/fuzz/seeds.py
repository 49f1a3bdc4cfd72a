"""Small valid files that the fuzzer damages: slides in every format and coding that xmag reads."""

import tempfile
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image
from support.slides import page, resolution_tags, strip_page, texture, write_svs, write_tiff
from support.tiff import ASCII, SHORT, write_pages
from support.vendor_slides import write_ndpi, write_ome, write_philips, write_scn, write_ventana

_SIZE = (420, 300)
_APERIO = ("ycbcr420", "ycbcr422", "ycbcr444", "rgb444", "j2k-rgb", "j2k-ycbcr")
_GENERIC = ("ycbcr420", "j2k-rgb", "lzw", "deflate", "zstd", "webp", "raw")


def _aperio(path: Path, color: str, *, big: bool = False) -> None:
    write_svs(path, size=_SIZE, levels=(1, 4), tile=128, color=color, bigtiff=big)


def _generic(path: Path, color: str) -> None:
    write_tiff(path, size=_SIZE, levels=(1, 2), tile=(128, 96), color=color)


def _sparse(path: Path) -> None:
    write_tiff(
        path, size=_SIZE, levels=(1, 2), tile=(128, 96), missing={0: [1, 5], 1: [1]}, bigtiff=True
    )


def _rgba(path: Path) -> None:
    pixels = texture(*_SIZE)
    base = page(pixels, tile=(128, 96), color="raw", tags=resolution_tags(0.25))
    opaque = np.full((96, 128, 1), 200, np.uint8)
    base.chunks = [
        np.concatenate([np.frombuffer(c, np.uint8).reshape(96, 128, 3), opaque], 2).tobytes()
        for c in base.chunks
        if c is not None
    ]
    base.tags |= {258: (SHORT, [8] * 4), 277: (SHORT, 4), 338: (SHORT, 2)}
    write_pages(path, [base])


def _strips(path: Path) -> None:
    base = strip_page(texture(*_SIZE), rows=64, description="strips")
    base.tags |= resolution_tags(0.25)
    write_pages(path, [base])


def _big_endian(path: Path) -> None:
    tifffile.imwrite(
        path, texture(*_SIZE), byteorder=">", tile=(96, 128), photometric="rgb",
        compression="zlib", predictor=True, resolution=(40_000, 40_000), resolutionunit=3,
    )  # fmt: skip


def _packbits(path: Path) -> None:
    tifffile.imwrite(
        path, texture(*_SIZE), rowsperstrip=32, photometric="rgb", compression="packbits",
        resolution=(40_000, 40_000), resolutionunit=3,
    )  # fmt: skip


def _trestle(path: Path) -> None:
    base = page(
        texture(*_SIZE), tile=(128, 96), color="ycbcr420",
        description="OverlapsXY= 8 8; Objective Power=40;", tags={305: (ASCII, "MedScan 1.0")},
    )  # fmt: skip
    write_pages(path, [base])


def _plain(path: Path, **options: object) -> None:
    Image.fromarray(texture(300, 200)).save(path, **options)


_WRITERS: dict[str, Callable[[Path], object]] = {
    **{f"aperio-{c}.svs": lambda p, c=c: _aperio(p, c) for c in _APERIO},
    "aperio-big.svs": lambda p: _aperio(p, "ycbcr420", big=True),
    **{f"generic-{c}.tif": lambda p, c=c: _generic(p, c) for c in _GENERIC},
    "sparse.tif": _sparse,
    "rgba.tif": _rgba,
    "strips.tif": _strips,
    "big-endian.tif": _big_endian,
    "packbits.tif": _packbits,
    "ome.tif": lambda p: write_ome(p, sizes=[_SIZE], levels=(1, 2)),
    "ome-two.tif": lambda p: write_ome(p, sizes=[(300, 260), (260, 280)], levels=(1, 2)),
    "philips.tiff": lambda p: write_philips(
        p, size=_SIZE, levels=(1, 2), tile=128, missing={0: [2]}
    ),
    "leica.scn": lambda p: write_scn(
        p,
        regions=[((60, 40), (300, 260)), ((420, 300), (200, 150))],
        canvas=(700, 520),
        levels=(1, 2),
    ),
    "ventana.bif": lambda p: write_ventana(p, grid=(3, 2), tile=128, levels=(1, 2)),
    "ventana-overlap.bif": lambda p: write_ventana(
        p, grid=(3, 2), tile=128, levels=(1, 2), overlap=8
    ),
    "hamamatsu.ndpi": lambda p: write_ndpi(p, size=(640, 480), levels=(1, 2)),
    "trestle.tif": _trestle,
    "plain.png": _plain,
    "plain-rgba.png": lambda p: Image.fromarray(
        np.dstack([texture(200, 150), np.full((150, 200), 180, np.uint8)])
    ).save(p),
    "plain.jpg": lambda p: _plain(p, quality=85),
    "progressive.jpg": lambda p: _plain(p, quality=85, progressive=True),
}

NAMES: tuple[str, ...] = tuple(_WRITERS)
"""The slides there are, by file name."""


@cache
def seed(name: str) -> bytes:
    """The bytes of a slide."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        _WRITERS[name](path)
        return path.read_bytes()


def write(target: str, folder: Path) -> None:
    """Write the files that the cases of a target are made from."""
    if target == "slides":
        files = {name: seed(name) for name in NAMES}
    else:
        files = import_module(f"fuzz.{target}").seeds()
    for name, content in files.items():
        (folder / name).write_bytes(content)
