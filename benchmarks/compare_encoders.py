"""Encoders compared on generated slides: a signal that 5x shows, and one that only 20x does.

Writes tables and pictures. Run: python benchmarks/compare_encoders.py OUT [coarse|fine]
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from xmag.encoder import Encoder
from xmag.evaluate import compare
from xmag.geometry import TileSpec
from xmag.hub.registry import ModelConfig
from xmag.mil import MILClassifier
from xmag.vit import ViT, ViTConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.slides import write_svs

PX, SLIDES = 224, 24


def pixels(kind: str, label: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """A slide of 4 tiles at 5x, 0.5 µm/px; "coarse" has the same 20x tiles for both labels."""
    side = 4 * PX
    places = np.indices((side, 4 * side))
    if kind == "coarse":
        image = np.where((places // (PX if label else side)).sum(0) % 2, 190.0, 90.0)
    else:
        image = 140 + label * 30 * np.where((places // 2).sum(0) % 2, 1.0, -1.0)
    image = image + 3 * rng.standard_normal(image.shape)
    return np.repeat(np.clip(image, 0, 255).astype(np.uint8)[..., None], 3, axis=2)


def main(out: Path, kinds: Sequence[str]) -> None:
    """Write slides, models, tables and pictures below `out`."""
    torch.manual_seed(0)
    config = ViTConfig(width=64, depth=4, heads=4, hidden=256, position_grid=16)
    vit = ViT(config)
    for parameter in vit.parameters():
        if parameter.ndim == 1 and float(parameter.detach().abs().max()) < 1e-3:
            torch.nn.init.constant_(parameter, 0.5)  # LayerScale, which hides the blocks
    models: list[str] = []
    for name, mpp in (("random-5x", 2.0), ("random-20x", 0.5)):
        folder = out / "models" / name
        folder.mkdir(parents=True, exist_ok=True)
        about = {"name": name, "weights_sha256": "", "trained": True}
        model = ModelConfig(vit=config, tile_spec=TileSpec(mpp=mpp, size_px=PX))
        Encoder(vit, model, provenance=about).save(folder)
        models.append(str(folder))
    for kind in kinds:
        rng = np.random.default_rng(0)
        folder = out / kind
        folder.mkdir(exist_ok=True)
        paths = [folder / f"{number:02}.svs" for number in range(SLIDES)]
        for number, path in enumerate(paths):
            image = pixels(kind, number % 2, rng)
            if not path.exists():
                write_svs(path, pixels=image, mpp=0.5, power=20, levels=(1, 4))
        labels = ["coarse" if number % 2 else "plain" for number in range(SLIDES)]
        comparison = compare(
            (paths, labels, [str(number // 2) for number in range(SLIDES)]),
            models=["xmag-mini", *models],
            out=out / f"compared-{kind}",
            estimator=MILClassifier(aggregator="mean", epochs=40, random_state=0),
            tissue=None,
        )
        comparison.save(out / f"compared-{kind}")
        print(f"{kind}\n{comparison}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or ("coarse", "fine"))
