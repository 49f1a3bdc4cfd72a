"""Distil a student at 2.0 µm/px from slides and a teacher at 0.5 µm/px, in Python.

    python examples/distill.py slides/ runs/mine --teacher MahmoodLab/UNI2-h
    torchrun --nproc-per-node=4 examples/distill.py slides/ runs/mine

`xmag distill examples/distill.toml` does the same as a file says. Run it again to go on where it
was stopped.
"""

import argparse
from pathlib import Path

from xmag.distill import (
    LossSettings,
    Manifest,
    Settings,
    SlideRegions,
    TrainSettings,
    distill,
    fresh_student,
    held_out,
    load_teacher,
    plan_slides,
    pretrained_student,
)
from xmag.training import joined_ranks
from xmag.vit import CONFIGS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("slides", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--teacher", default="MahmoodLab/UNI2-h")
    parser.add_argument(
        "--student", default="facebook/dinov2-base", help="weights, or a name such as dinov2_vits14"
    )
    parser.add_argument("--regions", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=2_000)
    parser.add_argument("--batch", type=int, default=48)
    args = parser.parse_args()

    with joined_ranks() as ranks:
        kept = args.out / "manifest.json"
        if ranks.leads and not kept.exists():
            args.out.mkdir(parents=True, exist_ok=True)
            plan_slides(args.slides, regions=args.regions).save(kept)
        ranks.wait()
        manifest = Manifest.load(kept)
        _, validation = held_out(manifest, fraction=0.1)
        # Centring makes the cosine measure what tells regions apart.
        settings = Settings(
            loss=LossSettings(centre=True),
            train=TrainSettings(steps=args.steps, batch=args.batch),
        )
        known = args.student in CONFIGS
        # Child processes decode more than threads can, where a GPU takes the rest of the work.
        processes = 8 if ranks.device().type == "cuda" else 0
        with SlideRegions(manifest, args.slides, processes=processes) as source:
            summary = distill(
                source,
                load_teacher(args.teacher, device=ranks.device()),
                fresh_student(args.student) if known else pretrained_student(args.student),
                args.out,
                settings=settings,
                validation=validation,
                about={"manifest_sha256": manifest.sha256, **manifest.counts()},
            )
        if ranks.leads:
            print("\n".join(summary.lines()))


if __name__ == "__main__":
    main()
