"""Two runs of one cohort over one output folder at the same time; in some, one of them is killed.

    python benchmarks/two_runs.py [--slides 40] [--repeats 20] [--processes 1] [--json OUT]

Counted are slides that were done by none of the two or by both, files that are not as an
undisturbed run makes them, and reports that are not whole. Where one run is killed (SIGKILL, at a
random instant) the other has to finish all the same.
"""

import argparse
import csv
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from common import report
from support.killing import Trial, rows_of, write_slides


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--slides", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        write_slides(Path(folder) / "slides", args.slides)
        trial = Trial(Path(folder) / "slides", Path(folder), processes=args.processes, pace_s=0.03)
        both = [both_to_the_end(trial) for _ in range(args.repeats)]
        one = [one_is_killed(trial, rng) for _ in range(args.repeats // 2)]
    rows = [summary("both run to the end", both), summary("one is killed", one)]
    report(
        f"two runs of {args.slides} slides over one folder", rows, args.json,
        shares=[repeat["shares"] for repeat in both],
    )  # fmt: skip


def both_to_the_end(trial: Trial) -> dict:
    runs = [rows_of(process) for process in [trial.start(), trial.start()]]
    done = Counter(row["slide"] for rows in runs for row in rows if row["status"] == "done")
    statuses = {row["status"] for rows in runs for row in rows}
    shares = [sum(row["status"] == "done" for row in rows) for rows in runs]
    return checked(trial, done, statuses) | {"shares": shares}


def one_is_killed(trial: Trial, rng: random.Random) -> dict:
    killed, other = trial.start(), trial.start()
    while len(trial.outputs()) < 4:
        time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.3))
    with killed:
        killed.kill()
        killed.communicate()
    rows = rows_of(other)
    done = Counter({row["slide"]: 1 for row in rows if row["status"] in ("done", "skipped")})
    return checked(trial, done, {row["status"] for row in rows})


def checked(trial: Trial, done: Counter, statuses: set) -> dict:
    """What is wrong after both have ended; empties the folder."""
    with (trial.out / "report.csv").open(newline="", encoding="utf-8") as file:
        listed = [row["slide"] for row in csv.DictReader(file)]
    names = [f"{name}.svs" for name in trial.names]
    found = {
        "done twice": sum(done[name] > 1 for name in names),
        "done by none": sum(done[name] == 0 for name in names),
        "other rows": sorted(statuses - {"done", "skipped"}),
        "files not right": len(trial.lost()) + len(trial.missing()),
        "report not whole": int(listed != names),
        "locks left": len(list(trial.out.rglob(".*.xmag-lock"))),
    }
    shutil.rmtree(trial.out)
    return found


def summary(name: str, repeats: list[dict]) -> dict:
    return {
        "": name,
        "repetitions": len(repeats),
        **{
            key: sum(len(r[key]) if isinstance(r[key], list) else r[key] for r in repeats)
            for key in ("done twice", "done by none", "other rows", "files not right",
                        "report not whole", "locks left")
        },
    }  # fmt: skip


if __name__ == "__main__":
    main()
