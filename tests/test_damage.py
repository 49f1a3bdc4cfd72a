"""One damaged tile, in many ways: an error, or dropped where that is asked; never other pixels."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
from fuzz.structure import chunks_of
from fuzz.tiffs import Editor
from support.encoders import ColourEncoder
from support.fake_reader import FakeRegionReader, FakeTileReader, noise
from support.slides import texture, write_svs, write_tiff

from xmag.bag import FeatureBag
from xmag.cohort import CohortRow, extract_cohort
from xmag.errors import DamagedSlideError, InputError, MismatchError, XmagWarning
from xmag.extract import extract_features
from xmag.geometry import TileSpec
from xmag.plan import TilePlan, plan_tiles
from xmag.slide import Slide, codecs
from xmag.slide.reader import RegionReader
from xmag.tiles import read_tiles

SIZE = (900, 700)
TILE = 128
DAMAGED = 9
"""The tile that is damaged: the third of the second row of seven."""
SPEC = TileSpec(mpp=0.5, size_px=48)
RESAMPLED = TileSpec(mpp=0.7, size_px=40, mpp_tolerance=0)

CODINGS = ("ycbcr420", "rgb444", "j2k-rgb", "j2k-ycbcr", "lzw", "deflate", "zstd", "webp", "raw")

Damage = Callable[[bytes], bytes]


def _zeros(start: float, length: int) -> Damage:
    """A stretch of zeros from a fraction of the stream on, as a sector that was never written."""

    def change(stream: bytes) -> bytes:
        at = int(len(stream) * start)
        return stream[:at] + bytes(len(stream[at : at + length])) + stream[at + length :]

    return change


WAYS: dict[str, Damage] = {
    "cut at the start": lambda s: s[:10],
    "cut in the middle": lambda s: s[: len(s) // 2],
    "cut before the end": lambda s: s[: int(len(s) * 0.97)],
    "all zeros": lambda s: bytes(len(s)),
    "all ones": lambda s: b"\xff" * len(s),
    "zeros in the middle": _zeros(0.4, 1024),
    "zeros from the middle on": _zeros(0.5, 1 << 20),
    "noise": lambda s: np.random.default_rng(0).bytes(len(s)),
    "noise in the middle": lambda s: (
        s[: len(s) // 3] + np.random.default_rng(0).bytes(1500) + s[len(s) // 3 + 1500 :]
    ),
    "a text": lambda s: (b"404 Not Found" * len(s))[: len(s)],
}

UNPROTECTED = {
    "raw": {"all zeros", "all ones", "noise", "a text"}
    | {way for way in WAYS if "middle" in way and "cut" not in way},
}
"""Codings without any redundancy, in which such bytes are pixels like others: nothing can tell."""


def write(path: Path, color: str) -> None:
    """A slide of one level, so that no other can stand in."""
    write_tiff(path, size=SIZE, levels=(1,), tile=(TILE, TILE), color=color)


def damage(path: Path, change: Damage, *, tile: int = DAMAGED) -> None:
    """Change the bytes of one tile, where they lie."""
    editor = Editor(path.read_bytes())
    chunk = chunks_of(editor.pristine, editor.map, editor.map.directories[0])[tile]
    stream = editor.pristine[chunk.offset : chunk.offset + chunk.length]
    editor.replace(chunk, change(stream))
    path.write_bytes(bytes(editor.data))


def tiles_of(path: Path, spec: TileSpec, *, damaged: str = "error") -> dict[tuple[int, int], bytes]:
    """The pixels of all tiles of a slide, by their corners."""
    found = {}
    with Slide(path) as slide:
        plan = plan_tiles(slide, spec)
        for coords, tiles in read_tiles(slide, plan, batch_size=7, threads=2, damaged=damaged):
            assert len(coords) == len(tiles) > 0
            found |= {tuple(c): t.tobytes() for c, t in zip(coords.tolist(), tiles, strict=True)}
    return found


def touches(corner: tuple[int, int], spec: TileSpec) -> bool:
    """Whether the tile at `corner`, in level-0 px, lies on the damaged one."""
    across = -(-SIZE[0] // TILE)
    row, column = divmod(DAMAGED, across)
    side = spec.size_px * spec.mpp / 0.25
    return all(
        at < (cell + 1) * TILE and at + side > cell * TILE
        for at, cell in zip(corner, (column, row), strict=True)
    )


@pytest.fixture(scope="module")
def undamaged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("undamaged")
    for color in CODINGS:
        write(folder / f"{color}.tif", color)
    return {color: folder / f"{color}.tif" for color in CODINGS}


@pytest.mark.parametrize("color", CODINGS)
def test_no_way_of_damaging_a_tile_makes_up_pixels(
    undamaged: dict[str, Path], tmp_path: Path, color: str
) -> None:
    path = tmp_path / "a.tif"
    for spec in (SPEC, RESAMPLED):
        whole = tiles_of(undamaged[color], spec)
        rest = {corner: px for corner, px in whole.items() if not touches(corner, spec)}
        assert 0 < len(rest) < len(whole) - 3
        for name, change in WAYS.items():
            if name in UNPROTECTED.get(color, ()):
                continue
            path.write_bytes(undamaged[color].read_bytes())
            damage(path, change)
            with pytest.raises(DamagedSlideError, match=rf"a\.tif: tile {DAMAGED} "):
                tiles_of(path, spec)
            assert tiles_of(path, spec, damaged="drop") == rest, name


@pytest.mark.parametrize("color", ["raw"])
def test_where_a_coding_has_no_redundancy_other_bytes_are_other_pixels(
    undamaged: dict[str, Path], tmp_path: Path, color: str
) -> None:
    # It is documented, and nothing can be done: a table in docs/security.md says so.
    path = tmp_path / "a.tif"
    path.write_bytes(undamaged[color].read_bytes())
    damage(path, WAYS["noise in the middle"])
    assert len(tiles_of(path, SPEC)) == len(tiles_of(undamaged[color], SPEC))


@pytest.mark.parametrize("where", ["beyond the end", "in another tile"])
def test_a_tile_whose_bytes_lie_elsewhere_is_damaged(
    undamaged: dict[str, Path], tmp_path: Path, where: str
) -> None:
    path = tmp_path / "a.tif"
    editor = Editor(undamaged["ycbcr420"].read_bytes())
    chunk = chunks_of(editor.pristine, editor.map, editor.map.directories[0])[DAMAGED]
    at = len(editor.data) - 5 if where == "beyond the end" else chunk.offset + 100
    editor.put(chunk.offset_at, chunk.offset_size, at)
    path.write_bytes(bytes(editor.data))
    whole = tiles_of(undamaged["ycbcr420"], SPEC)
    with pytest.raises(DamagedSlideError, match=rf"tile {DAMAGED} "):
        tiles_of(path, SPEC)
    # The bytes of eight tiles are asked for at once: one that is missing does not cost the others.
    rest = {corner: px for corner, px in whole.items() if not touches(corner, SPEC)}
    assert tiles_of(path, SPEC, damaged="drop") == rest


def test_a_coarse_tile_without_bytes_is_damaged_where_the_finer_one_is(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    write_tiff(path, size=SIZE, levels=(1, 2), tile=(TILE, TILE), missing={1: range(12)})
    damage(path, WAYS["cut in the middle"])
    spec = TileSpec(mpp=0.5, size_px=48)
    with pytest.raises(DamagedSlideError, match=rf"tile {DAMAGED} .* of level 0"):
        tiles_of(path, spec)
    write_tiff(tmp_path / "b.tif", size=SIZE, levels=(1, 2), tile=(TILE, TILE))
    assert 0 < len(tiles_of(path, spec, damaged="drop")) < len(tiles_of(tmp_path / "b.tif", spec))


def test_what_is_dropped_is_counted_in_the_provenance_and_the_plan(tmp_path: Path) -> None:
    path, out = tmp_path / "a.svs", tmp_path / "a.h5"
    base = write_svs(path, size=(2000, 1900), levels=(1, 4))
    assert base.shape == (1900, 2000, 3)
    with Slide(path) as slide:
        tile = slide.reader.read_tile_bytes(1, [1])[0]
    data = path.read_bytes()
    assert data.count(tile) == 1
    encoder = ColourEncoder()
    whole = extract_features(path, model=encoder, tissue=None)
    path.write_bytes(data.replace(tile, tile[: len(tile) // 2] + bytes(len(tile) - len(tile) // 2)))
    with pytest.raises(DamagedSlideError, match=r"tile 1 .* of level 1 is damaged"):
        extract_features(path, model=encoder, tissue=None)
    with pytest.warns(XmagWarning, match=r"9 of 25 tiles of 'a\.svs' are damaged and left"):
        bag = extract_features(path, model=encoder, tissue=None, damaged="drop")
    kept = [whole.coords.tolist().index(corner) for corner in bag.coords.tolist()]
    assert (len(bag), len(whole)) == (16, 25)
    np.testing.assert_array_equal(bag.features, whole.features[kept])
    record = bag.provenance.record
    assert record["damaged"] == "drop"
    assert record["tiles"]["damaged"] == len(whole) - len(bag)
    assert record["tiles"]["kept"] == len(bag)
    assert whole.provenance.record["damaged"] == "error"
    assert whole.provenance.record["tiles"]["damaged"] == 0
    # A tile that is there is what it would be anyway: such bags may be mixed.
    assert not bag.provenance.differences(whole.provenance)
    bag.save(out)
    assert FeatureBag.load(out).provenance == bag.provenance


@pytest.mark.parametrize("processes", [0, 1])
def test_a_cohort_drops_damaged_tiles_only_where_it_may(tmp_path: Path, processes: int) -> None:
    path, out = tmp_path / "a.svs", tmp_path / "out"
    write_svs(path, size=(2000, 1900), levels=(1, 4))
    with Slide(path) as slide:
        tile = slide.reader.read_tile_bytes(1, [1])[0]
    cut = tile[: len(tile) // 2] + bytes(len(tile) - len(tile) // 2)
    path.write_bytes(path.read_bytes().replace(tile, cut))

    def run(**options: Any) -> CohortRow:
        options |= {"model": ColourEncoder(), "tissue": None, "processes": processes}
        row: CohortRow = extract_cohort(path, out, **options)[0]
        return row

    refused = run()
    assert refused.status == "failed"
    assert "of level 1 is damaged" in refused.error
    with pytest.warns(XmagWarning, match=r"9 of 25 tiles of 'a\.svs' are damaged and left"):
        dropped = run(damaged="drop")
    assert (dropped.status, dropped.tiles) == ("done", 16)
    bag = FeatureBag.load(out / "a.h5")
    assert bag.provenance is not None
    assert bag.provenance.record["tiles"]["damaged"] == 9
    with pytest.warns(XmagWarning, match="damaged and left out"):
        expected = extract_features(path, model=ColourEncoder(), tissue=None, damaged="drop")
    np.testing.assert_array_equal(bag.features, expected.features)
    np.testing.assert_array_equal(bag.coords, expected.coords)
    assert run(damaged="drop").status == "skipped"
    with pytest.raises(MismatchError, match="damaged: 9 tiles dropped there, none here"):
        run()
    assert run(on_mismatch="redo").status == "failed"


def test_dropping_changes_nothing_where_nothing_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "a.svs"
    write_svs(path, size=(2000, 1900))
    encoder = ColourEncoder()
    bags = [
        extract_features(path, model=encoder, tissue=None, damaged=policy)
        for policy in ("error", "drop")
    ]
    np.testing.assert_array_equal(bags[0].features, bags[1].features)
    np.testing.assert_array_equal(bags[0].coords, bags[1].coords)
    assert bags[0].provenance.fingerprint == bags[1].provenance.fingerprint


def test_a_slide_without_an_undamaged_tile_is_an_error_with_either_policy(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    write_tiff(path, size=(500, 500), levels=(1,), tile=(512, 512), mpp=1.0)
    damage(path, WAYS["cut in the middle"], tile=0)
    with pytest.raises(DamagedSlideError, match=r"all 25 tiles of a\.tif are damaged"):
        extract_features(path, model=ColourEncoder(), tissue=None, damaged="drop")


def test_readers_that_hide_their_tiles_drop_what_they_cannot_read() -> None:
    class Holed(FakeRegionReader):
        def read_region(self, level, xy, size):
            if xy[0] <= 300 < xy[0] + size[0] and xy[1] <= 200 < xy[1] + size[1]:
                raise DamagedSlideError("a hole")
            return super().read_region(level, xy, size)

    pixels = noise(600, 400)
    assert isinstance(Holed(pixels), RegionReader)
    found = []
    for reader in (FakeRegionReader(pixels), Holed(pixels)):
        slide = Slide.from_reader(reader, name="a", mpp=0.5)
        plan = plan_tiles(slide, TileSpec(mpp=0.5, size_px=64))
        batches = list(read_tiles(slide, plan, batch_size=10, damaged="drop"))
        found.append(
            {
                tuple(c): t.tobytes()
                for coords, tiles in batches
                for c, t in zip(coords.tolist(), tiles, strict=True)
            }
        )
    (hole,) = set(found[0]) - set(found[1])
    assert hole == (256, 192)
    assert found[1].items() <= found[0].items()


def test_a_batch_of_damaged_tiles_alone_is_left_out() -> None:
    reader = FakeTileReader(texture(960, 240), tile=(240, 240), damaged=[1], mpp=0.5)
    slide = Slide.from_reader(reader, name="a")
    plan = plan_tiles(slide, TileSpec(mpp=0.5, size_px=240))
    batches = list(read_tiles(slide, plan, batch_size=1, damaged="drop"))
    assert [coords.tolist() for coords, _ in batches] == [[[0, 0]], [[480, 0]], [[720, 0]]]


def test_the_plan_says_which_tiles_were_damaged_and_survives_json() -> None:
    slide = Slide.from_reader(FakeTileReader(noise(500, 300), mpp=0.5), name="a")
    plan = plan_tiles(slide, TileSpec(mpp=0.5, size_px=100))
    lost = np.zeros(len(plan), np.bool_)
    lost[[2, 7]] = True
    less = plan.without(lost)
    np.testing.assert_array_equal(less.coords, plan.coords[~lost])
    np.testing.assert_array_equal(less.dropped["damaged"], plan.coords[lost])
    assert "".join(less.cells).count("d") == 2
    again = TilePlan.from_json(less.to_json())
    assert json.loads(again.to_json()) == json.loads(less.to_json())
    np.testing.assert_array_equal(again.dropped["damaged"], plan.coords[lost])


def test_another_policy_is_refused_before_any_work(tmp_path: Path) -> None:
    write_tiff(tmp_path / "a.tif", size=(200, 200))
    with pytest.raises(InputError, match="damaged is 'white'; expected 'error' or 'drop'"):
        extract_features(tmp_path / "a.tif", model=ColourEncoder(), damaged="white")
    with Slide(tmp_path / "a.tif") as slide:
        plan = plan_tiles(slide, TileSpec(mpp=0.25, size_px=50))
        with pytest.raises(InputError, match="damaged is 'grey'"):
            read_tiles(slide, plan, damaged="grey")


def test_tiles_of_a_scan_are_read_up_to_its_edge_on_a_larger_canvas() -> None:
    # Windows beside a scan may lie on the padding of its last tiles, which is no part of it.
    stored = noise(150, 150)
    reader = FakeTileReader(
        stored, tile=(128, 128), origin=(30, 20), canvas=(400, 300), mpp=0.5, reductions=(1,)
    )
    slide = Slide.from_reader(reader, name="a")
    canvas = np.full((300, 400, 3), 255, np.uint8)
    canvas[20:170, 30:180] = stored
    plan = plan_tiles(slide, TileSpec(mpp=0.5, size_px=32))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for coords, tiles in read_tiles(slide, plan, batch_size=9):
            for (x, y), tile in zip(coords.tolist(), tiles, strict=True):
                np.testing.assert_array_equal(tile, canvas[y : y + 32, x : x + 32])


@pytest.mark.parametrize("options", [{"level": 45}, {"level": 0, "reversible": True}])
def test_jpeg_2000_of_hardly_any_content_is_not_taken_for_damaged(options) -> None:
    # Packets without content are a zero byte each.
    decode = codecs.decoder(
        codecs.TileCoding(
            compression=33005, photometric=2, samples=3, size=(256, 256), last_height=256
        )
    )
    for grey in (0, 128, 243, 255):
        blank = np.full((256, 256, 3), grey, np.uint8)
        blank[100, 100:102] = 90
        stream = imagecodecs.jpeg2k_encode(blank, codecformat="j2k", resolutions=8, **options)
        decoded = decode(stream[: stream.index(b"\xff\xd9") + 2], 1)
        assert abs(decoded.astype(int) - blank).mean() < 3


@pytest.mark.shared
def test_no_tile_of_a_real_jpeg_2000_slide_is_taken_for_damaged(shared: Path) -> None:
    with Slide(shared / "slides" / "tcga-cr-7395-01a-01-ts1.svs") as slide:
        for number, level in enumerate(slide.reader.levels):
            count = min(level.tiles_across * level.tiles_down, 400)
            for data in slide.reader.read_tile_bytes(number, range(count)):
                slide.reader.decode(number, data, 4)
