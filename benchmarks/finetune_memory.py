"""A training step on a whole bag: time and peak memory, exact by chunks and in one graph.

    python benchmarks/finetune_memory.py [--tiles 1000 2000 4000] [--chunk 64] [--json OUT]

ViT-B/14 with random weights at 224 px and gated ABMIL; bfloat16 autocast on CUDA, weights and
gradients in float32. A step is augmentation, forward and backward of one bag, with the gradients of
all parameters; the optimizer is left out, as it is the same for both. Tiles are uint8 in the
host's memory. Memory is what the step adds to what lies on the GPU before it, the gradients
included. "one graph" is ``loss(all embeddings).backward()``; its largest bag is found by bisection.
--config, --device and small --tiles are for a try without a GPU, which has no memory to report.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import report
from torch import Tensor

from xmag.finetune.gradients import exact_backward
from xmag.finetune.network import TileNetwork, uses_half
from xmag.hub.registry import ModelConfig
from xmag.mil import aggregator, training_loss
from xmag.training.augmentation import draw
from xmag.vit import CONFIGS, ViT

GIB = 2**30
SIDE = 224


class Step:
    """One bag of any number of tiles through the encoder and the aggregator, and back."""

    def __init__(self, config: str, device: torch.device) -> None:
        torch.manual_seed(0)
        model = ModelConfig(vit=CONFIGS[config])
        half = uses_half("auto", device)
        self.encoder = TileNetwork(ViT(model.vit), model, half=half).to(device)
        self.head = aggregator("abmil", in_dim=model.vit.width, classes=2).to(device).train()
        self.device = device
        # The same few tiles again and again: what they show costs nothing here.
        self.tiles = torch.randint(0, 256, (256, SIDE, SIDE, 3), dtype=torch.uint8)

    def encode(self, start: int, stop: int, draws: Any) -> Tensor:
        rows = torch.arange(start, stop) % len(self.tiles)
        return self.encoder(self.tiles[rows], draws[start:stop])

    def loss(self, features: Tensor) -> Tensor:
        mask = torch.ones(1, len(features), dtype=torch.bool, device=self.device)
        label = torch.tensor([1], device=self.device)
        return training_loss(self.head(features.unsqueeze(0), mask), label)

    def exact(self, count: int, chunk: int) -> None:
        draws = draw(0, 0, range(count), 0)
        exact_backward(lambda a, b: self.encode(a, b, draws), count, self.loss, chunk=chunk)

    def one_graph(self, count: int) -> None:
        draws = draw(0, 0, range(count), 0)
        self.loss(self.encode(0, count, draws)).backward()

    def clear(self) -> None:
        for module in (self.encoder, self.head):
            module.zero_grad(set_to_none=True)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def measured(step: Step, run: Callable[[], None], *, repeats: int) -> dict[str, float]:
    """Seconds (median) and the peak of memory of a run, after one that is not timed."""
    cuda = step.device.type == "cuda"
    seconds, peak = [], 0
    for turn in range(repeats + 1):
        step.clear()
        before = torch.cuda.memory_allocated() if cuda else 0
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if cuda:
            torch.cuda.synchronize()
            peak = max(peak, torch.cuda.max_memory_allocated() - before)
        if turn:
            seconds.append(time.perf_counter() - start)
    return {"s": statistics.median(seconds), "peak GiB": peak / GIB}


def fits(step: Step, count: int) -> bool:
    step.clear()
    try:
        step.one_graph(count)
    except torch.cuda.OutOfMemoryError:
        return False
    return True


def largest_in_one_graph(step: Step, *, low: int, high: int, within: float) -> int:
    """The largest bag that one graph manages, to `within` of it; `low` is known to fit."""
    while fits(step, high):
        low, high = high, 2 * high
    while high - low > max(1, within * low):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(step, middle) else (low, middle)
    step.clear()
    return low


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tiles", type=int, nargs="+", default=[1000, 2000, 4000])
    parser.add_argument("--one-graph", type=int, nargs="*", default=[128, 256])
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--config", default="dinov2_vitb14", choices=sorted(CONFIGS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    step = Step(args.config, torch.device(args.device))
    rows = []
    for count in args.one_graph:
        found = measured(step, lambda n=count: step.one_graph(n), repeats=args.repeats)
        rows.append({"step": "one graph", "tiles": count, **found})
    for count in (*args.one_graph, *args.tiles):
        found = measured(step, lambda n=count: step.exact(n, args.chunk), repeats=args.repeats)
        rows.append({"step": f"exact, {args.chunk} a chunk", "tiles": count, **found})
    for row in rows:
        row["tiles/s"] = row["tiles"] / row["s"]
    more: dict[str, Any] = {"config": args.config, "chunk": args.chunk}
    if step.device.type == "cuda":
        low = max(args.one_graph, default=1)
        more["largest_bag_in_one_graph"] = largest_in_one_graph(
            step, low=low, high=4 * low, within=0.02
        )
        total = torch.cuda.get_device_properties(step.device).total_memory
        more["gpu_gib"] = total / GIB
    report("A training step on a whole bag", rows, args.json, **more)
    for name, value in more.items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    main()
