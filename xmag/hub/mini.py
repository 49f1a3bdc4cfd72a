"""xmag-mini: a small ViT inside the package, so that everything runs without a network.

Its weights are fixed and UNTRAINED: uniform numbers from a frozen stream, exact on every platform.
"""

import hashlib
import math

import numpy as np
import torch
from torch import Tensor

from xmag.vit import ViTConfig, empty_vit

_SEED = 20260820
_LAYER_SCALE = 0.5
_TOKEN_STD = 0.3


def mini_state(config: ViTConfig) -> dict[str, Tensor]:
    """The parameters of xmag-mini, float32."""
    # RandomState's stream is frozen by numpy's policy, and uniform numbers take no logarithm or
    # root whose last bit might differ between platforms.
    stream = np.random.RandomState(_SEED)
    shapes = {key: tuple(t.shape) for key, t in empty_vit(config).state_dict().items()}
    return {key: _parameter(key, shapes[key], stream) for key in sorted(shapes)}


def _parameter(key: str, shape: tuple[int, ...], stream: np.random.RandomState) -> Tensor:
    name = key.rsplit(".", 1)[-1]
    if name == "gamma":
        return torch.full(shape, _LAYER_SCALE, dtype=torch.float32, device="cpu")
    if len(shape) == 1:
        fill = 1.0 if "norm" in key and name == "weight" else 0.0
        return torch.full(shape, fill, dtype=torch.float32, device="cpu")
    std = math.prod(shape[1:]) ** -0.5 if name == "weight" else _TOKEN_STD
    bound = std * 3**0.5  # of a uniform distribution with this standard deviation
    values = (stream.random_sample(shape) * 2 - 1) * bound
    return torch.from_numpy(values.astype(np.float32))


def state_sha256(state: dict[str, Tensor]) -> str:
    """The SHA-256 of parameters, in hex: each name and its little-endian bytes, sorted by name."""
    digest = hashlib.sha256()
    for key in sorted(state):
        digest.update(key.encode())
        digest.update(state[key].numpy().astype("<f4").tobytes())
    return digest.hexdigest()
