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


@dataclass
class OutcomeCohort:
    """Bags, what drives their outcome (standard normal), and outcomes of each task.

    `survival` is (event, time) with the log hazard 2 `drive`, `number` is `drive` with noise, and
    `grade` (0 to 3) cuts `drive` with logistic noise.
    """

    bags: list
    drive: np.ndarray
    survival: np.ndarray
    number: np.ndarray
    grade: np.ndarray
    planted: np.ndarray

    def __len__(self):
        return len(self.bags)

    def subset(self, rows):
        bags = [self.bags[row] for row in rows]
        return OutcomeCohort(bags, *(values[rows] for values in list(vars(self).values())[1:]))


def outcome_cohort(
    cases, *, seed=0, dim=16, tiles=100, planted=0.02, shift=6.0, spread=3.0, site=0.3
):
    """Normal noise, an offset of each case, and in every bag a share `planted` of marked tiles.

    These lie `shift` away along one direction, and `spread` times `drive` along another: nothing
    else has to do with the outcome, and the mean of a bag has little.
    """
    rng = np.random.default_rng(seed)
    mark, meaning = np.linalg.qr(np.random.default_rng(1234).normal(size=(dim, 2)))[0].T
    drive = rng.normal(size=cases)
    truth = np.zeros((cases, tiles), bool)
    bags = []
    for row, value in zip(truth, drive, strict=True):
        features = rng.normal(size=(tiles, dim)) + site * rng.normal(size=dim)
        row[rng.choice(tiles, max(1, round(planted * tiles)), replace=False)] = True
        features[row] += shift * mark + spread * value * meaning
        bags.append(features.astype(np.float32))
    time, censored = rng.exponential(np.exp(-2 * drive)), rng.exponential(3, cases)
    survival = np.zeros(cases, [("event", bool), ("time", float)])
    survival["event"], survival["time"] = time <= censored, np.minimum(time, censored)
    number = 100 + 20 * (drive + 0.5 * rng.normal(size=cases))
    grade = np.digitize(2 * drive + rng.logistic(size=cases), [-2, 0, 2])
    return OutcomeCohort(bags, drive, survival, number, grade, truth)
