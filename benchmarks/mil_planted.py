"""Does MIL find 2% of planted tiles, and does it learn nothing where there is nothing to learn?

    python benchmarks/mil_planted.py [--json FILE]

A synthetic cohort: the slides of positive patients hold 2% of tiles that lie apart from the noise
around them; every patient has an offset of its own, which says nothing about the label, and two
slides. One table is the training after labels were shuffled among the training patients and among
the held-out ones: the held-out AUROC has to be 0.5, while the training fit shows that the labels
were learned by heart. The other is the AUROC on patients that were not trained on, and how well
attention ranks planted tiles. Some minutes on one core.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parent))

from common import report, table
from sklearn.metrics import roc_auc_score
from support.mil_cohort import PlantedCohort, planted_cohort

from xmag.mil import MILClassifier

SMALL = {"embed_dim": 128, "attention_dim": 64}
CONTENDERS: dict[str, dict[str, Any]] = {
    "abmil, default sizes": {"aggregator": "abmil"},
    "abmil": {"aggregator": "abmil", "aggregator_options": SMALL},
    "clam_sb": {"aggregator": "clam_sb", "aggregator_options": {**SMALL, "k_sample": 2}},
    "transmil": {
        "aggregator": "transmil",
        "aggregator_options": {"embed_dim": 64, "heads": 4, "landmarks": 16},
    },
    "max": {"aggregator": "max", "aggregator_options": {"embed_dim": 128}},
    "mean": {"aggregator": "mean", "aggregator_options": {"embed_dim": 128}},
}
COHORT: dict[str, Any] = {"dim": 32, "tiles": 100, "slides": 2, "planted": 0.02, "shift": 6.0}
CORES = 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--shuffles", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(CORES)
    train = planted_cohort(60, seed=0, **COHORT)
    test = planted_cohort(200, seed=1, **COHORT)
    cohort = {"training_patients": 60, "held_out_patients": 200, **COHORT}
    shuffled = [learned_by_heart(seed, train, test) for seed in range(options.shuffles)]
    print(f"\nShuffled labels\n\n{table([summary_of(shuffled)])}")
    rows = [learned(name, params, train, test) for name, params in CONTENDERS.items()]
    report("MIL on planted tiles", rows, options.json, cohort=cohort, shuffles=shuffled)


def learned(
    name: str, params: dict[str, Any], train: PlantedCohort, test: PlantedCohort
) -> dict[str, Any]:
    start = time.perf_counter()
    classifier = MILClassifier(**params, random_state=0, lr=1e-3, device="cpu", progress=False)
    classifier.fit(train.bags, train.labels, groups=train.patients)
    seconds = time.perf_counter() - start
    row: dict[str, Any] = {
        "aggregator": name,
        "held-out AUROC": patient_auroc(classifier, test, np.array(test.labels)),
        "attention AUROC": None,
        "epochs": len(classifier.history_),
        "training, s": seconds,
    }
    if params["aggregator"] not in ("mean", "max"):
        row["attention AUROC"] = attention_auroc(classifier, test)
    return row


def learned_by_heart(seed: int, train: PlantedCohort, test: PlantedCohort) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    labels, held_out = shuffled_labels(train, rng), shuffled_labels(test, rng)
    classifier = MILClassifier(
        aggregator_options=SMALL, epochs=60, random_state=seed, lr=1e-3, device="cpu",
        progress=False,
    ).fit(train.bags, labels, groups=train.patients, validation=None)  # fmt: skip
    return {
        "seed": seed,
        "training AUROC": patient_auroc(classifier, train, labels),
        "held-out AUROC": patient_auroc(classifier, test, held_out),
    }


def summary_of(shuffled: list[dict[str, Any]]) -> dict[str, Any]:
    held_out = [row["held-out AUROC"] for row in shuffled]
    error = statistics.stdev(held_out) / len(held_out) ** 0.5 if len(held_out) > 1 else float("nan")
    return {
        "shuffles": len(shuffled),
        "held-out AUROC, mean": statistics.mean(held_out),
        "its standard error": error,
        "lowest": min(held_out),
        "highest": max(held_out),
        "training AUROC, lowest": min(row["training AUROC"] for row in shuffled),
    }


def shuffled_labels(cohort: PlantedCohort, rng: np.random.Generator) -> np.ndarray:
    """The labels of patients, given to other patients; slides of one keep the same label."""
    patients = sorted(set(cohort.patients))
    label_of = dict(zip(cohort.patients, cohort.labels, strict=True))
    other = dict(zip(patients, rng.permutation(patients).tolist(), strict=True))
    return np.array([label_of[other[patient]] for patient in cohort.patients])


def patient_auroc(classifier: MILClassifier, cohort: PlantedCohort, labels: np.ndarray) -> float:
    """Of the mean probability over the slides of each patient."""
    probabilities = classifier.predict_proba(cohort.bags)[:, 1]
    patients = np.array(cohort.patients)
    unique = sorted(set(cohort.patients))
    scores = [probabilities[patients == patient].mean() for patient in unique]
    truth = [labels[patients == patient][0] == "positive" for patient in unique]
    return float(roc_auc_score(truth, scores))


def attention_auroc(classifier: MILClassifier, cohort: PlantedCohort) -> float:
    """How attention ranks planted tiles above the others, a mean over positive slides."""
    return statistics.mean(
        float(roc_auc_score(planted, classifier.attention(bag).scores))
        for bag, planted in zip(cohort.bags, cohort.planted, strict=True)
        if planted.any()
    )


if __name__ == "__main__":
    main()
