"""`flowfleet submit`: what travels, what is refused here, and which exit code comes back."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from common.errors import ConfigError, FlowfleetError, UserError
from common.store.audit import audit
from common.store.manifests import read_status
from common.store.paths import learner_complete_path
from common.store.run_store import RunStore
from deploy.config import PROJECT, load_config
from deploy.local_cluster import free_port
from deploy.submit import Submission, connect_jobs, plan_submission, submit
from tests.run_fixtures import QUIET
from tests.test_deploy_ray import small_sets

TINY = load_config("tiny-geneval", [])
JOB = Submission(entrypoint="python -m deploy.cli train tiny-geneval", working_dir=None, stop_wait_s=60)


@dataclass
class FakeJobs:
    """A job server of one job that prints and ends."""

    states: list[tuple[str, int | None]]
    lines: tuple[str, ...] = ("update 1/2\n", "update 2/2\n")
    interrupt: bool = False
    asked: dict[str, Any] = field(default_factory=dict)
    stopped: list[str] = field(default_factory=list)

    def submit_job(self, *, entrypoint: str, submission_id: str | None, runtime_env: dict[str, Any]) -> str:
        self.asked = {"entrypoint": entrypoint, "submission_id": submission_id, "runtime_env": runtime_env}
        return submission_id or "job-1"

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        for line in self.lines:
            yield line
        if self.interrupt:
            raise KeyboardInterrupt

    def get_job_info(self, job_id: str) -> Any:
        status, code = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        return SimpleNamespace(status=status, driver_exit_code=code, message="no such image")

    def stop_job(self, job_id: str) -> bool:
        self.stopped.append(job_id)
        return True


def test_the_entrypoint_is_the_same_train_command_with_every_argument_quoted() -> None:
    plan = plan_submission(
        "tiny-geneval", TINY, run_dir="s3://bucket/runs/a b", sets=("rollout.num_workers=4",), flags=("--allow-change", "learner")
    )
    assert plan.entrypoint == (
        "python -m deploy.cli train tiny-geneval --run-dir 's3://bucket/runs/a b' --address auto --allow-change learner "
        "--set rollout.num_workers=4"
    )


def test_the_environment_that_travels_holds_the_checkout_and_a_stop_deadline_and_nothing_of_the_submitter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("deploy.submit.commit", lambda: "0123abcd+changes")
    planted = secrets.token_hex(16)
    os.environ["HF_TOKEN"] = planted
    try:
        plan = plan_submission("tiny-geneval", TINY, run_dir="/shared/run")
        environment = plan.runtime_env
    finally:
        del os.environ["HF_TOKEN"]
    assert planted not in repr(environment) + plan.entrypoint
    assert environment["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "660", "FLOWFLEET_COMMIT": "0123abcd+changes"}
    assert environment["working_dir"] == str(PROJECT)
    assert {".git", ".venv", "runs"} <= set(environment["excludes"])


@pytest.mark.parametrize(("upload", "found"), [(True, "unknown"), (False, "0123abcd")])
def test_no_commit_travels_that_is_not_known_to_be_the_jobs(upload: bool, found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an upload the image's own word stands: what runs there is its checkout, not the submitter's."""
    monkeypatch.setattr("deploy.submit.commit", lambda: found)
    plan = plan_submission("tiny-geneval", TINY, run_dir="/shared/run", upload=upload)
    assert "FLOWFLEET_COMMIT" not in plan.runtime_env["env_vars"]


@pytest.mark.parametrize(("drain_s", "wait_s"), [("600", 660), ("1800", 1860), ("0.5", 61)])
def test_a_stopped_job_is_given_the_runs_own_drain_and_a_minute(drain_s: str, wait_s: int) -> None:
    """Ray kills the driver after whole seconds; a drain that was cut short would lose the update in hand."""
    config = load_config("tiny-geneval", [f"cluster.drain_timeout_s={drain_s}"])
    plan = plan_submission("tiny-geneval", config, run_dir="/shared/run")
    assert plan.runtime_env["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"] == str(wait_s)


def test_the_module_that_the_entrypoint_names_is_the_command_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "deploy.cli", "recipes", "ls"], cwd=PROJECT, capture_output=True, text=True, timeout=120, check=True
    )
    assert "tiny-geneval" in done.stdout


@pytest.mark.parametrize("run_dir", [None, "runs/mine"])
def test_a_run_directory_inside_the_jobs_own_folder_is_refused(run_dir: str | None) -> None:
    with pytest.raises(ConfigError, match="absolute path on a mount"):
        plan_submission("tiny-geneval", TINY, run_dir=run_dir)


def test_a_recipe_file_outside_the_checkout_is_refused(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text((PROJECT / "deploy" / "recipes" / "tiny-geneval.toml").read_text())
    with pytest.raises(ConfigError, match="outside the checkout"):
        plan_submission(str(recipe), TINY, run_dir="/shared/run")


@pytest.mark.parametrize("key", ["reward.0.options.api_key", "judge.token", "store.PASSWORD"])
def test_a_secret_on_the_command_line_is_refused_without_repeating_it(key: str) -> None:
    with pytest.raises(ConfigError, match="looks like a secret") as caught:
        plan_submission("tiny-geneval", TINY, run_dir="/shared/run", sets=(f"{key}=hunter2",))
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "driver", "expected"),
    [("SUCCEEDED", 0, 0), ("FAILED", 3, 3), ("FAILED", 2, 2), ("FAILED", None, 1), ("STOPPED", None, 130)],
)
def test_the_exit_code_is_the_train_commands(status: str, driver: int | None, expected: int) -> None:
    assert submit(FakeJobs(states=[("RUNNING", None), (status, driver)]), JOB, QUIET) == expected


def test_an_interrupt_stops_the_job_waits_for_its_end_and_gives_130() -> None:
    jobs = FakeJobs(states=[("RUNNING", None), ("STOPPED", None)], interrupt=True)
    assert submit(jobs, JOB, QUIET) == 130
    assert jobs.stopped == ["job-1"]
    assert jobs.states == [("STOPPED", None)]


def test_the_readmes_line_of_ray_job_submit_gives_the_same_deadline() -> None:
    deadline = plan_submission("tiny-geneval", TINY, run_dir="/shared/run").runtime_env["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]
    assert f'"RAY_JOB_STOP_WAIT_TIME_S": "{deadline}"' in (PROJECT / "README.md").read_text(encoding="utf-8")


def test_after_an_interrupt_the_submitter_waits_as_long_as_the_job_may_take(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("deploy.submit.time", SimpleNamespace(monotonic=lambda: now[0], sleep=lambda s: now.__setitem__(0, now[0] + s)))
    patient = Submission(entrypoint=JOB.entrypoint, working_dir=None, stop_wait_s=1860)
    with pytest.raises(FlowfleetError, match="still RUNNING 1890 s"):  # 30 s more until Ray says so
        submit(FakeJobs(states=[("RUNNING", None)], interrupt=True), patient, QUIET)


def test_a_job_that_never_reaches_an_end_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.submit.END_TIMEOUT_S", 0.0)
    with pytest.raises(FlowfleetError, match="job-1 is still RUNNING"):
        submit(FakeJobs(states=[("RUNNING", None)]), JOB, QUIET)


def test_a_head_without_an_agent_is_asked_again_and_a_refusal_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [RuntimeError("status code 500: No available agent to submit job"), "job-1", RuntimeError("job-1 exists already")]

    def answer(**_: Any) -> str:
        found = answers.pop(0)
        if isinstance(found, RuntimeError):
            raise found
        return found

    jobs = FakeJobs(states=[("SUCCEEDED", 0)])
    monkeypatch.setattr(jobs, "submit_job", answer)
    monkeypatch.setattr("deploy.submit.POLL_S", 0.0)
    assert submit(jobs, JOB, QUIET) == 0
    with pytest.raises(UserError, match="job-1 exists already"):
        submit(jobs, JOB, QUIET)


def test_without_waiting_nothing_is_asked_of_the_job() -> None:
    jobs = FakeJobs(states=[("FAILED", 1)])
    assert submit(jobs, JOB, QUIET, wait=False) == 0
    assert jobs.asked["entrypoint"] == JOB.entrypoint


def test_a_job_server_that_does_not_answer_is_the_users_mistake() -> None:
    with pytest.raises(UserError, match="no job server answered"):
        connect_jobs(f"http://127.0.0.1:{free_port()}")


@pytest.fixture(scope="module")
def guarded_head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict[str, str]]]:
    """A one-node cluster with token authentication: the dashboard's address and the environment that holds the token."""
    folder = tmp_path_factory.mktemp("head")
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # the job's `python` is the cluster's
    environment = os.environ | {"PATH": path, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}
    environment["SESSIONS"] = sessions = tempfile.mkdtemp(prefix="ff")  # a socket's path is short
    dashboard = free_port()
    command = [
        str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={free_port()}",
        "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", "--num-cpus=6", f"--temp-dir={sessions}",
    ]  # fmt: skip
    head = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for_port(dashboard, head, 120.0)
        yield f"http://127.0.0.1:{dashboard}", environment
    finally:
        head.send_signal(signal.SIGTERM)
        head.wait(timeout=60)
        shutil.rmtree(sessions, ignore_errors=True)


def wait_for_port(port: int, head: "subprocess.Popen[bytes]", timeout_s: float) -> None:
    """Wait until somebody listens."""
    deadline = time.monotonic() + timeout_s
    while True:
        assert head.poll() is None, f"the head ended with {head.returncode}"
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert time.monotonic() < deadline, "the dashboard did not answer"
        time.sleep(0.5)


def submit_command(address: str, environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """`flowfleet submit` as a user runs it."""
    command = [sys.executable, "-c", "from deploy.cli import main; main()", "submit", "--address", address, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)


@pytest.mark.slow
def test_a_submitted_run_streams_its_log_ends_with_its_code_and_leaks_no_token(
    guarded_head: tuple[str, dict[str, str]], tiny_sd3_dir: Path, tmp_path: Path
) -> None:
    address, environment = guarded_head
    planted = secrets.token_hex(16)
    environment = environment | {"WANDB_API_KEY": planted}
    run_dir = tmp_path / "run"
    done = submit_command(address, environment, "tiny-geneval", "--run-dir", str(run_dir), *small_sets(tiny_sd3_dir))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "report:" in done.stdout
    sessions = [path for path in Path(environment["SESSIONS"]).rglob("*") if path.is_file()]  # Ray's own logs
    files = [*sessions, *(path for path in run_dir.rglob("*") if path.is_file())]
    assert len(files) > 40
    assert any("job-driver" in path.name for path in sessions)
    token = Path(environment["RAY_AUTH_TOKEN_PATH"]).read_text()
    for secret in (planted, token):
        assert secret not in done.stdout + done.stderr
        assert [str(path) for path in files if secret.encode() in path.read_bytes()] == []
    again = submit_command(
        address, environment, "tiny-geneval", "--run-dir", str(run_dir), *small_sets(tiny_sd3_dir, "learner.ema_decay=0.5")
    )
    assert again.returncode == 2, again.stdout + again.stderr  # the refused resume's own code
    assert "learner.ema_decay" in again.stdout


LONG = ("schedule.num_updates=5000", "evaluation.every=0", "evaluation.at_start=false", "learner.state_interval=1")


def wait_for_update(run_dir: Path, update: int) -> None:
    """Until the run has published it."""
    store, deadline = RunStore(str(run_dir)), time.monotonic() + 240.0
    while (status := read_status(store)) is None or status.version < update:
        assert time.monotonic() < deadline, f"update {update} did not come"
        time.sleep(0.2)


def check_saved(run_dir: Path) -> None:
    """The run says that it stopped, the newest version has its LearnerState, and the files are sound."""
    store = RunStore(str(run_dir))
    status = read_status(store)
    assert status is not None and (status.state, "the same command goes on" in status.reason) == ("stopped", True)
    assert store.exists(learner_complete_path(status.version))
    assert audit(store).violations == ()


@pytest.mark.slow
def test_ctrl_c_ends_a_submitted_run_in_a_saved_state(guarded_head: tuple[str, dict[str, str]], tiny_sd3_dir: Path, tmp_path: Path) -> None:
    address, environment = guarded_head
    run_dir = tmp_path / "run"
    command = [sys.executable, "-c", "from deploy.cli import main; main()", "submit", "--address", address, "tiny-geneval"]
    command += ["--run-dir", str(run_dir), *small_sets(tiny_sd3_dir, *LONG)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as submitter:
        wait_for_update(run_dir, 2)
        submitter.send_signal(signal.SIGINT)
        output, _ = submitter.communicate(timeout=180)
    assert submitter.returncode == 130, output
    assert "its state is being saved" in output
    check_saved(run_dir)


@pytest.mark.slow
def test_ray_job_stop_ends_a_submitted_run_in_a_saved_state(
    guarded_head: tuple[str, dict[str, str]], tiny_sd3_dir: Path, tmp_path: Path
) -> None:
    address, environment = guarded_head
    run_dir = tmp_path / "run"
    job = ["--job-id", "stopped-by-hand", "--no-wait"]
    done = submit_command(address, environment, "tiny-geneval", *job, "--run-dir", str(run_dir), *small_sets(tiny_sd3_dir, *LONG))
    assert done.returncode == 0, done.stdout + done.stderr
    wait_for_update(run_dir, 2)
    ray = str(Path(sys.executable).parent / "ray")
    stop = [ray, "job", "stop", "--address", address, "stopped-by-hand"]
    stopped = subprocess.run(stop, env=environment, capture_output=True, text=True, timeout=180, check=False)
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    check_saved(run_dir)


@pytest.mark.slow
def test_a_wrong_token_is_refused_with_the_remedy(guarded_head: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    address, environment = guarded_head
    wrong = tmp_path / "wrong"
    wrong.write_text(secrets.token_hex(32))
    wrong.chmod(0o600)
    done = submit_command(address, environment | {"RAY_AUTH_TOKEN_PATH": str(wrong)}, "tiny-geneval", "--run-dir", str(tmp_path / "run"))
    assert done.returncode == 2, done.stdout + done.stderr
    assert "RAY_AUTH_TOKEN_PATH" in done.stderr
