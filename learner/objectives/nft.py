"""DiffusionNFT (arXiv 2509.16117; NVlabs/DiffusionNFT): contrast of an implicit positive and negative policy on noised clean latents."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from common.flow.noise import seeded_noise
from common.policy.primitives import fm_errors
from common.seeding import derive_seed
from learner.config import NftConfig, num_probe_sigmas
from learner.objectives.base import LossContext, LossTerm, MicroBatch, Needs
from learner.snapshots import Moment, SnapshotRule

BEHAVIOR = "behavior"
MIN_WEIGHT = 1e-5

DECAYS: dict[str, Callable[[int], float]] = {
    "on_policy": lambda n: 0.0,
    "linear": lambda n: min(0.001 * n, 0.5),
    "delayed": lambda n: min(max(0.0075 * (n - 75), 0.0), 0.999),
}
"""The paper's decay types 0, 1 and 2 of the behavior policy: behavior <- d(n) behavior + (1 - d(n)) live after update n + 1."""


def optimality(advantages: torch.Tensor, clip: float) -> torch.Tensor:
    """rho = clip(A / clip, -1, 1) / 2 + 1/2: the optimality probability, [B] in [0, 1]."""
    return (advantages / clip).clamp(-1.0, 1.0) / 2 + 0.5


def implicit_velocities(velocity: torch.Tensor, behavior: torch.Tensor, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return v+ = beta v + (1 - beta) v_old and v- = (1 + beta) v_old - beta v."""
    return beta * velocity + (1.0 - beta) * behavior, (1.0 + beta) * behavior - beta * velocity


def clean_error(latents: torch.Tensor, sigma: torch.Tensor, velocity: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
    """l(v) = mean((x_t - t v - x_0)^2) / w with w = max(mean |x_t - t v - x_0|, 1e-5), detached and taken in float64.

    Args:
        latents, velocity, clean: [B, C, h, w]. sigma: [B].

    Returns:
        [B], the dtype of `clean`.
    """
    residual = latents - sigma.view(-1, 1, 1, 1) * velocity - clean
    weight = residual.detach().double().abs().mean(dim=(1, 2, 3)).clamp(min=MIN_WEIGHT).to(residual.dtype)
    return residual.square().mean(dim=(1, 2, 3)) / weight


@dataclass(frozen=True, slots=True, kw_only=True)
class Probes:
    """Where a micro-batch is noised: n sigmas a sample with a noise each."""

    sigma: torch.Tensor  # [n, B]
    noise: torch.Tensor  # [n, B, C, h, w]


def draw_probes(batch: MicroBatch, count: int, fraction: float = 1.0) -> Probes:
    """Draw each sample's sigmas and fresh noise from its probe seed alone.

    Args:
        count: sigmas a sample, without replacement.
        fraction: of the sampler's own grid, counted from high noise, that they are drawn from.
    """
    num_sigmas = num_probe_sigmas(len(batch.grid), fraction)
    sigmas, noises = [], []
    for seed in batch.probe_seeds:
        order = np.random.Generator(np.random.Philox(key=derive_seed(seed, "sigma"))).permutation(num_sigmas)
        sigmas.append(batch.grid[torch.from_numpy(order[:count])])
        noises.append(seeded_noise(derive_seed(seed, "noise"), (count, *batch.clean.shape[1:])))
    return Probes(sigma=torch.stack(sigmas, dim=1).to(batch.clean), noise=torch.stack(noises, dim=1).to(batch.clean))


@dataclass(frozen=True, slots=True, kw_only=True)
class Nft:
    """DiffusionNFT's loss; rollouts sample with its behavior snapshot.

    Deviations from the published code: the sigmas are n of the grid's T instead of all but the last; a sample's parts are
    averaged over its sigmas.
    """

    config: NftConfig

    @property
    def needs(self) -> Needs:
        """The behavior snapshot with the configured decay; a base forward when the KL weighs."""
        rule = SnapshotRule(moment=Moment.UPDATE, decay=DECAYS[self.config.decay])
        return Needs(snapshots={BEHAVIOR: rule}, base=self.config.kl_beta > 0)

    def anchors(self, batch: MicroBatch, context: LossContext) -> Probes:
        """The probes: the same in every step of the update."""
        return draw_probes(batch, self.config.timesteps_per_sample, self.config.timestep_fraction)

    def losses(self, batch: MicroBatch, anchors: Probes, context: LossContext) -> Iterator[LossTerm]:
        """One part a sigma: [rho l(v+) + (1 - rho) l(v-)] / beta * adv_clip + kl_beta * mean (v - v_base)^2.

        With kl_guidance w > 1, v_base is v_u + w (v_c - v_u) of the base: the KL then distils guidance (CRD, arXiv 2603.14128).
        """
        count = len(anchors.sigma)
        for sigma, noise in zip(anchors.sigma, anchors.noise, strict=True):
            yield self._part(batch, sigma, noise, context, count)

    def _part(self, batch: MicroBatch, sigma: torch.Tensor, noise: torch.Tensor, context: LossContext, count: int) -> LossTerm:
        with torch.no_grad(), context.policy.using(context.snapshots[BEHAVIOR]):
            behavior = fm_errors(context.policy, batch.clean, sigma, noise, batch.features).velocity
        base = self._base_velocity(batch, sigma, noise, context)
        live = fm_errors(context.policy, batch.clean, sigma, noise, batch.features)
        latents, velocity = live.noised, live.velocity
        rho = optimality(batch.advantages, context.advantage_clip)
        positive, negative = implicit_velocities(velocity, behavior, self.config.beta)
        pull = clean_error(latents, sigma, positive, batch.clean)
        push = clean_error(latents, sigma, negative, batch.clean)
        contrast = (rho * pull + (1.0 - rho) * push) / self.config.beta * context.advantage_clip
        moved = (velocity.detach() - behavior).square().mean(dim=(1, 2, 3))
        means = {"contrast": contrast.detach(), "kl_behavior": moved}
        loss = contrast
        if base is not None:
            divergence = (velocity - base).square().mean(dim=(1, 2, 3))
            means["kl_guided" if self.config.kl_guidance > 1 else "kl"] = divergence.detach()
            loss = loss + self.config.kl_beta * divergence
        return LossTerm(loss=loss.sum() / count, means=means)

    def _base_velocity(self, batch: MicroBatch, sigma: torch.Tensor, noise: torch.Tensor, context: LossContext) -> torch.Tensor | None:
        if self.config.kl_beta == 0:
            return None
        with torch.no_grad(), context.policy.base():
            return fm_errors(
                context.policy, batch.clean, sigma, noise, batch.features, guidance_scale=self.config.kl_guidance
            ).velocity  # fmt: skip
