"""Flow-GRPO's clipped objective (arXiv 2505.05470; yifan123/flow_grpo): a ratio of mean log-probs a trained step, KL to the base."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field

from learner.objectives.base import LossContext, LossTerm, MicroBatch, Needs, TrajectoryBlock
from learner.objectives.replay import block_of, replay_log_probs, replay_of, replay_reference
from learner.objectives.settings import BACKWARD_FORWARDS, Anchor, ObjectiveSettings, RunFacts, trajectory_problems

PARITY_SHARE = 0.2  # of the clip range: what |stored - recomputed log-prob| may take


class GrpoConfig(ObjectiveSettings):
    """Settings of Flow-GRPO's clipped objective (arXiv 2505.05470)."""

    name: Literal["grpo"] = "grpo"
    clip_range: float = Field(1e-4, gt=0)  # on ratios of mean log-probs
    kl_beta: float = Field(0.0, ge=0)
    kl_convention: Literal["flow_grpo", "exact"] = "flow_grpo"  # flow_grpo divides by 2 s^2 only, exact by 2 s^2 |dt|
    detach_uncond: bool = True

    def make(self, anchor: Anchor) -> "Grpo":
        """The objective."""
        return Grpo(config=self, anchor=anchor)

    def problems(self, run: RunFacts) -> list[str]:
        """Stochastic steps it needs; with cps no KL."""
        problems = trajectory_problems(self.name, run)
        if run.kernel == "cps" and self.kl_beta > 0:
            problems.append("cps has no Gaussian KL in this objective; set learner.objective.kl_beta=0")
        return problems

    def forwards(self, run: RunFacts) -> float:
        """W trained steps; guided ones cost the unconditional branch too, a KL a base forward, a recomputed anchor one more."""
        reference = float(run.guided) if self.kl_beta > 0 else 0.0
        recompute = float(run.guided) if run.recomputes else 0.0
        unconditional = (1.0 if self.detach_uncond else BACKWARD_FORWARDS) if run.guided == 2 else 0.0
        return run.window_size * (BACKWARD_FORWARDS + unconditional + reference + recompute)


def clipped_loss(log_ratio: torch.Tensor, advantages: torch.Tensor, clip_range: float) -> torch.Tensor:
    """max(-A r, -A clip(r, 1 - c, 1 + c)) with r = exp(log_ratio), [B]."""
    ratio = log_ratio.exp()
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1.0 - clip_range, 1.0 + clip_range))


@dataclass(frozen=True, slots=True, kw_only=True)
class LogProbAnchor:
    """What the ratios are taken against."""

    log_prob: torch.Tensor  # [B, W]


@dataclass(frozen=True, slots=True, kw_only=True)
class Grpo:
    """One part a kept step, each divided by W; with kl_beta = 0 no reference forward runs."""

    config: GrpoConfig
    anchor: Literal["recompute", "behavior"]

    @property
    def needs(self) -> Needs:
        """Trajectories; a base forward when the KL weighs; parity to a fifth of the clip range when it takes the stored log-probs."""
        return Needs(
            trajectory=True,
            base=self.config.kl_beta > 0,
            parity_tolerance=self.config.clip_range * PARITY_SHARE,
            stored_anchor=self.anchor == "behavior",
        )

    def anchors(self, batch: MicroBatch, context: LossContext) -> LogProbAnchor:
        """The stored log-probs, or those that this very code gives before the update."""
        block = block_of(batch)
        if self.anchor == "behavior":
            return LogProbAnchor(log_prob=block.behavior_log_prob)
        return LogProbAnchor(log_prob=replay_log_probs(context.policy, block, batch.features))

    def losses(self, batch: MicroBatch, anchors: LogProbAnchor, context: LossContext) -> Iterator[LossTerm]:
        """One part a step: [clipped ratio + kl_beta * KL] / W."""
        block = block_of(batch)
        for step in range(block.num_steps):
            yield self._part(batch, block, anchors.log_prob[:, step], step, context)

    def _part(self, batch: MicroBatch, block: TrajectoryBlock, anchor: torch.Tensor, step: int, context: LossContext) -> LossTerm:
        reference = None
        if self.config.kl_beta > 0:
            reference = replay_reference(context.policy, block, batch.features, step)
        replay = replay_of(context.policy, block, batch.features, step, detach_uncond=self.config.detach_uncond)
        log_ratio = replay.log_prob - anchor
        loss = clipped_loss(log_ratio, batch.advantages, self.config.clip_range)
        means = self._means(log_ratio.detach(), batch.advantages, anchor - block.behavior_log_prob[:, step])
        if reference is not None:
            kl = block.kernel.kl(replay.mean, reference.mean, replay.transition, self.config.kl_convention)
            exact = block.kernel.kl(replay.mean.detach(), reference.mean, replay.transition, "exact")
            means |= {"kl": kl.detach(), "kl_exact": exact}
            loss = loss + self.config.kl_beta * kl
        return LossTerm(loss=loss.sum() / block.num_steps, means=means, ranges={"ratio": log_ratio.detach().exp()})

    def _means(self, log_ratio: torch.Tensor, advantages: torch.Tensor, mismatch: torch.Tensor) -> dict[str, torch.Tensor]:
        """approx_kl = (log r)^2 / 2 to the anchor; clip fractions count samples whose gradient the clip stops."""
        ratio = log_ratio.exp()
        up = (ratio > 1.0 + self.config.clip_range) & (advantages > 0)
        down = (ratio < 1.0 - self.config.clip_range) & (advantages < 0)
        return {
            "approx_kl": log_ratio.square() / 2,
            "clip_fraction": (up | down).float(),
            "clip_fraction_up": up.float(),
            "clip_fraction_down": down.float(),
            "mismatch_abs_dlogp": mismatch.abs(),
        }
