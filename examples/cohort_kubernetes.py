"""One share of many slides, for an indexed job of Kubernetes: see cohort_kubernetes.yaml.

    JOB_COMPLETION_INDEX=0 python cohort_kubernetes.py slides.csv s3://bucket/out --shares 8

Every pod runs the same command, and does the slides of its index. When all are through, the command
without --shares does what may be missing, and writes the report of all.
"""

import argparse
import os
import sys

import xmag


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("slides", help="a folder, a CSV with a column 'slide', or a URL")
    parser.add_argument("out", help="a folder that all pods see, or the URL of one in a store")
    parser.add_argument("--model", default="AI4PATH/XMAG")
    parser.add_argument("--shares", type=int, help="how many pods there are: .spec.completions")
    args = parser.parse_args()

    shard = (int(os.environ["JOB_COMPLETION_INDEX"]), args.shares) if args.shares else None
    report = xmag.extract_cohort(args.slides, args.out, model=args.model, shard=shard)
    for row in report:
        print(f"{row.status:8} {row.tiles:6} tiles  {row.slide}  {row.error}")
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
