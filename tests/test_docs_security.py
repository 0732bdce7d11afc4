"""docs/security.md against the code: the tests that it names exist, its ports and bounds are the code's, nobody passes trust_remote_code."""

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from common.policy.config import ModelConfig
from deploy.bundle.bundle import MAX_BYTES
from deploy.bundle.parts import MAX_READ
from deploy.commands.catalog import reward_serve
from deploy.config import ClusterSection
from deploy.doctor.ports import DASHBOARD_PORT, HEAD_PORTS, REPORT_PORT
from deploy.report.serve import DEFAULT_HOST, DEFAULT_PORT
from reward_servers.wire.settings import ServeSettings
from reward_servers.wire.transport import CallerSettings

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")


def test_every_test_that_the_page_names_exists_where_it_says() -> None:
    rows = [line for line in PAGE.splitlines() if "tests/test_" in line]
    assert len(rows) >= 20
    for row in rows:
        for part in row.split(";"):
            files = re.findall(r"tests/test_\w+\.py", part)
            names = [name for name in re.findall(r"(?<![/\w])test_\w+", part) if f"tests/{name}.py" not in files]
            assert files or not names, part
            source = "".join((ROOT / file).read_text(encoding="utf-8") for file in files)
            for name in names:
                assert f"def {name}(" in source, f"{name} in {files}"


def row_of(start: str) -> str:
    (line,) = [line for line in PAGE.splitlines() if line.startswith(f"| {start}")]
    return line


def test_ports_and_addresses_of_the_page_are_the_codes() -> None:
    cluster, serving = ClusterSection(), ServeSettings()
    assert (cluster.metrics_port, cluster.metrics_host) == (0, "127.0.0.1") and "| none; 9464" in row_of("Coordinator, `/metrics`")
    assert (DEFAULT_HOST, DEFAULT_PORT) == ("127.0.0.1", REPORT_PORT) and f"| {DEFAULT_PORT} | {DEFAULT_HOST} |" in row_of(
        "`flowfleet report"
    )
    port = inspect.signature(reward_serve).parameters["port"].default
    assert f"| {port} | {serving.host} |" in row_of("`flowfleet reward serve`")
    assert f"| {DASHBOARD_PORT} |" in row_of("Ray dashboard")
    assert all(f" {number}" in row_of("Ray head") for number in HEAD_PORTS)


def test_bounds_of_the_page_are_the_codes() -> None:
    serving, row = ServeSettings(), row_of("a flood of reward requests")
    for text in (
        f"{serving.max_pending} pending", f"{serving.max_pending_bytes >> 20} MiB of bodies", f"{serving.max_body_bytes >> 20} MiB",
        f"{serving.max_items} images", f"{serving.max_total_pixels >> 20} Mi pixels",
    ):  # fmt: skip
        assert text in row, text
    assert f"{CallerSettings().max_answer_bytes >> 20} MiB an answer" in row_of("a reward server that drips")
    assert f"{MAX_READ >> 20} MiB a file" in row_of("a bundle") and f"{MAX_BYTES // 10**6} MB in all" in row_of("a bundle")


def test_no_code_of_a_checkpoint_is_ever_run() -> None:
    packages = [
        path for name in ("common", "learner", "rollout_workers", "reward_servers", "deploy") for path in (ROOT / name).rglob("*.py")
    ]
    assert len(packages) > 100
    assert [path.name for path in packages if "trust_remote_code" in path.read_text(encoding="utf-8")] == []
    assert "revision" not in ModelConfig.model_fields  # a local directory: the page says that no base model is downloaded


_OWN_CLUSTER = """
import json, os, subprocess, sys
import ray
ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, configure_logging=False, object_store_memory=80_000_000)
address, answers = ray.get_runtime_context().gcs_address, {}
for name, changes in (("same", {}), ("none", {"RAY_AUTH_MODE": "disabled"}), ("wrong", {"RAY_AUTH_TOKEN": "0" * 64})):
    done = subprocess.run([sys.executable, "-c", sys.argv[1], address], env={**os.environ, **changes}, capture_output=True, text=True, timeout=300)
    answers[name] = (done.returncode, done.stdout, done.stderr)
ray.shutdown()
print(json.dumps(answers))
"""
_JOIN = "import ray, sys; ray.init(address=sys.argv[1], log_to_driver=False); print('joined', len(ray.nodes()))"


@pytest.mark.slow
def test_a_cluster_of_ones_own_is_joined_with_its_token_only(tmp_path: Path) -> None:
    """Its ports are open to the network; Ray turns tokens on by itself, and makes one for this home directory."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {"HOME": str(tmp_path)}
    command = [sys.executable, "-c", _OWN_CLUSTER, _JOIN]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=True)
    answers = json.loads(done.stdout.splitlines()[-1])
    assert answers["same"][0] == 0 and "joined 1" in answers["same"][1], answers
    for name in ("none", "wrong"):
        code, output, messages = answers[name]
        assert code != 0 and "joined" not in output and "Unauthenticated" in messages, answers[name]
