"""The encoder against timm and transformers: tiles/s and TFLOP/s, same device, dtype and mode.

    python benchmarks/encoder.py [--device cuda] [--dtype bfloat16] [--compile] [--json OUT]

All take uint8 tiles that lie on the device already and return the embedding of each, with random
weights of a DINOv2 ViT-B/14 at 224 px. FLOPs are those that each really computes (xmag leaves out
what only the patch tokens of the last block would need). The ceiling is a large matrix product.
"""

import argparse
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import interleaved, ratio, report
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from xmag.encoder import Encoder
from xmag.hub.registry import ModelConfig
from xmag.vit import CONFIGS, ViT

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Normalised(nn.Module):
    """uint8 (B, S, S, 3) -> what `head` makes of the normalised images."""

    def __init__(self, model: nn.Module, embedding: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.embedding = model, embedding
        self.register_buffer("mean", 255 * torch.tensor(MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(STD).view(1, 3, 1, 1))

    def forward(self, tiles: Tensor) -> Tensor:
        images = (tiles.permute(0, 3, 1, 2) - self.mean) / self.std
        return self.embedding(self.model, images.to(next(self.model.parameters()).dtype))


def timm_model() -> nn.Module:
    import timm

    model = timm.create_model("vit_base_patch14_dinov2", img_size=224, num_classes=0)
    return Normalised(model, lambda m, x: m(x))


def transformers_model() -> nn.Module:
    from transformers import Dinov2Config, Dinov2Model

    model = Dinov2Model(Dinov2Config(image_size=518, patch_size=14))
    return Normalised(model, lambda m, x: m(pixel_values=x).last_hidden_state[:, 0])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    tiles = torch.randint(0, 256, (args.batch, 224, 224, 3), dtype=torch.uint8, device=device)
    runs: dict[str, Callable[[Tensor], Any]] = {}
    flops: dict[str, int] = {}
    for name, make in {"timm": timm_model, "transformers": transformers_model}.items():
        try:
            model = make().to(device, dtype).eval()
        except ImportError:
            warnings.warn(f"{name} is not installed and is left out", stacklevel=1)
            continue
        flops[name] = flops_of(model, tiles)
        runs[name] = torch.compile(model, dynamic=False) if args.compile else model
    encoder = xmag_encoder(device, dtype)
    flops["xmag"] = flops_of(encoder.embed, tiles)
    runs["xmag"] = (encoder.compiled(batch_size=args.batch) if args.compile else encoder).embed

    def timed(run: Callable[[Tensor], Any]) -> Callable[[], None]:
        def several() -> None:
            with torch.inference_mode():
                for _ in range(10 if device.type == "cuda" else 1):
                    run(tiles)
            synchronise(device)

        return several

    seconds = interleaved({name: timed(run) for name, run in runs.items()}, repeats=args.repeats)
    count = args.batch * (10 if device.type == "cuda" else 1)
    rows = [
        {
            "encoder": name,
            "tiles/s": count / statistics.median(seconds[name]),
            "GFLOP a tile": flops[name] / args.batch / 1e9,
            "TFLOP/s": flops[name] / args.batch * count / statistics.median(seconds[name]) / 1e12,
            "xmag is x": ratio(seconds[name], seconds["xmag"]),
        }
        for name in runs
    ]
    rows.append({"encoder": "matrix product", "TFLOP/s": ceiling(device, dtype)})
    mode = f"{args.device}, {args.dtype}, {'compiled' if args.compile else 'eager'}"
    report(f"encoder ({mode}, batch {args.batch})", rows, args.json)


def xmag_encoder(device: torch.device, dtype: torch.dtype, vit: str = "dinov2_vitb14") -> Encoder:
    """An Encoder with random weights."""
    config = ModelConfig(vit=CONFIGS[vit])
    about = {"name": "random weights", "trained": True, "weights_sha256": "0" * 64}
    return Encoder(ViT(config.vit), config, provenance=about, device=device, dtype=dtype)


def flops_of(model: Callable[[Tensor], Any], tiles: Tensor) -> int:
    """The floating-point operations of a forward pass, a multiply-add counting as two."""
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(tiles)
    return int(counter.get_total_flops())


def ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of a matrix product large enough to keep the device busy."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))

    def run() -> None:
        for _ in range(10 if device.type == "cuda" else 1):
            a @ b
        synchronise(device)

    seconds = statistics.median(interleaved({"product": run}, repeats=5)["product"])
    return 2 * side**3 * (10 if device.type == "cuda" else 1) / seconds / 1e12


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
