"""Many slides on a Dask cluster; run it again and it does what is missing.

    pip install xmag distributed
    python examples/cohort_dask.py slides/ features/ --scheduler tcp://head:8786

Start a worker a GPU, each with one thread: `dask worker tcp://head:8786 --nworkers 1 --nthreads 1`,
with CUDA_VISIBLE_DEVICES set for it or not. Without a scheduler, workers start on this machine.
"""

import argparse
import sys

from distributed import Client

import xmag


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("slides", help="a folder, a CSV with a column 'slide', or a URL")
    parser.add_argument("out", help="a folder that all workers see, or the URL of one in a store")
    parser.add_argument("--model", default="AI4PATH/XMAG")
    parser.add_argument("--scheduler", help="address of a running scheduler")
    parser.add_argument("--workers", type=int, default=1, help="without a scheduler: how many")
    args = parser.parse_args()

    options = {"n_workers": args.workers, "threads_per_worker": 1, "dashboard_address": ":0"}
    with Client(args.scheduler, **({} if args.scheduler else options)) as client:
        # Dask gives the work of a lost worker to another by itself.
        report = xmag.extract_cohort(
            args.slides, args.out, model=args.model, executor=client.get_executor()
        )
    for row in report:
        print(f"{row.status:8} {row.tiles:6} tiles  {row.slide}  {row.error}")
    return 1 if report.failed or report.lost else 0


if __name__ == "__main__":
    sys.exit(main())
