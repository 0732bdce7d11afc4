"""The sigma grid of a denoising run: 1 is noise, 0 is data, one place for every side."""

import torch

from common.errors import ConfigError

TRAIN_TIMESTEPS = 1000  # of diffusers' FlowMatchEulerDiscreteScheduler, and the factor from sigma to the network's timestep


def shift_sigma(sigma: torch.Tensor, shift: float) -> torch.Tensor:
    """Move sigmas toward noise: s t / (1 + (s - 1) t); shift 1/s undoes shift s.

    Source: resolution shift of Stable Diffusion 3 (arXiv 2403.03206, eq. 23), as in diffusers.
    """
    return shift * sigma / (1 + (shift - 1) * sigma)


def sigma_grid(num_steps: int, shift: float) -> torch.Tensor:
    """Return the grid of diffusers' FlowMatchEulerDiscreteScheduler (no dynamic shifting) to 1e-6.

    The scheduler spaces timesteps evenly between the ends of its *shifted* training sigmas and shifts them again, so the
    last positive sigma is not 1 / num_steps but near 0.009 at shift 3.

    Args:
        num_steps: T >= 1.
        shift: the scheduler's `shift` (SD3.5: 3), > 0.

    Returns:
        [T+1] float32 on CPU, strictly decreasing from 1 to 0.

    Raises:
        ConfigError: no step, or a shift that is not positive.
    """
    if num_steps < 1 or shift <= 0:
        raise ConfigError(f"sigma_grid: num_steps {num_steps} and shift {shift} came; both must be positive; mend num_steps")
    lowest = shift_sigma(torch.tensor(1 / TRAIN_TIMESTEPS, dtype=torch.float64), shift)
    position = torch.arange(num_steps, dtype=torch.float64) / max(num_steps - 1, 1)
    sigmas = shift_sigma(1 - position * (1 - lowest), shift)
    return torch.cat([sigmas, torch.zeros(1, dtype=torch.float64)]).to(torch.float32)


def timesteps_of(sigma: torch.Tensor) -> torch.Tensor:
    """Return what the network is fed: 1000 sigma, in sigma's dtype and shape."""
    return sigma * TRAIN_TIMESTEPS
