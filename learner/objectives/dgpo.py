"""DGPO (arXiv 2510.08425; Luo-Yihong/DGPO): preference of a group's better part over its worse one, on shared noise of clean latents."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field

from common.policy.primitives import fm_errors
from learner.objectives.base import LossContext, LossTerm, MicroBatch, Needs
from learner.objectives.groups import group_sums
from learner.objectives.probes import Probes, draw_probes, probe_problems
from learner.objectives.settings import Anchor, ObjectiveSettings, RunFacts, whole_group_problems
from learner.snapshots import EMA_REF, Moment, ema_ref_rule


class DgpoConfig(ObjectiveSettings):
    """Settings of DGPO (arXiv 2510.08425)."""

    name: Literal["dgpo"] = "dgpo"
    beta: float = Field(100.0, gt=0)  # on errors that are means over a latent's elements; the repository: 100, 2000 without guidance
    clip_range: float = Field(1e-2, ge=0)  # on exp(d_ref - d): a sample further along its advantage rests; 0: none
    kl_beta: float = Field(1e-3, ge=0)  # velocity MSE to the base; the repository: .02, .001 without guidance
    timesteps_per_sample: int = Field(4, ge=1)  # of the sampler's grid, drawn without replacement, the same for a whole group
    timestep_fraction: float = Field(0.7, gt=0, le=1)  # the grid's first part (high noise) that they are drawn from

    def make(self, anchor: Anchor) -> "Dgpo":
        """The objective."""
        return Dgpo(config=self)

    def problems(self, run: RunFacts) -> list[str]:
        """Groups stay whole and hold more than one; the sigmas are the grid's."""
        problems = whole_group_problems(self.name, run)
        if run.advantage == "best":
            problems.append(
                "objective dgpo compares the members of a group, and learner.advantage.kind='best' leaves one; set it to 'group_std'"
            )
        return [*problems, *probe_problems(run.num_steps, self.timesteps_per_sample, self.timestep_fraction)]

    def forwards(self, run: RunFacts) -> float:
        """A trained forward and one of the reference a sigma; a KL adds the base's."""
        return self.timesteps_per_sample * (run.trained_forward + 1.0 + (1.0 if self.kl_beta > 0 else 0.0))


def group_weights(gains: torch.Tensor, advantages: torch.Tensor, group: torch.Tensor, beta: float) -> torch.Tensor:
    """sigmoid(s_G) of each sample's group, with s_G = (beta / G) sum_i A_i (d_i - d_i_ref): 1/2 at the reference, 0 far beyond it.

    Args:
        gains: [B] d_ref - d, how much better than the reference a sample is fitted; detached.
        advantages: [B]. group: [B] of whole groups.
    """
    size = group_sums(torch.ones_like(gains), group)
    return torch.sigmoid(-beta * group_sums(advantages * gains, group) / size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dgpo:
    """One part a sigma: L = mean_i stopgrad(sigmoid(s_G)) A_i d_i with d = mean (v - (eps - x_0))^2 on (t, eps) that a group shares.

    As in the repository: A is the group's z-score (advantage.kind "group_std"), clipped; where exp(d_ref - d) has left 1 +- clip_range
    in the advantage's direction, the sample's own gradient stops while s_G still counts it; images are sampled by an ODE, with
    guidance or without, and d is of the unguided velocity. Its gradient at the reference is A grad d / 2.
    Deviations: the reference is always the EMA adapter (the repository's use_ema_ref; its guided presets compare with the base and use
    the EMA adapter for the clip alone); a group's sigmas are its own, where the repository draws them once for a whole batch; G counts
    the members that train; the base of the KL is not guided.
    """

    config: DgpoConfig

    @property
    def needs(self) -> Needs:
        """Whole groups and the close reference; a base forward when the KL weighs."""
        return Needs(snapshots={EMA_REF: ema_ref_rule(Moment.STEP)}, base=self.config.kl_beta > 0, whole_groups=True)

    def anchors(self, batch: MicroBatch, context: LossContext) -> Probes:
        """The probes: one draw a group, the same in every step of the update."""
        return draw_probes(batch, self.config.timesteps_per_sample, self.config.timestep_fraction, shared=True)

    def losses(self, batch: MicroBatch, anchors: Probes, context: LossContext) -> Iterator[LossTerm]:
        """One part a sigma: sigmoid(s_G) A d + kl_beta * mean (v - v_base)^2."""
        count = len(anchors.sigma)
        for sigma, noise in zip(anchors.sigma, anchors.noise, strict=True):
            yield self._part(batch, sigma, noise, context, count)

    def _part(self, batch: MicroBatch, sigma: torch.Tensor, noise: torch.Tensor, context: LossContext, count: int) -> LossTerm:
        with torch.no_grad(), context.policy.using(context.snapshots[EMA_REF]):
            reference = fm_errors(context.policy, batch.clean, sigma, noise, batch.features).error
        base = self._base_velocity(batch, sigma, noise, context)
        live = fm_errors(context.policy, batch.clean, sigma, noise, batch.features)
        gains = reference - live.error.detach()
        weights = group_weights(gains, batch.advantages, batch.group, self.config.beta)
        rests = self._rests(gains, batch.advantages)
        loss = weights * batch.advantages * torch.where(rests, live.error.detach(), live.error)
        means = {"error": live.error.detach(), "error_gain": gains, "group_weight": weights, "clip_fraction": rests.float()}
        if base is not None:
            divergence = (live.velocity - base).square().mean(dim=(1, 2, 3))
            means["kl"] = divergence.detach()
            loss = loss + self.config.kl_beta * divergence
        return LossTerm(loss=loss.sum() / count, means=means)

    def _rests(self, gains: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
        """[B] whether exp(gain) has left 1 +- clip_range where the advantage pushes."""
        if self.config.clip_range == 0:
            return torch.zeros_like(gains, dtype=torch.bool)
        ratio = gains.exp()
        return torch.where(advantages > 0, ratio > 1.0 + self.config.clip_range, ratio < 1.0 - self.config.clip_range)

    def _base_velocity(self, batch: MicroBatch, sigma: torch.Tensor, noise: torch.Tensor, context: LossContext) -> torch.Tensor | None:
        if self.config.kl_beta == 0:
            return None
        with torch.no_grad(), context.policy.base():
            return fm_errors(context.policy, batch.clean, sigma, noise, batch.features).velocity
