"""From an update's metrics record (metrics/update_*.json) to the learning part of /metrics."""

from collections import deque
from collections.abc import Mapping
from typing import Any, Final

from common.metrics import Labels, RunMetrics

MAX_NAMES: Final = 64  # of an objective's own values
REMEMBERED: Final = 64  # newest updates that are not counted again
_GAUGES: Final = {
    "loss": "loss",
    "grad_norm": "gradient_norm",
    "learning_rate": "learning_rate",
    "advantage_abs_mean": "advantage_abs_mean",
    "ratio_mean": "policy_ratio_mean",
    "ratio_min": "policy_ratio_min",
    "ratio_max": "policy_ratio_max",
}
_SIDES: Final = {"clip_fraction_up": "up", "clip_fraction_down": "down"}
_COUNTS: Final = {"num_steps": "optimizer_steps_total", "num_skipped": "skipped_steps_total"}
_REWARDS: Final = {"mean": "reward_mean", "std_in_group": "reward_group_std", "flat_share": "reward_flat_ratio"}
_PHASES: Final = ("wait", "read", "learn", "save")


class LearningView:
    """Shows the newest update's record, and counts what each new one adds. One caller at a time."""

    def __init__(self, metrics: RunMetrics) -> None:
        self._metrics = metrics
        self._newest = (0, 0)  # update and incarnation that the gauges show
        self._counted: deque[int] = deque(maxlen=REMEMBERED)
        for name in (*_COUNTS.values(), "images_consumed_total"):
            metrics.count(name, 0)
        for phase in _PHASES:
            metrics.count("phase_seconds_total", 0, "learner", phase)

    def take(self, record: Mapping[str, Any], *, counts: bool) -> None:
        """Show a sound record.

        Args:
            record: of `learner.metrics.metrics_record`; of two incarnations' records of one update the later one is shown.
            counts: whether it is news; a record that an earlier Coordinator saw is only shown.
        """
        update = int(record["update"])
        if counts and update not in self._counted:
            self._counted.append(update)
            self._count(record)
        if (update, int(record["incarnation"])) >= self._newest:
            self._newest = update, int(record["incarnation"])
            self._show(record)

    def _count(self, record: Mapping[str, Any]) -> None:
        for name, counter in _COUNTS.items():
            self._metrics.count(counter, record["learner"].get(name) or 0.0)
        self._metrics.count("images_consumed_total", record["images"])
        for phase in _PHASES:
            self._metrics.count("phase_seconds_total", record["seconds"].get(phase, 0.0), "learner", phase)

    def _show(self, record: Mapping[str, Any]) -> None:
        found = {name: float(value) for name, value in record["learner"].items() if value is not None}
        for name, gauge in _GAUGES.items():
            self._show_one(gauge, found.pop(name, None))
        self._metrics.replace("clipped_ratio", {(side,): found.pop(name) for name, side in _SIDES.items() if name in found})
        distances = {name for name in found if name.startswith("kl") or name == "approx_kl"}
        self._metrics.replace("kl", {(name,): found.pop(name) for name in sorted(distances)})
        others = [name for name in sorted(found) if name not in _COUNTS][:MAX_NAMES]
        self._metrics.replace("objective_value", {(name,): found[name] for name in others})
        for field, gauge in _REWARDS.items():
            self._metrics.replace(gauge, _by_reward(record, field))
        self._show_one("flat_groups_ratio", record["flat_group_share"])
        self._show_one("weighted_reward", record.get("weighted_reward"))

    def _show_one(self, gauge: str, value: float | None) -> None:
        """A value that was not finite, or that the objective does not have, has no series."""
        self._metrics.replace(gauge, {} if value is None else {(): value})


def _by_reward(record: Mapping[str, Any], field: str) -> dict[Labels, float]:
    return {(name,): summary[field] for name, summary in record["rewards"].items() if summary[field] is not None}
