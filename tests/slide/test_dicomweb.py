"""DICOM slides on a server, read as their files are."""

import logging
import pickle
import re
import sys

import numpy as np
import pytest
from support.encoders import ColourEncoder
from support.slides import texture

pytest.importorskip("wsidicom")
pytest.importorskip("dicomweb_client")

from support.dicom_slides import make_sparse, pyramid, volumes, write_dicom
from support.wado_server import serve_series

from xmag.cohort import extract_cohort
from xmag.errors import (
    DamagedSlideError,
    MissingExtraError,
    SlideError,
    UnsupportedSlideError,
)
from xmag.extract import extract_features
from xmag.geometry import TileSpec
from xmag.slide import Slide, dicomweb
from xmag.urls import Url

SIZE = (1200, 900)
PIXELS = texture(*SIZE)


def encoder():
    return ColourEncoder(spec=TileSpec(mpp=1.0, size_px=32))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A slide whose first level is read at 1/8 and whose second is for the tissue."""
    folder = tmp_path_factory.mktemp("dicomweb") / "slide"
    write_dicom(folder, pyramid(PIXELS, (1, 16), tile=(128, 128)), power=40)
    return folder


@pytest.fixture
def server(folder, monkeypatch):
    monkeypatch.setattr(dicomweb, "_FIRST_PAUSE_MS", 1)
    with serve_series(folder) as server:
        yield server


@pytest.mark.parametrize("color", ["ycbcr420", "j2k-rgb", "raw"])
@pytest.mark.parametrize("arranged", ["full", "sparse"])
def test_pixels_and_scale_are_those_of_the_files(tmp_path, color, arranged):
    write_dicom(tmp_path / "s", pyramid(PIXELS[:300, :500], color=color))
    if arranged == "sparse":
        make_sparse(volumes(tmp_path / "s")[0], [3, 0, 1])
    with (
        serve_series(tmp_path / "s") as server,
        Slide(server.url) as slide,
        Slide(tmp_path / "s") as local,
    ):
        assert slide.reader.levels == local.reader.levels
        assert (slide.mpp, slide.mpp_source) == (local.mpp, local.mpp_source)
        whole = ((0, 0), slide.dimensions)
        assert np.array_equal(slide.read_region(*whole), local.read_region(*whole))
        images = slide.associated_images, local.associated_images
        assert sorted(images[0]) == sorted(images[1]) == ["label", "macro"]
        assert images[0]["label"] == images[1]["label"]
        assert slide.properties["dicom.PatientName"] == "planted"


def test_features_are_those_of_the_files_and_few_more_frames_are_fetched_than_they_need(
    server, folder
):
    with Slide(server.url) as slide, Slide(folder) as local:
        read = set()
        read_tile_bytes = local.reader.read_tile_bytes

        def noted(level, indices):
            read.update((level, index) for index in indices)
            return read_tile_bytes(level, indices)

        local.reader.read_tile_bytes = noted
        ours, theirs = (extract_features(s, model=encoder()) for s in (slide, local))
    assert len(ours) > 30
    assert np.array_equal(ours.coords, theirs.coords)
    assert np.array_equal(np.asarray(ours), np.asarray(theirs))
    assert len(server.frames) <= 1.1 * len(read)
    assert set(server.frames) == {
        (uid, index + 1) for level, index in read for uid in [volume_uids(server)[level]]
    }
    assert len(server.requests) < len(server.frames) / 2


def volume_uids(server):
    found = [m for m in server.metadata if "VOLUME" in m["00080008"]["Value"]]
    found.sort(key=lambda m: -m["00480006"]["Value"][0])
    return [m["00080018"]["Value"][0] for m in found]


def test_a_server_that_does_not_name_the_coding_is_asked_for_one_frame_of_each_level(server):
    server.says_syntax = False
    with Slide(server.url) as slide:
        assert sorted(server.frames) == sorted((uid, 1) for uid in volume_uids(server))
        slide.read_region((0, 0), (100, 100))
        assert len(server.frames) == 2


def test_frames_are_asked_for_as_they_are_stored(server):
    with Slide(server.url) as slide:
        slide.read_region((0, 0), (100, 100))
    accepts = [accept for path, accept in server.requests if "/frames/" in path]
    assert accepts
    assert all('type="image/jpeg"; transfer-syntax=1.2.840.10008.1.2.4.50' in a for a in accepts)
    assert all('type="application/octet-stream"; transfer-syntax=*' in a for a in accepts)


def test_labels_are_not_asked_for(server):
    with Slide(server.url) as slide:
        before = slide.bytes_fetched
        slide.thumbnail(max_px=100)
        assert slide.bytes_fetched > before > 0
        assert {uid for uid, _ in server.frames} <= set(volume_uids(server))


def test_a_pickled_slide_and_a_cohort_read_it_too(server, tmp_path):
    with Slide(server.url) as slide, pickle.loads(pickle.dumps(slide)) as other:
        region = (0, 0), (300, 200)
        assert np.array_equal(slide.read_region(*region), other.read_region(*region))
    report = extract_cohort([server.url], tmp_path / "out", model=encoder(), processes=1)
    (row,) = report
    assert row.status == "done", row
    series = server.url.rpartition("/")[2]
    assert (tmp_path / "out" / f"{series}.h5").exists()
    one = extract_cohort(server.url, tmp_path / "out", model=encoder(), processes=0)
    assert [row.status for row in one] == ["skipped"]


SECRET = "sesame-open"


@pytest.mark.parametrize("how", ["token", "userinfo", "netrc"])
def test_credentials_are_sent_and_stand_nowhere(server, tmp_path, monkeypatch, caplog, how):
    caplog.set_level(logging.DEBUG)
    url = server.url
    server.authorization = f"Bearer {SECRET}" if how == "token" else "Basic bWU6c2VzYW1lLW9wZW4="
    monkeypatch.delenv("XMAG_DICOMWEB_TOKEN", raising=False)
    if how == "token":
        monkeypatch.setenv("XMAG_DICOMWEB_TOKEN", SECRET)
    elif how == "userinfo":
        url = url.replace("http://", f"http://me:{SECRET}@")
    else:
        netrc = tmp_path / "netrc"
        netrc.write_text(f"machine 127.0.0.1 login me password {SECRET}\n")
        netrc.chmod(0o600)
        monkeypatch.setenv("NETRC", str(netrc))
    with Slide(url) as slide:
        bag = extract_features(slide, model=encoder(), tissue=None)
        said = [repr(slide), repr(slide.facts), bag.provenance.to_json(), caplog.text]
    bag.save(tmp_path / "bag.h5")
    server.status = 404
    with pytest.raises(SlideError) as caught:
        Slide(url)
    said += [str(caught.value), (tmp_path / "bag.h5").read_bytes().decode("latin-1")]
    for text in said:
        assert SECRET not in text
        assert "bWU6c2VzYW1lLW9wZW4" not in text
        assert "planted" not in text


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (401, r"refuses access \(HTTP 401\); check the credentials"),
        (403, r"refuses access \(HTTP 403\)"),
        (404, "does not exist; check the URL"),
        (500, "answers HTTP 500; try again later"),
    ],
)
def test_an_answer_that_is_none_is_a_clear_error(server, status, said):
    server.status = status
    with pytest.raises(SlideError, match=said) as caught:
        Slide(server.url)
    assert type(caught.value) is SlideError
    assert caught.value.__suppress_context__
    server.status = None
    with Slide(server.url) as slide:
        server.status = status
        with pytest.raises(SlideError, match=said):
            slide.read_region((0, 0), (10, 10))


def test_a_busy_server_is_asked_again(server):
    server.failures = 2
    with Slide(server.url) as slide:
        server.failures = 2
        slide.read_region((0, 0), (10, 10))
        server.failures = 9
        with pytest.raises(SlideError, match="answers HTTP 503; try again later"):
            slide.read_region((0, 0), (10, 10))


def test_a_silent_server_is_a_clear_error(server, monkeypatch):
    monkeypatch.setattr(dicomweb, "_TIMEOUT_S", 0.3)
    with Slide(server.url) as slide:
        server.is_silent = True
        with pytest.raises(SlideError, match="gave no answer in time; check the network"):
            slide.read_region((0, 0), (10, 10))
    with pytest.raises(SlideError, match="gave no answer in time"):
        Slide(server.url)


def test_a_server_that_is_not_there_is_a_clear_error(server):
    gone = re.sub(r":\d+/", ":1/", server.url)
    with pytest.raises(SlideError, match="cannot be reached or used"):
        Slide(gone)


@pytest.mark.parametrize("fault", ["missing_bytes", "lost_bytes"])
@pytest.mark.parametrize("count", [1, 9, 400])
def test_a_truncated_part_is_a_clear_error(server, fault, count):
    with Slide(server.url) as slide:
        setattr(server, fault, count + 2)
        with pytest.raises(SlideError, match="was cut short; its server or the network fails"):
            slide.read_region((0, 0), (10, 10))


def test_frames_that_are_left_out_are_a_clear_error(server):
    server.lost_parts = 1
    with Slide(server.url) as slide, pytest.raises(SlideError, match="gave 2 frames of 3"):
        slide.read_region((0, 0), (300, 100))


def test_a_damaged_frame_is_an_error_of_its_tile(server):
    uid = volume_uids(server)[0]
    server.instances[uid][5] = server.instances[uid][5][:500]
    with Slide(server.url) as slide:
        slide.read_region((0, 0), (300, 100))
        with pytest.raises(DamagedSlideError, match=r"tile 5 .* of level 0 is damaged"):
            slide.read_region((0, 0), (1000, 100))


def test_a_series_without_levels_is_refused_by_its_name(server):
    server.metadata = [m for m in server.metadata if "VOLUME" not in m["00080008"]["Value"]]
    with pytest.raises(UnsupportedSlideError, match=r"^[0-9.]+: it holds no image of a slide"):
        Slide(server.url)


def without(tag):
    return lambda found: [one.pop(tag, None) for one in found]


@pytest.mark.parametrize(
    "spoil",
    [
        without("00480006"), without("00280010"), lambda found: found.clear(),
        lambda found: found[0].update({"00480006": 7}),
        lambda found: [one.update({"00280010": {"vr": "US", "Value": ["x"]}}) for one in found],
        lambda found: [one.update({"00080008": {"vr": "CS", "Value": 3}}) for one in found],
        lambda found: found.__setitem__(0, [1]),
    ],
)  # fmt: skip
def test_attributes_that_make_no_sense_are_a_clear_error(server, spoil):
    spoil(server.metadata)
    with pytest.raises(SlideError) as caught:
        Slide(server.url)
    assert type(caught.value) in (DamagedSlideError, UnsupportedSlideError, SlideError)
    assert "planted" not in str(caught.value)


def test_a_dicomweb_url_is_one_of_https():
    server = dicomweb._Server(Url("dicomweb://pacs.example/rs/studies/1.2/series/3.4"))
    try:
        assert server._client.base_url == "https://pacs.example/rs"
    finally:
        server.close()
    assert not dicomweb.is_series(Url("https://host/studies/1.2/series/x.svs"))
    assert not dicomweb.is_series(Url("https://host/rs/studies/1.2/series/3.4?signature=x"))
    assert not dicomweb.is_series(Url("s3://host/studies/1.2/series/3.4"))


def test_the_extra_is_named_where_it_is_missing(server, monkeypatch):
    monkeypatch.setitem(sys.modules, "dicomweb_client", None)
    with pytest.raises(MissingExtraError, match=r'pip install "xmag\[dicom\]"'):
        Slide(server.url)
