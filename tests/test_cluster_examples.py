"""The scripts for clusters, run on engines of this machine."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from support.slides import texture, write_svs

import xmag

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = ("a", "b", "c")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("slides")
    pixels = texture(1800, 950)
    for number, name in enumerate(NAMES):
        part = pixels[:, : 950 + 400 * number]
        write_svs(root / f"{name}.svs", pixels=part, mpp=0.5, power=20, levels=(1, 4))
    return root


@pytest.fixture(scope="module")
def local(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("local")
    xmag.extract_cohort(folder, out, model="xmag-mini")
    return out


@pytest.fixture
def run(folder, local, tmp_path, monkeypatch, capsys):
    """Runs a script as a user does, and compares what it wrote with the local outputs."""

    def run(script, *arguments, names=NAMES):
        out = tmp_path / "out"
        command = [script, folder, out, "--model", "xmag-mini", *arguments]
        monkeypatch.setattr(sys, "argv", [str(part) for part in command])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        assert end.value.code == 0
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == len(names)
        for line, name in zip(lines, names, strict=True):
            assert line.startswith("done ")
            assert f"{name}.svs" in line
            bags = [xmag.FeatureBag.load(folder / f"{name}.h5") for folder in (out, local)]
            assert np.array_equal(bags[0].features, bags[1].features)
            assert bags[0].provenance.fingerprint == bags[1].provenance.fingerprint

    return run


def test_one_host(run):
    run("cohort_one_host.py", "--workers", 1)


def test_slurm_through_submitit(run, tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.setenv("PYTHONPATH", str(Path(xmag.__file__).parents[1]))
    run("cohort_slurm.py", "--cluster", "local", "--jobs", 1, "--logs", tmp_path / "logs")


def test_dask(run):
    pytest.importorskip("distributed")
    run("cohort_dask.py")


def test_each_pod_of_a_kubernetes_job_does_its_share(run, monkeypatch):
    for index, names in ((0, ("a", "c")), (1, ("b",))):
        monkeypatch.setenv("JOB_COMPLETION_INDEX", str(index))
        run("cohort_kubernetes.py", "--shares", 2, names=names)


def test_the_kubernetes_job_runs_the_script_with_its_number_of_pods():
    job = yaml.safe_load((EXAMPLES / "cohort_kubernetes.yaml").read_text())
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert Path(container["command"][1]).name == "cohort_kubernetes.py"
    shares = int(container["args"][container["args"].index("--shares") + 1])
    assert job["spec"]["completionMode"] == "Indexed"
    assert shares == job["spec"]["completions"] == job["spec"]["parallelism"]


def test_the_benchmark_of_two_gpus_runs_where_there_are_none(folder, tmp_path, monkeypatch):
    benchmarks = EXAMPLES.parent / "benchmarks"
    monkeypatch.syspath_prepend(str(benchmarks))
    main = runpy.run_path(str(benchmarks / "two_gpus.py"), run_name="two_gpus")["main"]
    main([str(folder), "--slides", "4", "--model", "xmag-mini", "--json", str(tmp_path / "json")])
    here, one, two = json.loads((tmp_path / "json").read_text())["rows"]
    assert (here["workers"], one["workers"], two["workers"]) == (0, 1, 2)
    assert one["x one"] == 1
    assert two["slides/min"] / one["slides/min"] == pytest.approx(two["x one"])
