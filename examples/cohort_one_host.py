"""Many slides on all GPUs of this machine, a worker each; run it again and it does what is missing.

python examples/cohort_one_host.py slides/ features/

`xmag extract slides/ -o features --gpus all` does the same; this is how with a pool of your own.
"""

import argparse
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor

import torch

import xmag


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("slides", help="a folder, a CSV with a column 'slide', or a URL")
    parser.add_argument("out", help="a folder, or the URL of one in a store")
    parser.add_argument("--model", default="AI4PATH/XMAG")
    parser.add_argument("--workers", type=int, default=max(1, torch.cuda.device_count()))
    args = parser.parse_args()

    def pool() -> ProcessPoolExecutor:
        # CUDA cannot be used in a fork of a process that has used it.
        return ProcessPoolExecutor(args.workers, mp_context=multiprocessing.get_context("spawn"))

    # The function rather than a pool: a pool that breaks is made again.
    report = xmag.extract_cohort(args.slides, args.out, model=args.model, executor=pool)
    for row in report:
        print(f"{row.status:8} {row.tiles:6} tiles  {row.slide}  {row.error}")
    return 1 if report.failed or report.lost else 0


if __name__ == "__main__":
    sys.exit(main())
