"""DiffusionNFT (arXiv 2509.16117; NVlabs/DiffusionNFT): contrast of an implicit positive and negative policy on noised clean latents."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field

from learner.objectives.base import LossContext, LossTerm, MicroBatch, Needs
from learner.objectives.matching import adaptive_weight, clean_residual, match_base, match_live, match_snapshot, velocity_gap
from learner.objectives.probes import Probes, draw_probes, probe_problems
from learner.objectives.settings import Anchor, ObjectiveSettings, RunFacts, guidance_warnings
from learner.snapshots import Moment, SnapshotRule

BEHAVIOR = "behavior"

DECAYS: dict[str, Callable[[int], float]] = {
    "on_policy": lambda n: 0.0,
    "linear": lambda n: min(0.001 * n, 0.5),
    "delayed": lambda n: min(max(0.0075 * (n - 75), 0.0), 0.999),
}
"""The paper's decay types 0, 1 and 2 of the behavior policy: behavior <- d(n) behavior + (1 - d(n)) live after update n + 1."""


class NftConfig(ObjectiveSettings):
    """Settings of DiffusionNFT (arXiv 2509.16117)."""

    name: Literal["nft"] = "nft"
    beta: float = Field(1.0, gt=0)
    kl_beta: float = Field(1e-4, ge=0)  # velocity MSE to the base
    kl_guidance: float = Field(1.0, ge=1)  # of that base: above 1 the KL distils it (CRD, arXiv 2603.14128); sampling stays as it is
    timesteps_per_sample: int = Field(2, ge=1)  # of the sampler's grid, drawn without replacement
    timestep_fraction: float = Field(1.0, gt=0, le=1)  # the grid's first part (high noise) that they are drawn from
    decay: Literal["on_policy", "linear", "delayed"] = "linear"  # of the behavior snapshot: the paper's types 0, 1, 2

    def make(self, anchor: Anchor) -> "Nft":
        """The objective."""
        return Nft(config=self)

    def problems(self, run: RunFacts) -> list[str]:
        """Rollouts sample with its behavior snapshot; the sigmas are the grid's."""
        problems = probe_problems(run.num_steps, self.timesteps_per_sample, self.timestep_fraction)
        if run.snapshot != BEHAVIOR:
            problems.append("objective nft samples with its behavior snapshot; set rollout.snapshot='behavior'")
        if self.kl_guidance > 1 and self.kl_beta == 0:
            problems.append(
                f"learner.objective.kl_guidance={self.kl_guidance:g} guides a KL whose weight is 0; set kl_beta, or leave it out"
            )
        return problems

    def warnings(self, run: RunFacts) -> list[str]:
        """Guided images."""
        return guidance_warnings(self.name, run)

    def forwards(self, run: RunFacts) -> float:
        """A trained forward and one of the behavior snapshot a sigma; a KL adds the base's, twice where it is guided."""
        reference = (2.0 if self.kl_guidance > 1 else 1.0) if self.kl_beta > 0 else 0.0
        return self.timesteps_per_sample * (run.trained_forward + 1.0 + reference)

    @property
    def guides(self) -> bool:
        """A KL to the guided base."""
        return self.kl_beta > 0 and self.kl_guidance > 1


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
    residual = clean_residual(latents, sigma, velocity, clean)
    return residual.square().mean(dim=(1, 2, 3)) / adaptive_weight(residual)


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
        behavior = match_snapshot(context.policy, context.snapshots[BEHAVIOR], batch, sigma, noise).velocity
        base = None
        if self.config.kl_beta > 0:
            base = match_base(context.policy, batch, sigma, noise, guidance_scale=self.config.kl_guidance).velocity
        live = match_live(context.policy, batch, sigma, noise)
        latents, velocity = live.noised, live.velocity
        rho = optimality(batch.advantages, context.advantage_clip)
        positive, negative = implicit_velocities(velocity, behavior, self.config.beta)
        pull = clean_error(latents, sigma, positive, batch.clean)
        push = clean_error(latents, sigma, negative, batch.clean)
        contrast = (rho * pull + (1.0 - rho) * push) / self.config.beta * context.advantage_clip
        means = {"contrast": contrast.detach(), "kl_behavior": velocity_gap(velocity.detach(), behavior)}
        loss = contrast
        if base is not None:
            divergence = velocity_gap(velocity, base)
            means["kl_guided" if self.config.kl_guidance > 1 else "kl"] = divergence.detach()
            loss = loss + self.config.kl_beta * divergence
        return LossTerm(loss=loss.sum() / count, means=means)
