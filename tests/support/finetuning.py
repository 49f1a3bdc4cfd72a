"""The smallest things that fine-tuning works on: an encoder of 56 px tiles, and slides of them."""

from support.models import TINY, random_tiles, random_vit

from xmag.encoder import Encoder
from xmag.finetune import Settings, TileStore
from xmag.geometry import TileSpec
from xmag.hub.registry import ModelConfig

SPEC = TileSpec(size_px=56)
QUICK = Settings(
    epochs=2, slides_per_step=2, chunk_tiles=4, learning_rate=1e-3, classifier_learning_rate=1e-3
)
LABELS = ["a", "b"] * 4
PATIENTS = [n // 2 for n in range(8)]


def small_encoder(**options) -> Encoder:
    """An encoder with random weights, for tiles of 56 px."""
    return Encoder(
        random_vit(TINY),
        ModelConfig(vit=TINY, tile_spec=SPEC),
        provenance={"name": "random", "weights_sha256": "seed 0", "trained": True},
        **options,
    )


def stores(count: int = 8, *, tiles: int = 5, seed: int = 0) -> list[TileStore]:
    """Slides of random tiles, `tiles` to `tiles` + 2 of them; those of odd number are darker."""
    return [
        TileStore(
            random_tiles(tiles + n % 3, size_px=56, seed=seed + n) // (1 + n % 2), f"slide {n}"
        )
        for n in range(count)
    ]
