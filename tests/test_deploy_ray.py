"""The same run on Ray: four roles in processes of their own give the files that one process gives."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from common.store.audit import audit
from common.store.run_store import RunStore
from deploy.config import load_config
from deploy.ray_actors import connect
from deploy.session import run_session
from tests.run_fixtures import QUIET, SMALL, history_digests, local_options, manifest_facts, published_digests, small_config

SYNC = "schedule.max_staleness=0"
TIMEOUT_S = 240


def run_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`flowfleet` in a process of its own, as a user runs it."""
    command = [sys.executable, "-c", "from deploy.cli import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


def small_sets(model: Path, *sets: str) -> list[str]:
    """--set arguments of the small configuration."""
    return [part for item in (*SMALL, f'model.path="{model}"', *sets) for part in ("--set", item)]


def test_ray_with_two_workers_and_one_process_write_the_same_run(tiny_sd3_dir: Path, tmp_path: Path) -> None:
    """At max_staleness 0 with equal micro-batch and threads: neither the driver nor the number of workers changes a bit."""
    run_session(small_config(tiny_sd3_dir, "tiny-geneval", SYNC), local_options(tmp_path / "local"), QUIET)
    done = run_command(
        "train", "tiny-geneval", "--run-dir", str(tmp_path / "ray"), *small_sets(tiny_sd3_dir, SYNC, "rollout.num_workers=2")
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "report:" in done.stdout
    assert manifest_facts(tmp_path / "ray") == manifest_facts(tmp_path / "local")
    assert published_digests(tmp_path / "ray") == published_digests(tmp_path / "local")
    assert history_digests(tmp_path / "ray") == history_digests(tmp_path / "local")
    assert audit(RunStore(str(tmp_path / "ray"))).violations == ()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["train", "tiny-geneval", "--set", "learner.learnig_rate=1"], 2, "the nearest key is 'learning_rate'"),
        (["train", "tiny-geneval", "--set", "model.path=/nowhere"], 2, "/nowhere/model_index.json cannot be read"),
        (["train", "tiny-geneval", "--set", "reward.0.name=ocr", "--set", "evaluation.rewards=[]"], 2, "reward 'ocr' is unknown"),
        (["train", "tiny-geneval", "--set", "store.max_bytes=1000000"], 3, "gate disk"),
        (["train", "tiny-ocr", "--set", "prompts.train=PROMPTS"], 2, "line 2"),
        (["train", "tiny-geneval", "--set", "prompts.train=PROMPTS"], 2, "line 1"),
        (["audit", "/nowhere"], 2, "holds no run"),
        (["eval", "/nowhere"], 2, "--recipe"),
        (["train"], 2, "recipe"),
        (["nonsense"], 2, "nonsense"),
        (["--help"], 0, "train"),
        (["train", "tiny-geneval", "--dry-run"], 0, "192 images an update"),
    ],
)  # fmt: skip
def test_a_mistake_gets_one_message_and_its_exit_code(arguments: list[str], code: int, words: str, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text('a sign that says "CAFE"\na sign without quotes\n')
    run_dir = ["--run-dir", str(tmp_path / "run")] if arguments[0] == "train" else []
    done = run_command(*[argument.replace("PROMPTS", str(prompts)) for argument in arguments], *run_dir)
    assert done.returncode == code, done.stdout + done.stderr
    assert words in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_of_its_own_starts_its_own_cluster_though_another_one_runs_here(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, object]] = []
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("deploy.ray_actors.ray.is_initialized", lambda: False)
    monkeypatch.setattr("deploy.ray_actors.ray.init", lambda **options: asked.append(options))
    parts = SimpleNamespace(config=load_config("tiny-geneval", []))
    assert connect(parts, None)  # type: ignore[arg-type]
    assert asked[0]["address"] == "local"  # without it Ray joins any cluster that `ray start` left a note of
    assert not connect(parts, "10.0.0.1:6379")  # type: ignore[arg-type]
    assert asked[1]["address"] == "10.0.0.1:6379"
