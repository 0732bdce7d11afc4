"""One run of fake engines on Ray: scaled while it runs, each role killed -9 in turn, ended by SIGTERM; nothing stays behind."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.store.audit import audit
from common.store.run_store import RunStore
from deploy.commands.control import request_scale
from tests.fleet_runs import FakeRun, kill, wait_until


@pytest.fixture
def run(tmp_path: Path) -> Iterator[FakeRun]:
    started = FakeRun(tmp_path / "run")
    yield started
    started.end()


def test_a_run_survives_scaling_and_kills_of_every_role_and_a_signal_saves_it(run: FakeRun) -> None:
    store = RunStore(str(run.run_dir))
    run.wait_for_updates(3)
    (learner,) = run.pids("learner")

    request_scale(store, {"rollout": 2})
    wait_until(lambda: run.check() and run.running("rollout.") == {"rollout.0", "rollout.1"}, "two running workers")
    request_scale(store, {"rollout": 1})
    wait_until(lambda: run.check() and set(run.status()["fleet"]["slots"]) & {"rollout.1"} == set(), "rollout.1 to leave")
    assert run.pids("learner") == [learner]  # untouched

    for slot in ("rollout.0", "reward.jpeg_compressibility.0", "learner"):
        (victim,) = wait_until(lambda slot=slot: run.check() and run.pids(slot), f"{slot} to run")
        kill(victim)
        wait_until(lambda slot=slot, victim=victim: run.check() and run.pids(slot) not in ([], [victim]), f"{slot} to come back")
        run.wait_for_updates(2)
    coordinator = run.status()["process_id"]
    kill(coordinator)
    wait_until(lambda: run.check() and run.status()["process_id"] != coordinator, "the coordinator to come back")
    run.wait_for_updates(2)

    run.driver.send_signal(signal.SIGTERM)
    assert run.wait_for_end() == 130
    status = run.status()
    assert (status["state"], status["reason"]) == ("stopped", "SIGTERM came; the same command goes on")
    newest_state = max(int(path.parent.name.removeprefix("update_")) for path in run.run_dir.glob("learner/*/complete.json"))
    assert newest_state == status["version"]
    wait_until(lambda: not run.left_over(), f"processes to end: {run.left_over()}")
    sentences = " ".join(status["fleet"]["decisions"])
    assert "rollout 2 -> 1" in sentences
    assert "learner ended (its worker process has died)" in sentences
    assert audit(store).violations == ()


@pytest.mark.slow
def test_a_second_signal_ends_the_run_at_once_and_the_sizes_asked_for_survive_the_resume(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "run")
    try:
        run.wait_for_updates(1)
        request_scale(RunStore(str(run.run_dir)), {"rollout": 2})
        wait_until(lambda: run.check() and run.running("rollout.") == {"rollout.0", "rollout.1"}, "two running workers")
        run.driver.send_signal(signal.SIGINT)
        wait_until(lambda: "once more ends it at once" in run.log.read_text(), "the first signal's answer")
        run.driver.send_signal(signal.SIGINT)
        assert run.wait_for_end() == 130
        wait_until(lambda: not run.left_over(), f"processes to end: {run.left_over()}")
        again = FakeRun(run.run_dir)
        try:
            wait_until(lambda: again.check() and again.status()["incarnation"] == 2, "the second start's own status")
            wait_until(lambda: again.check() and again.running("rollout.") == {"rollout.0", "rollout.1"}, "the sizes of before")
            assert any("sizes of earlier requests hold: rollout 1 -> 2" in each for each in again.status()["fleet"]["decisions"])
        finally:
            again.end()
        assert audit(RunStore(str(run.run_dir))).violations == ()
    finally:
        run.end()


@pytest.mark.slow
def test_a_worker_that_dies_at_every_start_stops_the_run_with_its_cause(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "run", fakes="rollout=600s,learner=0.2s,reward=0.1s")  # it never gets to do any work
    seen: set[int] = set()
    try:
        while run.driver.poll() is None:
            slot = run.status().get("fleet", {}).get("slots", {}).get("rollout.0", {"process_ids": []})
            for pid in set(slot["process_ids"]) - seen:
                seen.add(pid)
                kill(pid)
            wait_until(lambda: run.driver.poll() is not None or set(_starting(run)) - seen, "the next start of rollout.0, or the end")
        assert run.driver.returncode == 1
        assert "rollout.0: ended 5 times in a row without doing any work" in run.log.read_text()
    finally:
        run.end()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fakes", "slot"),
    [("rollout=600s,learner=0.2s,reward=0.1s", "rollout.0"), ("rollout=0.2s,learner=0.2s,reward=600s", "reward.jpeg_compressibility.0")],
)
def test_who_beats_and_never_answers_is_killed_by_name_and_keeps_nobody_from_leaving(fakes: str, slot: str, tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "run", "schedule.group_timeout_s=6", "cluster.drain_timeout_s=10", fakes=fakes)
    try:
        words = "it beats, but held a lease for more than group_timeout_s = 6 s"
        wait_until(lambda: run.check() and any(slot in each and words in each for each in decisions(run)), f"{slot} to be killed")
        run.driver.send_signal(signal.SIGTERM)
        assert run.wait_for_end() == 130
        wait_until(lambda: not run.left_over(), f"processes to end: {run.left_over()}")
    finally:
        run.end()


def decisions(run: FakeRun) -> list[str]:
    """The driver's last sentences."""
    return list(run.status().get("fleet", {}).get("decisions", []))


def _starting(run: FakeRun) -> list[int]:
    return list(run.status().get("fleet", {}).get("slots", {}).get("rollout.0", {"process_ids": []})["process_ids"])
