"""Flow-GRPO's clipped objective (arXiv 2505.05470; yifan123/flow_grpo): a ratio of mean log-probs a trained step, KL to the base."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field

from learner.objectives.base import LossContext, LossTerm, MicroBatch, Needs
from learner.objectives.clipping import clipped_needs, clipped_step, replay_forwards
from learner.objectives.replay import LogProbAnchor, anchor_log_probs, block_of
from learner.objectives.settings import Anchor, ObjectiveSettings, RunFacts, clip_problems, steep_step_warnings, trajectory_problems


class GrpoConfig(ObjectiveSettings):
    """Settings of Flow-GRPO's clipped objective (arXiv 2505.05470)."""

    name: Literal["grpo"] = "grpo"
    clip_range: float = Field(1e-4, gt=0)  # on ratios of mean log-probs
    kl_beta: float = Field(0.0, ge=0)
    kl_convention: Literal["flow_grpo", "exact"] = "flow_grpo"  # flow_grpo divides by 2 s^2 only, exact by 2 s^2 |dt|
    detach_uncond: bool = True  # under guidance, no gradient through the unconditional branch

    def make(self, anchor: Anchor) -> "Grpo":
        """The objective."""
        return Grpo(config=self, anchor=anchor)

    def problems(self, run: RunFacts) -> list[str]:
        """Stochastic steps it needs; with cps no KL."""
        problems = [*trajectory_problems(self.name, run), *clip_problems(self.name, self.clip_range)]
        if run.kernel == "cps" and self.kl_beta > 0:
            problems.append("cps has no Gaussian KL in this objective; set learner.objective.kl_beta=0")
        return problems

    def warnings(self, run: RunFacts) -> list[str]:
        """The steepest step of dpm_sde."""
        return steep_step_warnings(self.name, run)

    def forwards(self, run: RunFacts) -> float:
        """W trained steps."""
        return replay_forwards(run, num_steps=run.window_size, detach_uncond=self.detach_uncond, kl=self.kl_beta > 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Grpo:
    """One part a kept step, each divided by W; with kl_beta = 0 no reference forward runs."""

    config: GrpoConfig
    anchor: Anchor

    @property
    def needs(self) -> Needs:
        """Trajectories; a base forward when the KL weighs; parity to a fifth of the clip range when it takes the stored log-probs."""
        return clipped_needs(self.config.clip_range, self.anchor, base=self.config.kl_beta > 0)

    def anchors(self, batch: MicroBatch, context: LossContext) -> LogProbAnchor:
        """The stored log-probs, or those that this very code gives before the update."""
        return anchor_log_probs(self.anchor, context.policy, block_of(batch), batch.features)

    def losses(self, batch: MicroBatch, anchors: LogProbAnchor, context: LossContext) -> Iterator[LossTerm]:
        """One part a step: [clipped ratio + kl_beta * KL] / W."""
        for step in range(block_of(batch).num_steps):
            yield self._part(batch, anchors.log_prob[:, step], step, context)

    def _part(self, batch: MicroBatch, anchor: torch.Tensor, step: int, context: LossContext) -> LossTerm:
        config = self.config
        part = clipped_step(
            batch, anchor, step, context, clip_range=config.clip_range, detach_uncond=config.detach_uncond,
            kl_convention=config.kl_convention if config.kl_beta > 0 else None,
        )  # fmt: skip
        loss = part.loss if part.kl is None else part.loss + config.kl_beta * part.kl
        return LossTerm(loss=loss.sum() / block_of(batch).num_steps, means=part.means, ranges={"ratio": part.ratio})
