"""TempFlow-GRPO's noise-aware weights (arXiv 2508.04324; Shredded-Pork/TempFlow-GRPO) on the clipped objective, without its branching."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field

from learner.objectives.base import LossContext, LossTerm, MicroBatch, Needs
from learner.objectives.clipping import clipped_needs, clipped_step, replay_forwards
from learner.objectives.replay import LogProbAnchor, anchor_log_probs, block_of
from learner.objectives.settings import Anchor, ObjectiveSettings, RunFacts, clip_problems, trajectory_problems


class TempflowConfig(ObjectiveSettings):
    """Settings of TempFlow-GRPO's weights (arXiv 2508.04324)."""

    name: Literal["tempflow"] = "tempflow"
    clip_range: float = Field(1e-4, gt=0)  # on ratios of mean log-probs
    noise_weight: float = Field(2.25, gt=0)  # times s sqrt|dt|; 2.25 makes the mean 1 over the first 9 of SD3.5's 10 steps at eta .7
    kl_beta: float = Field(0.0, ge=0)  # of the exact KL; published: 0.004 for GenEval and OCR, 0.001 for PickScore
    detach_uncond: bool = True  # under guidance, no gradient through the unconditional branch

    def make(self, anchor: Anchor) -> "Tempflow":
        """The objective."""
        return Tempflow(config=self, anchor=anchor)

    def problems(self, run: RunFacts) -> list[str]:
        """Stochastic steps it needs, of an SDE."""
        problems = [*trajectory_problems(self.name, run), *clip_problems(self.name, self.clip_range)]
        if run.kernel == "cps":
            problems.append(
                "objective tempflow weighs a step with its std, against the 1 / std in the gradient of a Gaussian log-prob, which that of "
                "rollout.kernel='cps' does not have; set rollout.kernel to flow_sde or dance_sde, or the objective to grpo"
            )
        return problems

    def forwards(self, run: RunFacts) -> float:
        """W trained steps."""
        return replay_forwards(run, num_steps=run.window_size, detach_uncond=self.detach_uncond, kl=self.kl_beta > 0)


def noise_weights(std: torch.Tensor, scale: float) -> torch.Tensor:
    """scale * s sqrt|dt|, [B] of a step's std [B, 1, 1, 1]: the gradient by the velocity is then proportional to |dt|."""
    return scale * std.flatten()


@dataclass(frozen=True, slots=True, kw_only=True)
class Tempflow:
    """One part a kept step, divided by W: 2.25 s sqrt|dt| * clipped loss + kl_beta * exact KL.

    Deviation: the published method also branches, so that a reward belongs to the noise of one step (an ODE trunk, one stochastic
    step of several children at each of its states, ODE again). Rollouts here do not branch; this is its weight alone.
    """

    config: TempflowConfig
    anchor: Anchor

    @property
    def needs(self) -> Needs:
        """Trajectories; a base forward when the KL weighs; parity to a fifth of the clip range when it takes the stored log-probs."""
        return clipped_needs(self.config.clip_range, self.anchor, base=self.config.kl_beta > 0)

    def anchors(self, batch: MicroBatch, context: LossContext) -> LogProbAnchor:
        """Log-probs before the update."""
        return anchor_log_probs(self.anchor, context.policy, block_of(batch), batch.features)

    def losses(self, batch: MicroBatch, anchors: LogProbAnchor, context: LossContext) -> Iterator[LossTerm]:
        """One part a step."""
        for step in range(block_of(batch).num_steps):
            yield self._part(batch, anchors.log_prob[:, step], step, context)

    def _part(self, batch: MicroBatch, anchor: torch.Tensor, step: int, context: LossContext) -> LossTerm:
        config = self.config
        part = clipped_step(
            batch, anchor, step, context, clip_range=config.clip_range, detach_uncond=config.detach_uncond,
            kl_convention="exact" if config.kl_beta > 0 else None,
        )  # fmt: skip
        weight = noise_weights(part.replay.transition.std, config.noise_weight)
        loss = weight * part.loss
        if part.kl is not None:
            loss = loss + config.kl_beta * part.kl
        means = {**part.means, "step_weight": weight}
        return LossTerm(loss=loss.sum() / block_of(batch).num_steps, means=means, ranges={"ratio": part.ratio})
