"""What a Coordinator shows at /metrics: learning and pipeline in closed form, from real files; restarts and replays; a store that is away."""

from pathlib import Path

import pytest

from common.errors import StoreError
from common.store.ending import EndKind
from common.store.run_store import RunStore
from common.types import Stop, Wait
from tests.metric_pages import asked, family, finish, learner_record, leased, put_manifest, shown
from tests.sensor_runs import write_record
from tests.store_fixtures import (
    Clock,
    learn,
    make_coordinator,
    make_settings,
    publish,
    roll_out,
    run_to_end,
    work,
)


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return RunStore(str(tmp_path / "run"))


@pytest.fixture
def clock() -> Clock:
    return Clock()


# ---- learning


def test_the_newest_updates_record_becomes_the_learning_gauges(store: RunStore, clock: Clock) -> None:
    desk = make_coordinator(store, make_settings(), clock)
    values = {
        "loss": -0.5, "grad_norm": 2.0, "learning_rate": 1e-3, "advantage_abs_mean": 0.8, "ratio_mean": 1.01, "ratio_min": 0.5, "ratio_max": 2.0,
        "clip_fraction": 0.3, "clip_fraction_up": 0.1, "clip_fraction_down": 0.2, "kl": 0.01, "kl_exact": 0.02, "approx_kl": 0.03,
        "mismatch_abs_dlogp": 1e-6, "fm_error": None,
    }  # fmt: skip
    finish(store, desk, 1, learner_record(1, **values))
    value = shown(desk)
    assert [value(name) for name in ("loss", "gradient_norm", "learning_rate", "advantage_abs_mean")] == [-0.5, 2.0, 1e-3, 0.8]
    assert [value(f"policy_ratio_{end}") for end in ("mean", "min", "max")] == [1.01, 0.5, 2.0]
    assert family(desk, "clipped_ratio") == {("up",): 0.1, ("down",): 0.2}
    assert family(desk, "kl") == {("kl",): 0.01, ("kl_exact",): 0.02, ("approx_kl",): 0.03}
    assert family(desk, "objective_value") == {("clip_fraction",): 0.3, ("mismatch_abs_dlogp",): 1e-6}
    assert (value("reward_mean", reward="r"), value("reward_group_std", reward="r"), value("reward_flat_ratio", reward="r")) == (
        0.25,
        0.1,
        0.0,
    )
    assert (value("weighted_reward"), value("flat_groups_ratio"), value("update")) == (0.75, 0.125, 1.0)


def test_counters_take_each_update_once_and_values_that_are_gone_leave(store: RunStore, clock: Clock) -> None:
    desk = make_coordinator(store, make_settings(), clock)
    value = shown(desk)
    assert (value("optimizer_steps_total"), value("skipped_steps_total")) == (0.0, 0.0)  # there before the first update
    finish(store, desk, 1, learner_record(1, loss=1.0, kl=0.5, ratio_mean=1.0, extra=3.0))
    desk.finish_update(1, {})  # its answer was lost
    desk.tick()
    finish(store, desk, 2, learner_record(2, loss=None))
    assert (value("optimizer_steps_total"), value("skipped_steps_total"), value("images_consumed_total")) == (4.0, 2.0, 32.0)
    found = family(desk, "phase_seconds_total")
    assert {phase: seconds for (role, phase), seconds in found.items() if role == "learner"} == {
        "wait": 2,
        "read": 1,
        "learn": 8,
        "save": 0.5,
    }
    assert (value("loss"), value("policy_ratio_mean"), family(desk, "kl"), family(desk, "objective_value")) == (None, None, {}, {})
    assert value("reward_mean", reward="r") == 0.5


def test_an_objective_shows_at_most_64_values_of_its_own(store: RunStore, clock: Clock) -> None:
    desk = make_coordinator(store, make_settings(), clock)
    finish(store, desk, 1, learner_record(1, **{f"value_{index:03d}": float(index) for index in range(100)}))
    assert family(desk, "objective_value") == {(f"value_{index:03d}",): float(index) for index in range(64)}


def test_after_a_restart_the_newest_record_is_there_at_once_and_counters_begin_anew(store: RunStore, clock: Clock) -> None:
    first = make_coordinator(store, make_settings(), clock)
    publish(store, first, 0)
    for update in (1, 2):
        for _ in work(store, first):
            pass
        write_record(store, learner_record(update, loss=float(update)))
        learn(store, first, update)
    again = make_coordinator(store, make_settings(), clock, incarnation=2)
    again.tick()
    value = shown(again)
    assert (value("loss"), value("update"), value("policy_version"), value("reward_mean", reward="r")) == (2.0, 2.0, 2.0, 0.5)
    assert (value("optimizer_steps_total"), value("images_consumed_total")) == (0.0, 0.0)
    assert (value("groups_issued_total"), value("groups_consumed_total")) == (0.0, 0.0)  # the ledger's own are 6 and 4
    assert value("group_staleness_updates_count") == 0.0  # histograms begin anew too
    finish(store, again, 2, learner_record(2, incarnation=2, loss=22.0))  # it is replayed: the later incarnation's record is the one
    assert (value("loss"), value("optimizer_steps_total")) == (22.0, 2.0)


def test_a_replay_of_older_updates_counts_and_does_not_hide_the_newest(store: RunStore, clock: Clock) -> None:
    first = make_coordinator(store, make_settings(), clock)
    publish(store, first, 0)
    for update in (1, 2):
        for _ in work(store, first):
            pass
        write_record(store, learner_record(update, loss=float(update)))
        learn(store, first, update)
    again = make_coordinator(store, make_settings(), clock, incarnation=2)
    again.tick()
    finish(store, again, 1, learner_record(1, incarnation=2, loss=11.0))
    value = shown(again)
    assert (value("loss"), value("optimizer_steps_total"), value("update")) == (2.0, 2.0, 2.0)


def test_a_damaged_record_is_said_and_left_out(store: RunStore, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    desk = make_coordinator(store, make_settings(), clock)
    finish(store, desk, 1, {name: found for name, found in learner_record(1, loss=1.0).items() if name != "images"})
    assert "the metrics record of update 1 is not shown: KeyError('images')" in caplog.text
    finish(store, desk, 2, learner_record(2, loss=2.0))
    assert shown(desk)("loss") == 2.0


# ---- pipeline


def test_a_whole_runs_groups_and_staleness_are_those_of_its_manifests(store: RunStore, clock: Clock) -> None:
    desk = make_coordinator(store, make_settings(), clock)
    run_to_end(store, desk)
    clock.now += 7.0
    desk.tick()
    value = shown(desk)
    assert family(desk, "groups") == {
        (name,): 6.0 * (name == "batched") for name in ("waiting", "leased", "generated", "ready", "batched", "dropped")
    }
    assert (value("groups_issued_total"), value("groups_consumed_total"), value("conservation_error_groups")) == (6.0, 6.0, 0.0)
    buckets = {end: value("group_staleness_updates_bucket", le=end) for end in ("0.0", "1.0", "+Inf")}
    assert buckets == {"0.0": 2.0, "1.0": 6.0, "+Inf": 6.0}  # update 1: 0, 0; updates 2 and 3: 1, 1
    assert desk.next_manifest(2) == desk.next_manifest(2)  # a learner that reads it again
    assert value("group_staleness_updates_count") == 6.0
    assert (value("update"), value("updates_planned"), value("policy_version"), value("max_staleness_updates")) == (3.0, 3.0, 3.0, 1.0)
    assert (value("idle_seconds"), value("stall_timeout_seconds")) == (7.0, 900.0)
    assert family(desk, "groups_dropped_total") == {(name,): 0.0 for name in ("stale", "attempts", "too_few_scores", "flat")}


def test_drops_failed_and_expired_leases_are_counted_by_reason_and_role(store: RunStore, clock: Clock) -> None:
    desk = make_coordinator(store, make_settings(max_attempts=2), clock)
    publish(store, desk, 0)
    first = leased(desk)
    desk.fail_rollout(first.lease_id, "out of memory")
    desk.fail_rollout(first.lease_id, "out of memory")  # its answer was lost
    again = leased(desk)
    assert again.number == first.number
    clock.now += 31.0  # silent for longer than lease_timeout_s
    desk.tick()
    value = shown(desk)
    assert (value("leases_failed_total", role="rollout"), value("leases_failed_total", role="reward")) == (1.0, 0.0)
    assert (value("leases_expired_total"), value("groups_dropped_total", reason="attempts")) == (1.0, 1.0)
    roll_out(store, desk, leased(desk))
    (scoring,) = asked(desk, "reward.r.0", "r")
    desk.fail_scoring(scoring.lease_id, "engine died")
    desk.tick()
    assert value("leases_failed_total", role="reward") == 1.0


def test_who_waits_is_a_share_of_the_last_minute_by_role_and_slot(store: RunStore, clock: Clock) -> None:
    desk = make_coordinator(store, make_settings(), clock)
    start = clock.now
    while clock.now < start + 30.0:
        answer = desk.ask_rollout("rollout.0")
        desk.next_manifest(1)
        clock.now += answer.seconds  # type: ignore[union-attr]
    desk.tick()
    value = shown(desk)
    assert value("idle_ratio", role="rollout") == pytest.approx(1.0)
    assert value("slot_idle_ratio", slot="rollout.0") == pytest.approx(1.0)
    assert value("learner_wait_seconds") == pytest.approx(30.0, abs=0.5)  # asked first at the start


def test_the_store_shows_its_bytes_its_limit_and_the_age_of_the_learners_state(store: RunStore, clock: Clock, tmp_path: Path) -> None:
    desk = make_coordinator(store, make_settings(), clock)
    publish(store, desk, 0)
    for update in (1, 2):
        for _ in work(store, desk):
            pass
        learn(store, desk, update, saves_state=update == 1)
    desk.tick()
    value = shown(desk)
    for kind in ("groups", "policy", "learner"):
        assert value("store_bytes", kind=kind) == sum(store.sizes(kind).values()) > 0
    assert value("store_bytes", kind="other") > 0  # type: ignore[operator]
    assert (value("learner_state_age_updates"), value("learner_state_every_updates"), value("store_up")) == (1.0, 1.0, 1.0)
    assert value("store_limit_bytes") == 8e9


def test_a_store_that_is_away_is_shown_as_down_until_it_answers_again(clock: Clock, tmp_path: Path) -> None:
    is_away = False

    def hook(stage: str, path: str) -> None:
        if is_away:
            raise OSError(5, "Input/output error")

    store = RunStore(str(tmp_path / "run"), hook=hook)
    desk = make_coordinator(store, make_settings(), clock)
    publish(store, desk, 0)
    desk.tick()
    value = shown(desk)
    assert value("store_up") == 1.0
    is_away, clock.now = True, clock.now + 3.0
    desk.tick()
    assert value("store_up") == 0.0
    is_away, clock.now = False, clock.now + 3.0
    desk.tick()
    assert value("store_up") == 1.0


class ListingStore(RunStore):
    """Counts listings."""

    num_listings = 0

    def list(self, prefix: str = "") -> list[str]:
        self.num_listings += 1
        return super().list(prefix)

    def sizes(self, prefix: str = "") -> dict[str, int]:
        self.num_listings += 1
        return dict(super().sizes(prefix))


def test_a_tick_lists_no_directory(clock: Clock, tmp_path: Path) -> None:
    store = ListingStore(str(tmp_path / "run"))
    desk = make_coordinator(store, make_settings(), clock)
    run_to_end(store, desk)
    desk.tick()  # the first one looks at what earlier incarnations left
    write_record(store, learner_record(3, loss=1.0))
    before = store.num_listings
    for _ in range(5):
        clock.now += 3.0
        desk.tick()
    assert store.num_listings == before


def test_a_store_error_in_a_tick_leaves_the_page_standing(clock: Clock, tmp_path: Path) -> None:
    store = RunStore(str(tmp_path / "run"))
    desk = make_coordinator(store, make_settings(), clock)
    finish(store, desk, 1, learner_record(1, loss=1.0))
    put_manifest(store, 2)
    original = store.exists

    def refuse(path: str) -> bool:
        raise StoreError(f"RunStore.exists: {path}: away")

    store.exists = refuse  # type: ignore[method-assign]
    desk.finish_update(2, {})
    desk.tick()
    assert (shown(desk)("loss"), shown(desk)("store_up")) == (1.0, 0.0)
    store.exists = original  # type: ignore[method-assign]
    write_record(store, learner_record(2, loss=2.0))
    clock.now += 3.0
    desk.tick()
    assert (shown(desk)("loss"), shown(desk)("store_up")) == (2.0, 1.0)


def test_a_ledger_that_lost_count_is_shown_and_ends_the_run(store: RunStore, clock: Clock) -> None:
    desk = make_coordinator(store, make_settings(), clock)
    publish(store, desk, 0)
    assert not isinstance(desk.ask_rollout("rollout.0"), Wait | Stop)
    desk.tick()
    assert shown(desk)("conservation_error_groups") == 0.0 and not desk.outcome().is_over
    desk._ledger._next_number += 1  # a number that is in no state
    outcome = desk.tick()
    assert shown(desk)("conservation_error_groups") == 1.0
    assert (outcome.kind, outcome.gate) == (EndKind.GUARD, "conservation") and "lost count of 1 groups" in outcome.reason
