"""DanceGRPO (arXiv 2505.07818; XueZeyue/DanceGRPO): the clipped objective on a random subset of each sample's steps, without a KL."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from pydantic import Field

from common.errors import ConfigError
from common.seeding import derive_seed
from learner.objectives.base import LossContext, LossTerm, MicroBatch, Needs, TrajectoryBlock
from learner.objectives.clipping import clipped_needs, clipped_step, replay_forwards
from learner.objectives.replay import anchor_log_probs, block_of, select_steps
from learner.objectives.settings import Anchor, ObjectiveSettings, RunFacts, clip_problems, steep_step_warnings, trajectory_problems


class DanceConfig(ObjectiveSettings):
    """Settings of DanceGRPO (arXiv 2505.07818); its sampler: kernel dance_sde with eta 0.3, window drop_last, shared_init."""

    name: Literal["dance"] = "dance"
    clip_range: float = Field(1e-4, gt=0)  # on ratios of mean log-probs
    step_fraction: float = Field(0.6, gt=0, le=1)  # of the window's steps that a sample trains
    detach_uncond: bool = True  # under guidance, no gradient through the unconditional branch

    def make(self, anchor: Anchor) -> "Dance":
        """The objective."""
        return Dance(config=self, anchor=anchor)

    def problems(self, run: RunFacts) -> list[str]:
        """Stochastic steps it needs, enough of them besides the run's last."""
        problems = [*trajectory_problems(self.name, run), *clip_problems(self.name, self.clip_range)]
        if run.num_steps - 1 in run.window and num_parts(run.window_size, self.step_fraction) == run.window_size:
            problems.append(
                f"objective dance never trains the last step, and step_fraction={self.step_fraction:g} of a window of {run.window_size} that "
                "may hold it is all of them; set rollout.window.kind='drop_last', end the window before it, or lower step_fraction"
            )
        return problems

    def warnings(self, run: RunFacts) -> list[str]:
        """The steepest step of dpm_sde."""
        return steep_step_warnings(self.name, run)

    def forwards(self, run: RunFacts) -> float:
        """Only the chosen steps are forwarded."""
        return replay_forwards(run, num_steps=num_parts(run.window_size, self.step_fraction), detach_uncond=self.detach_uncond)


def num_parts(window_size: int, step_fraction: float) -> int:
    """How many of W steps a sample trains."""
    return max(1, round(step_fraction * window_size))


def draw_steps(block: TrajectoryBlock, seeds: tuple[int, ...], step_fraction: float) -> torch.Tensor:
    """Return [B, n] positions in the block, each sample's without replacement from its seed alone; never a step to sigma 0.

    Raises:
        ConfigError: a sample has fewer than n steps besides the last.
    """
    count, chosen = num_parts(block.num_steps, step_fraction), []
    for seed, next_sigma in zip(seeds, block.next_sigma.cpu().numpy(), strict=True):
        trainable = np.flatnonzero(next_sigma > 0)
        if len(trainable) < count:
            raise ConfigError(
                f"Dance: {count} of {block.num_steps} kept steps are to be trained and {len(trainable)} are not the run's last; "
                "set rollout.window.kind='drop_last', or lower learner.objective.step_fraction"
            )
        order = np.random.Generator(np.random.Philox(key=derive_seed(seed, "steps"))).permutation(len(trainable))
        chosen.append(trainable[order[:count]])
    return torch.from_numpy(np.stack(chosen))


@dataclass(frozen=True, slots=True, kw_only=True)
class DanceAnchor:
    """Which steps a sample trains, and what their ratios are taken against."""

    steps: torch.Tensor  # [B, n] int64 on CPU
    log_prob: torch.Tensor  # [B, n]


@dataclass(frozen=True, slots=True, kw_only=True)
class Dance:
    """n parts, each one step a sample with its own sigma, divided by n.

    Deviations: the subset is a share of the window that was sampled, rounded, where the published code takes int(fraction * (T - 1));
    the best-and-worst subset of a group is the advantage estimator's matter, not this loss's.
    """

    config: DanceConfig
    anchor: Anchor

    @property
    def needs(self) -> Needs:
        """Trajectories; parity to a fifth of the clip range when it takes the stored log-probs."""
        return clipped_needs(self.config.clip_range, self.anchor)

    def anchors(self, batch: MicroBatch, context: LossContext) -> DanceAnchor:
        """The subset of each sample, and its log-probs before the update."""
        steps = draw_steps(block_of(batch), batch.probe_seeds, self.config.step_fraction)
        block = select_steps(block_of(batch), steps)
        return DanceAnchor(steps=steps, log_prob=anchor_log_probs(self.anchor, context.policy, block, batch.features).log_prob)

    def losses(self, batch: MicroBatch, anchors: DanceAnchor, context: LossContext) -> Iterator[LossTerm]:
        """One part a chosen step: the clipped loss / n."""
        chosen = replace(batch, trajectory=select_steps(block_of(batch), anchors.steps))
        for step in range(anchors.steps.shape[1]):
            yield self._part(chosen, anchors.log_prob[:, step], step, context)

    def _part(self, batch: MicroBatch, anchor: torch.Tensor, step: int, context: LossContext) -> LossTerm:
        part = clipped_step(
            batch, anchor, step, context, clip_range=self.config.clip_range, detach_uncond=self.config.detach_uncond
        )  # fmt: skip
        return LossTerm(loss=part.loss.sum() / block_of(batch).num_steps, means=part.means, ranges={"ratio": part.ratio})
