"""Does MIL find 2% of planted tiles, and does it learn nothing where there is nothing to learn?

    python benchmarks/mil_planted.py [--task TASK] [--json FILE]

A synthetic cohort: the slides of positive patients hold 2% of tiles that lie apart from the noise
around them; every patient has an offset of its own, which says nothing about the label, and two
slides. One table is the training after labels were shuffled among the training patients and among
the held-out ones: the held-out AUROC has to be 0.5, while the training fit shows that the labels
were learned by heart. The other is the AUROC on patients that were not trained on, and how well
attention ranks planted tiles. Some minutes on one core.

With --task survival, regression or ordinal 2% of the tiles of every bag are marked, and where they
lie in another direction drives the outcome. The truth beside a figure is that of what drives it,
without the noise of the outcome. Shuffled outcomes are measured by the concordance of what is
predicted, which is 0.5 where nothing is known, in each task.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parent))

from common import report, table
from sklearn.metrics import cohen_kappa_score, r2_score, roc_auc_score
from support.mil_cohort import OutcomeCohort, PlantedCohort, outcome_cohort, planted_cohort

from xmag.metrics.survival import harrell_c
from xmag.mil import MILClassifier, MILRegressor, MILSurvival

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
OUTCOME_COHORT: dict[str, Any] = {"dim": 16, "tiles": 100, "planted": 0.02, "shift": 6.0}
LEARNING: dict[str, Any] = {
    "aggregator_options": {"embed_dim": 32, "attention_dim": 16}, "batch_size": 16, "lr": 3e-3,
    "epochs": 40, "device": "cpu", "progress": False,
}  # fmt: skip
CASES = {"training": 300, "held_out": 600, "training_of_a_shuffle": 100}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=["classification", *TASKS], default="classification")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--shuffles", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(CORES)
    if options.task != "classification":
        outcomes(options.task, options.shuffles, options.json)
        return
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


def summary_of(shuffled: list[dict[str, Any]], metric: str = "AUROC") -> dict[str, Any]:
    held_out = [row[f"held-out {metric}"] for row in shuffled]
    error = statistics.stdev(held_out) / len(held_out) ** 0.5 if len(held_out) > 1 else float("nan")
    return {
        "shuffles": len(shuffled),
        f"held-out {metric}, mean": statistics.mean(held_out),
        "its standard error": error,
        "lowest": min(held_out),
        "highest": max(held_out),
        f"training {metric}, lowest": min(row[f"training {metric}"] for row in shuffled),
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


def attention_auroc(classifier: Any, cohort: PlantedCohort | OutcomeCohort) -> float:
    """How attention ranks planted tiles above the others, a mean over positive slides."""
    return statistics.mean(
        float(roc_auc_score(planted, classifier.attention(bag).scores))
        for bag, planted in zip(cohort.bags, cohort.planted, strict=True)
        if planted.any()
    )


def concordance(model: Any, bags: list[Any], y: np.ndarray) -> float:
    """Harrell's C of what is predicted; of classes, of the mean class by their probabilities."""
    if isinstance(model, MILSurvival):
        return float(model.score(bags, y))
    if isinstance(model, MILClassifier):
        found = model.predict_proba(bags) @ np.arange(len(model.classes_))
    else:
        found = model.predict(bags)
    times = np.unique(y, return_inverse=True)[1]  # only their order counts
    return harrell_c(np.stack([np.ones(len(y)), times], axis=1), -found)


def kappa(truth: np.ndarray, found: np.ndarray) -> float:
    return float(cohen_kappa_score(truth, found, weights="quadratic"))


TASKS: dict[str, dict[str, Any]] = {
    "survival": {
        "models": {"cox": MILSurvival(), "nll": MILSurvival(loss="nll")},
        "y": lambda cohort: cohort.survival,
        "metric": "C",
        "measured": lambda model, cohort: model.score(cohort.bags, cohort.survival),
        "truth": lambda cohort: harrell_c(cohort.survival, cohort.drive),
    },
    "regression": {
        "models": {"regressor": MILRegressor()},
        "y": lambda cohort: cohort.number,
        "metric": "R²",
        "measured": lambda model, cohort: model.score(cohort.bags, cohort.number),
        "truth": lambda cohort: float(r2_score(cohort.number, 100 + 20 * cohort.drive)),
    },
    "ordinal": {
        "models": {"ordinal": MILClassifier(ordinal=True), "classes": MILClassifier()},
        "y": lambda cohort: cohort.grade,
        "metric": "quadratic kappa",
        "measured": lambda model, cohort: kappa(cohort.grade, model.predict(cohort.bags)),
        "truth": lambda cohort: kappa(cohort.grade, np.digitize(2 * cohort.drive, [-2, 0, 2])),
    },
}


def outcomes(name: str, shuffles: int, path: Path | None) -> None:
    """Both tables of a task whose outcome has a degree."""
    task = TASKS[name]
    train = outcome_cohort(CASES["training"], seed=0, **OUTCOME_COHORT)
    test = outcome_cohort(CASES["held_out"], seed=1, **OUTCOME_COHORT)
    first = next(iter(task["models"].values()))
    few = train.subset(range(CASES["training_of_a_shuffle"]))
    shuffled = [by_heart(first, task["y"], seed, few, test) for seed in range(shuffles)]
    print(f"\nShuffled outcomes\n\n{table([summary_of(shuffled, 'C')])}")
    rows = []
    for label, model in task["models"].items():
        start = time.perf_counter()
        model.set_params(**LEARNING, random_state=0)
        model.fit(train.bags, task["y"](train), groups=range(len(train)))
        seconds = time.perf_counter() - start
        metric = task["metric"]
        rows.append(
            {
                "model": label,
                f"held-out {metric}": task["measured"](model, test),
                f"{metric} of the truth": task["truth"](test),
                "held-out C": concordance(model, test.bags, task["y"](test)),
                "attention AUROC": attention_auroc(model, test),
                "epoch kept": model.best_epoch_,
                "training, s": seconds,
            }
        )
    cohort = {**CASES, **OUTCOME_COHORT}
    report(f"MIL on planted tiles: {name}", rows, path, cohort=cohort, shuffles=shuffled)


def by_heart(
    model: Any,
    outcome: Callable[[OutcomeCohort], np.ndarray],
    seed: int,
    train: OutcomeCohort,
    test: OutcomeCohort,
) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    y, others = rng.permutation(outcome(train)), rng.permutation(outcome(test))
    model.set_params(**{**LEARNING, "epochs": 100}, random_state=seed)
    model.fit(train.bags, y, validation=None)
    return {
        "seed": seed,
        "training C": concordance(model, train.bags, y),
        "held-out C": concordance(model, test.bags, others),
    }


if __name__ == "__main__":
    main()
