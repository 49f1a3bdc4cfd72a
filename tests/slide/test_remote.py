"""Slides at URLs: the same pixels, few bytes more than needed, and servers that misbehave."""

import logging
import pickle
import sys
import traceback
from pathlib import Path

import fsspec
import numpy as np
import pytest
from support.encoders import ColourEncoder
from support.range_server import serve_folder
from support.slides import write_svs
from support.tiff import Page, write_pages
from support.vendor_slides import write_ndpi, write_ome, write_philips, write_scn, write_ventana

import xmag
from xmag.errors import (
    ClosedSlideError,
    DamagedSlideError,
    InputError,
    MissingExtraError,
    SlideError,
    UnsupportedSlideError,
)
from xmag.extract import extract_features
from xmag.geometry import TileSpec
from xmag.slide import remote
from xmag.slide.remote import RemoteSource
from xmag.slide.tiff import TiffReader
from xmag.tiles.decoding import Decoding, windows_of
from xmag.urls import Url

SECRET = "planted-secret"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    write_svs(folder / "slide.svs", size=(2100, 1900), mpp=0.5, power=20)
    (folder / "bytes").write_bytes(np.random.default_rng(0).bytes(200_000))
    return folder


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch):
    monkeypatch.setattr(remote, "_FIRST_PAUSE_S", 0.001)


@pytest.fixture
def server(folder):
    with serve_folder(folder) as server:
        yield server


def test_features_are_those_of_the_local_file(folder, server):
    model = ColourEncoder()
    there = extract_features(f"{server.url}/slide.svs", model=model, tissue=None)
    here = extract_features(folder / "slide.svs", model=model, tissue=None)
    assert len(here) > 1
    assert np.array_equal(there.features, here.features)
    assert np.array_equal(there.coords, here.coords)
    assert there.provenance.fingerprint == here.provenance.fingerprint
    assert there.provenance.record["slide"] == here.provenance.record["slide"]


def test_bytes_fetched_are_those_that_the_plan_needs_and_few_more(tmp_path):
    pixels = np.full((3360, 3840, 3), 244, np.uint8)
    noise = np.random.default_rng(0).integers(0, 120, (2400, 1440, 3), np.uint8)
    pixels[480:2880, 480:1920] = noise + np.array([120, 40, 80], np.uint8)
    path = tmp_path / "slide.svs"
    write_svs(path, pixels=pixels, mpp=0.5, power=20, levels=(1, 16), color="raw")
    model = ColourEncoder(spec=TileSpec(size_px=112, mpp=1.0))
    with serve_folder(tmp_path) as server, xmag.Slide(f"{server.url}/slide.svs") as slide:
        opened = slide.bytes_fetched
        plan = xmag.plan_tiles(slide, model.tile_spec, tissue=xmag.find_tissue(slide))
        extract_features(slide, model=model, plan=plan)
        fetched = slide.bytes_fetched
        assert server.has_sent(fetched)
        level = slide.reader.levels[plan.scale.level]
        windows = windows_of(plan.coords, plan.scale, plan.spec.size_px, level)
        runs = Decoding(slide.reader, plan.scale, windows, 32).runs
        sources = {source for run in runs for source in run.sources}
    needed = len(sources) * 240 * 240 * 3
    assert needed < path.stat().st_size / 2
    assert needed + opened < fetched < 1.1 * (needed + opened)


def test_a_local_slide_fetches_nothing(folder):
    with xmag.Slide(folder / "slide.svs") as slide:
        assert slide.bytes_fetched is None
    with xmag.Slide((folder / "slide.svs").as_uri()) as slide:
        assert slide.bytes_fetched is None


def test_a_slide_in_another_store_is_read_the_same_way(folder):
    store = fsspec.filesystem("memory")
    store.pipe_file("/cohort/slide.svs", (folder / "slide.svs").read_bytes())
    with (
        xmag.Slide("memory://cohort/slide.svs") as there,
        xmag.Slide(folder / "slide.svs") as here,
    ):
        assert there.name == "slide.svs"
        assert there.fingerprint == here.fingerprint
        assert np.array_equal(there.thumbnail(), here.thumbnail())
    store.rm("/cohort", recursive=True)


def test_a_remote_slide_pickles_by_opening_it_again(server):
    with xmag.Slide(f"{server.url}/slide.svs") as slide:
        copy = pickle.loads(pickle.dumps(slide))
        with copy:
            size = (50, 40)
            assert np.array_equal(copy.read_region((9, 9), size), slide.read_region((9, 9), size))


@pytest.mark.parametrize("seed", range(4))
def test_ranges_are_those_of_the_file_however_they_lie(folder, server, seed):
    data = (folder / "bytes").read_bytes()
    rng = np.random.default_rng(seed)
    starts = rng.integers(0, len(data), 60)
    ranges = [(int(s), int(rng.integers(0, min(30_000, len(data) - s) + 1))) for s in starts]
    source = RemoteSource(Url(f"{server.url}/bytes"))
    before = len(server.requests)
    chunks = source.read_many([*ranges, ranges[0]])
    assert chunks == [data[s : s + n] for s, n in [*ranges, ranges[0]]]
    assert len(server.requests) - before < 20
    assert server.has_sent(source.bytes_fetched)
    source.close()


def test_neighbours_share_a_request_and_strangers_do_not(server):
    source = RemoteSource(Url(f"{server.url}/bytes"))
    del server.requests[:]
    source.read_many([(0, 100), (100, 100), (150_000, 10), (5_000, 10)])
    assert sorted(server.requests) == ["bytes=0-5009", "bytes=150000-150009"]


def test_the_file_object_reads_as_the_file_does(folder, server):
    source = RemoteSource(Url(f"{server.url}/bytes"))
    rng = np.random.default_rng(1)
    with (folder / "bytes").open("rb") as here, source.file() as there:
        for _ in range(50):
            whence = int(rng.integers(0, 3))
            base = (0, here.tell(), 200_000)[whence]
            offset = int(rng.integers(-min(base, 999), 70_000))
            assert there.seek(offset, whence) == here.seek(offset, whence)
            assert there.read(5000) == here.read(5000)
            assert there.tell() == here.tell()
        assert there.seek(100) == here.seek(100)
        assert there.read() == here.read()
        buffer = np.zeros(5, np.uint16)  # tifffile reads into arrays of any type
        there.seek(199_995)
        assert there.readinto(buffer) == 5
        here.seek(199_995)
        assert bytes(buffer)[:5] == here.read()
        with pytest.raises(ValueError, match="no offset -1"):
            there.seek(-1)
    assert server.has_sent(200_000)


def test_a_parser_that_asks_for_far_too_much_is_stopped(server, monkeypatch):
    monkeypatch.setattr(remote, "_MOST_PARSED_BYTES", 100_000)
    file = RemoteSource(Url(f"{server.url}/bytes")).file()
    with pytest.raises(DamagedSlideError, match="more than 100000 bytes"):
        file.read(150_000)
    assert isinstance(file.failure, DamagedSlideError)


def test_a_server_without_ranges_is_refused_and_the_file_not_downloaded(tmp_path):
    (tmp_path / "large.svs").write_bytes(b"II*\0")
    with (tmp_path / "large.svs").open("r+b") as file:
        file.truncate(64_000_000)
    with serve_folder(tmp_path) as server:
        server.ranges = False
        with pytest.raises(UnsupportedSlideError, match=r"does not give parts.*download it"):
            xmag.Slide(f"{server.url}/large.svs")
        assert server.bytes_sent < 64_000_000


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (404, "does not exist; check the URL"),
        (403, r"refuses access \(HTTP 403\); check the credentials"),
        (401, r"refuses access \(HTTP 401\)"),
        (500, "answers HTTP 500; try again later"),
    ],
)
def test_what_a_server_answers_is_told(server, status, message):
    server.status = status
    with pytest.raises(SlideError, match=message):
        xmag.Slide(f"{server.url}/slide.svs")


def test_a_missing_file_and_a_missing_server_are_told(server):
    with pytest.raises(SlideError, match=r"nowhere\.svs does not exist"):
        xmag.Slide(f"{server.url}/nowhere.svs")
    with pytest.raises(SlideError, match="cannot be reached"):
        xmag.Slide("http://127.0.0.1:9/slide.svs")
    with pytest.raises(SlideError, match="does not exist"):
        xmag.Slide("memory://nowhere/slide.svs")


def test_what_passes_is_tried_again_and_what_does_not_is_not(folder, server):
    server.failures = 2
    with xmag.Slide(f"{server.url}/slide.svs") as slide:
        assert slide.fingerprint["size_bytes"] == (folder / "slide.svs").stat().st_size
    server.failures = 3
    with pytest.raises(SlideError, match="HTTP 503"):
        xmag.Slide(f"{server.url}/slide.svs")
    del server.requests[:]
    server.status = 404
    with pytest.raises(SlideError):
        xmag.Slide(f"{server.url}/slide.svs")
    assert len(server.requests) == 1


def test_answers_that_are_cut_short_are_an_error(server):
    server.missing_bytes = 10
    with pytest.raises(SlideError, match="cannot be reached or used"):
        xmag.Slide(f"{server.url}/slide.svs")
    server.missing_bytes = 0
    server.short_ranges = True
    with pytest.raises(SlideError, match=r"bytes 0-\d+ of \d+ for 0-32767"):
        xmag.Slide(f"{server.url}/slide.svs")


def test_a_failure_while_tiles_are_read_is_an_error_and_no_pixel_is_made_up(server):
    with xmag.Slide(f"{server.url}/slide.svs") as slide:
        server.status = 503
        with pytest.raises(SlideError, match="HTTP 503"):
            extract_features(slide, model=ColourEncoder(), tissue=None)


@pytest.mark.parametrize("write", [write_ndpi, write_ome, write_philips, write_scn, write_ventana])
def test_slides_of_all_makes_are_read_the_same_way(tmp_path, write):
    write(tmp_path / "slide.tif")
    with serve_folder(tmp_path) as server:
        there = xmag.Slide(f"{server.url}/slide.tif", mpp=0.5, region=0)
        here = xmag.Slide(tmp_path / "slide.tif", mpp=0.5, region=0)
        with there, here:
            assert there.reader.levels == here.reader.levels
            assert there.format == here.format
            assert np.array_equal(there.thumbnail(max_px=200), here.thumbnail(max_px=200))


def test_no_failure_while_directories_are_read_is_taken_for_damage(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "_BLOCK_BYTES", 512)
    monkeypatch.setattr(remote, "_HEAD_BYTES", 512)
    write_ndpi(tmp_path / "slide.tif")
    with serve_folder(tmp_path) as server:
        xmag.Slide(f"{server.url}/slide.tif").close()
        opening = len(server.requests)
        for number in range(1, opening + 1):
            server.requests, server.failing_request = [], number
            with pytest.raises(SlideError, match="answers HTTP 400"):
                xmag.Slide(f"{server.url}/slide.tif")
        assert opening > 5


def test_a_failure_while_directories_are_read_is_not_taken_for_a_damaged_file(
    folder, server, monkeypatch
):
    monkeypatch.setattr(remote, "_TIMEOUT_S", 3)
    size = (folder / "slide.svs").stat().st_size
    assert size > 500_000  # so that later directories are not in the first block
    server.silent_after = 1
    source = RemoteSource(Url(f"{server.url}/slide.svs"))
    with pytest.raises(SlideError, match="no answer in time"):
        TiffReader(source)


def test_a_file_that_is_replaced_while_it_is_read_is_an_error(folder, tmp_path):
    (tmp_path / "a").write_bytes(bytes(100_000))
    with serve_folder(tmp_path) as server:
        source = RemoteSource(Url(f"{server.url}/a"))
        (tmp_path / "a").write_bytes(bytes(100_001))
        with pytest.raises(SlideError, match="replaced while it was read"):
            source.read_many([(50_000, 10)])


def test_a_truncated_and_an_empty_file_are_damaged(folder, tmp_path):
    data = (folder / "slide.svs").read_bytes()
    (tmp_path / "short.svs").write_bytes(data[: len(data) // 2])
    (tmp_path / "empty.svs").write_bytes(b"")
    with serve_folder(tmp_path) as server:
        with pytest.raises(DamagedSlideError, match=r"short\.svs: .*truncated"):
            xmag.Slide(f"{server.url}/short.svs")
        with pytest.raises(DamagedSlideError, match="is empty"):
            xmag.Slide(f"{server.url}/empty.svs")


def test_tiles_beyond_the_end_are_damage(server):
    source = RemoteSource(Url(f"{server.url}/bytes"))
    with pytest.raises(DamagedSlideError, match="should hold 10 bytes at offset 199995"):
        source.read_many([(199_995, 10)])
    source.close()
    with pytest.raises(ClosedSlideError):
        source.read_many([(0, 10)])


def test_what_cannot_be_read_by_ranges_is_refused(tmp_path):
    (tmp_path / "image.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    scattered = Page({256: (4, 64), 257: (4, 64), 258: (3, [8, 8, 8]), 259: (3, 1)}, [bytes(12288)])
    write_pages(tmp_path / "odd.tif", [scattered])
    with serve_folder(tmp_path) as server:
        with pytest.raises(UnsupportedSlideError, match=r"it is no TIFF\. Download it"):
            xmag.Slide(f"{server.url}/image.png")
        with pytest.raises(SlideError, match=r"odd\.tif"):
            xmag.Slide(f"{server.url}/odd.tif")


def test_secrets_in_urls_appear_nowhere(server, caplog):
    caplog.set_level(logging.DEBUG)
    server.token = SECRET
    host = server.url.removeprefix("http://")
    url = f"http://user:{SECRET}@{host}/slide.svs?signature={SECRET}"
    with xmag.Slide(url) as slide:
        bag = extract_features(slide, model=ColourEncoder(), tissue=None)
        assert SECRET not in repr(slide)
    assert bag.provenance.record["slide"]["name"] == "slide.svs"
    assert SECRET not in bag.provenance.to_json()
    for status in (403, 404, 500):
        server.status = status
        with pytest.raises(SlideError) as caught:
            xmag.Slide(url)
        logging.getLogger("xmag").warning("failed", exc_info=caught.value)
        assert SECRET not in "".join(traceback.format_exception(caught.value))
    assert SECRET not in "".join(r.getMessage() + (r.exc_text or "") for r in caplog.records)


def test_urls_that_make_no_sense_are_told():
    with pytest.raises(InputError, match="protocol 'nonsense', which fsspec does not know"):
        xmag.Slide("nonsense://bucket/slide.svs")
    with pytest.raises(InputError, match="lost a slash"):
        xmag.Slide(Path("https://host/slide.svs"))


def test_a_missing_package_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(MissingExtraError, match=r'pip install "xmag\[gs\]"'):
        xmag.Slide("gs://bucket/slide.svs")
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(MissingExtraError, match=r'pip install "xmag\[remote\]"'):
        xmag.Slide("https://host/slide.svs")
