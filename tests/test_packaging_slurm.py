"""The Slurm script: clean, strict about its arguments, and, with two Slurm nodes simulated on this host, started, requeued and resumed."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from common.store.audit import audit
from common.store.claim import newest_incarnation
from common.store.manifests import read_status
from common.store.run_store import RunStore
from deploy.config import PROJECT
from deploy.local_cluster import free_port
from tests.fleet_runs import FAKES, PATIENCE_S, SETS, wait_until

SCRIPT = PROJECT / "deploy" / "slurm" / "flowfleet.sbatch"
NODES = ("127.0.0.1", "127.0.0.2")
SRUN = """#!/usr/bin/env bash
while [[ ${1:-} == --* ]]; do
  case $1 in --nodelist=*) echo "${1#--nodelist=}" >>"$SIMULATION/steps" ;; esac
  shift
done
exec "$@"
"""
SCONTROL = """#!/usr/bin/env bash
case "$1" in
  show) tr ',' '\\n' <<<"$3" ;;
  requeue) echo "$2" >>"$SIMULATION/requeued" ;;
  *) exit 1 ;;
esac
"""


def test_shellcheck_finds_nothing() -> None:
    done = subprocess.run([Path(sys.executable).parent / "shellcheck", SCRIPT], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "told"), [((), "usage"), (("tiny-geneval",), "usage"), (("tiny-geneval", "runs/mine"), "runs/mine is relative")]
)
def test_missing_or_relative_arguments_are_refused_before_anything_starts(arguments: tuple[str, ...], told: str) -> None:
    done = subprocess.run(["bash", SCRIPT, *arguments], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2 and told in done.stderr


class Allocation:
    """What Slurm gives a batch step: its variables, `srun` and `scontrol`, two nodes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        tools = folder / "bin"
        tools.mkdir()
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
            (tools / name).write_text(text)
            (tools / name).chmod(0o755)
        self.environment = os.environ | {
            "PATH": f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}", "SIMULATION": str(folder), "SLURM_JOB_ID": "77",
            "SLURM_JOB_NODELIST": ",".join(NODES), "SLURM_SUBMIT_DIR": str(folder),
        }  # fmt: skip

    @contextmanager
    def batch_step(self, run_dir: Path) -> Iterator["subprocess.Popen[str]"]:
        """Run the script as Slurm does; whatever happens, it is told to end."""
        sets = [part for item in (*SETS, "schedule.num_updates=60") for part in ("--set", item)]
        command = ["bash", str(SCRIPT), "tiny-geneval", str(run_dir), "--fake", FAKES, *sets]
        environment = self.environment | {"FLOWFLEET_RAY_PORT": str(free_port())}
        with (self.folder / "log").open("a") as log:
            script = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, text=True, cwd=self.folder)
        try:
            yield script
        finally:
            if script.poll() is None:
                script.send_signal(signal.SIGTERM)
                script.wait(timeout=PATIENCE_S)

    def lines(self, name: str) -> list[str]:
        """What a tool wrote down."""
        path = self.folder / name
        return path.read_text().split() if path.exists() else []

    @property
    def log(self) -> str:
        """All output."""
        return (self.folder / "log").read_text()


@pytest.mark.slow
def test_two_nodes_start_a_signal_saves_and_requeues_and_the_next_start_resumes_to_the_end(tmp_path: Path) -> None:
    allocation, run_dir = Allocation(tmp_path), tmp_path / "run"
    store = RunStore(str(run_dir))

    def version() -> int:
        status = read_status(store)
        return -1 if status is None else status.version

    with allocation.batch_step(run_dir) as first:
        wait_until(lambda: version() >= 3 or first.poll() is not None, "three updates")
        assert first.poll() is None, allocation.log
        first.send_signal(signal.SIGTERM)
        assert first.wait(timeout=PATIENCE_S) == 130, allocation.log
    assert sorted(allocation.lines("steps")) == list(NODES)  # one srun a node, all at once
    assert allocation.lines("requeued") == ["77"]
    stopped = version()
    assert 3 <= stopped < 60
    assert not list(tmp_path.glob(".flowfleet-*"))  # the token is gone

    with allocation.batch_step(run_dir) as second:
        assert second.wait(timeout=2 * PATIENCE_S) == 0, allocation.log
    assert version() == 60 and newest_incarnation(store) == 2
    assert allocation.lines("requeued") == ["77"]  # a run that is done is not requeued
    assert audit(store).violations == ()
