"""Files that claim to be huge: memory goes by what is there, and errors name the limit."""

import io
import json
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from fuzz.streams import packed_bombs
from fuzz.structure import chunks_of
from fuzz.tiffs import Editor
from PIL import Image
from support.slides import page, resolution_tags, texture, write_svs, write_tiff
from support.tiff import LONG, RATIONAL, SHORT, Page, write_pages

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="limits and looks at a process by /proc"
)

LIMIT_MB = 400
"""What the whole of a case may take on top of Python and its modules; claims are gigabytes."""

# Each file in a process of its own, which may take so much and not more.
PROGRAM = """
import json, re, resource, sys, warnings
from pathlib import Path
import numpy as np
import xmag, xmag.bag, xmag.tissue, xmag.tiles
from xmag.errors import XmagError
warnings.simplefilter("ignore")

def status(key):
    return int(re.search(key + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

def slide(path):
    with xmag.Slide(path, mpp=None if path.suffix in (".tif", ".svs") else 0.25) as slide:
        slide.thumbnail(max_px=128)
        xmag.find_tissue(slide)
        plan = xmag.plan_tiles(slide, xmag.TileSpec(mpp=2.0, size_px=224))
        for number, _ in enumerate(xmag.tiles.read_tiles(slide, plan, batch_size=8, threads=2)):
            if number == 2:
                break

def bag(path):
    xmag.FeatureBag.load(path)

def weights(path):
    xmag.load_model(path, device="cpu")

limit, kind, path = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
if kind == "weights":
    import xmag.encoder
now = status("VmSize") * 1024
resource.setrlimit(resource.RLIMIT_AS, (now + (limit << 20), now + (limit << 20)))
before = status("VmRSS")
said = "read"
try:
    {"slide": slide, "bag": bag, "weights": weights}[kind](path)
except XmagError as error:
    causes = []
    cause = error
    while cause is not None:
        causes.append(type(cause).__name__)
        cause = cause.__cause__ or cause.__context__
    assert "MemoryError" not in causes, causes
    said = f"{type(error).__name__}: {error}"
print(json.dumps([said, (status("VmHWM") - before) / 1024]))
"""


def four_gigapixels(path: Path) -> None:
    """A level of 65,536 px squared whose tiles are all empty but for a few."""
    side, tile = 1 << 16, 512
    chunks: list[bytes | None] = [None] * (side // tile) ** 2
    stored = page(texture(tile, tile), tile=(tile, tile), color="ycbcr420", shared_tables=False)
    chunks[::1000] = [stored.chunks[0]] * len(chunks[::1000])
    tags = stored.tags | {256: (LONG, side), 257: (LONG, side)} | resolution_tags(0.25)
    write_pages(path, [Page(tags, chunks)], big=True)


def five_metres(path: Path) -> None:
    """A level of 4 Gpx at 20 µm/px: more glass than there is."""
    four_gigapixels(path)
    editor = Editor(path.read_bytes())
    for entry in editor.map.directories[0].entries:
        if entry.kind == RATIONAL:
            editor.put(entry.value_at, 4, 500 * 10_000)
    path.write_bytes(bytes(editor.data))


def large_tile(path: Path) -> None:
    tags = {
        256: (LONG, 100_000), 257: (LONG, 100_000), 258: (SHORT, [8] * 3), 259: (SHORT, 8),
        262: (SHORT, 2), 277: (SHORT, 3), 284: (SHORT, 1), 322: (LONG, 100_000),
        323: (LONG, 100_000),
    }  # fmt: skip
    write_pages(path, [Page(tags | resolution_tags(0.25), [zlib.compress(bytes(1000))])])


def with_tile(color: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        write_tiff(path, size=(600, 500), levels=(1,), tile=(256, 256), color=color)
        editor = Editor(path.read_bytes())
        for chunk in chunks_of(editor.pristine, editor.map, editor.map.directories[0]):
            stream = editor.pristine[chunk.offset : chunk.offset + chunk.length]
            editor.replace(chunk, change(stream))
        path.write_bytes(bytes(editor.data))

    return write


def jpeg_of_2_gb(stream: bytes) -> bytes:
    at = stream.index(b"\xff\xc0") + 5
    return stream[:at] + struct.pack(">HH", 65_500, 65_500) + stream[at + 4 :]


def jpeg_2000_of_2_gb(stream: bytes) -> bytes:
    size = struct.pack(">8I", 65_500, 65_500, 0, 0, 65_500, 65_500, 0, 0)
    return stream[:8] + size + stream[40:]


def jpeg_2000_of_many_components(stream: bytes) -> bytes:
    return stream[:40] + struct.pack(">H", 16_384) + stream[42:]


def webp_of_1_gb(stream: bytes) -> bytes:
    assert stream[12:16] == b"VP8L"
    return stream[:21] + b"\xff\xff\xff\x0f" + stream[25:]


def png_of_12_gb(path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(texture(200, 100)).save(buffer, "PNG")
    data = buffer.getvalue()
    header = b"IHDR" + struct.pack(">II", 65_500, 65_500) + data[24:29]
    path.write_bytes(data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:])


def jpeg_image_of_12_gb(path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(texture(200, 100)).save(buffer, "JPEG")
    path.write_bytes(jpeg_of_2_gb(buffer.getvalue()))


def strip_of_3_gb(path: Path) -> None:
    write_svs(path, size=(600, 500), levels=(1,), tile=256, color="deflate")
    editor = Editor(path.read_bytes())
    chunk = chunks_of(editor.pristine, editor.map, editor.map.directories[0])[0]
    editor.put(chunk.length_at, chunk.length_size, 3_000_000_000)
    path.write_bytes(bytes(editor.data))


def absurd_h5(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset("features", (1 << 30, 1 << 12), "f4", chunks=(1 << 10, 1 << 12))
        file["coords"] = np.zeros((3, 2), np.int64)


def packed_h5(path: Path) -> None:
    shape = (1 << 14, 1 << 14)
    with h5py.File(path, "w") as file:
        file.create_dataset("features", shape, "f4", chunks=shape, compression="gzip")
        file["features"].id.write_direct_chunk((0, 0), packed_bombs()[0])
        file["coords"] = np.zeros((3, 2), np.int64)


def safetensors_header(size: int, shape: list[int]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 4 * shape[0] * shape[1]]}
        text = json.dumps({"features": entry, "coords": entry}).encode()
        path.write_bytes((size or len(text)).to_bytes(8, "little") + text + bytes(64))

    return write


CASES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "4 Gpx.tif": ("slide", four_gigapixels, r"read"),
    "five metres.tif": ("slide", five_metres, r"1311x1311 mm large .* 17000 mm²"),
    "large tile.tif": ("slide", large_tile, r"100000x100000 px; expected at most 67108864 px"),
    "jpeg.tif": ("slide", with_tile("ycbcr420", jpeg_of_2_gb), r"65500x65500 px, the tile 256x256"),
    "jpeg 2000.tif": (
        "slide",
        with_tile("j2k-rgb", jpeg_2000_of_2_gb),
        r"65500x65500 px .* 256x256",
    ),
    "components.tif": ("slide", with_tile("j2k-rgb", jpeg_2000_of_many_components), r"16384 comp"),
    "webp.tif": ("slide", with_tile("webp", webp_of_1_gb), r"16384x16384 px, the tile 256x256 px"),
    "deflate.tif": (
        "slide",
        with_tile("deflate", lambda _: packed_bombs()[0]),
        r"should have \d+ by",
    ),
    "zstd.tif": ("slide", with_tile("zstd", lambda _: packed_bombs()[1]), r"Destination buffer"),
    "zstd claim.tif": ("slide", with_tile("zstd", lambda _: packed_bombs()[3]), r"damaged"),
    "lzw.tif": (
        "slide",
        with_tile("lzw", lambda _: packed_bombs()[4]),
        r"more than the 196608 bytes",
    ),
    "strip.svs": ("slide", strip_of_3_gb, r"3000000000 bytes .* take \d+ at most"),
    "large.png": ("slide", png_of_12_gb, rf"65500x65500 px.*limit is {Image.MAX_IMAGE_PIXELS} px"),
    "large.jpg": ("slide", jpeg_image_of_12_gb, r"65500x65500 px.*PIL.Image.MAX_IMAGE_PIXELS"),
    "absurd.h5": ("bag", absurd_h5, r"would take 17592186044416 bytes.* \d+ at most"),
    "packed.h5": ("bag", packed_h5, r"would take 1073741824 bytes.* \d+ at most"),
    "header.safetensors": ("bag", safetensors_header(1 << 40, [3, 4]), r"damaged"),
    "shape.safetensors": ("bag", safetensors_header(0, [1 << 20, 1 << 20]), r"damaged"),
    "weights.safetensors": ("weights", safetensors_header(0, [1 << 20, 1 << 20]), r"no whole safe"),
}


@pytest.mark.parametrize("name", CASES)
def test_memory_goes_by_what_is_there_and_not_by_what_is_claimed(tmp_path: Path, name: str) -> None:
    kind, write, expected = CASES[name]
    write(tmp_path / name)
    assert (tmp_path / name).stat().st_size < 10 << 20
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(LIMIT_MB), kind, str(tmp_path / name)],
        capture_output=True, text=True, timeout=800, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    said, peak_mb = json.loads(result.stdout)
    import re

    assert re.search(expected, said), said
    assert peak_mb < LIMIT_MB, said


def test_the_limit_would_stop_who_takes_what_is_claimed(tmp_path: Path) -> None:
    # The same program, on a file that is honest about being large.
    path = tmp_path / "large.h5"
    with h5py.File(path, "w") as file:
        file["features"] = np.zeros((60_000, 1_800), np.float32)
        file["coords"] = np.zeros((60_000, 2), np.int64)
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(LIMIT_MB), "bag", str(path)],
        capture_output=True, text=True, timeout=800, check=False,
    )  # fmt: skip
    assert result.returncode == 1
    assert "MemoryError" in result.stderr


@pytest.mark.parametrize("limit", [None, 1 << 40])
def test_pillows_limits_stay_what_the_program_set(
    tmp_path: Path, limit: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import ImageFile, PngImagePlugin

    from xmag.slide import Slide

    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    before = (PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY)
    Image.fromarray(texture(300, 200)).save(tmp_path / "a.png")
    with Slide(tmp_path / "a.png", mpp=0.5) as slide:
        slide.thumbnail(max_px=50)
    assert limit == Image.MAX_IMAGE_PIXELS
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    assert before == (PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY)


def test_a_transparent_image_takes_little_more_than_its_pixels(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    pixels = np.zeros((4000, 5000, 4), np.uint8)
    pixels[..., 3] = 200
    Image.fromarray(pixels).save(path, compress_level=1)
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, "1000", "slide", str(path)],
        capture_output=True, text=True, timeout=800, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    said, peak_mb = json.loads(result.stdout)
    assert said == "read"
    assert peak_mb < 4 * pixels.nbytes / 2**20
