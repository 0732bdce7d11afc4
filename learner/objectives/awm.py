"""Advantage Weighted Matching (arXiv 2509.25050; scxue/advantage_weighted_matching): a clipped ratio of matching errors on clean latents."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field

from learner.objectives.base import LossContext, LossTerm, MicroBatch, Needs
from learner.objectives.clipping import clip_metrics, clipped_loss
from learner.objectives.matching import match_base, match_live, match_snapshot, velocity_gap
from learner.objectives.probes import Probes, ProbeSettings
from learner.objectives.settings import Anchor, RunFacts, guidance_warnings
from learner.snapshots import EMA_REF, Moment, ema_ref_rule

Weighting = Literal["uniform", "t", "t2", "huber", "ghuber"]
EPSILON = 1e-10  # keeps the roots' gradients finite


class AwmConfig(ProbeSettings):
    """Settings of Advantage Weighted Matching (arXiv 2509.25050); the defaults are its GenEval preset's but for base KL and times."""

    name: Literal["awm"] = "awm"
    weighting: Weighting = "ghuber"  # of the matching error in the surrogate log-likelihood
    ghuber_power: float = Field(0.25, gt=0, le=1)  # p of ghuber
    clip_range: float = Field(1.0, gt=0)  # on ratios; 1 stops none but those above 2
    ema_kl_beta: float = Field(1.0, ge=0)  # velocity MSE to the snapshot ema_ref: what bounds a step
    kl_beta: float = Field(1e-3, ge=0)  # velocity MSE to the base; published .001 to .003 GenEval and OCR, .0001 PickScore, FLUX .4 and .01
    timesteps_per_sample: int = Field(6, ge=1)

    def make(self, anchor: Anchor) -> "Awm":
        """The objective."""
        return Awm(config=self)

    def problems(self, run: RunFacts) -> list[str]:
        """The grid's sigmas; and something must bound the push away from bad samples."""
        problems = super().problems(run)
        if self.ema_kl_beta == 0 and self.kl_beta == 0 and self.clip_range >= 1:
            problems.append(
                "objective awm with ema_kl_beta=0, kl_beta=0 and clip_range >= 1 has nothing that bounds an update, and collapses; "
                "set learner.objective.ema_kl_beta (published: 1), or a clip_range below 1"
            )
        return problems

    def warnings(self, run: RunFacts) -> list[str]:
        """Guided images."""
        return guidance_warnings(self.name, run)

    def forwards(self, run: RunFacts) -> float:
        """A sigma: a trained forward, the anchor's, and one for each KL."""
        references = float(self.ema_kl_beta > 0) + float(self.kl_beta > 0)
        return self.timesteps_per_sample * (run.trained_forward + 1.0 + references)


def log_likelihood(error: torch.Tensor, sigma: torch.Tensor, weighting: Weighting, power: float = 0.25) -> torch.Tensor:
    """The surrogate l = -w(t) e; the Huber kinds bend the error: -t (sqrt(e + 1e-10) - 1e-5), -t / p ((e + 1e-10)^p - 1e-10^p).

    Args:
        error: [B] mean (v - (eps - x_0))^2. sigma: [B] t.

    Returns:
        [B], at most 0.
    """
    if weighting == "huber":
        return sigma * (float(EPSILON**0.5) - (error + EPSILON).sqrt())
    if weighting == "ghuber":
        return sigma / power * (float(EPSILON**power) - (error + EPSILON).pow(power))
    weight = {"uniform": torch.ones_like(sigma), "t": sigma, "t2": sigma.square()}[weighting]
    return -weight * error


@dataclass(frozen=True, slots=True, kw_only=True)
class LikelihoodAnchor:
    """The probes, and what the live adapter gave there before the update."""

    probes: Probes
    log_likelihood: torch.Tensor  # [n, B]


@dataclass(frozen=True, slots=True, kw_only=True)
class Awm:
    """AWM's loss, one part a sigma.

    Deviations from the published code: sigmas are n of the grid's T without replacement, a draw for each sample, instead of one
    a stratum for the whole batch (times="stratified" draws strata of (0, 1]); the KLs are unweighted (its "Uniform").
    """

    config: AwmConfig

    @property
    def needs(self) -> Needs:
        """ema_ref and a base forward, where their KL weighs."""
        snapshots = {EMA_REF: ema_ref_rule(Moment.UPDATE)} if self.config.ema_kl_beta > 0 else {}
        return Needs(snapshots=snapshots, base=self.config.kl_beta > 0)

    def anchors(self, batch: MicroBatch, context: LossContext) -> LikelihoodAnchor:
        """The probes and the live adapter's surrogate there, kept for all steps of the update."""
        probes = self.config.draw(batch)
        pairs = zip(probes.sigma, probes.noise, strict=True)
        rows = [self._likelihood(match_live(context.policy, batch, sigma, noise).error, sigma) for sigma, noise in pairs]
        return LikelihoodAnchor(probes=probes, log_likelihood=torch.stack(rows))

    def losses(self, batch: MicroBatch, anchors: LikelihoodAnchor, context: LossContext) -> Iterator[LossTerm]:
        """[max(-A r, -A clip(r)) + ema_kl_beta mean (v - v_ema)^2 + kl_beta mean (v - v_base)^2] / n with r = exp(l - l_old) and
        A = advantage / advantage clip."""  # fmt: skip
        for sigma, noise, anchor in zip(anchors.probes.sigma, anchors.probes.noise, anchors.log_likelihood, strict=True):
            yield self._part(batch, sigma, noise, anchor, context)

    def _likelihood(self, error: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return log_likelihood(error, sigma, self.config.weighting, self.config.ghuber_power)

    def _part(self, batch: MicroBatch, sigma: torch.Tensor, noise: torch.Tensor, anchor: torch.Tensor, context: LossContext) -> LossTerm:
        config, policy = self.config, context.policy
        references: dict[str, tuple[float, torch.Tensor]] = {}  # metric -> weight, velocity
        if config.ema_kl_beta > 0:
            ema = match_snapshot(policy, context.snapshots[EMA_REF], batch, sigma, noise)
            references["kl_ema_ref"] = config.ema_kl_beta, ema.velocity
        if config.kl_beta > 0:
            references["kl"] = config.kl_beta, match_base(policy, batch, sigma, noise).velocity
        live = match_live(policy, batch, sigma, noise)
        log_ratio = self._likelihood(live.error, sigma) - anchor
        advantages = batch.advantages / context.advantage_clip
        loss = clipped_loss(log_ratio, advantages, config.clip_range)
        means = {"fm_error": live.error.detach(), **clip_metrics(log_ratio, advantages, config.clip_range)}
        for name, (beta, velocity) in references.items():
            gap = velocity_gap(live.velocity, velocity)
            means[name] = gap.detach()
            loss = loss + beta * gap
        count = config.timesteps_per_sample
        return LossTerm(loss=loss.sum() / count, means=means, ranges={"ratio": log_ratio.detach().exp()})
