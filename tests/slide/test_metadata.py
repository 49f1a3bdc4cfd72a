"""What the texts of scanners mean; the examples are cut from real files."""

import pytest

from xmag.slide import metadata

CMU_1 = (
    "Aperio Image Library v11.2.1 \r\n46000x32914 [42673,5576 2220x2967] (240x240) JPEG/RGB Q=30;"
    "Aperio Image Library v10.0.51\r\n46920x33014 [0,100 46000x32914] (256x256) JPEG/RGB Q=30"
    "|AppMag = 20|StripeWidth = 2040|ScanScope ID = CPAPERIOCS|Filename = CMU-1|Date = 12/29/09"
    "|MPP = 0.4990|Left = 25.691574|Filtered = 5"
)
TCGA = "Aperio Image Library v11.0.37\r\n4443x3567 (256x256) J2K/KDU Q=70|ICC Profile = sRGB"


def test_aperio_scale_is_found_among_the_fields():
    scale = metadata.aperio_scale(CMU_1)
    assert scale.mpp == (0.499, 0.499)
    assert scale.objective_power == 20


def test_an_aperio_file_may_say_nothing():
    scale = metadata.aperio_scale(TCGA)
    assert scale.mpp is None
    assert scale.objective_power is None


@pytest.mark.parametrize(
    ("text", "mpp"),
    [("MPP=0.25", 0.25), ("MPP = 0,2527", 0.2527), ("MPP = 2.5e-1", 0.25), ("MPP = none", None)],
)
def test_numbers_as_scanners_write_them(text, mpp):
    assert metadata.aperio_scale(f"Aperio|{text}|X = 1").mpp == (mpp and (mpp, mpp))


@pytest.mark.parametrize(
    ("x", "unit", "mpp"),
    [(40_000, 3, 0.25), (101_600, 2, 0.25), (40_000, 1, None), (0, 3, None), (1, 1, None)],
)
def test_resolution_tags_count_only_with_a_unit(x, unit, mpp):
    found = metadata.resolution_scale(x, x, unit).mpp
    assert found == (None if mpp is None else pytest.approx((mpp, mpp)))


def test_philips_spacings_are_mm_with_the_row_spacing_first():
    xml = (
        '<?xml version="1.0" encoding="UTF-8" ?><DataObject ObjectType="DPUfsImport"><Array>'
        '<DataObject ObjectType="DPScannedImage">'
        '<Attribute Name="DICOM_PIXEL_SPACING">"9" "9"</Attribute>'
        '<DataObject ObjectType="PixelDataRepresentation">'
        '<Attribute Name="DICOM_PIXEL_SPACING">"0.000227273" "0.000226891"</Attribute></DataObject>'
        '<DataObject ObjectType="PixelDataRepresentation">'
        '<Attribute Name="DICOM_PIXEL_SPACING">"0.000454545" "0.000453782"</Attribute></DataObject>'
        "</DataObject></Array></DataObject>"
    )
    assert metadata.philips_spacings(xml) == [
        pytest.approx((0.226891, 0.227273)),
        pytest.approx((0.453782, 0.454545)),
    ]


def test_leica_macro_images_are_left_out():
    xml = (
        '<scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01">'
        '<collection sizeX="26564529" sizeY="76734144">'
        '<image><pixels><dimension sizeX="1616" sizeY="4668" ifd="0"/></pixels>'
        '<view sizeX="26564529" sizeY="76734144" offsetX="0" offsetY="0"/></image>'
        '<image><pixels><dimension r="1" sizeX="9784" sizeY="11156" ifd="5"/>'
        '<dimension r="0" sizeX="39168" sizeY="44632" ifd="4"/></pixels>'
        '<view sizeX="9792000" sizeY="11158000" offsetX="9125170" offsetY="18880004"/>'
        "<scanSettings><objectiveSettings><objective>20</objective></objectiveSettings>"
        "<illuminationSettings><illuminationSource>brightfield</illuminationSource>"
        "</illuminationSettings></scanSettings></image></collection></scn>"
    )
    size_nm, (scan,), _ = metadata.leica_scans(xml)
    assert size_nm == (26564529, 76734144)
    assert scan.offset_nm == (9125170, 18880004)
    assert scan.levels == ((39168, 44632, 4), (9784, 11156, 5))  # finest first
    assert (scan.power, scan.illumination, scan.planes) == (20, "brightfield", 1)


@pytest.mark.parametrize("wrapped", [False, True])
def test_ventana_scale(wrapped):
    iscan = '<iScan Magnification="40" ScanRes="0.25" Mode="x"/>'
    scale = metadata.ventana_scale(f"<Metadata>{iscan}</Metadata>" if wrapped else iscan)
    assert scale.mpp == (0.25, 0.25)
    assert scale.objective_power == 40


@pytest.mark.parametrize(
    ("overlap", "x", "areas", "stitched"),
    [(0, 0, 1, False), (3, 0, 1, True), (0, 512, 1, True), (0, 0, 2, True)],
)
def test_ventana_tiles_on_one_regular_grid_are_told_from_others(overlap, x, areas, stitched):
    area = (
        f'<ImageInfo AOIScanned="1" Pos-X="{x}" Pos-Y="0">'
        f'<TileJointInfo OverlapX="{overlap}" OverlapY="0"/></ImageInfo>'
    )
    ignored = '<ImageInfo AOIScanned="0" Pos-X="7" Pos-Y="7"/>'
    xml = f"<EncodeInfo><SlideStitchInfo>{area * areas}{ignored}</SlideStitchInfo></EncodeInfo>"
    assert metadata.ventana_is_stitched(xml) is stitched


def ome(attributes: str) -> str:
    return (
        '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">'
        '<Instrument ID="Instrument:0"><Objective ID="Objective:0" NominalMagnification="20.0"/>'
        '</Instrument><Image ID="Image:0" Name="S"><ObjectiveSettings ID="Objective:0"/>'
        f"<Pixels {attributes}>"
        '<Channel SamplesPerPixel="3"/><TiffData/></Pixels></Image></OME>'
    )


@pytest.mark.parametrize(
    ("attributes", "mpp"),
    [
        ('PhysicalSizeX="0.5" PhysicalSizeY="0.5"', 0.5),  # the schema's default unit is µm
        ('PhysicalSizeX="500" PhysicalSizeXUnit="nm" PhysicalSizeY="0.5"', 0.5),
        ('PhysicalSizeX="5e-4" PhysicalSizeXUnit="mm" PhysicalSizeY="0.5"', 0.5),
        ('PhysicalSizeX="0.5" PhysicalSizeXUnit="pixel" PhysicalSizeY="0.5"', None),
        ("", None),
    ],
)  # fmt: skip
def test_ome_physical_sizes(attributes, mpp):
    (image,) = metadata.ome_images(ome(f'SizeC="3" {attributes}'))
    assert image.scale.mpp == (None if mpp is None else pytest.approx((mpp, mpp)))
    assert image.scale.objective_power == 20
    assert (image.name, image.page, image.planes) == ("S", 0, 1)


@pytest.mark.parametrize("sizes", ['SizeC="3" SizeZ="5"', 'SizeC="3" SizeT="5"', 'SizeC="15"'])
def test_ome_planes_are_counted(sizes):
    (image,) = metadata.ome_images(ome(sizes))
    assert image.planes == 5
