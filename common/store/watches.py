"""Watches: the looks at sensors and reward pools that the Coordinator takes at each tick, and the sentences that follow."""

from common.logs import get_logger
from common.store.learning_view import LearningView
from common.store.run_state import RunState

_log = get_logger("coordinator")


class Watches:
    """Says once what is new. One caller at a time."""

    def __init__(self, state: RunState) -> None:
        self._state = state
        self._learning = LearningView(state.metrics)
        self._pool_alerts: set[str] = set()  # rewards whose trouble was told

    def look(self) -> None:
        """Look at the pools, then at the newest updates. Raises StoreError."""
        self._look_at_pools()
        self._look_at_updates()

    def _look_at_updates(self) -> None:
        """Read the newest updates' records: they are shown, and their images held against the base's."""
        sensors = self._state.sensors
        found = sensors.look(self._state.finished_update)
        for alert in found:
            _log.warning("alert: %s", alert.sentence)
            self._state.metrics.count("sensor_alerts_total", 1, alert.sensor)
        for record in sensors.take_records():
            try:
                self._learning.take(record.content, counts=record.is_news)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                _log.warning("the metrics record of update %s is not shown: %r", record.content.get("update"), error)

    def _look_at_pools(self) -> None:
        """Say which reward pools fell ill or are well again."""
        with self._state.lock:
            alerts = self._state.pools.alerts(self._state.clock())
        for name in sorted(alerts.keys() - self._pool_alerts):
            _log.warning("alert: %s", alerts[name])
        for name in sorted(self._pool_alerts - alerts.keys()):
            _log.warning("reward %s: its servers score again", name)
        self._pool_alerts = set(alerts)
