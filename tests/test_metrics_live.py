"""/metrics of whole runs: --local in this process, promtool's word on it, and a Coordinator that Ray starts again."""

import re
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from common.metric_catalog import CATALOG
from common.store.claim import claim_run
from common.store.ending import EndKind
from common.store.manifests import read_status
from common.store.run_store import RunStore
from deploy.compose import compose
from deploy.config import load_config
from deploy.fakes import parse_fakes
from deploy.gates import check_fake_config
from deploy.local_cluster import free_port
from deploy.local_run import run_local
from tests.fleet_runs import FakeRun, kill, wait_until

PROMTOOL = Path(__file__).parent.parent / "build" / "prometheus" / "usr" / "bin" / "promtool"


def scrape(port: int) -> str:
    """The page, "" while nobody answers."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
            return str(answer.read().decode())
    except (urllib.error.URLError, ConnectionError):
        return ""


def value(page: str, name: str, **labels: str) -> float | None:
    """The value of the one series of flowfleet_NAME that has these labels, None without it."""
    found = [
        sample.value
        for family in text_string_to_metric_families(page) for sample in family.samples
        if sample.name == f"flowfleet_{name}" and labels.items() <= sample.labels.items()
    ]  # fmt: skip
    assert len(found) <= 1, (name, labels)
    return found[0] if found else None


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """What a --local run of fake engines with evaluations showed before the last of four updates, and when it was through."""
    port, url = free_port(), str(tmp_path_factory.mktemp("local") / "run")
    config = load_config("tiny-geneval-grpo", [
        "rollout.group_size=2", "rollout.num_steps=4", "rollout.window.size=1", "learner.groups_per_update=4", "learner.optimizer_steps=1",
        "schedule.num_updates=4", "evaluation.every=2", "evaluation.max_prompts=4", f"cluster.metrics_port={port}",
    ])  # fmt: skip
    store = RunStore(url)
    for _ in claim_run(store, config.model_dump(mode="json"), config_digest="c0"):
        raise AssertionError("nobody else runs this run")
    parts = compose(config, check_fake_config(config), url, 1, parse_fakes("rollout=0.01s,learner=0.01s,reward=0.01s"))
    found: dict[str, str] = {}

    def show(summary: Mapping[str, Any]) -> None:
        if 1 <= summary["update"] < 4:
            found["working"] = scrape(port)
        if summary["outcome"] == "done":
            found["done"] = scrape(port)

    outcome = run_local(parts, show)
    assert outcome.kind is EndKind.DONE
    assert scrape(port) == ""  # the port is free again
    status = read_status(store)
    assert status is not None and status.state == "done"
    return found["working"], found["done"]


def test_a_local_run_serves_its_learning_its_slots_and_its_evaluation(pages: tuple[str, str]) -> None:
    working, page = pages
    assert value(page, "run_info", objective="grpo", incarnation="1", version="0.1.0") == 1.0
    assert (value(page, "update"), value(page, "updates_planned"), value(page, "policy_version")) == (4.0, 4.0, 4.0)
    assert (value(page, "optimizer_steps_total"), value(page, "images_consumed_total")) == (4.0, 32.0)
    assert (value(page, "groups_consumed_total"), value(page, "conservation_error_groups")) == (16.0, 0.0)
    assert value(page, "group_staleness_updates_count") == 16.0
    for slot in ("rollout.0", "learner", "reward.geneval_dense.0"):
        assert value(working, "slot_silent_seconds", slot=slot) is not None
    assert value(working, "slots", role="reward", state="running") == 2.0
    assert value(page, "rollout_images_total", slot="rollout.0") == 32.0 + 3 * 4  # training, and evaluations of versions 0, 2 and 4
    assert value(page, "evaluation_version", snapshot="ema") == 4.0
    assert value(page, "evaluation_score", reward="geneval_strict", task="all") is not None
    assert value(page, "reward_calls_total", reward="geneval_dense") == 16.0  # a group a call
    assert value(page, "reward_images_total", reward="geneval_dense") == 32.0
    sampled = value(page, "phase_seconds_total", role="rollout", phase="sampling")
    assert sampled is not None and sampled >= 0.01 * 16  # at least what the fakes slept


def test_a_run_shows_most_of_the_catalog(pages: tuple[str, str]) -> None:
    """What cannot be there: trouble that did not come, ratios and divergences of a real objective."""
    shown = {sample.name for page in pages for family in text_string_to_metric_families(page) for sample in family.samples}
    missing = {metric.name for metric in CATALOG if not any(name.startswith(metric.name) for name in shown)}
    assert missing <= {
        "flowfleet_policy_ratio_mean", "flowfleet_policy_ratio_min", "flowfleet_policy_ratio_max", "flowfleet_clipped_ratio", "flowfleet_kl",
        "flowfleet_reward_null_scores_total",
    }, missing  # fmt: skip


@pytest.mark.prometheus
def test_promtool_finds_nothing_to_say(pages: tuple[str, str]) -> None:
    for page in pages:
        done = subprocess.run([PROMTOOL, "check", "metrics"], input=page, capture_output=True, text=True, timeout=120, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    spoiled = pages[0].replace("flowfleet_groups_issued_total", "flowfleet_groups_issued")  # a counter without _total
    done = subprocess.run([PROMTOOL, "check", "metrics"], input=spoiled, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 3 and "_total" in done.stdout + done.stderr


@pytest.mark.slow  # a Ray session of its own
def test_a_coordinator_that_ray_started_again_serves_on_the_same_port(tmp_path: Path) -> None:
    port = free_port()
    run = FakeRun(tmp_path / "run", f"cluster.metrics_port={port}")
    try:
        run.wait_for_updates(4)
        before = wait_until(lambda: run.check() and value(scrape(port), "update"), "the page")
        assert value(scrape(port), "slots", role="rollout", state="running") == 1.0
        coordinator = run.status()["process_id"]
        kill(coordinator)
        wait_until(lambda: run.check() and run.status()["process_id"] != coordinator, "another coordinator")
        after = wait_until(lambda: run.check() and value(scrape(port), "update"), "the page again")
        assert after >= before
        run.wait_for_updates(3)
        assert (value(scrape(port), "optimizer_steps_total") or 0) >= 2.0
        for role in ("rollout", "reward"):  # from heartbeats, whose first after the restart is where counting begins
            wait_until(lambda role=role: value(scrape(port), "phase_seconds_total", role=role, phase="waiting"), f"waits of {role}")
        wait_until(lambda: value(scrape(port), "reward_calls_total", reward="jpeg_compressibility"), "calls of the reward")
    finally:
        run.end()


@pytest.mark.slow  # a Ray session of its own
def test_a_port_that_is_taken_ends_the_command_with_a_sentence(tmp_path: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        run = FakeRun(tmp_path / "run", f"cluster.metrics_port={port}")
        try:
            assert run.wait_for_end() == 2
        finally:
            run.end()
    told = re.sub(r"\s+", " ", run.log.read_text())
    assert f"/metrics cannot listen on 127.0.0.1:{port}" in told
    assert "Traceback" not in told
