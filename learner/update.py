"""The Learner: one manifest and its groups in, a new policy version out."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

from common.errors import ConfigError, GateError
from common.gauges import Gauges
from common.heartbeat import MICRO_BATCHES
from common.logs import get_logger
from common.policy.base import AdapterState, Policy
from common.seeding import derive_seed
from common.types import Manifest, RolloutGroup
from learner.advantages import AdvantageBatch, AdvantageEstimator, make_estimator
from learner.config import LearnerConfig
from learner.gates import RATIO_TOLERANCE, StartGates
from learner.loss_scale import LossScale
from learner.metrics import Tally
from learner.minibatches import SampleRef, UpdateInput, check_groups, collate, plan_minibatches
from learner.objectives.base import LossContext, MicroBatch, Needs, Objective
from learner.objectives.settings import Anchor
from learner.ranks import Ranks, SoloRanks, check_agreement
from learner.snapshots import LIVE, Moment, Snapshots, ema_rule

EMA = "ema"
Anchored = tuple[Sequence[SampleRef], Any]  # a micro-batch and its anchors

_log = get_logger("learner")


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateResult:
    """What an update did."""

    batch: AdvantageBatch
    metrics: Mapping[str, float]  # of the steps taken: loss, grad_norm, advantage_abs_mean, counts and the objective's own
    num_steps: int  # optimizer steps taken
    num_skipped: int  # steps skipped because loss or gradient was not finite


class Learner:
    """Advantages -> minibatches -> clipped AdamW steps -> snapshots. Holds what a LearnerState saves, and nothing else that lasts."""

    def __init__(
        self, policy: Policy, config: LearnerConfig, objective: Objective[Any], estimator: AdvantageEstimator, *,
        weights: Mapping[str, float], run_seed: int, gates: StartGates, loss_scale: LossScale | None = None,
    ) -> None:  # fmt: skip
        """Start at version 0 with the adapter that the policy holds.

        Args:
            weights: train reward -> weight.
            run_seed: what minibatch order and probes derive from.
            gates: checks before the first update of this process.
            loss_scale: for a float16 base; None: the loss as it is.
        """
        self.policy = policy
        self.version = 0  # of the live adapter = updates done
        self.objective = objective
        self.estimator = estimator
        self.live: AdapterState = policy.read_adapter()  # the trained adapter; the policy holds it only during an update
        self.snapshots = Snapshots(self.live, {EMA: ema_rule(config.ema_decay, config.ema_interval), **objective.needs.snapshots})
        self.num_optimizer_steps = 0
        self.num_nonfinite = 0  # skipped steps in a row
        self.loss_scale = loss_scale or LossScale(enabled=False)
        self.gauges = Gauges()  # for the heartbeat of its process
        self.ranks: Ranks = SoloRanks()  # who share each minibatch; a process of several sets it before the first update
        self.optimizer = torch.optim.AdamW(
            policy.adapter_parameters(), lr=config.learning_rate, betas=config.adam_betas, eps=config.adam_eps,
            weight_decay=config.weight_decay, foreach=False,
        )  # fmt: skip
        self._config = config
        self._weights = dict(weights)
        self._run_seed = run_seed
        self._gates = gates

    def update(self, manifest: Manifest, groups: Sequence[RolloutGroup]) -> UpdateResult:
        """Train on a manifest; afterwards the live adapter is version `manifest.update`.

        Raises:
            GateError: parity, kl_not_zero, ratio (first update) or non_finite.
            CorruptFile: a group is not what the manifest says.
        """
        check_groups(manifest, groups)
        with self._own_adapter():
            return self._update(manifest, tuple(groups))

    def _update(self, manifest: Manifest, groups: tuple[RolloutGroup, ...]) -> UpdateResult:
        batch = self.estimator.estimate(manifest, self._weights)
        self._gates.before_update(groups, self)
        source = UpdateInput(
            manifest=manifest, groups=groups, batch=batch, run_seed=self._run_seed, advantage_clip=self._config.advantage.clip
        )
        plan = plan_minibatches(
            batch.mask, [group.sampler for group in groups], num_minibatches=self._config.optimizer_steps,
            micro_batch=self._config.micro_batch, seed=derive_seed(self._run_seed, "minibatches", manifest.update),
            whole_groups=self.objective.needs.whole_groups, rank=self.ranks.rank, num_ranks=self.ranks.size,
        )  # fmt: skip
        anchored = [[(refs, self._anchors(refs, source)) for refs in minibatch.micro_batches] for minibatch in plan]
        tally = Tally()
        steps = [(minibatch.num_samples, own) for minibatch, own in zip(plan, anchored, strict=True) if minibatch.num_samples]
        outcomes = [self._train(own, source, tally, count) for count, own in steps]
        self._gates.after_update(self, tally, float(abs(batch.advantages).max(initial=0.0)))
        live = self.policy.read_adapter()
        check_agreement(self.ranks, live, manifest.update)
        self.snapshots.move(Moment.UPDATE, live)
        self.version = manifest.update
        return self._result(batch, tally, outcomes)

    @contextmanager
    def _own_adapter(self) -> Iterator[None]:
        """Load the live adapter, and afterwards put back what the policy held: one process may share it with a rollout worker."""
        found = self.policy.read_adapter()
        self.policy.load_adapter(self.live)
        try:
            yield
        finally:
            self.optimizer.zero_grad(set_to_none=True)
            self.live = self.policy.read_adapter()
            self.policy.load_adapter(found)

    def _train(self, minibatch: Sequence[Anchored], source: UpdateInput, tally: Tally, count: int) -> bool:
        """One optimizer step on all ranks' samples, of which `count` are unmasked; False when it was skipped, on every rank."""
        found_scale = self.loss_scale.value
        seen, loss, norm = self._backward(minibatch, source, count)
        while math.isfinite(loss) and not math.isfinite(norm) and self.loss_scale.shrink():
            seen, loss, norm = self._backward(minibatch, source, count)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.loss_scale.value = found_scale  # not the scale's fault
            self._skip(loss, norm)
            return False
        self.loss_scale.step_taken()
        self.optimizer.param_groups[0]["lr"] = self.learning_rate
        self.optimizer.step()
        self.num_optimizer_steps += 1
        self.num_nonfinite = 0
        self.snapshots.move(Moment.STEP, self.policy.read_adapter())
        tally.merge(seen)
        tally.add_number("loss", loss)
        tally.add_number("grad_norm", norm)
        return True

    def _backward(self, minibatch: Sequence[Anchored], source: UpdateInput, count: int) -> tuple[Tally, float, float]:
        """Put the clipped gradient of a minibatch into the parameters; return what all ranks report, their loss, and the norm before clipping."""
        self.optimizer.zero_grad(set_to_none=True)
        seen, loss = self._sum_tallies(*self._accumulate(minibatch, source, count))
        self._gates.after_first_minibatch(self, seen)
        self.ranks.sum_gradients(self.policy.adapter_parameters())
        self.loss_scale.unscale(self.policy.adapter_parameters())
        norm = torch.nn.utils.clip_grad_norm_(self.policy.adapter_parameters(), self._config.max_grad_norm, foreach=False)
        return seen, loss, float(norm)

    def _accumulate(self, minibatch: Sequence[Anchored], source: UpdateInput, count: int) -> tuple[Tally, float]:
        """Add up the gradients of loss / count over this rank's micro-batches and loss terms; return what they report, and their loss."""
        tally, total = Tally(), torch.zeros((), device=self.policy.device)
        for refs, anchors in minibatch:
            micro = self._collate(refs, source)
            for term in self.objective.losses(micro, anchors, self._context()):
                loss = term.loss / count
                (loss * self.loss_scale.value).backward()  # type: ignore[no-untyped-call]
                total += loss.detach()
                tally.add(term)
        return tally, float(total)

    def _sum_tallies(self, own: Tally, loss: float) -> tuple[Tally, float]:
        """All ranks' reports and losses, added up in rank order: the same numbers on every rank."""
        parts = [Tally.decode(content) for content in self.ranks.share(own.encode(loss))]
        total = Tally()
        for part, _ in parts:
            total.merge(part)
        return total, sum(part_loss for _, part_loss in parts)

    def _anchors(self, refs: Sequence[SampleRef], source: UpdateInput) -> Any:
        with torch.no_grad():
            return self.objective.anchors(self._collate(refs, source), self._context())

    def _collate(self, refs: Sequence[SampleRef], source: UpdateInput) -> MicroBatch:
        self.gauges.add(MICRO_BATCHES, 1)
        return collate(refs, source, self.objective.needs, self.policy)

    def _context(self) -> LossContext:
        return LossContext(policy=self.policy, snapshots=self.snapshots.states, advantage_clip=self._config.advantage.clip)

    @property
    def learning_rate(self) -> float:
        """Of the next optimizer step: linear warm-up over warmup_steps, constant, and decay_steps / step from that step on."""
        step, warmup, decay = self.num_optimizer_steps + 1, self._config.warmup_steps, self._config.decay_steps
        rise = min(1.0, step / warmup) if warmup else 1.0
        fall = min(1.0, decay / step) if decay else 1.0
        return self._config.learning_rate * rise * fall

    def _skip(self, loss: float, norm: float) -> None:
        self.num_nonfinite += 1
        self.optimizer.zero_grad(set_to_none=True)
        _log.warning("loss %s, gradient norm %s: step skipped (%d in a row)", loss, norm, self.num_nonfinite)
        if self.num_nonfinite >= self._config.max_nonfinite:
            raise GateError(
                "non_finite",
                f"Learner: loss {loss}, gradient norm {norm} in update {self.version + 1}; {self.num_nonfinite} steps in a "
                "row were not finite (learner.max_nonfinite); lower learner.learning_rate, or use model.dtype = float32",
            )

    def _result(self, batch: AdvantageBatch, tally: Tally, outcomes: Iterable[bool]) -> UpdateResult:
        taken = list(outcomes)
        kept = batch.advantages[batch.mask]
        metrics = tally.metrics() | {
            "advantage_abs_mean": float(abs(kept).mean()) if kept.size else 0.0,
            "learning_rate": float(self.optimizer.param_groups[0]["lr"]),
            "num_samples": float(kept.size),
            "num_steps": float(sum(taken)),
            "num_skipped": float(len(taken) - sum(taken)),
        }
        return UpdateResult(batch=batch, metrics=metrics, num_steps=sum(taken), num_skipped=len(taken) - sum(taken))

    @property
    def needs(self) -> Needs:
        """Of the objective."""
        return self.objective.needs

    def snapshot_state(self, name: str) -> AdapterState:
        """Return the live adapter or a snapshot by name, for publishing and gates.

        Raises:
            ConfigError: no rule makes that snapshot.
        """
        if name == LIVE:
            return self.live
        if name not in self.snapshots.states:
            names = sorted([LIVE, *self.snapshots.states])
            raise ConfigError(f"Learner: snapshot {name!r} was asked for; this objective keeps {names}; name one of them")
        return self.snapshots.states[name]


def resolve_anchor(anchor: Literal["auto", "recompute", "behavior"], device: torch.device, base_dtype: str) -> Anchor:
    """auto: the stored log-probs serve on CPU in float32 (5e-9 apart); elsewhere batch shapes change bits, so they are recomputed."""
    if anchor != "auto":
        return anchor
    return "behavior" if device.type == "cpu" and base_dtype == "float32" else "recompute"


def make_learner(
    policy: Policy, config: LearnerConfig, weights: Mapping[str, float], run_seed: int, *, base_dtype: str = "float32"
) -> Learner:
    """Compose a Learner from its config section.

    Args:
        policy: holds the fresh adapter (`Archive.begin` then resumes or publishes it as version 0).
        weights: train reward -> weight.
        base_dtype: of the frozen base (model.dtype); decides the anchor "auto", and float16 scales the loss.
    """
    objective = config.objective.make(resolve_anchor(config.anchor, policy.device, base_dtype))
    parity = objective.needs.parity_tolerance
    tolerance = RATIO_TOLERANCE if base_dtype == "float32" or parity is None else max(parity, RATIO_TOLERANCE)
    return Learner(
        policy, config, objective, make_estimator(config.advantage), weights=weights, run_seed=run_seed,
        gates=StartGates(micro_batch=config.micro_batch, ratio_tolerance=tolerance), loss_scale=LossScale(enabled=base_dtype == "float16"),
    )  # fmt: skip
