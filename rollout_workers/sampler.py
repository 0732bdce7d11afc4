"""Sampling: the denoising runs of one group, and the deterministic images of an evaluation sheet.

Results depend on (run seed, group number, sample index, weights, micro-batch size) and on nothing else. Shape letters: K group
size, T steps, W stochastic steps, L latents kept, B a micro-batch, C h w latent channels, height, width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from common.errors import DataError, FlowfleetError
from common.flow.grid import timesteps_of
from common.flow.kernels import OdeKernel, make_kernel
from common.flow.noise import draw_noise, initial_noise, seeded_noise
from common.policy.base import FeatureBatch, Policy
from common.seeding import derive_seed
from common.types import FloatArray, PromptFeatures, SamplerSpec, Trajectory


class SamplingError(FlowfleetError):
    """A group could not be sampled (numbers that are not finite); its lease fails, nothing of it is kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kept:
    """What a micro-batch of denoising runs leaves behind."""

    latents: torch.Tensor  # [B, L, C, h, w]
    log_prob: torch.Tensor  # [B, W]
    final: torch.Tensor  # [B, C, h, w]


def sample_group(
    policy: Policy, features: PromptFeatures, spec: SamplerSpec, *, run_seed: int, group: int, group_size: int, micro_batch: int
) -> tuple[Trajectory, ...]:
    """Sample the K runs of one prompt: the kernel of the spec inside its window, the ODE outside.

    Args:
        policy: holds the weights to sample with.
        features: of the prompt.
        spec: kernel, noise level, steps, guidance, window, shared start.
        run_seed: the run's seed.
        group: the group's number.
        group_size: K.
        micro_batch: samples a forward; part of what fixes the bits.

    Returns:
        K trajectories in sample order; latents around the window's steps only (L = 0 without a window).

    Raises:
        SamplingError: latents or log-probs that are not finite.
    """
    grid = policy.sigmas(spec.num_steps)
    window = np.asarray(spec.window, dtype=np.int16)
    kept_states = np.asarray(sorted({state for step in spec.window for state in (step, step + 1)}), dtype=np.int16)
    sigma, next_sigma = grid[window.astype(np.int64)], grid[window.astype(np.int64) + 1]
    rows: list[Trajectory] = []
    for samples in _slices(group_size, micro_batch):
        kept = _denoise(policy, [features] * len(samples), spec, grid, run_seed=run_seed, group=group, samples=samples)
        for row, sample in enumerate(samples):
            rows.append(
                Trajectory(
                    sample_index=sample,
                    seed=derive_seed(run_seed, group, sample),
                    step_index=window,
                    timestep=timesteps_of(sigma).numpy(),
                    sigma=sigma.numpy(),
                    next_sigma=next_sigma.numpy(),
                    latents=_to_numpy(kept.latents[row]),
                    latent_index=kept_states,
                    behavior_log_prob=_to_numpy(kept.log_prob[row]),
                    final_latents=_to_numpy(kept.final[row]),
                    media_row=sample,
                )
            )
    _check_finite(rows, group)
    return tuple(rows)


@torch.no_grad()
def _denoise(
    policy: Policy, features: Sequence[PromptFeatures], spec: SamplerSpec, grid: torch.Tensor, *, run_seed: int, group: int, samples: range
) -> _Kept:
    """Run T steps for one micro-batch. A loop over steps: velocity, transition, next latents; the window's states are kept."""
    shape, device = policy.latent_shape, policy.device
    kernel, ode = make_kernel(spec.kernel, spec.noise_level), OdeKernel()
    batch = policy.batch_features(features)
    latents = torch.stack([initial_noise(run_seed, group, k, shape, shared=spec.shared_init) for k in samples]).to(device)
    states: dict[int, torch.Tensor] = {}
    log_probs: list[torch.Tensor] = []
    for step in range(spec.num_steps):
        sigma, next_sigma = _sigmas(grid, step, len(samples), device)
        velocity = policy.velocity(latents, sigma, batch, guidance_scale=spec.guidance_scale)
        if step in spec.window:
            transition = kernel.transition(latents, velocity, sigma, next_sigma)
            noise = torch.stack([draw_noise(run_seed, group, k, "step", step=step, shape=shape) for k in samples]).to(device)
            following = kernel.draw(transition, noise)
            log_probs.append(kernel.log_prob(following, transition))
            states |= {step: latents, step + 1: following}
        else:
            following = ode.transition(latents, velocity, sigma, next_sigma).mean
        latents = following
    empty = latents.new_zeros((len(samples), 0))
    return _Kept(
        latents=torch.stack([states[index] for index in sorted(states)], dim=1) if states else latents.new_zeros((len(samples), 0, *shape)),
        log_prob=torch.stack(log_probs, dim=1) if log_probs else empty,
        final=latents,
    )


@torch.no_grad()
def sample_images(
    policy: Policy, features: Sequence[PromptFeatures], seeds: Sequence[int], *, num_steps: int, guidance_scale: float, micro_batch: int
) -> FloatArray:
    """Sample one image a row by the ODE.

    Args:
        policy: holds the weights to evaluate.
        features: of n prompts.
        seeds: of their initial noises, see evaluation_seed; each different.
        num_steps: T of the evaluation.
        guidance_scale: its guidance.
        micro_batch: samples a forward.

    Returns:
        [n, C, h, w] clean latents; a row depends on its features and seed (and in the last bits on the batch shape).

    Raises:
        DataError: a seed that comes twice (both images of that prompt would be the same).
        SamplingError: latents that are not finite.
    """
    if len(set(seeds)) != len(seeds):
        raise DataError("evaluation sheet: a (prompt id, repeat) comes twice, its images would be one; give each prompt its own id")
    grid, parts = policy.sigmas(num_steps), []
    for rows in _slices(len(seeds), micro_batch):
        batch = policy.batch_features([features[row] for row in rows])
        latents = torch.stack([seeded_noise(seeds[row], policy.latent_shape) for row in rows]).to(policy.device)
        parts.append(_to_numpy(_integrate(policy, latents, batch, grid, guidance_scale)))
    final: FloatArray = np.concatenate(parts)
    if not np.isfinite(final).all():
        raise SamplingError("evaluation sheet: latents are not finite; look at the policy version's loss and gradient norms")
    return final


def evaluation_seed(seed: int, prompt_id: str, repeat: int) -> int:
    """Return the seed of the start of a prompt's repeat-th image in the frozen evaluation."""
    return derive_seed(seed, "evaluation", prompt_id, repeat)


def _integrate(policy: Policy, latents: torch.Tensor, batch: FeatureBatch, grid: torch.Tensor, guidance_scale: float) -> torch.Tensor:
    ode = OdeKernel()
    for step in range(len(grid) - 1):
        sigma, next_sigma = _sigmas(grid, step, len(latents), policy.device)
        velocity = policy.velocity(latents, sigma, batch, guidance_scale=guidance_scale)
        latents = ode.transition(latents, velocity, sigma, next_sigma).mean
    return latents


def _sigmas(grid: torch.Tensor, step: int, count: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return sigma and next_sigma of a step, [B] each on the device."""
    return grid[step].expand(count).to(device), grid[step + 1].expand(count).to(device)


def _slices(count: int, size: int) -> Iterator[range]:
    return (range(first, min(first + size, count)) for first in range(0, count, size))


def _to_numpy(tensor: torch.Tensor) -> FloatArray:
    array: FloatArray = tensor.to("cpu", torch.float32).contiguous().numpy()
    return array


def _check_finite(rows: Sequence[Trajectory], group: int) -> None:
    for row in rows:
        if not (np.isfinite(row.final_latents).all() and np.isfinite(row.latents).all() and np.isfinite(row.behavior_log_prob).all()):
            raise SamplingError(
                f"sampler: group {group}, sample {row.sample_index} has latents or log-probs that are not finite; "
                "look at the policy version's gradient norms, or lower rollout.noise_level"
            )
