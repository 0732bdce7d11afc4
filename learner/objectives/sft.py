"""Online supervised fine-tuning on each group's best image (RAFT, arXiv 2304.06767; yifan123/flow_grpo's sft)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from learner.objectives.base import LossContext, LossTerm, MicroBatch, Needs
from learner.objectives.matching import weighted_matching
from learner.objectives.probes import Probes, ProbeSettings, Times
from learner.objectives.settings import Anchor, RunFacts

BEST = "best"  # the advantage kind that keeps a group's argmax alone


class SftConfig(ProbeSettings):
    """Settings of online supervised fine-tuning."""

    name: Literal["sft"] = "sft"
    times: Times = "logit_normal"

    def make(self, anchor: Anchor) -> "Sft":
        """The objective."""
        return Sft(config=self)

    def problems(self, run: RunFacts) -> list[str]:
        """The advantage estimator chooses the images."""
        problems = super().problems(run)
        if run.advantage != BEST:
            problems.append(
                f"objective sft trains on every sample that it gets, and learner.advantage.kind={run.advantage!r} keeps all of a group, "
                f"bad ones too; set learner.advantage.kind={BEST!r}, which keeps its best one"
            )
        return problems

    def forwards(self, run: RunFacts) -> float:
        """A trained forward a sigma."""
        return self.timesteps_per_sample * run.trained_forward


@dataclass(frozen=True, slots=True, kw_only=True)
class Sft:
    """FM on the samples that it gets, all with weight 1, one part a sigma."""

    config: SftConfig

    @property
    def needs(self) -> Needs:
        """Nothing."""
        return Needs()

    def anchors(self, batch: MicroBatch, context: LossContext) -> Probes:
        """The probes: the same in every step of the update."""
        return self.config.draw(batch)

    def losses(self, batch: MicroBatch, anchors: Probes, context: LossContext) -> Iterator[LossTerm]:
        """mean (v - (eps - x_0))^2 / n."""
        yield from weighted_matching(batch, anchors, torch.ones_like(batch.rewards), 0.0, context)
