"""The tissue of the miniature: images, regions, their two views, and what the teacher says of them.

Everything is computed once, on one device, and kept as .npy files that every run maps.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d

from xmag.distill.teachers import Teacher
from xmag.distill.views import REGION_PX, SIDE, low_view, teacher_tiles
from xmag.training.augmentation import NONE, Augmentation, augment, draw

AUGMENTATION = Augmentation(brightness=0.1, contrast=0.1, saturation=0.1, hue=0.05)
KINDS = ("augmented", "plain")
"""Whether the teacher saw each region changed, or as it is."""
_TILES_AT_ONCE = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Images:
    """uint8 pixels (N, S, S, 3), and for each image its class and patient."""

    pixels: Tensor
    classes: NDArray[np.str_]
    patients: NDArray[np.str_]


def read_images(folder: Path) -> Images:
    """The images CLASS___CASE-... of a folder, sorted by name."""
    paths = sorted(folder.glob("*___*.jpg"))
    if not paths:
        raise SystemExit(f"{folder} has no CLASS___CASE-*.jpg; give the osteosarcoma images")
    pixels = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])
    classes, places = zip(*(path.stem.split("___") for path in paths), strict=True)
    return Images(
        pixels=torch.from_numpy(pixels),
        classes=np.array(classes),
        patients=np.array([patient_of(place) for place in places]),
    )


def patient_of(place: str) -> str:
    """ "Case-48" of "Case-48-P5-...", "P9" of "P9-B12-..."."""
    first, second = place.split("-")[:2]
    return f"{first}-{second}" if first == "Case" else first


def crops(pixels: Tensor, corners: NDArray[np.int64]) -> Tensor:
    """The region of each image at its (x, y): uint8 (N, 896, 896, 3)."""
    places = zip(pixels, corners.tolist(), strict=True)
    return torch.stack([i[y : y + REGION_PX, x : x + REGION_PX] for i, (x, y) in places])


def fixed_corners(size: int, count: int) -> list[tuple[int, int]]:
    """The centre and the four corners, as many of them as asked for."""
    end = size - REGION_PX
    middle = end // 2
    return [(middle, middle), (0, 0), (end, end), (end, 0), (0, end)][:count]


def box_view(high: Tensor) -> Tensor:
    """Box averages of 4 x 4 px: uint8 (B, 224, 224, 3), near what fast decoding gives."""
    planes = high.permute(0, 3, 1, 2).float()
    return avg_pool2d(planes, SIDE).round_().byte().permute(0, 2, 3, 1)


@torch.inference_mode()
def taught(teacher: Teacher, tiles: Tensor) -> Tensor:
    """The teacher's features of uint8 tiles (M, 224, 224, 3): float32 (M, D)."""
    return torch.cat([teacher.features(part).float() for part in tiles.split(_TILES_AT_ONCE)])


def prepare(
    images: Images, teacher: Teacher, out: Path, *, variants: int, count: int, limit_s: float
) -> dict[str, Any]:
    """Write the training regions of both kinds and those for evaluation; says what was made.

    A variant is one crop of each image. Where `limit_s` is over, there are fewer of them.
    """
    start = time.perf_counter()
    made: dict[str, Any] = {}
    _write(out, "evaluation", evaluation_set(images, teacher, count))
    for kind in KINDS:
        ends = start + limit_s * (KINDS.index(kind) + 1) / len(KINDS)
        rounds = []
        for variant in range(made.get(KINDS[0], variants)):  # as many of both
            rounds.append(training_round(images, teacher, kind, variant))
            if time.perf_counter() > ends:
                break
        made[kind] = len(rounds)
        _write(out, kind, {key: np.concatenate([r[key] for r in rounds]) for key in rounds[0]})
    made["seconds"] = time.perf_counter() - start
    (out / "prepared.json").write_text(json.dumps(made) + "\n")
    return made


def training_round(
    images: Images, teacher: Teacher, kind: str, variant: int
) -> dict[str, NDArray[Any]]:
    """One crop of every image: both low views, and the features of the tiles as float16."""
    size, number = images.pixels.shape[1], len(images.pixels)
    rng = np.random.default_rng((11, variant))
    corners = rng.integers(size - REGION_PX + 1, size=(number, 2))
    draws = draw(
        7, variant, range(number), 0, augmentation=AUGMENTATION if kind == "augmented" else NONE
    )
    parts = []
    for rows in torch.arange(number).split(16):
        high = augment(crops(images.pixels[rows], corners[rows.numpy()]), draws[rows])
        target = taught(teacher, teacher_tiles(high)).unflatten(0, (-1, SIDE**2))
        parts.append((low_view(high), box_view(high), target.half()))
    names = ("lanczos", "box", "target")
    return {
        name: torch.cat(column).cpu().numpy()
        for name, column in zip(names, zip(*parts, strict=True), strict=True)
    }


def evaluation_set(images: Images, teacher: Teacher, count: int) -> dict[str, NDArray[Any]]:
    """The fixed crops, image by image: low views, and the teacher at 20x and fed 5x pixels."""
    columns: dict[str, list[Tensor]] = {"lanczos": [], "target": [], "coarse": []}
    for corner in fixed_corners(images.pixels.shape[1], count):
        for pixels in images.pixels.split(16):
            high = crops(pixels, np.array([corner] * len(pixels)))
            low = low_view(high)
            columns["lanczos"].append(low)
            columns["target"].append(taught(teacher, teacher_tiles(high)).unflatten(0, (-1, 16)))
            columns["coarse"].append(taught(teacher, low))
    return {
        name: torch.cat(parts).unflatten(0, (count, -1)).transpose(0, 1).cpu().numpy()
        for name, parts in columns.items()
    }


def _write(out: Path, kind: str, arrays: dict[str, NDArray[Any]]) -> None:
    for name, array in arrays.items():
        np.save(out / f"{kind}-{name}.npy", np.ascontiguousarray(array))


def kept(out: Path, kind: str, name: str) -> NDArray[Any]:
    """An array that `prepare` wrote, mapped."""
    return np.load(out / f"{kind}-{name}.npy", mmap_mode="r")
