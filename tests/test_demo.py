import hashlib
import warnings

import h5py
import numpy as np
import openslide
import pytest
import tifffile
from PIL import Image
from scipy import ndimage

from xmag.demo import run_demo, write_demo_slide
from xmag.demo.mosaic import _PIECES, GLASS, _places, make_picture
from xmag.demo.slide import DEMO_SIZE
from xmag.errors import InputError, OutputError
from xmag.geometry import TileSpec
from xmag.plan import plan_tiles
from xmag.slide import Slide
from xmag.tissue import find_tissue

SIZE = (4900, 3610)  # no multiple of a tile, at any level


@pytest.fixture(scope="module")
def slide_path(tmp_path_factory):
    return write_demo_slide(tmp_path_factory.mktemp("demo") / "demo slide é.svs", size=SIZE)


@pytest.fixture(scope="module")
def picture():
    return make_picture(SIZE, 0)


def test_openslide_reads_the_slide_as_aperio(slide_path):
    with openslide.OpenSlide(slide_path) as slide:
        assert slide.properties["openslide.vendor"] == "aperio"
        assert slide.properties["openslide.mpp-x"] == "0.5"
        assert slide.properties["openslide.objective-power"] == "20"
        assert slide.level_dimensions == ((4900, 3610), (1225, 902), (306, 225))
        assert set(slide.associated_images) == {"thumbnail", "label", "macro"}
        assert "CC BY 3.0" in slide.properties["aperio.Credit"]
        assert all(image.width > 200 for image in slide.associated_images.values())


def test_the_file_holds_the_pixels_of_the_picture(slide_path, picture):
    """Decoded by OpenSlide, across tile borders, the picture differs by JPEG's loss alone."""
    made = picture[960:1920, 960:1920].astype(int)
    assert made.std() > 20
    with openslide.OpenSlide(slide_path) as slide:
        stored = np.asarray(slide.read_region((960, 960), 0, (960, 960)).convert("RGB"), int)
    assert np.abs(stored - made).mean() < 3
    assert np.abs((stored - made).mean(axis=(0, 1))).max() < 1


@pytest.mark.parametrize("level", [1, 2])
def test_levels_are_averages_of_the_base(slide_path, level):
    with openslide.OpenSlide(slide_path) as slide:
        factor = 4**level
        width, height = slide.level_dimensions[level]
        stored = np.asarray(slide.read_region((0, 0), level, (width, height)).convert("L"), int)
        base = slide.read_region((0, 0), 0, (width * factor, height * factor)).convert("L")
    average = np.asarray(base.reduce(factor), int)
    assert np.abs(stored - average).mean() < 3.5
    assert abs((stored - average).mean()) < 0.5
    shifted = np.abs(stored[1:] - average[:-1]).mean()
    assert shifted > 2 * np.abs(stored - average).mean()


def test_tiles_are_abbreviated_streams_with_shared_tables(slide_path):
    with tifffile.TiffFile(slide_path) as tiff:
        levels = [page for page in tiff.pages if page.is_tiled]
        assert [page.shape[:2] for page in levels] == [(3610, 4900), (902, 1225), (225, 306)]
        for page in levels:
            assert (page.photometric, page.tile) == (6, (240, 240))
            assert page.tags["YCbCrSubSampling"].value == (2, 2)
            tables = page.tags["JPEGTables"].value
            assert b"\xff\xdb" in tables
            assert b"\xff\xc4" in tables
            tiff.filehandle.seek(page.dataoffsets[0])
            tile = tiff.filehandle.read(page.databytecounts[0])
            head = tile[: tile.index(b"\xff\xda")]
            assert b"\xff\xdb" not in head
            assert b"\xff\xe0" not in head


def test_the_same_seed_gives_the_same_file_and_another_another(tmp_path):
    digests = []
    for number, seed in enumerate((3, 3, 4)):
        path = write_demo_slide(tmp_path / f"{number}.svs", size=(1200, 1030), seed=seed)
        digests.append(hashlib.sha256(path.read_bytes()).hexdigest())
    assert digests[0] == digests[1] != digests[2]


def ink(picture):
    """Where blue exceeds red by far, as no stain of tissue does."""
    return picture[..., 2].astype(int) - picture[..., 0] > 60


def test_colours_are_those_of_glass_ink_and_stained_tissue(slide_path, picture):
    with Slide(slide_path) as slide:
        assert slide.mpp == 0.5
        pixels = slide.read_region((0, 0), SIZE, mpp=0.5).astype(int)
    glass = (picture == GLASS).all(axis=2)
    assert 0.2 < glass.mean() < 0.9
    assert np.abs(pixels[glass] - GLASS).mean() < 2
    red, green, blue = pixels[ink(picture)].mean(0)
    assert red < green < blue - 40
    red, green, blue = pixels[(picture.min(axis=2) < 200) & ~ink(picture)].mean(0)
    assert green < blue < red  # pink
    assert green < 190


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The demo slide as it comes: its picture at 4 µm/px, the tissue at each px, the tiles."""
    with Slide(write_demo_slide(tmp_path_factory.mktemp("whole") / "a.svs")) as slide:
        small = slide.read_region((0, 0), (1125, 843), mpp=4.0)
        tissue = find_tissue(slide)
        plan = plan_tiles(slide, TileSpec(), tissue=tissue)
    rows, cols = (np.floor((np.arange(n) + 0.5) * 4 / tissue.mpp).astype(int) for n in (843, 1125))
    height, width = tissue.mask.shape
    found = tissue.mask[np.ix_(rows.clip(0, height - 1), cols.clip(0, width - 1))]
    return small, found, plan


def test_tissue_is_found_and_ink_is_not(whole):
    small, found, _ = whole
    assert found[(small.min(axis=2) < 190) & ~ink(small)].mean() > 0.9
    assert found[ink(small)].mean() < 0.05
    assert (small[~found].min(axis=1) > 235).mean() > 0.9


def test_a_slide_is_30_to_60_tiles_on_three_pieces_away_from_its_border(whole):
    _, found, plan = whole
    assert 30 <= len(plan) <= 60
    labels, _ = ndimage.label(found)
    assert (np.bincount(labels.ravel())[1:] > 10_000).sum() == 3
    assert not np.concatenate([found[0], found[-1], found[:, 0], found[:, -1]]).any()


def test_a_whole_slide_has_as_many_places_as_there_are_fields():
    rng = np.random.default_rng(0)
    assert [len(_places(DEMO_SIZE, piece, rng)) for piece in _PIECES] == [8, 8, 8]


def longest_straight_edge(pixels):
    """Px of the longest run along a row or column over which the picture changes abruptly."""
    longest = 0
    for turned in (pixels, pixels.swapaxes(0, 1)):
        edges = np.abs(np.diff(turned.astype(np.int16), axis=0)).mean(axis=2) > 25
        runs, _ = ndimage.label(edges, structure=[[0, 0, 0], [1, 1, 1], [0, 0, 0]])
        longest = max(longest, np.bincount(runs.ravel())[1:].max())
    return longest


def test_no_field_and_no_piece_ends_in_a_straight_line(picture):
    cut = picture.copy()
    y = int(np.median(np.nonzero(picture.min(axis=2) < 160)[0]))
    cut[y : y + 400] = GLASS
    assert longest_straight_edge(picture) < 70 < longest_straight_edge(cut)


def test_without_tumour_the_pieces_are_other_tissue():
    with_tumour, without = (make_picture(SIZE, 0, tumour=t).reshape(-1, 3) for t in (True, False))
    purple = [p[p.min(axis=1) < 190].astype(int) for p in (with_tumour, without)]
    assert np.median(purple[0][:, 2] - purple[0][:, 0]) > np.median(
        purple[1][:, 2] - purple[1][:, 0]
    )


def test_a_size_that_no_slide_has_is_refused(tmp_path):
    with pytest.raises(InputError, match="100x5000 px; expected 1,024"):
        write_demo_slide(tmp_path / "a.svs", size=(100, 5000))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_missing_is_an_error_before_any_work(tmp_path):
    with pytest.raises(OutputError, match="create the folder first"):
        write_demo_slide(tmp_path / "missing" / "a.svs")


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("out")
    # Large enough for its tiles to cover nearly all tissue, which would be a warning otherwise.
    slide_path = write_demo_slide(folder / "demo slide é.svs", size=(6300, 4900))
    out = folder / "new" / "folder"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = run_demo(out, slide=slide_path, progress=False)
    return result, [str(w.message) for w in caught]


def test_the_demo_leaves_features_and_pictures(result):
    demo, _ = result
    assert sorted(p.name for p in demo.features.parent.iterdir()) == sorted(
        p.name for p in (demo.features, demo.overlay, demo.feature_map)
    )
    with h5py.File(demo.features) as file:
        features, coords = file["features"][:], file["coords"][:]
    assert features.dtype == np.float32
    assert np.isfinite(features).all()
    assert features.std(axis=0).max() > 0
    assert len(features) == len(coords) > 0
    for path in (demo.overlay, demo.feature_map):
        with Image.open(path) as image:
            assert (image.format, image.mode) == ("PNG", "RGB")
            assert np.asarray(image).std() > 10
    assert demo.slide.name == "demo slide é.svs"


def test_the_summary_says_what_was_done_and_with_what(result):
    demo, warned = result
    assert warned == []
    for text in (
        "aperio, 6,300 x 4,900 px, 0.5 µm/px (Aperio MPP)",
        "from level 1, 98% of the tissue; dropped: ",
        "float32 (",
        "tiles/s on ",
        "xmag-mini, for trying things out",
        str(demo.features),
        str(demo.overlay),
        str(demo.feature_map),
        "xmag.extract_features(",
    ):
        assert text in demo.summary


def test_what_the_summary_says_to_type_gives_the_same_features(result, capsys):
    demo, _ = result
    lines = [
        line.strip() for line in demo.summary.split("Next, in Python:")[1].strip().splitlines()
    ]
    names: dict = {}
    exec("\n".join(lines), names)
    with h5py.File(demo.features) as file:
        np.testing.assert_allclose(names["bag"].features, file["features"][:], atol=1e-5)


def test_an_output_folder_that_is_a_file_is_an_error(tmp_path, slide_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be made"):
        run_demo(tmp_path / "file", slide=slide_path)
