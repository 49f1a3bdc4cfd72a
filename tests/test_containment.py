"""A slide that crashes, hangs or eats memory costs one row; the decoding process is replaced."""

import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from support.encoders import ColourEncoder
from support.slides import write_svs

from xmag.bag import FeatureBag
from xmag.cohort import extract_cohort
from xmag.errors import InputError, XmagError, XmagWarning
from xmag.geometry import TileSpec
from xmag.tiles.children import PROCESSES_SUPPORTED, DecodingPool, Limits
from xmag.tiles.decoder import Decoded, DecodeJob, Failed, Finished

pytestmark = pytest.mark.skipif(
    not (PROCESSES_SUPPORTED and Path("/proc/self/stat").exists()), reason="looks into /proc"
)

TESTS = Path(__file__).parent
MEMORY = 400 * 2**20


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    path = tmp_path_factory.mktemp("slides") / "slide.svs"
    write_svs(path, size=(1500, 1200), mpp=0.25)
    return path


@pytest.fixture
def planted(monkeypatch):
    """Decoding processes in which slides do what their names say."""
    path = os.pathsep.join([str(TESTS / "support/planted"), str(TESTS.parent)])
    monkeypatch.setenv("PYTHONPATH", path)


def slides_named(folder, slide, *names):
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.svs" for name in names]
    for path in paths:
        shutil.copy(slide, path)
    return paths


def run(slides, out, **options):
    options = {"model": ColourEncoder(), "tissue": None, "processes": 1, **options}
    return extract_cohort(slides, out, **options)


EXPECTED = {
    "segfault": "the decoder crashed (signal SIGSEGV)",
    "segfault@opening": "the decoder crashed (signal SIGSEGV)",
    "abort": "the decoder crashed (signal SIGABRT)",
    "exit": "the decoder ended by itself (status 3)",
    "hang": "the decoder took longer than slide_timeout=20 s and was stopped",
    "hang-with-gil@opening": "the decoder took longer than slide_timeout=20 s and was stopped",
    "eat": "more memory than memory_limit=419,430,400 bytes",
    "eat-natively": "the decoder crashed (signal SIGSEGV)",
    "vanish": "was killed (signal SIGKILL), most likely because memory ran out",
}


def test_each_fault_costs_one_row_with_its_reason_and_all_others_are_right(
    slide, tmp_path, planted
):
    names = [name for i, fault in enumerate(EXPECTED) for name in (fault, f"good {i}")]
    slides = slides_named(tmp_path / "in", slide, *names)
    report = run(slides, tmp_path / "out", processes=2, slide_timeout=20, memory_limit=MEMORY)
    expected = FeatureBag.load(tmp_path / "out/good 0.h5")
    for row in report:
        name = Path(row.slide).stem
        if name in EXPECTED:
            assert row.status == "failed"
            assert EXPECTED[name] in row.error
            assert not (tmp_path / f"out/{name}.h5").exists()
        else:
            assert row.status == "done", row
            bag = FeatureBag.load(tmp_path / "out" / row.output)
            assert np.array_equal(bag.features, expected.features)
    assert len(expected) == 12
    hung = next(row for row in report if row.slide == "hang.svs")
    assert hung.seconds > 19


def test_a_dicom_slide_that_crashes_or_hangs_costs_its_row_too(tmp_path, planted):
    pytest.importorskip("wsidicom")
    from support.dicom_slides import pyramid, write_dicom
    from support.slides import texture

    names = ("segfault", "good", "hang@opening", "vanish")
    for name in names:
        write_dicom(tmp_path / "in" / name, pyramid(texture(900, 700), (1,)))
    report = run(tmp_path / "in", tmp_path / "out", slide_timeout=20)
    assert {row.slide: row.status for row in report} == {
        name: "done" if name == "good" else "failed" for name in names
    }
    errors = {row.slide: row.error for row in report}
    assert EXPECTED["segfault"] in errors["segfault"]
    assert EXPECTED["hang"] in errors["hang@opening"]
    assert EXPECTED["vanish"] in errors["vanish"]


def test_overlays_and_slides_that_were_done_before_cannot_crash_the_caller_either(
    slide, tmp_path, planted
):
    slides = slides_named(tmp_path / "in", slide, "a", "b")
    run(slides, tmp_path / "out")
    for path, name in zip(slides, ("segfault@opening", "segfault"), strict=True):
        path.rename(path.with_stem(name))
        (tmp_path / f"out/{path.stem}.h5").rename(tmp_path / f"out/{name}.h5")
    report = run(tmp_path / "in", tmp_path / "out", overlay=True, on_mismatch="redo")
    assert [row.status for row in report] == ["failed", "failed"]
    assert all("SIGSEGV" in row.error for row in report)


def test_in_one_process_the_same_slide_ends_the_program(slide, tmp_path, planted):
    """Otherwise the tests here would show nothing."""
    slides = slides_named(tmp_path, slide, "segfault")
    program = (
        "from sitecustomize import plant; from support.encoders import ColourEncoder; plant();"
        "from xmag.cohort import extract_cohort;"
        f"extract_cohort({str(slides[0])!r}, 'out', model=ColourEncoder(), processes=0)"
    )
    paths = os.pathsep.join([os.environ["PYTHONPATH"], str(TESTS)])
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, check=False,
        env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip
    assert ended.returncode == -signal.SIGSEGV


def test_the_time_limit_does_not_count_what_the_model_takes(slide, tmp_path):
    class Slow(ColourEncoder):
        def embed(self, tiles):
            time.sleep(2)
            return super().embed(tiles)

    report = run([slide], tmp_path, model=Slow(), batch_size=1, slide_timeout=10)
    assert report[0].status == "done"
    assert report[0].seconds > 12


def test_the_time_limit_does_not_count_what_the_caller_takes_to_look(slide):
    """A child that waits for its slots, and one whose messages wait to be read, are in no fault."""
    job = DecodeJob(
        number=1, path=str(slide), mpp=None, spec=TileSpec(size_px=56), tissue=None, overlap=0,
        min_tissue=0.25, border="shift",
    )  # fmt: skip
    limits, held, outcome = Limits(slide_timeout=5.0), [], None
    with DecodingPool(1, slot_tiles=1, size_px=56, limits=limits) as pool:
        for event in pool.run([job]):
            if isinstance(event, Decoded):
                held.append(event.release)
            if len(held) == 3:
                deadline = time.monotonic() + 6
                while time.monotonic() < deadline:
                    time.sleep(0.1)
                for release in held:
                    release()
                held = []
            if isinstance(event, Finished | Failed):
                outcome = event
    assert isinstance(outcome, Finished)


def test_a_pool_whose_children_do_not_start_says_so(slide, tmp_path, monkeypatch, capfd):
    (tmp_path / "sitecustomize.py").write_text("import os; os._exit(5)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(XmagError, match=r"do not start.*status 5.*processes=0"):
        run([slide], tmp_path / "out")


def test_a_child_that_dies_while_it_is_idle_costs_nothing(slide, tmp_path):
    """As when the system runs out of memory: the slide it gets next is not the reason."""
    job = DecodeJob(
        number=1, path=str(slide), mpp=None, spec=TileSpec(size_px=56), tissue=None, overlap=0,
        min_tissue=0.25, border="shift",
    )  # fmt: skip
    with DecodingPool(1, slot_tiles=64, size_px=56) as pool:
        for _ in range(2):
            outcome = []
            for event in pool.run([job]):
                if isinstance(event, Decoded):
                    event.release()
                outcome.append(type(event))
            assert outcome[-1] is Finished
            process = pool._children[0].process.popen
            process.kill()
            process.wait()


def test_children_leave_no_core_file_and_are_the_first_to_go_when_memory_runs_out(slide):
    job = DecodeJob(
        number=1, path=str(slide), mpp=None, spec=TileSpec(size_px=56), tissue=None, overlap=0,
        min_tissue=0.25, border="shift",
    )  # fmt: skip
    limits = Limits(memory_limit=MEMORY)
    with DecodingPool(1, slot_tiles=64, size_px=56, limits=limits) as pool:
        for event in pool.run([job]):
            if isinstance(event, Decoded):
                event.release()
        of_child = Path(f"/proc/{pool._children[0].process.popen.pid}")
        all_limits = (of_child / "limits").read_text()
        lines = {line[:26].strip(): line[26:].split() for line in all_limits.splitlines()}
        assert lines["Max core file size"][0] == "0"
        assert lines["Max data size"][0] == str(MEMORY)
        assert (of_child / "oom_score_adj").read_text().strip() == "1000"
    assert Path("/proc/self/oom_score_adj").read_text().strip() != "1000"


def test_warnings_about_a_slide_reach_the_caller(tmp_path):
    write_svs(tmp_path / "power.svs", size=(1500, 1200), mpp=None, power=40)
    found = {}
    for processes in (0, 1):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            report = run(tmp_path / "power.svs", tmp_path / str(processes), processes=processes)
        assert report[0].status == "done"
        found[processes] = [(w.category, str(w.message)) for w in caught]
    assert found[0] == found[1]
    assert [category for category, _ in found[0]] == [XmagWarning]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = run(tmp_path / "power.svs", tmp_path / "error")
    assert "power" in report[0].error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slide_timeout": 0}, "above 0"),
        ({"memory_limit": 10_000_000}, "at least 268,435,456 bytes"),
        ({"slide_timeout": 5, "processes": 0}, "processes to be at least 1"),
    ],
)
def test_limits_that_make_no_sense_are_refused(slide, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        run([slide], tmp_path, **options)
