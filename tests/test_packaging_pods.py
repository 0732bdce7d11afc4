"""What a cluster whose nodes come and go needs: roles that stay where they belong, waits that are no errors, pods that end in order."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from deploy.config import load_config
from deploy.drain import parse_arguments, running_jobs, stop_jobs, wait_until_none, working_actors
from deploy.fleet import FleetBook, FleetLimits
from deploy.placement import Needs, NodeFacts, Role, offered_roles, pinned_roles, problems, seat

WORKER = Needs(role="rollout", num_cpus=1.0, num_gpus=0.0)
LEARNER_POD = NodeFacts(node_id="l", resources={"CPU": 2.0, "learner": 1.0})
ROLLOUT_POD = NodeFacts(node_id="r", resources={"CPU": 1.0, "rollout": 1.0})


def test_a_pinned_role_waits_for_its_own_nodes_when_the_last_of_them_is_taken() -> None:
    pinned = offered_roles([LEARNER_POD, ROLLOUT_POD])
    assert pinned == {"learner", "rollout"}
    assert dict(seat(WORKER, [LEARNER_POD], {}).resources) == {}  # nothing known of earlier nodes: it would move in with the learner
    assert dict(seat(WORKER, [LEARNER_POD], {}, pinned).resources) == {"rollout": 1.0}
    assert dict(seat(Needs(role="reward", num_cpus=1.0, num_gpus=0.0), [LEARNER_POD], {}, pinned).resources) == {}


def test_on_a_cluster_that_grows_one_pinned_role_pins_them_all() -> None:
    nothing: frozenset[Role] = frozenset()
    assert pinned_roles([LEARNER_POD], nothing, grows=False) == {"learner"}
    assert pinned_roles([LEARNER_POD], nothing, grows=True) == {"learner", "rollout", "reward"}
    plain = NodeFacts(node_id="p", resources={"CPU": 8.0})
    assert pinned_roles([plain], nothing, grows=True) == nothing, "nobody speaks of roles here"
    assert pinned_roles([plain], frozenset({"rollout"}), grows=True) == {"learner", "rollout", "reward"}, "once pinned, pinned for the run"
    assert pinned_roles([plain], frozenset({"rollout"}), grows=False) == nothing, "no other such node will come"


def test_more_than_the_nodes_hold_now_is_a_mistake_only_where_the_cluster_does_not_grow() -> None:
    assert "cluster.grows=true" in problems(WORKER, 8, [LEARNER_POD, ROLLOUT_POD])[0]
    assert problems(WORKER, 8, [LEARNER_POD, ROLLOUT_POD], grows=True) == []
    large = Needs(role="rollout", num_cpus=1.0, num_gpus=1.0)
    assert "no node can hold" in problems(large, 1, [LEARNER_POD])[0] and problems(large, 1, [LEARNER_POD], grows=True) == []
    odd = Needs(role="rollout", num_cpus=1.0, num_gpus=1.5)
    assert "whole number" in problems(odd, 1, [LEARNER_POD], grows=True)[0]  # no node ever holds it
    assert load_config("tiny-geneval", []).cluster.grows is False
    assert load_config("tiny-geneval", ["cluster.grows=true"]).cluster.grows is True


@pytest.mark.parametrize(("grows", "waits"), [(False, {"rollout.0"}), (True, {"rollout.0", "rollout.1"})])
def test_a_new_worker_that_finds_no_node_ends_the_run_only_where_the_cluster_does_not_grow(grows: bool, waits: set[str]) -> None:
    book = FleetBook(FleetLimits(start_timeout_s=30.0, drain_timeout_s=20.0, grows=grows))
    for slot in ("learner", "rollout.0", "rollout.1"):
        book.started(slot, 0.0)
    book.became_ready("rollout.0", 1.0)
    book.started("rollout.0", 2.0)  # its node was taken, and it waits for another; the others never answered
    late = book.late(40.0)
    assert {record.slot for record in late} == {"learner", "rollout.0", "rollout.1"}
    assert {record.slot for record in late if book.may_wait(record)} == waits


# ---- before a pod is ended


@dataclass
class Job:
    """One entry of the job server's list."""

    submission_id: str | None
    status: str


@dataclass
class Desk:
    """A job server whose jobs end some looks after they were asked to."""

    jobs: list[Job]
    looks_to_end: int = 2
    stopped: list[str] = field(default_factory=list)

    def list_jobs(self) -> list[Job]:
        if self.stopped:
            self.looks_to_end -= 1
        if self.looks_to_end < 0:
            for job in self.jobs:
                job.status = "STOPPED" if job.submission_id in self.stopped else job.status
        return self.jobs

    def stop_job(self, job_id: str) -> bool:
        self.stopped.append(job_id)
        return True


def test_the_head_stops_what_runs_and_waits_until_it_has_ended() -> None:
    desk = Desk([Job("old", "SUCCEEDED"), Job("run", "RUNNING"), Job("next", "PENDING"), Job(None, "RUNNING")])
    naps: list[float] = []
    assert stop_jobs(desk) == ["run", "next"] == desk.stopped
    assert wait_until_none(lambda: running_jobs(desk), 60.0, "jobs", naps.append) is True
    assert len(naps) == 2, "two looks found them at work"


def test_a_job_that_does_not_end_is_waited_for_no_longer_than_was_said() -> None:
    desk = Desk([Job("run", "RUNNING")], looks_to_end=10**9)
    stop_jobs(desk)
    assert wait_until_none(lambda: running_jobs(desk), 0.0, "jobs", lambda seconds: None) is False


def test_a_worker_node_sees_its_own_actors_and_no_idle_or_foreign_process(tmp_path: Path) -> None:
    titles = {
        "7": b"ray::LearnerActor.run\0",
        "12": b"ray::RewardActor\0\0",
        "30": b"ray::IDLE\0",
        "31": b"ray::JobSupervisor\0",
        "40": b"/opt/venv/bin/python\0-m\0deploy.drain\0actors\0",
        "41": b"grep\0ray::RolloutActor\0",
    }
    for number, title in titles.items():
        (tmp_path / number).mkdir()
        (tmp_path / number / "cmdline").write_bytes(title)
    (tmp_path / "50").mkdir()  # ended between the listing and the look
    (tmp_path / "meminfo").write_text("")
    assert working_actors(tmp_path) == [7, 12]


def test_the_actors_that_a_node_waits_for_are_those_that_exist() -> None:
    from deploy.drain import ACTORS
    from learner.actor import LearnerActor
    from reward_servers.actor import RewardActor
    from rollout_workers.actor import RolloutActor

    shells: tuple[Any, ...] = (LearnerActor, RolloutActor, RewardActor)
    names = [shell.__ray_metadata__.class_name for shell in shells]
    assert sorted(names) == sorted(ACTORS)


def test_the_command_line_names_what_to_wait_for() -> None:
    given = parse_arguments(["jobs", "--wait", "12"])
    assert (given.what, given.wait) == ("jobs", 12.0)
    with pytest.raises(SystemExit):
        parse_arguments(["everything"])
