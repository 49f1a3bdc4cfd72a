"""The commands finetune, examples and completion."""

import csv
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

import xmag
from xmag.cli import main
from xmag.cli.commands import COMMANDS
from xmag.demo import write_demo_slide
from xmag.finetune import Settings, TileOptions
from xmag.mil import MILClassifier

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """A CSV of four slides of as many patients, one with a µm/px of its own."""
    folder = tmp_path_factory.mktemp("cohort")
    with (folder / "cohort.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["slide", "grade", "patient", "mpp"])
        for n in range(4):
            write_demo_slide(folder / f"{n}.svs", size=(2400, 1800), seed=n)
            rows.writerow([f"{n}.svs", "ab"[n % 2], f"p{n}", "0.5" if n == 3 else ""])
    return folder / "cohort.csv"


def test_finetune_writes_a_model_for_both_loaders_and_goes_on(cohort, tmp_path, capsys):
    args = ["finetune", str(cohort), "-o", str(tmp_path / "model"), "--model", "xmag-mini"]
    args += ["--label", "grade", "--epochs", "1", "--mode", "sampled", "--sampled-tiles", "2"]
    args += ["--aggregator", "mean", "--tissue", "none", "--device", "cpu"]
    assert main(args) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("epoch 0: loss ")
    assert out[-1].startswith(f"saved     {tmp_path / 'model'}: ")
    assert xmag.load_model(tmp_path / "model", device="cpu").embed_dim == 384
    assert list(MILClassifier.load(tmp_path / "model").classes_) == ["a", "b"]
    made = (tmp_path / "model" / "run" / "checkpoint.safetensors").stat().st_mtime_ns
    assert main(args) == 0
    assert capsys.readouterr().out.splitlines()[0] == out[0]  # its seconds too: nothing was trained
    assert (tmp_path / "model" / "run" / "checkpoint.safetensors").stat().st_mtime_ns == made


def test_flags_of_finetune_reach_the_function_its_settings_and_its_tiles(
    cohort, tmp_path, monkeypatch
):
    calls = []

    def record(slides, labels, **options):
        calls.append((slides, labels, options))
        return SimpleNamespace(save=lambda _: None, history=(), best_epoch=None)

    monkeypatch.setattr("xmag.cli.finetune.finetune_slides", record)
    args = ["finetune", str(cohort), "-o", str(tmp_path / "m"), "--label", "grade"]
    assert main(args) == 0
    slides, labels, options = calls[0]
    assert slides[:3] == [cohort.parent / f"{n}.svs" for n in range(3)]
    assert (slides[3].name, slides[3].mpp) == ("3.svs", 0.5)
    assert (labels, options["groups"]) == (["a", "b", "a", "b"], ["p0", "p1", "p2", "p3"])
    assert options["settings"] == Settings()
    assert options["tiles"] == TileOptions()
    assert options.keys() == {"groups", "settings", "tiles", "checkpoint"}
    given = {
        "epochs": 3, "patience": None, "slides_per_step": 2, "sampled_tiles": 7, "chunk_tiles": 8,
        "learning_rate": 1e-4, "frozen_blocks": 2, "precision": "float32", "min_tissue": 0.5,
        "border": "drop", "mpp": 0.25, "memory_gib": 2.0, "mode": "exact", "device": "cpu",
        "tissue": None, "seed": 5, "aggregator": "max", "model": "xmag-mini",
    }  # fmt: skip
    for name, value in given.items():
        args += [f"--{name.replace('_', '-')}", str(value)]
    assert main(args) == 0
    _, _, options = calls[1]
    given["random_state"] = given.pop("seed")
    for name, value in given.items():
        places = [getattr(options[part], name, "no") for part in ("settings", "tiles")]
        assert value in [options.get(name, "no"), *places], name


def test_examples_are_copied_and_what_was_changed_stays(tmp_path, capsys):
    assert main(["examples", str(tmp_path / "mine")]) == 0
    copied = {path.name: path.read_bytes() for path in (tmp_path / "mine").iterdir()}
    assert copied == {path.name: path.read_bytes() for path in EXAMPLES.glob("*.*")}
    assert f"{len(copied)} examples in " in capsys.readouterr().out
    (tmp_path / "mine" / "distill.toml").write_text("mine")
    (tmp_path / "mine" / "README.md").unlink()
    assert main(["examples", str(tmp_path / "mine")]) == 1
    assert "distill.toml is there and differs" in capsys.readouterr().err
    assert (tmp_path / "mine" / "distill.toml").read_text() == "mine"
    assert (tmp_path / "mine" / "README.md").is_file()


COMPLETED = [
    (["in"], ["info"]),
    ([""], [*COMMANDS]),
    (["extract", "a.svs", "--min"], ["--min-tissue"]),
    (["extract", "a.svs", "--format", ""], ["h5", "safetensors"]),
    (["completion", ""], ["bash", "zsh"]),
    (["extract", ""], []),  # a file
    (["no-such", "--"], []),
]


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(("words", "found"), COMPLETED)
def test_bash_completes_commands_options_and_choices(words, found, capsys):
    assert main(["completion", "bash"]) == 0
    typed = " ".join(f"'{word}'" for word in ["xmag", *words])
    script = f"{capsys.readouterr().out}\nCOMP_WORDS=({typed}); COMP_CWORD={len(words)}; _xmag\n"
    done = subprocess.run(
        ["bash", "--norc", "-c", script + 'echo "${COMPREPLY[@]}"'],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert (done.stdout.split(), done.stderr) == (found, "")


def test_zsh_gets_the_same_through_its_bashcompinit(capsys):
    assert main(["completion", "bash"]) == 0
    bash = capsys.readouterr().out
    assert main(["completion", "zsh"]) == 0
    zsh = capsys.readouterr().out
    assert zsh.endswith(bash)
    assert "bashcompinit" in zsh
    assert main(["completion", "fish"]) == 2
