"""End to end against a frozen encoder: AUROC on held-out slides, from pixels.

    python benchmarks/finetune_vs_frozen.py [--seeds 5] [--json OUT]

The slides are bags of generated tissue, no two with the same stain. In positive slides a share of
the tiles has a fine chromatin pattern in its nuclei, of which xmag-mini's embeddings say little.
How strong it is, is chosen beforehand: the weakest of --strengths at which the frozen encoder
reaches an AUROC of --aim on a pilot cohort. The cohorts that are reported are drawn anew.

frozen:      xmag-mini embeds each tile, MILClassifier (gated ABMIL) learns from the bags.
end to end:  finetune_slides from the same encoder, and from the aggregator of the frozen side.

Both see the same training and validation slides. Each is trained once for each of its learning
rates, and the one with the lowest validation loss is scored on the test slides, which nothing else
has seen; the frozen side has the larger choice. The interval of the mean difference is Student's
over the seeds, which are independent cohorts. With --size-px 112 and few seeds, slides and tiles it
runs on a CPU; with a single one of --strengths there is no pilot.
"""

import argparse
import math
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import report
from torch import Tensor

from xmag.encoder import Encoder, load_model
from xmag.finetune import Settings, TileStore, finetune_slides
from xmag.mil import MILClassifier

PILOT_SEED = 10_000
STRENGTHS = (8.0, 16.0, 24.0, 32.0, 40.0, 48.0, 56.0, 64.0, 80.0, 96.0, 104.0, 112.0, 120.0, 128.0)
PERIODS_PX = (13, 19, 31, 53, 97, 211)
STAIN = ((105.0, 70.0, 150.0), (242.0, 241.0, 243.0), (225.0, 150.0, 190.0))
"""RGB of nuclei, gaps and stroma."""
T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""The 97.5% quantile of Student's t by its degrees of freedom."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """How slides are made: their tiles, the share planted in a positive one, and how strongly."""

    tiles: int
    size_px: int
    share: float
    strength: float


def gratings(task: Task, periods_px: Tensor, rng: torch.Generator) -> Tensor:
    """A wave for each tile, (tiles, S, S), of random direction and phase."""
    kind: dict[str, Any] = {"generator": rng, "device": rng.device}
    angle, phase = torch.rand(2, task.tiles, 1, 1, **kind) * 2 * math.pi
    axis = torch.arange(task.size_px, dtype=torch.float32, device=rng.device)
    along = axis[None, None] * angle.cos() + axis[None, :, None] * angle.sin()
    return torch.sin(2 * math.pi * along / periods_px + phase)


def make_slide(task: Task, *, positive: bool, rng: torch.Generator, name: str) -> TileStore:
    """The tiles of a slide; those of a positive one are planted with the task's share."""
    count = task.tiles
    kind: dict[str, Any] = {"generator": rng, "device": rng.device}
    scale = 0.8 + 0.45 * torch.rand(count, 1, 1, **kind)
    waves = sum(gratings(task, period * scale, rng) for period in PERIODS_PX)
    dense = torch.rand(count, 1, 1, **kind) - 0.5
    nuclei = torch.sigmoid(3 * (waves - 1.5 + dense))
    gaps = torch.sigmoid(-3 * (waves + 3))
    spread = torch.tensor([[8.0], [2.0], [8.0]], device=rng.device)
    stain = torch.tensor(STAIN, device=rng.device) + spread * torch.randn(3, 3, **kind)
    pixels = torch.stack([nuclei, gaps, 1 - nuclei - gaps], -1) @ stain
    planted = torch.arange(count, device=rng.device) < round(task.share * count) * positive
    fine_px = 5 + 2 * torch.rand(count, 1, 1, **kind)
    chromatin = gratings(task, fine_px, rng) * gratings(task, fine_px, rng)
    # Every draw is made for every slide, so that planting is all that tells the classes apart.
    pixels += (task.strength * planted.view(-1, 1, 1) * nuclei * chromatin).unsqueeze(-1)
    pixels += 4 * torch.randn(count, task.size_px, task.size_px, 1, **kind)
    return TileStore(pixels.clamp(0, 255).byte().cpu().numpy(), name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cohort:
    """Slides and labels: to train on, to choose by, to score on."""

    train: list[TileStore]
    validation: list[TileStore]
    test: list[TileStore]

    @classmethod
    def draw(cls, task: Task, sizes: tuple[int, int, int], seed: int, device: str) -> "Cohort":
        """A cohort of so many slides in each part, half of them positive; the same for a seed."""
        rng = torch.Generator(device).manual_seed(seed)
        parts = [
            [make_slide(task, positive=i % 2 == 1, rng=rng, name=f"{part}-{i}") for i in range(n)]
            for part, n in zip(("train", "validation", "test"), sizes, strict=True)
        ]
        return cls(train=parts[0], validation=parts[1], test=parts[2])


def labels_of(slides: list[TileStore]) -> list[int]:
    return [i % 2 for i in range(len(slides))]


def auroc(slides: list[TileStore], scores: np.ndarray) -> float:
    """The share of pairs of a positive and a negative slide that are in order."""
    positive = np.array(labels_of(slides)) == 1
    own, others = scores[positive][:, None], scores[~positive][None]
    return float(((own > others) + 0.5 * (own == others)).mean())


def embedded(encoder: Encoder, slides: list[TileStore]) -> list[np.ndarray]:
    return [encoder.embed(torch.from_numpy(np.array(s.tiles))).cpu().numpy() for s in slides]


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The best of the runs of one side by validation loss: what it scores, and what it learnt."""

    auroc: float
    loss: float
    rate: float
    classifier: MILClassifier
    seconds: float


def frozen(encoder: Encoder, cohort: Cohort, args: argparse.Namespace, seed: int) -> Found:
    """The best classifier on embeddings that stay as they are."""
    start = time.perf_counter()
    train, validation, test = (
        embedded(encoder, part) for part in (cohort.train, cohort.validation, cohort.test)
    )
    runs = []
    for rate in args.frozen_rates:
        classifier = MILClassifier(
            aggregator="abmil", lr=rate, epochs=args.frozen_epochs, device=encoder.device,
            random_state=seed, progress=False,
        )  # fmt: skip
        classifier.fit(
            train, labels_of(cohort.train), groups=[slide.name for slide in cohort.train],
            validation=(
                validation, labels_of(cohort.validation), [s.name for s in cohort.validation]
            ),
        )  # fmt: skip
        runs.append(
            Found(
                auroc=auroc(cohort.test, classifier.predict_proba(test)[:, 1]),
                loss=classifier.history_[classifier.best_epoch_ - 1]["validation_loss"],
                rate=rate, classifier=classifier, seconds=time.perf_counter() - start,
            )
        )  # fmt: skip
    return replace(min(runs, key=lambda r: r.loss), seconds=time.perf_counter() - start)


def end_to_end(
    encoder: Encoder, cohort: Cohort, args: argparse.Namespace, seed: int, warm: MILClassifier
) -> Found:
    """The best fine-tuned encoder and classifier, the latter begun with what `warm` knows."""
    start = time.perf_counter()
    runs = []
    for rate in args.rates:
        settings = Settings(
            epochs=args.epochs, patience=None, slides_per_step=2, chunk_tiles=args.chunk,
            learning_rate=rate, classifier_learning_rate=args.head_rate, layer_decay=0.9, ema=0.95,
        )  # fmt: skip
        result = finetune_slides(
            cohort.train, labels_of(cohort.train), model=encoder, aggregator=warm.aggregator_,
            settings=settings, validation=(cohort.validation, labels_of(cohort.validation)),
            random_state=seed, progress=False,
        )  # fmt: skip
        bags = embedded(result.encoder, cohort.test)
        runs.append(
            Found(
                auroc=auroc(cohort.test, result.classifier.predict_proba(bags)[:, 1]),
                loss=result.history[result.best_epoch].validation_loss,
                rate=rate, classifier=result.classifier, seconds=time.perf_counter() - start,
            )
        )  # fmt: skip
    return replace(min(runs, key=lambda r: r.loss), seconds=time.perf_counter() - start)


def task_of(args: argparse.Namespace, strength: float) -> Task:
    return Task(tiles=args.tiles, size_px=args.size_px, share=args.share, strength=strength)


def encoder_of(args: argparse.Namespace) -> Encoder:
    """xmag-mini in float32; for tiles of another size than its own its positions are resized."""
    mini = load_model("xmag-mini", device=args.device, dtype="float32")
    spec = replace(mini.tile_spec, size_px=args.size_px)
    config = replace(mini.config, tile_spec=spec)
    return Encoder(
        mini.vit, config, provenance=mini.provenance, device=args.device, dtype="float32"
    )


def chosen_strength(
    encoder: Encoder, sizes: tuple[int, int, int], args: argparse.Namespace
) -> tuple[float, list[dict[str, float]]]:
    """The weakest strength, by bisection, at which a pilot reaches the aim; and all pilots."""
    strengths, tried = sorted(args.strengths), []
    low, high = 0, len(strengths) - 1
    while low < high:
        middle = (low + high) // 2
        cohort = Cohort.draw(task_of(args, strengths[middle]), sizes, PILOT_SEED, args.device)
        found = frozen(encoder, cohort, args, PILOT_SEED).auroc
        tried.append({"strength": strengths[middle], "frozen AUROC": found})
        print(f"pilot {tried[-1]}", flush=True)
        low, high = (low, middle) if found >= args.aim else (middle + 1, high)
    return strengths[low], tried


def interval(differences: list[float]) -> tuple[float, float]:
    """The 95% interval of the mean, by Student's t."""
    mean, free = statistics.mean(differences), len(differences) - 1
    if free < 1:
        return -math.inf, math.inf
    half = T_975.get(free, 2.262) * statistics.stdev(differences) / math.sqrt(free + 1)
    return mean - half, mean + half


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5, help="how many cohorts")
    parser.add_argument(
        "--first-seed", type=int, default=100, help="of the cohorts; no recipe was tried on these"
    )
    parser.add_argument("--train", type=int, default=40, help="slides")
    parser.add_argument("--validation", type=int, default=20, help="slides")
    parser.add_argument("--test", type=int, default=60, help="slides")
    parser.add_argument("--tiles", type=int, default=24, help="a slide")
    parser.add_argument("--size-px", type=int, default=224, help="smaller for a try on a CPU")
    parser.add_argument("--share", type=float, default=0.25, help="planted in a positive slide")
    parser.add_argument("--strengths", type=float, nargs="+", default=STRENGTHS)
    parser.add_argument("--aim", type=float, default=0.7)
    parser.add_argument("--rates", type=float, nargs="+", default=[5e-4])
    parser.add_argument("--frozen-rates", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3])
    parser.add_argument(
        "--head-rate", type=float, default=3e-4, help="of the aggregator, end to end"
    )
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--frozen-epochs", type=int, default=40)
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if len(args.rates) > len(args.frozen_rates):
        parser.error("the frozen side is to have at least as many --frozen-rates as --rates")
    return args


def main() -> None:
    args = parsed()
    encoder = encoder_of(args)
    sizes = (args.train, args.validation, args.test)
    strength, tried = chosen_strength(encoder, sizes, args)
    task = task_of(args, strength)
    rows = []
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        cohort = Cohort.draw(task, sizes, seed=seed, device=args.device)
        fixed = frozen(encoder, cohort, args, seed)
        trained = end_to_end(encoder, cohort, args, seed, fixed.classifier)
        rows.append(
            {
                "seed": seed,
                "frozen AUROC": fixed.auroc,
                "end to end AUROC": trained.auroc,
                "difference": trained.auroc - fixed.auroc,
                "rate": trained.rate,
                "frozen s": fixed.seconds,
                "end to end s": trained.seconds,
            }
        )
        print(rows[-1], flush=True)
    differences = [row["difference"] for row in rows]
    low, high = interval(differences)
    more = {
        "strength": strength,
        "pilots": tried,
        "frozen_mean": statistics.mean(row["frozen AUROC"] for row in rows),
        "end_to_end_mean": statistics.mean(row["end to end AUROC"] for row in rows),
        "difference_mean": statistics.mean(differences),
        "difference_95": [low, high],
        "settings": {k: v for k, v in vars(args).items() if k != "json"},
    }
    report("End to end against the frozen encoder, held-out slides", rows, args.json, **more)
    print(
        f"frozen {more['frozen_mean']:.3f}, end to end {more['end_to_end_mean']:.3f}; difference"
        f" {more['difference_mean']:.3f}, 95% interval {low:.3f} to {high:.3f}"
    )


if __name__ == "__main__":
    main()
