"""Stored steps through the policy again: what every trajectory objective and the parity gate share."""

from dataclasses import dataclass, replace

import torch

from common.errors import ConfigError
from common.policy.base import FeatureBatch, Policy
from common.policy.primitives import StepReplay, replay_step
from learner.objectives.base import MicroBatch, TrajectoryBlock
from learner.objectives.settings import Anchor


@dataclass(frozen=True, slots=True, kw_only=True)
class LogProbAnchor:
    """What the ratios are taken against."""

    log_prob: torch.Tensor  # [B, W]


@dataclass(frozen=True, slots=True, kw_only=True)
class MeanAnchor:
    """What ratios and distances are taken against."""

    log_prob: torch.Tensor  # [B, W]
    recomputed_mean: torch.Tensor | None  # [B, W, C, h, w]; None: the block's behavior_mean, which each micro-batch brings along

    def mean(self, block: TrajectoryBlock, step: int) -> torch.Tensor:
        """Return [B, C, h, w] of a step. Raises ConfigError when the objective did not ask for behavior means."""
        means = block.behavior_mean if self.recomputed_mean is None else self.recomputed_mean
        if means is None:
            raise ConfigError("Objective: behavior means are needed and were not asked for; declare needs.behavior_mean")
        return means[:, step]


def block_of(batch: MicroBatch) -> TrajectoryBlock:
    """Return the micro-batch's trajectory block. Raises ConfigError when the objective did not ask for one."""
    if batch.trajectory is None:
        raise ConfigError("Objective: trajectories are needed and were not asked for; declare needs.trajectory")
    return batch.trajectory


def select_steps(block: TrajectoryBlock, steps: torch.Tensor) -> TrajectoryBlock:
    """Return a block of n steps a sample, each sample's own.

    Args:
        steps: [B, n] int64 positions in the block.
    """
    steps = steps.to(block.sigma.device)
    rows = torch.arange(len(steps), device=steps.device)[:, None]
    return replace(
        block,
        latents=block.latents[rows, steps],
        next_latents=block.next_latents[rows, steps],
        sigma=block.sigma[rows, steps],
        next_sigma=block.next_sigma[rows, steps],
        behavior_log_prob=block.behavior_log_prob[rows, steps],
        behavior_mean=None if block.behavior_mean is None else block.behavior_mean[rows, steps],
    )


def replay_of(policy: Policy, block: TrajectoryBlock, features: FeatureBatch, step: int, *, detach_uncond: bool = True) -> StepReplay:
    """Replay one kept step of B trajectories under the loaded adapter."""
    return replay_step(
        policy, block.kernel, block.latents[:, step], block.next_latents[:, step], features,
        sigma=block.sigma[:, step], next_sigma=block.next_sigma[:, step], guidance_scale=block.guidance_scale, detach_uncond=detach_uncond,
    )  # fmt: skip


def replay_reference(policy: Policy, block: TrajectoryBlock, features: FeatureBatch, step: int) -> StepReplay:
    """Replay one kept step under the base, without grad."""
    with torch.no_grad(), policy.base():
        return replay_of(policy, block, features, step)


def replay_log_probs(policy: Policy, block: TrajectoryBlock, features: FeatureBatch) -> torch.Tensor:
    """Return [B, W] mean log-probs of all kept steps under the loaded adapter, without grad."""
    with torch.no_grad():
        return torch.stack([replay_of(policy, block, features, step).log_prob for step in range(block.num_steps)], dim=1)


def anchor_log_probs(anchor: Anchor, policy: Policy, block: TrajectoryBlock, features: FeatureBatch) -> LogProbAnchor:
    """Return the stored log-probs, or those that this very code gives before the update."""
    return LogProbAnchor(log_prob=block.behavior_log_prob if anchor == "behavior" else replay_log_probs(policy, block, features))


def anchor_means(anchor: Anchor, policy: Policy, block: TrajectoryBlock, features: FeatureBatch) -> MeanAnchor:
    """Return log-probs and means as stored, or as this very code gives them before the update; those are then held during it."""
    if anchor == "behavior":
        return MeanAnchor(log_prob=block.behavior_log_prob, recomputed_mean=None)
    with torch.no_grad():
        replays = [replay_of(policy, block, features, step) for step in range(block.num_steps)]
    return MeanAnchor(
        log_prob=torch.stack([replay.log_prob for replay in replays], dim=1),
        recomputed_mean=torch.stack([replay.mean for replay in replays], dim=1),
    )
