"""Compare xmag's XMAG with the code of the model's own card, on your machine.

    pip install xmag transformers
    python examples/verify_official.py --trust-remote-code [TILE.png ...]

Downloads the official weights and RUNS THE CODE OF THE MODEL'S REPOSITORY, which xmag itself never
does: read that code first, at the revision that you give. Tiles are 224 x 224 RGB images; without
any, random ones are taken. Exit status: 0 equal, 1 different, 2 not compared.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from xmag.encoder import Encoder, load_model
from xmag.errors import XmagError
from xmag.hub.registry import DEFAULT_MODEL

TOLERANCE = 1e-3
"""Largest difference of an embedding's value, float32 on the CPU; the order of sums may differ."""


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if not options.trust_remote_code:
        print(
            f"not compared: the card's way to load {options.model} runs code from its repository."
            " Read that code, then add --trust-remote-code"
        )
        return 2
    try:
        encoder = load_model(
            options.model, revision=options.revision, device="cpu", dtype="float32"
        )
        tiles = _read_tiles(options.tiles, encoder.tile_spec.size_px)
        theirs = _card_embeddings(options.model, encoder, tiles)
    except (XmagError, OSError, ImportError, ValueError) as error:
        print(f"not compared: {error}")
        return 2
    return _report(encoder, encoder.embed(tiles), theirs)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tiles", nargs="*", type=Path, help="224 x 224 RGB images")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="a Hub name (default: %(default)s)")
    parser.add_argument("--revision", help="a branch, tag or commit of the model's repository")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the card's code")
    return parser


def _read_tiles(paths: list[Path], size_px: int) -> np.ndarray:
    """uint8 (B, size_px, size_px, 3): the given images, or random blotches."""
    if not paths:
        coarse = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)
        images = [Image.fromarray(tile).resize((size_px, size_px)) for tile in coarse]
    else:
        images = [Image.open(path).convert("RGB") for path in paths]
    names = [str(path) for path in paths] or ["a random tile"] * len(images)
    for image, name in zip(images, names, strict=True):
        if image.size != (size_px, size_px):
            raise ValueError(
                f"{name} is {image.size[0]} x {image.size[1]} px; expected {size_px} x {size_px}."
                " Crop it, as resizing would change its scale"
            )
    return np.stack([np.asarray(image) for image in images])


def _card_embeddings(name: str, encoder: Encoder, tiles: np.ndarray) -> torch.Tensor:
    """What the card's code gives for the same tiles, at the commit that xmag loaded: (B, D)."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(
        name, revision=encoder.provenance["revision"], trust_remote_code=True
    ).eval()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (encoder.config.mean, encoder.config.std))
    images = (torch.from_numpy(tiles).permute(0, 3, 1, 2) / 255 - mean) / std
    with torch.inference_mode():
        embeddings: torch.Tensor = model(images)["cls_embedding"]
    return embeddings.float()


def _report(encoder: Encoder, ours: torch.Tensor, theirs: torch.Tensor) -> int:
    if ours.shape != theirs.shape:
        print(f"DIFFERENT: ours {tuple(ours.shape)}, theirs {tuple(theirs.shape)}")
        return 1
    difference = float((ours - theirs).abs().max())
    cosine = float(torch.nn.functional.cosine_similarity(ours, theirs).min())
    equal = difference < TOLERANCE
    print(f"model     {encoder.provenance['name']} at {encoder.provenance['revision']}")
    print(f"weights   sha256 {encoder.provenance['weights_sha256']}")
    print(f"tiles     {len(ours)}")
    print(f"largest difference {difference:.2e} (allowed {TOLERANCE:.0e}), cosine >= {cosine:.6f}")
    print("EQUAL" if equal else "DIFFERENT: please open an issue with the lines above")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
