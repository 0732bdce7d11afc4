"""The Coordinator's figures as the live line and the driver take them."""

from typing import Any

from common.store.run_state import RunState


def summary_of(state: RunState) -> dict[str, Any]:
    """Return figures for the live line and the fleet: progress, metrics, waiting shares, states; versions, gauges, work by slot."""
    with state.lock:
        now, waits = state.clock(), state.learner_waits_since is not None
        return {
            "update": state.finished_update, "first_update": state.first_update, "metrics": _live_metrics(state),
            "evaluation": state.verdict or (f"{len(state.board.pending())} under way" if state.board.pending() else ""),
            "waiting": state.pulse.waiting_shares(now), "learner_waits_for": state.waited_for() if waits else "",
            "counts": state.ledger.counts(), "drops": state.ledger.drops_by_reason(), "versions": dict(state.publications.versions),
            "gauges": {slot: dict(gauges) for slot, gauges in state.pulse.gauges.items()}, "version": state.ledger.newest_version,
            "outcome": str(state.end.outcome.kind), "reason": state.end.outcome.reason, "store_trouble": state.store_trouble,
            "work": dict(state.fleet.work), "overruns": dict(state.fleet.overruns), "backlog": backlog_of(state),
            "slot_waits": state.pulse.slot_shares(now),
            "alerts": [*(alert.sensor for alert in state.sensors.alerts), *(f"reward {name}" for name in state.pools.alerts(now))],
        }  # fmt: skip


def backlog_of(state: RunState) -> dict[str, int]:
    """Reward -> committed training groups that it has not scored. The caller holds the lock."""
    return {reward.name: len(state.ledger.wanted_scores(reward.name)) for reward in state.settings.rewards}


def _live_metrics(state: RunState) -> dict[str, float]:
    shown = dict(state.update_metrics)
    shown["images_per_s"] = sum(gauges.get("images_per_second", 0.0) for gauges in state.pulse.gauges.values())
    manifest = state.last_manifest
    if manifest is not None:
        shown["staleness"] = sum(manifest.update - 1 - group.version for group in manifest.groups) / len(manifest.groups)
    return shown
