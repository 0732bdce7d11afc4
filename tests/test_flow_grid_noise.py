"""The sigma grid (K12) and the noise rule."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from common.errors import ConfigError
from common.flow.grid import even_grid, shift_sigma, sigma_grid, timesteps_of
from common.flow.noise import SHARED, draw_noise, initial_noise, seeded_noise


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
@pytest.mark.parametrize("num_steps", [1, 2, 6, 10, 28, 40])
def test_the_grid_is_the_one_of_diffusers(num_steps: int, shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(num_steps)
    grid = sigma_grid(num_steps, shift)
    assert grid.dtype == torch.float32
    assert grid.shape == (num_steps + 1,)
    assert (grid - scheduler.sigmas).abs().max() <= 1e-6
    assert (timesteps_of(grid[:-1]) - scheduler.timesteps).abs().max() <= 1e-3
    assert grid[0] == 1
    assert grid[-1] == 0
    assert (grid.diff() < 0).all()


def test_ten_steps_of_sd35_are_the_known_list() -> None:
    expected = torch.tensor([1000, 960, 913, 858, 790, 707, 602, 465, 278, 8.9, 0])
    rounding = torch.tensor([0.5] * 9 + [0.05, 0.0])  # the list is rounded to the digits shown
    assert ((timesteps_of(sigma_grid(10, 3.0)) - expected).abs() <= rounding).all()


def test_the_stds_of_ten_flow_sde_steps_are_the_measured_list() -> None:
    """Section 1.9, three digits, eta 0.7."""
    from common.flow.kernels import FlowSdeKernel

    grid = sigma_grid(10, 3.0)
    zeros = torch.zeros(10, 1, 1, 1)
    stds = FlowSdeKernel(0.7).transition(zeros, zeros, grid[:-1], grid[1:]).std.flatten()
    expected = torch.tensor([0.700, 0.743, 0.536, 0.446, 0.392, 0.353, 0.319, 0.282, 0.225, 0.006])
    assert (stds - expected).abs().max() <= 0.0006


def test_a_shift_is_undone_by_its_inverse() -> None:
    sigma = torch.linspace(0, 1, 101, dtype=torch.float64)
    assert (shift_sigma(shift_sigma(sigma, 3.0), 1 / 3.0) - sigma).abs().max() <= 1e-14


@pytest.mark.parametrize(("num_steps", "shift"), [(0, 3.0), (10, 0.0)])
def test_a_grid_without_steps_or_shift_is_refused(num_steps: int, shift: float) -> None:
    with pytest.raises(ConfigError, match="sigma grid"):
        sigma_grid(num_steps, shift)
    with pytest.raises(ConfigError, match="sigma grid"):
        even_grid(num_steps, shift)


def test_noise_is_standard_normal_float32_on_the_cpu() -> None:
    noise = seeded_noise(7, (16, 80, 80))
    assert noise.dtype == torch.float32
    assert noise.device.type == "cpu"
    assert abs(noise.mean().item()) < 4 / np.sqrt(noise.numel())
    assert abs(noise.var().item() - 1) < 4 * np.sqrt(2 / noise.numel())


def test_noise_has_a_known_value_so_that_no_machine_or_release_changes_it() -> None:
    assert draw_noise(1, 2, 3, "init", step=0, shape=(4,)).tolist() == pytest.approx(GOLDEN, abs=1e-6)


GOLDEN = [2.683856, -1.8273674, 0.1663546, 0.1989944]  # Philox keyed by the seed's SHA-256


def test_every_part_of_the_key_changes_the_noise_and_nothing_else_does() -> None:
    keys = [(s, g, k, p, t) for s in (0, 1) for g in (0, 1) for k in (0, 1, SHARED) for p in ("init", "step") for t in (0, 1)]
    first = {key: draw_noise(*key[:4], step=key[4], shape=(2, 3, 3)).numpy().tobytes() for key in keys}
    torch.manual_seed(123)
    again = {key: draw_noise(*key[:4], step=key[4], shape=(2, 3, 3)).numpy().tobytes() for key in reversed(keys)}
    assert first == again
    assert len(set(first.values())) == len(keys)


def test_all_initial_noises_of_an_epoch_are_distinct_unless_shared() -> None:
    """R5: a hash set over 40 groups of 16; a shared start is one a group."""
    independent = {initial_noise(5, g, k, (4, 4, 4), shared=False).numpy().tobytes() for g in range(40) for k in range(16)}
    shared = {initial_noise(5, g, k, (4, 4, 4), shared=True).numpy().tobytes() for g in range(40) for k in range(16)}
    assert len(independent) == 640
    assert len(shared) == 40
