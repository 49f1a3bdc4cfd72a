"""Many slides in, a folder of feature files out; run it again and it does what is missing."""

import argparse
import sys
from pathlib import Path

import xmag


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("slides", type=Path, help="a folder, or a CSV with a column 'slide'")
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="AI4PATH/XMAG")
    args = parser.parse_args()

    encoder = xmag.load_model(args.model)
    report = xmag.extract_cohort(args.slides, args.out, model=encoder, overlay=True)
    for row in report:
        print(f"{row.status:8} {row.tiles:6} tiles {row.seconds:6.1f} s  {row.slide}  {row.error}")
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
