"""Online DPO (Diffusion-DPO's loss, arXiv 2311.12908, as yifan123/flow_grpo trains it online): the best of a group against the worst."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field

from common.errors import ConfigError
from common.policy.primitives import fm_errors
from learner.objectives.base import LossContext, LossTerm, MicroBatch, Needs
from learner.objectives.groups import group_sums
from learner.objectives.probes import Probes, draw_probes, probe_problems
from learner.objectives.settings import Anchor, ObjectiveSettings, RunFacts
from learner.snapshots import Moment, SnapshotRule

REFERENCE = "reference"
PAIR = 2  # samples of a group that train


class DpoConfig(ObjectiveSettings):
    """Settings of online DPO."""

    name: Literal["dpo"] = "dpo"
    beta: float = Field(100.0, gt=0)  # on errors that are means over a latent's elements; published: 100 to 2000
    reference_interval: int = Field(40, ge=0)  # updates between copies of the live adapter into the reference; 0: the base itself
    timesteps_per_sample: int = Field(2, ge=1)  # of the sampler's grid, drawn without replacement, the same for both of a pair
    timestep_fraction: float = Field(1.0, gt=0, le=1)  # the grid's first part (high noise) that they are drawn from

    def make(self, anchor: Anchor) -> "Dpo":
        """The objective."""
        return Dpo(config=self)

    def problems(self, run: RunFacts) -> list[str]:
        """Pairs, both of a pair in one forward; the sigmas are the grid's."""
        problems = probe_problems(run.num_steps, self.timesteps_per_sample, self.timestep_fraction)
        if run.advantage != "pair":
            problems.append(
                f"objective dpo trains on the best and the worst of each group, and learner.advantage.kind={run.advantage!r} does not choose "
                "them; set learner.advantage.kind='pair'"
            )
        if run.micro_batch < PAIR:
            problems.append(f"objective dpo couples the two of a pair, and learner.micro_batch={run.micro_batch}; raise it to 2 or more")
        return problems

    def forwards(self, run: RunFacts) -> float:
        """A trained forward and one of the reference a sigma."""
        return self.timesteps_per_sample * (run.trained_forward + 1.0)


def reference_rule(interval: int) -> SnapshotRule:
    """A copy of the live adapter after every `interval` updates, untouched between: d(n) = 0 if n + 1 is a multiple of it, else 1."""
    return SnapshotRule(moment=Moment.UPDATE, decay=lambda n: 0.0 if (n + 1) % interval == 0 else 1.0)


def preference_loss(margin: torch.Tensor, beta: float) -> torch.Tensor:
    """-log sigmoid(-(beta / 2) margin), [B], with margin = (e_w - e_w_ref) - (e_l - e_l_ref): log 2 at the reference."""
    return -torch.nn.functional.logsigmoid(-beta / 2 * margin)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceAnchor:
    """What stays fixed during an update."""

    probes: Probes
    error: torch.Tensor  # [n, B] of the reference


@dataclass(frozen=True, slots=True, kw_only=True)
class Dpo:
    """One part a sigma: L = -log sigmoid(-(beta/2) [(e_w - e_w_ref) - (e_l - e_l_ref)]), e = mean (v - (eps - x_0))^2 on shared (t, eps).

    Convention: a part's loss is a sum over samples, so a pair's loss counts once for each of its two samples; the learner divides by
    the number of samples that train, which gives the mean over pairs. A pair's own gradient at the reference is
    (beta / 4) (grad e_w - grad e_l). As in flow_grpo, of a group's images only the best and the worst train and the reference is a
    periodic copy of the live adapter. Deviation: sigmas are the sampler's own, where flow_grpo draws t logit-normal.
    """

    config: DpoConfig

    @property
    def needs(self) -> Needs:
        """Pairs stay together; the reference's copies, or with interval 0 a base forward."""
        interval = self.config.reference_interval
        return Needs(snapshots={REFERENCE: reference_rule(interval)} if interval else {}, base=interval == 0, whole_groups=True)

    def anchors(self, batch: MicroBatch, context: LossContext) -> ReferenceAnchor:
        """One draw of probes a pair, and the reference's errors there.

        Raises:
            ConfigError: a group does not come as one better and one worse sample.
        """
        check_pairs(batch)
        probes = draw_probes(batch, self.config.timesteps_per_sample, self.config.timestep_fraction, shared=True)
        with torch.no_grad(), self._reference(context):
            errors = [
                fm_errors(context.policy, batch.clean, sigma, noise, batch.features).error
                for sigma, noise in zip(probes.sigma, probes.noise, strict=True)
            ]
        return ReferenceAnchor(probes=probes, error=torch.stack(errors))

    def losses(self, batch: MicroBatch, anchors: ReferenceAnchor, context: LossContext) -> Iterator[LossTerm]:
        """One part a sigma."""
        probes, side, count = anchors.probes, batch.advantages.sign(), len(anchors.error)
        for sigma, noise, reference in zip(probes.sigma, probes.noise, anchors.error, strict=True):
            error = fm_errors(context.policy, batch.clean, sigma, noise, batch.features).error
            margin = group_sums(side * (error - reference), batch.group)
            loss = preference_loss(margin, self.config.beta)
            moved = margin.detach()
            means = {"error": error.detach(), "pair_margin": moved, "pair_accuracy": (moved < 0).float(), "preference": loss.detach()}
            yield LossTerm(loss=loss.sum() / count, means=means)

    def _reference(self, context: LossContext) -> AbstractContextManager[None]:
        return context.policy.using(context.snapshots[REFERENCE]) if self.config.reference_interval else context.policy.base()


def check_pairs(batch: MicroBatch) -> None:
    """Check that each group is one better and one worse sample. Raises ConfigError."""
    side = batch.advantages.sign()
    if bool((group_sums(side, batch.group) != 0).any() or (group_sums(side.abs(), batch.group) != PAIR).any()):
        raise ConfigError(
            "Objective dpo: a group came that is not one sample with a positive and one with a negative advantage; it trains on pairs; "
            "set learner.advantage.kind='pair'"
        )
