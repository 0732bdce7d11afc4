"""MetricsView: brings /metrics up to date from what the Coordinator keeps; it lists no directory and reads no file.

What happens once (a score file, a heartbeat, a manifest) is counted where it happens; what stands is shown here, at each tick.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Final

from common.metrics import RunMetrics
from common.store.directive import SlotReport
from common.store.ledger_entries import GroupState
from common.store.pulse import WINDOW_S
from common.store.run_state import RunState
from common.store.summary import backlog_of
from common.types import Manifest

ROLES: Final = ("learner", "rollout", "reward")
SLOT_STATES: Final = ("starting", "running", "draining", "resting")
_DROP_REASONS: Final = ("stale", "attempts", "too_few_scores", "flat")


class MetricsView:
    """The gauges of a run, and the counters that follow a total kept elsewhere. One caller at a time.

    Args:
        state: of the Coordinator.
    """

    def __init__(self, state: RunState) -> None:
        self._state, self._metrics = state, state.metrics
        ledger = state.ledger
        self._before = {**ledger.counts(), **ledger.drops_by_reason()}  # what earlier Coordinators counted: a counter begins at 0 with each
        self._reports: Mapping[str, SlotReport] | None = None  # of the tick before
        self._show_settings()

    def show(self) -> None:
        """Bring /metrics up to date."""
        with self._state.lock:
            now = self._state.clock()
            slots = self._present(now)
            self._show_pipeline(now)
            self._show_rewards(now)
            self._show_fleet(slots, now)
            self._show_images()
            self._show_store()

    def _show_settings(self) -> None:
        settings, metrics = self._state.settings, self._metrics
        metrics.put("run_info", 1, settings.objective, str(self._state.incarnation), settings.software_version)
        metrics.put("updates_planned", settings.schedule.num_updates)
        metrics.put("max_staleness_updates", settings.schedule.max_staleness)
        metrics.put("stall_timeout_seconds", settings.schedule.stall_timeout_s)
        metrics.put("store_limit_bytes", settings.store.max_bytes)
        metrics.put("learner_state_every_updates", settings.state_interval)
        metrics.open("group_staleness_updates")
        for name in ("leases_expired_total", "receipt_mismatches_total"):
            metrics.count(name, 0)
        for role in ("rollout", "reward"):
            metrics.count("leases_failed_total", 0, role)
        for role in ROLES:
            metrics.count("slot_crashes_total", 0, role)
        for reason in _DROP_REASONS:
            metrics.follow("groups_dropped_total", 0, reason)

    def _show_pipeline(self, now: float) -> None:
        state, metrics = self._state, self._metrics
        counts = state.ledger.counts()
        issued = counts.pop("issued")
        metrics.put("update", state.finished_update)
        if state.ledger.newest_version is not None:
            metrics.put("policy_version", state.ledger.newest_version)
        metrics.replace("groups", {(name,): count for name, count in counts.items()})
        metrics.follow("groups_issued_total", max(0, issued - self._before["issued"]))
        metrics.follow("groups_consumed_total", counts[GroupState.BATCHED] - self._before[GroupState.BATCHED])
        for reason, count in state.ledger.drops_by_reason().items():
            metrics.follow("groups_dropped_total", count - self._before.get(reason, 0), reason)
        metrics.put("conservation_error_groups", state.ledger.conservation_error())
        metrics.replace("idle_ratio", {(role,): share for role, share in state.pulse.waiting_shares(now).items()})
        since = state.learner_waits_since
        metrics.put("learner_wait_seconds", 0.0 if since is None else now - since)
        metrics.put("idle_seconds", state.end.idle_s(now))
        metrics.put("run_ending", state.learner_done or state.end.outcome.is_over or state.end.is_closing(now))
        metrics.put("evaluations_pending", len(state.board.pending()))

    def _show_rewards(self, now: float) -> None:
        pools, metrics = self._state.pools, self._metrics
        metrics.replace("reward_coverage_ratio", {(name,): share for name, share in pools.coverage().items()})
        metrics.replace("reward_pool_down", {(name,): is_down for name, is_down in pools.down(now).items()})
        metrics.replace("reward_backlog_groups", {(name,): count for name, count in backlog_of(self._state).items()})

    def _show_images(self) -> None:
        sensors, metrics = self._state.sensors, self._metrics
        metrics.replace("sensor_value", {(name,): value for name, value in sensors.values.items()})
        bands = sensors.bands
        metrics.replace("sensor_low", {(name,): band.low for name, band in bands.items() if band.low > float("-inf")})
        metrics.replace("sensor_high", {(name,): band.high for name, band in bands.items() if band.high < float("inf")})
        metrics.replace("sensor_position", {(name,): value for name, value in sensors.positions.items()})
        for name in sensors.values:
            metrics.count("sensor_alerts_total", 0, name)

    def _show_store(self) -> None:
        state, retention = self._state, self._state.retention
        self._metrics.replace("store_bytes", {(kind,): size for kind, size in retention.bytes_by_kind.items()})
        self._metrics.put("store_up", not state.store_trouble)
        if state.ledger.newest_version is not None:  # then there is a LearnerState too: that of update 0 at least
            self._metrics.put("learner_state_age_updates", max(0, state.finished_update - retention.newest_state))

    # ---- slots

    def _present(self, now: float) -> set[str]:
        """The slots that are shown: those of the driver's report, and those heard lately; the others are forgotten."""
        reported = self._state.fleet.directive.report.slots
        silence_s = WINDOW_S if reported else self._state.settings.schedule.stall_timeout_s
        present = set(reported) | self._state.pulse.heard_within(silence_s, now)
        self._state.forget_but(present)
        return present

    def _show_fleet(self, slots: set[str], now: float) -> None:
        state, metrics = self._state, self._metrics
        report, publications = state.fleet.directive.report, state.publications
        states = Counter((_role(slot), each.state) for slot, each in report.slots.items())
        if not report.slots:  # nobody drives but the loops themselves
            states = Counter((_role(slot), "running") for slot in state.pulse.heard_within(WINDOW_S, now))
        metrics.replace("slots", {(role, phase): states[role, phase] for role in ROLES for phase in SLOT_STATES})
        metrics.replace("slots_wanted", {(pool,): size for pool, size in report.sizes.items()})
        workers = [slot for slot in slots if _role(slot) == "rollout"]
        metrics.replace("slot_policy_version", {(slot,): publications.versions[slot] for slot in workers if slot in publications.versions})
        metrics.replace("slot_refused", {(slot,): publications.refusal(slot) is not None for slot in workers})
        metrics.replace("slot_idle_ratio", {(slot,): share for slot, share in state.pulse.slot_shares(now).items() if slot in slots})
        heard = state.pulse.heard
        metrics.replace("slot_silent_seconds", {(slot,): now - heard[slot] for slot in slots if slot in heard})
        metrics.follow("receipt_mismatches_total", publications.num_mismatches)
        self._count_crashes(report.slots)

    def _count_crashes(self, slots: Mapping[str, SlotReport]) -> None:
        """A process that ended unasked leaves its slot resting, or crashed once more when it was started again between two reports."""
        before, self._reports = self._reports, slots or self._reports
        if before is None or slots is before:
            return
        for slot, found in slots.items():
            was = before.get(slot, SlotReport(state=""))
            is_fresh = found.state == "resting" and was.state != "resting"
            self._metrics.count("slot_crashes_total", max(found.crashes - was.crashes, int(is_fresh), 0), _role(slot))


def observe_staleness(metrics: RunMetrics, manifest: Manifest) -> None:
    """Each group that a manifest consumes, once."""
    for group in manifest.groups:
        metrics.observe("group_staleness_updates", manifest.update - 1 - group.version)


def _role(slot: str) -> str:
    return slot.partition(".")[0]
