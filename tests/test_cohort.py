"""A cohort: what is written where, what is done again, and what one bad slide costs."""

import csv
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from support.encoders import ColourEncoder
from support.slides import write_svs
from support.vendor_slides import write_scn

from xmag import provenance
from xmag.bag import FeatureBag
from xmag.cohort import extract_cohort, jobs
from xmag.cohort.resume import SEEN_NAME
from xmag.errors import InputError, MismatchError, OutputError, XmagWarning
from xmag.extract import extract_features
from xmag.geometry import TileSpec
from xmag.plan import plan_tiles
from xmag.slide import Slide
from xmag.tiles import decoder


@pytest.fixture(scope="module")
def slide_bytes(tmp_path_factory):
    path = tmp_path_factory.mktemp("slides") / "slide.svs"
    write_svs(path, size=(1500, 1200), mpp=0.25)
    return path.read_bytes()


@pytest.fixture
def folder(tmp_path, slide_bytes):
    root = tmp_path / "slides"
    for name in ("a.svs", "site 1/b.svs", "site 1/ç.svs"):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(slide_bytes)
    (root / "notes.txt").write_text("not a slide")
    return root


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def run(slides, out, **options):
    # In this process, which is sooner started; test_processes.py shows that both do the same.
    options = {"model": ColourEncoder(), "tissue": None, "processes": 0, **options}
    return extract_cohort(slides, out, **options)


def read_report(out):
    with (out / "report.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_outputs_mirror_the_folders_and_equal_extract_features(folder, out):
    report = run(folder, out)
    assert [row.slide for row in report] == ["a.svs", "site 1/b.svs", "site 1/ç.svs"]
    assert {row.status for row in report} == {"done"}
    written = sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file())
    assert written == [SEEN_NAME, "a.h5", "report.csv", "site 1/b.h5", "site 1/ç.h5"]
    bag = FeatureBag.load(out / "site 1/b.h5")
    expected = extract_features(folder / "site 1/b.svs", model=ColourEncoder(), tissue=None)
    assert np.array_equal(bag.features, expected.features)
    assert np.array_equal(bag.coords, expected.coords)
    assert bag.provenance.fingerprint == expected.provenance.fingerprint


def test_the_report_is_a_csv_beside_the_outputs_without_absolute_paths(folder, out, tmp_path):
    report = run(folder, out)
    rows = read_report(out)
    assert [row["slide"] for row in rows] == [row.slide for row in report]
    assert [int(row["tiles"]) for row in rows] == [12, 12, 12]
    assert rows[1]["output"] == "site 1/b.h5"
    assert str(tmp_path) not in (out / "report.csv").read_text(encoding="utf-8")


def test_a_bad_slide_is_a_row_with_its_error_and_the_rest_is_done(folder, out):
    (folder / "a.svs").write_bytes(b"this is no slide")
    report = run(folder, out)
    assert [row.status for row in report] == ["failed", "done", "done"]
    assert report.failed[0].error
    assert report.failed[0].output == ""
    assert not (out / "a.h5").exists()
    assert read_report(out)[0]["error"] == report[0].error


def test_running_again_does_only_what_is_missing(folder, out):
    run(folder, out)
    before = {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in out.rglob("*.h5")}
    (out / "site 1/b.h5").unlink()
    report = run(folder, out)
    assert [row.status for row in report] == ["skipped", "done", "skipped"]
    assert [row.tiles for row in report] == [12, 12, 12]
    for path, stamp in before.items():
        if path.name != "b.h5":
            assert (path.stat().st_ino, path.stat().st_mtime_ns) == stamp


def test_a_truncated_output_is_not_done(folder, out):
    run(folder, out)
    whole = (out / "a.h5").read_bytes()
    (out / "a.h5").write_bytes(whole[: len(whole) // 2])
    assert [row.status for row in run(folder, out)] == ["done", "skipped", "skipped"]
    assert len(FeatureBag.load(out / "a.h5")) == 12


def test_outputs_of_another_model_are_refused_before_any_work_or_redone(folder, out):
    run(folder, out)
    (out / "a.h5").unlink()
    other = ColourEncoder(name="others")
    with pytest.raises(MismatchError, match=r"(?s)weights_sha256.*on_mismatch='redo'"):
        run(folder, out, model=other)
    assert not (out / "a.h5").exists()
    report = run(folder, out, model=other, on_mismatch="redo")
    assert {row.status for row in report} == {"done"}


def test_outputs_of_other_plan_parameters_are_told_apart(folder, out):
    run(folder, out)
    with pytest.raises(MismatchError, match="overlap_px"):
        run(folder, out, overlap=4)


def test_outputs_of_another_version_spec_precision_or_transform_are_told_apart(
    folder, out, monkeypatch
):
    run(folder, out)
    exact, half = ColourEncoder(spec=TileSpec(size_px=56, mpp_tolerance=0)), ColourEncoder()
    half.dtype = "torch.float16"
    for options, message in (
        ({"model": exact}, r"tile_spec\.mpp_tolerance: 0\.05 there, 0 here"),
        ({"model": ColourEncoder(spec=TileSpec(mpp=1.0, size_px=56))}, r"tile_spec\.mpp"),
        ({"model": half}, "dtype_class: 'fp32' there, 'half' here"),
        ({"transform": np.flip}, "transform: .*flip"),
        ({"tissue": "auto"}, r"plan\.tissue"),
        ({"tissue": "auto", "min_tissue": 0.5}, r"plan\.min_tissue: None there, 0\.5 here"),
    ):
        with pytest.raises(MismatchError, match=message):
            run(folder, out, **options)
    monkeypatch.setattr(provenance, "PREPROCESSING_VERSION", 99)
    with pytest.raises(MismatchError, match="preprocessing_version: 2 there, 99 here"):
        run(folder, out)
    assert {row.status for row in run(folder, out, on_mismatch="redo")} == {"done"}


def test_a_bag_of_a_newer_xmag_is_not_replaced_unasked(folder, out, monkeypatch):
    with monkeypatch.context() as later:
        later.setattr("xmag.bag.bag.SCHEMA_VERSION", 99)
        run(folder, out)
    whole = (out / "a.h5").read_bytes()
    with pytest.raises(MismatchError, match=r"(?s)a\.h5 is there.*schema_version 99"):
        run(folder, out)
    assert (out / "a.h5").read_bytes() == whole
    assert {row.status for row in run(folder, out, on_mismatch="redo")} == {"done"}


def test_what_is_expected_is_worked_out_once(folder, out, monkeypatch):
    run(folder, out)
    calls = []
    made = jobs.fingerprint_of
    monkeypatch.setattr(jobs, "fingerprint_of", lambda *a: calls.append(a) or made(*a))
    assert {row.status for row in run(folder, out)} == {"skipped"}
    assert len(calls) == 1


def test_another_slide_under_the_same_name_is_told_apart(folder, out, slide_bytes):
    run(folder, out)
    write_svs(folder / "a.svs", size=(1500, 1201), mpp=0.25)
    report = run(folder, out)
    assert [row.status for row in report] == ["failed", "skipped", "skipped"]
    assert "other content" in report[0].error
    assert run(folder, out, on_mismatch="redo")[0].status == "done"


def test_another_mpp_is_told_apart(folder, out):
    run(folder, out)
    report = run(folder, out, mpp=0.5)
    assert {row.status for row in report} == {"failed"}
    assert "another scale" in report[0].error


def test_a_csv_gives_slides_scales_and_ids(folder, out):
    table = folder / "slides.csv"
    table.write_text("slide,mpp,id\na.svs,,first\nsite 1/b.svs,0.5,second\n", encoding="utf-8")
    report = run(table, out)
    assert [row.output for row in report] == ["first.h5", "second.h5"]
    assert [row.tiles for row in report] == [12, 42]
    assert FeatureBag.load(out / "second.h5").tiles.level0_mpp == 0.5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path\na.svs\n", "expected a column 'slide'"),
        ("slide\n", "no slides"),
        ("slide,mpp\na.svs,quarter\n", "line 2.*'quarter'"),
        ("slide,id\na.svs,../x\n", "not a file name"),
        ("slide,mpp\n,0.25\n", "line 2.*no slide"),
        ("slide,mpp\na.svs,896\n", "line 2.*'896'"),
        ("slide,mpp\n\nNA,0.25\n", "line 3.*no slide: 'NA'"),
        ("slide,mmp\na.svs,0.5\n", "'mmp'; did you mean 'mpp'"),
        ("slide,region\na.svs,one\n", "line 2.*'one'.*number of a scan"),
        ("slide,region\na.svs,-1\n", "line 2.*'-1'"),
        ("slide,region\na.svs,0.5\n", "line 2.*'0.5'"),
        ("slide,region\na.svs,inf\n", "line 2.*'inf'"),
        ("slide,regoin\na.svs,0\n", "'regoin'; did you mean 'region'"),
        ("slide;mpp\na.svs;0,25\n", "'slide;mpp'.*commas"),
        (b"slide\n\xe7.svs\n", "save it as CSV UTF-8"),
    ],
)
def test_a_csv_that_makes_no_sense_is_refused(folder, out, text, message):
    (folder / "bad.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=message):
        run(folder / "bad.csv", out)


def test_a_csv_as_excel_saves_it_is_read(folder, out):
    (folder / "excel.csv").write_bytes("\ufeffslide,mpp\r\nsite 1/ç.svs,0.5\r\n".encode())
    assert [(row.slide, row.tiles) for row in run(folder / "excel.csv", out)] == [("ç.svs", 42)]


@pytest.mark.parametrize("header", ["slide, mpp, id", "Slide,MPP,ID", "slide ,mpp ,id "])
def test_columns_and_values_may_have_blanks_and_capitals(folder, out, header):
    text = f"{header}\nsite 1/b.svs , 0.5, second \nsite 1/b.svs,NA,N/A\n"
    (folder / "blanks.csv").write_text(text)
    report = run(folder / "blanks.csv", out)
    assert [row.output for row in report] == ["second.h5", "b.h5"]
    assert [row.tiles for row in report] == [42, 12]
    assert FeatureBag.load(out / "second.h5").tiles.level0_mpp == 0.5


def test_a_slide_may_be_listed_twice_at_two_scales(folder, out):
    (folder / "twice.csv").write_text("slide,mpp,id\na.svs,0.25,fine\na.svs,0.5,coarse\n")
    report = run(folder / "twice.csv", out)
    assert [(row.output, row.tiles) for row in report] == [("fine.h5", 12), ("coarse.h5", 42)]
    assert [row["output"] for row in read_report(out)] == ["fine.h5", "coarse.h5"]
    (out / "fine.h5").unlink()
    assert [row.status for row in run(folder / "twice.csv", out)] == ["done", "skipped"]


@pytest.fixture
def scans(folder):
    """The folder with a file of two scans, one of a size of its own, and a table to write."""
    regions = [((60, 40), (700, 560)), ((900, 660), (560, 480))]
    write_scn(folder / "two.scn", regions=regions, canvas=(1600, 1300), levels=(1, 2))
    return folder


def table(folder, text):
    (folder / "table.csv").write_text(text)
    return folder / "table.csv"


def test_a_file_with_several_scans_and_no_choice_is_a_row_that_lists_them(scans, out):
    for processes in (0, 1):
        report = run(
            [scans / "a.svs", scans / "two.scn"], out / str(processes), processes=processes
        )
        assert [row.status for row in report] == ["done", "failed"]
        for text in ("2 scans", "--region", "region=0 (700x560 px)", "region=1 (560x480 px)"):
            assert text in report[1].error


def test_each_scan_of_a_file_has_a_row_and_an_output_of_its_own(scans, out):
    rows = table(scans, "slide,region\ntwo.scn,0\na.svs,\ntwo.scn,1.0\n")
    for processes, status in ((0, "done"), (1, "skipped")):
        report = run(rows, out, processes=processes)
        assert {row.status for row in report} == {status}
        assert [row.output for row in report] == ["two.h5", "a.h5", "two-region1.h5"]
        assert [row["region"] for row in read_report(out)] == ["0", "", "1"]
    for number, name in ((0, "two.h5"), (1, "two-region1.h5")):
        path = scans / "two.scn"
        expected = extract_features(path, region=number, model=ColourEncoder(), tissue=None)
        found = FeatureBag.load(out / name)
        assert np.array_equal(found.features, expected.features)
        assert found.provenance.record["slide"] == expected.provenance.record["slide"]
    two = [FeatureBag.load(out / name).features for name in ("two.h5", "two-region1.h5")]
    assert not np.array_equal(*two)


def test_the_region_of_all_slides_is_an_option_and_the_table_goes_before(scans, out):
    rows = table(scans, "slide,region\ntwo.scn,0\ntwo.scn,\n")
    report = run(rows, out, region=1)
    assert [(row.output, row.region) for row in report] == [("two.h5", 0), ("two-region1.h5", 1)]
    assert run([scans / "two.scn"], out, region=1)[0].status == "skipped"
    assert run([scans / "a.svs"], out, region=0)[0].output == "a.h5"
    assert "region=1 is not in" in run([scans / "a.svs"], out, region=1)[0].error


def test_features_of_another_scan_under_the_same_name_are_told_apart(scans, out):
    run(table(scans, "slide,region,id\ntwo.scn,0,it\n"), out)
    other = table(scans, "slide,region,id\ntwo.scn,1,it\n")
    (row,) = run(other, out)
    assert row.status == "failed"
    assert "made from other content" in row.error
    assert ", region 1) at 0.25" in row.error
    (row,) = run(other, out, on_mismatch="redo")
    assert row.status == "done"
    expected = extract_features(scans / "two.scn", region=1, model=ColourEncoder(), tissue=None)
    assert np.array_equal(FeatureBag.load(out / "it.h5").features, expected.features)
    (row,) = run(table(scans, "slide,region,id\ntwo.scn,0,it\n"), out)
    assert ", region 1) at 0.25" in row.error


@pytest.mark.parametrize(
    "text",
    [
        "slide,region\ntwo.scn,0\ntwo.scn,0\n",
        "slide,region\ntwo.scn,0\ntwo.scn,\n",
        "slide,region\ntwo.scn,1\ntwo-region1.scn,0\n",
        "slide,region,id\ntwo.scn,0,it\ntwo.scn,1,it\n",
    ],
)
def test_scans_that_would_be_written_to_one_file_are_refused(scans, out, text):
    with pytest.raises(InputError, match="2 slides would be written to"):
        run(table(scans, text), out)
    assert not out.exists()


def test_a_plan_is_for_its_own_scan_alone(scans):
    encoder = ColourEncoder()
    with Slide(scans / "two.scn", region=0) as one, Slide(scans / "two.scn", region=1) as other:
        assert one.fingerprint | {"region": 1} == other.fingerprint
        plan = plan_tiles(one, encoder.tile_spec)
        assert len(extract_features(one, model=encoder, plan=plan)) > 0
        with pytest.raises(InputError):
            extract_features(other, model=encoder, plan=plan)
        with pytest.raises(InputError, match=r"region= goes with a path"):
            extract_features(one, model=encoder, region=1)


def test_slides_are_looked_for_before_a_model_is_loaded(folder, out):
    with pytest.raises(InputError, match="check the path"):
        extract_cohort(folder / "typo.csv", out, model="nobody/nothing")


def test_names_that_collide_are_an_error_before_any_work(folder, out, slide_bytes):
    (folder / "A.tif").write_bytes(slide_bytes)
    with pytest.raises(InputError, match=r"A\.tif.*a\.svs.*columns 'slide' and 'id'"):
        run(folder, out)
    assert not list(out.rglob("*.h5"))


def test_a_list_of_paths_mirrors_below_their_common_folder(folder, out):
    report = run([folder / "site 1/b.svs", folder / "a.svs"], out)
    assert [row.output for row in report] == ["site 1/b.h5", "a.h5"]
    assert [row.output for row in run(folder / "a.svs", out / "one")] == ["a.h5"]


def test_a_missing_slide_is_a_row(folder, out):
    report = run([folder / "a.svs", folder / "nowhere.svs"], out)
    assert [row.status for row in report] == ["done", "failed"]
    assert "nowhere.svs" in report[1].error


def test_a_slide_without_tiles_is_empty_and_valid_and_stays_so(folder, out):
    write_svs(folder / "a.svs", size=(300, 300), mpp=0.25)
    assert run(folder, out)[0].status == "empty"
    assert FeatureBag.load(out / "a.h5").features.shape == (0, 6)
    assert run(folder, out)[0].status == "skipped"


def test_overlays_are_written_beside_the_bags_and_made_up_for_later(folder, out):
    run(folder, out)
    report = run(folder, out, overlay=True)
    assert {row.status for row in report} == {"skipped"}
    assert (out / "site 1/b.h5.png").read_bytes().startswith(b"\x89PNG")


def test_safetensors_are_written_if_asked_for(folder, out):
    run(folder, out, format="safetensors")
    assert len(FeatureBag.load(out / "a.safetensors")) == 12


def test_an_output_folder_that_takes_no_files_is_found_out_before_any_work(folder, out):
    out.write_text("a file in the way")
    seen = []

    class Watching(ColourEncoder):
        def embed(self, tiles):
            seen.append(len(tiles))
            return super().embed(tiles)

    with pytest.raises(OutputError, match="out"):
        run(folder, out, model=Watching())
    assert seen == []


def test_interruption_leaves_what_is_finished_and_its_report(folder, out):
    class Interrupted(ColourEncoder):
        calls = 0

        def embed(self, tiles):
            self.calls += 1
            if self.calls == 2:
                raise KeyboardInterrupt
            return super().embed(tiles)

    with pytest.raises(KeyboardInterrupt):
        run(folder, out, model=Interrupted())
    assert [row["status"] for row in read_report(out)] == ["done"]
    assert [row.status for row in run(folder, out)] == ["skipped", "done", "done"]
    assert not [name for _, _, names in os.walk(out) for name in names if "tmp" in name]


@pytest.mark.parametrize(
    "options",
    [
        {"format": "npy"},
        {"on_mismatch": "ignore"},
        {"tissue": "find"},
        {"mpp": -1},
        {"mpp": 896},
        {"region": -1},
        {"region": "1"},
        {"region": True},
        {"overlap": 56},
        {"min_tissue": 2},
        {"batch_size": 0},
        {"processes": -1},
    ],
)
def test_impossible_options_are_refused(folder, out, options):
    with pytest.raises(InputError, match=r"expected|takes"):
        run(folder, out, **options)


def test_an_empty_folder_is_refused(tmp_path, out):
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="no slides"):
        run(tmp_path / "none", out)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems take no such names")
@pytest.mark.parametrize("processes", [0, 1])
@pytest.mark.parametrize("format", ["h5", "safetensors"])
def test_names_that_are_not_utf8_are_done_like_any_other(
    tmp_path, out, slide_bytes, processes, format
):
    folder = tmp_path / "slides"
    below = folder / os.fsdecode(b"sit\xe9")
    below.mkdir(parents=True)
    for path in (below / os.fsdecode(b"caf\xe9.svs"), folder / "b.svs"):
        path.write_bytes(slide_bytes)
    (folder / os.fsdecode(b"empty\xff.svs")).touch()
    options = {"overlay": True, "processes": processes, "format": format}
    report = run(folder, out, **options)
    assert {row.slide: row.status for row in report} == {
        "b.svs": "done", "empty%FF.svs": "failed", "sit%E9/caf%E9.svs": "done"
    }  # fmt: skip
    for row in read_report(out):
        assert row["status"] == "failed" or (out / row["output"]).is_file()
    bag = FeatureBag.load(out / "sit%E9" / f"caf%E9.{format}")
    assert bag.provenance.record["slide"]["name"] == "caf%E9.svs"
    assert (out / "sit%E9" / f"caf%E9.{format}.png").is_file()
    again = run(folder, out, **options)
    assert [row.status for row in again] == ["skipped", "failed", "skipped"]
    for path in out.rglob("*"):
        os.fsencode(path).decode("utf-8")
    (folder / "sit%E9").mkdir()
    (folder / "sit%E9" / "caf%E9.svs").write_bytes(slide_bytes)
    with pytest.raises(InputError, match="2 slides would be written to"):
        run(folder, out, **options)


def test_a_shard_of_names_that_are_not_utf8_is_done_by_workers(tmp_path, out, slide_bytes):
    path = tmp_path / os.fsdecode(b"caf\xe9.svs")
    path.write_bytes(slide_bytes)
    with ThreadPoolExecutor(1) as pool:
        report = extract_cohort(
            [path], out, model="xmag-mini", executor=pool, processes=0, tissue=None
        )
    # Too small for a tile of 5x.
    assert [(row.slide, row.status) for row in report] == [("caf%E9.svs", "empty")]


def test_no_cell_of_a_report_runs_in_a_spreadsheet(folder, tmp_path, out, slide_bytes):
    starts = ("=", "+", "-", "@", "\t", "\r")
    for number, start in enumerate(starts):
        (folder / f"{start}cmd|{number}!A1.svs").write_bytes(slide_bytes)
    (folder / "=broken.svs").write_bytes(b"II*\0" + bytes(40))
    report = run(folder, out)
    assert all(row.status == "done" for row in report if "cmd" in row.slide)
    with (out / "report.csv").open(newline="", encoding="utf-8") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    assert not [cell for cell in cells if cell.startswith(starts)]
    assert "'=cmd|0!A1.svs" in cells
    assert "'=cmd|0!A1.h5" in cells
    assert any(cell.startswith("'=broken.svs") for cell in cells)
    # Numbers are numbers.
    assert [int(row["tiles"]) for row in read_report(out)] == [row.tiles for row in report]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("caf\u00e9", "cafe\u0301"),
        ("CAF\u00c9", "cafe\u0301"),
        ("A", "a"),
        ("\uac00", "\u1100\u1161"),
        ("\u1fb3", "\u1fbc"),
    ],
)
def test_ids_that_some_file_system_takes_for_one_are_refused(folder, out, one, other):
    text = f"slide,id\na.svs,{one}\nsite/b.svs,{other}\n"
    (folder / "slides.csv").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match="2 slides would be written to"):
        run(folder / "slides.csv", out)
    assert not out.exists()


@pytest.mark.parametrize(
    "name",
    ["CON", "nul", "Aux.1", "com1", "LPT\u00b9", "prn .x", "conin$", "a:b", "a?", "a|b", "a<b",
     'a"b', "a*", "a\x1fb", "a/b", "a\\b", "..", "."],
)  # fmt: skip
def test_ids_that_windows_reserves_are_refused(folder, out, name):
    with (folder / "slides.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("slide", "id"), ("a.svs", name)])
    with pytest.raises(InputError, match="is not a file name on every system"):
        run(folder / "slides.csv", out)


@pytest.mark.parametrize("name", ["CONTROL-1", "com10", "console", "nul-2", "T12.3.", "a b", "ä"])
def test_ids_that_only_look_reserved_are_taken(folder, out, name):
    (folder / "slides.csv").write_text(f"slide,id\na.svs,{name}\n", encoding="utf-8")
    assert [row.output for row in run(folder / "slides.csv", out)] == [f"{name}.h5"]


def test_coverage_is_in_the_row_of_each_slide_also_when_it_was_there_already(folder, out):
    done = run(folder, out, tissue="auto")
    bag = FeatureBag.load(out / "a.h5")
    assert done[0].coverage == bag.coverage > 0.5
    assert run(folder, out, tissue="auto")[0].coverage == bag.coverage
    assert {row["coverage"] for row in read_report(out)} == {f"{bag.coverage:.3f}"}
    with pytest.warns(XmagWarning, match=r"cover .*border='shift'"):
        dropped = run(folder, out, tissue="auto", border="drop", on_mismatch="redo")
    assert dropped[0].coverage < 0.9 < bag.coverage
    assert dropped[0].tiles < done[0].tiles


class Dull(ColourEncoder):
    """Another model of the same tiles; writes into what it is given, and fails as told."""

    embed_dim = 3

    def __init__(self, *, fails_at=0, **options):
        super().__init__(**{"name": "owner/dull: 1", **options})
        self.fails_at, self.calls = fails_at, 0

    def embed(self, tiles):
        self.calls += 1
        if self.calls == self.fails_at:
            raise ValueError("not these tiles")
        found = np.asarray(tiles, np.float32).max(axis=(1, 2))
        if tiles.flags.writeable:
            tiles[:] = 0
        return found


@pytest.fixture
def decoded(monkeypatch):
    """The slides whose tiles were decoded, in this process."""
    names, read = [], decoder.read_rows

    def counting(slide, *args, **options):
        names.append(slide.name)
        return read(slide, *args, **options)

    monkeypatch.setattr(decoder, "read_rows", counting)
    return names


@pytest.mark.parametrize("processes", [0, 1])
def test_several_models_write_what_each_writes_alone(folder, out, tmp_path, processes):
    models = [Dull(), ColourEncoder()]
    report = run(folder, out, model=models, processes=processes, overlay=True)
    pairs = [(row.slide, row.model, row.status) for row in report]
    slides = ["a.svs", "site 1/b.svs", "site 1/ç.svs"]
    assert pairs == [(s, m, "done") for s in slides for m in ("dull__1", "colours")]
    assert [row["model"] for row in read_report(out)] == ["dull__1", "colours"] * 3
    assert report[3].output == "colours/site 1/b.h5"
    for name, model in zip(("dull__1", "colours"), models, strict=True):
        run(folder, tmp_path / name, model=model, overlay=True)
        found = {p.relative_to(out / name) for p in (out / name).rglob("*") if p.is_file()}
        alone = {p.relative_to(tmp_path / name) for p in (tmp_path / name).rglob("*.*[!v]")}
        assert found == {p for p in alone if p.suffix in (".h5", ".png")}
        for path in (p for p in found if p.suffix == ".h5"):
            bag, expected = (
                FeatureBag.load(out / name / path),
                FeatureBag.load(tmp_path / name / path),
            )
            assert np.array_equal(bag.features, expected.features)
            assert np.array_equal(bag.coords, expected.coords)
            assert bag.provenance.fingerprint == expected.provenance.fingerprint


def test_several_models_share_the_tiles_of_each_slide(folder, out, decoded):
    models = [ColourEncoder(), Dull()]
    run(folder, out, model=models)
    assert decoded == ["a.svs", "b.svs", "ç.svs"]
    assert [row.status for row in run(folder, out, model=models)] == ["skipped"] * 6
    assert decoded == ["a.svs", "b.svs", "ç.svs"]


def test_several_models_resume_and_fail_each_for_itself(folder, out, decoded):
    statuses = [row.status for row in run(folder, out, model=[Dull(fails_at=2), ColourEncoder()])]
    assert statuses == ["done", "done", "failed", "done", "done", "done"]
    (out / "colours/a.h5").unlink()
    decoded.clear()
    report = run(folder, out, model=[Dull(), ColourEncoder(), ColourEncoder(name="third")])
    assert [row.status for row in report] == [
        "skipped", "done", "done", "done", "skipped", "done", "skipped", "skipped", "done"
    ]  # fmt: skip
    assert decoded == ["a.svs", "b.svs", "ç.svs"]
    assert not list(out.rglob("*.xmag-lock"))


def test_a_changed_slide_is_decoded_once_for_all_models_to_redo(folder, out, decoded):
    models = [Dull(), ColourEncoder()]
    run(folder / "a.svs", out, model=models)
    write_svs(folder / "a.svs", size=(900, 1200), mpp=0.25)
    assert {row.status for row in run(folder / "a.svs", out, model=models)} == {"failed"}
    decoded.clear()
    report = run(folder / "a.svs", out, model=models, on_mismatch="redo")
    assert [(row.status, row.tiles) for row in report] == [("done", 6)] * 2
    assert decoded == ["a.svs"]


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ([ColourEncoder(), Dull(spec=TileSpec(size_px=112))], r"xmag\.evaluate\.compare"),
        ([ColourEncoder(), Dull(name="elsewhere/Colours")], "two models would write .*'Colours'"),
        ([Dull(name="..")], "can be called ''"),
        ([Dull(name="con")], "can be called 'con'"),
        ([Dull(name="my/Report.csv")], "can be called"),
        ([], "empty list"),
    ],
)
def test_models_that_no_one_pass_takes_are_refused_before_any_work(folder, out, models, message):
    with pytest.raises(InputError, match=message):
        run(folder, out, model=models)
    assert not out.exists()


def write_roi(path, box):
    left, top, right, bottom = box
    ring = [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"type": "Polygon", "coordinates": [ring]}))
    return path


BOXES = {"a": (0, 0, 900, 1200), "site 1/b": (600, 0, 1500, 600), "site 1/ç": (0, 0, 1500, 1200)}


@pytest.fixture
def regions(tmp_path):
    for (name, box), end in zip(BOXES.items(), (".geojson", ".json", ".geojson"), strict=True):
        write_roi(tmp_path / "regions" / f"{name}{end}", box)
    return tmp_path / "regions"


@pytest.mark.parametrize("processes", [0, 1])
def test_regions_of_interest_are_those_of_the_slides_ids(folder, out, regions, processes):
    options = {"overlap": 28, "min_tissue": None}
    report = run(folder, out, roi=regions, processes=processes, **options)
    assert report.counts() == {"done": 3}
    for name, (left, top, right, bottom) in BOXES.items():
        whole = extract_features(
            folder / f"{name}.svs", model=ColourEncoder(), tissue=None, **options
        )
        x, y = (whole.coords + whole.tiles.side_level0 / 2).T
        inside = (left <= x) & (x <= right) & (top <= y) & (y <= bottom)
        bag = FeatureBag.load(out / f"{name}.h5")
        assert np.array_equal(bag.coords, whole.coords[inside])
        assert np.array_equal(bag.features, whole.features[inside])
        roi = next(p for p in regions.rglob("*.*") if p.stem == name.rpartition("/")[2])
        slide = folder / f"{name}.svs"
        alone = extract_features(slide, model=ColourEncoder(), tissue=None, roi=roi, **options)
        assert np.array_equal(bag.features, alone.features)
        assert (len(bag) < len(whole)) == (name != "site 1/ç")


def test_another_region_of_interest_is_not_taken_for_what_is_there(folder, out, regions):
    run(folder, out, roi=regions)
    assert run(folder, out, roi=regions).counts() == {"skipped": 3}
    write_roi(regions / "a.geojson", (0, 0, 1500, 1200))
    with pytest.raises(MismatchError, match="roi: a part of the slide there, another part of it"):
        run(folder, out, roi=regions)
    with pytest.raises(MismatchError, match="roi: a part of the slide there, all of it here"):
        run(folder, out)
    run(folder, out, on_mismatch="redo")
    with pytest.raises(MismatchError, match="roi: all of the slide there, a part of it here"):
        run(folder, out, roi=regions)


def test_a_region_of_interest_that_is_missing_or_wrong_is_an_error_before_any_work(
    folder, out, regions
):
    with pytest.raises(InputError, match="roi is one file for 3 slides"):
        run(folder, out, roi=regions / "a.geojson")
    (regions / "site 1" / "b.json").unlink()
    with pytest.raises(InputError, match=r"1 of 3 slides have no region .* site 1/b\.svs"):
        run(folder, out, roi=regions)
    (regions / "site 1" / "b.json").write_text('{"type": "Point", "coordinates": [1, 2]}')
    with pytest.raises(InputError, match=r"b\.json: "):
        run(folder, out, roi=regions)
    with pytest.raises(InputError, match="lies at a URL"):
        run(folder, out, roi="s3://bucket/regions")
    assert not out.exists()
    assert run(folder / "a.svs", out, roi=regions / "a.geojson").counts() == {"done": 1}
