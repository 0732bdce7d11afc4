"""The sigma grid of a denoising run: 1 is noise, 0 is data, one place for every side."""

import math

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
    _check(num_steps, shift)
    lowest = shift_sigma(torch.tensor(1 / TRAIN_TIMESTEPS, dtype=torch.float64), shift)
    position = torch.arange(num_steps, dtype=torch.float64) / max(num_steps - 1, 1)
    return _closed(shift_sigma(1 - position * (1 - lowest), shift))


def even_grid(num_steps: int, shift: float) -> torch.Tensor:
    """Return T even steps from 1 to 1 / T, shifted once, and 0: the grid of FLUX's pipeline and of DanceGRPO.

    diffusers' FluxPipeline hands these sigmas to its scheduler, which shifts them by a constant or, dynamically, by exp(mu)
    (see dynamic_shift); equal to it within 1e-6. Unlike sigma_grid, its last positive sigma is that of 1 / T.

    Args:
        num_steps: T >= 1.
        shift: > 0; 1 leaves the steps even.

    Returns:
        [T+1] float32 on CPU, strictly decreasing from 1 to 0.

    Raises:
        ConfigError: no step, or a shift that is not positive.
    """
    _check(num_steps, shift)
    return _closed(shift_sigma(1 - torch.arange(num_steps, dtype=torch.float64) / num_steps, shift))


def dynamic_shift(num_tokens: int, *, base_tokens: int = 256, max_tokens: int = 4096, base_mu: float = 0.5, max_mu: float = 1.15) -> float:
    """Return exp(mu), the shift of a scheduler with dynamic shifting: mu is linear in the number of image tokens.

    Source: Stable Diffusion 3 (arXiv 2403.03206, section 5.3.2) as FLUX and diffusers' FluxPipeline have it, whose values are the defaults.
    """
    slope = (max_mu - base_mu) / (max_tokens - base_tokens)
    return math.exp(base_mu + slope * (num_tokens - base_tokens))


def timesteps_of(sigma: torch.Tensor) -> torch.Tensor:
    """Return what the network is fed: 1000 sigma, in sigma's dtype and shape."""
    return sigma * TRAIN_TIMESTEPS


def _check(num_steps: int, shift: float) -> None:
    if num_steps < 1 or shift <= 0:
        raise ConfigError(f"sigma grid: num_steps {num_steps} and shift {shift} came; both must be positive; mend num_steps")


def _closed(sigmas: torch.Tensor) -> torch.Tensor:
    """[T] float64 -> [T+1] float32: 0 at the end."""
    return torch.cat([sigmas, torch.zeros(1, dtype=torch.float64)]).to(torch.float32)
