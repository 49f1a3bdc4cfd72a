"""Cohorts killed at random instants and at each step of writing a file, and resumed.

    python benchmarks/kill.py [--slides 200] [--kills 60] [--processes 1] [--json OUT]

Each run goes on with what the one before left, over the same folder, by the same call. Half of the
kills at random instants (SIGKILL) take the program alone, half its decoding processes too. After
each of them, all files under final names are read and compared with an undisturbed run's, those
that were there before have to have the same inode and time, and no process may be left. Once, a
file is cut short and another is replaced by one of another model: both have to be found.
"""

import argparse
import random
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from common import report
from support.killing import STEPS, Trial, write_slides

_LEFT_FOR_A_KILL = 12
"""Slides that must be missing before a run that is to be killed with at least one missing."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--slides", type=int, default=200)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--kills-a-step", type=int, default=4)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_slides(work / "slides", args.slides)
        trial = Trial(
            work / "slides", work, processes=args.processes, pace_s=0.02, on_mismatch="redo"
        )
        todo = ["random instant"] * args.kills + list(STEPS) * args.kills_a_step
        kills, ends = run_all(trial, todo, rng)
        planted = plant_and_find(trial)
    rows = [summary(how, [kill for kill in kills if kill["how"] == how])
            for how in ("random instant", *STEPS)]  # fmt: skip
    report(
        f"kills of a cohort of {args.slides} slides, {args.processes} decoding processes",
        rows, args.json, ends=ends, planted=planted,
    )  # fmt: skip
    lost = sum(len(kill["lost"]) for kill in kills) + sum(end["lost"] for end in ends)
    count = sum(kill["counts"] for kill in kills)
    print(f"{count} kills, {lost} lost; planted files found: {planted}")


def run_all(trial: Trial, todo: list[str], rng: random.Random) -> tuple[list[dict], list[dict]]:
    """What each kill did, and what was there when each chain of runs had come to its end."""
    kills, ends = [], []
    todo = rng.sample(todo, len(todo))
    while todo:
        how = todo.pop()
        if how == "random instant":
            kill = trial.kill_at_random(rng, within_s=0.25)
        else:
            kill = trial.kill_at_step(how, nth=rng.randint(2, 6))
        kill["counts"] = kill["was killed"] and kill["there"] >= 2 and kill["missing"] >= 1
        kills.append(kill)
        if not kill["counts"]:  # too early or too late: it has to have gone well all the same
            todo.append(how)
        print(f"{len(kills)} runs, {len(todo)} to come: {kill}", file=sys.stderr)
        if len(trial.missing()) < _LEFT_FOR_A_KILL or not todo:
            ends.append(finish(trial))
            if todo:
                shutil.rmtree(trial.out)
    return kills, ends


def finish(trial: Trial) -> dict:
    """Let the last run go to its end; what is wrong then."""
    before = trial.outputs()
    rows = trial.run_to_end()
    after = trial.outputs()
    return {
        "statuses": dict(Counter(row["status"] for row in rows)),
        "touched": [name for name in before if after[name] != before[name]],
        "lost": len(trial.missing()) + len(trial.lost()),
    }


def plant_and_find(trial: Trial) -> dict:
    """Whether a file cut short, and one of another model, are found among those that are right."""
    cut, foreign = trial.names[3], trial.names[5]
    whole = trial.path(cut).read_bytes()
    trial.path(cut).write_bytes(whole[: len(whole) * 2 // 3])
    other = trial.work / "other"
    slide = str(trial.slides / f"{foreign}.svs")
    trial.run_to_end(slides=slide, out=str(other), encoder_name="others")
    shutil.copy(other / f"{foreign}.h5", trial.path(foreign))
    wrong = trial.lost()
    before = trial.outputs()
    refused = trial.start(on_mismatch="error")
    _, told = refused.communicate()
    rows = trial.run_to_end()
    after = trial.outputs()
    return {
        "refused with the reason": "MismatchError" in told and f"{foreign}.h5" in told,
        "wrong before": sorted(wrong) == sorted([cut, foreign]),
        "made again": sorted(Path(r["slide"]).stem for r in rows if r["status"] == "done"),
        "touched": [n for n in before if n not in (cut, foreign) and after[n] != before[n]],
        "wrong after": trial.lost(),
    }


def summary(how: str, kills: list[dict]) -> dict:
    counting = [kill for kill in kills if kill["counts"]]
    return {
        "killed at": how,
        "kills": len(counting),
        "least there": min((kill["there"] for kill in counting), default=0),
        "least missing": min((kill["missing"] for kill in counting), default=0),
        "files lost": sum(len(kill["lost"]) for kill in kills),
        "finished files touched": sum(len(kill["touched"]) for kill in kills),
        "children left": sum(len(kill["children left"]) for kill in kills),
    }


if __name__ == "__main__":
    main()
