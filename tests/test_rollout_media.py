"""Image statistics, by hand on images whose values are known."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from rollout_workers.media import decode_media, image_statistics
from tests.fakes import FakePolicy

NAMES = {
    "brightness_mean", "dark_share", "saturated_share", "color_entropy", "laplacian_variance", "edge_density", "fft_grid_peak", "diversity",
}  # fmt: skip


def flat(red: int, green: int, blue: int) -> NDArray[np.uint8]:
    return np.broadcast_to(np.array([red, green, blue], dtype=np.uint8), (64, 64, 3)).copy()


def statistic(name: str, *images: NDArray[np.uint8]) -> list[float]:
    return [float(value) for value in image_statistics(np.stack(images))[name]]


def test_every_statistic_has_one_float32_an_image() -> None:
    statistics = image_statistics(np.stack([flat(0, 0, 0), flat(255, 255, 255), flat(9, 9, 9)]))
    assert set(statistics) == NAMES
    assert all(values.dtype == np.float32 and values.shape == (3,) and np.isfinite(values).all() for values in statistics.values())


def test_brightness_is_the_mean_luma() -> None:
    values = statistic("brightness_mean", flat(0, 0, 0), flat(255, 255, 255), flat(255, 0, 0), flat(0, 0, 255))
    assert values == pytest.approx([0, 1, 0.299, 0.114], abs=1e-6)


def test_dark_share_counts_pixels_below_an_eighth() -> None:
    half = flat(200, 200, 200)
    half[:32] = 20
    assert statistic("dark_share", flat(0, 0, 0), half, flat(32, 32, 32)) == [1.0, 0.5, 0.0]  # 32/255 is just above 0.125


def test_saturated_share_counts_pure_colors_and_not_black_or_gray() -> None:
    quarter = flat(128, 128, 128)
    quarter[:32, :32] = (255, 10, 10)
    assert statistic("saturated_share", flat(0, 0, 255), flat(0, 0, 0), flat(128, 128, 128), quarter) == [1.0, 0.0, 0.0, 0.25]


def test_color_entropy_is_in_bits() -> None:
    quarters = flat(0, 0, 0)
    quarters[:32, :32], quarters[:32, 32:], quarters[32:, :32] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    assert statistic("color_entropy", flat(7, 7, 7), quarters) == [0.0, 2.0]


def test_laplacian_variance_of_a_single_bright_pixel() -> None:
    """Inner 62 x 62 pixels: one value -4 * 255, four values 255, mean 0."""
    dot = flat(0, 0, 0)
    dot[30, 30] = 255
    expected = (16 + 4) * 255**2 / 62**2
    assert statistic("laplacian_variance", flat(90, 90, 90), dot) == pytest.approx([0, expected], rel=1e-5)


def test_edge_density_of_a_step() -> None:
    """A vertical black-white step: central differences see it in two of 62 inner columns."""
    step = flat(0, 0, 0)
    step[:, 32:] = 255
    assert statistic("edge_density", flat(90, 90, 90), step) == pytest.approx([0, 2 / 62], abs=1e-6)


def test_the_grid_peak_stands_out_on_a_checkerboard_and_not_on_noise_or_a_flat_image() -> None:
    rows, columns = np.indices((64, 64))
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    boards = [np.clip(noise // 4 + 96 + 30 * ((rows // half + columns // half) % 2)[..., None], 0, 255).astype(np.uint8) for half in (1, 4)]
    fine, coarse, plain, none = statistic("fft_grid_peak", *boards, noise, flat(90, 90, 90))
    assert fine > 50
    assert coarse > 50
    assert plain < 12  # the largest of 12 exponential variables over their mean
    assert none <= 1.0 + 1e-6


def test_diversity_is_the_mean_pairwise_distance_and_the_same_in_every_row() -> None:
    values = statistic("diversity", flat(0, 0, 0), flat(0, 0, 0), flat(255, 255, 255))
    assert values == pytest.approx([2 / 3] * 3, abs=1e-6)  # pairs: 0, 1, 1
    assert statistic("diversity", flat(0, 0, 0)) == [0.0]
    assert statistic("diversity", flat(0, 0, 0), flat(51, 0, 0))[0] == pytest.approx(0.2 / math.sqrt(3), abs=1e-6)


@pytest.mark.parametrize("size", [(16, 16), (5, 7), (40, 72)])
def test_images_of_any_size_have_statistics(size: tuple[int, int]) -> None:
    images = np.random.default_rng(1).integers(0, 256, (3, *size, 3)).astype(np.uint8)
    assert all(np.isfinite(values).all() for values in image_statistics(images).values())


def test_decoding_is_the_policys_in_micro_batches() -> None:
    policy, latents = FakePolicy(), np.random.default_rng(2).standard_normal((5, 4, 4, 4)).astype(np.float32)
    media = decode_media(policy, latents, micro_batch=2)
    expected = np.round(255 / (1 + np.exp(-latents[:, :3].astype(np.float64)))).transpose(0, 2, 3, 1).repeat(4, 1).repeat(4, 2)
    assert media.images.dtype == np.uint8
    assert np.abs(media.images.astype(int) - expected).max() <= 1  # a rounding tie may fall either way
    assert set(media.statistics) == NAMES
