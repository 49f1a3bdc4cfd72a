"""Progress: events for programs, bars for people, nothing for pipes."""

import dataclasses
import io
import json
import re
import textwrap
from contextlib import redirect_stderr
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
from PIL import Image
from support.encoders import ColourEncoder
from support.fake_reader import FakeTileReader, noise
from support.finetuning import LABELS, PATIENTS, QUICK, small_encoder, stores
from support.hub_server import FakeHub, serve
from support.models import TINY, random_state
from support.programs import run_program
from support.slides import write_svs

import xmag
from xmag.cohort import extract_cohort
from xmag.demo import mosaic, write_demo_slide
from xmag.distill import plan_images
from xmag.extract import extract_features
from xmag.finetune import finetune_slides
from xmag.hub.registry import SCHEMA, ModelConfig
from xmag.progress import CohortProgress, ProgressEvent, progress_bar, tell
from xmag.slide import Slide

COHORT = {"tissue": None, "batch_size": 3, "processes": 0}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def on_terminal(function, *arguments, **options):
    """What `function` returns, and what it shows on a terminal."""
    with redirect_stderr(Terminal()) as terminal:
        result = function(*arguments, **options)
    return result, terminal.getvalue()


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slides")
    for number, width in enumerate((1000, 1300, 2000)):
        write_svs(folder / f"{number}.svs", size=(width, 900), mpp=0.25)
    return folder


def test_events_are_frozen_and_slotted():
    event = ProgressEvent(what="decoding")
    with pytest.raises(dataclasses.FrozenInstanceError):
        event.done = 3
    assert not hasattr(event, "__dict__")


def test_a_function_is_called_with_events_instead_of_a_bar():
    slide = Slide.from_reader(FakeTileReader(noise(2000, 1500)), name="fake")
    events = []
    options = {"tissue": None, "batch_size": 20, "progress": events.append}
    bag, shown = on_terminal(extract_features, slide, model=ColourEncoder(), **options)
    assert [event.done for event in events] == [*range(0, len(bag), 20), len(bag)]
    assert {(event.what, event.unit, event.total) for event in events} == {
        ("fake", "tile", len(bag))
    }
    assert events[0].per_second is events[0].seconds_left is None
    for event in events[1:]:
        assert event.per_second == pytest.approx(event.done / event.seconds)
        left = event.total - event.done
        assert event.seconds_left == pytest.approx(left / event.per_second, abs=1e-9)
    assert shown == ""


class StopError(Exception):
    pass


@pytest.mark.parametrize("after", [0, 1, 3])
def test_what_a_function_raises_ends_the_call(slides, tmp_path, after):
    raised = []

    def stop(event):
        if event.tiles >= after and not raised:
            raised.append(event)
            raise StopError

    def stop_slide(event):
        if event.done >= after:
            raise StopError

    with pytest.raises(StopError):
        extract_cohort(slides, tmp_path, model=ColourEncoder(), progress=stop, **COHORT)
    with pytest.raises(StopError):
        extract_features(slides / "0.svs", model=ColourEncoder(), tissue=None, progress=stop_slide)


@pytest.mark.parametrize("processes", [0, 1])
def test_a_cohort_counts_tiles_as_well_as_slides(slides, tmp_path, processes):
    events = []
    options = {**COHORT, "processes": processes, "progress": events.append}
    models = [ColourEncoder(name="one"), ColourEncoder(name="other")]
    report = extract_cohort(slides, tmp_path, model=models, **options)
    tiles = sum(row.tiles for row in report)
    assert {(event.what, event.unit, event.total) for event in events} == {("slides", "slide", 6)}
    assert (events[0].done, events[0].tiles, events[0].tiles_total) == (0, 0, None)
    assert (events[-1].done, events[-1].tiles, events[-1].tiles_total) == (6, tiles, tiles)
    counts = [(event.done, event.tiles) for event in events]
    assert counts == sorted(counts)
    steps = np.diff([event.tiles for event in events])
    assert steps.max() <= 3  # a batch
    assert any(event.done == 0 < event.tiles for event in events)
    for event in events:
        if event.tiles and event.seconds_left is not None:
            rest = event.tiles_total - event.tiles
            assert event.seconds_left == pytest.approx(rest * event.seconds / event.tiles)
    events.clear()
    extract_cohort(slides, tmp_path, model=models, **options)
    assert [(event.done, event.tiles) for event in events if event.done] == [
        (done, 0) for done in range(1, 7)
    ]


def test_the_tiles_to_come_are_reckoned_from_the_slides_seen():
    events = []
    with CohortProgress(events.append, 4) as progress:
        progress.row("skipped", 9, is_elsewhere=False)
        progress.count(10)
        assert events[-1].tiles_total == 10 + 2 * 10  # two slides are not known yet
        progress.count(30)
        progress.count(None, 20)
        assert (events[-1].tiles, events[-1].tiles_total) == (20, 40 + 20)
        progress.row("done", 20, is_elsewhere=True)  # of a worker, that told nothing before
        assert (events[-1].tiles, events[-1].tiles_total) == (40, 60)
        progress.row("failed", 0, is_elsewhere=False)
        progress.row("done", 10, is_elsewhere=False)
        assert (events[-1].done, events[-1].tiles, events[-1].tiles_total) == (4, 40, 40)
        assert events[-1].seconds_left == 0


def test_a_bar_of_a_cohort_shows_tiles(slides, tmp_path):
    _, text = on_terminal(extract_cohort, slides, tmp_path, model=ColourEncoder(), **COHORT)
    shown = [line for line in text.replace("\r", "\n").split("\n") if line.strip()]
    assert re.fullmatch(r"  0%\|.*\| 0/3 slides", shown[0])
    assert re.fullmatch(r"100%\|.*\| 3/3 slides, \d+ tiles, [\d,.]+ tiles/s; 3 done *", shown[-1])


def test_progress_is_quiet_where_nobody_looks(slides, tmp_path, capsys):
    tell(None, "loading")
    extract_cohort(slides, tmp_path, model=ColourEncoder(), **COHORT)
    extract_features(slides / "0.svs", model=ColourEncoder(), tissue=None)
    assert capsys.readouterr() == ("", "")
    tell(True, "loading")
    assert capsys.readouterr() == ("", "xmag: loading\n")


def test_a_model_given_by_name_is_named_before_it_is_loaded(monkeypatch):
    events, loaded = [], []
    load = xmag.encoder.load_model
    monkeypatch.setattr(
        "xmag.extract.load_model", lambda *a: loaded.append(len(events)) or load(*a)
    )
    slide = Slide.from_reader(FakeTileReader(noise(1800, 1800)), name="fake")
    extract_features(slide, model="xmag-mini", tissue=None, progress=events.append)
    assert events[0] == ProgressEvent(what="loading xmag-mini")
    assert loaded == [1]
    _, shown = on_terminal(extract_features, slide, model="xmag-mini", tissue=None)
    assert shown.startswith("xmag: loading xmag-mini\n")


def test_fine_tuning_says_each_of_its_steps():
    events = []
    result = finetune_slides(
        stores(), LABELS, model=small_encoder(), aggregator="mean", groups=PATIENTS, device="cpu",
        settings=QUICK, progress=events.append,
    )  # fmt: skip
    whats = list(dict.fromkeys(event.what for event in events))
    assert whats == ["planning", "decoding", "fine-tuning"]
    last = {event.what: event for event in events}
    assert (last["planning"].done, last["planning"].total) == (8, 8)
    assert last["fine-tuning"].done == last["fine-tuning"].total > 0
    assert len(result.history) == QUICK.epochs


def test_sampling_of_regions_is_counted(tmp_path):
    for number in range(2):
        Image.fromarray(noise(1000, 1000, seed=number)).save(tmp_path / f"{number}.png")
    events = []
    manifest = plan_images(tmp_path, mpp=0.5, regions=2, progress=events.append)
    assert [(event.what, event.done, event.total) for event in events] == [
        ("looking", done, 2) for done in range(3)
    ]
    assert repr(manifest) == "<Manifest of 2 regions from 2 slides of 1 sites, at 0.5 µm/px>"


def test_a_function_is_no_parameter_to_save(tmp_path):
    events = []
    clf = xmag.MILClassifier(
        aggregator="mean", epochs=2, device="cpu", random_state=0, progress=events.append
    )
    rng = np.random.default_rng(0)
    bags = [xmag.FeatureBag(rng.normal(size=(4, 3)).astype("f4"), None) for _ in range(6)]
    clf.fit(bags, list("ababab"), validation=None)
    assert [(event.what, event.done) for event in events] == [("training", n) for n in range(3)]
    clf.save(tmp_path / "saved")
    assert xmag.MILClassifier.load(tmp_path / "saved").progress is None


def test_a_bar_of_events_starts_where_it_was_resumed():
    events = []
    with progress_bar(events.append, total=10, initial=4, desc="training", unit="step") as bar:
        bar.set_postfix({"loss": 1.0})
        bar.update()
    assert [event.done for event in events] == [4, 5]
    assert events[1].per_second == pytest.approx(1 / events[1].seconds)


def test_a_first_download_says_what_is_fetched_and_its_terms(tmp_path):
    config = {"format": SCHEMA, "name": "a/tiny", **ModelConfig(vit=TINY).to_dict()}
    files = {
        "config.json": json.dumps(config).encode(),
        "model.safetensors": safetensors.torch.save(random_state(TINY)),
    }
    program = """
    import io, sys
    class Terminal(io.StringIO):
        def isatty(self):
            return True
    for terminal in (Terminal(), io.StringIO()):
        sys.stderr, kept = terminal, sys.stderr
        import xmag
        xmag.load_model("a/tiny", cache_dir=sys.argv[1] + terminal.__class__.__name__)
        sys.stderr = kept
        print([x for x in terminal.getvalue().split("\\n") if x.startswith("xmag")])
    """
    with serve(FakeHub(repos={"a/tiny": files})) as hub:
        said = run_program(program, tmp_path / "cache", HF_ENDPOINT=hub.url)
    terms = "not known to xmag; read its page"
    assert said == f"['xmag: fetching {hub.url}/a/tiny; terms of use: {terms}']\n[]\n"


_NEED_TORCH = [
    "extract x -o y", "train x.csv -o y", "distill x", "finetune x.csv -o y", "report x",
    "compare x.csv --models z -o y", "evaluate x.csv -o y", "predict x.csv --classifier y",
    "heatmap x.svs --classifier y",
]  # fmt: skip


@pytest.mark.parametrize(("is_terminal", "said"), [(True, "xmag: loading PyTorch\n"), (False, "")])
def test_commands_say_that_pytorch_is_loaded_before_it_is(is_terminal, said):
    program = f"""
    import sys
    class Tap:
        encoding = "utf-8"
        def isatty(self):
            return {is_terminal}
        def write(self, text):
            assert "torch" not in sys.modules
            sys.stdout.write(text)
        def flush(self):
            pass
    class Blocked:
        def find_spec(self, name, *_):
            if name == "torch":
                raise KeyboardInterrupt
    sys.stderr = Tap()
    sys.meta_path.insert(0, Blocked())
    from xmag.cli import main
    for line in {_NEED_TORCH}:
        main(line.split())
    sys.stderr = sys.__stderr__
    """
    interrupted = "xmag: interrupted; what is written is whole\n"
    assert run_program(program) == (said + interrupted) * len(_NEED_TORCH)


def test_slides_are_made_without_waiting_for_pytorch():
    program = "import sys, xmag.demo\nxmag.demo.write_demo_slide\nprint('torch' in sys.modules)"
    assert run_program(textwrap.dedent(program)) == "False\n"


@pytest.mark.parametrize(
    ("script", "first"), [("make_cohort.py", "making slides:"), ("finetune.py", "xmag: loading")]
)
def test_the_first_line_of_an_example_comes_before_anything_heavy(script, first, tmp_path):
    program = """
    import runpy, sys
    class Terminal:
        def isatty(self):
            return True
        def write(self, text):
            if text.strip():
                sys.stderr = sys.__stderr__
                print(text.strip(), {"torch", "tifffile", "xmag.demo.slide"} & {*sys.modules})
                sys.exit()
        def flush(self):
            pass
    sys.argv, sys.stderr = sys.argv[1:], Terminal()
    runpy.run_path(sys.argv[0], run_name="__main__")
    """
    path = Path(__file__).parents[1] / "examples" / script
    printed = run_program(program, path, tmp_path, *["out"] * (script == "finetune.py"))
    assert re.fullmatch(f"{first}.* set\\(\\)\n", printed)


def test_a_slide_that_is_made_is_counted_from_its_first_step(tmp_path, monkeypatch):
    events, begun = [], []
    decode = mosaic.imagecodecs.avif_decode
    monkeypatch.setattr(
        mosaic.imagecodecs, "avif_decode", lambda x: begun.append(len(events)) or decode(x)
    )
    made = [tmp_path / "quiet.svs", tmp_path / "told.svs"]
    for path, progress in zip(made, (None, events.append), strict=True):
        write_demo_slide(path, size=(1200, 1030), progress=progress)
    assert begun == [0, 1]
    steps = 3 + 3 * 3  # pieces, and blocks of 1024 px
    assert [(event.what, event.done, event.total) for event in events] == [
        ("making a slide", done, steps) for done in range(steps + 1)
    ]
    assert made[0].read_bytes() == made[1].read_bytes()
