"""Start gates of the learner: they fail before compute is burnt, each by its name (architecture, section 11)."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from common.errors import GateError
from common.flow.noise import seeded_noise
from common.logs import get_logger
from common.policy.base import AdapterState, Policy
from common.types import RolloutGroup
from learner.metrics import Tally
from learner.minibatches import trajectory_block
from learner.objectives.base import Needs
from learner.objectives.replay import replay_log_probs
from learner.snapshots import LIVE

PARITY_LIMIT = 5e-3  # above it the two sides do not compute the same thing, whatever the anchor
RATIO_TOLERANCE = 1e-6  # float32
KL_TOLERANCE = 1e-12  # mean square of the velocities' difference; bitwise equality gives 0
PROBE_SIGMA = 0.5

_log = get_logger("learner.gates")


def check_kl_is_zero(policy: Policy, group: RolloutGroup) -> None:
    """Check that a fresh adapter leaves the base unchanged.

    Raises:
        GateError("kl_not_zero"): adapter on and off give different velocities.
    """
    sigma = torch.tensor([PROBE_SIGMA], device=policy.device)
    latents = seeded_noise(0, (1, *policy.latent_shape)).to(policy.device)
    features = policy.batch_features([group.features])
    with torch.no_grad():
        live = policy.velocity(latents, sigma, features)
        with policy.base():
            base = policy.velocity(latents, sigma, features)
    divergence = float((live - base).square().mean())
    if not divergence <= KL_TOLERANCE:
        raise GateError(
            "kl_not_zero",
            f"Learner: before the first update the adapter changes the velocity by {divergence:.3g} (mean square); a fresh adapter has "
            "B = 0 and changes nothing; start in an empty run directory, and look for a merged or leftover adapter in model.path",
        )


def measure_parity(
    policy: Policy, group: RolloutGroup, state: AdapterState, micro_batch: int, *, detach_uncond: bool = True
) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """Return [K, W] |stored - recomputed log-prob| of a group under the weights that sampled it."""
    rows = []
    with torch.no_grad(), policy.using(state):
        for start in range(0, len(group.trajectories), micro_batch):
            trajectories = group.trajectories[start : start + micro_batch]
            block = trajectory_block(trajectories, group.sampler, policy)
            features = policy.batch_features([group.features] * len(trajectories))
            recomputed = replay_log_probs(policy, block, features)
            rows.append((recomputed - block.behavior_log_prob).abs().double().cpu().numpy())
    return np.concatenate(rows)


def check_parity(difference: np.ndarray[tuple[int, int], np.dtype[np.float64]], group: RolloutGroup, needs: Needs) -> float:
    """Check that learner and rollout worker compute the same log-probs; return the p99.

    Raises:
        GateError("parity"): p99 is above what the stored anchor bears, or above 5e-3 whatever the anchor.
    """
    p99 = float(np.percentile(difference, 99))
    if not p99 <= PARITY_LIMIT:
        raise GateError(
            "parity",
            f"Learner: log-probs of group {group.number}, stored by the rollout worker and recomputed, differ by {p99:.3g} (p99); the "
            f"limit is {PARITY_LIMIT:g}; both sides must hold the same weights, padding, guidance and dtype\n{_by_step(difference, group)}",
        )
    tolerance = needs.parity_tolerance
    if needs.stored_anchor and tolerance is not None and p99 > tolerance:
        raise GateError(
            "parity",
            f"Learner: stored and recomputed log-probs of group {group.number} differ by {p99:.3g} (p99), the objective's clip range bears "
            f'{tolerance:.3g}; set learner.anchor = "recompute"\n{_by_step(difference, group)}',
        )
    return p99


def _by_step(difference: np.ndarray[tuple[int, int], np.dtype[np.float64]], group: RolloutGroup) -> str:
    first = group.trajectories[0]
    lines = ["  step   sigma      mean       p99       max"]
    for column, (step, sigma) in enumerate(zip(first.step_index, first.sigma, strict=True)):
        values = difference[:, column]
        lines.append(f"  {int(step):4d}  {float(sigma):6.4f}  {values.mean():8.2e}  {np.percentile(values, 99):8.2e}  {values.max():8.2e}")
    return "\n".join(lines)


def check_ratio(low: float, high: float, tolerance: float) -> None:
    """Check that ratios are 1 before the first optimizer step of an on-policy minibatch.

    Raises:
        GateError("ratio").
    """
    if max(abs(low - 1.0), abs(high - 1.0)) > tolerance:
        raise GateError(
            "ratio",
            f"Learner: before any step the first on-policy minibatch has ratios from {low:.9f} to {high:.9f}; they are 1 within "
            f"{tolerance:g} when the same code gives both log-probs; look for dropout, another dtype or another micro_batch, or set "
            'learner.anchor = "recompute"',
        )


def check_gradient(norm: float, advantage: float) -> None:
    """Check that the first update of a fresh adapter has a gradient, where some sample has an advantage.

    Args:
        norm: mean gradient norm of its optimizer steps. advantage: largest absolute advantage of its samples.

    Raises:
        GateError("gradient").
    """
    if norm == 0.0 and advantage > 0.0:
        raise GateError(
            "gradient",
            f"Learner: the gradient of the first update is exactly 0, with advantages up to {advantage:.3g}; nothing would ever be "
            "learnt; look for an underflow (model.dtype), adapters that are switched off, or modules that the forward does not pass",
        )


class GatedLearner(Protocol):
    """What the gates look at."""

    @property
    def policy(self) -> Policy:
        """With the live adapter."""
        ...

    @property
    def version(self) -> int:
        """Of the live adapter."""
        ...

    @property
    def needs(self) -> Needs:
        """Of the objective."""
        ...

    def snapshot_state(self, name: str) -> AdapterState:
        """The live adapter or a snapshot."""
        ...


class StartGates:
    """Runs each gate once a process, on the first update that allows it."""

    def __init__(self, *, micro_batch: int, ratio_tolerance: float = RATIO_TOLERANCE) -> None:
        """micro_batch: samples a recomputing forward, the learner's own."""
        self._micro_batch = micro_batch
        self._ratio_tolerance = ratio_tolerance
        self._kl_due = self._parity_due = self._ratio_due = True
        self._on_policy = False  # the groups of this update were sampled with the very weights that it starts from

    def before_update(self, groups: Sequence[RolloutGroup], learner: GatedLearner) -> None:
        """KL at version 0; parity on the first group that the learner's own version sampled."""
        self._on_policy = all(group.adapter.version == learner.version and group.sampler.snapshot == LIVE for group in groups)
        if self._kl_due and learner.version == 0:
            check_kl_is_zero(learner.policy, groups[0])
        self._kl_due = False
        current = [group for group in groups if group.adapter.version == learner.version]
        if self._parity_due and learner.needs.trajectory and current:
            state = learner.snapshot_state(current[0].sampler.snapshot)
            p99 = check_parity(measure_parity(learner.policy, current[0], state, self._micro_batch), current[0], learner.needs)
            _log.info("parity: stored and recomputed log-probs differ by %.2g (p99)", p99)
            self._parity_due = False

    def after_first_minibatch(self, learner: GatedLearner, tally: Tally) -> None:
        """Ratios of the first minibatch, where they must be 1: recomputed anchors, or stored ones of the weights that are trained."""
        metrics = tally.metrics()
        anchored_here = not learner.needs.stored_anchor or self._on_policy
        if self._ratio_due and anchored_here and "ratio_min" in metrics:
            low, high = metrics["ratio_min"], metrics["ratio_max"]
            if np.isfinite([low, high]).all():
                check_ratio(low, high, self._ratio_tolerance)
        self._ratio_due = False

    def after_update(self, learner: GatedLearner, tally: Tally, advantage: float) -> None:
        """The gradient of the first update of all, before it counts; `advantage`: the largest of its samples, absolute."""
        norm = tally.metrics().get("grad_norm")
        if learner.version == 0 and norm is not None:
            check_gradient(norm, advantage)
