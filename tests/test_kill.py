"""Killed and resumed: a short form of benchmarks/kill.py, which kills eighty times."""

import os
import random
import shutil
from pathlib import Path

import pytest
from support.killing import STEPS, Trial, write_slides

pytestmark = pytest.mark.skipif(
    os.name == "nt" or not Path("/proc/self/stat").exists(), reason="looks into /proc"
)


def test_a_cohort_killed_at_each_step_and_at_random_is_finished_by_the_same_call(tmp_path):
    write_slides(tmp_path / "slides", 28)
    trial = Trial(tmp_path / "slides", tmp_path, processes=1, pace_s=0.2, on_mismatch="redo")
    rng = random.Random(0)
    for step in STEPS:
        assert_harmless(trial.kill_at_step(step, nth=3))
    for _ in range(2):
        assert_harmless(trial.kill_at_random(rng, within_s=0.05))
    assert trial.missing()

    cut, foreign = sorted(trial.outputs())[:2]
    whole = trial.path(cut).read_bytes()
    trial.path(cut).write_bytes(whole[: len(whole) * 2 // 3])
    slide = str(trial.slides / f"{foreign}.svs")
    trial.run_to_end(slides=slide, out=str(tmp_path / "other"), encoder_name="others")
    shutil.copy(tmp_path / "other" / f"{foreign}.h5", trial.path(foreign))
    assert sorted(trial.lost()) == [cut, foreign]

    before = trial.outputs()
    with trial.start(on_mismatch="error") as refused:
        assert refused.wait() == 1
        assert f"{foreign}.h5 is there already, but was made differently" in refused.stderr.read()
        refused.stdout.read()
    assert trial.outputs() == before

    rows = trial.run_to_end()
    assert {row["status"] for row in rows} == {"done", "skipped"}
    assert trial.lost() == trial.missing() == []
    after = trial.outputs()
    assert {name for name in before if after[name] != before[name]} == {cut, foreign}


def assert_harmless(kill):
    assert kill["was killed"], kill
    assert kill["there"] >= 2, kill
    assert not kill["touched"], kill
    assert not kill["lost"], kill
    assert not kill["children left"], kill
