"""Tissue masks that are given as files: of one slide, and of a cohort by the slides' ids."""

import hashlib
import io
import json

import numpy as np
import pytest
from PIL import Image
from support.encoders import ColourEncoder
from support.slides import texture, write_svs

from xmag.bag import FeatureBag
from xmag.cohort import extract_cohort
from xmag.errors import InputError, MismatchError, XmagWarning
from xmag.extract import extract_features
from xmag.geometry import TileSpec
from xmag.masks import read_mask
from xmag.slide import Slide
from xmag.tissue import TissueMask, find_tissue

pytestmark = pytest.mark.filterwarnings("ignore:the . tiles of .* cover")

SIZE = (1500, 1200)
MODEL = ColourEncoder(spec=TileSpec(size_px=56))
SIDE = 448
"""Of a tile, in level-0 px of 0.25 µm."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("slides")
    (root / "site 1").mkdir()
    for name in ("a.svs", "site 1/b.svs"):
        write_svs(root / name, size=SIZE, mpp=0.25)
    return root


@pytest.fixture(scope="module")
def slide(folder):
    with Slide(folder / "a.svs") as opened:
        yield opened


def box(left, top, right, bottom):
    ring = [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]
    return {"type": "Polygon", "coordinates": [ring]}


def png(array, mode=None, **options):
    out = io.BytesIO()
    image = Image.fromarray(array) if mode is None else Image.fromarray(array).convert(mode)
    image.save(out, "PNG", **options)
    return out.getvalue()


def halves(value=255, kind=np.uint8):
    """A mask of 75 x 60 px, a px of 20 level-0 px, whose left 25 columns are tissue."""
    mask = np.zeros((60, 75), kind)
    mask[:, :25] = value
    return mask


@pytest.fixture
def masks(tmp_path):
    """Of a the left third, as PNG; of b a box, as GeoJSON."""
    (tmp_path / "masks" / "site 1").mkdir(parents=True)
    (tmp_path / "masks" / "a.png").write_bytes(png(halves()))
    (tmp_path / "masks" / "site 1" / "b.geojson").write_text(json.dumps(box(600, 0, 1500, 600)))
    return tmp_path / "masks"


# ---- one file ----


def test_geojson_of_a_mask_gives_the_mask_back(tmp_path):
    pixels = np.full((1200, 1500, 3), 244, np.uint8)
    pixels[150:950, 200:850] = texture(650, 800)
    pixels[400:700, 400:650] = 244  # a hole
    pixels[600:1000, 1000:1350] = texture(350, 400)
    write_svs(tmp_path / "a.svs", pixels=pixels, mpp=1.0, power=10)
    with Slide(tmp_path / "a.svs") as slide:
        found = find_tissue(slide, max_hole_mm2=0)
        (tmp_path / "a.geojson").write_text(json.dumps(found.to_geojson()))
        given = read_mask(tmp_path / "a.geojson", slide)
    assert 0.1 < found.fraction < 0.9
    assert np.array_equal(given.mask, found.mask)
    assert (given.mpp, given.downsample) == (found.mpp, found.downsample)


def test_a_px_is_tissue_if_its_centre_lies_inside(tmp_path, slide):
    """A px has 128 level-0 px a side: centres at 64, 192, 320, ..."""
    shapes = {"type": "GeometryCollection", "geometries": [
        box(65, 0, 321, 193), box(-5000, 1000, 64.5, 9e9),
    ]}  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps(shapes))
    wanted = np.zeros((9, 11), bool)
    wanted[:2, 1:3] = True
    wanted[8:, 0] = True
    assert np.array_equal(read_mask(tmp_path / "a.json", slide).mask, wanted)


@pytest.mark.parametrize(
    "data",
    [
        png(halves()),
        png(halves(1)),
        png(halves(True, bool)),
        png(halves(), "RGB"),
        png(np.stack([halves(), halves(0), halves(0)], -1)),
        png(halves(60_000, np.uint16)),
        png(halves(), "P"),
    ],
    ids=["grey", "labels", "bits", "RGB", "red", "16 bits", "palette"],
)
def test_an_image_is_tissue_where_it_is_not_black(data, tmp_path, slide):
    (tmp_path / "a.png").write_bytes(data)
    found = read_mask(tmp_path / "a.png", slide)
    wanted = TissueMask.from_array(halves() > 0, slide)
    assert np.array_equal(found.mask, wanted.mask)
    assert (found.mpp, found.downsample) == (5.0, 20.0) == (wanted.mpp, wanted.downsample)
    assert found.method == wanted.method | {"sha256": hashlib.sha256(data).hexdigest()}


def test_a_palette_whose_first_colour_is_white_is_not_turned_around(tmp_path, slide):
    image = Image.fromarray((halves() == 0).astype(np.uint8), "P")
    image.putpalette([255, 255, 255, 0, 0, 0])
    image.save(tmp_path / "a.png")
    assert np.array_equal(read_mask(tmp_path / "a.png", slide).mask, halves() > 0)


def test_an_image_whose_px_are_all_opaque_is_taken_with_its_alpha(tmp_path, slide):
    opaque = np.dstack([halves()] * 3 + [np.full_like(halves(), 255)])
    (tmp_path / "a.png").write_bytes(png(opaque))
    assert np.array_equal(read_mask(tmp_path / "a.png", slide).mask, halves() > 0)


def two_colours():
    """Red where there is tissue and green where there is none: as bright as each other."""
    red = np.where(halves() > 0, 200, 0).astype(np.uint8)
    return png(np.dstack([red, 200 - red, np.zeros_like(red)]))


def transparent():
    return png(np.dstack([halves()] * 3 + [halves()]))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (png(np.arange(4500, dtype=np.uint8).reshape(60, 75)), "256 values, from 0 to 255"),
        (png(halves() // 5 + 1), "2 values, from 1 to 52"),
        (transparent(), "transparent px"),
        (two_colours(), "the image has 2 values"),
        (b"[" * 100_000, "is not JSON|nested too deep"),
        (png(halves(), "P", transparency=0), "transparent px"),
        (png(np.zeros((60, 90), np.uint8)), "the mask has 90x60 px and the slide 1500x1200"),
        (png(halves())[:70], "the image is damaged"),
        (png(halves())[:20], "px; expected at most"),
        (png(halves()).replace(b"\0\0\0K", b"\1\0\0K", 1), "expected at most 33554432 px"),
        (b"\xff\xd8\xff\xe0", "neither GeoJSON nor PNG"),
        (b"", "neither GeoJSON nor PNG"),
        (b'{"type": "Point", "coordinates": [1, 2]}', "expected areas"),
        (b'{"type": "FeatureCollection", "features": []}', "holds no polygon"),
        (b"{", "is not JSON"),
    ],
)
def test_what_is_no_mask_is_refused_by_name(data, message, tmp_path, slide):
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(InputError, match=message) as caught:
        read_mask(tmp_path / "a.png", slide)
    assert "tissue mask a.png" in str(caught.value)
    assert str(tmp_path) not in str(caught.value)


def test_a_mask_that_is_not_there_is_an_error(tmp_path, slide):
    with pytest.raises(InputError, match=r"tissue mask a\.png cannot be read"):
        read_mask(tmp_path / "a.png", slide)


# ---- a cohort ----


@pytest.mark.parametrize("processes", [0, 1])
def test_tiles_are_those_of_the_masks_of_the_slides_ids(folder, masks, tmp_path, processes):
    out = tmp_path / "out"
    options = {"min_tissue": 0.3, "border": "drop"}
    report = extract_cohort(
        folder, out, model=MODEL, tissue=masks, processes=processes, overlay=True, **options
    )
    assert report.counts() == {"done": 2}
    every = [
        (x, y) for y in range(0, 1200 - SIDE + 1, SIDE) for x in range(0, 1500 - SIDE + 1, SIDE)
    ]

    def kept(left, top, right, bottom):
        """The cells of which a box covers 0.3: the boxes end at whole px of the masks."""
        return [
            [x, y] for x, y in every
            if max(0, min(right, x + SIDE) - max(left, x))
            * max(0, min(bottom, y + SIDE) - max(top, y)) >= 0.3 * SIDE * SIDE
        ]  # fmt: skip

    a = FeatureBag.load(out / "a.h5")
    assert a.coords.tolist() == kept(0, 0, 500, 1200) != []
    # Of px of 128 level-0 px, whose centres lie in the box.
    b = FeatureBag.load(out / "site 1" / "b.h5")
    assert b.coords.tolist() == kept(640, 0, 1500, 640) != []
    for bag, name in ((a, "a.png"), (b, "site 1/b.geojson")):
        sha256 = hashlib.sha256((masks / name).read_bytes()).hexdigest()
        assert bag.provenance.record["plan"]["tissue"]["sha256"] == sha256
        alone = extract_features(
            folder / name.replace(".png", ".svs").replace(".geojson", ".svs"),
            model=MODEL, tissue=masks / name, **options,
        )  # fmt: skip
        assert np.array_equal(alone.features, bag.features)
        assert np.array_equal(alone.coords, bag.coords)
        assert alone.provenance.fingerprint == bag.provenance.fingerprint
    # The masks differ, and what was made with them may be mixed.
    assert a.provenance.fingerprint == b.provenance.fingerprint
    assert "sha256" not in json.dumps(a.provenance.to_dict()["fingerprint"]["plan"])
    with Image.open(out / "a.h5.png") as picture:
        assert picture.size[0] > 0


def test_another_mask_is_not_taken_for_what_is_there(folder, masks, tmp_path):
    def run(**options):
        options = {"tissue": masks} | options
        return extract_cohort(folder, tmp_path / "out", model=MODEL, processes=0, **options)

    run()
    assert run().counts() == {"skipped": 2}
    (masks / "a.png").write_bytes(png(halves()[:, ::-1]))
    with pytest.raises(MismatchError, match=r"a\.h5 .*\n.*tissue: the given mask is another one"):
        run()
    with pytest.raises(MismatchError, match=r"plan\.tissue") as caught:
        run(tissue="auto")
    assert "given mask" not in str(caught.value)
    with Slide(folder / "a.svs") as slide:  # a mask of a program's, whose file nobody knows
        mask = TissueMask.from_array(halves()[:, ::-1] > 0, slide)
        extract_features(slide, model=MODEL, tissue=mask).save(tmp_path / "out" / "a.h5")
    with pytest.raises(MismatchError, match="sha256 unknown there"):
        run()
    assert run(on_mismatch="redo").counts() == {"done": 1, "skipped": 1}
    right = FeatureBag.load(tmp_path / "out" / "a.h5").coords
    assert right[:, 0].min() > 0


def test_a_slide_without_its_mask_is_named_before_any_work(folder, masks, tmp_path):
    out = tmp_path / "out"
    (masks / "site 1" / "b.geojson").unlink()
    with pytest.raises(InputError, match=r"1 of 2 slides have no tissue mask.* site 1/b\.svs; .*b"):
        extract_cohort(folder, out, model=MODEL, tissue=masks)
    with pytest.raises(InputError, match="tissue is one file for 2 slides"):
        extract_cohort(folder, out, model=MODEL, tissue=masks / "a.png")
    with pytest.raises(InputError, match="tissue is 'al'; expected a folder"):
        extract_cohort(folder, out, model=MODEL, tissue="al")
    mask = TissueMask(mask=np.ones((2, 2), bool), mpp=1, downsample=1, method={})
    with pytest.raises(InputError, match="tissue is a TissueMask; a cohort takes"):
        extract_cohort(folder, out, model=MODEL, tissue=mask)
    with pytest.raises(InputError, match="tissue is a ndarray; a cohort takes"):
        extract_cohort(folder, out, model=MODEL, tissue=np.ones((2, 2), bool))
    with pytest.raises(InputError, match="lies at a URL"):
        extract_cohort(folder, out, model=MODEL, tissue="s3://bucket/masks")
    assert not out.exists()


def test_files_that_are_no_slides_are_counted(folder, masks, tmp_path):
    for name in ("c.png", "site 1/a.json", "notes.txt"):
        (masks / name).write_text("{}")
    options = {"model": MODEL, "processes": 0}
    with pytest.warns(
        XmagWarning, match=r"2 of 4 files in 'masks' are no slide's tissue mask, .*c"
    ):
        extract_cohort(folder, tmp_path / "out", tissue=masks, **options)
    (masks / "a.geojson").write_text("{}")
    with pytest.raises(InputError, match=r"a\.svs has several files, a\.geojson and a\.png"):
        extract_cohort(folder, tmp_path / "out", tissue=masks, **options)


def test_a_region_of_interest_that_is_no_slides_is_counted(folder, tmp_path):
    (tmp_path / "regions" / "site 1").mkdir(parents=True)
    for name in ("a.geojson", "site 1/b.json", "b.json"):
        (tmp_path / "regions" / name).write_text(json.dumps(box(0, 0, 900, 900)))
    with pytest.warns(
        XmagWarning, match=r"1 of 3 files in 'regions' are no slide's region .*b\.json"
    ):
        extract_cohort(folder, tmp_path / "out", model=MODEL, processes=0, roi=tmp_path / "regions")


@pytest.mark.parametrize("processes", [0, 1])
def test_a_damaged_mask_costs_its_slide_alone(folder, masks, tmp_path, processes):
    (masks / "a.png").write_bytes(png(halves())[:70])
    report = extract_cohort(
        folder, tmp_path / "out", model=MODEL, tissue=masks, processes=processes
    )
    assert [row.status for row in report] == ["failed", "done"]
    assert report[0].error.startswith("the tissue mask a.png: the image is damaged")
    assert not (tmp_path / "out" / "a.h5").exists()


def test_the_mask_of_one_slide_may_be_its_file(folder, masks, tmp_path):
    report = extract_cohort(
        folder / "a.svs", tmp_path / "out", model=MODEL, tissue=masks / "a.png", processes=0
    )
    assert report.counts() == {"done": 1}
