"""What is sampled: against the plan of each slide, brute-force fairness, and itself again."""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.slides import texture, write_svs

from xmag.distill.dataset import shuffled
from xmag.distill.regions import (
    REGION_SPEC,
    Manifest,
    fair_shares,
    held_out,
    plan_images,
    plan_slides,
)
from xmag.errors import InputError, OutputError, SlideError, SlideScaleError, XmagWarning
from xmag.geometry import TileSpec
from xmag.plan import plan_tiles
from xmag.provenance import file_fingerprint
from xmag.slide import Slide
from xmag.tissue import find_tissue


def island(width: int, height: int, box: tuple[int, int, int, int], seed: int = 0) -> np.ndarray:
    """Glass with a rectangle of tissue on it."""
    pixels = np.full((height, width, 3), 243, np.uint8)
    x0, y0, x1, y1 = box
    pixels[y0:y1, x0:x1] = np.tile(texture(900, 900, seed=seed), (2, 5, 1))[: y1 - y0, : x1 - x0]
    return pixels


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sites with slides of different sizes at 0.5 µm/px (the scale keeps them small)."""
    root = tmp_path_factory.mktemp("cohort")
    for site, name, box in (
        ("north", "a", (0, 0, 4500, 1800)),
        ("north", "b", (900, 0, 3600, 900)),
        ("south", "c", (0, 900, 4500, 1800)),
    ):
        (root / site).mkdir(exist_ok=True)
        pixels = island(4500, 1800, box, seed=ord(name))
        write_svs(root / site / f"{name}.svs", pixels=pixels, mpp=0.5, power=20, levels=(1, 4, 16))
    return root


@pytest.fixture(scope="module")
def everything(cohort: Path) -> Manifest:
    return plan_slides(cohort)


def test_candidates_are_the_tissue_of_each_slide_on_its_grid(
    cohort: Path, everything: Manifest
) -> None:
    assert [source.path for source in everything.sources] == [
        "north/a.svs",
        "north/b.svs",
        "south/c.svs",
    ]
    for number, source in enumerate(everything.sources):
        with Slide(cohort / source.path) as slide:
            plan = plan_tiles(slide, REGION_SPEC, tissue=find_tissue(slide), min_tissue=0.5)
            assert source.mpp == slide.mpp
            assert source.size == slide.dimensions
        mine = everything.places[everything.places[:, 0] == number, 1:]
        assert np.array_equal(mine, plan.coords)
        assert source.candidates == len(plan)
        assert source.fingerprint == file_fingerprint(cohort / source.path)
    assert [source.candidates for source in everything.sources] == [10, 3, 5]


def test_slides_and_regions_are_counted_per_site(everything: Manifest) -> None:
    assert len(everything) == 18
    assert everything.counts() == {
        "slides": 3,
        "empty": 0,
        "refused": 0,
        "regions": 18,
        "teacher_tiles": 18 * 16,
        "sites": {
            "north": {"slides": 2, "empty": 0, "regions": 13},
            "south": {"slides": 1, "empty": 0, "regions": 5},
        },
    }
    assert everything.places[:, 0].tolist() == [0] * 10 + [1] * 3 + [2] * 5


def test_sites_share_alike_and_then_their_slides(cohort: Path) -> None:
    found = plan_slides(cohort, regions=8)
    assert np.bincount(found.places[:, 0]).tolist() == [2, 2, 4]
    assert len(np.unique(found.places, axis=0)) == 8
    by_name = plan_slides(cohort, regions=6, sites=lambda path: path[-5])
    assert np.bincount(by_name.places[:, 0]).tolist() == [2, 2, 2]
    assert by_name.sites == ("a", "b", "c")
    more = plan_slides(cohort, regions=12)
    assert np.bincount(more.places[:, 0]).tolist() == [4, 3, 5]


def test_the_same_seed_gives_the_same_manifest_in_any_order(cohort: Path, tmp_path: Path) -> None:
    paths = sorted(cohort.rglob("*.svs"))
    first = plan_slides(paths, root=cohort, regions=8, seed=3)
    again = plan_slides(paths[::-1], regions=8, seed=3)
    assert first.to_json() == again.to_json()
    assert first.sha256 == again.sha256
    other = plan_slides(paths, regions=8, seed=4)
    assert not np.array_equal(first.places, other.places)
    moved = shutil.copytree(cohort, tmp_path / "elsewhere")
    assert plan_slides(moved, regions=8, seed=3).sha256 == first.sha256


def test_what_a_slide_gives_does_not_depend_on_the_others(cohort: Path) -> None:
    alone = plan_slides([cohort / "north" / "a.svs"], regions=4, seed=3)
    together = plan_slides(cohort, regions=12, seed=3)
    mine = together.places[together.places[:, 0] == 0, 1:]
    assert np.array_equal(alone.places[:, 1:], mine)


def test_a_manifest_comes_back_from_its_file_and_holds_no_absolute_path(
    cohort: Path, tmp_path: Path
) -> None:
    made = plan_slides(cohort, regions=7)
    made.save(tmp_path / "manifest.json")
    text = (tmp_path / "manifest.json").read_text()
    assert str(cohort) not in text
    assert cohort.name not in text
    read = Manifest.load(tmp_path / "manifest.json")
    assert read.to_json() == made.to_json()
    assert np.array_equal(read.places, made.places)
    assert read.sources == made.sources
    assert read.spec == REGION_SPEC
    with pytest.raises(OutputError, match="create the folder first"):
        made.save(tmp_path / "none" / "manifest.json")


def test_what_is_no_manifest_is_refused(tmp_path: Path, everything: Manifest) -> None:
    with pytest.raises(InputError, match=r"none\.json' cannot be read"):
        Manifest.load(tmp_path / "none.json")
    fields = json.loads(everything.to_json())
    for change, message in (
        ({"format": "xmag-plan"}, "has format 'xmag-plan'"),
        ({"schema_version": 9}, "schema_version 9, .*upgrade"),
        ({"sources": [{}]}, "is not what Manifest.save wrote"),
        ({"sources": []}, None),
    ):
        (tmp_path / "m.json").write_text(json.dumps({**fields, **change}))
        if message is None:
            assert len(Manifest.load(tmp_path / "m.json")) == 0
            continue
        with pytest.raises(InputError, match=message):
            Manifest.load(tmp_path / "m.json")
    with pytest.raises(InputError, match="names a source that is not among the 3"):
        Manifest(
            spec=REGION_SPEC, sources=everything.sources, places=np.array([[3, 0, 0]]), options={}
        )


def test_slides_without_the_detail_are_refused_by_name_or_listed(
    cohort: Path, tmp_path: Path
) -> None:
    root = shutil.copytree(cohort, tmp_path / "cohort")
    write_svs(root / "south" / "coarse.svs", size=(1000, 1000), mpp=1.0, power=10)
    (root / "south" / "broken.svs").write_bytes((root / "south" / "c.svs").read_bytes()[:5000])
    message = (
        r"2 of 5 files cannot be used: south/broken\.svs: .*; south/coarse\.svs: the slide has 1"
    )
    with pytest.raises(SlideError, match=message):
        plan_slides(root)
    (root / "south" / "broken.svs").unlink()
    with pytest.raises(SlideScaleError, match=r"coarse\.svs.*never upsampled.*skip_refused"):
        plan_slides(root)
    found = plan_slides(root, skip_refused=True)
    assert len(found) == 18
    assert found.counts()["refused"] == 1
    ((path, reason),) = found.refused
    assert path == "south/coarse.svs"
    assert "0.5 µm/px" in reason
    assert str(tmp_path) not in found.to_json()
    found.save(tmp_path / "manifest.json")
    assert Manifest.load(tmp_path / "manifest.json").refused == found.refused


@pytest.mark.parametrize(
    ("mpp", "region_mpp"), [(0.524, 0.524), (0.4755, 0.4755), (0.25, 0.5), (0.3, 0.5)]
)
def test_the_scale_that_is_read_is_recorded(tmp_path: Path, mpp: float, region_mpp: float) -> None:
    write_svs(tmp_path / "slide.svs", size=(1800, 1800), mpp=mpp, power=None, levels=(1,))
    found = plan_slides(tmp_path, tissue=None)
    assert found.sources[0].region_mpp == pytest.approx(region_mpp)
    assert found.sources[0].mpp == mpp


def test_a_tolerance_of_nothing_refuses_what_is_hardly_coarser(tmp_path: Path) -> None:
    write_svs(tmp_path / "slide.svs", size=(1000, 1000), mpp=0.505, power=None, levels=(1,))
    assert len(plan_slides(tmp_path, tissue=None)) == 1
    exact = TileSpec(mpp=0.5, size_px=896, mpp_tolerance=0, resample="lanczos")
    with pytest.raises(SlideScaleError, match=r"slide\.svs.*0\.505"):
        plan_slides(tmp_path, tissue=None, spec=exact)
    with pytest.raises(InputError, match="only mpp_tolerance and resample"):
        plan_slides(tmp_path, spec=TileSpec(mpp=1.0, size_px=896))


def test_crops_of_images_begin_anywhere_and_differ(tmp_path: Path) -> None:
    for number, size in enumerate([(1024, 1024), (900, 898), (896, 896), (800, 1000)]):
        Image.fromarray(texture(*size, seed=number)).save(tmp_path / f"{number}.png")
    found = plan_images(tmp_path, mpp=0.5, regions=60)
    assert [source.candidates for source in found.sources] == [129 * 129, 5 * 3, 1, 0]
    assert np.bincount(found.places[:, 0]).tolist() == [44, 15, 1]
    assert found.counts()["empty"] == 1
    assert len(np.unique(found.places, axis=0)) == 60
    for source, x, y in found.places.tolist():
        width, height = found.sources[source].size
        assert 0 <= x <= width - 896
        assert 0 <= y <= height - 896
    assert len(set((found.places[found.places[:, 0] == 0, 1] % 4).tolist())) == 4
    assert plan_images(tmp_path, mpp=0.5, regions=60).sha256 == found.sha256
    with pytest.raises(SlideScaleError, match="1 µm/px at its finest"):
        plan_images(tmp_path, mpp=1.0, regions=1)
    finer = plan_images(tmp_path, mpp=0.45, regions=3)
    assert finer.sources[0].candidates == (1024 - 996 + 1) ** 2  # 896 px of 0.5 are 995.6 of 0.45
    with pytest.raises(InputError, match="no region in 4 files"):
        plan_images(tmp_path, mpp=0.25, regions=1)


def test_fewer_candidates_than_asked_for_are_a_warning(cohort: Path) -> None:
    with pytest.warns(XmagWarning, match="100 regions were asked for, and there are 18") as caught:
        found = plan_slides(cohort, regions=100)
    assert len(found) == 18
    assert caught[0].filename == __file__


def test_what_makes_no_sense_is_refused(cohort: Path, tmp_path: Path) -> None:
    path = cohort / "north" / "a.svs"
    with pytest.raises(InputError, match="no slides in"):
        plan_slides(tmp_path)
    with pytest.raises(InputError, match=r"there is no file .*typo\.svs"):
        plan_slides([cohort / "typo.svs"])
    with pytest.raises(InputError, match="does not lie in root"):
        plan_slides([path], root=cohort / "south")
    with pytest.raises(InputError, match="regions is 0"):
        plan_slides(cohort, regions=0)
    with pytest.raises(InputError, match="seed is -1"):
        plan_slides(cohort, seed=-1)
    with pytest.raises(InputError, match="tissue is 'all'"):
        plan_slides(cohort, tissue="all")
    with pytest.raises(InputError, match=r"no site for 'north/b\.svs'"):
        plan_slides(cohort, sites={"north/a.svs": "x"})
    with pytest.raises(InputError, match="is 'x ', with blanks around it"):
        plan_slides(cohort, sites=lambda _: "x ")
    with pytest.raises(InputError, match="is 'nan', a missing value"):
        plan_slides(cohort, sites=lambda _: "nan")
    twin = tmp_path / "twins"
    twin.mkdir()
    for name in ("one", "two"):
        shutil.copy(path, twin / f"{name}.svs")
    with pytest.raises(InputError, match=r"'two\.svs' and 'one\.svs' have the same content"):
        plan_slides(twin)


def test_shares_are_as_fair_as_any(rng: np.random.Generator) -> None:
    """Max-min fairness against all ways to deal out small numbers."""
    for _ in range(30):
        capacity = rng.integers(0, 5, 4).tolist()
        total = int(rng.integers(0, 14))
        shares = fair_shares(capacity, total, rng)
        assert all(0 <= s <= c for s, c in zip(shares, capacity, strict=True))
        ways = itertools.product(*(range(c + 1) for c in capacity))
        fairest = max(sorted(way) for way in ways if sum(way) == min(total, sum(capacity)))
        assert sorted(shares) == fairest


def test_what_does_not_divide_goes_to_each_in_turn(rng: np.random.Generator) -> None:
    dealt = np.sum([fair_shares([9, 9, 9], 10, rng) for _ in range(600)], axis=0) - 600 * 3
    assert dealt.sum() == 600
    assert (abs(dealt - 200) < 50).all()


def test_whole_sources_are_held_out_from_each_site(everything: Manifest) -> None:
    train, kept = held_out(everything, fraction=0.4)
    assert sorted([*train.tolist(), *kept.tolist()]) == list(range(18))
    sources = everything.places[:, 0]
    assert not set(sources[train].tolist()) & set(sources[kept].tolist())
    assert len(kept) >= 0.4 * 18
    again, _ = held_out(everything, fraction=0.4)
    assert np.array_equal(train, again)
    _, little = held_out(everything, fraction=0.01)
    assert len(set(sources[little].tolist())) == 1
    with pytest.raises(InputError, match="none is left to train on"):
        held_out(everything, fraction=0.99)
    with pytest.raises(InputError, match="between 0 and 1"):
        held_out(everything, fraction=1.0)


def test_a_shuffle_mixes_few_sources_at_a_time(rng: np.random.Generator) -> None:
    sources = np.repeat(np.arange(30), 20)
    order = shuffled(sources, rng, at_once=6)
    assert sorted(order.tolist()) == list(range(600))
    for group in sources[order].reshape(5, 120):
        assert len(set(group.tolist())) == 6
        assert len(set(group[:24].tolist())) >= 5  # mixed within
    assert not np.array_equal(order, shuffled(sources, rng, at_once=6))
    assert shuffled(np.empty(0, np.int64), rng).shape == (0,)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
