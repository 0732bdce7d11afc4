"""Requests, directives and absences at the Coordinator: drains, stops, restarts in mid-run, a store that is away, hanging slots."""

import errno
import json
import os
import signal
from pathlib import Path

import pytest

from common.errors import Interrupted, UserError
from common.store import paths
from common.store.claim import claim_run
from common.store.control import ControlReader, ControlRequest, read_requests, requested_sizes, write_request
from common.store.directive import Directive, FleetReport, SlotReport
from common.store.ending import EndKind, Outcome
from common.store.manifests import read_status
from common.store.run_store import RunStore
from common.types import RolloutLease, Stop, Wait
from deploy.commands.control import parse_rewards, request_scale, request_stop
from deploy.config import load_config
from deploy.signals import StopSignals
from tests.store_fixtures import Clock, learn, make_coordinator, make_settings, publish, roll_out, run_to_end, work

STOPPED = Outcome(kind=EndKind.STOPPED, reason="SIGTERM came")


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return RunStore(str(tmp_path / "run"))


def request(kind: str = "scale", *, incarnation: int = 1, **sizes: int) -> ControlRequest:
    made = ControlRequest(kind="stop", incarnation=incarnation, asked_at="2026-01-01T00:00:00Z", writer_id="w")
    return made if kind == "stop" else ControlRequest(kind="scale", incarnation=incarnation, asked_at="", writer_id="w", sizes=sizes)


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_requests_are_numbered_files_that_are_read_once_each(kind: str, tmp_path: Path) -> None:
    store = RunStore(str(tmp_path / "run") if kind == "file" else f"memory://{tmp_path.name}")
    reader = ControlReader(store, incarnation=2)
    assert reader.poll() == {}
    assert [write_request(store, request(rollout=4)), write_request(store, request("stop", incarnation=1))] == [1, 2]
    assert write_request(store, request("stop", incarnation=2)) == 3
    assert store.list(paths.CONTROL) == ["control/0001.json", "control/0002.json", "control/0003.json"]
    assert list(reader.poll()) == [1, 3]  # the stop of an earlier start is not for this one
    assert reader.poll() == {}
    assert requested_sizes({"rollout": 1}, read_requests(store).values()) == {"rollout": 4}


def test_a_drained_slot_is_told_to_leave_and_the_others_work_on(store: RunStore) -> None:
    desk = make_coordinator(store, make_settings(), Clock())
    publish(store, desk, 0)
    held = desk.ask_rollout("rollout.1")
    assert isinstance(held, RolloutLease)
    desk.tick(Directive(drained=frozenset({"rollout.1", "reward.r.0"})))
    roll_out(store, desk, held)  # it finishes what it holds
    assert desk.ask_rollout("rollout.1") == Stop(reason="rollout.1 is drained: the fleet gets smaller")
    assert isinstance(desk.ask_scoring("reward.r.0", "r", 1), Stop)
    assert isinstance(desk.ask_rollout("rollout.0"), RolloutLease)
    assert isinstance(desk.ask_scoring("reward.r.1", "r", 1), tuple)
    assert desk.summary()["work"] == {"rollout.1": 1}
    desk.tick(Directive())
    assert isinstance(desk.ask_rollout("rollout.1"), RolloutLease)


def test_a_stop_lets_everybody_leave_and_the_same_run_goes_on(store: RunStore) -> None:
    desk = make_coordinator(store, make_settings(), Clock())
    publish(store, desk, 0)
    for _ in work(store, desk):
        pass
    learn(store, desk, 1)
    outcome = desk.tick(Directive(ended=STOPPED))
    with pytest.raises(Interrupted, match="SIGTERM came") as caught:
        outcome.raise_if_failed()
    assert caught.value.exit_code == 130
    for answer in (desk.ask_rollout("rollout.0"), desk.ask_scoring("reward.r.0", "r", 1), desk.next_manifest(2)):
        assert answer == Stop(reason="SIGTERM came")
    desk.close(outcome.reason)
    status = read_status(store)
    assert status is not None
    assert status.state == "stopped"
    assert desk.tick(Directive()).kind is EndKind.STOPPED  # it is not taken back
    again = make_coordinator(store, make_settings(), Clock(), incarnation=1)
    assert again.outcome().kind is EndKind.RUNNING


def test_a_coordinator_that_restarts_keeps_the_time_limit_and_the_end_by_one_tick(store: RunStore) -> None:
    clock = Clock()
    publish(store, make_coordinator(store, make_settings(time_limit_s=100.0), clock), 0)
    clock.now += 90
    again = make_coordinator(store, make_settings(time_limit_s=100.0), clock)
    assert isinstance(again.next_manifest(1), Wait)
    again.tick(Directive(elapsed_s=101.0))
    assert isinstance(again.next_manifest(1), Stop)
    other = make_coordinator(store, make_settings(), clock)
    assert other.tick(Directive(ended=STOPPED)).kind is EndKind.STOPPED


def test_a_learner_that_left_before_a_restart_is_not_waited_for(store: RunStore) -> None:
    clock = Clock()
    publish(store, make_coordinator(store, make_settings(time_limit_s=10.0), clock), 0)
    again = make_coordinator(store, make_settings(time_limit_s=10.0), clock)
    assert again.tick(Directive(elapsed_s=11.0, learner_left=True)).kind is EndKind.TIME_LIMIT


def test_a_slot_that_beats_but_does_not_finish_is_counted_and_a_silent_one_is_not(store: RunStore) -> None:
    clock = Clock()
    desk = make_coordinator(store, make_settings(lease_timeout_s=30.0, group_timeout_s=60.0), clock)
    publish(store, desk, 0)
    hanging, silent = desk.ask_rollout("rollout.0"), desk.ask_rollout("rollout.1")
    assert isinstance(hanging, RolloutLease)
    assert isinstance(silent, RolloutLease)
    for _ in range(4):
        clock.now += 20
        desk.beat("rollout.0", [hanging.lease_id], {})
        desk.tick()
    assert desk.summary()["overruns"] == {"rollout.0": 1}


def test_nothing_committed_for_stall_timeout_s_ends_the_run_though_the_learner_never_asks(store: RunStore) -> None:
    clock = Clock()
    desk = make_coordinator(store, make_settings(stall_timeout_s=50.0), clock)
    publish(store, desk, 0)
    clock.now += 50
    assert desk.tick().kind is EndKind.RUNNING
    clock.now += 1
    outcome = desk.tick()
    assert outcome.kind is EndKind.STALL
    assert "the learner works on update 0, and nothing was committed for 51 s" in outcome.reason


def test_without_any_worker_the_stall_says_whom_it_waited_for(store: RunStore) -> None:
    clock = Clock()
    desk = make_coordinator(store, make_settings(stall_timeout_s=50.0), clock)
    publish(store, desk, 0)
    assert isinstance(desk.next_manifest(1), Wait)
    clock.now += 51
    outcome = desk.tick()
    assert outcome.kind is EndKind.STALL
    assert "the learner waited for rollout workers (0 heard in the last minute): the next groups are not issued yet" in outcome.reason


class Away:
    """A store that refuses while `is_away`."""

    def __init__(self) -> None:
        self.is_away = False

    def __call__(self, stage: str, path: str) -> None:
        if self.is_away:
            raise OSError(errno.EACCES, "Permission denied")


def test_a_store_that_is_away_is_waited_for_and_the_run_goes_on(tmp_path: Path) -> None:
    away, clock = Away(), Clock()
    store = RunStore(str(tmp_path / "run"), hook=away)
    desk = make_coordinator(store, make_settings(num_updates=1), clock)
    publish(store, desk, 0)
    for _ in work(store, desk):
        pass
    away.is_away = True
    clock.now += 10
    assert desk.tick().kind is EndKind.RUNNING
    assert "Permission denied" in desk.summary()["store_trouble"]
    waiting = desk.next_manifest(1)
    assert isinstance(waiting, Wait)
    assert "Permission denied" in waiting.reason
    away.is_away = False
    clock.now += 10
    desk.tick()
    assert desk.summary()["store_trouble"] == ""
    learn(store, desk, 1)


def test_status_lists_slots_sizes_and_decisions_and_reads_one_of_before(store: RunStore) -> None:
    desk = make_coordinator(store, make_settings(), Clock())
    slot = SlotReport(state="running", host="h", process_ids=(7,), crashes=1)
    report = FleetReport(driver_process_id=5, sizes={"rollout": 1}, slots={"rollout.0": slot}, decisions=("12:00:00 said",))
    desk.tick(Directive(report=report))
    status = read_status(store)
    assert status is not None
    assert status.fleet == report
    tables = json.loads(store.read(paths.STATUS))
    del tables["fleet"]
    store.replace(paths.STATUS, json.dumps(tables).encode())
    before = read_status(store)
    assert before is not None
    assert (before.fleet, before.version) == (FleetReport(), status.version)


def test_a_fresh_fleet_of_one_run_changes_nothing_of_its_data(store: RunStore) -> None:
    """The work counters watch a whole run without touching it."""
    desk = make_coordinator(store, make_settings(), Clock())
    run_to_end(store, desk)
    assert desk.summary()["work"] == {"rollout.0": 6, "reward.r.0": 6, "learner": 3}
    assert desk.summary()["backlog"] == {"r": 0}


def claimed(store: RunStore, *sets: str) -> None:
    """A run directory of tiny-geneval whose driver is alive."""
    claiming = claim_run(store, load_config("tiny-geneval", list(sets)).model_dump(mode="json"), config_digest="d")
    with pytest.raises(StopIteration):
        next(claiming)


def test_scale_and_stop_are_written_for_the_run_that_is_there(store: RunStore) -> None:
    claimed(store)
    assert request_scale(store, {"rollout": 3}) == 1
    with pytest.raises(UserError, match="nobody seems to run"):
        request_stop(store)
    make_coordinator(store, make_settings(), Clock()).tick()
    assert request_stop(store) == 2
    assert [each.kind for each in ControlReader(store, 1).poll().values()] == ["scale", "stop"]


def test_a_reward_that_the_run_lacks_is_refused_with_those_it_has() -> None:
    config = load_config("tiny-geneval", ["reward.0.name=a", "reward.1.name=b", 'evaluation.rewards=["a"]'])
    assert parse_rewards(["b=2"], config) == {"reward.b": 2}
    for text, words in (("c=1", "choose one of a, b"), ("b", "no NAME=COUNT"), ("b=-1", "no NAME=COUNT")):
        with pytest.raises(UserError, match=words):
            parse_rewards([text], config)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_drains_and_the_second_ends_at_once(number: signal.Signals) -> None:
    said: list[str] = []
    before = signal.getsignal(number)
    with StopSignals(said.append) as signals:
        signals.arm()
        os.kill(os.getpid(), number)
        assert signals.reason == f"{number.name} came"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # leaving is not cut short
    assert signal.getsignal(number) is before
    assert len(said) == 1


def test_a_signal_before_there_is_anything_to_save_ends_at_once() -> None:
    with StopSignals(lambda _: None), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)
