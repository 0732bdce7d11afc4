"""FlowDPPO (arXiv 2606.11025; as in verl-omni and UniRL): a gate on the divergence of a step in place of the ratio clip."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field

from learner.objectives.base import LossContext, LossTerm, MicroBatch, Needs
from learner.objectives.clipping import PARITY_SHARE, replay_forwards, stop_fractions
from learner.objectives.replay import MeanAnchor, anchor_means, block_of, replay_of
from learner.objectives.settings import Anchor, ObjectiveSettings, RunFacts, limit_problems, steep_step_warnings, trajectory_problems


class DppoConfig(ObjectiveSettings):
    """Settings of FlowDPPO (arXiv 2606.11025)."""

    name: Literal["dppo"] = "dppo"
    kl_limit: float = Field(1e-5, gt=0)  # tau, of the mean over latent elements (verl-omni)
    detach_uncond: bool = True  # under guidance, no gradient through the unconditional branch

    def make(self, anchor: Anchor) -> "Dppo":
        """The objective."""
        return Dppo(config=self, anchor=anchor)

    def problems(self, run: RunFacts) -> list[str]:
        """Stochastic steps it needs."""
        return [*trajectory_problems(self.name, run), *limit_problems(self.name, self.kl_limit)]

    def warnings(self, run: RunFacts) -> list[str]:
        """The steepest step of dpm_sde."""
        return steep_step_warnings(self.name, run)

    def forwards(self, run: RunFacts) -> float:
        """W trained steps."""
        return replay_forwards(run, num_steps=run.window_size, detach_uncond=self.detach_uncond)


def gated_loss(log_ratio: torch.Tensor, advantages: torch.Tensor, stopped: torch.Tensor) -> torch.Tensor:
    """-A r with r = exp(log_ratio), [B]; no gradient flows where it is stopped."""
    loss = -advantages * log_ratio.exp()
    return torch.where(stopped, loss.detach(), loss)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dppo:
    """One part a kept step, divided by W: -A r, stopped where the step's KL to the anchor is at least tau and r moves further away.

    That is A > 0 and r > 1, or A < 0 and r < 1. The KL is that of the two Gaussian steps, so the gate means the same at every
    noise level; it holds for cps too, whose r is tempered by 2 std^2 and keeps its side of 1. The published code stores the
    behavior means; here they are remade from the noise's key, or recomputed with the anchor.
    """

    config: DppoConfig
    anchor: Anchor

    @property
    def needs(self) -> Needs:
        """Trajectories; the behavior means, with parity to a fifth of the gate, when the anchor is what was stored."""
        stored = self.anchor == "behavior"
        tolerance = self.config.kl_limit * PARITY_SHARE  # means that differ move a log-prob by their KL, and around it
        return Needs(trajectory=True, behavior_mean=stored, parity_tolerance=tolerance, stored_anchor=stored)

    def anchors(self, batch: MicroBatch, context: LossContext) -> MeanAnchor:
        """Log-probs and means before the update."""
        return anchor_means(self.anchor, context.policy, block_of(batch), batch.features)

    def losses(self, batch: MicroBatch, anchors: MeanAnchor, context: LossContext) -> Iterator[LossTerm]:
        """One part a step: gated -A r / W."""
        for step in range(block_of(batch).num_steps):
            yield self._part(batch, anchors, step, context)

    def _part(self, batch: MicroBatch, anchors: MeanAnchor, step: int, context: LossContext) -> LossTerm:
        block, anchor = block_of(batch), anchors.log_prob[:, step]
        anchor_mean = anchors.mean(block, step)
        replay = replay_of(context.policy, block, batch.features, step, detach_uncond=self.config.detach_uncond)
        log_ratio = replay.log_prob - anchor
        divergence = block.kernel.kl(replay.mean.detach(), anchor_mean, replay.transition, "exact")
        far, moved = divergence >= self.config.kl_limit, log_ratio.detach()
        up = far & (batch.advantages > 0) & (moved > 0)
        down = far & (batch.advantages < 0) & (moved < 0)
        loss = gated_loss(log_ratio, batch.advantages, up | down)
        means = {
            "approx_kl": moved.square() / 2,
            "kl_anchor": divergence,
            **stop_fractions(up, down),
            "mismatch_abs_dlogp": (anchor - block.behavior_log_prob[:, step]).abs(),
        }
        return LossTerm(loss=loss.sum() / block.num_steps, means=means, ranges={"ratio": moved.exp()})
