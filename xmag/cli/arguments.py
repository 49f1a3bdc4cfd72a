"""Arguments that several commands share."""

import argparse
from typing import TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_model(command: argparse.ArgumentParser) -> None:
    """Add --model, the encoder by name."""
    command.add_argument(
        "--model", metavar="NAME", help="a Hub name, a path, or xmag-mini (default: AI4PATH/XMAG)"
    )


def add_mpp(command: argparse.ArgumentParser) -> None:
    """Add --mpp, the scale of level 0."""
    command.add_argument(
        "--mpp", metavar="UM", type=float,
        help="µm per px of level 0, where the file's own is missing or wrong",
    )  # fmt: skip


def add_training(command: argparse.ArgumentParser) -> None:
    """Add the options for training a classifier."""
    command.add_argument(
        "--aggregator", metavar="NAME", default="abmil",
        help="abmil (default), mean, max, transmil or clam_sb",
    )  # fmt: skip
    command.add_argument(
        "--epochs", metavar="N", type=int, default=100,
        help="at most; training stops where validation gets no better (default: 100)",
    )  # fmt: skip
    add_seed(command)


def add_seed(command: argparse.ArgumentParser) -> None:
    """Add --seed, the seed of all draws."""
    command.add_argument(
        "--seed", metavar="N", type=int, default=0, help="of all draws (default: 0)"
    )
