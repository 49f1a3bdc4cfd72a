"""What lies in an output folder or beside the slides: neither lost nor run, and nothing beside."""

import errno
import fcntl
import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image
from support.encoders import ColourEncoder
from support.slides import write_svs

from xmag import files
from xmag.bag import FeatureBag
from xmag.cohort import extract_cohort, loop, workers
from xmag.encoder import load_model
from xmag.errors import (
    BagError,
    MismatchError,
    ModelError,
    OutputError,
    WeightsError,
    XmagError,
)
from xmag.extract import extract_features
from xmag.geometry import TileSpec
from xmag.plan import plan_tiles
from xmag.slide import Slide
from xmag.tiles import arena
from xmag.tiles.children import DecodingPool
from xmag.tiles.decoder import DecodeJob


class Spec(TileSpec):
    """One that decoding processes cannot import."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("slides")
    for name in ("a", "b"):
        write_svs(root / f"{name}.svs", size=(2000, 1500), mpp=0.25)
    return root


def run(slides, out, **options):
    options = {"model": ColourEncoder(), "tissue": None, "processes": 0, **options}
    return extract_cohort(slides, out, **options)


@pytest.mark.parametrize("datasets", [{"coords": 1}, {"feats": 1}, {"features": 3, "coords": 1}])
def test_a_file_of_another_program_is_not_replaced_unasked(folder, tmp_path, datasets):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        for name, dims in datasets.items():
            file[name] = np.full((2,) * dims, np.nan)
    before = path.read_bytes()
    with pytest.raises(MismatchError, match=r"a\.h5 is there already"):
        run(folder, tmp_path)
    assert path.read_bytes() == before
    assert [row.status for row in run(folder, tmp_path, on_mismatch="redo")] == ["done"] * 2


@pytest.mark.parametrize("text", ["patient,age\n1,44\n", "slide,status\na.svs,mine\n", "\0"])
def test_a_report_of_the_users_own_is_refused_before_any_work(folder, tmp_path, text):
    path = tmp_path / "report.csv"
    path.write_text(text)
    with pytest.raises(OutputError, match=r"report\.csv is there already, and it is not .*move it"):
        run(folder, tmp_path)
    assert path.read_text() == text
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.csv"]
    path.rename(tmp_path / "mine.csv")
    assert [row.status for row in run(folder, tmp_path)] == ["done"] * 2


@pytest.mark.parametrize(
    "columns", ["slide,status,tiles,seconds,error,output", "slide,status,tiles,later,seconds", ""]
)
def test_reports_of_xmag_of_any_version_are_replaced(folder, tmp_path, columns):
    (tmp_path / "report.csv").write_text(columns and f"{columns}\nx.svs,done,1,2,3,4\n")
    run(folder, tmp_path)
    assert "x.svs" not in (tmp_path / "report.csv").read_text()


def test_a_report_of_the_users_own_in_a_store_is_refused(folder, monkeypatch):
    store = pytest.importorskip("fsspec").filesystem("memory")
    store.pipe_file("/mine/report.csv", b"patient,age\n")
    try:
        with pytest.raises(OutputError, match=r"memory://mine/report\.csv is there already"):
            run(folder, "memory://mine")
        assert store.cat_file("/mine/report.csv") == b"patient,age\n"
    finally:
        store.store.clear()


@pytest.mark.parametrize("processes", [0, 1])
def test_a_picture_of_the_users_own_costs_its_row_and_stays(folder, tmp_path, processes):
    own = tmp_path / "a.h5.png"
    Image.new("RGB", (8, 8)).save(own)
    before = own.read_bytes()
    options = {"overlay": True, "processes": processes}
    report = run(folder, tmp_path, **options)
    assert [row.status for row in report] == ["failed", "done"]
    assert "a.h5.png is there already, and it is not one that xmag wrote" in report[0].error
    assert own.read_bytes() == before
    assert not (tmp_path / "a.h5").exists()
    own.unlink()
    assert [row.status for row in run(folder, tmp_path, **options)] == ["done", "skipped"]
    # Its own are made again, and what is not to be written is no matter.
    other = {"model": ColourEncoder(name="other"), "on_mismatch": "redo"}
    assert [row.status for row in run(folder, tmp_path, **options, **other)] == ["done"] * 2
    own.write_bytes(before)
    report = run(folder, tmp_path, processes=processes, on_mismatch="redo")
    assert [row.status for row in report] == ["done"] * 2
    assert own.read_bytes() == before
    with Image.open(tmp_path / "b.h5.png") as picture:
        assert picture.info == {"Software": "xmag"}


@pytest.mark.parametrize("name", ["report.csv", "a.h5.png", "a.h5"])
@pytest.mark.parametrize("is_there", [True, False])
def test_nothing_is_written_through_a_link_out_of_the_folder(folder, tmp_path, name, is_there):
    out, private = tmp_path / "out", tmp_path / "private"
    out.mkdir()
    private.mkdir()
    target = private / "keys"
    if is_there:  # one of xmag's own, even
        run(folder, tmp_path / "earlier", model=ColourEncoder(name="other"), overlay=True)
        target.write_bytes((tmp_path / "earlier" / name).read_bytes())
    before = target.read_bytes() if is_there else None
    (out / name).symlink_to(target)
    options = {"overlay": True, "on_mismatch": "redo"}
    if name == "report.csv":
        with pytest.raises(OutputError, match=r"symbolic link to .*keys.*remove the link"):
            run(folder, out, **options)
    else:
        report = run(folder, out, **options)
        assert [row.status for row in report] == ["failed", "done"]
        assert f"{name} is a symbolic link to" in report[0].error
    assert (target.read_bytes() if target.exists() else None) == before
    assert [path.name for path in private.iterdir()] == ["keys"] * is_there


def test_links_within_the_folder_and_to_a_folder_on_another_disk_are_followed(folder, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "report.csv").symlink_to("today.csv")
    assert [row.status for row in run(folder, tmp_path / "out")] == ["done"] * 2
    assert (tmp_path / "disk" / "today.csv").read_text().count("\n") == 3


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_named_pipes_under_names_of_xmag_are_not_waited_for(folder, tmp_path):
    os.mkfifo(tmp_path / "report.csv")
    with pytest.raises(OutputError, match=r"report\.csv is there already and is no file"):
        run(folder, tmp_path)
    os.mkfifo(tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"w\.pth is a named pipe"):
        load_model(tmp_path / "w.pth")
    os.mkfifo(tmp_path / "bag.h5")
    with pytest.raises(BagError, match="no file"):
        FeatureBag.load(tmp_path / "bag.h5")


@pytest.mark.skipif(sys.platform == "win32", reason="locks by flock")
def test_a_bag_that_is_locked_costs_its_row_and_stays(folder, tmp_path):
    run(folder, tmp_path)
    path = tmp_path / "a.h5"
    before = path.stat().st_ino
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(BagError, match="who has it open"):
            FeatureBag.load(path)
        report = run(folder, tmp_path)
    assert [row.status for row in report] == ["failed", "skipped"]
    assert "is not replaced unread" in report[0].error
    assert path.stat().st_ino == before
    assert [row.status for row in run(folder, tmp_path)] == ["skipped"] * 2


def test_a_bag_of_a_part_of_the_slide_is_not_the_slides(folder, tmp_path):
    encoder = ColourEncoder()
    with Slide(folder / "a.svs") as slide:
        ring = [[0, 0], [1000, 0], [1000, 1500], [0, 1500], [0, 0]]
        roi = {"type": "Polygon", "coordinates": [ring]}
        plan = plan_tiles(slide, encoder.tile_spec, roi=roi)
        extract_features(slide, plan=plan, model=encoder).save(tmp_path / "a.h5")
    with pytest.raises(MismatchError, match="roi: a part of the slide there"):
        run(folder, tmp_path)


def test_paths_with_dots_write_nothing_beside_the_output_folder(folder, tmp_path):
    for name, place in (("a", "lists"), ("b", "site")):
        (tmp_path / place).mkdir()
        (tmp_path / place / f"{name}.svs").write_bytes((folder / f"{name}.svs").read_bytes())
    (tmp_path / "lists" / "c.csv").write_text("slide\na.svs\n../site/b.svs\n")
    report = run(tmp_path / "lists" / "c.csv", tmp_path / "out")
    assert [row.output for row in report] == ["lists/a.h5", "site/b.h5"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lists", "out", "site"]
    assert sorted(path.name for path in (tmp_path / "site").iterdir()) == ["b.svs"]


def test_a_full_disk_in_a_worker_stops_all_of_them(folder, tmp_path, monkeypatch):
    save, saved = loop.save_bag, []

    def full(*arguments, **options):
        if saved:
            raise files.cannot_write(tmp_path, OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)))
        saved.append(save(*arguments, **options))

    monkeypatch.setattr(loop, "save_bag", full)
    with ThreadPoolExecutor(1) as pool, pytest.raises(OutputError, match="quota"):
        run(folder, tmp_path, model="xmag-mini", executor=pool, shards=2)


def test_python_files_beside_the_slides_are_not_run(folder, tmp_path):
    for name in ("numpy.py", "random.py", "xmag.py"):
        (tmp_path / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    program = (
        "import sys; sys.path[:0] = sys.argv[2:]\n"
        "from support.encoders import ColourEncoder\n"
        "from xmag.cohort import extract_cohort\n"
        "report = extract_cohort(sys.argv[1], 'out', model=ColourEncoder(), tissue=None,"
        " processes=1)\n"
        "assert [row.status for row in report] == ['done'] * 2, list(report)\n"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-P", "-c", program, str(folder), str(root), str(root / "tests")],
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=800,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_a_disk_that_fails_in_the_middle_of_a_file_is_told_with_its_name(
    tmp_path, monkeypatch, number
):
    def fail(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(OutputError, match=r"cannot write .*x\.csv") as caught:
        files.write_text(tmp_path / "x.csv", "text")
    assert files.is_of_the_place(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_memory_is_shared_where_the_system_reserves_no_files(monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    memory = arena.Arena(slots=2, slot_tiles=3, size_px=224)
    assert os.fstat(memory.fd).st_size >= memory.whole.nbytes == 2 * 3 * 224 * 224 * 3
    memory.whole[:] = 7
    memory.close()


def test_children_that_die_before_they_begin_are_not_started_for_ever(folder, capfd):
    job = DecodeJob(
        number=1, path=str(folder / "a.svs"), mpp=None, spec=Spec(size_px=56), tissue=None,
        overlap=0, min_tissue=0.25, border="shift",
    )  # fmt: skip
    with (
        DecodingPool(1, slot_tiles=8, size_px=56) as pool,
        pytest.raises(XmagError, match="do not start"),
    ):
        list(pool.run([job]))
    capfd.readouterr()


@pytest.mark.skipif(sys.platform == "win32", reason="locks by flock")
def test_gpus_are_taken_without_locks_where_there_are_none(tmp_path, monkeypatch, caplog):
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    index, file = workers.claim(["gpu-0", "gpu-1"], tmp_path)
    os.close(file)
    assert index == os.getpid() % 2
    assert "no files can be locked" in caplog.text
    with pytest.raises(ModelError, match="set TMPDIR"):
        workers.claim(["gpu-0"], tmp_path / "none")


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX users")
def test_gpu_claims_in_a_folder_of_all_users_touch_nothing_that_lies_there(tmp_path):
    tmp_path.chmod(0o1777)
    path = tmp_path / f"xmag-{os.getuid()}-gpu-0-0.lock"
    target = tmp_path / "private"
    for make in (lambda: path.symlink_to(target), lambda: os.mkfifo(path), path.mkdir,
                 lambda: path.write_text("mine")):  # fmt: skip
        make()
        with pytest.raises(ModelError, match="set TMPDIR to a folder of your own"):
            workers.claim(["gpu-0"], tmp_path)
        assert not target.exists()
        path.rmdir() if path.is_dir() else path.unlink()
    _, file = workers.claim(["gpu-0"], tmp_path)
    os.close(file)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    if os.getuid() == 0:
        os.chown(path, 12345, 12345)
        with pytest.raises(ModelError, match="another user's"):
            workers.claim(["gpu-0"], tmp_path)
