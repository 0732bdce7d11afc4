"""Every panel's expression, answered by a real Prometheus that scrapes a real run while it trains: success, and not empty."""

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from deploy.monitoring.build import DASHBOARDS
from deploy.monitoring.pipeline import VERDICTS, verdict
from tests.prometheus_server import BINARIES, ROOT, PrometheusServer, free_port, wait_until
from tests.promql_names import substituted
from tests.run_fixtures import SMALL

pytestmark = pytest.mark.prometheus

RUN = "monitored"
PATIENCE_S = 1200.0  # a machine that does other things, too
LOOKS_BACK_S = 120
NO_UPPER_END = "flowfleet_sensor_high"  # absent for diversity and watch rewards
RECIPE = """
extends = "tiny-geneval-grpo"
[run]
name = "monitored"
[[reward]]
name = "jpeg_compressibility"
[[reward]]
name = "jpeg_incompressibility"
weight = 1e-4
[[reward]]
name = "tests.monitored_reward:picky"
use = "watch"
"""
SETS = (
    *SMALL, "schedule.num_updates=5000", "evaluation.every=2", "learner.objective.kl_beta=0.01",
    'evaluation.rewards=["jpeg_compressibility", "tests.monitored_reward:picky"]',
)  # fmt: skip
boards = {path.stem: json.loads(path.read_text()) for path in sorted(DASHBOARDS.glob("*.json"))}


@dataclass(frozen=True, slots=True, kw_only=True)
class Watched:
    """A run that trains, and the Prometheus that scrapes it."""

    server: PrometheusServer
    run: "subprocess.Popen[bytes]"
    log: Path


@pytest.fixture(scope="module")
def watched(tiny_sd3_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """A run of many updates under a Prometheus; ended by SIGINT at the latest here."""
    folder, port = tmp_path_factory.mktemp("monitored"), free_port()
    (folder / "monitored.toml").write_text(RECIPE)
    (folder / "prometheus").mkdir()
    sets = [item for item in SETS if not item.startswith("reward.")]
    options = chain.from_iterable(("--set", item) for item in (*sets, f'model.path="{tiny_sd3_dir}"', f"cluster.metrics_port={port}"))
    command = [
        sys.executable,
        "-m",
        "deploy.cli",
        "train",
        str(folder / "monitored.toml"),
        "--local",
        "--run-dir",
        str(folder / "run"),
        *options,
    ]
    log = folder / "run.log"
    with log.open("wb") as output, PrometheusServer(folder / "prometheus", port) as server:
        run = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
        try:
            yield Watched(server=server, run=run, log=log)
        finally:
            end(run)


def end(run: "subprocess.Popen[bytes]") -> None:
    """Ask the run to save its state and end; kill it if it does not."""
    if run.poll() is None:
        run.send_signal(signal.SIGINT)
    try:
        run.wait(300)
    except subprocess.TimeoutExpired:
        run.kill()
        run.wait(60)


def variables(server: PrometheusServer, board: Mapping[str, Any]) -> dict[str, list[str]]:
    """The values that Grafana would offer for each variable of a dashboard that asks Prometheus."""
    found: dict[str, list[str]] = {}
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            selector, label = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"]).groups()
            found[variable["name"]] = server.labels(selector.replace("$run", RUN), label)
    return found


def asked(server: PrometheusServer) -> Iterator[tuple[str, str, bool]]:
    """(panel, expression as Grafana sends it, whether instant) of every target; repeated panels once a value."""
    for slug, board in boards.items():
        values = variables(server, board)
        assert values["run"] == [RUN]
        for panel in board["panels"]:
            repeated = panel.get("repeat")
            for value in values[repeated] if repeated else [""]:
                shown = {"$run": RUN, "$__rate_interval": "30s", "$window": "60s", "$__range": f"{LOOKS_BACK_S}s", f"${repeated}": value}
                for target in panel.get("targets", ()):
                    yield f"{slug}: {panel['title']} {value}: {target['expr']}", substituted(target["expr"], shown), target["instant"]


def empty_panels(server: PrometheusServer) -> list[str]:
    """Panels whose expression answers nothing finite; an upper end need only exist for one sensor."""
    empty, num_highs = [], 0
    for panel, expression, is_instant in asked(server):
        found = server.values(expression) if is_instant else server.values_since(expression, LOOKS_BACK_S)
        if expression.startswith(NO_UPPER_END):
            num_highs += bool(found)
        elif not found:
            empty.append(panel)
    return empty if num_highs else [*empty, "no sensor has an upper end"]


def has_begun(watched: Watched) -> bool:
    """Whether the run has done some updates, an evaluation beside the base's, and has bands for its sensors."""
    assert watched.run.poll() is None, watched.log.read_text()[-4000:]
    wanted = (
        f'flowfleet_update{{run="{RUN}"}} >= 5',
        f'flowfleet_evaluation_version{{run="{RUN}"}} >= 1',
        f'flowfleet_sensor_low{{run="{RUN}"}}',
    )
    return all(watched.server.values(expression) for expression in wanted)


def test_every_panel_of_every_dashboard_shows_something_of_a_real_run(watched: Watched) -> None:
    wait_until(lambda: has_begun(watched), "the fifth update and an evaluation", seconds=PATIENCE_S)
    deadline = time.monotonic() + 180
    while (empty := empty_panels(watched.server)) and time.monotonic() < deadline:  # a rate needs some seconds of counters
        assert watched.run.poll() is None, watched.log.read_text()[-4000:]
        time.sleep(5)
    assert not empty, "\n".join(empty)


def test_what_the_panels_show_is_what_the_run_is(watched: Watched) -> None:
    server, of_run = watched.server, f'{{run="{RUN}"}}'
    assert server.values('up{job="flowfleet"}') == [1]
    assert set(server.values_since(f"flowfleet_conservation_error_groups{of_run}", LOOKS_BACK_S)) == {0}
    assert {f"{value:g}" for value in server.values_since(substituted(verdict(), {"$run": RUN}), LOOKS_BACK_S)} <= VERDICTS.keys()
    assert max(server.values(f"flowfleet_update{of_run}")) <= max(server.values(f"flowfleet_policy_version{of_run}"))
    coverage = server.values(f'flowfleet_reward_coverage_ratio{{run="{RUN}",reward="tests.monitored_reward:picky"}}')
    assert coverage and 0 < coverage[0] < 1
    assert server.values(f'flowfleet_reward_coverage_ratio{{run="{RUN}",reward="jpeg_compressibility"}}') == [1]


def test_prometheus_evaluates_the_rules_on_the_real_run_without_an_error(watched: Watched) -> None:
    rules = [rule for group in watched.server.get("rules")["groups"] for rule in group["rules"]]
    assert rules
    wait_until(
        lambda: all(rule["health"] == "ok" for group in watched.server.get("rules")["groups"] for rule in group["rules"]),
        "an evaluation of every rule", seconds=120,
    )  # fmt: skip


def test_a_run_that_has_ended_shows_nothing_rather_than_a_healthy_zero(watched: Watched) -> None:
    end(watched.run)
    assert watched.run.returncode in (0, 130), watched.log.read_text()[-4000:]
    wait_until(lambda: not watched.server.values(f'flowfleet_update{{run="{RUN}"}}'), "the end of the run's series", seconds=120)
    shown = [panel for panel, expression, is_instant in asked(watched.server) if is_instant and watched.server.values(expression)]
    over_time = [panel for panel in shown if "increase" in panel or "rate(" in panel]  # these look back at what they counted
    assert shown == over_time
    assert watched.server.values('up{job="flowfleet"}') == [0]


def test_the_committed_configuration_passes_promtool() -> None:
    command = [str(BINARIES / "promtool"), "check", "config", str(ROOT / "deploy" / "prometheus" / "prometheus.yml")]
    checked = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr
