"""Cohorts with known truth: positive bags hold a few planted tiles, and nothing else differs."""

from dataclasses import dataclass

import numpy as np


@dataclass
class PlantedCohort:
    """Bags with labels "negative" and "positive", their patients, and which tiles were planted."""

    bags: list
    labels: list
    patients: list
    planted: list

    def subset(self, rows):
        parts = ([values[row] for row in rows] for values in vars(self).values())
        return PlantedCohort(*parts)


def planted_cohort(
    patients, *, seed=0, dim=32, tiles=50, planted=0.02, shift=8.0, slides=1, site=0.5
):
    """Normal noise; each patient has an offset of its own; planted tiles lie `shift` away.

    Half of the patients are positive: on each of their slides a share `planted` of the tiles (one
    at least) is shifted along one direction that all slides share.
    """
    rng = np.random.default_rng(seed)
    direction = np.random.default_rng(1234).normal(size=dim)
    direction *= shift / np.linalg.norm(direction)
    cohort = PlantedCohort([], [], [], [])
    for patient in range(patients):
        offset = site * rng.normal(size=dim)
        for _ in range(slides):
            features = rng.normal(size=(tiles, dim)) + offset
            truth = np.zeros(tiles, bool)
            if patient % 2:
                truth[rng.choice(tiles, max(1, round(planted * tiles)), replace=False)] = True
                features[truth] += direction
            cohort.bags.append(features.astype(np.float32))
            cohort.labels.append("positive" if patient % 2 else "negative")
            cohort.patients.append(f"{seed}-{patient}")
            cohort.planted.append(truth)
    return cohort
