"""Many slides on a SLURM cluster, through submitit; run it again and it does what is missing.

    pip install xmag submitit
    python examples/cohort_slurm.py slides/ features/ --jobs 8 --partition gpu

Run it where jobs are submitted, for as long as they take (tmux, or a small job of its own). Slides,
outputs and the cache of the Hub (HF_HOME) have to lie where all nodes see them.
"""

import argparse
import sys
from pathlib import Path

import submitit

import xmag


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("slides", help="a folder, a CSV with a column 'slide', or a URL")
    parser.add_argument("out", help="a folder that all nodes see, or the URL of one in a store")
    parser.add_argument("--model", default="AI4PATH/XMAG")
    parser.add_argument("--jobs", type=int, default=8, help="jobs, with a GPU each")
    parser.add_argument("--partition")
    parser.add_argument("--hours", type=int, default=12, help="time limit of a job")
    parser.add_argument("--logs", type=Path, default=Path("slurm-logs"))
    parser.add_argument("--cluster", help="'local' runs the jobs on this machine, to try it out")
    args = parser.parse_args()

    def executor() -> submitit.Executor:
        made = submitit.AutoExecutor(folder=args.logs, cluster=args.cluster)
        made.update_parameters(timeout_min=60 * args.hours, gpus_per_node=1, name="xmag")
        if args.cluster != "local":
            made.update_parameters(cpus_per_task=16, mem_gb=64)
        if args.partition:
            made.update_parameters(slurm_partition=args.partition)
        return made

    # The function rather than an executor: what a lost job had not done is submitted again.
    report = xmag.extract_cohort(
        args.slides, args.out, model=args.model, executor=executor, shards=args.jobs
    )
    for row in report:
        print(f"{row.status:8} {row.tiles:6} tiles  {row.slide}  {row.error}")
    return 1 if report.failed or report.lost else 0


if __name__ == "__main__":
    sys.exit(main())
