"""SlotTotals: what the totals in the slots' heartbeats add to the counters of /metrics.

A slot's totals begin at 0 with each of its processes, and a beat may arrive late, even after the first of the next process. So each
process marks its totals with a number of its own (common.gauges.PROCESS_MARK): each is compared with what it said itself, and only growth
counts. Which of two processes is the dead one need not be known.
"""

from collections.abc import Collection, Mapping
from typing import Final

from common.gauges import PROCESS_MARK
from common.metrics import RunMetrics

PHASES: Final[Mapping[str, Mapping[str, str]]] = {
    "rollout": {
        "sampling_seconds_total": "sampling",
        "decoding_seconds_total": "decoding",
        "committing_seconds_total": "committing",
        "waiting_seconds_total": "waiting",
    },
    "reward": {"read_seconds_total": "read", "score_seconds_total": "score", "waiting_seconds_total": "waiting"},
}
"""Role -> a total of its heartbeats -> the phase."""
MAX_PROCESSES: Final = 4  # of a slot, those heard last: beats of earlier ones are not on their way any more


class SlotTotals:
    """Adds up the growth of the slots' totals. The caller holds the lock.

    Args:
        metrics: of the run.
        rewards: their names.
        is_restart: whether the slots may be older than this object: then their first totals were counted by another.
    """

    def __init__(self, metrics: RunMetrics, rewards: Collection[str], *, is_restart: bool) -> None:
        self._metrics, self._is_restart = metrics, is_restart
        self._last: dict[str, dict[float, dict[str, float]]] = {}  # slot -> its processes' marks, the one heard last at the end -> totals
        for role, phases in PHASES.items():
            for phase in phases.values():
                metrics.count("phase_seconds_total", 0, role, phase)
        for name in rewards:
            metrics.count("reward_calls_total", 0, name)

    def heard(self, slot: str, totals: Mapping[str, float], reward: str = "") -> Mapping[str, float]:
        """Take a slot's heartbeat, and return by how much each of its totals grew. reward: whose server it is, "" for the other roles."""
        grown = self._growth(slot, totals)
        role = slot.partition(".")[0]
        for name, phase in PHASES.get(role, {}).items():
            self._metrics.count("phase_seconds_total", grown.get(name, 0.0), role, phase)
        if role == "rollout":
            self._metrics.count("rollout_images_total", grown.get("images_total", 0.0), slot)
        if reward:
            self._metrics.count("reward_calls_total", grown.get("calls_total", 0.0), reward)
        return grown

    def keep(self, slots: Collection[str]) -> None:
        """Forget the slots that are gone, with their series."""
        self._last = {slot: processes for slot, processes in self._last.items() if slot in slots}
        self._metrics.keep("rollout_images_total", {(slot,) for slot in slots})

    def _growth(self, slot: str, totals: Mapping[str, float]) -> dict[str, float]:
        processes = self._last.setdefault(slot, {})
        was_counted_elsewhere = self._is_restart and not processes
        mark = totals.get(PROCESS_MARK, 0.0)
        last = processes.pop(mark, {})
        processes[mark] = {**last, **{name: max(value, last.get(name, 0.0)) for name, value in totals.items()}}
        if len(processes) > MAX_PROCESSES:
            del processes[next(iter(processes))]
        return {} if was_counted_elsewhere else {name: max(0.0, value - last.get(name, 0.0)) for name, value in totals.items()}
