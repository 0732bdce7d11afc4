"""The control-plane benchmark's figures and verdict, by hand; the benchmark itself is `make bench-control`."""

from typing import Any

import pytest

from deploy.bench_control import ControlMeasurement, ControlSize, control_config, describe_calls, make_report, render_control, verdict

FULL = ControlSize()


def report_of(p95_s: float, growth_mib: float, size: ControlSize = FULL) -> dict[str, Any]:
    """1,000 updates in 500 s; 100 calls of which the last ten took `p95_s`."""
    calls = {"ask_rollout": [0.002] * 90 + [p95_s] * 10}
    memory = {100: 200.0, size.num_updates: 200.0 + growth_mib}
    measurement = ControlMeasurement(calls=calls, memory_mib=memory, seconds=500.0, num_updates=size.num_updates - 1)
    return make_report(measurement, size, "python -m deploy.bench_control", 0.1)


def test_calls_are_described_in_milliseconds_by_method_and_together() -> None:
    """Percentiles of 0.001 ... 0.005 and 0.010 s, linear between ranks: p50 of the five is 3 ms, p95 of the five 4.8 ms."""
    found = describe_calls({"beat": [0.001, 0.002, 0.003, 0.004, 0.005], "ask_rollout": [0.010]})
    assert list(found) == ["all", "beat", "ask_rollout"]
    assert found["beat"] == pytest.approx({"count": 5, "p50_ms": 3.0, "p95_ms": 4.8, "max_ms": 5.0})
    assert found["all"]["count"] == 6 and found["all"]["max_ms"] == pytest.approx(10.0)


@pytest.mark.parametrize(
    ("p95_s", "growth_mib", "words"),
    [(0.009, 1.0, ["9.00 ms (within", "+1.0 MiB (flat"]), (0.011, 40.0, ["11.00 ms (NOT within", "+40.0 MiB (NOT flat"])],
)
def test_the_verdict_follows_the_limits(p95_s: float, growth_mib: float, words: list[str]) -> None:
    text = render_control(report_of(p95_s, growth_mib))
    assert all(word in text for word in words)
    assert "119.9 updates a minute" in text  # 999 updates in 500 s


def test_a_short_run_claims_nothing() -> None:
    (sentence,) = verdict(report_of(0.001, 0.0, ControlSize(num_updates=200)))
    assert "proves nothing about 1000" in sentence


def test_the_benchmark_has_64_workers_1000_updates_and_one_reward() -> None:
    config = control_config(FULL)
    assert (config.rollout.num_workers, config.schedule.num_updates, len(config.reward)) == (64, 1000, 1)
