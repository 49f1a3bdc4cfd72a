"""Two runs over one output folder share its slides, and no claim outlives its run."""

import os
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path, PurePosixPath

import pytest
from support.encoders import ColourEncoder
from support.killing import Trial, rows_of, write_slides

from xmag.bag import FeatureBag
from xmag.cohort import claims, extract_cohort
from xmag.cohort.claims import Claims
from xmag.cohort.jobs import Job
from xmag.cohort.resume import SEEN_NAME
from xmag.errors import OutputError
from xmag.tiles import decoder

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs /proc and POSIX signals")


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    work = tmp_path_factory.mktemp("trial")
    write_slides(work / "slides", 12)
    return Trial(work / "slides", work, processes=1, pace_s=0.05)


@pytest.fixture
def fresh(trial):
    yield trial
    shutil.rmtree(trial.out, ignore_errors=True)


def job(name):
    return Job(path=Path(name), name=name, output=PurePosixPath(f"{name}.h5"), mpp=None)


def test_two_runs_do_each_slide_once_and_both_report_all(fresh):
    """benchmarks/two_runs.py does it twenty times."""
    runs = [rows_of(process) for process in [fresh.start(), fresh.start()]]
    done = Counter(row["slide"] for rows in runs for row in rows if row["status"] == "done")
    assert done == {f"{name}.svs": 1 for name in fresh.names}
    assert {row["status"] for rows in runs for row in rows} == {"done", "skipped"}
    assert fresh.lost() == fresh.missing() == []
    report = (fresh.out / "report.csv").read_text(encoding="utf-8").splitlines()
    names = [line.partition(",")[0] for line in report]
    assert names == ["slide", *(f"{name}.svs" for name in fresh.names)]
    assert [path.name for path in fresh.out.glob(".*")] == [SEEN_NAME]


def test_a_run_does_what_a_killed_one_had_claimed(fresh):
    killed, other = fresh.start(pace_s=0.5), fresh.start()
    while not list(fresh.out.glob(".*.xmag-lock")):
        time.sleep(0.01)
    with killed:
        killed.kill()
        killed.communicate()
    rows = rows_of(other)
    assert {row["status"] for row in rows} <= {"done", "skipped"}
    assert fresh.lost() == fresh.missing() == []


@pytest.mark.parametrize("processes", [0, 1])
def test_two_calls_in_threads_of_one_program_share_too(fresh, processes):
    reports = []

    class Slow(ColourEncoder):
        def embed(self, tiles):
            time.sleep(0.05)
            return super().embed(tiles)

    def run():
        reports.append(
            extract_cohort(fresh.slides, fresh.out, model=Slow(), tissue=None, processes=processes)
        )

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    done = Counter(row.slide for report in reports for row in report if row.status == "done")
    assert done == {f"{name}.svs": 1 for name in fresh.names}
    assert all(len(report) == 12 for report in reports)


def test_what_the_other_run_fails_at_is_tried_here(fresh, tmp_path):
    """A claim that is dropped without a file was for nothing."""
    fresh.out.mkdir()
    name = fresh.names[0]
    with Claims(fresh.out) as claims:
        assert claims.take(job(name))
        run = threading.Timer(1.0, claims.release, [job(name)])
        run.start()
        report = extract_cohort(fresh.slides, fresh.out, model=ColourEncoder(), tissue=None)
        run.join()
    assert {row.status for row in report} == {"done"}
    assert len(FeatureBag.load(fresh.path(name))) > 0


def test_a_claim_is_one_runs_and_free_again_once_that_ends(tmp_path):
    with Claims(tmp_path) as one, Claims(tmp_path) as other:
        assert one.take(job("a"))
        assert not other.take(job("a"))
        assert other.take(job("b"))
        one.release(job("a"))
        assert other.take(job("a"))
        assert not one.take(job("a"))
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_a_killed_program_is_free_at_once(tmp_path):
    program = (
        "import sys, time; from pathlib import Path, PurePosixPath\n"
        "from xmag.cohort.claims import Claims; from xmag.cohort.jobs import Job\n"
        "job = Job(path=Path('a'), name='a', output=PurePosixPath('a.h5'), mpp=None)\n"
        "with Claims(Path(sys.argv[1])) as claims:\n"
        "    print(claims.take(job), flush=True); time.sleep(800)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    with process, Claims(tmp_path) as claims:
        assert process.stdout.readline() == "True\n"
        assert not claims.take(job("a"))
        process.kill()
        process.wait()
        assert len(list(tmp_path.glob(".*.xmag-lock"))) == 1
        assert claims.take(job("a"))
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_lost_its_name_while_it_was_waited_for_counts_for_nothing(
    tmp_path, monkeypatch
):
    """Two that hold locks on two files of one name would both think that the output is theirs."""
    with Claims(tmp_path) as first, Claims(tmp_path) as second:
        assert first.take(job("a"))
        try_lock = claims.try_lock

        def release_first(fd):
            monkeypatch.setattr(claims, "try_lock", try_lock)
            first.release(job("a"))
            assert try_lock(fd)
            assert Claims.take(third, job("a"))
            return True

        third = Claims(tmp_path)
        with third:
            monkeypatch.setattr(claims, "try_lock", release_first)
            assert not second.take(job("a"))


def test_without_locks_a_run_works_and_says_so(tmp_path, monkeypatch, caplog):
    def refuse(fd):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(claims, "try_lock", refuse)
    with Claims(tmp_path) as one, Claims(tmp_path) as other:
        assert one.take(job("a"))
        assert other.take(job("a"))
    assert "cannot lock files (No locks available)" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_went_away_is_not_made_anew(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with Claims(out) as claims:
        assert claims.take(job("a"))
        out.rename(tmp_path / "elsewhere")
        with pytest.raises(OutputError, match="not there any more"):
            claims.take(job("b"))
        out.mkdir()
        with pytest.raises(OutputError, match="another one than when the cohort began"):
            claims.take(job("b"))
    assert list(out.iterdir()) == []


def lock_of(folder, name):
    """Where the claim on an output lies."""
    with Claims(folder) as claims:
        assert claims.take(job(name))
        (path,) = folder.glob(".*.xmag-lock")
    return path


@pytest.mark.parametrize("what", ["link", "dangling link", "hard link", "pipe", "folder", "file"])
def test_what_lies_where_a_lock_goes_is_neither_opened_nor_changed(tmp_path, what):
    out, private = tmp_path / "out", tmp_path / "private"
    out.mkdir()
    path = lock_of(out, "a")
    if what != "dangling link":
        private.write_text("" if what == "hard link" else "secret")
        private.chmod(0o600)
    if what.endswith("hard link"):
        path.hardlink_to(private)
    elif what.endswith("link"):
        path.symlink_to(private)
    elif what == "pipe":
        os.mkfifo(path, 0o600)
    elif what == "folder":
        path.mkdir(0o700)
    else:
        path.write_text("something of the user's")
        path.chmod(0o600)
    before = path.lstat()
    with Claims(out) as claims, pytest.raises(OSError, match="is a link or something else"):
        claims.take(job("a"))
    after = path.lstat()
    assert (after.st_ino, after.st_mode, after.st_size) == (
        before.st_ino, before.st_mode, before.st_size
    )  # fmt: skip
    if what == "dangling link":
        assert not private.exists()
    else:
        assert stat.S_IMODE(private.stat().st_mode) == 0o600


def test_something_else_where_a_lock_goes_costs_its_row(fresh):
    fresh.out.mkdir()
    name = fresh.names[0]
    path = lock_of(fresh.out, name)
    path.symlink_to("/etc/passwd")
    options = {"model": ColourEncoder(), "tissue": None, "processes": 0}
    report = extract_cohort(fresh.slides, fresh.out, **options)
    assert Counter(row.status for row in report) == {"done": 11, "failed": 1}
    assert "is a link or something else than the empty file" in report.failed[0].error
    path.unlink()
    assert extract_cohort(fresh.slides, fresh.out, **options).counts() == {"done": 1, "skipped": 11}


@pytest.mark.parametrize(
    ("folder", "lock"), [(0o700, 0o600), (0o755, 0o600), (0o2770, 0o660), (0o777, 0o666)]
)
@pytest.mark.parametrize("umask", [0o077, 0o000])
def test_a_lock_is_open_to_whoever_may_write_to_its_folder(tmp_path, folder, lock, umask):
    tmp_path.chmod(folder)
    before = os.umask(umask)
    try:
        with Claims(tmp_path) as claims:
            assert claims.take(job("a"))
            (path,) = tmp_path.glob(".*.xmag-lock")
            assert stat.S_IMODE(path.stat().st_mode) == lock
    finally:
        os.umask(before)


CLAIM = """
import os, sys
from pathlib import Path, PurePosixPath
from xmag.cohort.jobs import Job
from xmag.cohort.claims import Claims
user, group = map(int, sys.argv[2:])
os.setgroups([group]), os.setgid(user), os.setuid(user), os.umask(0o077)
job = Job(path=Path("a"), name="a", output=PurePosixPath("a.h5"), mpp=None)
with Claims(Path(sys.argv[1])) as claims:
    for line in sys.stdin:
        print(claims.release(job) if line == "release\\n" else claims.take(job), flush=True)
"""


class Member:
    """Another user of a group, who claims outputs by a program of his own."""

    def __init__(self, folder, *, user, group):
        # It becomes that user itself: Python and xmag may lie where only root may read.
        self.process = subprocess.Popen(
            [sys.executable, "-c", CLAIM, str(folder), str(user), str(group)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def say(self, word):
        print(word, file=self.process.stdin, flush=True)
        return self.process.stdout.readline().strip()


@pytest.mark.skipif(os.name == "nt" or os.getuid() != 0, reason="only root can be other users")
@pytest.mark.parametrize(("owner", "mode"), [(0, 0o2770), (0, 0o770), (2001, 0o1770), (0, 0o1777)])
def test_two_users_of_a_group_folder_can_both_claim_and_never_at_once(open_to_all, owner, mode):
    folder = open_to_all / "out"
    folder.mkdir()
    os.chown(folder, owner, 3000)
    folder.chmod(mode)
    one = Member(folder, user=2001, group=3000)
    other = Member(folder, user=2002, group=3000)
    with one.process, other.process:
        for first, second in ((one, other), (other, one)):
            assert first.say("take") == "True"
            assert second.say("take") == "False"
            assert first.say("release") == "None"
            assert second.say("take") == "True"
            assert first.say("take") == "False"
            assert second.say("release") == "None"
        # What a killed one left is the other's to take.
        assert one.say("take") == "True"
        one.process.kill()
        one.process.wait()
        assert other.say("take") == "True"
        other.process.stdin.close()
        one.process.stdin.close()


@pytest.fixture
def open_to_all():
    """A folder that other users can reach; pytest's own are closed to them."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def test_of_several_models_the_run_that_has_the_first_is_left_the_others(fresh, monkeypatch):
    """So that its slide is decoded once, by one of two runs."""
    decoded, read = Counter(), decoder.read_rows

    def counting(slide, *args, **options):
        decoded[slide.name] += 1
        return read(slide, *args, **options)

    monkeypatch.setattr(decoder, "read_rows", counting)
    first = replace(job(fresh.names[0]), output=PurePosixPath(f"one/{fresh.names[0]}.h5"))
    models = [ColourEncoder(name="one"), ColourEncoder(name="two")]
    fresh.out.mkdir()
    with Claims(fresh.out) as other:
        assert other.take(first)
        release = threading.Timer(1.0, other.release, [first])
        release.start()
        report = extract_cohort(fresh.slides, fresh.out, model=models, tissue=None, processes=0)
        release.join()
    assert [row.status for row in report] == ["done"] * 24
    assert decoded == {f"{name}.svs": 1 for name in fresh.names}
