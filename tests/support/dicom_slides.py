"""DICOM slides written by wsidicom, of frames that it passes through as they are."""

import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import pydicom
from pydicom.uid import (
    UID,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    generate_uid,
)
from support.slides import encode_tile, shrunk, texture, tiles_of
from tifffile import TiffFile
from wsidicom import ImageData, WsiDicom, WsiInstance
from wsidicom.codec import Encoder
from wsidicom.geometry import Point, Size, SizeMm
from wsidicom.metadata import (
    Equipment,
    Image,
    ImageType,
    Label,
    Objectives,
    OpticalPath,
    Patient,
    Pyramid,
    Series,
    Slide,
    SlideSample,
    Study,
    WsiMetadata,
)
from wsidicom.metadata.schema.dicom.wsi import WsiMetadataDicomSchema
from wsidicom.source import Source  # fmt: skip

JPEG, J2K, RAW = JPEGBaseline8Bit, JPEG2000Lossless, ExplicitVRLittleEndian


@dataclass
class Frames:
    """The stored tiles of a level, in row order, and how they are stored."""

    tiles: Sequence[bytes]
    size: tuple[int, int]
    tile: tuple[int, int]
    mpp: float
    syntax: UID = JPEG
    photometric: str = "YBR_FULL_422"


def frames(pixels, *, tile=(256, 256), mpp=0.25, color="ycbcr420", quality=90) -> Frames:
    """The frames of an image in one of the codings that `encode_tile` knows."""
    syntax, photometric = {
        "rgb444": (JPEG, "RGB"), "j2k-rgb": (J2K, "YBR_RCT"), "j2k-ycbcr": (J2K, "YBR_FULL"),
        "raw": (RAW, "RGB"),
    }.get(color, (JPEG, "YBR_FULL_422"))  # fmt: skip
    stored = [encode_tile(part, color, quality) for part in tiles_of(pixels, tile)]
    size = (pixels.shape[1], pixels.shape[0])
    return Frames(stored, size, tile, mpp, syntax, photometric)


def pyramid(pixels, factors=(1, 4), *, mpp=0.25, **options) -> list[Frames]:
    """Frames of an image at 1/n."""
    return [frames(shrunk(pixels, n), mpp=mpp * n, **options) for n in factors]


def tiff_frames(path: Path, mpp: float | None = None) -> list[Frames]:
    """The tiles of an Aperio slide's levels, whole: as tifffile reads them, with their tables."""
    levels = []
    with TiffFile(path) as tiff:
        base = tiff.pages[0]
        mpp = mpp or float(base.description.partition("MPP = ")[2].partition("|")[0])
        for level in tiff.series[0].levels:
            page = level.keyframe
            stored = []
            for offset, length in zip(page.dataoffsets, page.databytecounts, strict=True):
                tiff.filehandle.seek(offset)
                data = tiff.filehandle.read(length)
                tables = page.jpegtables
                stored.append(data if tables is None else tables[:-2] + data[2:])
            is_jpeg = page.compression == 7
            photometric = "RGB" if page.photometric == 2 else "YBR_FULL_422"
            levels.append(
                Frames(
                    stored,
                    (page.imagewidth, page.imagelength),
                    (page.tilewidth, page.tilelength),
                    mpp * base.imagewidth / page.imagewidth,
                    JPEG if is_jpeg else UID("1.2.840.10008.1.2.4.91"),
                    photometric if is_jpeg else "YBR_ICT",
                )
            )
    return levels


class _FramesData(ImageData):
    """Frames as wsidicom wants to have them."""

    transcoder = None
    samples_per_pixel = 3
    bits = 8
    thread_safe = True
    image_coordinate_system = None
    lossy_compression = None

    def __init__(self, frames: Frames) -> None:
        super().__init__(Encoder.create(frames.syntax, 8, frames.photometric))
        self._frames = frames
        self._across = -(-frames.size[0] // frames.tile[0])

    @property
    def transfer_syntax(self):
        return self._frames.syntax

    @property
    def image_size(self):
        return Size(*self._frames.size)

    @property
    def tile_size(self):
        return Size(*self._frames.tile)

    @property
    def pixel_spacing(self):
        return SizeMm(self._frames.mpp / 1000, self._frames.mpp / 1000)

    @property
    def imaged_size(self):
        width, height = self._frames.size
        return SizeMm(width * self._frames.mpp / 1000, height * self._frames.mpp / 1000)

    @property
    def photometric_interpretation(self):
        return self._frames.photometric

    def get_decoded_tile(self, tile_point, z, path, cache=True):
        raise AssertionError("frames are passed through")

    def get_encoded_tile(self, tile: Point, z, path):
        return self._frames.tiles[tile.y * self._across + tile.x]


class _FramesSource(Source):
    annotation_instances = ()
    thumbnail_instances = ()

    def __init__(self, levels, label, overview, metadata) -> None:
        super().__init__()
        schema = WsiMetadataDicomSchema()

        def instances(frames, kind, index=None):
            if frames is None:
                return []
            dataset = schema.dump(metadata, kind, False)
            data = _FramesData(frames)
            return [WsiInstance.create_instance(data, dataset, kind, index)]

        factors = [round(np.log2(levels[0].size[0] / level.size[0])) for level in levels]
        self._levels = [
            instance
            for level, factor in zip(levels, factors, strict=True)
            for instance in instances(level, ImageType.VOLUME, factor)
        ]
        self._label = instances(label, ImageType.LABEL)
        self._overview = instances(overview, ImageType.OVERVIEW)

    @property
    def base_dataset(self):
        return self._levels[0].dataset

    @property
    def level_instances(self):
        return self._levels

    @property
    def label_instances(self):
        return self._label

    @property
    def overview_instances(self):
        return self._overview

    def close(self) -> None:
        pass


def metadata(text: str = "planted", power: float | None = None) -> WsiMetadata:
    """What a scanner writes of a slide, with this text as names of all kinds."""
    path = OpticalPath.default() if hasattr(OpticalPath, "default") else OpticalPath("0")
    if power is not None:
        path = OpticalPath("0", objective=Objectives(objective_power=power))
    return WsiMetadata(
        study=Study(uid=generate_uid(), accession_number=text, description=text),
        series=Series(uid=generate_uid(), number=1, description=text),
        patient=Patient(name=text, identifier=text),
        equipment=Equipment(manufacturer=text, model_name=text, device_serial_number=text),
        slide=Slide(identifier=text, samples=[SlideSample(identifier=text, uid=generate_uid())]),
        pyramid=Pyramid(
            Image(acquisition_datetime=datetime(2026, 1, 1)),
            [path],
            uid=generate_uid(),
        ),
        label=Label(text=text, barcode=text),
        frame_of_reference_uid=generate_uid(),
        dimension_organization_uids=[generate_uid()],
    )


def write_dicom(
    folder: Path,
    levels: Sequence[Frames],
    *,
    associated: bool = True,
    power: float | None = None,
    text: str = "planted",
    mark: tuple[int, int, int] | None = None,
    **options,
) -> list[Path]:
    """The files that wsidicom writes for these levels, with a label and an overview.

    `text` stands in all kinds of names, and those two are of the colour `mark`. `options` are those
    of `WsiDicom.save`: `offset_table`, `concatenation`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pixels = texture(120, 90, seed=7)
    if mark is not None:
        pixels[:] = mark
    small = frames(pixels, tile=(120, 90), mpp=50.0) if associated else None
    source = _FramesSource(levels, small, small, metadata(text, power))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with WsiDicom(source) as slide:
            return [Path(path) for path in slide.save(folder, workers=1, **options)]


def write_dicom_beside(path: Path, levels: Sequence[Frames], **options) -> None:
    """The same, with a name for the file of the first level, beside which all others lie."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        place = Path(folder) / "slide"
        write_dicom(place, levels, **options)
        volumes(place)[0].rename(path)
        for file in place.iterdir():
            file.rename(path.parent / file.name)


def change(path: Path, edit) -> None:
    """Write a file anew with pydicom, after `edit(dataset)`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = pydicom.dcmread(path)
        edit(dataset)
        dataset.save_as(path)


def frames_of(dataset) -> list[bytes]:
    """The frames of a dataset as they are stored, by pydicom."""
    count = int(dataset.NumberOfFrames)
    if not dataset.file_meta.TransferSyntaxUID.is_encapsulated:
        size = len(dataset.PixelData) // count
        return [dataset.PixelData[n * size : (n + 1) * size] for n in range(count)]
    return list(pydicom.encaps.generate_frames(dataset.PixelData, number_of_frames=count))


def make_sparse(path: Path, keep=None, *, fragments: int = 1, undefined: bool = False) -> None:
    """Make an instance TILED_SPARSE, of those tiles alone that are in `keep`, in that order."""

    def edit(dataset) -> None:
        stored = frames_of(dataset)
        tiles = list(range(len(stored))) if keep is None else list(keep)
        across = -(-dataset.TotalPixelMatrixColumns // dataset.Columns)
        groups = []
        for tile in tiles:
            place = pydicom.Dataset()
            place.XOffsetInSlideCoordinateSystem = "1.5"
            place.YOffsetInSlideCoordinateSystem = "2.5"
            place.ZOffsetInSlideCoordinateSystem = "0.0"
            place.ColumnPositionInTotalImagePixelMatrix = 1 + tile % across * dataset.Columns
            place.RowPositionInTotalImagePixelMatrix = 1 + tile // across * dataset.Rows
            group = pydicom.Dataset()
            group.PlanePositionSlideSequence = [place]
            groups.append(group)
        dataset.DimensionOrganizationType = "TILED_SPARSE"
        dataset.PerFrameFunctionalGroupsSequence = groups
        if undefined:
            dataset["PerFrameFunctionalGroupsSequence"].is_undefined_length = True
            for group in groups:
                group.is_undefined_length_sequence_item = True
                group["PlanePositionSlideSequence"].is_undefined_length = True
        dataset.NumberOfFrames = len(tiles)
        chosen = [stored[tile] for tile in tiles]
        if dataset.file_meta.TransferSyntaxUID.is_encapsulated:
            data = pydicom.encaps.encapsulate(chosen, fragments_per_frame=fragments)
            dataset.PixelData = data
        else:
            dataset.PixelData = b"".join(chosen)

    change(path, edit)


def volumes(folder: Path) -> list[Path]:
    """The files of a folder that hold levels, the largest level first, parts in their order."""

    def key(path):
        head = pydicom.dcmread(path, stop_before_pixels=True)
        first = head.get("ConcatenationFrameOffsetNumber", 0)
        return -head.TotalPixelMatrixColumns, first

    levels = [
        p
        for p in folder.iterdir()
        if "VOLUME" in pydicom.dcmread(p, specific_tags=["ImageType"]).ImageType
    ]
    return sorted(levels, key=key)


_NEEDED = {
    "TransferSyntaxUID", "MediaStorageSOPClassUID", "SOPInstanceUID", "SeriesInstanceUID",
    "StudyInstanceUID", "FrameOfReferenceUID", "PyramidUID", "SOPClassUID", "ImageType",
    "PhotometricInterpretation", "DimensionOrganizationType", "SpecificCharacterSet",
    "NumberOfFrames", "PixelSpacing", "ObjectiveLensPower", "CodeValue",
}  # fmt: skip
"""Attributes that a reader has to go by."""


def plant_texts(path: Path, secret: str) -> None:
    """Put a text into each text of a file, whatever its representation allows, and into new ones.

    Also into private ones, and into those that no slide has.
    """
    texts = ("CS", "SH", "LO", "ST", "LT", "UT", "PN", "AE", "UC", "UR", "UI", "DA", "TM", "DT")

    def plant(dataset) -> None:
        for element in dataset:
            if element.VR == "SQ":
                for item in element.value:
                    plant(item)
            elif element.VR in texts and element.keyword not in _NEEDED:
                element.value = secret

    def edit(dataset) -> None:
        for keyword in (
            "PatientBirthDate", "OtherPatientNames", "PatientComments", "PatientAddress",
            "ReferringPhysicianName", "OperatorsName", "InstitutionName", "StationName",
            "ImageComments", "SeriesDescription", "ProtocolName", "AdmissionID", "DeviceUID",
            "BarcodeValue", "LabelText", "ContainerIdentifier", "RequestingPhysician",
        ):  # fmt: skip
            setattr(dataset, keyword, secret)
        block = dataset.private_block(0x0009, secret, create=True)
        block.add_new(0x01, "LO", secret)
        block.add_new(0x02, "UN", secret.encode() + b" " * (len(secret) % 2))
        plant(dataset)
        plant(dataset.file_meta)

    change(path, edit)
