"""What is around a cohort fails: it is interrupted, the disk is full, a share or slide is gone."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from support.encoders import ColourEncoder
from support.killing import Trial, descendants, survivors, write_slides
from support.slides import write_svs

from xmag import files
from xmag.bag import FeatureBag
from xmag.cohort import extract_cohort
from xmag.cohort.resume import SEEN_NAME
from xmag.errors import OutputError
from xmag.extract import extract_features

pytestmark = pytest.mark.skipif(
    os.name == "nt" or not Path("/proc/self/stat").exists(), reason="looks into /proc"
)
either_way = pytest.mark.parametrize("processes", [0, 2])


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults") / "slides"
    write_slides(folder, 8)
    return folder


@pytest.fixture
def disk(tmp_path):
    """A file system of 400 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a tmpfs is not allowed here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def run(slides, out, model=None, **options):
    return extract_cohort(slides, out, model=model or ColourEncoder(), tissue=None, **options)


def rows_in(out):
    with (out / "report.csv").open(newline="", encoding="utf-8") as file:
        return {row["slide"]: row for row in csv.DictReader(file)}


def wait_for_output(out):
    until = time.monotonic() + 6000
    while not list(out.glob("*.h5")):
        assert time.monotonic() < until
        time.sleep(0.01)


class Doing(ColourEncoder):
    """Does something before it embeds the nth batch, and is slow from then on."""

    def __init__(self, action, *, before):
        super().__init__()
        self.action, self.before, self.calls = action, before, 0

    def embed(self, tiles):
        self.calls += 1
        if self.calls == self.before:
            self.action()
        elif self.calls > self.before:
            time.sleep(0.2)
        return super().embed(tiles)


@either_way
def test_ctrl_c_stops_before_the_next_slides_and_leaves_what_is_finished(
    slides, tmp_path, processes
):
    trial = Trial.__new__(Trial)
    trial.slides, trial.out = slides, tmp_path / "out"
    trial.options = {"processes": processes, "pace_s": 2.0}
    with trial.start() as process:
        while len(trial.outputs()) < 2:
            time.sleep(0.01)
        below = descendants(process.pid)
        before = trial.outputs()
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        said, told = process.communicate()
    assert len(below) == processes
    assert "KeyboardInterrupt" in told
    # The call; Python takes longer to end, in which torch is taken down. An idle machine needs 2 s.
    assert json.loads(said)["stopped at"] - start < 120
    assert not survivors(below)
    after = trial.outputs()
    assert before == {name: after[name] for name in before}
    assert len(after) < 8
    for name in after:
        assert len(FeatureBag.load(trial.path(name))) > 0
    assert [p.name for p in trial.out.iterdir() if p.name.startswith(".")] == [SEEN_NAME]
    assert sum(row["status"] == "done" for row in rows_in(trial.out).values()) >= len(before) - 1
    report = run(slides, trial.out)
    assert {row.status for row in report} == {"done", "skipped"}


@either_way
def test_a_full_disk_stops_the_cohort_and_leaves_whole_files(slides, disk, processes):
    out = disk / "out"
    out.mkdir()
    filler = disk / "filler"

    def fill():
        wait_for_output(out)
        with filler.open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(b"x" * 4096)

    model = Doing(fill, before=4)
    with pytest.raises(OutputError, match=r"No space left.*free some space") as caught:
        run(slides, out, model, processes=processes)
    assert "the same call goes on from there" in str(caught.value)
    assert model.calls < 8
    found = list(out.glob("*.h5"))
    assert len(found) >= 1
    for path in found:
        assert len(FeatureBag.load(path)) > 0
    filler.unlink()
    statuses = [row.status for row in run(slides, out, processes=processes)]
    assert sorted(statuses) == ["done"] * (8 - len(found)) + ["skipped"] * len(found)


@either_way
def test_a_share_that_goes_away_stops_the_cohort_and_is_not_written_beside(
    slides, tmp_path, processes
):
    out, away = tmp_path / "out", tmp_path / "away"

    def unmount():
        wait_for_output(out)
        out.rename(away)
        out.mkdir()  # the empty mount point

    model = Doing(unmount, before=3)
    with pytest.raises(OutputError, match="is another one than when the cohort began"):
        run(slides, out, model, processes=processes)
    assert [path.name for path in out.iterdir() if path.suffix == ".h5"] == []
    out.rename(tmp_path / "mount point")
    away.rename(out)
    assert {row.status for row in run(slides, out)} == {"done", "skipped"}


@pytest.fixture
def open_to_all():
    """A folder that other users may look into, as pytest's own are not."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        for above in (
            *folder.parents,
            *Path(__file__).parents,
            *Path(sys.executable).resolve().parents,
        ):
            if above.stat().st_mode & 0o005 != 0o005:
                pytest.skip(f"others may not look into {above}")
        yield folder


@pytest.mark.skipif(shutil.which("setpriv") is None or os.geteuid() != 0, reason="drops root")
@either_way
def test_one_folder_that_may_not_be_written_to_costs_its_slides_alone(open_to_all, processes):
    """Root may write anywhere, so a program without its rights does it."""
    source, out = open_to_all / "slides", open_to_all / "out"
    write_slides(source / "a", 1)
    write_slides(source / "b", 1)
    (out / "a").mkdir(parents=True)
    out.chmod(0o777)
    program = Path(__file__).parent / "support/killing.py"
    call = json.dumps({"slides": str(source), "out": str(out), "processes": processes})
    command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", sys.executable]
    done = subprocess.run(
        [*command, str(program), call], capture_output=True, text=True, check=False,
        env={**os.environ, "HOME": str(open_to_all)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = {row["slide"]: row for row in json.loads(done.stdout)}
    assert rows["b/000.svs"]["status"] == "done"
    assert rows["a/000.svs"]["status"] == "failed"
    assert "Permission denied; write to a folder that you own" in rows["a/000.svs"]["error"]


@either_way
def test_slides_that_vanish_or_shrink_in_the_middle_cost_their_rows(slides, tmp_path, processes):
    copies = tmp_path / "slides"
    shutil.copytree(slides, copies)

    def spoil():
        (copies / "006.svs").unlink()
        with (copies / "007.svs").open("r+b") as file:
            file.truncate(20_000)

    report = run(copies, tmp_path / "out", Doing(spoil, before=1), processes=processes)
    assert [row.status for row in report][:6] == ["done"] * 6
    assert [row.status for row in report][6:] == ["failed"] * 2
    assert "there is no file" in report[6].error
    assert "truncated" in report[7].error or "damaged" in report[7].error


@either_way
def test_nan_from_the_model_is_a_failed_row_and_no_file(slides, tmp_path, processes):
    class Nan(ColourEncoder):
        calls = 0

        def embed(self, tiles):
            self.calls += 1
            vectors = super().embed(tiles)
            if self.calls == 2:
                vectors[-1, -1] = np.nan
            return vectors

    report = run(slides, tmp_path, Nan(), processes=processes, batch_size=4)
    failed = [row for row in report if row.status == "failed"]
    assert len(failed) == 1
    assert "values that are not finite" in failed[0].error
    assert not (tmp_path / failed[0].slide).with_suffix(".h5").exists()
    assert sum(row.status == "done" for row in report) == 7


def test_temporary_files_of_killed_runs_are_removed_after_a_day(slides, tmp_path):
    old, recent, foreign = (tmp_path / n for n in (".1-a.xmag-tmp", ".1-b.xmag-tmp", ".1-c.tmp"))
    for path in (old, recent, foreign):
        path.write_bytes(b"half")
    yesterday = time.time() - 25 * 3600
    for path in (old, foreign):
        os.utime(path, (yesterday, yesterday))
    run(slides / "000.svs", tmp_path, processes=0)
    assert not old.exists()
    assert recent.exists()
    assert foreign.exists()


def test_children_end_when_the_program_is_killed_even_where_a_decoder_hangs(tmp_path):
    tests = Path(__file__).parent
    (tmp_path / "slides").mkdir()
    write_svs(tmp_path / "slides/hang-with-gil@opening.svs", size=(600, 600))
    trial = Trial.__new__(Trial)
    trial.slides, trial.out = tmp_path / "slides", tmp_path / "out"
    trial.options = {"processes": 1}
    paths = os.pathsep.join([str(tests / "support/planted"), str(tests.parent)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", paths)
        process = trial.start()
    with process:
        try:
            until = time.monotonic() + 600
            while time.monotonic() < until and not descendants(process.pid):
                time.sleep(0.05)
            time.sleep(3)
            below = descendants(process.pid)  # not those that came and went at the start
            assert below
            time.sleep(1)
            assert survivors(below, 0) == below
        finally:
            process.kill()
        process.communicate()
    assert not survivors(below)


def test_no_number_of_slides_makes_a_process_grow(tmp_path):
    """Descriptors and threads; memory needs more slides: benchmarks/soak.py."""
    write_slides(tmp_path / "slides", 1)
    slide = tmp_path / "slides/000.svs"
    table = tmp_path / "cohort.csv"
    table.write_text("slide,id\n" + "".join(f"{slide},{i}\n" for i in range(60)))
    held = []

    class Counting(ColourEncoder):
        def embed(self, tiles):
            held.append((open_files(), threading.active_count()))
            return super().embed(tiles)

    run(table, tmp_path / "out", Counting(), processes=1)
    assert len(held) == 60
    growth = np.max(held, axis=0) - np.min(held[:10], axis=0)
    assert (growth < 30).all(), "what is under way, but nothing a slide"


def open_files():
    return len(list(Path("/proc/self/fd").iterdir()))


STATES = """
import gc, os, sys, threading
from pathlib import Path
sys.path[:0] = sys.argv[4:]
from support.encoders import ColourEncoder
from support.killing import descendants
from xmag.cohort import extract_cohort
def run(slides, out):
    extract_cohort(slides, out, model=ColourEncoder(), tissue=None, processes=int(sys.argv[3]))
def state():
    gc.collect()
    open_files = len(list(Path("/proc/self/fd").iterdir()))
    return open_files, threading.active_count(), descendants(os.getpid())
run(Path(sys.argv[1], "000.svs"), Path(sys.argv[2], "warm up"))
print(state())
run(sys.argv[1], Path(sys.argv[2], "out"))
print(state())
"""


@either_way
def test_after_a_cohort_nothing_is_left_open(slides, tmp_path, processes):
    """In a program of its own: what earlier tests left here may end at any time."""
    root = Path(__file__).parents[1]
    arguments = [str(slides), str(tmp_path), str(processes), str(root), str(root / "tests")]
    done = subprocess.run(
        [sys.executable, "-c", STATES, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    before, after = done.stdout.splitlines()
    assert after == before


def test_which_errors_are_of_the_place_and_not_of_one_file(tmp_path):
    for number, expected in ((28, True), (5, True), (30, True), (13, False), (2, False)):
        error = files.cannot_write(tmp_path / "a", OSError(number, "no"))
        assert files.is_of_the_place(error) is expected
    assert not files.is_of_the_place(OSError(28, "no"))


def test_one_slide_alone_stays_in_this_process(slides):
    seen, before = [], set(descendants(os.getpid()))  # what earlier tests left

    class Watching(ColourEncoder):
        def embed(self, tiles):
            seen.extend(descendants(os.getpid()))
            return super().embed(tiles)

    assert len(extract_features(slides / "000.svs", model=Watching(), tissue=None)) > 0
    assert set(seen) <= before
