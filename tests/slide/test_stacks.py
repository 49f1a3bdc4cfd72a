"""Stacks of JPEG tiles: the pixels of each alone, and nothing accepted that is refused alone."""

import numpy as np
import pytest
from support.slides import abbreviated, encode_jpeg, jpeg_segments, texture, write_svs
from support.vendor_slides import write_ndpi

from xmag.errors import DamagedSlideError
from xmag.geometry import TileSpec
from xmag.plan import plan_tiles
from xmag.slide import Slide, codecs, stacks
from xmag.tiles import decoding, read_tiles

PHOTOMETRIC = {
    "ycbcr420": 6,
    "ycbcr422": 6,
    "ycbcr440": 6,
    "ycbcr411": 6,
    "ycbcr444": 6,
    "rgb444": 2,
}
BEHIND_HEADER = 14


def decoder(color, size=(96, 96), **changes):
    fields = {
        "compression": 7, "photometric": PHOTOMETRIC[color], "samples": 3, "size": size,
        "last_height": size[1], "aperio": True,
    }  # fmt: skip
    return codecs.decoder(codecs.TileCoding(**(fields | changes)))


def tiles(color, count, size=(96, 96), quality=90):
    return [encode_jpeg(texture(*size, seed=seed), color, quality) for seed in range(count)]


def scan_of(stream):
    return stream.index(b"\xff\xda") + BEHIND_HEADER


def stacked(decode, chunks, n):
    """The pixels of those that are decoded together, None for each other."""
    width, height = (side // n for side in decode._size)
    row = np.full((height, len(chunks) * width, 3), 7, np.uint8)
    done = decode.many(chunks, n, row)
    parts = np.split(row, len(chunks), axis=1)
    return [part if ok else None for part, ok in zip(parts, done, strict=True)]


def together(decode, chunks, n):
    """How many of these come out of a stack; each as it is alone."""
    found = stacked(decode, chunks, n)
    assert len(found) == len(chunks)
    for pixels, chunk in zip(found, chunks, strict=True):
        if pixels is not None:
            assert np.array_equal(pixels, decode(chunk, n))
    return sum(pixels is not None for pixels in found)


@pytest.mark.parametrize("color", PHOTOMETRIC)
@pytest.mark.parametrize("n", [1, 2, 4, 8])
@pytest.mark.parametrize("count", [2, 7, 11])
def test_stacked_tiles_are_those_decoded_alone(color, n, count):
    # At full scale subsampled chroma is interpolated over the seam.
    apart = color.endswith("444") or n > 1
    assert together(decoder(color), tiles(color, count), n) == (count if apart else 0)


@pytest.mark.parametrize("size", [(104, 96), (240, 240), (97, 8), (33, 64)])
@pytest.mark.parametrize("color", ["ycbcr420", "rgb444"])
def test_other_sizes_are_equal_or_decoded_alone(color, size):
    for n in codecs.reductions(size):
        found = together(decoder(color, size), tiles(color, 5, size, 75), n)
        whole = size[1] % (16 if color == "ycbcr420" else 8) == 0
        assert found == (5 if whole and (n > 1 or color == "rgb444") else 0)


def test_tiles_share_their_tables_and_may_be_padded():
    parts = [abbreviated(stream) for stream in tiles("ycbcr420", 5)]
    decode = decoder("ycbcr420", jpeg_tables=parts[0][0])
    chunks = [stream + bytes(200 * number) for number, (_, stream) in enumerate(parts)]
    assert together(decode, chunks, 2) == 5


def test_more_tiles_than_a_jpeg_is_high_are_several_stacks():
    size = (16, 8192)
    assert together(decoder("ycbcr444", size), tiles("ycbcr444", 9, size, 30), 8) == 9


def test_what_is_unlike_the_first_is_decoded_alone():
    chunks = tiles("ycbcr420", 4)
    chunks[2] = encode_jpeg(texture(96, 96), "ycbcr420", 60)
    assert together(decoder("ycbcr420"), chunks, 2) == 3
    short = encode_jpeg(texture(96, 32), "ycbcr420")
    chunks[2] = short
    assert together(decoder("ycbcr420", last_height=32), chunks, 2) == 3
    assert together(decoder("ycbcr420", last_height=32), [short, *chunks], 2) == 0
    assert together(decoder("ycbcr420"), [b"", *chunks], 2) == 0


def with_restarts(stream):
    """A stream whose header names a restart interval longer than the tile."""
    return stream[:2] + b"\xff\xdd\x00\x04\xff\xff" + stream[2:]


def extended(stream):
    """The same stream, said to be of extended sequential coding."""
    return stream.replace(b"\xff\xc0", b"\xff\xc1", 1)


@pytest.mark.parametrize("change", [with_restarts, extended])
def test_what_is_no_plain_baseline_jpeg_is_decoded_alone(change):
    chunks = [change(stream) for stream in tiles("ycbcr420", 4)]
    decode = decoder("ycbcr420")
    assert decode(chunks[0], 2).shape == (48, 48, 3)
    assert together(decode, chunks, 2) == 0


def test_tiles_of_which_no_two_fit_into_a_jpeg_are_decoded_alone():
    size = (8, 32768)
    assert together(decoder("ycbcr444", size), tiles("ycbcr444", 2, size, 5), 8) == 0


@pytest.mark.parametrize("steps", [b"\x00", b"\x55"])
def test_components_without_blocks_are_damage(steps):
    chunks = [bytearray(stream) for stream in tiles("ycbcr444", 3)]
    for data in chunks:
        at = data.index(b"\xff\xc0") + 11
        for number in range(3):
            data[at + 3 * number : at + 3 * number + 1] = steps
    decode = decoder("ycbcr444")
    with pytest.raises(DamagedSlideError):
        decode(bytes(chunks[0]), 2)
    assert stacked(decode, [bytes(data) for data in chunks], 2) == [None] * 3


def test_large_tiles_are_decoded_alone():
    chunks = tiles("rgb444", 3, (240, 240), 98)
    assert len(chunks[0]) > stacks._MOST_BYTES
    assert together(decoder("rgb444", (240, 240)), chunks, 2) == 0


def test_stretches_of_a_jpeg_are_decoded_alone(tmp_path):
    write_ndpi(tmp_path / "a.ndpi")
    with Slide(tmp_path / "a.ndpi") as slide:
        chunks = slide.reader.read_tile_bytes(0, range(6))
        width, height = slide.reader.levels[0].tile_size
        row = np.empty((height, 6 * width, 3), np.uint8)
        assert slide.reader.decode_many(0, chunks, 1, row) == [False] * 6


def damaged(stream, rng):
    """A stream with one of the kinds of damage that a codec may not see."""
    data = bytearray(stream)
    start = scan_of(stream) if rng.random() < 0.95 else 2
    low = max(start, len(data) - 40) if rng.random() < 0.5 else start
    at, count = int(rng.integers(low, len(data))), int(rng.integers(1, 9))
    match int(rng.integers(9)):
        case 0:
            data[at] ^= 1 << int(rng.integers(8))
        case 1:
            del data[at : at + count]
        case 2:
            del data[at:]
        case 3:
            data[at : at + 70 * count] = bytes(len(data[at : at + 70 * count]))
        case 4:
            data[at:at] = bytes([0xFF, int(rng.integers(1, 255))])
        case 5:
            data[at:at] = bytes([0xFF, int(rng.integers(0xD0, 0xDA))])
        case 6:
            data[at:at] = rng.bytes(count)
        case 7:  # behind the last MCU, where decoders have it in their bit buffer
            data[-2:-2] = rng.bytes(count).replace(b"\xff", b"\xfe")
        case 8:
            data[at : at + 8] = rng.bytes(8)
    return bytes(data)


@pytest.mark.parametrize("color", ["ycbcr420", "ycbcr422", "ycbcr444", "rgb444"])
def test_nothing_is_accepted_in_a_stack_that_is_refused_alone(color):
    rng = np.random.default_rng(5)
    decode = decoder(color, (128, 128))
    sets = [tiles(color, 4, (128, 128), quality) for quality in (50, 80)]
    refused = accepted = 0
    for number in range(1000):
        chunks, n, place = [*sets[number % 2]], (2, 4, 8)[number % 3], int(rng.integers(4))
        chunks[place] = damaged(chunks[place], rng)
        try:
            alone = decode(chunks[place], n)
        except DamagedSlideError:
            alone = None
            refused += 1
        found = stacked(decode, chunks, n)[place]
        if found is not None:
            accepted += 1
            assert alone is not None, number
            assert np.array_equal(found, alone), number
    assert refused > 300
    assert accepted > 50


@pytest.mark.parametrize("place", [0, 1, 3])
def test_bytes_left_over_behind_a_tile_are_not_hidden_by_the_next(place):
    # So few that a decoder may have taken them into its bit buffer with the last of the tile.
    for color in ("ycbcr420", "ycbcr444"):
        for count in range(1, 8):
            chunks = tiles(color, 4, (128, 128), 50)
            chunks[place] = chunks[place][:-2] + b"\x55" * count + b"\xff\xd9"
            assert stacked(decoder(color, (128, 128)), chunks, 2) == [None] * 4


def test_scans_of_two_tiles_in_one_are_not_taken_for_two():
    chunks = tiles("ycbcr444", 3)
    scans = [chunk[scan_of(chunk) : -2] for chunk in chunks]
    header = chunks[0][: scan_of(chunks[0])]
    chunks[0] = header + scans[0] + b"\xff\xd0" + scans[1] + b"\xff\xd9"
    chunks[1] = header + b"\xff\xd9"
    assert stacked(decoder("ycbcr444"), chunks, 2) == [None] * 3


def read_all(path, **options):
    with Slide(path) as slide:
        plan = plan_tiles(slide, TileSpec(size_px=64), tissue=None)
        return list(read_tiles(slide, plan, batch_size=7, **options))


@pytest.fixture
def counted(monkeypatch):
    """How many tiles came out of stacks."""
    counts = []
    many = codecs.JpegDecoder.many

    def counting(*args):
        found = many(*args)
        counts.append(sum(found))
        return found

    monkeypatch.setattr(codecs.JpegDecoder, "many", counting)
    return counts


@pytest.mark.parametrize("color", ["ycbcr420", "rgb444"])
def test_many_threads_read_the_tiles_that_one_reads(tmp_path, color, counted):
    write_svs(
        tmp_path / "a.svs",
        size=(1500, 1100),
        levels=(1,),
        color=color,
        quality=70,
    )
    one = read_all(tmp_path / "a.svs", threads=1)
    assert not counted
    many = read_all(tmp_path / "a.svs", threads=decoding._STACKING_THREADS)
    assert sum(counted) > 20
    for (coords, pixels), (others, expected) in zip(many, one, strict=True):
        assert np.array_equal(coords, others)
        assert np.array_equal(pixels, expected)


def test_damage_in_a_stack_is_blamed_on_its_tile(tmp_path, counted):
    path = tmp_path / "a.svs"
    write_svs(path, size=(1500, 4400), levels=(1,), quality=70)
    with Slide(path) as slide:
        plan = plan_tiles(slide, TileSpec(size_px=64), tissue=None)
        victim = slide.reader.read_tile_bytes(plan.scale.level, [9])[0]
    content = path.read_bytes()
    assert content.count(victim) == 1
    garbled = victim[:-400] + bytes(reversed(victim[-400:-2])).replace(b"\xff", b"\x7f")
    path.write_bytes(content.replace(victim, garbled + b"\xff\xd9"))
    messages = []
    for threads in (1, 8):
        with pytest.raises(DamagedSlideError, match=r"tile 9 \(row 1") as error:
            read_all(path, threads=threads)
        messages.append(str(error.value))
    assert messages[0] == messages[1]
    kept = [read_all(path, threads=threads, damaged="drop") for threads in (1, 8)]
    assert sum(counted) > 20
    for (coords, pixels), (others, expected) in zip(*kept, strict=True):
        assert np.array_equal(coords, others)
        assert np.array_equal(pixels, expected)


def test_a_second_full_scan_is_damage(tmp_path):
    (stream,) = tiles("ycbcr420", 1)
    again = b"".join(part for marker, part in jpeg_segments(stream) if marker == 0xDA)
    with pytest.raises(DamagedSlideError):
        decoder("ycbcr420")(stream[:-2] + 5 * again + b"\xff\xd9", 2)


def test_tiles_with_other_headers_in_turn_are_those_of_decoders_of_their_own():
    decode = decoder("ycbcr420")
    sets = [tiles("ycbcr420", 3, quality=quality) for quality in (50, 90, 70)]
    for chunk in [chunk for chunks in zip(*sets, strict=True) for chunk in chunks] * 2:
        assert np.array_equal(decode(chunk, 2), decoder("ycbcr420")(chunk, 2))


def test_lost_bytes_are_seen_behind_a_header_that_is_known():
    decode, (stream, other) = decoder("ycbcr420", (240, 240)), tiles("ycbcr420", 2, (240, 240))
    decode(stream, 2)
    middle = (scan_of(other) + len(other)) // 2
    with pytest.raises(DamagedSlideError, match="zeros"):
        decode(other[:middle] + bytes(512) + other[middle + 512 :], 2)
    shorter = encode_jpeg(texture(240, 232, seed=1), "ycbcr420", 90)
    with pytest.raises(DamagedSlideError, match="240x232 px"):
        decode(shorter, 2)
