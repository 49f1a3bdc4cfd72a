"""Flags of the command line: each has a test, and reaches the function that it is for."""

import ast
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

import xmag
from xmag.cli import main
from xmag.cli.commands import COMMANDS
from xmag.cli.table import Table
from xmag.errors import InputError

# ---- which tests use which flags ----


def texts_of(node):
    """Strings in a piece of code; of one that makes flags of names, these flags."""
    nodes = [*ast.walk(node)]
    found = {n.value.partition("=")[0] for n in nodes
             if isinstance(n, ast.Constant) and isinstance(n.value, str)}  # fmt: skip
    made = [n.values[0] for n in nodes if isinstance(n, ast.JoinedStr) and n.values]
    if any(isinstance(n, ast.Constant) and n.value == "--" for n in made):
        found |= {f"--{text.replace('_', '-')}" for text in found if text.isidentifier()}
    return found


def used_flags():
    """(command, flag) pairs of which a test has both: itself, or in the helpers that it names."""
    texts = [path.read_text("utf-8") for path in Path(__file__).parent.rglob("test_*.py")]
    found = (flags_in(ast.parse(text)) for text in texts if "from xmag.cli import" in text)
    return set().union(*found)


def flags_in(module):
    parts = {}
    for node in module.body:
        names = [node.name] if isinstance(node, ast.FunctionDef) else []
        if isinstance(node, ast.Assign):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        parts |= dict.fromkeys(names, node)

    def reached(name, seen):
        if name not in seen:
            seen.add(name)
            nodes = [*ast.walk(parts[name])]
            named = {n.id for n in nodes if isinstance(n, ast.Name)}
            named |= {n.arg for n in nodes if isinstance(n, ast.arg)}  # fixtures
            for other in named & parts.keys():
                reached(other, seen)
        return seen

    found = set()
    for name in parts:
        if name.startswith("test_"):
            texts = set().union(*(texts_of(parts[part]) for part in reached(name, set())))
            found |= {(command, text) for command in texts & COMMANDS.keys() for text in texts}
    return found


def test_every_flag_of_every_command_has_a_test():
    used = used_flags()
    flags = [
        (command, names) for command, about in COMMANDS.items() for names, _ in about.flags
        if names[0].startswith("-")
    ]  # fmt: skip
    assert len(flags) > 100
    missing = [
        f"xmag {command} {names[-1]}" for command, names in flags
        if not any((command, name) in used for name in names)
    ]  # fmt: skip
    assert missing == []
    assert any((command, "-v") in used for command in COMMANDS)  # all have it


def test_the_register_tells_what_is_used_from_what_is_not():
    module = ast.parse(
        "ARGS = ['extract', 'a.svs']\n"
        "def helper(x): return main([*ARGS, '--mpp=2', x])\n"
        "def test_one(tmp_path): helper('--redo')\n"
        "def test_other(): main(['info', *[f'--{n}' for n in ['some_flag']]])\n"
        "def unused(): main(['demo', '--out'])\n"
    )
    found = flags_in(module)
    assert {("extract", "--mpp"), ("extract", "--redo"), ("info", "--some-flag")} <= found
    assert not {("extract", "--some-flag"), ("info", "--redo"), ("demo", "--out")} & found


# ---- commands that were not run with all of their flags elsewhere ----


class RecordedError(InputError):
    """Raised where a call is recorded, and nothing after it is wanted."""


@pytest.fixture
def calls(monkeypatch):
    """The calls of the functions behind the commands, each as (name, positional, options)."""
    found = []

    def record(name, result=None, *, module="classify"):
        def call(*args, **options):
            found.append((name, args, options))
            if result is None:
                raise RecordedError(name)
            return result

        monkeypatch.setattr(f"xmag.cli.{module}.{name}", call)

    table = Table(slides=[("a",)], features=["a.h5"], ids=["a"], values=[], y=[1], patients=["p"])
    record("read_table", table)
    estimators = {
        task: lambda task=task, **options: found.append((task, (), options)) or _stop()
        for task in ("classification", "regression", "survival")
    }
    monkeypatch.setattr("xmag.cli.classify.ESTIMATORS", estimators)
    return SimpleNamespace(calls=found, record=record)


def _stop():
    raise RecordedError


TRAINING = ["--aggregator", "mean", "--epochs", "3", "--fusion", "late", "--seed", "4"]
TRAINING += ["--device", "cpu"]
TRAINED = {
    "aggregator": "mean", "epochs": 3, "fusion": "late", "random_state": 4, "device": "cpu"
}  # fmt: skip
HEADS = {
    "train": ["c.csv", "-o", "m"],
    "evaluate": ["c.csv", "-o", "m"],
    "compare": ["c.csv", "-o", "m", "--models", "x"],
}


@pytest.mark.parametrize("command", HEADS)
@pytest.mark.parametrize(
    ("args", "task", "columns", "options"),
    [
        ([*TRAINING, "--ordinal", "a", "b"], "classification", ("label",),
         {**TRAINED, "ordinal": ["a", "b"]}),
        (["--task", "regression", "--label", "x", "y"], "regression", ("x", "y"), {}),
        (["--task", "survival", "--time", "t", "--event", "e", "--loss", "nll"], "survival",
         ("e", "t"), {"loss": "nll"}),
    ],
)  # fmt: skip
def test_flags_of_training_are_options_of_the_estimator(
    command, args, task, columns, options, calls, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert main([command, *HEADS[command], *args]) == 2
    name, _, given = calls.calls[-1]
    assert (name, given) == (task, {"random_state": 0, **options})
    if command != "compare":  # which reads its tables when all else is said
        assert calls.calls[0][2]["target"].columns == columns


def test_flags_of_compare_are_options_of_the_function(calls, monkeypatch, tmp_path):
    monkeypatch.setattr("xmag.cli.classify.ESTIMATORS", {"classification": lambda **o: o})
    monkeypatch.setattr(
        "xmag.evaluate.compare", lambda *a, **o: calls.calls.append(("compare", a, o)) or _stop()
    )
    given = {
        "metric": "balanced_accuracy", "folds": 3, "repeats": 2, "gpus": "all", "mpp": 0.25,
        "region": 1, "dtype": "bfloat16", "device": "cuda:1",
    }  # fmt: skip
    args = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    assert main(["compare", *HEADS["compare"], *args, "--finetune"]) == 2
    _, _, options = calls.calls[-1]
    assert {name: options[name] for name in given} == given
    assert options["finetune"] is True
    assert options["estimator"] == {"random_state": 0, "device": "cuda:1"}


def test_flags_of_heatmap_open_the_slide_and_load_the_models(calls, tmp_path):
    """The dtype is that of the training, unless another one is given."""
    fitted = SimpleNamespace(fingerprint_={"dtype_class": "fp32"})
    calls.record("load_estimator", fitted)
    calls.record("Slide", nullcontext())
    calls.record("load_model")
    args = ["heatmap", "a.svs", "--classifier", "c", "--model", "m", "--mpp", "0.25"]
    args += ["--region", "2", "--device", "cuda:1"]
    assert main(args) == 2
    assert calls.calls == [
        ("load_estimator", ("c",), {"device": "cuda:1"}),
        ("Slide", ("a.svs",), {"mpp": 0.25, "region": 2}),
        ("load_model", ("m",), {"device": "cuda:1", "dtype": "float32"}),
    ]
    assert main([*args, "--dtype", "bfloat16"]) == 2
    assert calls.calls[-1] == ("load_model", ("m",), {"device": "cuda:1", "dtype": "bfloat16"})


def test_a_dtype_and_features_contradict_each_other(capsys):
    args = ["heatmap", "a.svs", "--classifier", "c", "--features", "f", "--dtype", "float32"]
    assert main(args) == 2
    assert "--features and --dtype are given" in capsys.readouterr().err


@pytest.mark.parametrize(
    "args",
    [
        ["predict", "a.h5", "--classifier", "c"],
        ["heatmap", "a.svs", "--classifier", "c"],
    ],
)
def test_a_classifier_is_loaded_on_the_device_that_is_given(args, calls):
    calls.record("load_estimator")
    for flags, device in ([], "auto"), (["--device", "cpu"], "cpu"):
        assert main([*args, *flags]) == 2
        assert calls.calls[-1] == ("load_estimator", ("c",), {"device": device})


def test_an_external_evaluation_has_its_device(calls):
    calls.record("load_estimator", module="tasks")
    args = ["evaluate", "c.csv", "-o", "m", "--classifier", "c", "--device", "cpu"]
    assert main(args) == 2
    assert calls.calls[-1] == ("load_estimator", ("c",), {"device": "cpu"})


def test_flags_of_report_are_options_of_the_page(calls, monkeypatch, tmp_path):
    (tmp_path / "report.csv").write_text("slide,status,tiles\na.svs,done,3\n")
    monkeypatch.setattr(
        xmag.CohortReport, "to_html",
        lambda _, path, **options: calls.calls.append((path.name, (), options)),
    )  # fmt: skip
    args = ["report", str(tmp_path), "-o", "x.html", "--slides", "s", "--classifier", "c"]
    args += ["--mask", "masks", "--roi", "regions"]
    assert main([*args, "--title", "T", "--max-mb", "2"]) == 0
    options = {
        "slides": "s",
        "tissue": "masks",
        "roi": "regions",
        "classifier": "c",
        "title": "T",
        "max_mb": 2.0,
    }
    assert calls.calls == [("x.html", (), options)]


@pytest.mark.parametrize(
    ("gpus", "there", "device"), [("2", 2, "cpu"), ("all", 4, "cpu"), ("1", 2, "auto"),
                                  ("all", 1, "auto"), (None, 2, "auto")],
)  # fmt: skip
def test_where_workers_load_the_model_it_takes_no_gpu_here(gpus, there, device, monkeypatch):
    """A dtype travels with the model; one GPU takes no worker, and computes in this process."""
    calls = []
    monkeypatch.setattr("torch.cuda.device_count", lambda: there)
    monkeypatch.setattr("xmag.encoder.load_model", lambda *a, **o: calls.append((a, o)) or "it")
    monkeypatch.setattr(
        "xmag.cohort.extract_cohort",
        lambda *_, **options: calls.append(options) or xmag.CohortReport(()),
    )
    args = ["extract", "a.svs", "-o", "o", "--model", "m", "--dtype", "float16"]
    assert main(args if gpus is None else [*args, "--gpus", gpus]) == 0
    assert calls[0] == (("m",), {"device": device, "dtype": "float16"})
    assert calls[1]["model"] == "it"
