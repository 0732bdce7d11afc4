"""Reward-weighted regression on an image's own reward (yifan123/flow_grpo; with exp weights Flow-RWR, arXiv 2501.13918)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field

from common.errors import ConfigError
from learner.objectives.base import LossContext, LossTerm, MicroBatch, Needs
from learner.objectives.matching import weighted_matching
from learner.objectives.probes import Probes, ProbeSettings, Times
from learner.objectives.settings import Anchor, RunFacts


class RwrConfig(ProbeSettings):
    """Settings of reward-weighted regression."""

    name: Literal["rwr"] = "rwr"
    temperature: float = Field(0.0, ge=0)  # tau of the weight exp(tau r); 0: the weight is the raw reward r, as published
    kl_beta: float = Field(0.0, ge=0)  # velocity MSE to the base
    times: Times = "logit_normal"

    def make(self, anchor: Anchor) -> "Rwr":
        """The objective."""
        return Rwr(config=self)

    def forwards(self, run: RunFacts) -> float:
        """A trained forward a sigma, and the base's where a KL weighs."""
        return self.timesteps_per_sample * (run.trained_forward + float(self.kl_beta > 0))


def reward_weights(rewards: torch.Tensor, temperature: float) -> torch.Tensor:
    """exp(temperature * r), or r itself at temperature 0, [B].

    Raises:
        ConfigError: a raw reward is negative: as a weight it would push away without bound.
    """
    if temperature > 0:
        return (temperature * rewards).exp()
    if bool((rewards < 0).any()):
        raise ConfigError(
            f"Objective: a reward of {float(rewards.min()):.4g} came as the weight of a matching error; weights are not negative; set "
            "learner.objective.temperature > 0, which weighs by exp(temperature * reward), or train on a reward that is never below 0"
        )
    return rewards


@dataclass(frozen=True, slots=True, kw_only=True)
class Rwr:
    """weight * FM, one part a sigma; advantages do not count, but flat groups see no forward, as with every objective.

    Deviation from the published code: n sigmas an image, averaged, where it takes one.
    """

    config: RwrConfig

    @property
    def needs(self) -> Needs:
        """A base forward when the KL weighs."""
        return Needs(base=self.config.kl_beta > 0)

    def anchors(self, batch: MicroBatch, context: LossContext) -> Probes:
        """The probes: the same in every step of the update."""
        return self.config.draw(batch)

    def losses(self, batch: MicroBatch, anchors: Probes, context: LossContext) -> Iterator[LossTerm]:
        """[w(r) mean (v - (eps - x_0))^2 + kl_beta mean (v - v_base)^2] / n."""
        weights = reward_weights(batch.rewards, self.config.temperature)
        yield from weighted_matching(batch, anchors, weights, self.config.kl_beta, context)
