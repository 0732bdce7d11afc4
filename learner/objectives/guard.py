"""GRPO-Guard (arXiv 2510.22319; yifan123/flow_grpo): ratios without their negative bias, and steps of equal weight."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field

from learner.objectives.base import LossContext, LossTerm, MicroBatch, Needs
from learner.objectives.clipping import PARITY_SHARE, clip_metrics, clipped_loss, replay_forwards
from learner.objectives.replay import MeanAnchor, anchor_means, block_of, replay_of
from learner.objectives.settings import Anchor, ObjectiveSettings, RunFacts, clip_problems, trajectory_problems


class GuardConfig(ObjectiveSettings):
    """Settings of GRPO-Guard (arXiv 2510.22319)."""

    name: Literal["guard"] = "guard"
    clip_range: float = Field(2e-6, gt=0)  # on normalized ratios; published: 2e-6 for GenEval and OCR, 4e-6 for PickScore
    detach_uncond: bool = True  # under guidance, no gradient through the unconditional branch

    def make(self, anchor: Anchor) -> "Guard":
        """The objective."""
        return Guard(config=self, anchor=anchor)

    def problems(self, run: RunFacts) -> list[str]:
        """Stochastic steps it needs, of an SDE."""
        problems = [*trajectory_problems(self.name, run), *clip_problems(self.name, self.clip_range)]
        if run.kernel == "cps":
            problems.append(
                "objective guard removes the bias -(d mean)^2 / (2 std^2) of a Gaussian log-ratio, and the log-prob of rollout.kernel='cps' "
                "is not divided by 2 std^2; set rollout.kernel to flow_sde or dance_sde, or the objective to grpo or dppo"
            )
        return problems

    def forwards(self, run: RunFacts) -> float:
        """W trained steps."""
        return replay_forwards(run, num_steps=run.window_size, detach_uncond=self.detach_uncond)


def normalized_log_ratio(next_latents: torch.Tensor, mean: torch.Tensor, anchor_mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """Return Guard's log rho, [B]: on average 0 under the anchor, with a spread of rms(mean - anchor_mean) / sqrt(D) at every noise level.

    RatioNorm is (d log p + mean_d (mean - anchor_mean)^2 / (2 std^2)) * std; with the Gaussian log-prob written out that is
    mean_d (x' - anchor_mean) (mean - anchor_mean) / std, which is taken here: no difference of two nearly equal log-probs.

    Args:
        next_latents, mean, anchor_mean: [B, C, h, w]. std: [B, 1, 1, 1], s sqrt|dt|.
    """
    noise = (next_latents.detach() - anchor_mean) / std
    return (noise * (mean - anchor_mean)).flatten(1).mean(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Guard:
    """One part a kept step: clipped loss of the normalized ratio / |dt|, divided by W.

    The plain ratio's log has the mean -(d mean)^2 / (2 std^2) < 0, so that a clip binds on one side only. The published code
    stores the behavior means; here they are remade from the noise's key, or recomputed with the anchor. Flow-Factory's version
    leaves the division by |dt| out.
    """

    config: GuardConfig
    anchor: Anchor

    @property
    def needs(self) -> Needs:
        """Trajectories; the behavior means, with parity to a fifth of the clip range, when the anchor is what was stored."""
        stored = self.anchor == "behavior"
        tolerance = self.config.clip_range * PARITY_SHARE
        return Needs(trajectory=True, behavior_mean=stored, parity_tolerance=tolerance, stored_anchor=stored)

    def anchors(self, batch: MicroBatch, context: LossContext) -> MeanAnchor:
        """Log-probs and means before the update."""
        return anchor_means(self.anchor, context.policy, block_of(batch), batch.features)

    def losses(self, batch: MicroBatch, anchors: MeanAnchor, context: LossContext) -> Iterator[LossTerm]:
        """One part a step: clipped loss of rho / (|dt| W)."""
        for step in range(block_of(batch).num_steps):
            yield self._part(batch, anchors, step, context)

    def _part(self, batch: MicroBatch, anchors: MeanAnchor, step: int, context: LossContext) -> LossTerm:
        block = block_of(batch)
        anchor_mean = anchors.mean(block, step)
        replay = replay_of(context.policy, block, batch.features, step, detach_uncond=self.config.detach_uncond)
        log_ratio = normalized_log_ratio(block.next_latents[:, step], replay.mean, anchor_mean, replay.transition.std)
        interval = block.sigma[:, step] - block.next_sigma[:, step]  # |dt|
        loss = clipped_loss(log_ratio, batch.advantages, self.config.clip_range) / interval
        means = clip_metrics(log_ratio, batch.advantages, self.config.clip_range)
        means["kl_anchor"] = block.kernel.kl(replay.mean.detach(), anchor_mean, replay.transition, "exact")
        means["mismatch_abs_dlogp"] = (anchors.log_prob[:, step] - block.behavior_log_prob[:, step]).abs()
        return LossTerm(loss=loss.sum() / block.num_steps, means=means, ranges={"ratio": log_ratio.detach().exp()})
