"""The two primitives that carry every objective: a stored step replayed, and the flow-matching error at a probe."""

from dataclasses import dataclass

import torch

from common.flow.kernels import Transition, TransitionKernel
from common.policy.base import FeatureBatch, Policy


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReplay:
    """A step x_k -> x_k+1 under the loaded adapter."""

    log_prob: torch.Tensor  # [B] of the stored next latents, mean over latent elements, float32
    mean: torch.Tensor  # [B, C, h, w]
    transition: Transition  # mean and std of the step
    velocity: torch.Tensor  # [B, C, h, w]


@dataclass(frozen=True, slots=True, kw_only=True)
class FmErrors:
    """The flow-matching error at a probe (t, eps)."""

    noised: torch.Tensor  # [B, C, h, w] x_t = (1 - t) x_0 + t eps
    velocity: torch.Tensor  # [B, C, h, w]
    target: torch.Tensor  # [B, C, h, w] eps - x_0
    error: torch.Tensor  # [B] mean (velocity - target)^2


def replay_step(
    policy: Policy, kernel: TransitionKernel, latents: torch.Tensor, next_latents: torch.Tensor, features: FeatureBatch, *,
    sigma: torch.Tensor, next_sigma: torch.Tensor, guidance_scale: float = 1.0, detach_uncond: bool = True,
) -> StepReplay:  # fmt: skip
    """Recompute a stored step by the very code that sampled it.

    Args:
        latents, next_latents: [B, C, h, w] float32, as stored. sigma, next_sigma: [B].

    Returns:
        Log-prob, mean, transition and velocity; gradients flow through the velocity alone.
    """
    velocity = policy.velocity(latents, sigma, features, guidance_scale=guidance_scale, detach_uncond=detach_uncond)
    transition = kernel.transition(latents, velocity, sigma, next_sigma)
    return StepReplay(log_prob=kernel.log_prob(next_latents, transition), mean=transition.mean, transition=transition, velocity=velocity)


def fm_errors(
    policy: Policy, clean: torch.Tensor, sigma: torch.Tensor, noise: torch.Tensor, features: FeatureBatch, *, guidance_scale: float = 1.0
) -> FmErrors:
    """Noise clean latents at a probe and predict the velocity there.

    Args:
        clean, noise: [B, C, h, w] float32. sigma: [B] in [0, 1].
    """
    level = sigma.view(-1, 1, 1, 1)
    noised = (1.0 - level) * clean + level * noise
    velocity = policy.velocity(noised, sigma, features, guidance_scale=guidance_scale)
    target = noise - clean
    return FmErrors(noised=noised, velocity=velocity, target=target, error=(velocity - target).square().flatten(1).mean(1))
