"""ORW-CFM-W2 (arXiv 2502.06061), experimental: reconstructed from the abstract. Reward-weighted matching bounded by a W2 term."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from learner.objectives.base import LossContext, LossTerm, MicroBatch, Needs
from learner.objectives.matching import weighted_matching
from learner.objectives.probes import Probes, ProbeSettings, Times
from learner.objectives.rwr import reward_weights
from learner.objectives.settings import Anchor, RunFacts


class OrwConfig(ProbeSettings):
    """Settings of ORW-CFM-W2 (arXiv 2502.06061); experimental: the default values are ours."""

    name: Literal["orw"] = "orw"
    temperature: float = Field(1.0, ge=0)  # tau of the weight exp(tau r); 0: the weight is the raw reward r
    alpha: float = Field(1.0, ge=0)  # of the W2 term; at 0 the policy collapses toward the best image
    times: Times = "uniform"

    def make(self, anchor: Anchor) -> "Orw":
        """The objective."""
        return Orw(config=self)

    def forwards(self, run: RunFacts) -> float:
        """A trained forward a sigma, and the base's where the W2 term weighs."""
        return self.timesteps_per_sample * (run.trained_forward + float(self.alpha > 0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Orw:
    """w(r) * FM + alpha * mean (v - v_base)^2 on the policy's own images, one part a sigma.

    Experimental: reconstructed from the abstract. The W2 term is an upper bound of the Wasserstein distance to the base up to a
    constant; without it the policy converges to a point at the largest reward. Flat groups see no forward.
    """

    config: OrwConfig

    @property
    def needs(self) -> Needs:
        """A base forward when the W2 term weighs."""
        return Needs(base=self.config.alpha > 0)

    def anchors(self, batch: MicroBatch, context: LossContext) -> Probes:
        """The probes: the same in every step of the update."""
        return self.config.draw(batch)

    def losses(self, batch: MicroBatch, anchors: Probes, context: LossContext) -> Iterator[LossTerm]:
        """[w(r) mean (v - (eps - x_0))^2 + alpha mean (v - v_base)^2] / n; the latter is reported as kl."""
        weights = reward_weights(batch.rewards, self.config.temperature)
        yield from weighted_matching(batch, anchors, weights, self.config.alpha, context)
