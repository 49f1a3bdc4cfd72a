"""Makes a cohort to try things on: slides of real tissue, with tumour and without, and its CSV.

All are put together of the same 24 fields, so figures on them say nothing of any model. Each
patient has two slides. With --survival, none, one or both have tumour, which drives the hazard.
"""

import argparse
import csv
import io
from pathlib import Path

import numpy as np

from xmag import demo
from xmag.files import write_text
from xmag.progress import progress_bar

_LOG_HAZARD = 2.0
"""Log hazard of a patient for each slide with tumour."""
_MONTHS = 120
"""Mean time to the event without tumour."""
_FOLLOW_UP = (24, 96)
"""Months after which patients are lost from sight."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--slides", type=int, default=24)
    parser.add_argument("--size", type=int, nargs=2, default=(4500, 3400), help="level-0 px")
    parser.add_argument("--survival", action="store_true", help="time and event instead of labels")
    args = parser.parse_args()
    (args.out / "slides").mkdir(parents=True, exist_ok=True)
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    known = ["time", "event", "log_hazard"] if args.survival else ["label"]
    rows.writerow(["slide", *known, "patient"])
    rng = np.random.default_rng(0)
    bar = progress_bar(None, total=args.slides, desc="making slides", unit="slide")
    for patient in range((args.slides + 1) // 2):
        if args.survival:
            # None, the first, the second or both: half of the patients have tumour in one block.
            tumours = [patient % 4 in (1, 3), patient % 4 in (2, 3)]
            values = survival_of(sum(tumours), rng)
        else:
            tumours = [patient % 2 == 1] * 2
            values = ["tumour" if tumours[0] else "normal"]
        for number in range(2 * patient, min(2 * patient + 2, args.slides)):
            name = f"slides/{number:02}.svs"
            tumour = tumours[number % 2]
            demo.write_demo_slide(
                args.out / name, size=tuple(args.size), seed=number, tumour=tumour, progress=False
            )
            rows.writerow([name, *values, f"patient {patient}"])
            bar.update()
    bar.close()
    write_text(args.out / "cohort.csv", table.getvalue())
    print(f"{args.slides} slides, {args.out / 'cohort.csv'}")


def survival_of(blocks: int, rng: np.random.Generator) -> list[str]:
    """Time in months, event and log hazard of a patient with tumour in so many blocks."""
    log_hazard = _LOG_HAZARD * blocks
    event, lost = rng.exponential(_MONTHS * np.exp(-log_hazard)), rng.uniform(*_FOLLOW_UP)
    return [f"{min(event, lost):.1f}", str(int(event <= lost)), str(log_hazard)]


if __name__ == "__main__":
    main()
