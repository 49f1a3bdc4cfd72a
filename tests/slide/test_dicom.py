"""DICOM slides that wsidicom writes of known frames, read as their source is."""

import pickle
import shutil
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
from support.encoders import ColourEncoder
from support.oracle import level_pixels
from support.slides import shrunk, texture, write_svs

pytest.importorskip("wsidicom")
pydicom = pytest.importorskip("pydicom")

from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, generate_uid  # noqa: E402
from support.dicom_slides import (  # noqa: E402
    change,
    frames_of,
    make_sparse,
    pyramid,
    tiff_frames,
    volumes,
    write_dicom,
)
from wsidicom import ConcatenationByFrames, WsiDicom  # noqa: E402
from wsidicom.geometry import Point  # noqa: E402

from xmag.cohort import extract_cohort  # noqa: E402
from xmag.errors import (  # noqa: E402
    ClosedSlideError,
    DamagedSlideError,
    InputError,
    SeveralScansError,
    SlideError,
    SlideScaleError,
    UnsupportedSlideError,
)
from xmag.extract import extract_features  # noqa: E402
from xmag.geometry import TileSpec  # noqa: E402
from xmag.plan import plan_tiles  # noqa: E402
from xmag.slide import Slide  # noqa: E402
from xmag.slide.dicom_files import InstanceFile, series_below  # noqa: E402

SIZE = (700, 500)
PIXELS = texture(*SIZE)
ACROSS, TILES = 3, 6
BASE = pyramid(PIXELS)[0]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A slide of two levels in JPEG YCbCr 4:2:0, with a label and an overview."""
    folder = tmp_path_factory.mktemp("dicom") / "slide"
    write_dicom(folder, pyramid(PIXELS), power=40)
    return folder


@pytest.fixture
def folder(written, tmp_path):
    """A copy of it."""
    return Path(shutil.copytree(written, tmp_path / "slide"))


@pytest.fixture
def base(folder):
    """The file of its first level."""
    return volumes(folder)[0]


def set_to(path, **values):
    def edit(dataset):
        for keyword, value in values.items():
            setattr(dataset, keyword, value)

    change(path, edit)


def new_identity(dataset):
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()


def unpadded(chunks):
    """Frames have an even number of bytes."""
    return [data.rstrip(b"\0") for data in chunks]


def decoded(color):
    """The image as imagecodecs decodes each frame by itself."""
    decode = {"raw": lambda data: np.frombuffer(data, np.uint8).reshape(256, 256, 3)}.get(
        color, imagecodecs.jpeg2k_decode if color.startswith("j2k") else imagecodecs.jpeg8_decode
    )
    options = {"colorspace": "RGB"} if color == "rgb444" else {}
    tiles = [decode(data, **options) for data in pyramid(PIXELS, (1,), color=color)[0].tiles]
    rows = [np.hstack(tiles[n : n + ACROSS]) for n in range(0, TILES, ACROSS)]
    return np.vstack(rows)[: SIZE[1], : SIZE[0]]


@pytest.mark.parametrize(
    ("color", "table"),
    [
        ("ycbcr420", "bot"), ("ycbcr420", "eot"), ("ycbcr420", "empty"), ("ycbcr422", "bot"),
        ("ycbcr444", "bot"), ("rgb444", "bot"), ("j2k-rgb", "eot"), ("raw", None),
    ],
)  # fmt: skip
def test_pixels_are_those_of_the_frames(tmp_path, color, table):
    options = {} if table is None else {"offset_table": table}
    write_dicom(tmp_path / "s", pyramid(PIXELS, color=color), **options)
    path = volumes(tmp_path / "s")[0]
    with Slide(tmp_path / "s") as slide:
        assert slide.format == "dicom"
        assert slide.level_dimensions == (SIZE, (175, 125))
        assert slide.level_downsamples == (1, 4)
        pixels = slide.read_region((0, 0), SIZE)
        thumbnail = np.asarray(slide.thumbnail(max_px=100))
    assert np.array_equal(pixels, level_pixels(path, SIZE)[0])
    if color not in ("rgb444",):
        assert np.array_equal(pixels, decoded(color))
    assert np.abs(pixels.astype(int) - PIXELS).mean() < 4
    assert np.abs(thumbnail.astype(int) - shrunk(PIXELS, 7)[:71, :100]).mean() < 8


def test_jpeg_2000_in_ycbcr_is_told_by_its_photometric_interpretation(tmp_path):
    write_dicom(tmp_path / "s", pyramid(PIXELS, color="j2k-ycbcr"))
    with Slide(tmp_path / "s") as slide:
        assert np.abs(slide.read_region((0, 0), SIZE).astype(int) - PIXELS).mean() < 3


def test_bytes_of_tiles_are_those_that_pydicom_and_wsidicom_find(folder, base):
    with pydicom.dcmread(base) as dataset:
        theirs = frames_of(dataset)
    with Slide(folder) as slide, WsiDicom.open(folder) as oracle:
        ours = slide.reader.read_tile_bytes(0, range(TILES))
        frames = oracle.levels[0].default_instance.image_data
        encoded = [
            frames.get_encoded_tile(Point(n % ACROSS, n // ACROSS), 0, "0") for n in range(TILES)
        ]
    assert ours == theirs
    assert unpadded(ours) == unpadded(encoded) == BASE.tiles


def sparse(folder, base):
    make_sparse(base)


def sparse_in_another_order(folder, base):
    make_sparse(base, [5, 4, 3, 1, 0, 2])


def of_undefined_lengths_and_in_fragments(folder, base):
    make_sparse(base, fragments=3, undefined=True)


def two_instances(folder, base):
    other = base.with_name("other.dcm")
    shutil.copy(base, other)
    change(other, new_identity)
    make_sparse(base, [0, 1, 2])
    make_sparse(other, [5, 3, 4])


def copied_beside_itself(folder, base):
    shutil.copy(base, base.with_name("copy.dcm"))


def without_a_word_of_its_organisation(folder, base):
    def edit(dataset):
        del dataset.DimensionOrganizationType

    change(base, edit)


def beside_other_files(folder, base):
    (folder / "notes.txt").write_text("DICM")
    (folder / "sub").mkdir()
    (folder / ".hidden.dcm").write_bytes(bytes(128) + b"DICM")
    other = folder / "ct.dcm"
    shutil.copy(base, other)

    def edit(dataset):
        dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = (
            "1.2.840.10008.5.1.4.1.1.2"
        )

    change(other, edit)


@pytest.mark.parametrize(
    "arrange",
    [
        sparse, sparse_in_another_order, of_undefined_lengths_and_in_fragments, two_instances,
        copied_beside_itself, without_a_word_of_its_organisation, beside_other_files,
    ],
)  # fmt: skip
def test_however_frames_are_arranged_they_make_the_same_slide(folder, base, written, arrange):
    arrange(folder, base)
    with Slide(folder) as slide, Slide(written) as source:
        assert slide.reader.levels == source.reader.levels
        assert unpadded(slide.reader.read_tile_bytes(0, range(TILES))) == BASE.tiles
        ours, theirs = (s.read_region((0, 0), SIZE) for s in (slide, source))
    assert np.array_equal(ours, theirs)


def test_concatenations_are_one_level(tmp_path, written):
    write_dicom(tmp_path / "s", pyramid(PIXELS), concatenation=ConcatenationByFrames(4))
    assert len(volumes(tmp_path / "s")) == 3
    with Slide(tmp_path / "s") as slide, Slide(written) as source:
        assert slide.level_dimensions == source.level_dimensions
        assert np.array_equal(slide.read_region((0, 0), SIZE), source.read_region((0, 0), SIZE))


@pytest.mark.parametrize("part", [0, 1])
def test_a_part_of_a_concatenation_that_is_not_there_is_damage(tmp_path, part):
    write_dicom(tmp_path / "s", pyramid(PIXELS), concatenation=ConcatenationByFrames(4))
    volumes(tmp_path / "s")[part].unlink()
    with pytest.raises(DamagedSlideError, match=r"lacks \d of 6 tiles"):
        Slide(tmp_path / "s")


def test_a_part_of_a_sparse_concatenation_that_is_not_there_is_damage(tmp_path):
    write_dicom(tmp_path / "s", pyramid(PIXELS), concatenation=ConcatenationByFrames(2))
    for number, path in enumerate(volumes(tmp_path / "s")[:3]):
        tiles = range(2 * number, 2 * number + 2)

        def edit(dataset, tiles=tiles):
            groups = []
            for tile in tiles:
                place, group = pydicom.Dataset(), pydicom.Dataset()
                place.ColumnPositionInTotalImagePixelMatrix = 1 + tile % ACROSS * 256
                place.RowPositionInTotalImagePixelMatrix = 1 + tile // ACROSS * 256
                group.PlanePositionSlideSequence = [place]
                groups.append(group)
            dataset.DimensionOrganizationType = "TILED_SPARSE"
            dataset.PerFrameFunctionalGroupsSequence = groups

        change(path, edit)
    with Slide(tmp_path / "s") as slide:
        assert np.array_equal(slide.read_region((0, 0), SIZE), decoded("ycbcr420"))
    volumes(tmp_path / "s")[1].unlink()
    with pytest.raises(DamagedSlideError, match="a part of its concatenated instances"):
        Slide(tmp_path / "s")


def test_tiles_that_a_sparse_level_leaves_out_are_white_and_counted(folder, base):
    make_sparse(base, [5, 4, 3, 1, 0])
    with Slide(folder) as slide:
        assert slide.reader.levels[0].empty_tiles == 1
        assert slide.reader.read_tile_bytes(0, [2]) == [None]
        pixels = slide.read_region((0, 0), SIZE)
    assert (pixels[:256, 512:] == 255).all()
    assert np.array_equal(pixels[:, :512], decoded("ycbcr420")[:, :512])
    assert np.array_equal(pixels, level_pixels(base, SIZE)[0])


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian])
@pytest.mark.parametrize("arrange", [lambda base: None, make_sparse])
def test_attributes_are_those_that_pydicom_finds(tmp_path, syntax, arrange):
    write_dicom(tmp_path / "s", pyramid(PIXELS, color="raw"))
    path = volumes(tmp_path / "s")[0]
    arrange(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = pydicom.dcmread(path)
        dataset.file_meta.TransferSyntaxUID = syntax
        dataset.save_as(path, implicit_vr=syntax.is_implicit_VR, little_endian=True)
    file = InstanceFile(path)
    found = file.attributes
    for keyword in ("Rows", "Columns", "TotalPixelMatrixColumns", "SamplesPerPixel"):
        assert found[keyword] == [dataset[keyword].value]
    assert found["SOPInstanceUID"] == [dataset.SOPInstanceUID]
    assert found["ImageType"] == list(dataset.ImageType)
    assert int(found["NumberOfFrames"][0]) == dataset.NumberOfFrames
    measures = found["SharedFunctionalGroupsSequence"][0]["PixelMeasuresSequence"][0]
    assert [float(x) for x in measures["PixelSpacing"]] == [0.00025, 0.00025]
    if "PerFrameFunctionalGroupsSequence" in dataset:
        assert file.positions().tolist() == [
            [
                group.PlanePositionSlideSequence[0].ColumnPositionInTotalImagePixelMatrix,
                group.PlanePositionSlideSequence[0].RowPositionInTotalImagePixelMatrix,
            ]
            for group in dataset.PerFrameFunctionalGroupsSequence
        ]
    with Slide(path) as slide:
        assert np.array_equal(slide.read_region((0, 0), SIZE), PIXELS)


@pytest.mark.parametrize(("name", "mpp"), [("cmu-1-small-region", None), ("tcga", 0.5)])
def test_a_real_slide_has_the_pixels_the_plan_and_the_features_of_its_source(
    shared, tmp_path, name, mpp
):
    (source,) = (shared / "slides").glob(f"{name}*.svs")
    write_dicom(tmp_path / "s", tiff_frames(source, mpp))
    with Slide(tmp_path / "s") as slide, Slide(source, mpp=mpp) as original:
        assert slide.level_dimensions == original.level_dimensions
        assert slide.level_downsamples == original.level_downsamples
        assert slide.mpp == pytest.approx(original.mpp, rel=1e-9)
        for level in range(len(slide.level_dimensions)):
            tiles = range(slide.reader.levels[level].tiles_across * 2)
            for reduction in (1, 2, 4):
                pairs = zip(
                    *(s.reader.read_tile_bytes(level, tiles) for s in (slide, original)),
                    strict=True,
                )
                for ours, theirs in pairs:
                    assert np.array_equal(
                        slide.reader.decode(level, ours, reduction),
                        original.reader.decode(level, theirs, reduction),
                    )
        ours, theirs = (extract_features(s, model="xmag-mini") for s in (slide, original))
    assert np.array_equal(ours.coords, theirs.coords)
    assert np.allclose(np.asarray(ours), np.asarray(theirs), rtol=0, atol=1e-4)
    fingerprints = [bag.provenance.fingerprint for bag in (ours, theirs)]
    assert fingerprints[0] == fingerprints[1]


def test_any_file_of_a_series_is_the_slide(folder):
    with Slide(folder) as slide:
        assert slide.name == "slide"
        expected = {**slide.fingerprint, "name": ""}, slide.read_region((0, 0), SIZE)
        version = slide.facts.version
    assert len(list(folder.iterdir())) == 4
    for path in folder.iterdir():
        with Slide(path) as slide:
            assert slide.name == path.name
            assert {**slide.fingerprint, "name": ""} == expected[0]
            assert slide.facts.version == version
            assert np.array_equal(slide.read_region((0, 0), SIZE), expected[1])


def test_a_slide_is_another_version_when_any_of_its_levels_is_written(folder):
    with Slide(folder) as slide:
        before = slide.facts.version
    set_to(volumes(folder)[1], StudyDescription="longer than it was")
    with Slide(folder) as slide:
        assert slide.facts.version != before


def test_scale_comes_from_the_functional_groups(folder, base):
    with Slide(folder) as slide:
        assert slide.mpp == 0.25
        assert slide.mpp_source == "DICOM PixelSpacing"

    def to_frames(dataset):
        groups = dataset.PerFrameFunctionalGroupsSequence
        for group in groups:
            group.PixelMeasuresSequence = dataset.SharedFunctionalGroupsSequence[
                0
            ].PixelMeasuresSequence
            # pydicom warns of numbers that are longer than 16 characters, and scanners write them.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                group.PixelMeasuresSequence[0].PixelSpacing = ["0.000251000000000001"] * 2
        del dataset.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence

    make_sparse(base)
    change(base, to_frames)
    with Slide(folder) as slide:
        assert slide.mpp == pytest.approx(0.251)

    def without(dataset):
        for group in dataset.PerFrameFunctionalGroupsSequence:
            del group.PixelMeasuresSequence

    change(base, without)
    with pytest.warns(match="only an objective power of 40"), Slide(folder) as slide:
        assert slide.mpp == 0.25


def test_spacing_of_rows_comes_first(folder, base):
    def edit(dataset):
        measures = dataset.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
        measures.PixelSpacing = [0.0005, 0.00025]

    change(base, edit)
    with pytest.raises(SlideScaleError, match=r"0\.25 µm wide and 0\.5 µm high"):
        Slide(folder)


def illuminated(code):
    def edit(dataset):
        dataset.OpticalPathSequence[0].IlluminationTypeCodeSequence[0].CodeValue = code

    return edit


def two_paths(dataset):
    dataset.OpticalPathSequence.append(dataset.OpticalPathSequence[0])


def planes(dataset):
    dataset.TotalPixelMatrixFocalPlanes = 3


def syntax(uid):
    def edit(dataset):
        dataset.file_meta.TransferSyntaxUID = uid

    return edit


def grey(dataset):
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (illuminated("111743"), "its optical path is fluorescence"),
        (illuminated("1"), "light of an unknown kind"),
        (two_paths, "holds 2 optical paths"),
        (planes, "holds 3 focal planes"),
        (grey, r"1 sample\(s\) of 8 bits"),
        (syntax("1.2.840.10008.1.2.4.80"), r"coded as 1\.2\.840\.10008\.1\.2\.4\.80"),
        (syntax("1.2.840.10008.1.2.5"), r"coded as 1\.2\.840\.10008\.1\.2\.5"),
        (syntax("1.2.840.10008.1.2.4.201"), "coded as 1"),
        (
            lambda d: setattr(d, "PhotometricInterpretation", "PALETTE COLOR"),
            "neither RGB nor YCbCr",
        ),
        (lambda d: setattr(d, "TotalPixelMatrixColumns", 400), "more frames than the 4 tiles"),
    ],
)
def test_what_is_no_brightfield_scan_is_refused_with_its_reason(folder, base, edit, reason):
    change(base, edit)
    with pytest.raises(SlideError, match=reason) as caught:
        Slide(folder)
    assert str(caught.value).startswith("slide: ")
    assert "planted" not in str(caught.value)


def test_a_level_that_says_that_it_is_a_label_is_none(folder, base):
    set_to(base, ImageType=["ORIGINAL", "PRIMARY", "LABEL", "NONE"])
    with Slide(folder, mpp=1.0) as slide:
        assert slide.level_dimensions == ((175, 125),)


def test_two_frames_at_one_place_are_refused(folder, base):
    make_sparse(base, [0, 1, 2, 3, 4, 4])
    with pytest.raises(UnsupportedSlideError, match="several frames for the same place"):
        Slide(folder)


def test_tiles_off_the_grid_are_refused(folder, base):
    make_sparse(base)

    def edit(dataset):
        place = dataset.PerFrameFunctionalGroupsSequence[1].PlanePositionSlideSequence[0]
        place.ColumnPositionInTotalImagePixelMatrix = 200

    change(base, edit)
    with pytest.raises(UnsupportedSlideError, match="on no regular grid"):
        Slide(folder)


def test_planes_of_uncompressed_pixels_are_refused(tmp_path):
    write_dicom(tmp_path / "s", pyramid(PIXELS, color="raw"))
    set_to(volumes(tmp_path / "s")[0], PlanarConfiguration=1)
    with pytest.raises(UnsupportedSlideError, match="separate planes"):
        Slide(tmp_path / "s")


def test_several_scans_in_a_folder_want_to_be_chosen(folder, tmp_path):
    other = write_dicom(tmp_path / "other", pyramid(PIXELS[:300]))
    for path in other:
        shutil.copy(path, folder)
    with pytest.raises(SeveralScansError) as caught:
        Slide(folder)
    sizes = caught.value.scans
    assert sorted(sizes) == [(700, 300), SIZE]
    for region, size in enumerate(sizes):
        with Slide(folder, region=region) as slide:
            assert slide.dimensions == size
    with pytest.raises(InputError, match="region=7 is not in the file"):
        Slide(folder, region=7)
    with Slide(folder / other[0].name) as slide:  # a file is of one series
        assert slide.dimensions == (700, 300)


def test_labels_and_overviews_are_read_when_asked_for_and_never_before(folder):
    kept = volumes(folder)
    beside = [path for path in folder.iterdir() if path not in kept]
    with Slide(folder) as slide:
        assert {size for _, size in ((n, i.size) for n, i in slide.associated_images.items())} == {
            (120, 90)
        }
        assert sorted(slide.associated_images) == ["label", "macro"]
        label = np.asarray(slide.associated_images["label"])
        assert np.abs(label.astype(int) - texture(120, 90, seed=7)).mean() < 4
    for path in beside:
        data = path.read_bytes()
        at = data.index(b"\xe0\x7f\x10\x00OB")
        path.write_bytes(data[:at])
    with Slide(folder) as slide:
        assert slide.level_dimensions == (SIZE, (175, 125))
        slide.thumbnail(max_px=50)
        with pytest.raises(DamagedSlideError, match="it holds no pixels"):
            _ = slide.associated_images["label"]
    for path in kept:
        path.unlink()
    with pytest.raises(UnsupportedSlideError, match="nothing but labels and overviews"):
        Slide(folder)


def test_properties_are_the_texts_of_the_file_and_stand_nowhere_else(folder):
    with Slide(folder) as slide:
        properties = slide.properties
        assert properties["dicom.PatientName"] == "planted"
        assert properties["dicom.LabelText"] == "planted"
        assert properties["dicom.Modality"] == "SM"
        said = repr((slide, properties, slide.facts, slide.fingerprint, slide.reader))
    assert "planted" not in said


def test_tiles_are_read_alike_by_eight_threads_and_by_a_pickled_slide(folder):
    with Slide(folder) as slide, pickle.loads(pickle.dumps(slide)) as other:
        expected = slide.read_region((0, 0), SIZE)
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda _: slide.read_region((0, 0), SIZE), range(16)))
        assert all(np.array_equal(one, expected) for one in found)
        assert np.array_equal(other.read_region((0, 0), SIZE), expected)
        reader = slide.reader
    with pytest.raises(ClosedSlideError):
        reader.read_tile_bytes(0, [0])


def cut_in_the_middle(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def cut_in_its_attributes(path):
    path.write_bytes(path.read_bytes()[:1500])


def without_its_end(path):
    path.write_bytes(path.read_bytes()[:-8])


def with_a_table_that_goes_back(path):
    data = bytearray(path.read_bytes())
    at = data.index(b"\xe0\x7f\x10\x00OB") + 20
    data[at + 8 : at + 12] = (1).to_bytes(4, "little")
    path.write_bytes(data)


def more_frames(path):
    set_to(path, NumberOfFrames=7)


def fewer_frames(path):
    set_to(path, NumberOfFrames=5)


def without_its_beginning(path):
    path.write_bytes(bytes(132) + path.read_bytes()[132:])


def no_frames(path):
    set_to(path, NumberOfFrames=0)


def negative_frames(path):
    set_to(path, NumberOfFrames=-3)


def other_tiles(path):
    set_to(path, Rows=128)


def no_tiles(path):
    set_to(path, Columns=0)


def sparse_without_places(path):
    set_to(path, DimensionOrganizationType="TILED_SPARSE")


def fewer_places(path):
    make_sparse(path)

    def edit(dataset):
        del dataset.PerFrameFunctionalGroupsSequence[2]

    change(path, edit)


def places_outside(path):
    make_sparse(path)

    def edit(dataset):
        place = dataset.PerFrameFunctionalGroupsSequence[1].PlanePositionSlideSequence[0]
        place.RowPositionInTotalImagePixelMatrix = -255

    change(path, edit)


@pytest.mark.parametrize(
    "spoil",
    [
        fewer_places,
        places_outside,
        cut_in_the_middle, cut_in_its_attributes, without_its_end, with_a_table_that_goes_back,
        without_its_beginning, more_frames, fewer_frames, no_frames, negative_frames, other_tiles,
        no_tiles, sparse_without_places,
    ],
)  # fmt: skip
def test_damage_to_a_file_is_an_error_when_it_is_opened(folder, base, spoil):
    spoil(base)
    with pytest.raises(SlideError) as caught:
        Slide(folder)
    assert type(caught.value) in (DamagedSlideError, UnsupportedSlideError)
    assert str(caught.value).startswith("slide: ")


def test_damage_to_a_frame_is_an_error_of_its_tile(folder, base):
    data = bytearray(base.read_bytes())
    at = data.index(BASE.tiles[4][:-1])
    data[at + 2000 : at + 2600] = bytes(600)
    base.write_bytes(data)
    with Slide(folder) as slide:
        slide.read_region((0, 0), (600, 250))
        with pytest.raises(DamagedSlideError, match=r"tile 4 \(row 1, column 1\) of level 0"):
            slide.read_region((300, 300), (100, 100))


def test_a_fragment_that_lies_elsewhere_is_damage(folder, base):
    data = bytearray(base.read_bytes())
    at = data.index(BASE.tiles[4][:-1])
    data[at - 8 : at - 4] = b"\xfe\xff\x00\xe1"
    base.write_bytes(data)
    with Slide(folder) as slide:
        slide.read_region((0, 0), (600, 250))
        with pytest.raises(DamagedSlideError, match="frame 4 does not lie where"):
            slide.read_region((300, 300), (100, 100))


def test_a_cohort_has_a_row_for_each_series(written, tmp_path):
    cohort = tmp_path / "cohort"
    shutil.copytree(written, cohort / "1.2.840.113")
    shutil.copytree(written, cohort / "1.2.840.114")
    flat = cohort / "flat"
    flat.mkdir()
    for height in (500, 300):
        for path in write_dicom(tmp_path / str(height), pyramid(PIXELS[:height])):
            shutil.move(path, flat)
    (cohort / "notes").mkdir()
    (cohort / "notes" / "notes.txt").write_bytes(b"DICM")
    found = series_below(cohort)
    assert [path.name for path in found[:2]] == ["1.2.840.113", "1.2.840.114"]
    assert len(found) == 4
    assert {path.parent.name for path in found[2:]} == {"flat"}
    report = extract_cohort(cohort, tmp_path / "out", model=encoder(), tissue=None, processes=0)
    assert {row.status for row in report} == {"done"}, report
    assert (tmp_path / "out" / "1.2.840.113.h5").exists()
    assert len(report) == 4


def test_a_folder_that_is_the_slide_is_a_cohort_of_one(written, tmp_path):
    report = extract_cohort(written, tmp_path / "out", model=encoder(), tissue=None, processes=1)
    assert [(row.slide, row.status) for row in report] == [("slide", "done")]
    again = extract_cohort(written, tmp_path / "out", model=encoder(), tissue=None, processes=1)
    assert [row.status for row in again] == ["skipped"]


def test_a_damaged_series_costs_its_row(written, tmp_path):
    for name in ("a", "b"):
        shutil.copytree(written, tmp_path / "in" / name)
    cut_in_its_attributes(volumes(tmp_path / "in" / "a")[0])
    report = extract_cohort(
        tmp_path / "in", tmp_path / "out", model=encoder(), tissue=None, processes=1
    )
    assert [(row.slide, row.status) for row in report] == [("a", "failed"), ("b", "done")]
    assert "truncated or damaged" in report[0].error
    assert "planted" not in report[0].error


def encoder():
    return ColourEncoder(spec=TileSpec(mpp=1.0, size_px=56))


@pytest.mark.parametrize(
    ("color", "arrange"),
    [
        ("ycbcr420", None), ("ycbcr420", sparse_in_another_order), ("ycbcr420", two_instances),
        ("rgb444", None), ("j2k-rgb", None), ("j2k-rgb", of_undefined_lengths_and_in_fragments),
        ("raw", None),
    ],
)  # fmt: skip
def test_plan_and_features_are_those_of_the_same_tiles_in_a_tiff(tmp_path, color, arrange):
    write_svs(tmp_path / "a.svs", pixels=PIXELS, levels=(1, 4), tile=256, color=color)
    write_dicom(tmp_path / "s", pyramid(PIXELS, color=color), power=40)
    if arrange is not None:
        arrange(tmp_path / "s", volumes(tmp_path / "s")[0])
    with Slide(tmp_path / "s") as slide, Slide(tmp_path / "a.svs") as source:
        spec = TileSpec(mpp=0.5, size_px=56)  # of the first level, at 1/2
        ours, theirs = (plan_tiles(s, spec) for s in (slide, source))
        assert (ours.scale.level, ours.scale.reduction) == (0, 2)
        assert ours.scale == theirs.scale
        assert np.array_equal(ours.coords, theirs.coords)
        model = ColourEncoder(spec=spec)
        bags = [extract_features(s, model=model, tissue=None) for s in (slide, source)]
    assert len(bags[0]) > 20
    assert np.array_equal(bags[0].coords, bags[1].coords)
    assert np.allclose(np.asarray(bags[0]), np.asarray(bags[1]), rtol=0, atol=1e-4)


def test_reading_a_slide_warns_of_nothing_and_loads_no_other_package(written):
    code = (
        "import sys, warnings; warnings.simplefilter('error')\n"
        "from xmag.slide import Slide\n"
        f"with Slide({str(written)!r}) as slide: slide.thumbnail(max_px=50)\n"
        "assert not {'pydicom', 'wsidicom', 'torch'} & set(sys.modules)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")
