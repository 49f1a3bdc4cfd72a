"""The tissue that no student of the miniature sees: images, crops, and the teacher's features."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from xmag.distill.teachers import Teacher
from xmag.distill.views import REGION_PX, SIDE, low_view, teacher_tiles
from xmag.geometry import Resample

_TILES_AT_ONCE = 512
_CROPS = 5
Rows = NDArray[np.float32]


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


def fixed_corners(size: int) -> list[tuple[int, int]]:
    """The centre and the four corners."""
    end = size - REGION_PX
    middle = end // 2
    return [(middle, middle), (0, 0), (end, end), (end, 0), (0, end)]


def crops(pixels: Tensor) -> Tensor:
    """The fixed regions of each image, uint8 (N * 5, 896, 896, 3), image by image."""
    corners = fixed_corners(pixels.shape[1])
    return torch.stack(
        [image[y : y + REGION_PX, x : x + REGION_PX] for image in pixels for x, y in corners]
    )


@torch.inference_mode()
def taught(teacher: Teacher, tiles: Tensor) -> Tensor:
    """The teacher's features of uint8 tiles (M, 224, 224, 3): float32 (M, D)."""
    return torch.cat([teacher.features(part).float() for part in tiles.split(_TILES_AT_ONCE)])


def per_image(rows: Tensor | Rows) -> Rows:
    """The mean over the five crops of each image: (N * 5, D) -> float32 (N, D)."""
    return np.asarray(rows, np.float32).reshape(-1, _CROPS, rows.shape[-1]).mean(1)


def low_views(images: Images, device: torch.device, kernel: Resample) -> Tensor:
    """The low views of all crops: uint8 (N * 5, 224, 224, 3) on the device."""
    return torch.cat([low_view(crops(some.to(device)), kernel) for some in images.pixels.split(4)])


def teacher_rows(teacher: Teacher, images: Images, out: Path, device: torch.device) -> Rows:
    """The teacher's embeddings of images, of tiles at 20x; kept in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, pixels in enumerate(images.pixels.split(4)):
        paths.append(out / f"teacher-{number:03d}.npz")
        if paths[-1].exists():
            continue
        high = crops(pixels.to(device))
        fine = taught(teacher, teacher_tiles(high)).unflatten(0, (-1, SIDE**2)).mean(1).cpu()
        part = paths[-1].with_suffix(".part.npz")
        np.savez(part, fine=per_image(fine))
        part.rename(paths[-1])
    return np.concatenate([np.load(path)["fine"] for path in paths])


def colours(low: Tensor) -> Rows:
    """Twelve colour statistics: mean and deviation of R, G, B, of hue, saturation and value."""
    rows = []
    for view in low.cpu().numpy():
        hsv = np.asarray(Image.fromarray(view).convert("HSV"))
        pixels = np.concatenate([view, hsv], axis=-1).reshape(-1, 6).astype(np.float64)
        rows.append(np.concatenate([pixels.mean(0), pixels.std(0)]))
    return per_image(np.stack(rows))
