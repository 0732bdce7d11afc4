"""What counts as a stall: a slow update does not, a learner that hangs and a reward that tells nothing apart do."""

from collections.abc import Callable
from pathlib import Path

import pytest

from common.errors import GateError
from common.gauges import PROCESS_MARK
from common.heartbeat import MICRO_BATCHES
from common.store.coordinator import Coordinator
from common.store.ending import EndKind
from common.store.groups import write_scores
from common.store.run_store import RunStore
from common.types import Manifest, RolloutLease, Score, ScoreFile, ScoringLease
from tests.store_fixtures import Clock, make_coordinator, make_settings, publish, roll_out, work

STALL_S = 100.0


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return RunStore(str(tmp_path / "run"))


@pytest.fixture
def clock() -> Clock:
    return Clock()


# ---- a slow update


def learning(store: RunStore, clock: Clock) -> Coordinator:
    """A Coordinator whose learner has just got its first manifest; nobody else has anything to do."""
    desk = make_coordinator(store, make_settings(stall_timeout_s=STALL_S), clock)
    publish(store, desk, 0)
    for _ in work(store, desk):
        pass
    assert isinstance(desk.next_manifest(1), Manifest)
    return desk


def beat_for(desk: Coordinator, clock: Clock, seconds: float, num_learnt: Callable[[float], float], mark: float = 1.0) -> EndKind:
    """Beats of the learner every 5 s; num_learnt: seconds -> micro-batches since its process began."""
    started = clock.now
    while clock.now < started + seconds:
        desk.beat("learner", [], {PROCESS_MARK: mark, MICRO_BATCHES: num_learnt(clock.now - started)})
        desk.tick()
        clock.now += 5.0
    return desk.tick().kind


def test_an_update_that_takes_longer_than_the_stall_timeout_is_no_stall_while_its_micro_batches_go_on(
    store: RunStore, clock: Clock
) -> None:
    desk = learning(store, clock)
    assert beat_for(desk, clock, 10 * STALL_S, lambda seconds: seconds // 30) is EndKind.RUNNING
    publish(store, desk, 1)
    assert desk.tick().kind is EndKind.RUNNING


def test_a_learner_that_beats_and_computes_nothing_is_a_stall(store: RunStore, clock: Clock) -> None:
    desk = learning(store, clock)
    assert beat_for(desk, clock, STALL_S + 10.0, lambda _: 7.0) is EndKind.STALL
    assert "the learner works on update 1" in desk.outcome().reason


def test_a_learner_that_hangs_in_mid_update_is_a_stall_after_its_last_micro_batch(store: RunStore, clock: Clock) -> None:
    desk = learning(store, clock)
    assert beat_for(desk, clock, 3 * STALL_S, lambda seconds: min(seconds // 30, 4)) is EndKind.STALL


def test_late_beats_of_a_dead_learner_process_are_no_progress(store: RunStore, clock: Clock) -> None:
    desk = learning(store, clock)
    beat_for(desk, clock, 10.0, lambda _: 50.0, mark=1.0)
    for _ in range(30):  # the next process hangs at once; beats of the first still arrive
        beat_for(desk, clock, 5.0, lambda _: 0.0, mark=2.0)
        beat_for(desk, clock, 5.0, lambda _: 50.0, mark=1.0)
    assert desk.outcome().kind is EndKind.STALL


# ---- a reward that tells nothing apart


def file_scores(store: RunStore, desk: Coordinator, lease: ScoringLease, values: tuple[float, ...]) -> None:
    """Commit K scores of a group."""
    scores = tuple(Score(sample_index=index, value=value) for index, value in enumerate(values))
    file = ScoreFile(run="test", number=lease.number, lease_id=lease.group_lease_id, reward="r", scorer_version="1", scores=scores)
    desk.commit_scores(lease.lease_id, write_scores(store, file, directory=""))


def train_for(store: RunStore, desk: Coordinator, clock: Clock, seconds: float, spread: Callable[[int], float]) -> EndKind:
    """A worker and a server that never fail, one group every 5 s; spread: number -> how far its scores lie apart."""
    started, update = clock.now, 1
    while clock.now < started + seconds and not desk.outcome().is_over:
        lease = desk.ask_rollout("rollout.0")
        if isinstance(lease, RolloutLease):
            roll_out(store, desk, lease)
        scoring = desk.ask_scoring("reward.r.0", "r", 9)
        for each in scoring if isinstance(scoring, tuple) else ():
            file_scores(store, desk, each, (1.0, 1.0, 1.0, 1.0 + spread(each.number)))
        if isinstance(desk.next_manifest(update), Manifest):
            publish(store, desk, update)
            update += 1
        desk.tick()
        clock.now += 5.0
    return desk.outcome().kind


def replacing(store: RunStore, clock: Clock, time_limit_s: float | None = None) -> Coordinator:
    """A Coordinator that replaces flat groups, with version 0."""
    settings = make_settings(num_updates=50, replace_flat_groups=True, stall_timeout_s=STALL_S, time_limit_s=time_limit_s)
    desk = make_coordinator(store, settings, clock)
    publish(store, desk, 0)
    return desk


def test_a_saturated_reward_whose_flat_groups_are_replaced_ends_the_run_by_name(store: RunStore, clock: Clock) -> None:
    desk = replacing(store, clock)
    started = clock.now
    assert train_for(store, desk, clock, 10 * STALL_S, lambda _: 0.0) is EndKind.GUARD
    assert STALL_S < clock.now - started <= STALL_S + 15.0
    with pytest.raises(
        GateError, match=r"groups in a row were dropped as flat .* saturated or constant.*replace_flat_groups = false"
    ) as caught:
        desk.outcome().raise_if_failed()
    assert caught.value.name == "flat"


def test_flat_groups_among_others_never_end_a_run(store: RunStore, clock: Clock) -> None:
    assert train_for(store, replacing(store, clock), clock, 5 * STALL_S, lambda number: 0.5 * (number % 8 == 0)) is EndKind.RUNNING


def test_a_group_that_can_train_keeps_a_run_alive_though_all_others_are_flat(store: RunStore, clock: Clock) -> None:
    assert train_for(store, replacing(store, clock), clock, 3 * STALL_S, lambda number: 0.5 * (number == 3)) is EndKind.RUNNING


def test_flat_groups_during_the_last_evaluation_end_nothing(store: RunStore, clock: Clock) -> None:
    desk = replacing(store, clock, time_limit_s=50.0)
    assert train_for(store, desk, clock, 45.0, lambda _: 0.0) is EndKind.RUNNING
    clock.now += 10.0 + STALL_S
    desk.tick()
    assert desk.outcome().kind is not EndKind.GUARD
