"""From clean latents to images and the statistics that show reward hacking (NumPy only, a few milliseconds an image)."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from common.policy.base import Policy
from common.types import FloatArray, MediaBatch

Image = NDArray[np.float64]  # [H, W, 3] in [0, 1], or [H, W] luma
LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
DARK_LUMA = 0.125  # below it a pixel counts as dark
SATURATED = 0.9  # HSV saturation from which a pixel counts, if its value is above DARK_LUMA
EDGE_GRADIENT = 0.1  # luma change a pixel (central differences) from which it counts as an edge
COLOR_LEVELS = 8  # bins a channel
GRID_PERIODS = (2, 4, 8, 16)  # pixels; patches, VAE cells and their checkerboards
DIVERSITY_SIZE = 8  # images are averaged down to at most this side before they are compared


@torch.no_grad()
def decode_media(policy: Policy, final_latents: FloatArray, micro_batch: int) -> MediaBatch:
    """Decode clean latents and measure the images.

    Args:
        policy: its decoder is used, its adapter is not.
        final_latents: [K, C, h, w].
        micro_batch: images a decode.

    Returns:
        K images [H, W, 3] uint8 with their statistics.
    """
    parts = [
        policy.decode(torch.from_numpy(final_latents[first : first + micro_batch]).to(policy.device))
        for first in range(0, len(final_latents), micro_batch)
    ]
    images: NDArray[np.uint8] = np.concatenate(parts)
    return MediaBatch(images=images, statistics=image_statistics(images))


def image_statistics(images: NDArray[np.uint8]) -> dict[str, FloatArray]:
    """Return name -> [K]: one value an image, and the group's diversity repeated for each.

    brightness_mean: mean luma (BT.601), 0-1.
    dark_share: share of pixels with luma < 0.125.
    saturated_share: share of pixels with HSV saturation >= 0.9 and value > 0.125.
    color_entropy: entropy in bits of the 8x8x8 RGB histogram, 0-9.
    laplacian_variance: variance of the 4-neighbour Laplacian of luma in 0-255 units, inner pixels.
    edge_density: share of inner pixels whose luma gradient (central differences) is > 0.1 a pixel.
    fft_grid_peak: how far power at periods of 2, 4, 8, 16 pixels stands out of its neighbourhood; about 1 without a grid.
    diversity: mean over pairs of images of the RMS difference of their 8x8 averages, 0-1; 0 for a single image.
    """
    scaled = images.astype(np.float64) / 255.0
    result: dict[str, FloatArray] = {
        name: np.array([measure(image) for image in scaled], dtype=np.float32) for name, measure in MEASURES.items()
    }
    result["diversity"] = np.full(len(images), _diversity(scaled), dtype=np.float32)
    return result


def _luma(image: Image) -> Image:
    luma: Image = image @ LUMA
    return luma


def _brightness_mean(image: Image) -> float:
    return float(_luma(image).mean())


def _dark_share(image: Image) -> float:
    return float((_luma(image) < DARK_LUMA).mean())


def _saturated_share(image: Image) -> float:
    value, lowest = image.max(axis=-1), image.min(axis=-1)
    lit = value > DARK_LUMA
    return float((lit & (value - lowest >= SATURATED * value)).mean())


def _color_entropy(image: Image) -> float:
    bins = np.minimum((image * COLOR_LEVELS).astype(np.int64), COLOR_LEVELS - 1)
    codes = (bins[..., 0] * COLOR_LEVELS + bins[..., 1]) * COLOR_LEVELS + bins[..., 2]
    share = np.unique(codes, return_counts=True)[1] / codes.size
    return float(abs((share * np.log2(share)).sum()))


def _laplacian_variance(image: Image) -> float:
    y = _luma(image) * 255.0
    laplacian = y[:-2, 1:-1] + y[2:, 1:-1] + y[1:-1, :-2] + y[1:-1, 2:] - 4 * y[1:-1, 1:-1]
    return float(laplacian.var())


def _edge_density(image: Image) -> float:
    y = _luma(image)
    gradient = np.hypot((y[2:, 1:-1] - y[:-2, 1:-1]) / 2, (y[1:-1, 2:] - y[1:-1, :-2]) / 2)
    return float((gradient > EDGE_GRADIENT).mean())


def _fft_grid_peak(image: Image) -> float:
    """Max over grid frequencies (along rows, columns, and both) of power / mean power of its 7x7 neighbourhood."""
    y = _luma(image)
    power = np.abs(np.fft.fft2(y - y.mean())) ** 2
    floor = 1e-3 * power.mean() + 1e-12  # keeps a flat neighbourhood from making a peak of rounding
    height, width = y.shape
    peaks = [0.0]
    for period in GRID_PERIODS:
        if height % period or width % period or min(height, width) < 2 * period:
            continue
        row, column = height // period, width // period
        for u, v in ((row, 0), (0, column), (row, column)):
            around = power[np.ix_(np.arange(u - 3, u + 4) % height, np.arange(v - 3, v + 4) % width)]
            ring = (around.sum() - power[u, v]) / (around.size - 1)
            peaks.append(float((power[u, v] + floor) / (ring + floor)))
    return max(peaks)


def _diversity(images: Image) -> float:
    """Mean pairwise RMS distance of block averages: [K, H, W, 3] -> one number."""
    count, height, width, _ = images.shape
    if count < 2:
        return 0.0
    rows, columns = max(height // DIVERSITY_SIZE, 1), max(width // DIVERSITY_SIZE, 1)
    cropped = images[:, : height // rows * rows, : width // columns * columns]
    small = cropped.reshape(count, height // rows, rows, width // columns, columns, 3).mean(axis=(2, 4)).reshape(count, -1)
    distances = [np.sqrt(((small[i + 1 :] - small[i]) ** 2).mean(axis=1)) for i in range(count - 1)]
    return float(np.concatenate(distances).mean())


MEASURES: dict[str, Callable[[Image], float]] = {
    "brightness_mean": _brightness_mean,
    "dark_share": _dark_share,
    "saturated_share": _saturated_share,
    "color_entropy": _color_entropy,
    "laplacian_variance": _laplacian_variance,
    "edge_density": _edge_density,
    "fft_grid_peak": _fft_grid_peak,
}
