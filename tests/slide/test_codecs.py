"""Tile bytes -> pixels: colour spaces, reduced scales, and damage that must not pass for pixels."""

import base64
import io

import imagecodecs
import numpy as np
import pytest
import simplejpeg
import tifffile
from PIL import Image
from support import tiff
from support.oracle import difference
from support.slides import (
    abbreviated,
    encode_jpeg,
    encode_tile,
    jpeg_segments,
    page,
    shrunk,
    texture,
    to_ycbcr,
)

from xmag.errors import DamagedSlideError, UnsupportedSlideError
from xmag.slide import Slide, codecs, jpeg2000

RGB, YCBCR = 2, 6
COLORS = {
    "ycbcr420": (7, YCBCR), "ycbcr422": (7, YCBCR), "ycbcr444": (7, YCBCR), "rgb444": (7, RGB),
    "j2k-rgb": (33005, RGB), "j2k-ycbcr": (33003, RGB), "raw": (1, RGB), "lzw": (5, RGB),
    "deflate": (8, RGB), "zstd": (50000, RGB), "webp": (50001, RGB),
}  # fmt: skip
JFIF = b"\xff\xe0\x00\x10JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00"


def coding(color, size=(240, 240), **changes):
    compression, photometric = COLORS[color]
    fields = {
        "compression": compression, "photometric": photometric, "samples": 3, "size": size,
        "last_height": size[1], "predictor": 2 if color == "deflate" else 1, "aperio": True,
    }  # fmt: skip
    return codecs.TileCoding(**(fields | changes))


@pytest.fixture(scope="module")
def tile():
    return texture(240, 240)


@pytest.mark.parametrize("color", COLORS)
def test_every_coding_gives_back_its_pixels(color, tile):
    pixels = codecs.decoder(coding(color))(encode_tile(tile, color), 1)
    lossy = color.startswith(("ycbcr", "rgb", "j2k"))
    assert difference(pixels, tile).mean() < (4 if lossy else 1e-9)
    assert pixels.shape == tile.shape


@pytest.mark.parametrize("color", COLORS)
@pytest.mark.parametrize("n", [2, 4, 8])
def test_a_reduced_tile_is_the_box_average_of_the_full_one(color, n, tile):
    decode = codecs.decoder(coding(color))
    data = encode_tile(tile, color)
    reduced = decode(data, n)
    error = difference(reduced, shrunk(decode(data, 1), n))
    assert reduced.shape == (240 // n, 240 // n, 3)
    # Libjpeg-turbo averages before it rounds and clips, and chroma before it is interpolated;
    # YCbCr of JPEG 2000 is rounded before it becomes RGB at full scale alone.
    in_full = color == "j2k-rgb" and n == 2
    approximate = color.startswith(("ycbcr", "rgb", "j2k")) and not in_full
    assert error.mean() < (1.5 if approximate else 1e-9)


def test_reductions_are_those_that_divide_a_tile():
    assert codecs.reductions((240, 240)) == (1, 2, 4, 8)
    assert codecs.reductions((512, 8)) == (1, 2, 4, 8)
    assert codecs.reductions((244, 100)) == (1, 2, 4)
    assert codecs.reductions((1001, 16)) == (1,)


@pytest.mark.parametrize("color", ["rgb444", "ycbcr420"])
@pytest.mark.parametrize("where", ["nowhere", "tile", "tables", "both"])
def test_jfif_markers_do_not_decide_about_colour(color, where, tile):
    tables, stream = abbreviated(encode_jpeg(tile, color))
    if where in ("tile", "both"):
        stream = stream[:2] + JFIF + stream[2:]
    if where in ("tables", "both"):
        tables = tables[:2] + JFIF + tables[2:]
    pixels = codecs.decoder(coding(color, jpeg_tables=tables))(stream, 1)
    assert difference(pixels, tile).mean() < 4


def test_an_adobe_marker_in_the_tile_does_not_decide_either(tile):
    tables, stream = abbreviated(encode_jpeg(tile, "rgb444"))
    adobe = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x01"
    stream = stream[:2] + adobe + stream[2:]
    pixels = codecs.decoder(coding("rgb444", jpeg_tables=tables))(stream, 1)
    assert difference(pixels, tile).mean() < 4


@pytest.mark.parametrize("color", COLORS)
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.9, 0.999])
def test_a_truncated_tile_is_damage(color, share, tile):
    data = encode_tile(tile, color)
    for n in (2, 8):
        with pytest.raises(DamagedSlideError):
            codecs.decoder(coding(color))(data[: int(len(data) * share)], n)


@pytest.mark.parametrize("color", COLORS)
def test_random_bytes_are_damage(color):
    data = np.random.default_rng(0).bytes(5000)
    with pytest.raises(DamagedSlideError):
        codecs.decoder(coding(color))(data, 1)


def test_garbage_within_a_jpeg_is_damage(tile):
    data = bytearray(encode_jpeg(tile, "ycbcr420"))
    middle = len(data) // 2
    data[middle : middle + 300] = np.random.default_rng(0).bytes(300)
    with pytest.raises(DamagedSlideError, match="cannot be decoded"):
        codecs.decoder(coding("ycbcr420"))(bytes(data), 1)


@pytest.mark.parametrize("color", COLORS)
def test_a_tile_of_another_size_is_damage(color):
    data = encode_tile(texture(240, 232), color)
    with pytest.raises(DamagedSlideError, match=r"240"):
        codecs.decoder(coding(color))(data, 1)


def test_a_jpeg_with_the_wrong_number_of_components_is_damage(tile):
    grey = simplejpeg.encode_jpeg(
        np.ascontiguousarray(tile[..., :1]), 90, colorspace="GRAY", colorsubsampling="Gray"
    )
    with pytest.raises(DamagedSlideError, match="Gray, where the file promises YCbCr"):
        codecs.decoder(coding("ycbcr420"))(grey, 1)


def test_the_last_strip_of_an_image_may_be_short():
    strip = texture(240, 40)
    decode = codecs.decoder(coding("ycbcr444", last_height=40))
    pixels = decode(encode_jpeg(strip, "ycbcr444"), 2)
    assert pixels.shape == (120, 120, 3)
    assert difference(pixels[:20], shrunk(strip, 2)).mean() < 4
    assert (pixels[20:] == 255).all()


def test_transparency_is_shown_on_white():
    rgba = np.zeros((240, 240, 4), np.uint8)
    rgba[..., 3] = np.linspace(0, 255, 240).astype(np.uint8)[:, None]
    pixels = codecs.decoder(coding("raw", samples=4))(rgba.tobytes(), 1)
    assert (pixels == 255 - rgba[..., 3:]).all()


@pytest.mark.parametrize("changes", [{"compression": 34892}, {"predictor": 3}])
def test_a_coding_that_is_not_read_is_named(changes):
    with pytest.raises(UnsupportedSlideError, match=r"compression \d+ and predictor \d"):
        codecs.decoder(coding("raw", **changes))


def encode_jpeg2000(pixels, **options):
    """A stream as Aperio writes them, unless `options` of Pillow say otherwise."""
    file = io.BytesIO()
    aperio = {"irreversible": True, "num_resolutions": 6, "quality_layers": [14]}
    Image.fromarray(pixels).save(file, "JPEG2000", no_jp2=True, **(aperio | options))
    return file.getvalue()


ORDINARY = [
    {}, {"mct": 0}, {"progression": "RLCP", "quality_layers": [40, 20, 10]},
    {"progression": "RPCL"}, {"precinct_size": (64, 64)}, {"num_resolutions": 2},
]  # fmt: skip
OUT_OF_THE_ORDINARY = [
    {"irreversible": False}, {"quality_layers": [40, 20, 10]}, {"progression": "CPRL"},
    {"progression": "PCRL", "precinct_size": (64, 64)}, {"tile_size": (128, 128)},
    {"num_resolutions": 1},
]  # fmt: skip


@pytest.mark.parametrize("options", ORDINARY, ids=str)
def test_jpeg_2000_without_its_finest_level_is_what_openjpeg_reduces(options):
    stream = encode_jpeg2000(texture(256, 240), **options)
    half = jpeg2000.without_finest_level(stream, (256, 240))
    with Image.open(io.BytesIO(stream)) as image:
        image.reduce = 1
        expected = np.asarray(image)
    assert expected.shape == (120, 128, 3)
    assert np.array_equal(imagecodecs.jpeg2k_decode(half), expected)


@pytest.mark.parametrize("options", OUT_OF_THE_ORDINARY, ids=str)
def test_jpeg_2000_out_of_the_ordinary_is_decoded_in_full_and_averaged(options):
    stream = encode_jpeg2000(texture(256, 256), **options)
    assert jpeg2000.without_finest_level(stream, (256, 256)) is None
    decode = codecs.decoder(coding("j2k-rgb", size=(256, 256)))
    assert np.array_equal(decode(stream, 4), codecs.box_average(decode(stream, 1), 4))


def test_a_quarter_is_neither_shifted_nor_sharper_than_an_average():
    y, x = np.mgrid[0:256, 0:256]
    waves = 128 + 80 * np.sin(2 * np.pi * x / 23) * np.cos(2 * np.pi * y / 31)
    pixels = np.repeat(waves.round().astype(np.uint8)[..., None], 3, axis=2)
    half = jpeg2000.without_finest_level(encode_jpeg2000(pixels, quality_layers=[2]), (256, 256))
    low = imagecodecs.jpeg2k_decode(half)
    assert difference(jpeg2000.quarter(low), shrunk(pixels, 4)).max() <= 2
    assert difference(shrunk(low, 2), shrunk(pixels, 4)).max() > 5  # half a px further up and left


@pytest.mark.parametrize("irreversible", [True, False], ids=["9/7", "5/3"])
def test_ycbcr_in_jpeg_2000_becomes_rgb(irreversible):
    pixels = texture(256, 256)
    options = {"mct": 0, "irreversible": irreversible, "quality_layers": [2 if irreversible else 1]}
    stream = encode_jpeg2000(to_ycbcr(pixels), **options)
    found = codecs.decoder(coding("j2k-ycbcr", size=(256, 256)))(stream, 1)
    assert difference(found, pixels).mean() < 1


@pytest.mark.shared
@pytest.mark.parametrize("level", [0, 1])
def test_quarters_of_a_real_jpeg_2000_slide_are_averages(shared, level):
    path = shared / "slides" / "tcga-cr-7395-01a-01-ts1.svs"
    with Slide(path, mpp=0.5) as slide:
        indices = range(20, 36)
        for data in slide.reader.read_tile_bytes(level, indices):
            full = slide.reader.decode(level, data, 1)
            for n in (4, 8):
                found = slide.reader.decode(level, data, n)
                assert difference(found, shrunk(full, n)).mean() <= 2


# 64x64 px, irreversible, made by opj_compress from YCbCr planes with chroma at 1/2 in x (and y).
SUBSAMPLED = {
    "422": """\
|4;u>051Rl0000$0000$00000000000000$0000$000000000000RdB0S5vB2Lb{AQUDA9000311q1{D0RLP7BSLo|cJOxac
EE1{ZvbxKXHaKQXJ}9bPz6v&SJPM1S7QHU03`qcLvm$dbY)~9VtF7>aAj^vP(?=|c4cyNX>V>IGA=bPF#nJM3IG5A00XK30s
oW3_y+^N*Uo1S=fn5}3f?<^!TN%L1!8Rff5G~Lz<uDb2htP`^OpL<l8+AF05p9M!m)Y3!2E$Aen5~Pco+-
kFux2`b>9j}fWRL}I0x7V0DU091<SV!+q(=QXTbZ!V14260N{We^6Jwg3Bfdn!qB(o{k}6_1Af4A0X{#eVAYP;`JZYex54=Z
!27}=1K<=I8$$n2$tqFF)qeqMs+2q^GZhy-
r10m%^$dacgn$<%ZNxEWNunfz3ZELF3S6L!c&dxT@+N@#g}^qUl|N4wxp0E*P_ciPaC|FT!YacekwZYn-
+DB9f2{^fh@^{2J*F{{C<|zLLL5LDT)p;Bu4f$_g^wt}`v#ysk#Gax2q9b!QoIah_VNZi&My(Y4L!$;EaK1{=smwF{22YGn;
DO#Bab;x!S{~9eL)~19p^)Gw0lY`2k}2t%vnH<$h~AaKkGS6w%GF@G#-
J+EKdU*<H7YMz<h*&MN<+5tqYJsJiAc%%n}${Ya5+6W<P}{&<Vp4bF68|18B5kUXJcL^^B2);FH{b!1f)&0v1gb5|s>}4}AH
adA`&d@D`!fwpp2-
tSLVnaRCosY3K(Dc=hNFf5YrAfcXUgHT4JT;iK~4x8X?GkjMKm6I`}DIVJ$e+I1IV(WK=nGu2BIoUGlw%04cCp{f^z46c{uw
0R9lXUE=$0r80dE3JV#BaZ_`?0pqe=7<Xc_<fc8-3$eAzO1_D2<@L5Y%jL<96@neUnrjDjIPLur)xYB{z5ga5wHX-
u!=Y=J{Aj!U%|QA4yAkZ!Sy0Q9ijkvN-9NyKliy)o02f5A_6dwk#KtA-
!KQ2CIA2gKp+=G?REcjzKr=fFbJjv!DVRSK>lL@KR1d_Nn61k5-
4zdUV4+^u9jkE*}`Ktft~htf{G&UBO12^zt%iP9?RU6Yt`clNx=E(Fb4|&B1Qp0;)uT={^C=L%H1iWW+EH0#&Y1-
V?Po{D`Pljmf{@=`}gUuWSo&@j&Kb^3K1^XwQ1;8lY)!eEW^<Dg@C{;q~h-
igWt$?WfgzSPs8nFfEA!cRX^ivNZO@z$>8HWf9IdH0?-
B>S`lZ+`;>q<i*ZRx31+2bE6XM^{0@4vpvSYJPKhb7IOGB_CN8*?nr&Z(3r~IndfaIo#G=LZB$y-
+nCu8mc987*lbl1Q(GC3g!KsBb4)x#ecHPN5dH;X^*#
""",
    "420": """\
|4;u>051Rl0000$0000$00000000000000$0000$000000000000RdB0S5vC2Lb~BQUDA9000311q1{D0RLP7BSLo|cJOxac
EE1{ZvbxKXHaKQXJ}9bPz6v&SJPM1S7QHU03`qcLvm$dbY)~9VtF7>aAj^vP(?=|c4cyNX>V>IGA=bPF#nJM3IG5A00S5R0s
oW3_y+^N*Uo1S=fV1c00D@={D6Q3&cXVFz<uDb2htP`^OpL<l8+AF05p9M!m)Y3z<q#FA9xf4>;egU02c*sz#m8`KTs$D_`v
`MzXH(#f57|1V14260N{We^6Jwg3Bfdn!qB(o{k}6_1Af4A0X{#eVAYP;`JZYex4`?spnc%bA7Cg1RDk7jKMX!*&)0ts!m)X
;!}SM%`vG7F#taSl@yGPGmk<Nh9)A!u2gC9vfck~NHldY2PZqgwg6&YTf0uB4D_X)T!y=JGK*ryCG<tun21|&fi%C7EF_9<>
Xn8^$Kp9-U_D`;79UO&^D8Tyz;C+FR1K|`QO9Vb?=$KQIWS9#)6?Xw!<e>V~V^-
;|D%T{`G2y?#_lQ9I17HCNA`{~kxKR5Nz{RUJ>2-
s@ADV0%c*fT4%f$gLzazo*CBS@yfJIXh1+5E^LOi=r_{<U*T5B7fH)cPDCeR7P5p%3*$OCA!V_uH#IrWT@h2WFie!%t}!U7g
e6%v&UpAUTbo_W618t@jO)wWrgovbN89B}~;UuozE33&DB4S&Pz8-eqUfDr&S^^-qP^t?$)`Y3Yx#@-
R3Z&f<d5uL5AH$^^!K%U8y5dQ&NUS2n1KgZrh1Lqzqt${Ma<2KXX50M1x7{4GoqI}n5s9DP7HHxd>WvqAN#Zu&JSCH#CftwF
G#kKPH!Sy0Q9ijkvN-9NyKliy)o02f5A_6dwk#KtA-!KQ2CIA2gKp+=G?REcjzKr=fFbJjv!DVRSK>lL@KR1d_Nn61k5-
4zdUV4+^u9jkE*}`Ktft~htf{G&UBO12^zt%iP9?RU6Yt`clNx=Ekz&;V+1VBasL6|agEd~pk`@@jU)Y%E2lMfOBEL}2r{BR
BUy(gJQ{<*?x<5j7hl{~vz>xZNh!|XhOd<6hSRX^jNj_%(HeX8_lRwRwt3sIcE=sw0HIKoAEej@U&#<!NmQl}aoG=iL0c*H`
6ohTEbt^PlWse%`%IwUiNS&^SgZ~xf
""",
}  # fmt: skip


def subsampled_source():
    y, x = np.mgrid[0:64, 0:64] / 64
    waves = 200 - 80 * np.sin(6 * x), 150 + 60 * np.cos(5 * y), 190 + 40 * np.sin(4 * (x + y))
    return np.stack(waves, -1).round().astype(np.uint8)


@pytest.mark.parametrize("subsampling", SUBSAMPLED)
def test_jpeg_2000_with_fewer_chroma_samples_becomes_rgb_once(subsampling):
    data = base64.b85decode(SUBSAMPLED[subsampling].replace("\n", ""))
    pixels = codecs.decoder(coding("j2k-ycbcr", size=(64, 64)))(data, 1)
    assert difference(pixels, subsampled_source()).mean() < 4


ADOBE = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00"
MARKERS = {"none": b"", "jfif": JFIF, "adobe": ADOBE}
APERIO = "Aperio Image Library v12\r\n240x240 (240x240) JPEG|MPP = 0.25"


def marked(stream, marker, ids=None):
    """A stream without markers, with one; its components called `ids`."""
    found = b"\xff\xd8" + marker
    for code, part in jpeg_segments(stream):
        first = {0xC0: 10, 0xDA: 5}.get(code)
        step = {0xC0: 3, 0xDA: 2}.get(code)
        segment = bytearray(part)
        if ids is not None and first is not None:
            for number, name in enumerate(ids):
                segment[first + step * number] = name
        found += bytes(segment)
    return found


def one_tile(path, data, compression, tag, vendor):
    """A TIFF of one 240 px tile with these bytes and tags."""
    written = page(texture(240, 240), color="raw", description=vendor)
    written.tags |= {
        259: (tiff.SHORT, compression), 262: (tiff.SHORT, tag), 530: (tiff.SHORT, [1, 1]),
    }  # fmt: skip
    tiff.write_pages(path, [tiff.Page(written.tags, [data])])
    return path


def decoded(path, *reductions):
    """The only tile of a file at these reductions, and what tifffile shows."""
    with Slide(path, mpp=0.25) as slide:
        (data,) = slide.reader.read_tile_bytes(0, [0])
        found = [slide.reader.decode(0, data, n) for n in reductions]
    with tifffile.TiffFile(path) as file:
        return found, file.pages[0].asarray()


@pytest.mark.parametrize("vendor", ["", APERIO], ids=["plain", "aperio"])
@pytest.mark.parametrize("tag", [RGB, YCBCR])
@pytest.mark.parametrize("marker", MARKERS)
@pytest.mark.parametrize("color", ["ycbcr420", "ycbcr422"])
def test_subsampled_jpeg_is_ycbcr_whatever_the_tag_says(tmp_path, color, marker, tag, vendor, tile):
    end = b"\1" if marker == "adobe" else b""
    stream = marked(encode_jpeg(tile, color), MARKERS[marker] + end)
    found, other = decoded(one_tile(tmp_path / "a.tif", stream, 7, tag, vendor), 1, 2, 4, 8)
    for n, pixels in zip((1, 2, 4, 8), found, strict=True):
        assert difference(pixels, shrunk(tile, n)).mean() < 4
    if marker == "jfif" or tag == YCBCR:  # tifffile believes the tag before all but JFIF
        assert difference(found[0], other).mean() < 2


@pytest.mark.parametrize("tag", [RGB, YCBCR])
@pytest.mark.parametrize("marker", ["jfif", "adobe"])
def test_a_jpeg_that_calls_itself_ycbcr_by_marker_and_by_names_is(tmp_path, marker, tag, tile):
    end = b"\1" if marker == "adobe" else b""
    stream = marked(encode_jpeg(tile, "ycbcr444"), MARKERS[marker] + end)
    (pixels,), _ = decoded(one_tile(tmp_path / "a.tif", stream, 7, tag, ""), 1)
    assert difference(pixels, tile).mean() < 4


@pytest.mark.parametrize("tag", [RGB, YCBCR])
@pytest.mark.parametrize("marker", ["none", "adobe"])
def test_a_jpeg_whose_components_are_called_r_g_and_b_is_rgb(tmp_path, marker, tag, tile):
    end = b"\0" if marker == "adobe" else b""
    stream = marked(encode_jpeg(tile, "rgb444"), MARKERS[marker] + end)
    (pixels,), other = decoded(one_tile(tmp_path / "a.tif", stream, 7, tag, ""), 1)
    assert difference(pixels, tile).mean() < 4
    assert difference(pixels, other).max() <= 1


@pytest.mark.parametrize("ids", [b"RGB", b"\0\1\2", b"\1\2\3"], ids=["RGB", "012", "123"])
@pytest.mark.parametrize("marker", MARKERS)
def test_the_tag_decides_about_full_chroma_in_aperio(tmp_path, marker, ids, tile):
    end = b"\1" if marker == "adobe" else b""
    rgb = marked(encode_jpeg(tile, "rgb444"), MARKERS[marker] + end, ids)
    ycbcr = marked(encode_jpeg(tile, "ycbcr444"), MARKERS[marker] + end, ids)
    for stream, tag in ((rgb, RGB), (ycbcr, YCBCR)):
        (pixels,), _ = decoded(one_tile(tmp_path / "a.svs", stream, 7, tag, APERIO), 1)
        assert difference(pixels, tile).mean() < 4


@pytest.mark.parametrize("tag", [RGB, YCBCR])
def test_the_tag_decides_where_a_jpeg_says_nothing(tmp_path, tag, tile):
    stream = marked(encode_jpeg(tile, "rgb444" if tag == RGB else "ycbcr444"), b"", b"\0\1\2")
    (pixels,), _ = decoded(one_tile(tmp_path / "a.tif", stream, 7, tag, ""), 1)
    assert difference(pixels, tile).mean() < 4


@pytest.mark.parametrize("tag", [RGB, YCBCR])
@pytest.mark.parametrize("mct", [0, 1])
@pytest.mark.parametrize("compression", [33003, 33004, 33005, 34712])
@pytest.mark.parametrize("vendor", ["", APERIO], ids=["plain", "aperio"])
def test_jpeg_2000_is_ycbcr_in_aperios_33003_without_transform_alone(
    tmp_path, vendor, compression, mct, tag, tile
):
    ycbcr = bool(vendor) and compression == 33003 and not mct
    stored = to_ycbcr(tile) if ycbcr else tile
    stream = encode_jpeg2000(stored, mct=mct, quality_layers=[4])
    path = one_tile(tmp_path / "a.tif", stream, compression, tag, vendor)
    found, other = decoded(path, 1, 2, 4, 8)
    for n, pixels in zip((1, 2, 4, 8), found, strict=True):
        assert difference(pixels, shrunk(tile, n)).mean() < 2
    if not ycbcr:
        assert np.array_equal(found[0], other)


@pytest.mark.parametrize("subsampling", SUBSAMPLED)
@pytest.mark.parametrize("vendor", ["", APERIO], ids=["plain", "aperio"])
def test_jpeg_2000_with_fewer_chroma_samples_is_ycbcr_in_any_file(tmp_path, subsampling, vendor):
    data = base64.b85decode(SUBSAMPLED[subsampling].replace("\n", ""))
    written = page(np.zeros((64, 64, 3), np.uint8), tile=(64, 64), color="raw", description=vendor)
    written.tags[259] = (tiff.SHORT, 34712)
    tiff.write_pages(tmp_path / "a.tif", [tiff.Page(written.tags, [data])])
    (pixels,), _ = decoded(tmp_path / "a.tif", 1)
    assert difference(pixels, subsampled_source()).mean() < 4


@pytest.mark.shared
def test_a_real_converters_rgb_tag_on_ycbcr_tiles(shared):
    path = shared / "cases" / "ome_jpeg_rgb_tag.ome.tif"
    with Slide(path) as slide:
        found = slide.read_region((0, 0), slide.dimensions)
    assert difference(found, tifffile.imread(path)).mean() < 2
