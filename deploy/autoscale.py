"""`--autoscale`: acts on who waits. One pure decision, and a small object that keeps its cool-down."""

from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import Field, model_validator

from common.config import StrictModel
from common.store.control import ROLLOUT


class AutoscaleSection(StrictModel):
    """Bounds of --autoscale; off by default. Speed only, never the maths."""

    enabled: bool = False
    min_rollout: int = Field(1, ge=1)
    max_rollout: int = Field(8, ge=1)
    min_reward: int = Field(1, ge=1)  # of each reward
    max_reward: int = Field(4, ge=1)
    threshold: float = Field(0.25, gt=0, lt=1)  # a share of the last minute that a role waited
    cooldown_s: float = Field(90.0, gt=0)  # between decisions; waits are shares of the last 60 s

    @model_validator(mode="after")
    def _bounds_agree(self) -> "AutoscaleSection":
        if self.min_rollout > self.max_rollout or self.min_reward > self.max_reward:
            raise ValueError("autoscale: a minimum lies above its maximum; lower min_rollout or min_reward, or raise the maximum")
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class Waits:
    """What the decision looks at: shares of the last minute spent waiting, in [0, 1], and unscored groups."""

    learner: float
    rollout: float  # mean over workers
    rewards: Mapping[str, float]  # pool reward.NAME -> mean over its servers
    backlog: Mapping[str, int]  # pool reward.NAME -> committed groups without its scores


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """One pool gets one process more or less."""

    pool: str
    size: int
    sentence: str


def decide(waits: Waits, sizes: Mapping[str, int], limits: AutoscaleSection) -> Decision | None:
    """Return the one step that helps, or None when nobody waits for long or a bound is met.

    The learner waits: for scores (a reward has a backlog of more than a group a server) that reward grows; else rollout grows,
    unless workers wait as well while nothing is left to score and the learner is the slower one. The learner does not wait (less than half the
    threshold) and workers do: rollout shrinks. A reward whose servers idle beside an empty backlog shrinks.
    """
    if waits.learner >= limits.threshold:
        return _grow(waits, sizes, limits)
    if waits.learner < limits.threshold / 2 and waits.rollout >= limits.threshold and sizes.get(ROLLOUT, 0) > limits.min_rollout:
        size = sizes[ROLLOUT] - 1
        return Decision(
            pool=ROLLOUT, size=size, sentence=f"autoscale: rollout workers waited {waits.rollout:.0%} of the last minute for the learner, "
            f"which waited {waits.learner:.0%}: rollout {size + 1} -> {size}",
        )  # fmt: skip
    return _shrink_reward(waits, sizes, limits)


def _grow(waits: Waits, sizes: Mapping[str, int], limits: AutoscaleSection) -> Decision | None:
    behind = {pool: count for pool, count in waits.backlog.items() if count > sizes.get(pool, 0)}
    if behind:
        pool = max(sorted(behind), key=lambda name: behind[name])
        size = sizes.get(pool, 0) + 1
        sentence = f"the learner waited {waits.learner:.0%} of the last minute, and {behind[pool]} groups wait for {pool}"
        bound = limits.max_reward
    else:
        pool, size, bound = ROLLOUT, sizes.get(ROLLOUT, 0) + 1, limits.max_rollout
        sentence = f"the learner waited {waits.learner:.0%} of the last minute for rollouts"
    if size > bound:
        return None
    return Decision(pool=pool, size=size, sentence=f"autoscale: {sentence}: {pool} {size - 1} -> {size}")


def _shrink_reward(waits: Waits, sizes: Mapping[str, int], limits: AutoscaleSection) -> Decision | None:
    for pool, idle in sorted(waits.rewards.items()):
        size = sizes.get(pool, 0)
        # the others take over its work: they must stay below full load, with the threshold as a margin
        others = (1 - idle) * size / (size - 1) if size > 1 else 1.0
        if size > limits.min_reward and waits.backlog.get(pool, 0) == 0 and others < 1 - limits.threshold:
            sentence = (
                f"autoscale: servers of {pool} waited {idle:.0%} of the last minute with nothing to score: {pool} {size} -> {size - 1}"
            )
            return Decision(pool=pool, size=size - 1, sentence=sentence)
    return None


class Autoscaler:
    """Asks for a decision when the cool-down has passed since the last change of sizes, whoever made it."""

    def __init__(self, limits: AutoscaleSection, now: float) -> None:
        self._limits, self._changed_at = limits, now

    def changed(self, now: float) -> None:
        """Sizes changed: waits of the last minute say nothing about the new ones yet."""
        self._changed_at = now

    def ask(self, waits: Waits, sizes: Mapping[str, int], now: float) -> Decision | None:
        """Return the next step, None while disabled, cooling down or content."""
        if not self._limits.enabled or now - self._changed_at < self._limits.cooldown_s:
            return None
        return decide(waits, sizes, self._limits)
