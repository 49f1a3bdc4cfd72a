"""Cohorts on executors: the same files, one report, and what a lost worker costs: nothing."""

import json
import logging
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
import zlib
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
from support import transforms
from support.encoders import ColourEncoder
from support.killing import descendants, survivors
from support.models import TINY, random_encoder
from support.slides import texture, write_svs

import xmag
from xmag.bag import FeatureBag
from xmag.cohort import executors, extract_cohort, workers
from xmag.cohort.executors import Engine
from xmag.cohort.jobs import Settings, jobs_of
from xmag.cohort.resume import SEEN_NAME
from xmag.cohort.workers import PieceStatus, claim, run_piece
from xmag.errors import (
    InputError,
    MismatchError,
    ModelError,
    OutputError,
    WeightsError,
    XmagWarning,
)
from xmag.tiles.children import PROCESSES_SUPPORTED
from xmag.urls import Url

needs_proc = pytest.mark.skipif(
    not (PROCESSES_SUPPORTED and Path("/proc/self/stat").exists()), reason="looks into /proc"
)
SLIDES = ("a.svs", "b.svs", "broken.svs", "site/c.svs", "site/d.svs", "site/e.svs")
STATUSES = ["done", "done", "failed", "done", "done", "done"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("slides")
    (root / "site").mkdir()
    base = texture(2900, 950)
    for number, name in enumerate(SLIDES):
        pixels = base[:, : 950 + 380 * number]
        write_svs(root / name, pixels=pixels, mpp=0.5, power=20, levels=(1, 4))
    (root / "broken.svs").write_bytes(b"II*\0 is no slide")
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a model, which any worker can load."""
    saved = tmp_path_factory.mktemp("model")
    random_encoder(TINY).save(saved)
    return str(saved)


@pytest.fixture(scope="module")
def local(folder, model, tmp_path_factory):
    """The outputs of the same cohort without an executor."""
    out = tmp_path_factory.mktemp("local")
    extract_cohort(folder, out, model=model, tissue=None)
    return out


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(executors, "_STATUS_EVERY_S", 0.05)
    monkeypatch.setattr(executors, "_POLL_S", 0.02)
    monkeypatch.setattr(workers, "_IDLE_S", 0.1)  # of threads here; processes have their own


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def save(encoder, folder):
    folder.mkdir(exist_ok=True)
    encoder.save(folder)


def run(slides, out, executor, **options):
    # Without decoding processes, which start in their time; Dask's test has one.
    options = {"tissue": None, "processes": 0, **options}
    return extract_cohort(slides, out, executor=executor, **options)


def assert_equal(out, local):
    """The same files with the same content, but for when and through what they were made."""
    found = {path.relative_to(out) for path in out.rglob("*") if path.is_file()}
    assert found == {path.relative_to(local) for path in local.rglob("*") if path.is_file()}
    for name in found:
        if name.suffix != ".h5":
            continue
        ours, theirs = FeatureBag.load(out / name), FeatureBag.load(local / name)
        assert len(ours) > 0
        assert np.array_equal(ours.features, theirs.features)
        assert np.array_equal(ours.coords, theirs.coords)
        fingerprints = [dict(bag.provenance.fingerprint) for bag in (ours, theirs)]
        for fingerprint in fingerprints:
            fingerprint.pop("transform")
        assert fingerprints[0] == fingerprints[1]
        assert ours.provenance.record["model"] == theirs.provenance.record["model"]


class Changing(ThreadPoolExecutor):
    """Threads whose pieces of work arrive changed, as they would on machines that differ."""

    def __init__(self, change, threads=1):
        super().__init__(threads)
        self._change, self._count = change, 0

    def submit(self, function, piece):
        self._count += 1
        return super().submit(function, self._change(piece, self._count))


def test_threads_write_the_same_files_and_one_report(folder, model, local, out):
    before = (dict(os.environ), multiprocessing.get_start_method(allow_none=True))
    with ThreadPoolExecutor(2) as pool:
        report = run(folder, out, pool, model=model)
    assert [row.slide for row in report] == list(SLIDES)
    assert [row.status for row in report] == STATUSES
    assert "broken.svs" in report[2].error
    assert_equal(out, local)
    assert (dict(os.environ), multiprocessing.get_start_method(allow_none=True)) == before
    lines = (out / "report.csv").read_text().splitlines()
    assert [line.split(",")[1] for line in lines[1:]] == STATUSES


def test_running_again_does_only_what_is_missing(folder, model, local, out):
    with ThreadPoolExecutor(2) as pool:
        run(folder, out, pool, model=model)
        (out / "site/d.h5").unlink()
        stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*.h5")}
        report = run(folder, out, pool, model=model)
    assert [row.status for row in report] == [
        "skipped", "skipped", "failed", "skipped", "done", "skipped",
    ]  # fmt: skip
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


def test_limits_and_what_becomes_of_damage_travel_to_workers(folder, model, out):
    path = folder.parent / "damaged" / "a.svs"
    path.parent.mkdir(exist_ok=True)
    write_svs(path, size=(1900, 950), mpp=0.5, power=20, levels=(1,))
    with xmag.Slide(path) as slide:
        tile = slide.reader.read_tile_bytes(0, [0])[0]
    path.write_bytes(
        path.read_bytes().replace(tile, tile[: len(tile) // 2].ljust(len(tile), b"\0"))
    )
    options = {"damaged": "drop", "slide_timeout": 60.0, "memory_limit": 1 << 30, "processes": 1}
    seen = []
    with Changing(lambda piece, _: seen.append(piece.options) or piece) as pool:
        assert [row.status for row in run(path, out, pool, model=model)] == ["failed"]
        with pytest.warns(XmagWarning, match="damaged and left out"):
            (row,) = run(path, out, pool, model=model, **options)
    assert row.status == "done"
    assert FeatureBag.load(out / "a.h5").provenance.record["tiles"]["damaged"] > 0
    assert {name: seen[-1][name] for name in options} == options


def test_relative_paths_mean_the_same_in_workers(folder, model, local, out, monkeypatch):
    monkeypatch.chdir(out.parent)

    def elsewhere(piece, count):
        assert all(job.path.is_absolute() for job in piece.unpacked().values())
        assert piece.options["out"].is_absolute()
        assert Path(piece.models[""].path_or_name).is_absolute()
        return piece

    slides = os.path.relpath(folder)
    with Changing(elsewhere) as pool:
        run(slides, "out", pool, model=os.path.relpath(model))
    record = FeatureBag.load(out / "a.h5").provenance.record
    assert record["model"]["name"] == os.path.relpath(model)


def test_each_slide_is_reported_while_its_worker_goes_on(folder, model, out):
    with ThreadPoolExecutor(1) as pool:
        rows = rows_of(folder, out, pool, model, transform=transforms.slowly, shards=1)
        next(rows)
        assert len(list(out.rglob("*.h5"))) < 4
        assert len(list(rows)) == len(SLIDES) - 1


def test_workers_of_a_store_stop_when_nobody_waits(folder, model, monkeypatch):
    monkeypatch.setattr(workers, "_LOOK_EVERY_S", 0)
    monkeypatch.setattr(executors, "_REMOTE_STATUS_EVERY_S", 0.05)
    store = fsspec.filesystem("memory")
    with ThreadPoolExecutor(1) as pool:
        out = Url("memory://stopped")
        rows = rows_of(folder, out, pool, model, transform=transforms.slowly, shards=2)
        next(rows)
        rows.close()
    assert 1 <= len(store.glob("/stopped/**/*.h5")) <= 3
    store.rm("/stopped", recursive=True)


def test_who_stops_waiting_stops_the_workers_after_a_slide(folder, model, out, monkeypatch):
    monkeypatch.setattr(workers, "_LOOK_EVERY_S", 0)
    with ThreadPoolExecutor(1) as pool:
        rows = rows_of(folder, out, pool, model, transform=transforms.slowly, shards=2)
        next(rows)
        rows.close()
    assert 1 <= len(list(out.rglob("*.h5"))) <= 3
    assert [path.name for path in out.glob(".*")] == [SEEN_NAME]


def rows_of(folder, out, pool, model, *, shards, transform, processes=0):
    """The rows of an engine, one by one, as extract_cohort takes them."""
    engine = Engine(pool, shards=shards, model=model)
    jobs = jobs_of(folder, format="h5", mpp=None)
    options = {
        "encoders": engine.encoders,
        "out": out,
        "transform": transform,
        "processes": processes,
    }
    options |= {"overlap": 0, "min_tissue": 0.25, "overlay": False, "on_mismatch": "error"}
    options |= {"border": "shift", "damaged": "error"}
    settings = Settings(**{field.name: options.get(field.name) for field in fields(Settings)})
    return engine.rows(jobs, settings)


def test_without_a_factory_what_a_broken_engine_had_not_done_is_lost(folder, model, out, local):
    pool = ThreadPoolExecutor(1)
    pool.shutdown()
    report = run(folder, out, pool, model=model)
    assert {row.status for row in report} == {"lost"}
    assert report.lost == tuple(report)
    assert "run the same again" in report[0].error
    assert [row.status for row in extract_cohort(folder, out, model=model, tissue=None)] == STATUSES
    assert_equal(out, local)


def test_a_broken_engine_is_made_again_but_not_for_ever(folder, model, out, local, caplog):
    caplog.set_level(logging.WARNING, "xmag")
    made = []

    def make(*, broken):
        made.append(ThreadPoolExecutor(1))
        if broken(len(made)):
            made[-1].shutdown()
        return made[-1]

    report = run(folder, out, lambda: make(broken=lambda count: count < 3), model=model)
    assert [row.status for row in report] == STATUSES
    assert len(made) == 3
    assert all(pool._shutdown for pool in made)
    assert_equal(out, local)
    made.clear()
    report = run(folder, out / "2", lambda: make(broken=lambda count: True), model=model)
    assert {row.status for row in report} == {"lost"}
    assert len(made) == 4


def test_what_stops_one_worker_costs_nothing_while_another_works(folder, model, local, out, caplog):
    def change(piece, count):
        return replace(piece, transform="nowhere:transform") if count == 1 else piece

    with Changing(change) as pool:
        report = run(folder, out, pool, model=model, transform=transforms.same, shards=3)
    assert [row.status for row in report] == STATUSES
    assert_equal(out, local)
    assert "cannot import the transform nowhere:transform" in caplog.text


def test_what_stops_all_workers_in_the_middle_fails_the_slides_that_are_left(folder, model, out):
    def one_slide_only(piece, count):
        if count > 1:
            return replace(piece, transform="no:t")
        jobs = dict(list(piece.unpacked().items())[:1])
        return replace(piece, jobs=zlib.compress(pickle.dumps(jobs)))

    with Changing(one_slide_only) as pool:
        report = run(folder, out, pool, model=model, transform=transforms.same, shards=2)
    assert [row.status for row in report] == ["done"] + ["failed"] * 5
    assert "cannot import the transform no:t" in report[1].error


def test_what_stops_every_worker_is_raised(folder, model, out, tmp_path):
    with (
        Changing(lambda piece, count: replace(piece, run=tmp_path / "elsewhere")) as pool,
        pytest.raises(OutputError, match="does not see the output folder"),
    ):
        run(folder, out, pool, model=model)
    assert not list(out.rglob("*.h5"))


def test_an_engine_that_starts_a_piece_again_gets_the_same_rows(folder, model, out):
    def twice(piece, count):
        assert run_piece(piece).error is None
        return piece

    with Changing(twice) as pool:
        report = run(folder, out, pool, model=model, shards=1)
    assert [row.status for row in report] == STATUSES


def test_a_model_travels_by_name_and_never_as_weights(folder, model, out, local):
    seen = []

    def change(piece, count):
        seen.append(len(pickle.dumps(piece)))
        return pickle.loads(pickle.dumps(piece))

    encoder = xmag.load_model(model, device="cpu")
    with Changing(change) as pool:
        run(folder, out, pool, model=encoder)
    weights = (Path(model) / "model.safetensors").stat().st_size
    assert max(seen) < 10_000 < weights
    assert_equal(out, local)


def test_an_unsaved_encoder_is_refused_with_a_remedy_that_works(folder, out, tmp_path):
    encoder = random_encoder(TINY, seed=5)
    with ThreadPoolExecutor(1) as pool:
        with pytest.raises(ModelError, match=r"encoder\.save\(folder\).*model=folder"):
            run(folder, out, pool, model=encoder)
        with pytest.raises(ModelError, match="ColourEncoder, which workers cannot load"):
            run(folder, out, pool, model=ColourEncoder())
        with pytest.raises(InputError, match="model is a int"):
            run(folder, out, pool, model=3)
        assert not out.exists()
        save(encoder, tmp_path / "saved")
        report = run(folder, out, pool, model=str(tmp_path / "saved"))
    assert [row.status for row in report] == STATUSES


def test_an_encoder_whose_file_was_replaced_is_refused(folder, out, tmp_path):
    save(random_encoder(TINY, seed=1), tmp_path / "saved")
    encoder = xmag.load_model(tmp_path / "saved", device="cpu")
    save(random_encoder(TINY, seed=2), tmp_path / "saved")
    with ThreadPoolExecutor(1) as pool, pytest.raises(ModelError, match="with the same weights"):
        run(folder, out, pool, model=encoder)


def test_workers_compare_the_hash_of_what_they_loaded(folder, out, tmp_path):
    save(random_encoder(TINY, seed=1), tmp_path / "saved")

    def make():
        save(random_encoder(TINY, seed=2), tmp_path / "saved")
        return ThreadPoolExecutor(1)

    with pytest.raises(WeightsError, match=r"another weights on this machine.*copy the model here"):
        run(folder, out, make, model=str(tmp_path / "saved"))
    assert not list(out.rglob("*.h5"))


def test_a_given_config_and_dtype_travel_with_the_model(folder, out, tmp_path):
    save(random_encoder(TINY), tmp_path / "saved")
    (tmp_path / "saved" / "config.json").unlink()
    encoder = xmag.load_model(tmp_path / "saved", config=TINY, device="cpu", dtype="bfloat16")
    with ThreadPoolExecutor(1) as pool:
        report = run(folder, out, pool, model=encoder)
    assert [row.status for row in report] == STATUSES
    fingerprint = FeatureBag.load(out / "a.h5").provenance.fingerprint
    assert fingerprint["dtype_class"] == "half"


def test_workers_that_compute_in_different_dtypes_are_told_apart(folder, model, out):
    def change(piece, count):
        dtype = "float32" if count % 2 else "bfloat16"
        return replace(piece, models={"": replace(piece.models[""], dtype=dtype)})

    with (
        Changing(change, threads=2) as pool,
        pytest.raises(MismatchError, match="some workers compute in"),
    ):
        run(folder, out, pool, model=model, transform=transforms.slowly)


def test_outputs_of_another_model_are_refused_or_redone(folder, model, out, tmp_path):
    save(random_encoder(TINY, seed=3), tmp_path / "other")
    with ThreadPoolExecutor(1) as pool:
        run(folder, out, pool, model=str(tmp_path / "other"))
        with pytest.raises(MismatchError, match="weights_sha256"):
            run(folder, out, pool, model=model)
        report = run(folder, out, pool, model=model, on_mismatch="redo")
    assert [row.status for row in report] == STATUSES


def test_a_transform_has_to_be_one_that_workers_can_import(folder, model, out):
    def inner(tiles):
        return tiles

    with ThreadPoolExecutor(1) as pool:
        for transform in (inner, lambda tiles: tiles, Recolour()):
            with pytest.raises(InputError, match="cannot be imported by workers"):
                run(folder, out, pool, model=model, transform=transform)
        run(folder, out, pool, model=model, transform=transforms.same)
    fingerprint = FeatureBag.load(out / "a.h5").provenance.fingerprint
    assert fingerprint["transform"] == "support.transforms.same"


class Recolour:
    def __call__(self, tiles):
        return tiles


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"executor": 3}, "executor is a int"),
        ({"executor": lambda: 3}, "executor made a int"),
        ({"executor": ThreadPoolExecutor, "shards": 0}, "shards is 0"),
        ({"shard": (2, 2)}, r"shard is \(2, 2\); expected \(i, n\)"),
        ({"shard": 3}, "shard is 3"),
    ],
)
def test_impossible_options_are_refused(folder, model, out, options, message):
    with pytest.raises(InputError, match=message):
        extract_cohort(folder, out, model=model, tissue=None, **options)


def test_a_class_of_executors_makes_them(folder, model, out):
    report = run(folder, out, ThreadPoolExecutor, model=model)
    assert [row.status for row in report] == STATUSES


def test_shares_by_index_cover_the_cohort_without_overlap(folder, model, local, out):
    seen = []
    for index in range(3):
        report = extract_cohort(folder, out, model=model, tissue=None, shard=(index, 3))
        seen += [row.slide for row in report]
        assert (out / f"report-{index}-of-3.csv").is_file()
    assert sorted(seen) == list(SLIDES)
    assert not (out / "report.csv").exists()
    assert len(extract_cohort(folder, out, model=model, tissue=None, shard=(7, 9))) == 0
    for path in out.glob("report-*"):
        path.unlink()
    extract_cohort(folder, out, model=model, tissue=None)
    assert_equal(out, local)


def test_devices_are_claimed_evenly_and_let_go_of(tmp_path):
    devices = ["gpu-0", "GPU-1a/b"]
    held = [claim(devices, tmp_path) for _ in range(5)]
    assert [index for index, _ in held] == [0, 1, 0, 1, 0]
    os.close(held[1][1])
    index, file = claim(devices, tmp_path)
    assert index == 1
    for open_file in [file, *(file for n, (_, file) in enumerate(held) if n != 1)]:
        os.close(open_file)


def test_a_killed_process_lets_go_of_its_device(tmp_path):
    code = textwrap.dedent("""
        import sys, time
        from pathlib import Path
        from xmag.cohort.workers import claim
        print(claim(["gpu-0", "gpu-1"], Path(sys.argv[1]))[0], flush=True)
        time.sleep(800)
    """)
    process = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout.readline() == "0\n"
        index, file = claim(["gpu-0", "gpu-1"], tmp_path)
        assert index == 1
        process.kill()
        process.wait()
    again, other = claim(["gpu-0", "gpu-1"], tmp_path)
    assert again == 0
    os.close(file)
    os.close(other)


def spawned(count=1):
    return ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"))


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """Where the calls of `killing_the_third` are counted."""
    folder = tmp_path / "calls"
    folder.mkdir()
    monkeypatch.setenv("XMAG_TEST_CALLS", str(folder))
    return folder


def test_a_killed_pool_process_loses_nothing_that_was_finished(folder, model, local, out, calls):
    options = {"model": model, "transform": transforms.killing_the_third, "processes": 0}
    with spawned() as pool:
        report = run(folder, out, pool, shards=1, **options)
    statuses = [row.status for row in report]
    assert statuses == ["done", "done", "failed", "lost", "lost", "lost"]
    assert "BrokenProcessPool" in report[3].error
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*.h5")}
    assert len(stamps) == 2
    again = extract_cohort(folder, out, tissue=None, **options)
    assert [row.status for row in again] == [
        "skipped", "skipped", "failed", "done", "done", "done",
    ]  # fmt: skip
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert_equal(out, local)


def test_a_killed_pool_is_made_again_and_finishes(folder, model, local, out, calls):
    options = {"transform": transforms.killing_the_third, "processes": 0, "shards": 2}
    report = run(folder, out, spawned, model=model, **options)
    assert [row.status for row in report] == STATUSES
    assert_equal(out, local)


@pytest.mark.parametrize("count", [1, 2])
def test_a_slide_that_kills_its_worker_runs_alone_and_last_and_costs_itself_only(
    folder, model, local, out, tmp_path, calls, count
):
    slides = tmp_path / "slides"
    shutil.copytree(folder, slides)
    write_svs(slides / "aa.svs", pixels=np.full((950, 950, 3), 77, np.uint8), mpp=0.5, power=20)
    made = []

    def make():
        made.append(spawned(count))
        return made[-1]

    report = run(slides, out, make, model=model, transform=transforms.killing_at_grey)
    statuses = {row.slide: row.status for row in report}
    assert statuses.pop("aa.svs") == "lost"
    assert statuses == dict(zip(SLIDES, STATUSES, strict=True))
    (left,) = out.glob(".*.xmag-lock")  # nobody's: the next run removes it
    left.unlink()
    assert_equal(out, local)
    # Tiles that were seen before each death, with the number of those of other slides since.
    deaths = [path.read_text() for path in sorted(calls.glob("death-*"))]
    assert len(deaths) == len(made) == 4
    assert deaths[-1] == deaths[-2]


def test_slides_are_taken_by_whoever_is_free(folder, model, local, out):
    with ThreadPoolExecutor(3) as pool:
        seen = Seen(pool)
        report = run(folder, out, seen, model=model, transform=transforms.slowly, shards=3)
    assert [row.status for row in report] == STATUSES
    assert_equal(out, local)
    shares = [{number for number, _ in future.result().rows} for future in seen.futures]
    assert sorted(number for share in shares for number in share) == list(range(len(SLIDES)))
    assert all(shares)


def test_workers_of_two_runs_over_one_folder_share_the_slides(folder, model, local, out):
    def one(pool):
        return run(folder, out, pool, model=model, transform=transforms.slowly, shards=2)

    with ThreadPoolExecutor(2) as runs, ThreadPoolExecutor(2) as a, ThreadPoolExecutor(2) as b:
        reports = list(runs.map(one, (a, b)))
    for rows in zip(*reports, strict=True):
        assert sorted(row.status for row in rows) in (["done", "skipped"], ["failed", "failed"])
    assert_equal(out, local)


def test_in_a_store_each_worker_has_slides_of_its_own(folder, model):
    store = fsspec.filesystem("memory")
    with ThreadPoolExecutor(2) as pool:
        seen = Seen(pool)
        report = run(folder, "memory://shares", seen, model=model, shards=2)
    assert [row.status for row in report] == STATUSES
    shares = [sorted(number for number, _ in future.result().rows) for future in seen.futures]
    assert shares == [[0, 2, 4], [1, 3, 5]]
    assert not [path for path in store.find("/shares") if ".xmag-run" in path]
    store.rm("/shares", recursive=True)


class Seen:
    """An executor whose futures can be looked at."""

    def __init__(self, pool):
        self._pool, self.futures = pool, []

    def submit(self, function, piece):
        self.futures.append(self._pool.submit(function, piece))
        return self.futures[-1]


def children_of(pid):
    found = []
    for each in descendants(pid):
        with suppress(FileNotFoundError):
            if b"xmag.tiles.worker" in Path(f"/proc/{each}/cmdline").read_bytes():
                found.append(each)
    return found


def hurry():
    workers._IDLE_S = 1.0


@needs_proc
def test_decoding_processes_are_kept_between_pieces_of_work_and_go_with_the_worker(
    folder, model, local, out
):
    with spawned() as pool:
        pid = pool.submit(os.getpid).result()
        run(folder, out, pool, model=model, processes=1)
        kept = children_of(pid)
        assert len(kept) == 1
        run(folder, out / "again", pool, model=model, processes=1)
        assert children_of(pid) == kept
        os.kill(pid, signal.SIGKILL)
        assert survivors(kept) == []
    shutil.rmtree(out / "again")
    assert_equal(out, local)


@needs_proc
def test_decoding_processes_go_after_an_idle_time(folder, model, out):
    with spawned() as pool:
        pid = pool.submit(os.getpid).result()
        pool.submit(hurry).result()
        run(folder, out, pool, model=model, processes=1)
        assert survivors(children_of(pid)) == []
        report = run(folder, out / "again", pool, model=model, processes=1)
    assert [row.status for row in report] == STATUSES
    assert survivors([pid]) == []


@needs_proc
def test_decoding_processes_at_work_go_when_nobody_waits(folder, model, out, monkeypatch):
    monkeypatch.setattr(workers, "_LOOK_EVERY_S", 0)
    options = {"transform": transforms.slowly, "shards": 1, "processes": 1}
    with ThreadPoolExecutor(1) as pool:
        rows = rows_of(folder, out, pool, model, **options)
        next(rows)
        kept = children_of(os.getpid())
        rows.close()
    assert kept
    assert survivors(kept) == []


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs, as far as the caller can see; its workers see none, and compute on the CPU."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)


@pytest.mark.parametrize("choice", ["all", 2])
def test_a_worker_a_gpu_writes_the_same_files(folder, model, local, out, gpus, choice):
    report = extract_cohort(folder, out, model=model, tissue=None, processes=0, gpus=choice)
    assert [row.status for row in report] == STATUSES
    assert_equal(out, local)


def test_one_gpu_takes_no_worker(folder, model, local, out, gpus, monkeypatch):
    monkeypatch.setattr(executors, "ProcessPoolExecutor", None)
    report = extract_cohort(folder, out, model=model, tissue=None, processes=0, gpus=1)
    assert [row.status for row in report] == STATUSES
    assert_equal(out, local)


def test_workers_on_gpus_share_the_cores(gpus, monkeypatch):
    monkeypatch.setattr(executors, "usable_cores", lambda: 7)
    processes = 3 if PROCESSES_SUPPORTED else None
    assert executors.gpu_workers("all", None)[1] == processes
    assert executors.gpu_workers(2, 5)[1] == 5
    assert executors.gpu_workers(1, None) == (None, None)


@pytest.mark.parametrize("choice", [0, 3, -1, True, "both", 1.0])
def test_gpus_that_are_not_there_are_refused(folder, model, out, gpus, choice):
    with pytest.raises(InputError, match=rf"gpus is {choice!r}, and this host has 2 CUDA devices"):
        extract_cohort(folder, out, model=model, gpus=choice)
    assert not out.exists()


def test_gpus_and_an_executor_are_one_too_many(folder, model, out, gpus):
    with pytest.raises(InputError, match="give one of them"):
        extract_cohort(folder, out, model=model, gpus="all", executor=ThreadPoolExecutor)


def started(folder, out, model, tmp_path, options):
    """A program that does the cohort with some workers, once it has written a file."""
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent(f"""
        import signal, sys, torch, xmag
        from support import transforms
        from test_executors import spawned
        if __name__ == "__main__":
            signal.signal(signal.SIGINT, signal.default_int_handler)
            torch.cuda.device_count = lambda: 2
            xmag.extract_cohort(sys.argv[1], sys.argv[2], model=sys.argv[3], tissue=None,
                                transform=transforms.slowly, {options})
    """)
    )
    root = Path(__file__).parents[1]
    process = subprocess.Popen(
        [sys.executable, program, folder, out, model],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "tests")])},
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 600
    while not list(out.rglob("*.h5")) and time.monotonic() < deadline:
        time.sleep(0.02)
    return process


@needs_proc
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_workers_of_gpus_end_with_their_caller(folder, model, out, tmp_path, how):
    with started(folder, out, model, tmp_path, "processes=1, gpus='all'") as process:
        below = descendants(process.pid)
        process.send_signal(how)
        process.wait(600)
    assert len(below) >= 4
    assert survivors(below) == []
    report = extract_cohort(folder, out, model=model, tissue=None, transform=transforms.slowly)
    assert {row.status for row in report} == {"done", "skipped", "failed"}


@needs_proc
def test_workers_of_a_pool_stop_after_a_slide_when_their_caller_is_killed(
    folder, model, out, tmp_path
):
    more = tmp_path / "more"
    more.mkdir()
    for number in range(30):
        shutil.copy(folder / "site/e.svs", more / f"{number}.svs")
    with started(more, out, model, tmp_path, "processes=0, executor=spawned") as process:
        below = descendants(process.pid)
        process.kill()
        process.wait(600)
    last = -1
    while (now := len(list(out.rglob("*.h5")))) != last:
        last = now
        time.sleep(5)
    for pid in below:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert 1 <= last <= 15


@pytest.fixture(scope="module")
def dask_client():
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(
            n_workers=1, threads_per_worker=1, processes=True, dashboard_address=":0"
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client


def test_dask_writes_the_same_files(folder, model, local, out, dask_client):
    report = run(folder, out, dask_client.get_executor(), model=model, processes=1)
    assert [row.status for row in report] == STATUSES
    assert_equal(out, local)


def test_a_killed_dask_worker_loses_nothing(folder, model, local, out, dask_client):
    (pid,) = dask_client.run(os.getpid).values()
    killed = []

    def kill():
        deadline = time.monotonic() + 600
        while not list(out.rglob("*.h5")) and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(pid, signal.SIGKILL)
        killed.append(pid)

    killer = threading.Thread(target=kill)
    killer.start()
    report = run(
        folder, out, dask_client.get_executor(), model=model, transform=transforms.slowly, shards=1
    )
    killer.join()
    assert killed
    # The worker may have written a bag, and died before it could say so.
    assert [row.status.replace("skipped", "done") for row in report] == STATUSES
    assert_equal(out, local)
    assert set(dask_client.run(os.getpid).values()) != {pid}


def test_submitit_writes_the_same_files(folder, model, local, out, tmp_path, monkeypatch):
    submitit = pytest.importorskip("submitit")
    # Its jobs are fresh interpreters, which are to find this xmag.
    monkeypatch.setenv("PYTHONPATH", str(Path(xmag.__file__).parents[1]))
    executor = submitit.LocalExecutor(folder=tmp_path / "jobs")
    report = run(folder, out, executor, model=model, shards=2)
    assert [row.status for row in report] == STATUSES
    assert_equal(out, local)


def test_mpi_writes_the_same_files(folder, model, local, out):
    futures = pytest.importorskip("mpi4py.futures")
    with futures.MPIPoolExecutor(1) as pool:
        report = run(folder, out, pool, model=model)
    assert [row.status for row in report] == STATUSES
    assert_equal(out, local)


def test_what_workers_tell_is_plain_json(folder, model, out):
    seen = []

    def peek(piece, count):
        status = run_piece(piece)
        path = piece.run / f"{piece.round}-{piece.number}.jsonl"
        seen.append(([json.loads(line) for line in path.read_text().split("\n") if line], status))
        assert PieceStatus.news(piece.lines) == status
        assert list(piece.lines.news()) == seen[0][0]
        return piece

    with Changing(peek) as pool:
        run(folder, out, pool, model=model, shards=1)
    ((lines, status),) = seen
    assert lines[0] == {"dtype_class": "fp32"} == {"dtype_class": status.dtype_class}
    assert {line["number"]: line["row"]["status"] for line in lines[1:]} == dict(
        enumerate(STATUSES)
    )


@pytest.mark.parametrize("store", [False, True])
def test_workers_do_several_models_of_a_slide_together(folder, model, out, tmp_path, store):
    save(random_encoder(TINY, seed=1), tmp_path / "other")
    models = [model, str(tmp_path / "other")]
    names = [Path(each).name for each in models]
    extract_cohort(folder, tmp_path / "local", model=models, tissue=None, processes=0)
    place = Url("memory://models") if store else out
    with ThreadPoolExecutor(2) as pool:
        report = run(folder, place, pool, model=models, shards=3)
    assert [(row.slide, row.model) for row in report] == [(s, n) for s in SLIDES for n in names]
    assert [row.status for row in report] == [each for each in STATUSES for _ in names]
    for row in report:
        if row.status == "done":
            ours = FeatureBag.load(place / row.output)
            theirs = FeatureBag.load(tmp_path / "local" / row.output)
            assert np.array_equal(ours.features, theirs.features)
    if store:
        fsspec.filesystem("memory").rm("/models", recursive=True)
