"""The dashboards' arithmetic in PromQL, by promtool's unit tests: the verdict, sensors outside their bands, and zeros."""

import subprocess
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.live import waiting_sentence
from deploy.monitoring import expressions
from deploy.monitoring.images import outside
from deploy.monitoring.pipeline import VERDICTS, verdict
from tests.prometheus_server import BINARIES
from tests.promql_names import substituted

pytestmark = pytest.mark.prometheus

RUN = {"$run": "r", "$window": "1m"}
ALIVE = {'flowfleet_updates_planned{run="r"}': "9x10"}
Samples = list[dict[str, Any]]


def case(expression: str, series: Mapping[str, str], samples: Samples) -> dict[str, Any]:
    """One unit test: these series, asked after two minutes."""
    asked = {"expr": substituted(expression, RUN), "eval_time": "2m", "exp_samples": samples}
    return {
        "interval": "15s",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [asked],
    }


def passes(folder: Path, *cases: dict[str, Any]) -> str:
    """What promtool says against the cases; "" when all hold."""
    path = folder / "cases.yml"
    path.write_text(yaml.safe_dump({"tests": list(cases)}))
    tested = subprocess.run(
        [str(BINARIES / "promtool"), "test", "rules", str(path)], capture_output=True, text=True, timeout=300, check=False
    )
    return "" if tested.returncode == 0 else tested.stdout + tested.stderr


def verdict_of(shares: Mapping[str, float]) -> str:
    """The number whose words the live line would say."""
    sentence = waiting_sentence(shares)
    if sentence.startswith("learner waits"):
        return "2" if "for scores" in sentence else "1"
    return "3" if sentence.startswith("rollout waits") else "0"


def verdicts() -> Iterator[tuple[dict[str, float], str]]:
    """Shares of roles on both sides of every line, some roles silent."""
    for learner, rollout, reward in product((0.0, 0.2, 0.25, 0.9), (0.0, 0.25, 0.5), (None, 0.0, 0.3, 0.5, 0.95)):
        shares = {"learner": learner, "rollout": rollout} | ({} if reward is None else {"reward": reward})
        yield shares, verdict_of(shares)


def test_the_verdict_in_promql_says_what_the_live_line_says(tmp_path: Path) -> None:
    assert {number for _, number in verdicts()} == VERDICTS.keys()
    cases = []
    for shares, number in verdicts():
        series = {f'flowfleet_idle_ratio{{run="r",role="{role}"}}': f"{share}x10" for role, share in shares.items()}
        cases.append(case(verdict(), ALIVE | series, [{"labels": "{}", "value": int(number)}]))
    assert passes(tmp_path, *cases) == ""


def test_a_run_that_is_not_scraped_has_no_verdict_and_another_runs_waits_do_not_count(tmp_path: Path) -> None:
    other = {'flowfleet_updates_planned{run="s"}': "9x10", 'flowfleet_idle_ratio{run="s",role="learner"}': "0.9x10"}
    assert passes(tmp_path, case(verdict(), other, []), case(verdict(), ALIVE | other, [{"labels": "{}", "value": 0}])) == ""


def test_a_sensor_is_outside_below_its_band_or_above_an_upper_end_that_it_has(tmp_path: Path) -> None:
    positions = {"a": -1.5, "b": 0.5, "c": 2.0, "d": 2.0}  # d has no upper end
    series = {f'flowfleet_sensor_position{{run="r",sensor="{name}"}}': f"{value}x10" for name, value in positions.items()}
    series |= {f'flowfleet_sensor_high{{run="r",sensor="{name}"}}': "1x10" for name in "abc"}
    assert passes(tmp_path, case(f"count({outside()})", series, [{"labels": "{}", "value": 2}])) == ""


def test_what_was_never_counted_is_zero_and_what_was_counted_stands_alone(tmp_path: Path) -> None:
    drops = expressions.rises("groups_dropped", "reason")
    counted = {'flowfleet_groups_dropped_total{run="r",reason="stale"}': "0+1x10"}  # one every 15 s
    assert passes(
        tmp_path,
        case(drops, ALIVE, [{"labels": '{reason="none"}', "value": 0}]),
        case(drops, ALIVE | counted, [{"labels": '{reason="stale"}', "value": 4}]),
        case(drops, {}, []),
    ) == ""  # fmt: skip


def test_a_case_that_does_not_hold_is_told(tmp_path: Path) -> None:
    assert "expr" in passes(tmp_path, case(verdict(), ALIVE, [{"labels": "{}", "value": 3}]))
