"""What a Coordinator shows at /metrics of rewards, evaluations and slots that come and go, and how many series there are."""

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import generate_latest

from common.errors import GateError
from common.gauges import PROCESS_MARK, Gauges
from common.store.coordinator import Coordinator, CoordinatorSettings
from common.store.directive import SlotReport
from common.store.ledger_entries import RewardSpec
from common.store.run_store import RunStore
from common.types import LoadReceipt, Prompt, RolloutLease, Score
from deploy.monitoring.metric_page import MAX_SERIES
from tests.metric_pages import asked, commit, family, finish, leased, report, shown
from tests.sensor_runs import record
from tests.store_fixtures import (
    Clock,
    learn,
    make_coordinator,
    make_settings,
    publish,
    roll_out,
    score,
    work,
)


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return RunStore(str(tmp_path / "run"))


@pytest.fixture
def clock() -> Clock:
    return Clock()


# ---- rewards


def test_score_files_become_images_nulls_by_reason_and_latency_once_a_file(store: RunStore, clock: Clock) -> None:
    desk = make_coordinator(store, make_settings(), clock)
    publish(store, desk, 0)
    roll_out(store, desk, leased(desk))
    (lease,) = asked(desk, "reward.r.0", "r")
    commit(store, desk, lease, [
        Score(sample_index=0, value=0.5, latency_s=0.5),
        Score(sample_index=1, value=None, error="deadline: scorer r did not answer", latency_s=2.0),
        Score(sample_index=2, value=None, error="not applicable"),
        Score(sample_index=3, value=None, error="ConnectionError: no route to 10.0.0.7"),
    ])  # fmt: skip
    desk.tick()
    value = shown(desk)
    assert value("reward_images_total", reward="r") == 3.0
    assert family(desk, "reward_null_scores_total") == {("r", "deadline"): 1.0, ("r", "ConnectionError"): 1.0}
    assert (value("reward_latency_seconds_count", reward="r"), value("reward_latency_seconds_sum", reward="r")) == (2.0, 2.5)
    assert value("reward_latency_seconds_bucket", reward="r", le="1.0") == 1.0
    assert value("reward_coverage_ratio", reward="r") == pytest.approx(1 / 3)


def test_a_reward_has_at_most_16_reasons_and_then_other(store: RunStore, clock: Clock) -> None:
    rewards = (RewardSpec(name="r"), RewardSpec(name="w", use="watch"))  # nulls of a watch reward drop nothing
    desk = make_coordinator(store, make_settings(num_updates=40, max_staleness=20, rewards=rewards), clock)
    publish(store, desk, 0)
    for index in range(20):
        roll_out(store, desk, leased(desk))
        (lease,) = asked(desk, "reward.w.0", "w")
        errors = [f"engine {index} died with a very long story of {word} that does not end" for word in "abcd"]
        commit(store, desk, lease, [Score(sample_index=place, value=None, error=error) for place, error in enumerate(errors)])
    found = family(desk, "reward_null_scores_total")
    assert len(found) == 17
    assert found["w", "engine 0 died with a very"] == 4.0
    assert found["w", "other"] == 16.0  # of the last four groups


def test_backlog_pool_and_calls_of_a_reward(store: RunStore, clock: Clock) -> None:
    desk = make_coordinator(store, make_settings(), clock)
    publish(store, desk, 0)
    for _ in range(2):
        roll_out(store, desk, leased(desk))
    (first, _) = asked(desk, "reward.r.0", "r")
    score(store, desk, first)
    desk.beat("reward.r.0", [], {"breaker_open": 1.0, "calls_total": 3.0, "score_seconds_total": 2.0})
    desk.tick()
    value = shown(desk)
    assert (value("reward_backlog_groups", reward="r"), value("reward_pool_down", reward="r")) == (1.0, 1.0)
    assert (value("reward_calls_total", reward="r"), value("phase_seconds_total", role="reward", phase="score")) == (3.0, 2.0)


# ---- evaluation

EVALUATED = tuple(Prompt(id=f"e{index}", text=f"picture {index}", metadata={"tag": "ab"[index % 2]}) for index in range(4))


def test_evaluations_are_shown_by_task_beside_the_base_and_after_a_restart_too(store: RunStore, clock: Clock) -> None:
    """Image i of a sheet scores i / 8, and a sheet holds one prompt of each task: a 0, b 1/8, all 1/16."""
    settings = make_settings(num_updates=2, every=1, eval_prompts=EVALUATED)
    desk = make_coordinator(store, settings, clock)
    publish(store, desk, 0)
    desk.tick()
    assert shown(desk)("evaluations_pending") == 1.0
    for update in (1, 2):
        for _ in work(store, desk):
            pass
        learn(store, desk, update)
    for _ in work(store, desk):
        pass
    for found in (desk, make_coordinator(store, settings, clock, incarnation=2)):
        found.tick()
        assert family(found, "evaluation_score") == {("r", "a", "ema"): 0.0, ("r", "b", "ema"): 0.125, ("r", "all", "ema"): 0.0625}
        assert family(found, "evaluation_base_score") == {("r", "a"): 0.0, ("r", "b"): 0.125, ("r", "all"): 0.0625}
        assert (shown(found)("evaluation_version", snapshot="ema"), shown(found)("evaluations_pending")) == (2.0, 0.0)


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (lambda result: result["rewards"]["r"].pop("tasks"), "KeyError('tasks')"),
        (lambda result: result["rewards"]["r"].pop("mean"), "KeyError('mean')"),
        (lambda result: result["rewards"]["r"].update(mean="high"), "ValueError"),
        (lambda result: result.update(version="newest"), "TypeError"),
        (lambda result: result.update(rewards=[]), "AttributeError"),
    ],
    ids=["no tasks", "no mean", "a mean in words", "a version in words", "a list of rewards"],
)
def test_a_result_that_lacks_its_tables_is_said_once_and_keeps_no_coordinator_from_starting(
    store: RunStore, clock: Clock, tmp_path: Path, caplog: pytest.LogCaptureFixture, spoil: Callable[[dict[str, Any]], object], error: str
) -> None:
    settings = make_settings(num_updates=2, every=1, eval_prompts=EVALUATED)
    desk = make_coordinator(store, settings, clock)
    publish(store, desk, 0)
    for _ in work(store, desk):
        pass
    (path,) = (tmp_path / "run").rglob("result.json")
    result = json.loads(path.read_text(encoding="utf-8"))
    spoil(result)
    path.write_text(json.dumps(result), encoding="utf-8")
    with caplog.at_level(logging.WARNING, logger="flowfleet"):
        again = make_coordinator(store, settings, clock, incarnation=2)
    again.tick()
    assert family(again, "evaluation_score") == family(again, "evaluation_base_score") == {}
    (line,) = [message for message in caplog.messages if "is not shown" in message]
    assert path.parent.name in line
    assert error in line


# ---- fleet


def heard_images(desk: Coordinator, mark: float, images: float) -> float | None:
    """What rollout.0 is shown to have made, after a beat of its process with this mark and total."""
    desk.beat("rollout.0", [], {PROCESS_MARK: mark, "images_total": images})
    return shown(desk)("rollout_images_total", slot="rollout.0")


def test_a_slots_restart_resets_its_totals_and_a_late_beat_counts_nothing(store: RunStore, clock: Clock) -> None:
    desk = make_coordinator(store, make_settings(), clock)
    value = shown(desk)

    def beat(mark: float, images: float, seconds: float) -> float | None:
        totals = {PROCESS_MARK: mark, "images_total": images, "sampling_seconds_total": seconds, "waiting_seconds_total": 1.0}
        desk.beat("rollout.0", [], totals)
        return value("rollout_images_total", slot="rollout.0")

    assert beat(1.0, 16.0, 4.0) == 16.0
    assert beat(1.0, 32.0, 8.0) == 32.0
    assert beat(1.0, 16.0, 4.0) == 32.0  # it was on its way for long
    assert beat(1.0, 48.0, 12.0) == 48.0
    assert beat(2.0, 8.0, 2.0) == 56.0  # another process
    assert beat(2.0, 64.0, 16.0) == 112.0  # more than the first ever had
    assert value("phase_seconds_total", role="rollout", phase="sampling") == 28.0
    assert value("phase_seconds_total", role="rollout", phase="waiting") == 2.0  # once a process
    assert value("phase_seconds_total", role="rollout", phase="decoding") == 0.0


def test_a_late_beat_of_a_dead_process_counts_nothing_twice(store: RunStore, clock: Clock) -> None:
    desk = make_coordinator(store, make_settings(), clock)
    assert heard_images(desk, 1.0, 100.0) == 100.0
    assert heard_images(desk, 2.0, 4.0) == 104.0
    assert heard_images(desk, 1.0, 100.0) == 104.0  # it was on its way when its process died
    assert heard_images(desk, 2.0, 8.0) == 108.0
    assert heard_images(desk, 1.0, 103.0) == 111.0  # the dead one's last word: 3 images that nobody had heard of
    assert heard_images(desk, 2.0, 8.0) == 111.0


def test_a_dead_process_first_heard_of_after_its_successor_leaves_that_one_its_count(store: RunStore, clock: Clock) -> None:
    desk = make_coordinator(store, make_settings(), clock)
    assert heard_images(desk, 2.0, 4.0) == 4.0
    assert heard_images(desk, 1.0, 16.0) == 20.0
    assert heard_images(desk, 2.0, 8.0) == 24.0


def test_every_process_of_a_slot_that_crashes_on_and_on_is_counted_once(store: RunStore, clock: Clock) -> None:
    """Each of 20 makes 7 images, and is heard for the last time after its successor; no more processes are kept than may be late."""
    desk = make_coordinator(store, make_settings(), clock)
    for process in range(1, 21):
        heard_images(desk, float(process), 3.0)
        if process > 1:
            heard_images(desk, process - 1.0, 7.0)
    assert heard_images(desk, 20.0, 7.0) == 140.0
    assert heard_images(desk, 1.0, 7.0) == 147.0  # so late that it is forgotten


def test_a_restarted_coordinator_does_not_count_again_what_older_processes_did(store: RunStore, clock: Clock) -> None:
    first = make_coordinator(store, make_settings(), clock)
    publish(store, first, 0)
    roll_out(store, first, leased(first))
    again = make_coordinator(store, make_settings(), clock)
    for images in (1000.0, 1016.0):
        again.beat("rollout.0", [], {PROCESS_MARK: 1.0, "images_total": images})
    assert shown(again)("rollout_images_total", slot="rollout.0") == 16.0


def test_every_process_marks_its_totals_with_a_number_of_its_own() -> None:
    first, second = Gauges(), Gauges()
    assert first.snapshot()[PROCESS_MARK] == first.snapshot()[PROCESS_MARK] != second.snapshot()[PROCESS_MARK]


def test_slots_by_role_and_state_and_crashes_follow_the_drivers_reports(store: RunStore, clock: Clock) -> None:
    desk = make_coordinator(store, make_settings(), clock)
    running, rests = SlotReport(state="running"), SlotReport(state="resting", crashes=1)
    steps = [
        ({"rollout.0": running, "rollout.1": rests}, 0),  # what was before is not counted
        ({"rollout.0": rests, "rollout.1": running}, 1),
        ({"rollout.0": SlotReport(state="starting", crashes=1)}, 1),
        ({"rollout.0": SlotReport(state="resting", crashes=2)}, 2),
        ({"rollout.0": SlotReport(state="resting", crashes=3)}, 3),  # it was started and crashed between two reports
        ({"rollout.0": running}, 3),  # it worked: the crashes in a row are over
        ({"rollout.0": rests}, 4),
    ]
    for slots, crashes in steps:
        desk.tick(report(slots, rollout=2))
        assert shown(desk)("slot_crashes_total", role="rollout") == crashes, slots
    desk.tick(
        report({"rollout.0": running, "rollout.1": SlotReport(state="draining"), "reward.r.0": running, "learner": running}, rollout=1)
    )
    found = {labels for labels, number in family(desk, "slots").items() if number == 1}
    assert found == {("rollout", "running"), ("rollout", "draining"), ("reward", "running"), ("learner", "running")}
    assert len(family(desk, "slots")) == 12  # the others are there as 0
    assert family(desk, "slots_wanted") == {("rollout",): 1.0}


def test_a_slot_that_is_gone_for_good_takes_its_series_along(store: RunStore, clock: Clock) -> None:
    desk = make_coordinator(store, make_settings(), clock)
    running = SlotReport(state="running")
    slots = ("rollout.0", "rollout.1")
    for slot in slots:
        desk.beat(slot, [], {"images_total": 4.0})
        desk.ask_rollout(slot)
    desk.tick(report(dict.fromkeys(slots, running)))
    per_slot = ("rollout_images_total", "slot_idle_ratio", "slot_silent_seconds", "slot_refused")
    assert {name: set(family(desk, name)) for name in per_slot} == {name: {("rollout.0",), ("rollout.1",)} for name in per_slot}
    clock.now += 20.0
    desk.beat("rollout.0", [], {"images_total": 4.0})
    desk.tick(report({"rollout.0": running}))
    assert family(desk, "slot_silent_seconds") == {("rollout.0",): 0.0, ("rollout.1",): 20.0}  # it left a moment ago
    clock.now += 59.0
    desk.tick(report({"rollout.0": running}))
    assert {name: set(family(desk, name)) for name in per_slot} == {name: {("rollout.0",)} for name in per_slot}
    clock.now += 3600.0
    desk.tick(report({"rollout.0": running}))
    assert family(desk, "slot_silent_seconds") == {("rollout.0",): 3659.0}  # it hangs: the driver still has it
    assert "rollout.1" not in desk.summary()["gauges"]


def test_receipts_that_differ_are_counted_and_refuse_the_slot_until_one_agrees(store: RunStore, clock: Clock) -> None:
    desk = make_coordinator(store, make_settings(), clock)
    publication = publish(store, desk, 0)
    good = LoadReceipt(adapter=publication.adapter, snapshot="live", num_modules=1, canary=0.1)
    bad = LoadReceipt(adapter=publication.adapter, snapshot="live", num_modules=1, canary=9.0)
    for receipt, refused, version in ((bad, 1.0, None), (good, 0.0, 0.0)):
        if receipt is bad:
            with pytest.raises(GateError, match="canary"):
                desk.confirm_weights("rollout.0", receipt)
        else:
            desk.confirm_weights("rollout.0", receipt)
        desk.tick()
        value = shown(desk)
        assert value("slot_refused", slot="rollout.0") == refused
        assert value("slot_policy_version", slot="rollout.0") == version
        assert value("receipt_mismatches_total") == 1.0


# ---- how much there is


def crowded(store: RunStore, clock: Clock, settings: CoordinatorSettings) -> Iterator[Coordinator]:
    """64 workers, 3 rewards of 8 servers, 8 sensors, 6 tasks, every reason and value that there is room for."""
    desk = make_coordinator(store, settings, clock)
    publication = publish(store, desk, 0)
    names = [reward.name for reward in settings.rewards]
    workers = [f"rollout.{index}" for index in range(64)]
    servers = [(f"reward.{name}.{index}", name) for name in names for index in range(8)]
    for slot in workers:
        lease = desk.ask_rollout(slot)
        if isinstance(lease, RolloutLease) and slot < "rollout.2":
            roll_out(store, desk, lease)
        desk.confirm_weights(slot, LoadReceipt(adapter=publication.adapter, snapshot="live", num_modules=1, canary=0.1))
        desk.beat(slot, [], {"images_total": 1.0})
    for slot, name in servers:
        desk.ask_scoring(slot, name, 0)
        desk.beat(slot, [], {"calls_total": 1.0})
    for name in names:
        answer = desk.ask_scoring(f"reward.{name}.0", name, 99)
        for lease in answer if isinstance(answer, tuple) else ():
            nulls = [Score(sample_index=row, value=None, error=f"{name} {lease.number} {row}") for row in range(1, len(lease.prompts))]
            commit(store, desk, lease, [Score(sample_index=0, value=0.5), *nulls])
    states = dict.fromkeys([*workers, *(slot for slot, _ in servers), "learner"], SlotReport(state="running"))
    values = {f"value_{index}": 1.0 for index in range(100)} | {f"kl_{index}": 1.0 for index in range(8)}
    for update in (1, 2, 3):
        statistics = {f"statistic_{index}": 0.5 for index in range(8)}
        tables = record(update, dict.fromkeys(names, 0.5), statistics)
        finish(store, desk, update, tables | {"learner": {**values, "clip_fraction_up": 0.1, "clip_fraction_down": 0.1}})
    desk.tick(report(states, rollout=64, **{f"reward.{name}": 8 for name in names}))
    yield desk


def test_a_large_run_shows_fewer_than_2000_series(store: RunStore, clock: Clock) -> None:
    prompts = tuple(Prompt(id=f"t{index}", text=f"picture {index}", metadata={"tag": f"task_{index}"}) for index in range(6))
    rewards = tuple(RewardSpec(name=name) for name in ("a", "b", "c"))
    (desk,) = crowded(
        store, clock, make_settings(num_updates=60, max_staleness=25, rewards=rewards, eval_prompts=prompts, min_scored_share=0.25)
    )
    assert len(family(desk, "rollout_images_total")) == 64
    assert len(family(desk, "reward_null_scores_total")) == 3 * 17
    assert len(family(desk, "objective_value")) == 64
    assert len(family(desk, "evaluation_score")) == 0  # every score is null: no number
    lines = [line for line in generate_latest(desk.metrics.registry).decode().splitlines() if not line.startswith("#")]
    assert len(lines) + 3 * 7 * 2 < MAX_SERIES  # with the evaluation's series
    assert len(lines) > 600  # the crowd is there
