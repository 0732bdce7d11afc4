"""`flowfleet submit`: the `ray job submit` of a train command. The config is checked here, before anything travels."""

import asyncio
import contextlib
import math
import shlex
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from common.errors import ConfigError, FlowfleetError, UserError
from deploy.config import PROJECT, RECIPES, RunConfig
from deploy.environment import commit
from deploy.redact import is_secret_name

EXCLUDES = (
    ".git",
    ".venv",
    "runs",
    "build",
    "docs",
    "tests",
    "**/__pycache__",
    ".mypy_cache",
    ".ruff_cache",
    ".pytest_cache",
    ".hypothesis",
)
STOP_MARGIN_S = 60.0  # from the end of a drain to the end of the driver
AGENT_TIMEOUT_S = 60.0
END_TIMEOUT_S = 30.0  # from the last log line to a final state
POLL_S = 0.5
EXIT_FAILED, EXIT_INTERRUPTED = 1, 130
UNKNOWN = "unknown"  # what deploy.environment.commit says where there is neither a checkout nor a word of the image


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """A train command that travels."""

    entrypoint: str
    working_dir: str | None  # uploaded and made the job's working directory; None: the cluster's own installation
    stop_wait_s: int  # from a stop request to SIGKILL; Ray's own 3 s would cut a save short
    commit: str | None = None  # of the uploaded checkout, whose files lie in no repository there; None: not known, or nothing is uploaded
    job_id: str | None = None

    @property
    def runtime_env(self) -> dict[str, Any]:
        """What Ray ships with the job: the checkout, its commit, a stop deadline. The submitter's environment never is a part of it."""
        variables = {"RAY_JOB_STOP_WAIT_TIME_S": str(self.stop_wait_s)} | ({"FLOWFLEET_COMMIT": self.commit} if self.commit else {})
        environment: dict[str, Any] = {"env_vars": variables}
        return environment if self.working_dir is None else environment | {"working_dir": self.working_dir, "excludes": list(EXCLUDES)}


class JobClient(Protocol):
    """What is used of ray.job_submission.JobSubmissionClient."""

    def submit_job(self, *, entrypoint: str, submission_id: str | None, runtime_env: dict[str, Any]) -> str:
        """Start a job; return its id."""
        ...

    def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        """Its log as it grows, to the job's end."""
        ...

    def get_job_info(self, job_id: str) -> Any:
        """status, message and driver_exit_code."""
        ...

    def stop_job(self, job_id: str) -> bool:
        """Ask it to stop: SIGTERM, then SIGKILL after the deadline."""
        ...


def plan_submission(
    recipe: str, config: RunConfig, *, run_dir: str | None, sets: tuple[str, ...] = (), flags: tuple[str, ...] = (),
    upload: bool = True, job_id: str | None = None,
) -> Submission:  # fmt: skip
    """Turn a train command into a job.

    Args:
        recipe: a recipe's name, or a TOML file inside the project.
        config: what the recipe and the sets resolve to, so a mistake has been refused already.
        run_dir: an absolute path that all nodes share, or a URL.
        flags: further arguments of `flowfleet train`.
        upload: ship this checkout; False runs the installation of the cluster's image.

    Raises:
        ConfigError: a run directory or a file that the cluster cannot see; a secret among the sets.
    """
    for key in (item.partition("=")[0].strip() for item in sets):
        if is_secret_name(key):
            raise ConfigError(
                f"submit: --set {key}=... looks like a secret; a job's command line and a run's files can be read by others; set it in the "
                "environment of the cluster's nodes"
            )
    if run_dir is None or not ("://" in run_dir or Path(run_dir).is_absolute()):
        raise ConfigError(
            f"submit: --run-dir {run_dir or '(none)'} would lie in the job's own folder, which Ray deletes; give an absolute path on a mount "
            f"that all nodes share, or a URL: --run-dir s3://bucket/runs/{config.run.name}"
        )
    arguments = ["train", _travelling_recipe(recipe, upload), "--run-dir", run_dir, "--address", "auto", *flags]
    arguments += [part for item in sets for part in ("--set", item)]
    return Submission(
        entrypoint=shlex.join(["python", "-m", "deploy.cli", *arguments]),
        working_dir=str(PROJECT) if upload else None,
        stop_wait_s=math.ceil(config.cluster.drain_timeout_s + STOP_MARGIN_S),
        commit=_known_commit() if upload else None,
        job_id=job_id,
    )


def _known_commit() -> str | None:
    """The checkout's commit; None when nobody knows it."""
    found = commit()
    return None if found == UNKNOWN else found


def _travelling_recipe(recipe: str, upload: bool) -> str:
    """The recipe as the job will name it."""
    if (RECIPES / f"{recipe}.toml").exists():
        return recipe
    path = Path(recipe).resolve()
    if upload and path.is_relative_to(PROJECT):
        return path.relative_to(PROJECT).as_posix()
    raise ConfigError(
        f"submit: {recipe} does not travel with the job: {'it lies outside the checkout' if upload else 'nothing is uploaded'}; "
        "put the file into the checkout and upload it, or name a shipped recipe with --set"
    )


def connect_jobs(address: str) -> JobClient:
    """Return a client of the job server.

    Raises:
        UserError: nobody answers there, or the token is wrong.
    """
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    try:
        client: JobClient = JobSubmissionClient(address)
    except AuthenticationError as error:
        raise UserError(
            f"submit: {address} asks for a token and none or a wrong one came; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to the file "
            "with the cluster's token (chmod 600)"
        ) from error
    except (ConnectionError, RuntimeError) as error:
        raise UserError(
            f"submit: no job server answered at {address} ({type(error).__name__}: {error}); give the dashboard's address, as "
            "http://head:8265, and check the token if the cluster asks for one (RAY_AUTH_MODE=token, RAY_AUTH_TOKEN_PATH)"
        ) from error
    return client


def submit(client: JobClient, submission: Submission, console: Console, *, wait: bool = True) -> int:
    """Submit, stream the log, and return the exit code of the train command.

    Ctrl-C stops the job and waits until its state is saved; a second one leaves it to itself.
    """
    job = _start(client, submission)
    console.print(f"job {job}: {submission.entrypoint}", highlight=False, soft_wrap=True, markup=False)
    if not wait:
        return 0
    try:
        for line in _log_lines(client, job):
            console.print(line, end="", highlight=False, soft_wrap=True, markup=False)
        return _final_code(client, job, console, END_TIMEOUT_S)
    except KeyboardInterrupt:
        console.print(f"stopping job {job}; its state is being saved (Ctrl-C again leaves it to itself)", highlight=False)
        client.stop_job(job)
        _final_code(client, job, console, submission.stop_wait_s + END_TIMEOUT_S)
        return EXIT_INTERRUPTED


def _start(client: JobClient, submission: Submission) -> str:
    """Submit; a head that has just started has no agent yet, and is asked again. Raises UserError when it still refuses."""
    deadline = time.monotonic() + AGENT_TIMEOUT_S
    while True:
        try:
            return client.submit_job(
                entrypoint=submission.entrypoint, submission_id=submission.job_id, runtime_env=submission.runtime_env
            )  # fmt: skip
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise UserError(
                    f"submit: the job server refused the job: {error}; look at the head's dashboard_agent.log, or give the job another --job-id"
                ) from error
        time.sleep(POLL_S)


def _log_lines(client: JobClient, job: str) -> Iterator[str]:
    """The job's log as a plain iterator."""
    lines = client.tail_job_logs(job)
    with contextlib.closing(asyncio.new_event_loop()) as loop:
        while True:
            try:
                yield loop.run_until_complete(anext(lines))
            except StopAsyncIteration:
                return


def _final_code(client: JobClient, job: str, console: Console, timeout_s: float) -> int:
    """Wait for a final state. Raises FlowfleetError when none comes in time."""
    deadline = time.monotonic() + timeout_s
    while True:
        info = client.get_job_info(job)
        status = str(info.status)
        if status == "SUCCEEDED":
            return 0
        if status == "STOPPED":
            return EXIT_INTERRUPTED
        if status == "FAILED":
            if info.driver_exit_code is None:
                console.print(f"job {job} failed before its command ended: {info.message}", highlight=False, soft_wrap=True, markup=False)
            return EXIT_FAILED if info.driver_exit_code is None else int(info.driver_exit_code)
        if time.monotonic() > deadline:
            raise FlowfleetError(
                f"submit: job {job} is still {status} {timeout_s:.0f} s after its log ended; look at it with `ray job status {job}`"
            )
        time.sleep(POLL_S)
