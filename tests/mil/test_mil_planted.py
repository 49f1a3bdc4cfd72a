"""What is planted is found, and nothing where nothing is: a small benchmarks/mil_planted.py."""

import numpy as np
from sklearn.metrics import roc_auc_score
from support.mil_cohort import planted_cohort

from xmag.mil import MILClassifier

OPTIONS = {
    "aggregator_options": {"embed_dim": 32, "attention_dim": 16}, "lr": 2e-3, "device": "cpu",
}  # fmt: skip


def test_two_percent_of_planted_tiles_are_found_in_patients_never_seen() -> None:
    train = planted_cohort(60, seed=0, dim=16, tiles=50)
    test = planted_cohort(100, seed=1, dim=16, tiles=50)
    classifier = MILClassifier(**OPTIONS, random_state=0)  # type: ignore[arg-type]
    classifier.fit(train.bags, train.labels, groups=train.patients)
    scores = classifier.predict_proba(test.bags)[:, 1]
    assert roc_auc_score(np.array(test.labels) == "positive", scores) >= 0.97
    ranked = [
        roc_auc_score(planted, classifier.attention(bag).scores)
        for bag, planted in zip(test.bags, test.planted, strict=True)
        if planted.any()
    ]
    assert np.mean(ranked) >= 0.95


def test_shuffled_labels_are_learned_by_heart_and_say_nothing_of_other_patients() -> None:
    """Three shuffles of 300 held-out patients: a standard error of 0.02, and five of those."""
    train = planted_cohort(40, seed=2, dim=32, tiles=20, planted=0.05)
    test = planted_cohort(300, seed=3, dim=32, tiles=20, planted=0.05)
    found = []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        labels, others = rng.permutation(train.labels), rng.permutation(test.labels)
        classifier = MILClassifier(**OPTIONS, random_state=seed, epochs=60)  # type: ignore[arg-type]
        classifier.fit(train.bags, labels, validation=None)
        fit = classifier.predict_proba(train.bags)[:, 1]
        assert roc_auc_score(labels == "positive", fit) > 0.9
        held_out = classifier.predict_proba(test.bags)[:, 1]
        found.append(roc_auc_score(others == "positive", held_out))
    assert abs(np.mean(found) - 0.5) < 0.1
