"""The names of flowfleet's Prometheus metrics, and the one registry that holds them.

Prefix flowfleet_, base units, counters end in _total; labels run, slot, reason, state, reward, name (of a sensor): few and bounded.
"""

import re
from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

MAX_NAMES = 200  # distinct gauge names that components may bring


class RunMetrics:
    """What the Coordinator shows of a run at /metrics.

    Args:
        run: the run's name, a label of every series.
    """

    def __init__(self, run: str) -> None:
        self._run = run
        self.registry = CollectorRegistry()
        self._groups = self._gauge("groups", "Groups by state of the ledger.", "state")
        self._issued = self._gauge("groups_issued", "Group numbers issued so far.")
        self._version = self._gauge("policy_version", "Newest published policy version.")
        self._update = self._gauge("update", "Newest finished update.")
        self._staleness = self._gauge("staleness_updates", "Mean staleness of the newest manifest's groups.")
        self._evaluations = self._gauge("evaluations_pending", "Evaluations under way.")
        self._learner_wait = self._gauge("learner_wait_seconds", "How long the learner has been waiting for its next batch.")
        self._dropped = self._gauge("groups_dropped", "Dropped groups by reason.", "reason")
        self._evaluated = self._gauge("evaluation_score", "Frozen evaluation: mean over task means.", "reward")
        self._expired = Counter("flowfleet_leases_expired", "Leases that expired.", ["run"], registry=self.registry).labels(run=run)
        self._sensor = self._gauge("sensor", "Smoothed image statistic or watch reward; the base model's band is -1 to 1.", "name")
        self._alerts = Counter(
            "flowfleet_sensor_alerts", "Sensors that left their band while a train reward rose.", ["run", "name"], registry=self.registry
        )  # fmt: skip
        self._coverage = self._gauge("reward_coverage", "Scored over applicable images of the newest groups, in [0, 1].", "reward")
        self._pool_down = self._gauge("reward_pool_down", "1 while every server of the reward has its breaker open.", "reward")
        self._brought: dict[str, Gauge] = {}

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"flowfleet_{name}", text, ["run", *labels], registry=self.registry)

    def show_counts(self, counts: Mapping[str, int], dropped: Mapping[str, int]) -> None:
        """Groups by state, and drops by reason."""
        for state, count in counts.items():
            if state == "issued":
                self._issued.labels(run=self._run).set(count)
            else:
                self._groups.labels(run=self._run, state=state).set(count)
        for reason, count in dropped.items():
            self._dropped.labels(run=self._run, reason=reason).set(count)

    def show_progress(self, *, version: int, update: int, evaluations: int, learner_wait_s: float, staleness: float) -> None:
        """How far the run is."""
        self._version.labels(run=self._run).set(version)
        self._update.labels(run=self._run).set(update)
        self._evaluations.labels(run=self._run).set(evaluations)
        self._learner_wait.labels(run=self._run).set(learner_wait_s)
        self._staleness.labels(run=self._run).set(staleness)

    def show_evaluation(self, scores: Mapping[str, float]) -> None:
        """The newest evaluation's means by reward."""
        for reward, value in scores.items():
            self._evaluated.labels(run=self._run, reward=reward).set(value)

    def count_expired(self, number: int) -> None:
        """Leases that expired just now."""
        self._expired.inc(number)

    def show_sensors(self, positions: Mapping[str, float], alerted: Iterable[str]) -> None:
        """Where each sensor stands in its band, and the sensors that alerted just now."""
        for name, position in positions.items():
            self._sensor.labels(run=self._run, name=name).set(position)
            self._alerts.labels(run=self._run, name=name)  # shown as 0 before the first
        for name in alerted:
            self._alerts.labels(run=self._run, name=name).inc()

    def show_pools(self, coverage: Mapping[str, float], down: Mapping[str, bool]) -> None:
        """How much of what they were asked the rewards scored, and which pools are down."""
        for reward, share in coverage.items():
            self._coverage.labels(run=self._run, reward=reward).set(share)
        for reward, is_down in down.items():
            self._pool_down.labels(run=self._run, reward=reward).set(float(is_down))

    def show_brought(self, prefix: str, slot: str, values: Mapping[str, float]) -> None:
        """Gauges that a component brought, one series a slot; beyond MAX_NAMES names the rest is left out."""
        for key, value in values.items():
            name = f"flowfleet_{prefix}_" + re.sub(r"[^a-zA-Z0-9_]", "_", key)
            if name not in self._brought:
                if len(self._brought) >= MAX_NAMES:
                    continue
                self._brought[name] = Gauge(name, f"{key}, as {prefix} reports it.", ["run", "slot"], registry=self.registry)
            self._brought[name].labels(run=self._run, slot=slot).set(value)


def serve_metrics(registry: CollectorRegistry, port: int) -> None:
    """Serve /metrics on loopback from a daemon thread. Raises OSError when the port is taken."""
    start_http_server(port, addr="127.0.0.1", registry=registry)
