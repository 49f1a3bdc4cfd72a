"""URLs: what is shown of them, what is written to them, and cohorts that lie there."""

import subprocess
import sys
import traceback
import urllib.parse
import urllib.request
import zipfile
from pathlib import Path

import fsspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.encoders import ColourEncoder
from support.range_server import serve_folder
from support.slides import texture, write_svs
from support.zarr_slides import write_zarr

import xmag
from xmag import files
from xmag.bag import FeatureBag
from xmag.cohort import extract_cohort
from xmag.cohort.jobs import jobs_of
from xmag.errors import (
    BagError,
    DamagedSlideError,
    InputError,
    MismatchError,
    OutputError,
    SlideError,
)
from xmag.urls import Url, place_of, without_folder

SECRET = "planted-secret"


@pytest.fixture(scope="module")
def slide_bytes(tmp_path_factory):
    path = tmp_path_factory.mktemp("slides") / "slide.svs"
    write_svs(path, size=(2000, 1900), mpp=0.5, power=20)
    return path.read_bytes()


@pytest.fixture
def memory():
    """fsspec's store in memory, empty."""
    store = fsspec.filesystem("memory")
    store.store.clear()
    yield store
    store.store.clear()


@pytest.fixture(scope="module")
def s3():
    """A local server that speaks S3, with an empty bucket called "bucket"."""
    pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    code = (
        "import sys, time; from moto.server import ThreadedMotoServer;"
        " s = ThreadedMotoServer(ip_address='127.0.0.1', port=0, verbose=False); s.start();"
        " print(s.get_host_and_port()[1], flush=True); sys.stdin.read()"
    )
    with pytest.MonkeyPatch.context() as patch:
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        try:
            url = f"http://127.0.0.1:{int(process.stdout.readline())}"
            patch.setenv("AWS_ENDPOINT_URL", url)
            patch.setenv("AWS_ACCESS_KEY_ID", "someone")
            patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
            patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
            request = urllib.request.Request(f"{url}/bucket", method="PUT")
            urllib.request.urlopen(request, timeout=800).close()
            yield url
        finally:
            process.kill()
            process.communicate()


def test_credentials_and_signatures_are_not_shown():
    url = place_of(
        f"https://me:{SECRET}@host:8443/a%20b/slide%C3%A9.svs?X-Signature={SECRET}#{SECRET}"
    )
    assert str(url) == "https://host:8443/a b/slideé.svs"
    assert (url.name, url.suffix) == ("slideé.svs", ".svs")
    assert SECRET not in repr(url)
    assert SECRET in url.text


@pytest.mark.parametrize(
    ("text", "shown", "name"),
    [
        (
            f"zip://in/a.svs::http://me:{SECRET}@host/x.zip?s={SECRET}",
            "zip://in/a.svs::http://host/x.zip",
            "a.svs",
        ),
        (f"simplecache::s3://{SECRET}@b/a.svs", "simplecache::s3://b/a.svs", "a.svs"),
        (f"filecache::https://host/a.svs?s={SECRET}", "filecache::https://host/a.svs", "a.svs"),
        (
            f"tar://a.svs::simplecache::https://me:{SECRET}@h:1/x.tar",
            "tar://a.svs::simplecache::https://h:1/x.tar",
            "a.svs",
        ),
        (f"http://me:{SECRET}@[::1]:80/a.svs?s={SECRET}::x", "http://[::1]:80/a.svs", "a.svs"),
        ("zip://in/a.svs::/data/x.zip", "zip://in/a.svs::/data/x.zip", "a.svs"),
    ],
)
def test_no_url_of_a_chain_shows_its_credentials(text, shown, name):
    url = place_of(text)
    assert (str(url), url.name) == (shown, name)
    assert SECRET not in repr(url)
    assert url.text == text
    assert (url.parent / "b.svs").text == text.replace("a.svs", "b.svs")


def test_slides_in_a_chain_are_read_and_its_errors_keep_the_password(slide_bytes, tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("in/a.svs", slide_bytes)
    with serve_folder(tmp_path) as server:
        address = f"http://me:{SECRET}@{server.url.removeprefix('http://')}/x.zip"
        slides = [f"zip://in/{name}.svs::{address}" for name in "ab"]
        report = extract_cohort(
            slides, tmp_path / "out", model=ColourEncoder(), tissue=None, processes=0
        )
    assert [(row.slide, row.status) for row in report] == [("a.svs", "done"), ("b.svs", "failed")]
    assert "zip://in/b.svs::http://127.0.0.1" in report[1].error
    for path in (tmp_path / "out").rglob("*"):
        assert SECRET.encode() not in path.read_bytes()


@pytest.mark.parametrize(
    "name",
    [f"https://me:{SECRET}@host/w.pth?s={SECRET}", f"zip://w.pth::http://me:{SECRET}@host/x"],
)
def test_a_model_at_a_url_is_refused_without_the_password(name):
    with pytest.raises(InputError, match="no existing path and no Hub name") as caught:
        xmag.load_model(name)
    assert SECRET not in "".join(traceback.format_exception(caught.value))


def test_paths_below_a_url_are_put_together_as_those_of_pathlib():
    out = Url("s3://bucket/out/")
    assert str(out / "site/a.h5") == "s3://bucket/out/site/a.h5"
    assert str((out / "a.h5").parent) == "s3://bucket/out"
    assert str((out / "a.h5").with_name("a.h5.png")) == "s3://bucket/out/a.h5.png"


@given(st.text(min_size=1))
def test_a_decoded_segment_never_leaves_its_folder(text):
    quoted = urllib.parse.quote(text, safe="").replace(".", "%2E")  # which quote leaves as it is
    name = Url(f"https://host/folder/{quoted}").parts[-1]
    assert "/" not in name
    assert name not in (".", "..")
    assert name == text or {"/", "\\", "\0"} & set(text) or text in (".", "..")


def test_what_is_no_url_is_a_path_and_file_urls_are_paths_too(tmp_path):
    assert place_of("a/b.svs") == Path("a/b.svs")
    assert place_of("C:\\slides\\a.svs") == Path("C:\\slides\\a.svs")
    for name in ("ä b.svs", "100%25 b.svs"):
        assert place_of((tmp_path / name).as_uri()) == tmp_path / name
    assert place_of(place_of("s3://bucket/a")) == Url("s3://bucket/a")


@pytest.mark.parametrize("scheme", ["memory", "local", "s3"])
def test_files_are_written_whole_and_read_back(scheme, memory, tmp_path, request):
    folder = {"memory": "memory://x", "local": f"local://{tmp_path}/new", "s3": "s3://bucket/x"}
    if scheme == "s3":
        request.getfixturevalue("s3")
    url = Url(folder[scheme]) / "a.bin"
    assert not url.exists()
    files.write_bytes(url, b"first")
    files.write_bytes(url.text, b"second")
    assert url.read() == b"second"
    assert url.info()["size"] == 6
    assert [found.name for found in url.parent.files_below()] == ["a.bin"]
    with pytest.raises(ZeroDivisionError):
        give_up_half_way(url)
    with pytest.raises(ValueError, match="not this"):
        files.write_bytes(url, b"third", validate=reject)
    assert url.read() == b"second"
    url.remove()
    url.remove()
    assert not url.exists()


def give_up_half_way(url):
    with files.atomic_path(url) as temp:
        temp.write_bytes(b"a half")
        raise ZeroDivisionError


def reject(path):
    assert path.read_bytes() == b"third"
    raise ValueError("not this")


def test_what_reads_back_differently_does_not_stay(memory, monkeypatch):
    url = Url("memory://x/a.bin")
    monkeypatch.setattr(type(memory), "cat_file", lambda *_, **__: b"other")
    with pytest.raises(OutputError, match=r"memory://x/a\.bin cannot be reached or used"):
        files.write_bytes(url, b"data")
    assert not url.exists()


def test_what_cannot_be_written_is_told(memory, s3):
    with pytest.raises(InputError, match="HTTP servers only give files"):
        files.write_bytes("https://host/a.h5", b"")
    with pytest.raises(OutputError, match=r"s3://nobucket/a\.h5 does not exist"):
        files.write_bytes("s3://nobucket/a.h5", b"data")


@pytest.mark.parametrize("name", ["a.h5", "a.safetensors"])
def test_bags_are_saved_to_urls_and_loaded_from_them(memory, name):
    bag = FeatureBag(np.eye(3, 5, dtype=np.float32), np.arange(6).reshape(3, 2))
    bag.save(f"memory://bags/{name}")
    loaded = FeatureBag.load(f"memory://bags/{name}")
    assert np.array_equal(loaded.features, bag.features)
    assert np.array_equal(loaded.coords, bag.coords)
    bag.export("memory://bags/a.pt", layout="clam")
    assert memory.exists("/bags/a.pt")
    with pytest.raises(BagError, match="does not exist"):
        FeatureBag.load(f"memory://bags/other-{name}")
    whole = memory.cat_file(f"/bags/{name}")
    memory.pipe_file(f"/bags/{name}", whole[: len(whole) // 2])
    with pytest.raises(BagError, match=f"memory://bags/{name}: "):
        FeatureBag.load(f"memory://bags/{name}")


def test_bags_are_loaded_from_a_server_without_leaving_a_copy(tmp_path, monkeypatch):
    bag = FeatureBag(np.eye(3, 5, dtype=np.float32), np.arange(6).reshape(3, 2))
    bag.save(tmp_path / "a.h5")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    with serve_folder(tmp_path) as server:
        assert np.array_equal(FeatureBag.load(f"{server.url}/a.h5").features, bag.features)
    assert not list(temporary.iterdir())


def test_secrets_do_not_come_with_an_error(tmp_path):
    with serve_folder(tmp_path) as server:
        host = server.url.removeprefix("http://")
        for status in (403, 404, 500):
            server.status = status
            with pytest.raises(BagError) as caught:
                FeatureBag.load(f"http://me:{SECRET}@{host}/a.h5?signature={SECRET}")
            assert SECRET not in "".join(traceback.format_exception(caught.value))


def test_outputs_mirror_the_common_folder_of_urls_and_of_paths(tmp_path):
    slides = [
        "https://host/cohort/site%201/a.svs?signature=1",
        "https://host/cohort/b.svs?signature=2",
        tmp_path / "x" / "c.svs",
        tmp_path / "d.svs",
    ]
    jobs = jobs_of(slides, format="h5", mpp=None)
    assert [str(job.output) for job in jobs] == ["site 1/a.h5", "b.h5", "x/c.h5", "d.h5"]
    assert [job.name for job in jobs] == ["site 1/a.svs", "b.svs", "x/c.svs", "d.svs"]
    (job,) = jobs_of("s3://bucket/cohort/a.svs", format="h5", mpp=None)
    assert str(job.output) == "a.h5"


@pytest.mark.parametrize(
    "url", ["s3://b/x/../../a.svs", "s3://b/a\\..\\..\\b.svs", "s3://b/x/./a.svs"]
)
def test_a_url_cannot_name_an_output_elsewhere(url):
    with pytest.raises(InputError, match=r"\.\."):
        jobs_of([url, "s3://c/b.svs"], format="h5", mpp=None)


def test_a_csv_lists_urls_and_paths(tmp_path):
    text = "slide,mpp\ns3://bucket/a.svs,0.25\nb.svs,\n"
    (tmp_path / "slides.csv").write_text(text)
    jobs = jobs_of(tmp_path / "slides.csv", format="h5", mpp=None)
    assert [job.path for job in jobs] == [Url("s3://bucket/a.svs"), tmp_path / "b.svs"]
    with pytest.raises(InputError, match="lies at a URL; download it"):
        jobs_of("s3://bucket/slides.csv", format="h5", mpp=None)


def test_a_cohort_from_a_server_to_a_store_equals_the_local_one(slide_bytes, tmp_path, s3):
    for name in ("a.svs", "site/b.svs"):
        (tmp_path / "slides" / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / "slides" / name).write_bytes(slide_bytes)
    local = extract_cohort(
        tmp_path / "slides", tmp_path / "out", model=ColourEncoder(), tissue=None
    )
    with serve_folder(tmp_path / "slides") as server:
        server.token = SECRET
        names = ("a.svs", "site/b.svs", "site/c.svs")
        urls = [f"{server.url}/{name}?signature={SECRET}" for name in names]
        options = {"model": ColourEncoder(), "tissue": None, "overlay": True}
        report = extract_cohort(urls, "s3://bucket/out", **options)
        again = extract_cohort(urls, "s3://bucket/out", **options)
    assert [row.status for row in report] == ["done", "done", "failed"]
    assert [row.status for row in again] == ["skipped", "skipped", "failed"]
    assert "does not exist" in report[2].error
    for row, here in zip(report, local, strict=False):
        assert row.output == here.output
        there = FeatureBag.load(f"s3://bucket/out/{row.output}")
        bag = FeatureBag.load(tmp_path / "out" / row.output)
        assert np.array_equal(there.features, bag.features)
        assert there.provenance.record["slide"] == bag.provenance.record["slide"]
        assert SECRET not in there.provenance.to_json()
        assert Url(f"s3://bucket/out/{row.output}.png").read().startswith(b"\x89PNG")
    table = Url("s3://bucket/out/report.csv").read().decode()
    assert table.count("\n") == 4
    assert SECRET not in table


def test_a_folder_in_a_store_is_searched_for_slides(slide_bytes, memory, tmp_path):
    for name in ("a.svs", "site/b.svs", "notes.txt", ".hidden.svs"):
        memory.pipe_file(f"/cohort/{name}", slide_bytes)
    # No other process sees this store.
    options = {"model": ColourEncoder(), "tissue": None, "processes": 0}
    report = extract_cohort("memory://cohort", "memory://out", **options)
    assert [(row.slide, row.status) for row in report] == [
        ("a.svs", "done"),
        ("site/b.svs", "done"),
    ]
    other = {**options, "model": ColourEncoder(name="other")}
    with pytest.raises(MismatchError, match="weights_sha256"):
        extract_cohort("memory://cohort", "memory://out", **other)
    with pytest.raises(InputError, match="no slides in 'memory://nothing'"):
        extract_cohort("memory://nothing", tmp_path, **options)


def test_an_ome_zarr_in_a_bucket_is_one_slide_of_a_cohort(tmp_path, s3):
    local = write_zarr(tmp_path / "slides" / "a.zarr", texture(300, 260), levels=1, mpp=2.0)
    write_zarr(
        tmp_path / "slides" / "b.zarr", texture(300, 260), levels=1, mpp=2.0, zarr_format=3,
        axes="cyx", chunk=64, shard=128,
    )  # fmt: skip
    store = fsspec.filesystem("s3")
    store.put(str(tmp_path / "slides"), "bucket/zarrs", recursive=True)
    options = {"model": ColourEncoder(), "tissue": None, "processes": 1}
    report = extract_cohort("s3://bucket/zarrs", tmp_path / "out", **options)
    assert [(row.slide, row.status) for row in report] == [("a.zarr", "done"), ("b.zarr", "done")]
    bag = xmag.extract_features(local, model=ColourEncoder(), tissue=None)
    for name in ("a.h5", "b.h5"):
        assert np.array_equal(FeatureBag.load(tmp_path / "out" / name).features, bag.features)
    store.rm("bucket/zarrs/a.zarr/0/0/1/0/1/1")
    with pytest.raises(DamagedSlideError, match="is not there"):
        xmag.extract_features("s3://bucket/zarrs/a.zarr", model=ColourEncoder(), tissue=None)
    with pytest.raises(SlideError, match=r"a\.zarr: there is no zarr\.json.* check the path"):
        xmag.Slide("s3://nobucket/a.zarr")


def test_decoding_processes_read_urls_with_their_signatures(slide_bytes, tmp_path):
    (tmp_path / "a.svs").write_bytes(slide_bytes)
    with serve_folder(tmp_path) as server:
        server.token = SECRET
        url = f"{server.url}/a.svs?signature={SECRET}"
        options = {"model": ColourEncoder(), "tissue": None}
        report = extract_cohort([url], tmp_path / "out", processes=1, **options)
    assert [row.status for row in report] == ["done"]
    assert len(xmag.FeatureBag.load(tmp_path / "out" / "a.h5")) == report[0].tiles > 1


@pytest.mark.parametrize(
    ("text", "path", "expected"),
    [
        ("no /d/b.dat; /d is full, not /data", "/d/a.svs", "no b.dat; d is full, not /data"),
        ("file:///home/u/b.dat", "/home/u/a.svs", "file://b.dat"),
        ("m/b.dat has no µm/px; see ../m/c", "m/a.svs", "b.dat has no µm/px; see ../c"),
        ("rows/b.dat and s/b.dat", "s/a.svs", "rows/b.dat and b.dat"),
    ],
)
@pytest.mark.skipif(sys.platform == "win32", reason="folders of POSIX")
def test_a_folder_is_taken_out_of_a_message_as_a_whole(text, path, expected):
    assert without_folder(text, Path(path)) == expected
