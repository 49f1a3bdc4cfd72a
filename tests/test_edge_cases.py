"""Odd slides and odd places, from end to end: functions, cohorts and the command line.

What each does to pixels, levels and plans is tested in slide/ and test_plan.py.
"""

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import h5py
import numpy as np
import pytest
from support import tiff
from support.encoders import ColourEncoder
from support.slides import page, texture, write_svs, write_tiff
from support.vendor_slides import write_ome, write_scn

from xmag.bag import FeatureBag
from xmag.cli import main
from xmag.cohort import extract_cohort
from xmag.errors import (
    ClosedSlideError,
    DamagedSlideError,
    InputError,
    SlideScaleError,
    UnsupportedSlideError,
    XmagWarning,
)
from xmag.extract import extract_features
from xmag.geometry import TileSpec
from xmag.plan import plan_tiles
from xmag.slide import Slide
from xmag.tiles import read_tiles
from xmag.tissue import find_tissue

SIZE = (1500, 1200)


def features(slide, **options):
    return extract_features(slide, model=ColourEncoder(), **{"tissue": None, **options})


def sixteen_bit(path):
    tags = {258: (tiff.SHORT, [16, 16, 16])}
    tiff.write_pages(path, [page(texture(200, 200), color="raw", tags=tags)])


def palette(path):
    tags = {
        258: (tiff.SHORT, 8),
        277: (tiff.SHORT, 1),
        262: (tiff.SHORT, 3),
        320: (tiff.SHORT, [0] * 768),
    }
    tiff.write_pages(path, [page(texture(200, 200), color="raw", tags=tags)])


def truncated_tile(path):
    """A slide, one of whose tiles at 1 µm/px ends in the middle."""
    write_svs(path, size=(2000, 1900))
    with Slide(path) as slide:
        tile = slide.reader.read_tile_bytes(1, [1])[0]
    data = path.read_bytes()
    half = len(tile) // 2
    assert data.count(tile) == 1
    path.write_bytes(data.replace(tile, tile[:half] + bytes(len(tile) - half)))


REFUSED = {
    "16 bit.tif": (sixteen_bit, UnsupportedSlideError, "uint16.*8-bit RGB"),
    "palette.tif": (palette, UnsupportedSlideError, "PALETTE.*8-bit RGB"),
    "z-stack.tif": (
        lambda path: write_ome(path, sizes=[(300, 200)], z_planes=3),
        UnsupportedSlideError,
        "z-stack.*one focal plane",
    ),
    "two regions.scn": (write_scn, InputError, r"2 scans.*region=0 .*region=1 "),
    "no scale.svs": (
        lambda path: write_svs(path, size=SIZE, mpp=None, power=None),
        SlideScaleError,
        "does not say how large its pixels are.*mpp=",
    ),
    "absurd scale.svs": (
        lambda path: write_svs(path, size=SIZE, mpp=896, power=None),
        SlideScaleError,
        r"says 896 µm/px \(Aperio MPP\).*between 0\.05 and 20.*mpp=",
    ),
    "coarse.svs": (
        lambda path: write_svs(path, size=SIZE, mpp=2.2, power=None),
        SlideScaleError,
        "2.2 µm/px at its finest level.*never upsampled",
    ),
    "truncated tile.svs": (truncated_tile, DamagedSlideError, "tile 1 .*level 1 is damaged"),
    "cut.svs": (
        lambda path: (write_svs(path, size=SIZE), os.truncate(path, path.stat().st_size // 2)),
        DamagedSlideError,
        "truncated",
    ),
}


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    """A folder, with a space and an accent in its name, of slides that cannot be done."""
    folder = tmp_path_factory.mktemp("refusés 1")
    for name, (write, _, _) in REFUSED.items():
        write(folder / name)
    return folder


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_faithfully_is_refused_with_the_reason(refused, name):
    _, error, reason = REFUSED[name]
    with pytest.raises(error, match=reason):
        features(refused / name)


@pytest.mark.parametrize("processes", [0, 2])
def test_in_a_cohort_the_same_reasons_stand_in_the_rows(refused, tmp_path, processes):
    report = extract_cohort(
        refused, tmp_path / "out", model=ColourEncoder(), tissue=None, processes=processes
    )
    rows = {row.slide: row for row in report}
    assert set(rows) == set(REFUSED)
    for name, (_, error, _) in REFUSED.items():
        assert rows[name].status == "failed"
        with pytest.raises(error) as alone:
            features(refused / name)
        assert rows[name].error == str(alone.value)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.csv"]


def test_on_the_command_line_a_slide_with_a_truncated_tile_gets_no_file(refused, tmp_path, capsys):
    slide, out = refused / "truncated tile.svs", tmp_path / "out"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", XmagWarning)
        overview = main(["info", str(slide)])
        status = main(["extract", str(slide), "-o", str(out), "--model", "xmag-mini"])
    assert (overview, status) == (0, 1)
    assert "is damaged" in capsys.readouterr().out
    assert not list(out.glob("*.h5"))


def test_a_power_that_contradicts_the_scale_is_a_warning_and_the_scale_counts(tmp_path):
    write_svs(tmp_path / "a.svs", size=SIZE, mpp=0.25, power=20)
    with pytest.warns(XmagWarning, match=r"0\.25 is used"):
        bag = features(tmp_path / "a.svs")
    assert bag.tiles.level0_mpp == 0.25


def test_a_power_alone_is_an_assumption_that_is_recorded(tmp_path):
    write_svs(tmp_path / "a.svs", size=SIZE, mpp=None, power=40)
    with pytest.warns(XmagWarning, match="objective power of 40"):
        bag = features(tmp_path / "a.svs")
    assert bag.provenance.record["scale"]["mpp_source"] == "objective power"


@pytest.mark.parametrize(
    ("mpp", "tolerance", "read_as_it_is"),
    [
        (0.2624, 0.05, True),
        (0.2626, 0.05, False),
        (0.2376, 0.05, True),
        (0.2374, 0.05, False),
        (0.2501, 0.0, False),
        (0.25, 0.0, True),
    ],
)
def test_a_scale_within_the_tolerance_is_read_as_it_is_and_said_so(
    tmp_path, mpp, tolerance, read_as_it_is
):
    write_svs(tmp_path / "a.svs", size=(1800, 1300), mpp=mpp)
    spec = TileSpec(size_px=56, mpp_tolerance=tolerance)
    bag = extract_features(tmp_path / "a.svs", model=ColourEncoder(spec=spec), tissue=None)
    effective = 8 * mpp if read_as_it_is else 2.0
    assert bag.tiles.mpp == pytest.approx(effective)
    assert bag.tiles.size_level0 == round(56 * effective / mpp)
    scale = bag.provenance.record["scale"]
    assert scale["effective_mpp"] == pytest.approx(effective)
    assert scale["resampled"] is not read_as_it_is


def test_sparse_tiles_are_white_at_the_base_and_else_what_the_finer_level_shows(tmp_path):
    shown = texture(*SIZE)
    for name, missing in (("whole", {}), ("sparse", {1: [0]}), ("blank", {0: [0], 1: [0]})):
        write_svs(tmp_path / f"{name}.svs", size=SIZE, pixels=shown, missing=missing)
    whole, sparse, blank = (features(tmp_path / f"{n}.svs") for n in ("whole", "sparse", "blank"))
    assert np.array_equal(whole.coords, sparse.coords)
    # Tile 0 of the level at 1 µm/px covers the first 960 level-0 px.
    under = (whole.coords + 448 <= 960).all(axis=1)
    beside = (whole.coords >= 960).any(axis=1)
    assert under.sum() == 4
    assert np.array_equal(whole.features[beside], sparse.features[beside])
    assert np.abs(whole.features[under] - sparse.features[under])[:, :3].max() < 2
    assert (blank.features[0, :3] > whole.features[0, :3]).all()


def test_no_tile_reaches_into_the_padding_at_the_edges(tmp_path):
    # Source tiles of 240 px at 1 µm/px: those at the right and lower edge are mostly padding.
    pixels = np.full((1344, 1344, 3), (200, 120, 160), np.uint8)
    write_svs(tmp_path / "a.svs", pixels=pixels, color="rgb444")
    bag = features(tmp_path / "a.svs")
    assert bag.coords.max() == 896
    assert len(bag) == 9
    assert np.abs(bag.features[:, :3] - (200, 120, 160)).max() < 2
    assert bag.features[:, 3:].max() < 2


@pytest.mark.parametrize("format", ["h5", "safetensors"])
@pytest.mark.parametrize("kind", ["smaller than a tile", "without tissue"])
def test_a_slide_without_tiles_is_an_empty_bag_in_a_valid_file(tmp_path, format, kind):
    size = (200, 150) if kind == "smaller than a tile" else SIZE
    pixels = np.full((*size[::-1], 3), 244, np.uint8)
    write_svs(tmp_path / "a.svs", pixels=pixels, levels=(1,))
    with pytest.warns(XmagWarning, match="has no tile"):
        bag = features(tmp_path / "a.svs", tissue="auto")
    assert bag.features.shape == (0, 6)
    assert bag.coords.shape == (0, 2)
    bag.save(tmp_path / f"alone.{format}")
    again = FeatureBag.load(tmp_path / f"alone.{format}")
    assert again.features.shape == (0, 6)
    assert again.provenance == bag.provenance
    report = extract_cohort(
        tmp_path / "a.svs", tmp_path / "out", model=ColourEncoder(), format=format, overlay=True
    )
    assert [row.status for row in report] == ["empty"]
    assert len(FeatureBag.load(tmp_path / "out" / f"a.{format}")) == 0
    if format == "h5":
        with h5py.File(tmp_path / "out" / "a.h5") as file:
            assert file["features"].shape == (0, 6)
            assert file["features"].dtype == np.float32
            assert file["coords"].shape == (0, 2)


def test_each_of_two_regions_can_be_chosen(tmp_path):
    write_scn(tmp_path / "two.scn", regions=[((0, 0), (900, 700)), ((1000, 1000), (900, 700))])
    told = pytest.warns(XmagWarning, match=r"4 tiles .*\(86%\); .* cells with little tissue")
    with Slide(tmp_path / "two.scn", region=1) as slide, told:
        bag = features(slide, tissue="auto")
    assert len(bag)
    assert (bag.coords + 448 > 1000).all()


def test_a_closed_slide_is_refused_by_whatever_reads_it(tmp_path):
    write_tiff(tmp_path / "a.tif", size=SIZE)
    with Slide(tmp_path / "a.tif") as slide:
        plan = plan_tiles(slide, TileSpec(size_px=56))
    for use in (
        lambda: features(slide),
        lambda: features(slide, plan=plan),
        lambda: find_tissue(slide),
        lambda: plan_tiles(slide, plan.spec),
        lambda: next(read_tiles(slide, plan)),
        slide.thumbnail,
        lambda: slide.read_region((0, 0), (9, 9)),
    ):
        with pytest.raises(ClosedSlideError, match=r"a\.tif is closed"):
            use()


def test_a_read_only_output_folder_is_said_before_any_work(tmp_path):
    write_svs(tmp_path / "a.svs", size=SIZE)
    out = tmp_path / "read-only"
    out.mkdir()
    out.chmod(0o555)
    command = [sys.executable, "-m", "xmag", "extract", tmp_path / "a.svs", "-o", out]
    # Root may write anywhere, unless it gives that up.
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("needs setpriv where tests run as root")
        drop = ["setpriv", "--bounding-set", "-all", "--inh-caps", "-all"]
        command = [*drop, *command]
    done = subprocess.run(
        [*command, "--model", "xmag-mini"], capture_output=True, text=True, check=False, timeout=800
    )
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("xmag: error: cannot write ")
    assert "Permission denied; write to a folder that you own" in last
    assert not list(Path(out).iterdir())
