"""A run of fake engines in a process of its own, as a user starts it, and what its status.json says."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

PATIENCE_S = 240.0  # of every wait: these machines are shared
FAKES = "rollout=0.2s,learner=0.2s,reward=0.1s"
SETS = (
    "schedule.num_updates=5000", "learner.groups_per_update=4", "learner.optimizer_steps=2", "rollout.group_size=4", "evaluation.every=0",
    "evaluation.at_start=false", "rollout.num_workers=1", "schedule.lease_timeout_s=10", "store.updates_kept=20",
    "reward.0.name=jpeg_compressibility", "reward.1.name=jpeg_incompressibility", "reward.1.use=watch", "reward.1.num_servers=0",
    'evaluation.rewards=["jpeg_compressibility"]',
)  # fmt: skip


def fake_arguments(run_dir: Path, *sets: str, fakes: str = FAKES) -> list[str]:
    """`train` with fake engines into a folder."""
    return ["train", "tiny-geneval", "--fake", fakes, "--run-dir", str(run_dir), *(p for item in (*SETS, *sets) for p in ("--set", item))]


def wait_until(holds: Callable[[], Any], what: str) -> Any:
    """Return the first true answer. Raises AssertionError that names what was waited for."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        answer = holds()
        if answer:
            return answer
        assert time.monotonic() < deadline, f"waited {PATIENCE_S:.0f} s for {what}"
        time.sleep(0.2)


class FakeRun:
    """A driver process and its run directory."""

    def __init__(self, run_dir: Path, *sets: str, fakes: str = FAKES) -> None:
        self.run_dir = run_dir
        self.log = run_dir.with_suffix(".log")
        command = [sys.executable, "-c", "from deploy.cli import main; main()", *fake_arguments(run_dir, *sets, fakes=fakes)]
        with self.log.open("a") as output:
            self.driver = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        self.seen: set[int] = {self.driver.pid}  # every process that status ever listed

    def status(self) -> dict[str, Any]:
        """status.json, {} before there is one."""
        file = self.run_dir / "status.json"
        if not file.exists():
            return {}
        found: dict[str, Any] = json.loads(file.read_text())
        self.seen |= {found["process_id"], *(pid for slot in found["fleet"]["slots"].values() for pid in slot["process_ids"])}
        return found

    def pids(self, slot: str) -> list[int]:
        """Processes of a slot, [] while it has none or is not running."""
        report = self.status().get("fleet", {}).get("slots", {}).get(slot)
        return list(report["process_ids"]) if report and report["state"] == "running" else []

    def running(self, prefix: str) -> set[str]:
        """Running slots of a role."""
        slots = self.status().get("fleet", {}).get("slots", {})
        return {slot for slot, report in slots.items() if slot.startswith(prefix) and report["state"] == "running"}

    def wait_for_updates(self, count: int) -> None:
        """Until `count` further versions were published."""
        goal = self.status().get("version", -1) + count
        wait_until(lambda: self.check() and self.status().get("version", -1) >= goal, f"version {goal}")

    def check(self) -> bool:
        """The driver lives. Raises AssertionError with its log."""
        assert self.driver.poll() is None, self.log.read_text()[-3000:]
        return True

    def wait_for_end(self) -> int:
        """The exit code."""
        return int(wait_until(lambda: self.driver.poll() is not None and str(self.driver.returncode), "the driver's end"))

    def left_over(self) -> set[int]:
        """Processes that status listed and that are still there."""
        return {pid for pid in self.seen if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE}

    def end(self) -> None:
        """Kill the driver; Ray's processes follow it."""
        if self.driver.poll() is None:
            self.driver.kill()
            self.driver.wait()


def kill(pid: int) -> None:
    """kill -9."""
    os.kill(pid, 9)
