import csv
import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image
from support.encoders import ColourEncoder
from support.vendor_slides import write_scn

import xmag
import xmag.cohort
from xmag.cli import main
from xmag.demo import write_demo_slide


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    """A folder with two small slides and one that is broken."""
    folder = tmp_path_factory.mktemp("slides")
    write_demo_slide(folder / "a.svs", size=(4000, 3000))
    (folder / "below").mkdir()
    write_demo_slide(folder / "below" / "b é.svs", size=(4000, 3000), seed=1)
    (folder / "broken.svs").write_bytes(b"II*\0" + bytes(100))
    return folder


def run(*args, **env):
    return subprocess.run(
        [sys.executable, "-m", "xmag", *map(str, args)], capture_output=True, text=True,
        encoding="utf-8", env={**os.environ, **env}, timeout=800, check=False,
    )  # fmt: skip


def test_help_names_the_commands_and_loads_nothing_heavy():
    code = (
        "import sys\nfrom xmag.cli import main\nmain(['--help'])\nmain(['extract', '--help'])\n"
        "print([m for m in ('torch', 'numpy', 'PIL', 'tqdm') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(command in done.stdout for command in ("info", "extract", "demo", "examples:"))
    assert done.stdout.splitlines()[-1] == "[]"


def test_version_is_that_of_the_package(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"xmag {xmag.__version__}\n"


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["no-such-command"],
        ["info"],
        ["extract", "a.svs"],
        ["extract", "a.svs", "-o", "out", "--format", "csv"],
        ["info", "a.svs", "--mpp", "fine"],
        ["extract", "a.svs", "--over", "-o", "out"],
        ["extract", "a.svs", "-o", "out", "--shard", "4/4"],
        ["extract", "a.svs", "-o", "out", "--gpus", "both"],
        ["extract", "a.svs", "-o", "out", "--damaged", "white"],
    ],
)
def test_wrong_use_is_status_2_with_the_usage(args, capsys):
    assert main(args) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("usage: xmag")


def test_info_says_what_is_in_a_slide(slides, capsys):
    assert main(["info", str(slides / "a.svs")]) == 0
    out = capsys.readouterr().out
    for text in (
        "a.svs",
        "aperio",
        "4,000 x 3,000 px, 2 x 1.5 mm",
        "0.5 µm/px (Aperio MPP)",
        "1: 1,000 x 750 px, 1/4, 2 µm/px",
        "read from level 1, as it is, 2 µm/px",
    ):
        assert text in out


def test_info_says_what_is_decoded_at_a_reduced_scale(slides, capsys):
    assert main(["info", str(slides / "a.svs"), "--mpp", "0.25"]) == 0
    out = capsys.readouterr().out
    assert "1: 1,000 x 750 px, 1/4, 1 µm/px" in out
    assert "read from level 1 decoded at 1/2, as it is, 2 µm/px" in out


def test_info_takes_the_scale_that_is_given(slides, capsys):
    assert main(["info", str(slides / "a.svs"), "--mpp", "0.2"]) == 0
    out = capsys.readouterr().out
    assert "0.2 µm/px (" in out
    assert "read from level 1, 0.8 µm/px, resampled" in out


def test_info_of_a_slide_that_is_too_coarse_says_so(slides, capsys):
    assert main(["info", str(slides / "a.svs"), "--mpp", "3"]) == 0
    assert "cannot be read: the slide has 3 µm/px at its finest level" in capsys.readouterr().out


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """A file of two scans."""
    path = tmp_path_factory.mktemp("scans") / "two.scn"
    regions = [((60, 40), (700, 560)), ((900, 660), (560, 480))]
    write_scn(path, regions=regions, canvas=(1600, 1300), levels=(1, 2), mpp=1.0)
    return path


def test_info_lists_the_scans_of_a_file_and_shows_the_one_that_is_chosen(scans, capsys):
    assert main(["info", str(scans)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = [line.split() for line in out.splitlines()]
    assert lines == [
        ["slide", "two.scn"],
        ["scans", "0:", "700", "x", "560", "px"],
        ["1:", "560", "x", "480", "px"],
        ["choose", "one", "with", "--region"],
    ]
    assert main(["info", str(scans), "--region", "1"]) == 0
    out = capsys.readouterr().out
    assert "region    1\n" in out
    assert "1 µm/px (Leica view size)" in out
    assert main(["info", str(scans), "--region", "2"]) == 2
    assert "region=2 is not in the file; it holds region=0 (700x560 px)" in capsys.readouterr().err


def test_info_shows_what_the_scanner_wrote_only_if_asked(slides, capsys):
    shown = 'property  "aperio.AppMag": "20"'
    assert main(["info", str(slides / "a.svs")]) == 0
    assert "AppMag" not in capsys.readouterr().out
    assert main(["info", str(slides / "a.svs"), "--properties"]) == 0
    assert shown in capsys.readouterr().out.splitlines()


def test_extract_takes_the_scan_that_is_chosen_and_else_lists_them(scans, tmp_path, capsys):
    args = ["extract", str(scans), "-o", str(tmp_path), "--model", "xmag-mini"]
    assert main(args) == 1
    out = capsys.readouterr().out
    assert out.startswith("failed  two.scn: two.scn: the file holds 2 scans; ")
    assert "--region" in out
    assert "region=1 (560x480 px)" in out
    assert main([*args, "--region", "1"]) == 0
    assert main([*args, "--region", "0"]) == 0
    assert capsys.readouterr().out.count("done    two.scn: ") == 2
    bags = [xmag.FeatureBag.load(tmp_path / f"two{end}.h5") for end in ("", "-region1")]
    assert bags[0].coords.max() < bags[1].coords.max()


def test_the_demo_shows_the_scan_that_is_chosen(scans, tmp_path, capsys):
    assert main(["demo", str(scans), "-o", str(tmp_path), "--region", "1"]) == 0
    assert ", region=1)" in capsys.readouterr().out
    assert (tmp_path / "two-region1.h5").is_file()


@pytest.mark.shared
def test_info_of_a_slide_without_a_scale_asks_for_one(shared, capsys):
    assert main(["info", str(shared / "slides" / "tcga-cr-7395-01a-01-ts1.svs")]) == 0
    assert "unknown: give --mpp" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["broken.svs", "missing.svs", "."])
def test_a_slide_that_cannot_be_read_is_one_line_and_status_2(slides, name, capsys):
    assert main(["info", str(slides / name)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("xmag: error: ")
    assert err.count("\n") == 1


def test_a_slide_that_was_cut_is_one_line_too(slides, tmp_path):
    whole = (slides / "a.svs").read_bytes()
    (tmp_path / "cut.svs").write_bytes(whole[: len(whole) // 2])
    done = run("info", tmp_path / "cut.svs")
    assert done.returncode == 2
    assert done.stderr.startswith("xmag: error: cut.svs: ")
    assert done.stderr.count("\n") == 1


def test_an_argument_that_makes_no_sense_is_status_2(slides, capsys):
    assert main(["info", str(slides / "a.svs"), "--mpp", "-1"]) == 2
    assert capsys.readouterr().err.startswith("xmag: error: ")


def test_a_scale_that_makes_no_sense_is_status_2_before_any_work(slides, tmp_path, capsys):
    args = ["extract", str(slides / "a.svs"), "-o", str(tmp_path / "o"), "--mpp", "896"]
    assert main(args) == 2
    assert capsys.readouterr().err.startswith("xmag: error: mpp is 896")
    assert not (tmp_path / "o").exists()


def test_extract_does_its_share_and_says_where_its_report_is(slides, tmp_path, capsys):
    args = ["extract", str(slides), "-o", str(tmp_path / "o"), "--model", "xmag-mini"]
    assert main([*args, "--shard", "0/3"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("done    a.svs: ")
    assert out.endswith(f"1 slide: 1 done; see {tmp_path / 'o' / 'report-0-of-3.csv'}\n")
    assert (tmp_path / "o" / "report-0-of-3.csv").is_file()


def test_extract_stops_a_slide_that_takes_too_long(slides, tmp_path, capsys):
    args = ["extract", str(slides / "a.svs"), "-o", str(tmp_path / "o"), "--model", "xmag-mini"]
    assert main([*args, "--slide-timeout", "0.001"]) == 1
    assert "took longer than --slide-timeout 0.001 s and was stopped" in capsys.readouterr().out


def test_extract_leaves_damaged_tiles_out_where_it_may(slides, tmp_path, capsys):
    path = tmp_path / "a.svs"
    data = (slides / "a.svs").read_bytes()
    with xmag.Slide(slides / "a.svs") as slide:
        plan = xmag.plan_tiles(slide, xmag.TileSpec(), tissue=xmag.find_tissue(slide))
        # Level 1 is at 1/4, in tiles of 240 px: the third of the second row begins at (480, 240).
        begin, end = (np.array([[480, 240]]) * 4 + n for n in (0, 960))
        lost = ((plan.coords < end) & (plan.coords + 896 > begin)).all(axis=1).sum()
        assert len(plan) > lost > 0
        (first,) = slide.reader.read_tile_bytes(plan.scale.level, [5 + 2])
    path.write_bytes(data.replace(first, first[: len(first) // 2].ljust(len(first), b"\0")))
    args = ["extract", str(path), "-o", str(tmp_path / "o"), "--model", "xmag-mini"]
    assert main(args) == 1
    assert "is damaged" in capsys.readouterr().out
    assert main([*args, "--damaged", "drop"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith(f"done    a.svs: {len(plan) - lost} tiles, ")
    assert "left out, as --damaged drop asks for" in said.err


def test_messages_name_the_option_and_not_the_argument(tmp_path, capsys):
    Image.new("RGB", (600, 600), "white").save(tmp_path / "a.png")
    args = ["extract", str(tmp_path / "a.png"), "-o", str(tmp_path / "o"), "--model", "xmag-mini"]
    assert main(args) == 1
    out = capsys.readouterr().out
    assert "--mpp 0.25 for a typical 40x scan, --mpp 0.5 at 20x" in out
    assert "mpp=" not in out
    assert "1 slide: 1 failed" in out


def test_extract_does_all_slides_of_a_folder_and_reports_the_broken_one(slides, tmp_path):
    out = tmp_path / "features"
    done = run("extract", slides, "-o", out, "--model", "xmag-mini", "--overlay")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("done    a.svs: ")
    assert lines[1].startswith("done    below/b é.svs: ")
    assert lines[2].startswith("failed  broken.svs: ")
    assert lines[3].startswith("3 slides: 2 done, 1 failed; see ")
    with (out / "report.csv").open(newline="", encoding="utf-8") as file:
        report = {row["slide"]: row for row in csv.DictReader(file)}
    assert report["a.svs"]["status"] == "done"
    with h5py.File(out / report["a.svs"]["output"]) as bag:
        assert f"{len(bag['features'])} tiles" in lines[0]
    assert len(list(out.rglob("*.png"))) == 2

    again = run("extract", slides, "-o", out, "--model", "xmag-mini", "--overlay")
    assert again.returncode == 1
    assert again.stdout.splitlines()[0].startswith("skipped a.svs: ")


def test_extract_of_good_slides_is_status_0_and_quiet_on_stdout(slides, tmp_path, capsys):
    args = ["extract", str(slides / "a.svs"), "-o", str(tmp_path), "--model", "xmag-mini"]
    assert main([*args, "--format", "safetensors"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0].startswith("done    a.svs: ")
    assert all(line.startswith("xmag: warning: ") for line in err.splitlines())
    assert [p.suffix for p in tmp_path.iterdir() if p.stem == "a"] == [".safetensors"]


def test_features_made_differently_are_kept_unless_redo_is_given(slides, tmp_path, capsys):
    args = ["extract", str(slides / "a.svs"), "-o", str(tmp_path), "--model", "xmag-mini"]
    assert main(args) == 0
    capsys.readouterr()
    assert main([*args, "--mpp", "0.26"]) == 1
    assert "give --redo to make it again" in capsys.readouterr().out
    assert main([*args, "--mpp", "0.26", "--redo"]) == 0


def test_a_worker_on_each_gpu_needs_no_script(slides, tmp_path, capsys, monkeypatch):
    args = ["extract", str(slides), "-o", str(tmp_path / "o"), "--model", "xmag-mini"]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert main([*args, "--gpus", "all"]) == 2
    assert "gpus is 'all', and this host has 0 CUDA devices" in capsys.readouterr().err
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert main([*args, "--gpus", "2"]) == 1  # one is broken
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["done", "done", "failed", "3"]
    assert main([*args, "--gpus", "3"]) == 2


def test_a_folder_beside_slides_is_wrong_use(slides, tmp_path, capsys):
    assert main(["extract", str(slides), str(slides / "a.svs"), "-o", str(tmp_path / "o")]) == 2
    assert "or one folder, or one CSV file" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_a_csv_without_its_column_is_wrong_use(tmp_path, capsys):
    (tmp_path / "s.csv").write_text("path\na.svs\n")
    args = ["extract", str(tmp_path / "s.csv"), "-o", str(tmp_path / "o"), "--model", "xmag-mini"]
    assert main(args) == 2
    assert "expected a column 'slide'" in capsys.readouterr().err


@pytest.mark.shared
def test_the_real_jpeg_slide_from_end_to_end(shared, tmp_path, capsys):
    slide = shared / "slides" / "cmu-1-small-region.svs"
    args = ["extract", str(slide), "-o", str(tmp_path), "--model", "xmag-mini", "--overlay"]
    assert main(args) == 0
    assert capsys.readouterr().out.startswith(
        "done    cmu-1-small-region.svs: 5 tiles, 92% of the tissue, "
    )
    bag = xmag.FeatureBag.load(tmp_path / "cmu-1-small-region.h5")
    assert bag.tiles.level0_mpp == 0.499
    assert bag.tiles.mpp == pytest.approx(4 * 0.499)
    assert bag.coords.tolist() == [[896, 0], [896, 896], [896, 1792], [0, 2068], [896, 2068]]
    assert bag.coverage == pytest.approx(0.921, abs=0.001)
    (row,) = csv.DictReader((tmp_path / "report.csv").read_text().splitlines())
    assert row["coverage"] == "0.921"
    assert (tmp_path / "cmu-1-small-region.h5.png").stat().st_size > 0


@pytest.mark.shared
def test_the_real_jpeg_2000_slide_wants_an_mpp_and_runs_with_it(shared, tmp_path, capsys):
    slide = shared / "slides" / "tcga-cr-7395-01a-01-ts1.svs"
    args = ["extract", str(slide), "-o", str(tmp_path), "--model", "xmag-mini"]
    assert main(args) == 1
    assert "--mpp 0.25 for a typical 40x scan" in capsys.readouterr().out
    assert main([*args, "--mpp", "0.5"]) == 0
    assert (
        "done    tcga-cr-7395-01a-01-ts1.svs: 16 tiles, 98% of the tissue, "
        in capsys.readouterr().out
    )
    with pytest.raises(xmag.SlideScaleError, match="mpp="):
        xmag.extract_features(slide, model=ColourEncoder())


def test_verbose_logs_to_stderr_and_leaves_no_handler(slides, tmp_path, capsys):
    import logging

    before = list(logging.getLogger("xmag").handlers)
    args = ["extract", str(slides / "a.svs"), "-o", str(tmp_path), "--model", "xmag-mini"]
    assert main([*args, "-v"]) == 0
    assert "xmag.cohort: a.svs: done" in capsys.readouterr().err
    assert logging.getLogger("xmag").handlers == before


def test_interrupting_is_status_130_without_a_traceback(slides, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("xmag.slide.Slide.__init__", interrupted)
    assert main(["info", str(slides / "a.svs")]) == 130
    assert capsys.readouterr().err.startswith("xmag: interrupted")


def test_a_terminal_without_unicode_gets_escapes(slides):
    done = run("info", slides / "below" / "b é.svs", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert done.returncode == 0, done.stderr
    assert "b \\xe9.svs" in done.stdout
    assert "\\xb5m/px" in done.stdout


def test_demo_makes_a_slide_features_and_pictures(tmp_path):
    done = run("demo", "-o", tmp_path / "demo")
    assert done.returncode == 0, done.stderr
    names = {path.name for path in (tmp_path / "demo").iterdir()}
    assert names == {"demo.svs", "demo.h5", "demo-overlay.png", "demo-features.png"}
    assert Path(tmp_path / "demo" / "demo.svs").stat().st_size < 20e6
    assert "9,000 x 6,750 px, 0.5 µm/px" in done.stdout
    assert "Traceback" not in done.stderr
    steps = ["loading PyTorch", f"making a slide of real tissue: {tmp_path}/demo/demo.svs",
             f"looking for tissue on {tmp_path}/demo/demo.svs",
             "extracting features with xmag-mini"]  # fmt: skip
    said = [x for x in done.stderr.splitlines() if not x.startswith("xmag: warning: ")]
    assert said == [f"xmag: {step}" for step in steps]


def test_demo_says_something_before_it_loads_anything_heavy():
    """What is said first is said at once, and reaches a reader at once."""
    code = (
        "import sys\nfrom xmag.cli import main\n"
        "class Tap:\n"
        "    encoding = 'utf-8'\n"
        "    def write(self, text):\n"
        "        sys.__stderr__.write(text + str('torch' in sys.modules)); raise SystemExit\n"
        "    def flush(self):\n        pass\n"
        "sys.stderr = Tap()\nmain(['demo'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "xmag: loading PyTorch\nFalse"


def test_demo_runs_on_a_slide_of_the_user(slides, tmp_path, capsys):
    args = ["demo", str(slides / "a.svs"), "--mpp", "0.24", "--out", str(tmp_path / "d")]
    assert main(args) == 0
    assert "0.24 µm/px" in capsys.readouterr().out
    assert not (tmp_path / "d" / "demo.svs").exists()


@pytest.mark.shared
def test_demo_of_a_slide_without_scale_names_the_option(shared, tmp_path, capsys):
    slide = shared / "slides" / "tcga-cr-7395-01a-01-ts1.svs"
    assert main(["demo", str(slide), "-o", str(tmp_path)]) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("xmag: error: ")
    assert "--mpp" in err
