"""What a pod runs before it is ended (Kubernetes' preStop): the head stops its jobs and waits for them; a worker node waits for its actors.

    python -m deploy.drain jobs --wait 540      on the head: `ray job stop` for every job that runs, then wait until all have ended
    python -m deploy.drain actors --wait 540    on a worker node: wait until no actor of this project works here

Kubernetes ends all pods of a cluster at once. Without this the learner would be gone before it has saved its state. The worker's
side looks at the processes of its own pod and asks nobody: the head's service no longer answers once its pod is being ended.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from common.errors import UserError
from common.logs import configure_logging, get_logger

JOBS_ADDRESS = "http://127.0.0.1:8265"
ACTORS = ("LearnerActor", "RolloutActor", "RewardActor")
ENDED = ("SUCCEEDED", "STOPPED", "FAILED")
POLL_S = 1.0
EXIT_LATE = 1

_log = get_logger("drain")


class JobDesk(Protocol):
    """What is used of ray.job_submission.JobSubmissionClient."""

    def list_jobs(self) -> list[Any]:
        """Every job's submission_id and status."""
        ...

    def stop_job(self, job_id: str) -> bool:
        """Ask it to stop: SIGTERM, then SIGKILL after the job's own RAY_JOB_STOP_WAIT_TIME_S."""
        ...


def running_jobs(desk: JobDesk) -> list[str]:
    """Submission ids of the jobs that have not ended. A driver that was not submitted as a job has none, and nobody can stop it so."""
    return [job.submission_id for job in desk.list_jobs() if job.submission_id and str(job.status) not in ENDED]


def stop_jobs(desk: JobDesk) -> list[str]:
    """Ask every running job to stop; return their ids."""
    jobs = running_jobs(desk)
    for job in jobs:
        _log.info("asking job %s to stop and save its state", job)
        desk.stop_job(job)
    return jobs


def working_actors(proc: Path = Path("/proc")) -> list[int]:
    """Process ids of this project's actors here, by the titles that Ray gives its workers.

    Args:
        proc: where the kernel shows processes; tests pass a directory of their own.
    """
    found = []
    for folder in proc.iterdir():
        if not folder.name.isdigit():
            continue
        try:
            title = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue  # it has ended since
        if title.startswith("ray::") and title.removeprefix("ray::").startswith(ACTORS):
            found.append(int(folder.name))
    return sorted(found)


def wait_until_none(left: Callable[[], list[Any]], seconds: float, what: str, sleep: Callable[[float], None] = time.sleep) -> bool:
    """Look again and again until nothing is left; False when the time is over first."""
    deadline = time.monotonic() + seconds
    while remaining := left():
        if time.monotonic() >= deadline:
            _log.warning("%d %s left after %.0f s; they are ended with the pod", len(remaining), what, seconds)
            return False
        sleep(POLL_S)
    return True


def drain_jobs(seconds: float, address: str) -> bool:
    """Stop the jobs of a job server and wait for them; True when none runs any more. Raises UserError when nobody answers."""
    from deploy.submit import connect_jobs

    desk: Any = connect_jobs(address)
    stop_jobs(desk)
    return wait_until_none(lambda: running_jobs(desk), seconds, "job(s)")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """`what` and `wait`, of the command line."""
    parser = argparse.ArgumentParser(prog="python -m deploy.drain", description="Wait for what a pod holds, before the pod is ended.")
    parser.add_argument("what", choices=("jobs", "actors"))
    parser.add_argument("--wait", type=float, default=540.0, help="seconds; shorter than the pod's terminationGracePeriodSeconds")
    parser.add_argument("--address", default=JOBS_ADDRESS, help="of the job server; default: this pod's own")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Return 0 when nothing is left, 1 when the time was over or nobody answered; Kubernetes ends the pod in any case."""
    given = parse_arguments(arguments)
    configure_logging()
    if given.what == "actors":
        return 0 if wait_until_none(working_actors, given.wait, "actor(s)") else EXIT_LATE
    try:
        return 0 if drain_jobs(given.wait, given.address) else EXIT_LATE
    except UserError as error:
        _log.warning("%s", error)
        return EXIT_LATE


if __name__ == "__main__":
    sys.exit(main())
