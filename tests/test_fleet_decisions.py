"""The fleet's decisions, without Ray: who starts, drains, rests and stops the run; where roles sit; when the autoscaler acts."""

import pytest

from common.errors import ConfigError, FlowfleetError
from common.store.control import ControlRequest
from deploy.autoscale import Autoscaler, AutoscaleSection, Waits, decide
from deploy.config import load_config
from deploy.fleet import FleetBook, FleetLimits, Phase, SlotEnd
from deploy.placement import Needs, NodeFacts, problems, role_of, seat
from deploy.wishes import configured_sizes, take_requests, waits_of

LIMITS = FleetLimits(start_timeout_s=30.0, drain_timeout_s=20.0)


def book_with(*slots: str, now: float = 0.0) -> FleetBook:
    """Every slot running since `now`."""
    book = FleetBook(LIMITS)
    for slot in slots:
        book.started(slot, now)
        book.became_ready(slot, now)
    return book


def test_a_first_look_starts_the_learner_before_all_others() -> None:
    orders = FleetBook(LIMITS).orders({"rollout": 2, "reward.ocr": 1, "learner": 1}, 0.0)
    assert orders.start == ("learner", "reward.ocr.0", "rollout.0", "rollout.1")
    assert (orders.drain, dict(orders.kill)) == ((), {})


def test_growing_takes_the_lowest_free_names_and_shrinking_the_highest() -> None:
    book = book_with("rollout.0", "rollout.2")
    assert book.orders({"rollout": 4}, 1.0).start == ("rollout.1", "rollout.3")
    assert book.orders({"rollout": 1}, 1.0).drain == ("rollout.2",)
    assert book.orders({"rollout": 2}, 1.0).start == book.orders({"rollout": 2}, 1.0).drain == ()


def test_a_drained_slot_keeps_its_name_until_it_left_and_is_killed_when_it_does_not() -> None:
    book = book_with("rollout.0", "rollout.1")
    assert book.draining("rollout.1", 5.0)
    assert book.drained() == {"rollout.1"}
    assert book.orders({"rollout": 2}, 6.0).start == ("rollout.2",)
    assert dict(book.orders({"rollout": 1}, 25.0).kill) == {}
    assert dict(book.orders({"rollout": 1}, 25.1).kill) == {"rollout.1": "it did not leave within 20 s"}
    assert book.ended("rollout.1", SlotEnd.LEFT, "", 26.0) == "rollout.1 left"
    assert book.orders({"rollout": 2}, 27.0).start == ("rollout.1",)


def test_a_drained_slot_that_is_killed_is_gone_and_not_replaced() -> None:
    book = book_with("rollout.0", "rollout.1")
    book.draining("rollout.1", 5.0)
    book.ended("rollout.1", SlotEnd.LOST, "kill -9", 6.0)
    assert book.orders({"rollout": 1}, 60.0).start == ()


def test_a_lost_process_rests_and_starts_again_under_its_name() -> None:
    book = book_with("learner", "rollout.0")
    assert book.ended("rollout.0", SlotEnd.LOST, "kill -9", 100.0) == "rollout.0 ended (kill -9); it is started again in 0.5 s"
    wanted = {"learner": 1, "rollout": 1}
    assert book.orders(wanted, 100.4).start == ()
    assert book.orders(wanted, 100.5).start == ("rollout.0",)


def test_fewer_wanted_removes_a_resting_slot_at_once_before_a_running_one() -> None:
    book = book_with("rollout.0", "rollout.1")
    book.ended("rollout.0", SlotEnd.LOST, "kill -9", 1.0)
    assert book.orders({"rollout": 1}, 9.0).drain == ("rollout.0",)
    assert not book.draining("rollout.0", 9.0)  # no process to wait for
    assert book.orders({"rollout": 1}, 9.0).start == ()


def crash(book: FleetBook, slot: str, times: int, *, kind: SlotEnd = SlotEnd.LOST, lived_s: float = 0.0, work: int = 0) -> list[float]:
    """Start and end a slot; return the rests."""
    rests, now = [], 1000.0
    for _ in range(times):
        book.started(slot, now, work=0)
        book.became_ready(slot, now)
        book.ended(slot, kind, "Segmentation fault", now + lived_s, work=work)
        rests.append(book.slots[slot].restart_at - now - lived_s)
        now = book.slots[slot].restart_at
    return rests


def test_the_fifth_crash_at_start_stops_the_run_with_its_cause() -> None:
    book = FleetBook(LIMITS)
    assert crash(book, "rollout.0", 4) == [0.5, 1.0, 2.0, 4.0]
    with pytest.raises(FlowfleetError, match=r"rollout\.0: ended 5 times in a row without doing any work.*Segmentation fault"):
        crash(book, "rollout.0", 1)


@pytest.mark.parametrize(
    ("kind", "lived_s", "work"),
    [
        (SlotEnd.LOST, 10.0, 0),  # killed in steady life: chaos, not a crash at start
        (SlotEnd.LOST, 0.0, 1),  # it worked before it was killed
        (SlotEnd.RAISED, 0.0, 1),
        (SlotEnd.STORE, 0.0, 0),  # the store's fault
    ],
)
def test_ends_that_are_no_crash_at_start_never_add_up(kind: SlotEnd, lived_s: float, work: int) -> None:
    book = FleetBook(LIMITS)
    crash(book, "rollout.0", 20, kind=kind, lived_s=lived_s, work=work)
    assert book.slots["rollout.0"].phase is Phase.RESTING


def test_a_learner_that_is_killed_in_every_update_ends_the_run_and_one_that_updates_between_does_not() -> None:
    """Its micro-batches keep the stall guard quiet, so nothing else would end a learner that runs out of memory in each update."""
    with pytest.raises(FlowfleetError, match="5 times in a row"):
        crash(FleetBook(LIMITS), "learner", 5, lived_s=500.0)
    book = FleetBook(LIMITS)
    crash(book, "learner", 20, lived_s=500.0, work=1)
    assert book.slots["learner"].phase is Phase.RESTING


def test_an_exception_without_work_counts_however_long_it_took() -> None:
    with pytest.raises(FlowfleetError, match="5 times in a row"):
        crash(FleetBook(LIMITS), "learner", 5, kind=SlotEnd.RAISED, lived_s=500.0)


def test_a_slot_that_overran_its_lease_hangs_until_it_is_started_again() -> None:
    book = book_with("rollout.0", "rollout.1")
    assert book.hanging({"rollout.1": 1}) == ["rollout.1"]
    book.started("rollout.1", 50.0, overruns=1)
    assert book.hanging({"rollout.1": 1}) == []
    assert book.hanging({"rollout.1": 2}) == ["rollout.1"]


def test_a_process_that_does_not_answer_is_late() -> None:
    book = FleetBook(LIMITS)
    book.started("learner", 0.0)
    assert book.late(30.0) == []
    assert [record.slot for record in book.late(30.1)] == ["learner"]


# ---- autoscale

BOUNDS = AutoscaleSection(enabled=True, min_rollout=1, max_rollout=4, max_reward=2, threshold=0.25, cooldown_s=90.0)
SIZES = {"rollout": 2, "reward.ocr": 1}


def waits(learner: float = 0.0, rollout: float = 0.0, reward: float = 0.0, backlog: int = 0) -> Waits:
    return Waits(learner=learner, rollout=rollout, rewards={"reward.ocr": reward}, backlog={"reward.ocr": backlog})


@pytest.mark.parametrize(
    ("seen", "sizes", "expected"),
    [
        (waits(learner=0.5), SIZES, ("rollout", 3)),
        (waits(learner=0.24), SIZES, None),  # below the threshold
        (waits(learner=0.5), {"rollout": 4, "reward.ocr": 1}, None),  # at the bound
        (waits(learner=0.5, backlog=1), SIZES, ("rollout", 3)),  # one group a server is on its way, not a queue
        (waits(learner=0.5, backlog=2), SIZES, ("reward.ocr", 2)),
        (waits(learner=0.5, backlog=9), {"rollout": 2, "reward.ocr": 2}, None),  # the queue's pool is at its bound
        (waits(rollout=0.6), SIZES, ("rollout", 1)),
        (waits(rollout=0.6), {"rollout": 1, "reward.ocr": 1}, None),
        (waits(learner=0.13, rollout=0.6), SIZES, None),  # above half the threshold: both wait, as in lockstep
        (waits(learner=0.2, reward=0.9), {"rollout": 2, "reward.ocr": 2}, ("reward.ocr", 1)),  # the other would be busy 20 %
        (waits(learner=0.2, reward=0.6), {"rollout": 2, "reward.ocr": 2}, None),  # 80 %: above 1 - threshold
        (waits(learner=0.2, reward=0.9, backlog=1), {"rollout": 2, "reward.ocr": 2}, None),
        (waits(), SIZES, None),
    ],
)
def test_autoscaling_acts_on_who_waits_by_one_step_inside_its_bounds(
    seen: Waits, sizes: dict[str, int], expected: tuple[str, int] | None
) -> None:
    decision = decide(seen, sizes, BOUNDS)
    assert (None if decision is None else (decision.pool, decision.size)) == expected
    if decision is not None:
        assert f"{decision.pool} {sizes[decision.pool]} -> {decision.size}" in decision.sentence


def test_autoscaling_says_why_in_a_sentence() -> None:
    decision = decide(waits(learner=0.5, backlog=3), SIZES, BOUNDS)
    assert decision is not None
    assert decision.sentence == "autoscale: the learner waited 50% of the last minute, and 3 groups wait for reward.ocr: reward.ocr 1 -> 2"


def test_autoscaling_cools_down_after_every_change_and_is_off_by_default() -> None:
    scaler = Autoscaler(BOUNDS, now=0.0)
    assert scaler.ask(waits(learner=0.9), SIZES, 89.9) is None
    assert scaler.ask(waits(learner=0.9), SIZES, 90.0) is not None
    scaler.changed(90.0)
    assert scaler.ask(waits(learner=0.9), SIZES, 179.9) is None
    assert Autoscaler(AutoscaleSection(), now=0.0).ask(waits(learner=0.9), SIZES, 1e9) is None


def test_bounds_that_cross_are_refused() -> None:
    with pytest.raises(ConfigError, match="a minimum lies above its maximum"):
        load_config("tiny-geneval", ["autoscale.min_rollout=9"])


# ---- placement

GPU_NODE = NodeFacts(node_id="gpu", resources={"CPU": 8.0, "GPU": 2.0})
CPU_A, CPU_B = (NodeFacts(node_id=name, resources={"CPU": 4.0}) for name in ("cpu-a", "cpu-b"))
REWARD = Needs(role="reward", num_cpus=1.0, num_gpus=0.0)


def test_rewards_go_to_the_emptiest_node_without_a_gpu() -> None:
    nodes = [GPU_NODE, CPU_B, CPU_A]
    assert seat(REWARD, nodes, {}).node_id == "cpu-a"
    assert seat(REWARD, nodes, {"cpu-a": 1}).node_id == "cpu-b"
    assert seat(REWARD, [GPU_NODE], {}).node_id is None  # nowhere else to go
    assert seat(REWARD, [CPU_A, CPU_B], {}).node_id is None  # no GPU to keep free
    assert seat(Needs(role="reward", num_cpus=1.0, num_gpus=0.25), nodes, {}).node_id is None
    assert seat(Needs(role="reward", num_cpus=5.0, num_gpus=0.0), nodes, {}).node_id is None  # too large for them


def test_rollout_workers_are_spread_with_their_fraction_of_a_gpu_and_the_learner_is_not() -> None:
    worker = seat(Needs(role="rollout", num_cpus=1.0, num_gpus=0.5), [GPU_NODE, CPU_A], {})
    assert (worker.spread, worker.num_gpus, worker.node_id, dict(worker.resources)) == (True, 0.5, None, {})
    assert not seat(Needs(role="learner", num_cpus=1.0, num_gpus=1.0), [GPU_NODE, CPU_A], {}).spread


def test_a_custom_resource_is_asked_for_when_a_node_offers_it() -> None:
    offering = NodeFacts(node_id="scores", resources={"CPU": 4.0, "reward": 2.0})
    assert dict(seat(REWARD, [GPU_NODE, CPU_A, offering], {}).resources) == {"reward": 1.0}
    assert seat(REWARD, [GPU_NODE, CPU_A, offering], {"scores": 5}).node_id == "scores"
    assert dict(seat(Needs(role="learner", num_cpus=1.0, num_gpus=0.0), [offering], {}).resources) == {}


def test_what_cannot_be_placed_is_said_with_its_remedy() -> None:
    assert problems(REWARD, 3, [CPU_A]) == []
    assert "whole number" in problems(Needs(role="rollout", num_cpus=1.0, num_gpus=1.5), 0, [GPU_NODE])[0]
    offering = NodeFacts(node_id="scores", resources={"CPU": 4.0, "reward": 2.0})
    assert "3 reward processes are wanted" in problems(REWARD, 3, [offering])[0]
    assert (
        "no node can hold a learner process (1 CPUs, 4 GPUs)"
        in problems(Needs(role="learner", num_cpus=1.0, num_gpus=4.0), 1, [GPU_NODE])[0]
    )


def test_roles_are_read_from_slot_and_pool_names() -> None:
    assert [role_of(name) for name in ("learner", "rollout", "rollout.3", "reward.ocr.0")] == ["learner", "rollout", "rollout", "reward"]


# ---- wishes


def scaled(**sizes: int) -> ControlRequest:
    pools = {name.replace("__", "."): size for name, size in sizes.items()}
    return ControlRequest(kind="scale", incarnation=1, asked_at="", writer_id="w", sizes=pools)


def test_the_newest_request_for_a_pool_wins_over_the_config_at_a_resume() -> None:
    requests = {1: scaled(rollout=4), 2: scaled(reward__ocr=3), 3: scaled(rollout=2), 4: scaled(reward__gone=9)}
    (change,) = take_requests(requests, {"rollout": 1, "reward.ocr": 1}, is_start=True)
    assert change == ({"rollout": 2, "reward.ocr": 3}, "sizes of earlier requests hold: reward.ocr 1 -> 3, rollout 1 -> 2", False)
    assert list(take_requests(requests, {"rollout": 2, "reward.ocr": 3}, is_start=True)) == []


def test_new_requests_are_taken_in_order_with_their_file_named() -> None:
    stop = ControlRequest(kind="stop", incarnation=1, asked_at="", writer_id="w")
    taken = list(take_requests({7: scaled(rollout=4), 8: stop}, {"rollout": 1}, is_start=False))
    assert taken[0] == ({"rollout": 4}, "control/0007.json: rollout 1 -> 4", False)
    assert taken[1] == ({}, "control/0008.json asked for a stop; the same command goes on", True)


def test_sizes_and_waits_are_read_by_pool() -> None:
    config = load_config("tiny-geneval", ["rollout.num_workers=3"])
    assert configured_sizes(config)["rollout"] == 3
    summary = {
        "waiting": {"learner": 0.5},
        "slot_waits": {"reward.a.0": 0.2, "reward.a.1": 0.4, "rollout.0": 0.9},
        "backlog": {"a": 2, "b": 0},
    }
    seen = waits_of(summary)
    assert (seen.learner, seen.rollout, dict(seen.backlog)) == (0.5, 0.0, {"reward.a": 2, "reward.b": 0})
    assert dict(seen.rewards) == {"reward.a": pytest.approx(0.3)}
