"""Decoding in child processes: the same results, and nothing left behind, whatever happens."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from support.encoders import ColourEncoder
from support.slides import write_svs

from xmag.bag import FeatureBag
from xmag.cohort import extract_cohort
from xmag.errors import OutputError
from xmag.geometry import TileSpec
from xmag.plan import plan_tiles
from xmag.slide import Slide
from xmag.tiles import arena, read_tiles
from xmag.tiles.children import PROCESSES_SUPPORTED, DecodingPool
from xmag.tiles.decoder import Begun, Decoded, DecodeJob, Failed, Finished, Planned

pytestmark = pytest.mark.skipif(
    not (PROCESSES_SUPPORTED and Path("/proc/self/stat").exists()), reason="looks into /proc"
)

SPEC = TileSpec(size_px=56)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("slides")
    for number in range(5):
        write_svs(root / f"{number}.svs", size=(2000 + 448 * number, 1500), mpp=0.25)
    return root


def job(number, path):
    return DecodeJob(
        number=number,
        path=str(path),
        mpp=None,
        spec=SPEC,
        tissue=None,
        overlap=0,
        min_tissue=0.25,
        border="shift",
    )


def children():
    """The process ids of decoding processes that this one has started."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            is_worker = b"xmag.tiles.worker" in (folder / "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if parent == os.getpid() and is_worker:
            found.append(int(folder.name))
    return found


def test_tiles_are_those_that_threads_read_and_no_process_is_left(folder):
    paths = sorted(folder.glob("*.svs"))
    found, plans = {}, {}
    with DecodingPool(2, slot_tiles=3, size_px=56) as pool:
        assert len(children()) == 2
        for event in pool.run(job(i, path) for i, path in enumerate(paths)):
            if isinstance(event, Planned):
                plans[event.number] = event.plan
            elif isinstance(event, Decoded):
                found.setdefault(event.number, []).append(event.tiles.copy())
                event.release()
    assert children() == []
    for number, path in enumerate(paths):
        with Slide(path) as slide:
            plan = plan_tiles(slide, SPEC)
            expected = np.concatenate([tiles for _, tiles in read_tiles(slide, plan)])
        assert plans[number].to_json() == plan.to_json()
        assert np.array_equal(np.concatenate(found[number]), expected)


def test_slots_that_are_never_released_stop_the_children_but_nothing_else(folder):
    """A child waits for its slots; the pool can still be closed."""
    with DecodingPool(1, slot_tiles=1, size_px=56) as pool:
        events = pool.run([job(0, folder / "4.svs")])
        filled = 0
        while filled < 3:
            filled += isinstance(next(events), Decoded)
        assert not any(isinstance(next(events), Decoded) for _ in range(30))
    assert children() == []


def test_a_process_that_dies_costs_its_slide_and_the_others_go_on(folder, tmp_path, monkeypatch):
    paths = [str(Path(__file__).parent / "support/planted"), str(Path(__file__).parents[1])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    shutil.copy(folder / "0.svs", tmp_path / "hang@opening.svs")
    slides = [folder / "0.svs", tmp_path / "hang@opening.svs", folder / "1.svs"]
    outcome = {}
    with DecodingPool(1, slot_tiles=8, size_px=56) as pool:
        for event in pool.run(job(number, path) for number, path in enumerate(slides)):
            if isinstance(event, Begun) and event.number == 1:
                os.kill(children()[0], signal.SIGSEGV)
            elif isinstance(event, Decoded):
                event.release()
            elif isinstance(event, Finished | Failed):
                outcome[event.number] = event
    assert isinstance(outcome[0], Finished)
    assert isinstance(outcome[1], Failed)
    assert "the decoder crashed (signal SIGSEGV)" in outcome[1].reason
    assert isinstance(outcome[2], Finished)
    assert children() == []


def test_children_do_not_import_torch(folder):
    with DecodingPool(1, slot_tiles=8, size_px=56) as pool:
        for event in pool.run([job(0, folder / "0.svs")]):
            if isinstance(event, Decoded):
                maps = Path(f"/proc/{children()[0]}/maps").read_text()
                event.release()
    assert "simplejpeg" in maps
    assert "torch" not in maps


def test_without_shared_memory_a_mapped_file_does(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(arena, "_SHM", tmp_path / "nowhere")
    with DecodingPool(1, slot_tiles=8, size_px=56) as pool:
        tiles = 0
        for event in pool.run([job(0, folder / "0.svs")]):
            if isinstance(event, Decoded):
                tiles += len(event.tiles)
                event.release()
    assert tiles == 20


def test_no_room_for_the_memory_is_an_error_that_says_so():
    with pytest.raises(OutputError, match=r"no room for .* MiB of tiles.*processes=0"):
        DecodingPool(10_000_000, slot_tiles=64, size_px=224)


@pytest.mark.parametrize("transform", [None, np.flip])
def test_a_cohort_gives_the_same_files_either_way(folder, tmp_path, transform):
    runs = {}
    for processes in (0, 2):
        out = tmp_path / str(processes)
        runs[processes] = extract_cohort(
            folder,
            out,
            model=ColourEncoder(),
            tissue=None,
            processes=processes,
            transform=transform,
        )
    for here, there in zip(runs[0], runs[2], strict=True):
        assert (here.slide, here.status, here.tiles) == (there.slide, there.status, there.tiles)
        bag = FeatureBag.load(tmp_path / "0" / here.output)
        other = FeatureBag.load(tmp_path / "2" / there.output)
        assert np.array_equal(bag.coords, other.coords)
        assert np.allclose(bag.features, other.features, atol=1e-4)
        assert bag.provenance.fingerprint == other.provenance.fingerprint
        drop = {"created"}
        record = {k: v for k, v in bag.provenance.record.items() if k not in drop}
        assert record == {k: v for k, v in other.provenance.record.items() if k not in drop}


def test_a_cohort_in_processes_resumes_and_reports_what_failed(folder, tmp_path):
    slides = [*sorted(folder.glob("*.svs")), folder / "nowhere.svs"]
    options = {"model": ColourEncoder(), "tissue": None, "processes": 2, "overlay": True}
    first = extract_cohort(slides, tmp_path / "out", **options)
    assert [row.status for row in first] == ["done"] * 5 + ["failed"]
    assert len(list((tmp_path / "out").glob("*.png"))) == 5
    (tmp_path / "out/2.h5").unlink()
    again = extract_cohort(slides, tmp_path / "out", **options)
    assert [row.status for row in again] == ["skipped"] * 2 + ["done"] + ["skipped"] * 2 + [
        "failed"
    ]


@pytest.mark.parametrize("processes", [0, 2])
def test_a_transform_or_encoder_that_fails_on_one_slide_costs_that_slide(
    folder, tmp_path, processes
):
    write_svs(tmp_path / "odd.svs", pixels=np.full((1200, 1500, 3), 77, np.uint8))
    slides = [folder / "0.svs", tmp_path / "odd.svs", folder / "1.svs", folder / "2.svs"]

    def normalised(tiles):
        if tiles.std() < 3:
            raise ValueError("nothing to normalise")
        return tiles

    class Picky(ColourEncoder):
        def embed(self, tiles):
            normalised(tiles)
            return super().embed(tiles)

    for model, transform in ((ColourEncoder(), normalised), (Picky(), None)):
        report = extract_cohort(
            slides, tmp_path / type(model).__name__, model=model, tissue=None, processes=processes,
            transform=transform,
        )  # fmt: skip
        assert [row.status for row in report] == ["done", "failed", "done", "done"]
        assert report[1].error == "ValueError: nothing to normalise"


def test_the_order_of_a_cohort_changes_no_file(folder, tmp_path):
    slides = sorted(folder.glob("*.svs"))
    for name, order in (("one", slides), ("other", slides[::-1])):
        extract_cohort(order, tmp_path / name, model=ColourEncoder(), tissue=None, processes=2)
    for path in (tmp_path / "one").glob("*.h5"):
        bag, other = (FeatureBag.load(tmp_path / n / path.name) for n in ("one", "other"))
        assert np.array_equal(bag.coords, other.coords)
        assert np.allclose(bag.features, other.features, atol=1e-4)


SCRIPT = """
import os, sys
sys.path.insert(0, {support!r})
from support.encoders import ColourEncoder
import xmag
report = xmag.extract_cohort({folder!r}, {out!r}, model=ColourEncoder(), tissue=None, processes=2)
print(report.counts())
"""


def test_no_main_guard_is_asked_of_the_program(folder, tmp_path):
    script = tmp_path / "program.py"
    support = str(Path(__file__).parent)
    script.write_text(SCRIPT.format(support=support, folder=str(folder), out=str(tmp_path / "out")))
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=True, timeout=800
    )
    assert done.stdout == "{'done': 5}\n"


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_children_end_with_the_program_however_it_ends(folder, tmp_path, how):
    program = tmp_path / "program.py"
    program.write_text(
        "import signal, time\n"
        "from xmag.tiles.children import DecodingPool\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "with DecodingPool(2, slot_tiles=8, size_px=56) as pool:\n"
        "    print(*(child.process.popen.pid for child in pool._children), flush=True)\n"
        "    time.sleep(800)\n"
    )
    process = subprocess.Popen(
        [sys.executable, str(program)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    with process:
        assert process.stdout is not None
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert all(alive(pid) for pid in pids)
        process.send_signal(how)
        process.wait(800)
    deadline = time.monotonic() + 120
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in pids)
