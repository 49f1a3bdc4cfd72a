"""Makes a cohort to try things on: slides of real tissue, with tumour and without, and its CSV.

All are put together of the same 24 fields, so figures on them say nothing of any model.
"""

import argparse
import csv
import io
from pathlib import Path

from xmag.demo import write_demo_slide
from xmag.files import write_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--slides", type=int, default=24)
    parser.add_argument("--size", type=int, nargs=2, default=(4500, 3400), help="level-0 px")
    args = parser.parse_args()
    (args.out / "slides").mkdir(parents=True, exist_ok=True)
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(["slide", "label", "patient"])
    for number in range(args.slides):
        tumour = number // 2 % 2 == 1  # two slides each patient
        name = f"slides/{number:02}.svs"
        write_demo_slide(args.out / name, size=tuple(args.size), seed=number, tumour=tumour)
        rows.writerow([name, "tumour" if tumour else "normal", f"patient {number // 2}"])
    write_text(args.out / "cohort.csv", table.getvalue())
    print(f"{args.slides} slides, {args.out / 'cohort.csv'}")


if __name__ == "__main__":
    main()
