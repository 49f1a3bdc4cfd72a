"""Can the confidence of a MIL classifier be trusted: calibration, and novelty of a shifted cohort?

    python benchmarks/mil_confidence.py [--json FILE]

Calibration: a classifier is trained on planted cases with their labels, and a fifth of the labels
of new ones is another. Expected calibration error (10 bins) of 400 cases before and after a
temperature from 200 others. Novelty: 20, 50 and 200 training cases; new cases of the same cohort
against the held-out distances of the training ones (0.5 is right), and against new cases whose
features are shifted by as much as tiles vary (1 is right). Beside `novelty`, which is of the mean
of a case's tiles, the same measure of `embed`, the vectors that the trained network pools. Some
minutes on one core.
"""

import argparse
import statistics
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parent))

from common import report, table
from sklearn.metrics import log_loss, roc_auc_score
from support.mil_cohort import planted_cohort

from xmag.errors import XmagWarning
from xmag.mil import MILClassifier
from xmag.mil.confidence import Novelty

CONTENDERS: dict[str, dict[str, Any]] = {
    "abmil": {"aggregator_options": {"embed_dim": 128, "attention_dim": 64}},
    "transmil": {"aggregator_options": {"embed_dim": 32, "heads": 4, "landmarks": 16}},
}
COHORT: dict[str, Any] = {"dim": 256, "tiles": 50, "planted": 0.04}
NOISE = 0.2
BINS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", XmagWarning)
    calibrated = [calibration(seed) for seed in range(options.seeds)]
    print(f"\nCalibration\n\n{table(calibrated)}")
    rows = [
        novelty(name, params, count, options.seeds)
        for name, params in CONTENDERS.items()
        for count in (20, 50, 200)
    ]
    report("Novelty", rows, options.json, cohort=COHORT, calibration=calibrated)


def classifier(seed: int, **params: Any) -> MILClassifier:
    return MILClassifier(
        lr=1e-3, epochs=60, random_state=seed, device="cpu", progress=False, **params
    )


def calibration(seed: int) -> dict[str, Any]:
    shape = {"dim": 32, "tiles": 50, "planted": 0.1}
    train, held, test = (planted_cohort(n, seed=3 * seed + i, **shape) for i, n in
                         enumerate((100, 200, 400)))  # fmt: skip
    model = classifier(seed, **CONTENDERS["abmil"])
    model.fit(train.bags, train.labels, groups=train.patients)
    rng = np.random.default_rng(seed)
    truth, labels = noisy(test.labels, rng), noisy(held.labels, rng)
    before, predicted = model.predict_proba(test.bags), model.predict(test.bags)
    after = model.calibrate(held.bags, labels, groups=held.patients).predict_proba(test.bags)
    return {
        "seed": seed,
        "accuracy": float((predicted == truth).mean()),
        "temperature": model.temperature_,
        "calibration error before": calibration_error(before, predicted == truth),
        "after": calibration_error(after, predicted == truth),
        "log loss before": float(log_loss(truth, before)),
        "log loss after": float(log_loss(truth, after)),
    }


def noisy(labels: list[str], rng: np.random.Generator) -> np.ndarray:
    other = {"negative": "positive", "positive": "negative"}
    return np.array([other[label] if rng.random() < NOISE else label for label in labels])


def calibration_error(probabilities: np.ndarray, right: np.ndarray) -> float:
    """Expected calibration error: Guo et al. 2017, equation 3."""
    confidence = probabilities.max(axis=1)
    place = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = [
        (place == part).mean() * abs(confidence[place == part].mean() - right[place == part].mean())
        for part in np.unique(place)
    ]
    return float(sum(gaps))


def novelty(name: str, params: dict[str, Any], count: int, seeds: int) -> dict[str, Any]:
    found: dict[str, list[float]] = {}
    for seed in range(seeds):
        train = planted_cohort(count, seed=seed, **COHORT)
        new = planted_cohort(200, seed=1000 + seed, **COHORT).bags
        shift = np.random.default_rng(seed).choice([-1, 1], COHORT["dim"]).astype(np.float32)
        shifted = [bag + shift for bag in new]
        model = classifier(seed, aggregator=name, **params)
        model.fit(train.bags, train.labels, groups=train.patients)
        pooled = Novelty.of(
            model.embed(train.bags).astype(np.float64),
            groups=np.arange(count),
            rng=np.random.default_rng(seed),
        )
        vectors = [model.embed(bags).astype(np.float64) for bags in (new, shifted)]
        measured = {
            "mean": (model.novelty(new), model.novelty(shifted)),
            "pooled": (pooled.percentiles(vectors[0]), pooled.percentiles(vectors[1])),
        }
        for what, (same, far) in measured.items():
            # The mean percentile is the AUROC against the held-out training cases.
            found.setdefault(f"{what}: unshifted", []).append(float(same.mean() / 100))
            area = roc_auc_score(np.repeat([0, 1], len(new)), np.concatenate([same, far]))
            found.setdefault(f"{what}: shifted", []).append(float(area))
    row: dict[str, Any] = {"aggregator": name, "training cases": count}
    for what, values in found.items():
        row |= {
            what: statistics.mean(values),
            f"{what}, lowest": min(values),
            f"{what}, highest": max(values),
        }
    return row


if __name__ == "__main__":
    main()
