"""Centered reward distillation (arXiv 2603.14128), experimental: implicit rewards, centered in their group, are fitted to the advantages."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field

from learner.objectives.base import LossContext, LossTerm, MicroBatch, Needs
from learner.objectives.groups import group_sums
from learner.objectives.matching import match_base, match_live, match_snapshot, velocity_gap
from learner.objectives.probes import Probes, draw_probes, probe_problems
from learner.objectives.settings import Anchor, ObjectiveSettings, RunFacts, whole_group_problems
from learner.snapshots import EMA_REF, Moment, ema_ref_rule


class CrdConfig(ObjectiveSettings):
    """Settings of centered reward distillation (arXiv 2603.14128); experimental: the values are ours."""

    name: Literal["crd"] = "crd"
    beta: float = Field(100.0, gt=0)  # implicit reward = beta (e_ref - e): an advantage of 1 asks for an error 1 / beta below the group's
    kl_beta: float = Field(0.1, ge=0)  # velocity MSE to the base
    kl_guidance: float = Field(1.0, ge=1)  # of that base: above 1 the KL distils it; the paper: 4.5
    timesteps_per_sample: int = Field(2, ge=1)  # of the sampler's grid, drawn without replacement, the same for a whole group
    timestep_fraction: float = Field(1.0, gt=0, le=1)  # the grid's first part (high noise) that they are drawn from

    def make(self, anchor: Anchor) -> "Crd":
        """The objective."""
        return Crd(config=self)

    def problems(self, run: RunFacts) -> list[str]:
        """Groups stay whole and hold more than one; the sigmas are the grid's."""
        problems = whole_group_problems(self.name, run)
        if run.advantage == "best":
            problems.append("objective crd centers a group, and learner.advantage.kind='best' leaves one member; set it to 'group_std'")
        if self.kl_guidance > 1 and self.kl_beta == 0:
            problems.append(
                f"learner.objective.kl_guidance={self.kl_guidance:g} guides a KL whose weight is 0; set kl_beta, or leave it out"
            )
        return [*problems, *probe_problems(run.num_steps, self.timesteps_per_sample, self.timestep_fraction)]

    def forwards(self, run: RunFacts) -> float:
        """A trained forward and one of the reference a sigma; a KL adds the base's, twice where it is guided."""
        base = (2.0 if self.kl_guidance > 1 else 1.0) if self.kl_beta > 0 else 0.0
        return self.timesteps_per_sample * (run.trained_forward + 1.0 + base)

    @property
    def guides(self) -> bool:
        """A KL to the guided base."""
        return self.kl_beta > 0 and self.kl_guidance > 1


def centered(values: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """Each value minus its group's mean, [B]; differentiable. values, group: [B]."""
    return values - group_sums(values, group) / group_sums(torch.ones_like(values), group)


@dataclass(frozen=True, slots=True, kw_only=True)
class Crd:
    """One part a sigma: L = (c - A)^2 / (2 beta), c = r - group mean of r, r = beta (e_ref - e), e = mean (v - (eps - x_0))^2.

    Squares have an end: once c = A, nothing pulls any more. The gradient at the reference is A grad e where a group's advantages sum to 0.
    Rebuilt from a summary of the paper; deviations that are known: no adaptive weight on e, its other (cross-entropy) loss is left out, the
    reference is the EMA adapter, and a group shares its noise.
    """

    config: CrdConfig

    @property
    def needs(self) -> Needs:
        """Whole groups and the close reference; a base forward when the KL weighs."""
        return Needs(snapshots={EMA_REF: ema_ref_rule(Moment.UPDATE)}, base=self.config.kl_beta > 0, whole_groups=True)

    def anchors(self, batch: MicroBatch, context: LossContext) -> Probes:
        """The probes: one draw a group, the same in every step of the update."""
        return draw_probes(batch, self.config.timesteps_per_sample, self.config.timestep_fraction, shared=True)

    def losses(self, batch: MicroBatch, anchors: Probes, context: LossContext) -> Iterator[LossTerm]:
        """One part a sigma: [(c - A)^2 / (2 beta) + kl_beta mean (v - v_base)^2] / n."""
        for sigma, noise in zip(anchors.sigma, anchors.noise, strict=True):
            yield self._part(batch, sigma, noise, context, len(anchors.sigma))

    def _part(self, batch: MicroBatch, sigma: torch.Tensor, noise: torch.Tensor, context: LossContext, count: int) -> LossTerm:
        policy, config = context.policy, self.config
        reference = match_snapshot(policy, context.snapshots[EMA_REF], batch, sigma, noise).error
        base = match_base(policy, batch, sigma, noise, guidance_scale=config.kl_guidance).velocity if config.kl_beta > 0 else None
        live = match_live(policy, batch, sigma, noise)
        implicit = centered(config.beta * (reference - live.error), batch.group)
        misfit = implicit - batch.advantages
        loss = misfit.square() / (2.0 * config.beta)
        means = {"fm_error": live.error.detach(), "implicit_reward": implicit.detach().abs(), "misfit": misfit.detach().abs()}
        if base is not None:
            gap = velocity_gap(live.velocity, base)
            means["kl_guided" if config.kl_guidance > 1 else "kl"] = gap.detach()
            loss = loss + config.kl_beta * gap
        return LossTerm(loss=loss.sum() / count, means=means)
