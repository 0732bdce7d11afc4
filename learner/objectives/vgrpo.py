"""V-GRPO (arXiv 2604.23380), experimental: reconstructed from the abstract. A clipped ratio of an image's ELBO surrogate."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field

from learner.objectives.base import LossContext, LossTerm, MicroBatch, Needs
from learner.objectives.clipping import clip_metrics, clipped_loss
from learner.objectives.matching import adaptive_weight, clean_residual, match_base, match_live, velocity_gap
from learner.objectives.probes import Probes, ProbeSettings, Times
from learner.objectives.settings import Anchor, RunFacts


class VgrpoConfig(ProbeSettings):
    """Settings of V-GRPO (arXiv 2604.23380); experimental: the values of clip_range and soft_clip are ours."""

    name: Literal["vgrpo"] = "vgrpo"
    clip_range: float = Field(0.2, gt=0)  # on an image's ratio
    soft_clip: float = Field(2.0, gt=0)  # advantages enter as soft_clip * tanh(advantage / soft_clip)
    kl_beta: float = Field(0.0, ge=0)  # velocity MSE to the base
    timesteps_per_sample: int = Field(4, ge=1)
    times: Times = "stratified"

    def make(self, anchor: Anchor) -> "Vgrpo":
        """The objective."""
        return Vgrpo(config=self)

    def forwards(self, run: RunFacts) -> float:
        """A sigma: a trained forward, the anchor's, one for the image's ratio, and the base's where a KL weighs."""
        return self.timesteps_per_sample * (run.trained_forward + 2.0 + float(self.kl_beta > 0))


def soft_clipped(advantages: torch.Tensor, scale: float) -> torch.Tensor:
    """scale * tanh(A / scale): A for small ones, never beyond +-scale."""
    return scale * (advantages / scale).tanh()


@dataclass(frozen=True, slots=True, kw_only=True)
class ElboAnchor:
    """The probes, equal for all members of a group, and the live adapter's likelihood there before the update."""

    probes: Probes
    weight: torch.Tensor  # [n, B] of the errors: max(mean |x_t - t v - x_0|, 1e-5)
    log_likelihood: torch.Tensor  # [n, B]


@dataclass(frozen=True, slots=True, kw_only=True)
class Vgrpo:
    """The image is one action: its ratio is exp(mean over probes of l - l_old), l = -mean (x_t - t v - x_0)^2 / w.

    Experimental: reconstructed from the abstract (shared and stratified probes, adaptive weights, ratio clip, KL, soft clipping).
    Ours: w is the anchor's and stays for the update, so that l - l_old compares equal units. A first pass without grad finds the
    ratio, and with it what each probe's l weighs; one probe's graph lives at a time.
    """

    config: VgrpoConfig

    @property
    def needs(self) -> Needs:
        """A base forward when the KL weighs."""
        return Needs(base=self.config.kl_beta > 0)

    def anchors(self, batch: MicroBatch, context: LossContext) -> ElboAnchor:
        """The stored likelihood: what every step of the update is compared with."""
        probes = self.config.draw(batch, shared=True)
        weights, likelihoods = [], []
        for sigma, noise in zip(probes.sigma, probes.noise, strict=True):
            live = match_live(context.policy, batch, sigma, noise)
            weight = adaptive_weight(clean_residual(live.noised, sigma, live.velocity, batch.clean))
            weights.append(weight)
            likelihoods.append(-sigma.square() * live.error / weight)
        return ElboAnchor(probes=probes, weight=torch.stack(weights), log_likelihood=torch.stack(likelihoods))

    def losses(self, batch: MicroBatch, anchors: ElboAnchor, context: LossContext) -> Iterator[LossTerm]:
        """One part a probe; their gradients add up to that of max(-A r, -A clip(r)) + kl_beta * mean over probes of mean (v - v_base)^2."""
        log_ratio = self._log_ratio(batch, anchors, context).requires_grad_()
        advantages = soft_clipped(batch.advantages, self.config.soft_clip)
        value = clipped_loss(log_ratio, advantages, self.config.clip_range)
        (slope,) = torch.autograd.grad(value.sum(), log_ratio)  # [B] d loss / d log r
        clipped = clip_metrics(log_ratio, advantages, self.config.clip_range)
        count, ratio = len(anchors.probes.sigma), log_ratio.detach().exp()
        for index in range(count):
            loss, means = self._part(batch, anchors, index, slope, context)
            yield LossTerm(loss=(loss + value.detach()).sum() / count, means=means | clipped, ranges={"ratio": ratio})

    @torch.no_grad()
    def _log_ratio(self, batch: MicroBatch, anchors: ElboAnchor, context: LossContext) -> torch.Tensor:
        probes = anchors.probes
        errors = [match_live(context.policy, batch, sigma, noise).error for sigma, noise in zip(probes.sigma, probes.noise, strict=True)]
        return (-probes.sigma.square() * torch.stack(errors) / anchors.weight - anchors.log_likelihood).mean(dim=0)

    def _part(
        self, batch: MicroBatch, anchors: ElboAnchor, index: int, slope: torch.Tensor, context: LossContext
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """A probe's loss [B], with the value of its KL alone and the gradient of both, and its metrics."""
        sigma, noise = anchors.probes.sigma[index], anchors.probes.noise[index]
        base = match_base(context.policy, batch, sigma, noise).velocity if self.config.kl_beta > 0 else None
        live = match_live(context.policy, batch, sigma, noise)
        likelihood = -sigma.square() * live.error / anchors.weight[index]
        means = {"fm_error": live.error.detach()}
        loss = slope * (likelihood - likelihood.detach())
        if base is not None:
            gap = velocity_gap(live.velocity, base)
            means["kl"] = gap.detach()
            loss = loss + self.config.kl_beta * gap
        return loss, means
