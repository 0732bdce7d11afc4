"""The circuit breaker, what the Coordinator makes of it, and how a reward's configuration reaches both."""

from pathlib import Path

import pytest

from common.config import parse
from common.errors import ConfigError, GateError
from common.store.ending import EndKind
from common.store.ledger_entries import RewardSpec
from common.store.manifests import read_status
from common.store.pools import PoolWatch
from common.store.run_store import RunStore
from common.types import NOT_APPLICABLE, RolloutLease, Score, ScoreFile, ScoringLease, Wait
from deploy.compose import reward_specs, server_gpus
from deploy.config import load_config
from deploy.fleet import FleetBook, FleetLimits, SlotEnd
from reward_servers.breaker import Breaker, BreakerState
from reward_servers.config import RewardConfig
from tests.store_fixtures import Clock, make_coordinator, make_settings, publish, roll_out, score

OPEN, HALF_OPEN, CLOSED = {"breaker_open": 1.0}, {"breaker_open": 0.5}, {"breaker_open": 0.0}


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return RunStore(f"memory://{tmp_path.name}")


def test_failures_in_a_row_open_the_breaker_and_a_success_between_counts_anew(clock: Clock) -> None:
    breaker = Breaker(failures=3, pause_s=10.0, clock=clock)
    for _ in range(2):
        breaker.failed("away")
    breaker.succeeded()
    for _ in range(2):
        breaker.failed("away")
    assert (breaker.state, breaker.admits(4), breaker.rest_s()) == (BreakerState.CLOSED, 4, 0.0)
    breaker.failed("gone")
    assert (breaker.state, breaker.admits(4), breaker.last_error) == (BreakerState.OPEN, 0, "gone")


def test_after_its_rest_one_group_decides_between_work_and_another_rest(clock: Clock) -> None:
    breaker = Breaker(failures=1, pause_s=10.0, clock=clock)
    breaker.failed("away")
    clock.now += 9.0
    assert (breaker.admits(4), breaker.rest_s()) == (0, 1.0)
    clock.now += 1.0
    assert (breaker.admits(4), breaker.state) == (1, BreakerState.HALF_OPEN)
    breaker.failed("still away")
    assert (breaker.admits(4), breaker.rest_s()) == (0, 10.0)
    clock.now += 10.0
    assert breaker.admits(4) == 1
    breaker.succeeded()
    assert (breaker.state, breaker.admits(4)) == (BreakerState.CLOSED, 4)


def watch(*specs: RewardSpec) -> PoolWatch:
    pools = PoolWatch(specs or (RewardSpec(name="r", breaker_limit_s=60.0),), silence_s=30.0)
    for name in [spec.name for spec in specs] or ["r"]:
        for index in range(2):
            pools.asked(f"reward.{name}.{index}", name, 0.0)
    return pools


def test_a_pool_is_down_only_while_every_server_that_lives_says_so() -> None:
    pools = watch()
    pools.heard("reward.r.0", OPEN, 1.0)
    assert pools.blocking(1.0) == []
    pools.heard("reward.r.1", OPEN, 2.0)
    assert pools.blocking(2.0) == ["r"]
    pools.heard("reward.r.1", HALF_OPEN, 3.0)
    assert pools.blocking(3.0) == []
    assert "r" in pools.alerts(3.0)  # it tries a group: admitted, not well
    pools.heard("reward.r.1", {}, 4.0)  # started anew: its gauges are empty
    assert pools.alerts(4.0) == {}
    pools.heard("reward.r.0", OPEN, 40.0)  # the other is silent for longer than 30 s
    assert pools.blocking(40.0) == ["r"]


def test_a_pool_that_stays_ill_ends_the_run_after_its_limit_and_only_when_its_last_try_failed() -> None:
    pools = watch()
    pools.failed("r", "connection refused")
    for slot in ("reward.r.0", "reward.r.1"):
        pools.heard(slot, OPEN, 10.0)
    assert pools.cause_to_stop(69.0) is None
    pools.heard("reward.r.0", HALF_OPEN, 69.5)
    assert pools.cause_to_stop(71.0) is None
    pools.heard("reward.r.0", OPEN, 72.0)
    assert pools.cause_to_stop(72.0) == (
        "reward r: its breaker has been open for 62 s: connection refused; mend what it needs; the same command goes on"
    )


def test_a_watch_reward_alerts_and_stops_nothing() -> None:
    pools = watch(RewardSpec(name="w", use="watch", breaker_limit_s=1.0))
    for slot in ("reward.w.0", "reward.w.1"):
        pools.heard(slot, OPEN, 10.0)
    assert pools.blocking(99.0) == []
    assert pools.cause_to_stop(99.0) is None
    assert "training goes on" in pools.alerts(99.0)["w"]


def test_coverage_is_scored_over_applicable_counts_a_file_once_and_forgets_old_groups() -> None:
    pools = watch()
    assert pools.coverage() == {}
    errors = ["", "", "engine died", NOT_APPLICABLE]

    def file(number: int, errors: list[str]) -> ScoreFile:
        scores = tuple(Score(sample_index=i, value=None if error else 0.5, error=error) for i, error in enumerate(errors))
        return ScoreFile(run="t", number=number, lease_id=f"g{number}", reward="r", scorer_version="1", scores=scores)

    for _ in range(2):
        pools.filed(file(0, errors))
    assert pools.coverage() == {"r": 2 / 3}
    pools.filed(file(1, ["", "", "", ""]))
    assert pools.coverage() == {"r": 6 / 7}
    for number in range(2, 66):
        pools.filed(file(number, [""] * 4))
    assert pools.coverage() == {"r": 1.0}
    assert pools.last_error() == "reward r: last error: engine died"


def test_the_coordinator_admits_no_new_group_while_the_pool_is_down_but_takes_returned_ones(store: RunStore, clock: Clock) -> None:
    desk = make_coordinator(store, make_settings(), clock)
    publish(store, desk, 0)
    lease = desk.ask_rollout("rollout.0")
    assert isinstance(lease, RolloutLease)
    roll_out(store, desk, lease)
    (scoring,) = ask(desk)
    desk.beat("reward.r.0", [], OPEN)
    desk.fail_scoring(scoring.lease_id, "no route to host")
    answer = desk.ask_rollout("rollout.0")
    assert isinstance(answer, Wait)
    assert answer.reason == "reward servers of r: every breaker is open"
    desk.beat("reward.r.0", [], HALF_OPEN)
    second = desk.ask_rollout("rollout.0")
    assert isinstance(second, RolloutLease)
    desk.beat("reward.r.0", [], OPEN)
    desk.return_rollout(second.lease_id, "drained")
    again = desk.ask_rollout("rollout.1")
    assert isinstance(again, RolloutLease)
    assert again.number == second.number == 1
    desk.tick()
    (sentence,) = read_status(store).alerts  # type: ignore[union-attr]
    assert sentence.startswith("reward r: its breaker has been open for 0 s: no route to host; no new group is admitted meanwhile")
    assert desk.summary()["alerts"] == ["reward r"]
    assert desk.metrics.registry.get_sample_value("flowfleet_reward_pool_down", {"run": "test", "reward": "r"}) == 1.0


def ask(desk: object, limit: int = 4) -> tuple[ScoringLease, ...]:
    answer = desk.ask_scoring("reward.r.0", "r", limit)  # type: ignore[attr-defined]
    return answer if isinstance(answer, tuple) else ()


def test_a_pool_that_stays_down_ends_the_run_by_the_guard_named_reward(store: RunStore, clock: Clock) -> None:
    desk = make_coordinator(store, make_settings(rewards=(RewardSpec(name="r", breaker_limit_s=50.0),)), clock)
    publish(store, desk, 0)
    assert ask(desk, 0) == ()
    desk.beat("reward.r.0", [], OPEN)
    clock.now += 49.0
    assert desk.tick().kind is EndKind.RUNNING
    clock.now += 1.0
    outcome = desk.tick()
    with pytest.raises(GateError, match="gate reward: reward r: its breaker has been open for 50 s") as caught:
        outcome.raise_if_failed()
    assert (caught.value.name, caught.value.exit_code) == ("reward", 3)


def test_a_returned_scoring_lease_costs_no_attempt_and_a_stop_ends_the_run(store: RunStore, clock: Clock) -> None:
    desk = make_coordinator(store, make_settings(), clock)
    publish(store, desk, 0)
    lease = desk.ask_rollout("rollout.0")
    assert isinstance(lease, RolloutLease)
    roll_out(store, desk, lease)
    for _ in range(5):
        (scoring,) = ask(desk)
        desk.return_scoring(scoring.lease_id, "the breaker is open")
    assert ask(desk, 0) == ()  # nothing was asked for
    (scoring,) = ask(desk)
    desk.stop_scoring(scoring.lease_id, "image 2 of group 0 could not be scored: bad pixel")
    with pytest.raises(GateError, match="gate reward: reward r: image 2 of group 0 could not be scored: bad pixel"):
        desk.outcome().raise_if_failed()


def test_a_watch_reward_is_asked_for_one_group_in_m_by_number_and_never_delays_a_manifest(store: RunStore, clock: Clock) -> None:
    rewards = (RewardSpec(name="r"), RewardSpec(name="w", use="watch", sample_every=3))
    desk = make_coordinator(store, make_settings(rewards=rewards), clock)
    publish(store, desk, 0)
    for _ in range(4):
        lease = desk.ask_rollout("rollout.0")
        assert isinstance(lease, RolloutLease)
        roll_out(store, desk, lease)
    watched = desk.ask_scoring("reward.w.0", "w", 9)
    assert isinstance(watched, tuple)
    assert [lease.number for lease in watched] == [0, 3]
    for scoring in ask(desk):
        score(store, desk, scoring)
    manifest = desk.next_manifest(1)
    assert not isinstance(manifest, Wait)
    assert [set(group.scores) for group in manifest.groups] == [{"r"}, {"r"}]  # type: ignore[union-attr]
    desk.tick()
    assert desk.metrics.registry.get_sample_value("flowfleet_reward_coverage_ratio", {"run": "test", "reward": "r"}) == 1.0


def test_the_drops_guard_says_what_the_rewards_said(store: RunStore, clock: Clock) -> None:
    desk = make_coordinator(store, make_settings(), clock)
    publish(store, desk, 0)
    for _ in range(3):
        lease = desk.ask_rollout("rollout.0")
        assert isinstance(lease, RolloutLease)
        roll_out(store, desk, lease)
        for scoring in ask(desk):
            score(store, desk, scoring, num_null=2)
    with pytest.raises(
        GateError, match=r"gate drops: 3 of the last 4 .*2 of 4 samples scored, 3 needed; reward r: last error: engine died"
    ):
        desk.tick().raise_if_failed()


def test_a_lease_that_came_back_without_a_failure_is_not_held_against_its_reward(store: RunStore, clock: Clock) -> None:
    desk = make_coordinator(store, make_settings(max_attempts=1), clock)
    publish(store, desk, 0)
    lease = desk.ask_rollout("rollout.0")
    assert isinstance(lease, RolloutLease)
    roll_out(store, desk, lease)
    (scoring,) = ask(desk)
    desk.return_scoring(scoring.lease_id, "")
    for _ in range(3):
        lease = desk.ask_rollout("rollout.0")
        assert isinstance(lease, RolloutLease)
        desk.fail_rollout(lease.lease_id, "out of memory")
    with pytest.raises(GateError, match=r"gate drops: 3 of the last 4 .*out of memory") as caught:
        desk.tick().raise_if_failed()
    assert "last error" not in caught.value.message


@pytest.mark.parametrize(
    ("values", "rule"),
    [
        ({"deadline_s": 0}, "greater than 0"), ({"deadline_s": float("inf")}, "finite"), ({"retries": -1}, "retries"),
        ({"on_failure": "ignore"}, "retry"), ({"micro_batch": 0}, "micro_batch"), ({"breaker_failures": 0}, "breaker_failures"),
        ({"sample_every": 2}, "sample_every=2 leaves groups unscored"), ({"num_gpus": 1.5}, "whole number"), ({"num_gpus": -1}, "num_gpus"),
        ({"env": "htpp"}, "path of a Python"), ({"deadline": 3}, "nearest key is 'deadline_s'"),
    ],
)  # fmt: skip
def test_a_wrong_serving_key_is_a_config_error(values: dict[str, object], rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        parse(RewardConfig, {"name": "ocr_strict", **values}, "test")


def test_serving_keys_reach_the_ledger_and_the_reservation() -> None:
    config = load_config(
        "tiny-geneval",
        ["reward.1.use=watch", "reward.1.sample_every=8", "reward.0.breaker_limit_s=77", "reward.1.num_gpus=0.25", "cluster.reward_gpus=1",
         "reward.1.env=\"/opt/ocr/bin/python\""],
    )  # fmt: skip
    first, second = reward_specs(config)
    assert (first.breaker_limit_s, first.sample_every, second.sample_every) == (77.0, 1, 8)
    assert [server_gpus(config, reward) for reward in config.reward] == [1.0, 0.25]


def test_a_server_whose_scorer_hangs_is_started_again_and_five_times_in_a_row_stop_the_run_by_the_guard() -> None:
    book, now = FleetBook(FleetLimits(start_timeout_s=30.0, drain_timeout_s=20.0)), 0.0
    for _ in range(4):
        book.started("reward.r.0", now)
        book.became_ready("reward.r.0", now)
        assert "it is started again" in book.ended("reward.r.0", SlotEnd.HUNG, "deadline", now + 60.0)
        now += 100.0
    book.started("reward.r.0", now)
    with pytest.raises(GateError, match=r"gate reward: reward\.r\.0: ended 5 times in a row"):
        book.ended("reward.r.0", SlotEnd.HUNG, "deadline", now)
