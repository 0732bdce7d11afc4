"""Flow matching at a probe, live and under reference weights: what the forward-process objectives share."""

from collections.abc import Iterator

import torch

from common.policy.base import AdapterState, Policy
from common.policy.primitives import FmErrors, fm_errors
from learner.objectives.base import LossContext, LossTerm, MicroBatch
from learner.objectives.probes import Probes

MIN_WEIGHT = 1e-5


def match_live(policy: Policy, batch: MicroBatch, sigma: torch.Tensor, noise: torch.Tensor) -> FmErrors:
    """Match under the loaded adapter; gradients flow through the velocity. sigma: [B]. noise: [B, C, h, w]."""
    return fm_errors(policy, batch.clean, sigma, noise, batch.features)


def match_snapshot(policy: Policy, state: AdapterState, batch: MicroBatch, sigma: torch.Tensor, noise: torch.Tensor) -> FmErrors:
    """Match under another adapter, without grad. Only before the live forward of the same part."""
    with torch.no_grad(), policy.using(state):
        return match_live(policy, batch, sigma, noise)


def match_base(policy: Policy, batch: MicroBatch, sigma: torch.Tensor, noise: torch.Tensor, *, guidance_scale: float = 1.0) -> FmErrors:
    """Match under the base, guided or not, without grad. Only before the live forward of the same part."""
    with torch.no_grad(), policy.base():
        return fm_errors(policy, batch.clean, sigma, noise, batch.features, guidance_scale=guidance_scale)


def velocity_gap(velocity: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Mean over latent elements of (v - v')^2, [B]: what these papers call a KL, without its weight in t."""
    return (velocity - other).square().mean(dim=(1, 2, 3))


def clean_residual(latents: torch.Tensor, sigma: torch.Tensor, velocity: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
    """x_t - t v - x_0, the error of the clean estimate. latents, velocity, clean: [B, C, h, w]. sigma: [B]."""
    return latents - sigma.view(-1, 1, 1, 1) * velocity - clean


def adaptive_weight(residual: torch.Tensor) -> torch.Tensor:
    """max(mean |residual|, 1e-5), [B], detached, taken in float64 (DiffusionNFT's normalizer)."""
    return residual.detach().double().abs().mean(dim=(1, 2, 3)).clamp(min=MIN_WEIGHT).to(residual.dtype)


def weighted_matching(batch: MicroBatch, probes: Probes, weights: torch.Tensor, kl_beta: float, context: LossContext) -> Iterator[LossTerm]:
    """One part a sigma: [weight * mean (v - (eps - x_0))^2 + kl_beta * mean (v - v_base)^2] / n.

    Args:
        weights: [B], fixed. kl_beta: 0 runs no base forward.
    """
    for sigma, noise in zip(probes.sigma, probes.noise, strict=True):
        base = match_base(context.policy, batch, sigma, noise).velocity if kl_beta > 0 else None
        live = match_live(context.policy, batch, sigma, noise)
        loss, means = weights * live.error, {"fm_error": live.error.detach()}
        if base is not None:
            gap = velocity_gap(live.velocity, base)
            means["kl"] = gap.detach()
            loss = loss + kl_beta * gap
        yield LossTerm(loss=loss.sum() / len(probes.sigma), means=means, ranges={"weight": weights})
