"""RunMetrics: the values behind /metrics, kept family by family as common/metric_catalog.py lists them, and the port that serves them.

prometheus_client's own counters add a _created series each and cannot follow totals that are counted elsewhere (the ledger's), so the
values are kept here and handed out as a collector. Only what the catalog names can be shown.
"""

import math
import os
import socket
import threading
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Final

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from common.errors import ConfigError
from common.logs import get_logger
from common.metric_catalog import BY_NAME, CATALOG, PREFIX, Kind, Metric

Labels = tuple[str, ...]
"""Values of a family's labels but run, in the catalog's order."""
Family = GaugeMetricFamily | CounterMetricFamily | HistogramMetricFamily
LOOPBACK: Final = "127.0.0.1"
_log = get_logger("coordinator")


class RunMetrics(Collector):
    """What the Coordinator shows of a run at /metrics. Names are the catalog's without the prefix; safe to use from several threads.

    Args:
        run: the run's name, a label of every series.
    """

    def __init__(self, run: str) -> None:
        self._run = run
        self._lock = threading.Lock()
        self._values: dict[str, dict[Labels, float]] = {metric.name: {} for metric in CATALOG}
        self._histograms: dict[str, dict[Labels, _Histogram]] = {metric.name: {} for metric in CATALOG}
        self._refused: set[str] = set()  # counters of which an amount was refused, and said to be
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(self)

    def put(self, name: str, value: float, *labels: str) -> None:
        """Set a gauge's series."""
        metric = _find(name, "gauge", labels)
        with self._lock:
            self._values[metric.name][labels] = float(value)

    def replace(self, name: str, values: Mapping[Labels, float]) -> None:
        """Make these a gauge's only series; those that it had besides are gone."""
        metric = _find(name, "gauge", *values)
        with self._lock:
            self._values[metric.name] = {labels: float(value) for labels, value in values.items()}

    def count(self, name: str, amount: float, *labels: str) -> None:
        """Add to a counter; 0 makes its series visible before anything is counted.

        An amount that is negative or not finite changes nothing and is logged once a name: it came with a record or a heartbeat, and
        what is shown of a run does not end it.
        """
        metric = _find(name, "counter", labels)
        is_amount = 0 <= amount < math.inf
        with self._lock:
            is_news = not is_amount and name not in self._refused
            if is_amount:
                self._values[metric.name][labels] = self._values[metric.name].get(labels, 0.0) + amount
            else:
                self._refused.add(name)
        if is_news:
            _log.warning("metrics: %s was to grow by %s: a counter takes finite amounts from 0 on; such are left out", name, amount)

    def follow(self, name: str, total: float, *labels: str) -> None:
        """Let a counter stand at a total that is counted elsewhere; a total that fell is no counter's, and changes nothing."""
        metric = _find(name, "counter", labels)
        with self._lock:
            self._values[metric.name][labels] = max(float(total), self._values[metric.name].get(labels, 0.0))

    def observe(self, name: str, value: float, *labels: str) -> None:
        """Put a value into a histogram."""
        metric = _find(name, "histogram", labels)
        with self._lock:
            series = self._histograms[metric.name].setdefault(labels, _Histogram(metric.buckets))
            series.observe(value)

    def open(self, name: str, *labels: str) -> None:
        """Make a histogram's series visible before anything is observed."""
        metric = _find(name, "histogram", labels)
        with self._lock:
            self._histograms[metric.name].setdefault(labels, _Histogram(metric.buckets))

    def keep(self, name: str, labels: Collection[Labels]) -> None:
        """Forget a counter's series but these: of slots that are gone."""
        metric = _find(name, "counter", *labels)
        with self._lock:
            self._values[metric.name] = {key: value for key, value in self._values[metric.name].items() if key in labels}

    def collect(self) -> Iterator[Family]:
        """Yield every family of the catalog, those without series too."""
        with self._lock:
            values = {name: dict(series) for name, series in self._values.items()}
            histograms = {name: {key: each.cumulated() for key, each in table.items()} for name, table in self._histograms.items()}
        for metric in CATALOG:
            names = ["run", *metric.labels]
            if metric.kind == "histogram":
                family = HistogramMetricFamily(metric.name, metric.text, labels=names)
                for labels, (buckets, total) in sorted(histograms[metric.name].items()):
                    family.add_metric([self._run, *labels], buckets, total)
                yield family
                continue
            numbers = (GaugeMetricFamily if metric.kind == "gauge" else CounterMetricFamily)(metric.name, metric.text, labels=names)
            for labels, value in sorted(values[metric.name].items()):
                numbers.add_metric([self._run, *labels], value)
            yield numbers


class _Histogram:
    """Counts by bucket (value <= bound), and the sum."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def cumulated(self) -> tuple[list[tuple[str, float]], float]:
        """(bound as text, values at or below it), and the sum."""
        ends = [*(floatToGoString(bound) for bound in self._bounds), "+Inf"]
        return [(end, float(sum(self._counts[: index + 1]))) for index, end in enumerate(ends)], self._sum


def _find(name: str, kind: Kind, *labels: Labels) -> Metric:
    metric = BY_NAME.get(PREFIX + name)
    assert metric is not None and metric.kind == kind, f"RunMetrics: {name} is no {kind} of common/metric_catalog.py; add it there first"
    assert all(len(each) == len(metric.labels) for each in labels), f"RunMetrics: {name} has the labels {metric.labels}, not {labels}"
    return metric


def check_port(port: int, host: str = LOOPBACK) -> None:
    """See that `serve_metrics` could listen here now, before anything costly starts. Raises ConfigError."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        socket.create_server(address, family=family).close()
    except OSError as error:
        raise _refusal(error, port, host) from None


def _refusal(error: OSError, port: int, host: str) -> ConfigError:
    cause = os.strerror(error.errno) if error.errno is not None and error.errno > 0 else str(error)
    return ConfigError(
        f"coordinator: /metrics cannot listen on {host}:{port} ({cause}); a run has a port of its own: end who holds it, "
        "or set cluster.metrics_port to a free one (0: none) and cluster.metrics_host to an address of this machine"
    )


def serve_metrics(registry: CollectorRegistry, port: int, host: str = LOOPBACK) -> Callable[[], None]:
    """Serve /metrics from a daemon thread; return what ends it.

    Raises:
        ConfigError: the port is taken, or the host is no address of this machine.
    """
    try:
        server, thread = start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        raise _refusal(error, port, host) from None

    def close() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return close
