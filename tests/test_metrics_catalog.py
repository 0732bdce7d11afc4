"""The catalog of metrics: what /metrics can show, its naming conventions, its page, and the port that serves it."""

import logging
import math
import re
import socket
import urllib.request
from collections.abc import Iterator

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from common.errors import ConfigError
from common.metric_catalog import CATALOG, Metric
from common.metrics import RunMetrics, check_port, serve_metrics
from deploy.config import load_config
from deploy.local_cluster import free_port
from deploy.monitoring.metric_page import PAGE, metric_page, unit_of

NO_BASE_UNITS = {
    "ms",
    "milliseconds",
    "us",
    "minutes",
    "hours",
    "mb",
    "gb",
    "mib",
    "kilobytes",
    "percent",
    "percentage",
    "s",
    "sec",
    "secs",
}
RESERVED_ENDS = ("_total", "_count", "_sum", "_bucket", "_created", "_info")


def lint(metric: Metric) -> list[str]:
    """What a metric breaks of Prometheus' naming conventions."""
    words = metric.name.removeprefix("flowfleet_").split("_")
    broken = [
        (not re.fullmatch(r"flowfleet_[a-z][a-z0-9_]*", metric.name), "prefix and snake case"),
        (metric.name.endswith("_total") != (metric.kind == "counter"), "_total if and only if a counter"),
        (bool(NO_BASE_UNITS.intersection(words)), "base units"),
        (metric.kind in words, "no type in a name"),
        (not metric.text.endswith(".") or "\n" in metric.text, "the text is a sentence"),
        (not all(re.fullmatch(r"[a-z][a-z_]*", label) for label in metric.labels), "plain labels"),
        (bool({"run", "le", "job", "instance", "quantile"}.intersection(metric.labels)), "no reserved labels"),
        (bool(metric.buckets) != (metric.kind == "histogram"), "buckets if and only if a histogram"),
        (list(metric.buckets) != sorted(set(metric.buckets)), "buckets rise"),
        (metric.kind == "gauge" and metric.name.endswith(RESERVED_ENDS) and metric.name != "flowfleet_run_info", "no reserved end"),
    ]
    return [rule for is_broken, rule in broken if is_broken]


def test_every_metric_keeps_the_naming_conventions() -> None:
    assert {metric.name: lint(metric) for metric in CATALOG if lint(metric)} == {}
    assert len({metric.name for metric in CATALOG}) == len(CATALOG)


@pytest.mark.parametrize(
    ("metric", "rule"),
    [
        (Metric(name="loss", kind="gauge", area="learning", text="A."), "prefix and snake case"),
        (Metric(name="flowfleet_steps", kind="counter", area="learning", text="A."), "_total if and only if a counter"),
        (Metric(name="flowfleet_steps_total", kind="gauge", area="learning", text="A."), "_total if and only if a counter"),
        (Metric(name="flowfleet_wait_ms", kind="gauge", area="learning", text="A."), "base units"),
        (Metric(name="flowfleet_wait", kind="gauge", area="learning", text="A.", labels=("run",)), "no reserved labels"),
        (Metric(name="flowfleet_wait_count", kind="gauge", area="learning", text="A."), "no reserved end"),
        (Metric(name="flowfleet_wait_seconds", kind="histogram", area="learning", text="A.", buckets=(2.0, 1.0)), "buckets rise"),
    ],
)
def test_the_lint_catches_what_breaks_them(metric: Metric, rule: str) -> None:
    assert rule in lint(metric)


def test_a_registry_exposes_exactly_the_catalog() -> None:
    text = generate_latest(RunMetrics("test").registry).decode()
    kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))
    texts = dict(re.findall(r"^# HELP (\S+) (.+)$", text, re.MULTILINE))
    assert kinds == {metric.name: metric.kind for metric in CATALOG}
    assert texts == {metric.name: metric.text for metric in CATALOG}
    assert "_created" not in text


def test_what_the_catalog_lacks_cannot_be_shown() -> None:
    metrics = RunMetrics("test")
    with pytest.raises(AssertionError, match=r"no gauge of common/metric_catalog\.py"):
        metrics.put("made_up", 1.0)
    with pytest.raises(AssertionError, match="no counter"):
        metrics.count("update", 1.0)
    with pytest.raises(AssertionError, match=r"has the labels \('reward',\)"):
        metrics.put("reward_mean", 1.0)


@pytest.mark.parametrize("amount", [math.nan, math.inf, -math.inf, -1.0])
def test_what_is_no_amount_changes_no_counter_ends_nothing_and_is_said_once_a_name(amount: float, caplog: pytest.LogCaptureFixture) -> None:
    metrics = RunMetrics("test")
    value = metrics.registry.get_sample_value
    metrics.count("optimizer_steps_total", 2.0)
    with caplog.at_level(logging.WARNING, logger="flowfleet"):
        for name in ("optimizer_steps_total", "skipped_steps_total", "optimizer_steps_total"):
            metrics.count(name, amount)
    metrics.count("optimizer_steps_total", 3.0)
    assert value("flowfleet_optimizer_steps_total", {"run": "test"}) == 5.0
    assert value("flowfleet_skipped_steps_total", {"run": "test"}) is None
    assert [line.split(" by ")[0] for line in caplog.messages] == [
        "metrics: optimizer_steps_total was to grow", "metrics: skipped_steps_total was to grow",
    ]  # fmt: skip
    assert all(f" by {amount}:" in line for line in caplog.messages)


def test_series_come_and_go_and_counters_never_fall() -> None:
    metrics = RunMetrics("test")
    value = metrics.registry.get_sample_value
    metrics.replace("reward_mean", {("a",): 1.0, ("b",): 2.0})
    metrics.replace("reward_mean", {("b",): 3.0})
    assert value("flowfleet_reward_mean", {"run": "test", "reward": "a"}) is None
    assert value("flowfleet_reward_mean", {"run": "test", "reward": "b"}) == 3.0
    for total in (5, 7, 6):
        metrics.follow("groups_issued_total", total)
    assert value("flowfleet_groups_issued_total", {"run": "test"}) == 7.0
    for slot in ("rollout.0", "rollout.1"):
        metrics.count("rollout_images_total", 4, slot)
    metrics.keep("rollout_images_total", {("rollout.1",)})
    assert value("flowfleet_rollout_images_total", {"run": "test", "slot": "rollout.0"}) is None
    assert value("flowfleet_rollout_images_total", {"run": "test", "slot": "rollout.1"}) == 4.0


def test_a_histogram_counts_a_value_in_every_bucket_at_or_above_it() -> None:
    metrics = RunMetrics("test")
    for staleness in (0, 1, 1, 5, 99):
        metrics.observe("group_staleness_updates", staleness)
    found = {
        sample.labels["le"]: sample.value
        for family in text_string_to_metric_families(generate_latest(metrics.registry).decode())
        for sample in family.samples if sample.name == "flowfleet_group_staleness_updates_bucket"
    }  # fmt: skip
    assert found == {"0.0": 1, "1.0": 3, "2.0": 3, "3.0": 3, "4.0": 3, "6.0": 4, "8.0": 4, "16.0": 4, "+Inf": 5}
    assert metrics.registry.get_sample_value("flowfleet_group_staleness_updates_sum", {"run": "test"}) == 106.0


def test_label_values_are_escaped_and_read_back_as_they_were() -> None:
    metrics = RunMetrics('a "run"\\n')
    metrics.count("reward_null_scores_total", 2, "r", 'said "no"\nand left')
    samples = [sample for family in text_string_to_metric_families(generate_latest(metrics.registry).decode()) for sample in family.samples]
    assert [(sample.labels, sample.value) for sample in samples] == [
        ({"run": 'a "run"\\n', "reward": "r", "reason": 'said "no"\nand left'}, 2.0)
    ]


def test_the_page_is_the_generated_one() -> None:
    assert PAGE.read_text(encoding="utf-8") == metric_page(), "run python -m deploy.monitoring.metric_page"
    assert all(f"| `{metric.name}` |" in metric_page() for metric in CATALOG)
    assert unit_of(next(metric for metric in CATALOG if metric.name == "flowfleet_phase_seconds_total")) == "seconds"


# ---- the port


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        yield holder.getsockname()[1]


def read(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
        return str(answer.read().decode())


def test_a_port_that_is_taken_is_an_error_with_its_remedy(taken: int) -> None:
    with pytest.raises(
        ConfigError, match=rf"coordinator: /metrics cannot listen on 127\.0\.0\.1:{taken} .*set cluster\.metrics_port"
    ) as caught:
        serve_metrics(RunMetrics("test").registry, taken)
    assert caught.value.exit_code == 2
    with pytest.raises(ConfigError, match=str(caught.value).replace("(", r"\(").replace(")", r"\)")):
        check_port(taken)
    check_port(free_port())


def test_a_host_that_is_not_here_is_an_error_with_its_remedy() -> None:
    with pytest.raises(ConfigError, match=r"cannot listen on 192\.0\.2\.1:.*cluster\.metrics_host"):  # an address for documentation only
        serve_metrics(RunMetrics("test").registry, free_port(), "192.0.2.1")


def test_a_port_is_bound_again_at_once_after_its_server_ended() -> None:
    """Connections of the first server are still in TIME_WAIT then, as after a Coordinator that was killed."""
    port = free_port()
    for run in ("first", "second"):
        metrics = RunMetrics(run)
        metrics.put("update", 3)
        close = serve_metrics(metrics.registry, port)
        try:
            assert f'flowfleet_update{{run="{run}"}} 3.0' in read(port)
        finally:
            close()


def test_metrics_are_off_and_on_loopback_unless_the_config_says_otherwise() -> None:
    cluster = load_config("tiny-demo", []).cluster
    assert (cluster.metrics_port, cluster.metrics_host) == (0, "127.0.0.1")
    cluster = load_config("tiny-demo", ["cluster.metrics_port=9464", 'cluster.metrics_host="0.0.0.0"']).cluster
    assert (cluster.metrics_port, cluster.metrics_host) == (9464, "0.0.0.0")
