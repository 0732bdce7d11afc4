"""The chaos harness: it kills what it started and nothing else, and its verdict can fail."""

import os
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from common.errors import FlowfleetError
from common.store.directive import FleetReport, SlotReport
from common.store.manifests import Status
from deploy.chaos import ROLES, Chaos, role_order, victims


def status(coordinator: int, slots: dict[str, int], state: str = "running") -> Status:
    """A status.json that lists these processes."""
    fleet = FleetReport(driver_process_id=1, slots={slot: SlotReport(state="running", process_ids=(pid,)) for slot, pid in slots.items()})
    return Status(
        incarnation=1, sequence=1, written_at=0.0, state=state, reason="", host="here", process_id=coordinator, version=0, manifests=0,
        retired_through=0, fleet=fleet,
    )  # fmt: skip


def test_every_round_holds_each_role_once_and_the_seed_decides_the_order() -> None:
    first = list(islice(role_order(1), 30))
    assert Counter(first) == dict.fromkeys(ROLES, 6)
    assert all(sorted(first[at : at + 5]) == sorted(ROLES) for at in range(0, 30, 5))
    assert first == list(islice(role_order(1), 30)) != list(islice(role_order(2), 30))


def test_only_descendants_of_the_driver_are_victims() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        found = victims(status(child.pid, {"rollout.0": child.pid, "reward.ocr.0": 1, "learner": os.getppid()}), os.getpid())
    finally:
        child.kill()
        child.wait()
    assert found == {"coordinator": [child.pid], "rollout": [child.pid], "reward": [], "learner": [], "driver": [os.getpid()]}
    assert victims(status(child.pid, {"rollout.0": child.pid}), os.getpid())["rollout"] == []  # it is gone


def test_a_run_that_has_ended_has_no_victims() -> None:
    assert victims(status(os.getpid(), {}, state="stopped"), os.getppid()) == {}


def test_a_run_that_fails_by_itself_is_no_success(tmp_path: Path) -> None:
    hand = Chaos([sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "run", seed=1, pause_s=1.0, log=tmp_path / "log")
    with pytest.raises(FlowfleetError, match="exit code 3"):
        hand.run(0)
