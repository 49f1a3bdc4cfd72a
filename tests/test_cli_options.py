"""Flags of the command line beside the options of the Python functions that they are for."""

import inspect
import re
from pathlib import Path

import pytest

import xmag
import xmag.cohort
from xmag import evaluate
from xmag.cli import main
from xmag.cli.commands import COMMANDS
from xmag.demo import run_demo
from xmag.distill.run import run_config
from xmag.finetune import Settings, TileOptions, finetune_slides
from xmag.mil import load_estimator

_OF_PROGRAMS = {"slides", "out", "progress", "transform", "executor", "shards", "tile_spec"}
"""What a command line does not have: callables, and what has no flag as it is an argument."""


def options_of(*functions):
    found = {}
    for function in functions:
        found |= inspect.signature(function).parameters
    return {n: p.default for n, p in found.items() if n not in _OF_PROGRAMS}


def flags_of(command):
    found = {}
    for names, options in COMMANDS[command].flags:
        name = next((n for n in names if n.startswith("--")), names[0])
        found[options.get("dest", name.lstrip("-").replace("-", "_"))] = options["help"] or ""
    return found


def test_extract_has_a_flag_for_every_option_of_extract_cohort():
    assert options_of(xmag.extract_cohort).keys() <= flags_of("extract").keys()
    assert {"device", "dtype"} <= flags_of("extract").keys()


FUNCTIONS = [
    ("info", [xmag.Slide], 0),
    ("extract", [xmag.extract_cohort, xmag.load_model], 8),
    ("demo", [run_demo], 0),
    ("train", [xmag.MILClassifier], 4),
    ("train", [xmag.MILRegressor], 4),
    ("train", [xmag.MILSurvival], 5),
    ("predict", [load_estimator], 1),
    ("evaluate", [evaluate.cross_validate, xmag.MILClassifier], 6),
    ("compare", [evaluate.compare, xmag.MILClassifier], 7),
    ("heatmap", [xmag.draw.heatmap, xmag.draw.gallery, load_estimator], 2),
    ("finetune", [finetune_slides, Settings, TileOptions], 10),
    ("report", [xmag.CohortReport.to_html], 1),
    ("export", [xmag.FeatureBag.export], 0),
    ("distill", [run_config], 0),
]
"""Commands, the functions behind each, and of how many of their options help tells the default."""

_ALONE = {"check", "doctor", "examples", "completion"}
"""Commands without a function of Python's."""


def test_every_command_is_compared_with_its_functions():
    assert {command for command, *_ in FUNCTIONS} == COMMANDS.keys() - _ALONE
    assert not any(names[0].startswith("-") for c in _ALONE for names, _ in COMMANDS[c].flags)


@pytest.mark.parametrize(("command", "functions", "least"), FUNCTIONS)
def test_the_defaults_that_help_tells_are_those_of_the_functions(command, functions, least):
    """What is not given is not passed on, so that help alone could tell others."""
    said = flags_of(command)
    compared = 0
    for name, default in options_of(*functions).items():
        text = said.get(name, "")
        # A program may have no seed; the commands have one. --redo is a switch.
        if name in said and name not in ("random_state", "model", "on_mismatch"):
            found = re.findall(
                r"default: ([\w./-]+)|([\w.-]+) \(default\)|\(([\w.-]+), default\)", text
            )
            told = {word for words in found for word in words if word}
            is_none = any(default is none for none in (None, False, inspect.Parameter.empty))
            wanted = set() if is_none else {f"{default}"}
            if isinstance(default, float):
                wanted = {f"{default:g}"}
            assert told == wanted, (command, name, text)
            compared += bool(wanted)
    assert compared >= least


def calls_of(monkeypatch):
    calls = []
    signature = inspect.signature(xmag.extract_cohort)

    def record(*args, **options):
        calls.append(signature.bind(*args, **options).arguments)
        return xmag.cohort.CohortReport(())

    monkeypatch.setattr("xmag.cohort.extract_cohort", record)
    return calls


def test_flags_of_extract_are_options_of_extract_cohort_and_its_defaults_hold(monkeypatch):
    """What is given is passed on under its option's name, and nothing that is not given."""
    flags = {
        "model": "xmag-mini", "format": "safetensors", "border": "drop", "damaged": "drop",
        "slide_timeout": 9.0, "mpp": 0.25, "overlay": True, "on_mismatch": "redo", "shard": (1, 4),
        "gpus": 2, "region": 1,
    }  # fmt: skip
    args = ["--overlay", "--redo", "--shard", "1/4", "--gpus", "2"]
    for name in ("model", "format", "border", "damaged", "slide_timeout", "mpp", "region"):
        args += [f"--{name.replace('_', '-')}", str(flags[name])]
    calls = calls_of(monkeypatch)
    assert main(["extract", "a.svs", "-o", "out"]) == 0
    assert main(["extract", "a.svs", "b.svs", "-o", "out", *args]) == 0
    assert calls[0] == {"slides": "a.svs", "out": "out"}
    assert calls[1] == {"slides": ["a.svs", "b.svs"], "out": "out", **flags}
    assert main(["extract", "a.svs", "-o", "out", "--model", "a", "--model", "b"]) == 0
    assert calls[2]["model"] == ["a", "b"]


@pytest.mark.parametrize(
    ("args", "given"),
    [
        (["--tissue", "none"], {"tissue": None}),
        (["--tissue", "auto"], {"tissue": "auto"}),
        (["--min-tissue", "0.4"], {"min_tissue": 0.4}),
        (["--min-tissue", "none"], {"min_tissue": None}),
        (["--overlap", "32"], {"overlap": 32}),
        (["--roi", "regions"], {"roi": "regions"}),
        (["--mask", "masks"], {"tissue": Path("masks")}),
        (["--mask", "auto"], {"tissue": Path("auto")}),
        (["--batch-size", "8"], {"batch_size": 8}),
        (["--processes", "0"], {"processes": 0}),
        (["--memory-limit", "2g"], {"memory_limit": 2 << 30}),
        (["--memory-limit", "268435456"], {"memory_limit": 268435456}),
    ],
)
def test_a_flag_of_extract_is_the_option_of_its_name(args, given, monkeypatch):
    calls = calls_of(monkeypatch)
    assert main(["extract", "a.svs", "-o", "out", *args]) == 0
    assert calls == [{"slides": "a.svs", "out": "out", **given}]


@pytest.mark.parametrize(
    "args",
    [
        ["--tissue", "mask.png"],
        ["--min-tissue", "half"],
        ["--memory-limit", "2 pages"],
        ["--memory-limit", ""],
        ["--overlap", "none"],
    ],
)
def test_values_that_make_no_sense_are_refused_with_the_usage(args, capsys):
    assert main(["extract", "a.svs", "-o", "out", *args]) == 2
    assert capsys.readouterr().err.startswith("usage: xmag extract")


def test_a_mask_and_a_way_to_find_tissue_contradict_each_other(capsys):
    assert main(["extract", "a.svs", "-o", "out", "--mask", "m", "--tissue", "none"]) == 2
    assert "--mask and --tissue both say where tissue is" in capsys.readouterr().err


def test_extract_loads_the_models_on_the_device_and_in_the_dtype_that_are_given(monkeypatch):
    calls = calls_of(monkeypatch)
    args = ["extract", "a.svs", "-o", "out", "--model", "xmag-mini"]
    assert main([*args, "--dtype", "bfloat16", "--device", "cpu"]) == 0
    (call,) = calls
    assert (str(call["model"].dtype), call["model"].device.type) == ("torch.bfloat16", "cpu")


def test_a_device_or_a_dtype_that_is_none_is_an_error(capsys):
    args = ["extract", "a.svs", "-o", "out", "--model", "xmag-mini"]
    assert main([*args, "--dtype", "int8"]) == 2
    assert "dtype='int8' is unknown" in capsys.readouterr().err
    assert main([*args, "--device", "abacus"]) == 2
    assert "device='abacus' is unknown" in capsys.readouterr().err
    assert main([*args, "--device", "cpu", "--gpus", "2"]) == 2
    assert "--gpus and --device both say" in capsys.readouterr().err


def test_an_option_that_is_unknown_shows_the_help_of_its_command(capsys):
    assert main(["extract", "a.svs", "-o", "out", "--min-tisue=0.5"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("usage: xmag extract ")
    assert "smallest share of a tile" in err
    assert err.splitlines()[-1] == (
        "xmag extract: error: unrecognized arguments: --min-tisue=0.5; did you mean --min-tissue?"
    )


def test_without_a_command_help_is_shown(capsys):
    assert main([]) == 2
    err = capsys.readouterr().err
    assert "extract the features of slides" in err
    assert "examples:" in err
