"""Stored steps through the policy again: what every trajectory objective and the parity gate share."""

import torch

from common.errors import ConfigError
from common.policy.base import FeatureBatch, Policy
from common.policy.primitives import StepReplay, replay_step
from learner.objectives.base import MicroBatch, TrajectoryBlock


def block_of(batch: MicroBatch) -> TrajectoryBlock:
    """Return the micro-batch's trajectory block. Raises ConfigError when the objective did not ask for one."""
    if batch.trajectory is None:
        raise ConfigError("Objective: trajectories are needed and were not asked for; declare needs.trajectory")
    return batch.trajectory


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
