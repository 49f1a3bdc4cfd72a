"""Colours of embeddings: their principal components as lightness and hues."""

import numpy as np
from numpy.typing import NDArray

_RGB_OF_XYZ = np.array(
    [[3.2406, -1.5372, -0.4986], [-0.9689, 1.8758, 0.0415], [0.0557, -0.2040, 1.0570]]
)
"""CIE XYZ (D65) to linear sRGB: IEC 61966-2-1."""


def principal_components(
    features: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(N, 3) scores of the first three components in [-1, 1]; (3,) shares of the variance."""
    if len(features) == 0:
        return np.zeros((0, 3)), np.zeros(3)
    centred = features - features.mean(0)
    variances, axes = np.linalg.eigh(centred.T @ centred)
    variances, axes = variances[::-1][:3].clip(0), axes[:, ::-1][:, :3]
    # The sign of a component is arbitrary: without a rule, a picture could change with the CPU.
    axes = axes * np.sign(axes[np.abs(axes).argmax(0), np.arange(axes.shape[1])])
    scores = centred @ axes
    low, high = np.percentile(scores, (2, 98), axis=0)
    varies = high - low > 1e-9
    unit = 2 * (scores - low) / np.where(varies, high - low, 1) - 1
    scores = np.where(varies, unit.clip(-1, 1), 0)
    missing = 3 - scores.shape[1]
    total = max(float((centred**2).sum()), 1e-300)
    return np.pad(scores, ((0, 0), (0, missing))), np.pad(variances, (0, missing)) / total


def component_colours(scores: NDArray[np.float64]) -> NDArray[np.uint8]:
    """uint8 (N, 3) sRGB of (N, 3) scores: CIELAB's b, L and a (D65; IEC 61966-2-1)."""
    blue_yellow, lightness, green_magenta = scores.T
    y = (65 + 20 * lightness + 16) / 116
    f = np.stack([y + 45 * green_magenta / 500, y, y - 55 * blue_yellow / 200], axis=1)
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29))
    linear = (xyz * (0.95047, 1.0, 1.08883)) @ _RGB_OF_XYZ.T
    linear = linear.clip(0, 1)
    srgb = np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear)
    return np.asarray(np.rint(srgb * 255), np.uint8)
