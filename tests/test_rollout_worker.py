"""The loop: leases in, committed groups out, determinism over workers, a store that is away, heartbeats."""

import itertools
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from common.errors import CorruptFile, GateError, StallError, StoreError
from common.gauges import PROCESS_MARK, Gauges
from common.heartbeat import Heartbeat, HeldLeases
from common.policy.base import AdapterState
from common.store.config import EvaluationConfig
from common.types import FloatArray, MediaBatch, Publication, RolloutGroup, Stop, Wait
from rollout_workers.config import RolloutConfig, WindowConfig
from rollout_workers.delivery import Delivery, DeliveryLimits, InlineExecutor
from rollout_workers.media import decode_media
from rollout_workers.studio import FeatureCache, Studio
from rollout_workers.weights import WeightKeeper
from rollout_workers.worker import RolloutWorker
from tests.fakes import FakeClock, FakeDesk, FakePolicy, FakePolicyFiles, FakeSink, adapter_state, eval_lease, train_lease

CONFIG = RolloutConfig(group_size=5, num_steps=6, micro_batch=2, window=WindowConfig(kind="random", size=2, stop=5))
EVALUATION = EvaluationConfig(num_steps=4, seed=9, sheet_size=3)


def published() -> tuple[FakePolicyFiles, Publication, Publication]:
    files = FakePolicyFiles()
    first = files.publish(0, {"live": adapter_state(0.0), "ema": adapter_state(0.0)})
    return files, first, files.publish(1, {"live": adapter_state(0.1), "ema": adapter_state(0.05)})


@dataclass
class Shop:
    """One worker and everything around it."""

    desk: FakeDesk
    files: FakePolicyFiles
    sink: FakeSink = field(default_factory=FakeSink)
    executor: Executor = field(default_factory=InlineExecutor)
    clock: FakeClock = field(default_factory=FakeClock)
    limits: DeliveryLimits = field(default_factory=lambda: DeliveryLimits(retry_s=2.0, deadline_s=20.0))
    evaluation: EvaluationConfig = EVALUATION
    num_decodes: int = 0

    def __post_init__(self) -> None:
        self.policy, self.held, self.gauges = FakePolicy(), HeldLeases(), Gauges(self.clock)

    def decode(self, latents: FloatArray) -> MediaBatch:
        self.num_decodes += 1
        return decode_media(self.policy, latents, 2)

    def worker(self, slot: str = "w0", heartbeat: Heartbeat | None = None) -> RolloutWorker:
        shared: dict[str, Any] = {"held": self.held, "gauges": self.gauges, "clock": self.clock}
        studio = Studio(self.policy, CONFIG, self.evaluation, run="run", run_seed=11, clock=self.clock)
        delivery = Delivery(self.desk, self.sink, self.decode, self.executor, limits=self.limits, **shared)
        return RolloutWorker(slot, self.desk, WeightKeeper(self.policy, self.files.load), studio, delivery, heartbeat=heartbeat, **shared)


def group_bits(group: RolloutGroup) -> bytes:
    arrays = [[t.latents, t.final_latents, t.behavior_log_prob, t.step_index, t.latent_index, t.sigma] for t in group.trajectories]
    return b"".join(array.tobytes() for row in arrays for array in row)


def test_a_lease_becomes_a_committed_group_with_images_and_statistics() -> None:
    files, _, publication = published()
    shop = Shop(FakeDesk([train_lease(3, publication)]), files)
    shop.worker().run(shop.clock.sleep)
    ((path, (group, media)),) = shop.sink.groups.items()
    assert shop.desk.committed == {"lease3": path}
    assert (group.run, group.number, group.lease_id, group.adapter) == ("run", 3, "lease3", publication.adapter)
    assert group.prompt.metadata == {"tag": "counting"}
    assert (group.sampler.snapshot, group.sampler.kernel, group.sampler.num_steps) == ("live", "flow_sde", 6)
    assert (group.sampler.height, group.sampler.width) == (16, 16)
    assert [t.media_row for t in group.trajectories] == [0, 1, 2, 3, 4]
    expected = decode_media(shop.policy, np.stack([t.final_latents for t in group.trajectories]), 2)
    assert np.array_equal(media.images, expected.images)
    assert media.images.shape == (5, 16, 16, 3)
    assert shop.desk.receipts[0][1].canary == publication.snapshots["live"].canary
    assert shop.held.snapshot() == ()
    assert shop.gauges.snapshot()["images_total"] == 5


def test_all_groups_of_a_round_have_one_window_and_it_is_in_the_group() -> None:
    """R6: two groups a round; the windows of 12 rounds are not all equal."""
    files, _, publication = published()
    shop = Shop(FakeDesk([train_lease(n, publication) for n in range(24)]), files)
    shop.worker().run(shop.clock.sleep)
    windows: dict[int, set[tuple[int, ...]]] = {}
    for group, _ in shop.sink.groups.values():
        windows.setdefault(group.number // 2, set()).add(group.sampler.window)
        assert all(tuple(t.step_index.tolist()) == group.sampler.window for t in group.trajectories)
    assert [len(found) for found in windows.values()] == [1] * 12
    assert len(set().union(*windows.values())) > 1


def test_one_worker_or_two_interleaved_make_the_same_bits() -> None:
    """R5: the script is shared; each worker has a policy of its own and meets the versions in another order."""
    files, first, second = published()
    leases = [train_lease(n, first if n < 4 else second) for n in range(8)]
    alone = Shop(FakeDesk(leases), files)
    alone.worker().run(alone.clock.sleep)

    pause = Wait(seconds=1.0, reason="admission")
    desk = FakeDesk([part for lease in reversed(leases) for part in (lease, pause)])
    shops = [Shop(desk, files), Shop(desk, files)]
    loops = [shop.worker(f"w{index}").loop() for index, shop in enumerate(shops)]
    for _ in itertools.zip_longest(*loops):  # in turns, a group each
        pass
    assert [len(shop.sink.groups) for shop in shops] == [4, 4]
    groups = shops[0].sink.groups | shops[1].sink.groups
    ours = {group.number: group_bits(group) for group, _ in groups.values()}
    assert ours == {group.number: group_bits(group) for group, _ in alone.sink.groups.values()}
    assert len(set(ours.values())) == 8


def test_an_evaluation_sheet_is_sampled_with_its_snapshot_by_the_ode() -> None:
    files, _, publication = published()
    shop = Shop(FakeDesk([eval_lease(0, publication, ["a", "b", "c"])]), files)
    shop.worker().run(shop.clock.sleep)
    ((path, (_, media)),) = shop.sink.sheets.items()
    assert shop.desk.committed == {"sheet0": path}
    assert media.images.shape == (3, 16, 16, 3)
    assert [receipt.snapshot for _, receipt in shop.desk.receipts] == ["ema"]
    again = Shop(FakeDesk([train_lease(0, publication), eval_lease(0, publication, ["a", "b", "c"])]), files)
    again.worker().run(again.clock.sleep)
    assert np.array_equal(again.sink.sheets[path][1].images, media.images)
    other = Shop(FakeDesk([eval_lease(0, publication, ["a", "b", "c"])]), files, evaluation=EVALUATION.model_copy(update={"seed": 10}))
    other.worker().run(other.clock.sleep)
    assert not np.array_equal(other.sink.sheets[path][1].images, media.images)


def test_several_images_of_a_prompt_differ_also_across_sheets() -> None:
    files, _, publication = published()
    evaluation = EVALUATION.model_copy(update={"images_per_prompt": 2})
    sheets = [eval_lease(0, publication, ["a", "a", "b"]), eval_lease(1, publication, ["b", "c", "c"])]
    shop = Shop(FakeDesk(sheets), files, evaluation=evaluation)
    shop.worker().run(shop.clock.sleep)
    images = [image.tobytes() for _, media in shop.sink.sheets.values() for image in media.images]
    assert len(set(images)) == 6


def test_waits_are_passed_on_and_stop_ends_the_loop() -> None:
    files, _, publication = published()
    wait = Wait(seconds=3.0, reason="admission: 4 groups ahead")
    shop = Shop(FakeDesk([wait, train_lease(0, publication), wait, Stop(reason="done"), train_lease(1, publication)]), files)
    shop.worker().run(shop.clock.sleep)
    assert shop.clock.slept == [3.0, 3.0]
    assert set(shop.desk.committed) == {"lease0"}
    gauges = shop.gauges.snapshot()
    assert gauges["waiting_seconds_total"] == gauges["waiting_seconds_total.admission"] == 6.0


class SlowExecutor(Executor):
    """Runs a task only when told, as a thread that is late would."""

    def __init__(self) -> None:
        self.pool, self.gate, self.num_running = ThreadPoolExecutor(max_workers=1), threading.Event(), 0

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
        def late() -> Any:
            assert self.gate.wait(10), "the test never opened the gate"
            return fn(*args, **kwargs)

        return self.pool.submit(late)


def test_delivery_runs_in_the_background_with_at_most_one_group_pending() -> None:
    files, _, publication = published()
    executor = SlowExecutor()
    shop = Shop(FakeDesk([train_lease(n, publication) for n in range(3)]), files, executor=executor)
    loop = shop.worker().loop()
    first = next(loop)
    assert first.reason == "commit"
    assert shop.held.snapshot() == ("lease0", "lease1")  # 0 is on its way out, 1 is sampled and waits for it
    assert len(shop.desk.asked) == 2
    assert shop.desk.committed == {}
    executor.gate.set()
    for wait in loop:
        time.sleep(min(wait.seconds, 0.01))
    assert set(shop.desk.committed) == {"lease0", "lease1", "lease2"}
    executor.pool.shutdown()


def test_a_store_that_is_away_is_tried_again_without_decoding_twice_or_taking_on_more() -> None:
    files, _, publication = published()
    sink = FakeSink(errors=[StoreError("no space left"), StoreError("no space left")])
    shop = Shop(FakeDesk([train_lease(0, publication), train_lease(1, publication)]), files, sink)
    loop = shop.worker().loop()
    assert next(loop) == Wait(seconds=2.0, reason="store away")
    assert (len(shop.desk.asked), shop.held.snapshot()) == (1, ("lease0",))
    shop.clock.now += 2.0
    assert next(loop).reason == "store away"
    assert len(shop.desk.asked) == 1
    shop.clock.now += 2.0
    assert list(loop) == []
    assert set(shop.desk.committed) == {"lease0", "lease1"}
    assert shop.num_decodes == 2
    assert shop.desk.failed == shop.desk.returned == {}


def test_a_store_that_stays_away_ends_the_loop_with_its_cause() -> None:
    files, _, publication = published()
    shop = Shop(FakeDesk([train_lease(0, publication)]), files, FakeSink(errors=[StoreError(f"refusal {n}") for n in range(50)]))
    with pytest.raises(StoreError, match=r"lease0 was not committed within 20 s; mend .* refusal \d+") as caught:
        shop.worker().run(shop.clock.sleep)
    assert isinstance(caught.value.__cause__, StoreError)
    assert 20 <= shop.clock.now <= 24
    assert shop.desk.committed == {}


def test_a_delivery_that_hangs_is_a_stall() -> None:
    files, _, publication = published()
    executor = SlowExecutor()
    shop = Shop(FakeDesk([train_lease(0, publication)]), files, executor=executor)
    with pytest.raises(StallError, match="lease0"):
        shop.worker().run(shop.clock.sleep)
    executor.gate.set()
    executor.pool.shutdown()


@pytest.mark.parametrize("executor", [InlineExecutor(), ThreadPoolExecutor(max_workers=1)])
def test_a_corrupt_file_or_a_crash_in_the_background_reaches_the_loop(executor: Executor) -> None:
    files, _, publication = published()
    for error in (CorruptFile("groups/g0 breaks its schema"), RuntimeError("the decoder crashed")):
        shop = Shop(FakeDesk([train_lease(0, publication)]), files, FakeSink(errors=[error]), executor=executor)
        with pytest.raises(type(error), match=str(error)):
            shop.worker().run(lambda seconds, shop=shop: time.sleep(0.01))  # type: ignore[misc]
        assert shop.desk.committed == {}


def test_samples_that_are_not_finite_fail_the_lease_and_the_loop_goes_on() -> None:
    files, _, publication = published()
    poisoned = files.publish(2, {"live": adapter_state(0.1)})
    files.states[2, "live"] = adapter_state(0.1)
    shop = Shop(FakeDesk([train_lease(0, poisoned), train_lease(1, publication)]), files)
    worker, velocity, calls = shop.worker(), shop.policy.velocity, []

    def broken(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return velocity(*args, **kwargs) * (float("nan") if len(calls) == 8 else 1.0)  # calls 1 and 2 are the canary's

    shop.policy.velocity = broken  # type: ignore[method-assign]
    worker.run(shop.clock.sleep)
    assert "not finite" in shop.desk.failed["lease0"]
    assert set(shop.desk.committed) == {"lease1"}
    assert shop.held.snapshot() == ()


def test_weights_that_did_not_arrive_stop_the_worker() -> None:
    files, _, publication = published()
    files.states[1, "live"] = adapter_state(0.0)  # the file holds a fresh adapter, the publication promises another
    shop = Shop(FakeDesk([train_lease(0, publication)]), files)
    with pytest.raises(GateError, match="weights"):
        shop.worker().run(shop.clock.sleep)
    assert shop.desk.receipts == []
    assert shop.sink.groups == {}


def test_a_policy_file_that_cannot_be_read_gives_the_lease_back_unharmed() -> None:
    files, _, publication = published()
    refusals = [StoreError("timeout")]

    class Flaky(FakePolicyFiles):
        def load(self, publication: Publication, snapshot: str) -> AdapterState:
            if refusals:
                raise refusals.pop()
            return files.load(publication, snapshot)

    shop = Shop(FakeDesk([train_lease(0, publication), train_lease(0, publication)]), Flaky())
    shop.worker().run(shop.clock.sleep)
    assert shop.desk.returned == {"lease0": "timeout"}
    assert set(shop.desk.committed) == {"lease0"}
    refusals.append(CorruptFile("v1 has another digest"))
    with pytest.raises(CorruptFile):
        Shop(FakeDesk([train_lease(0, publication)]), Flaky()).worker().run(shop.clock.sleep)


def test_text_is_encoded_once_a_prompt_and_the_cache_is_bounded() -> None:
    policy = FakePolicy()
    cache = FeatureCache(policy, capacity=2)

    def encoded(texts: Sequence[str], *, with_negative: bool = False) -> int:
        before = policy.num_encoded
        found = cache.encode(texts, with_negative=with_negative)
        assert [f.pooled.tolist() for f in found] == [policy.encode([t], with_negative=False)[0].pooled.tolist() for t in texts]
        return policy.num_encoded - before - len(texts)

    assert encoded(["a", "b", "a"]) == 2
    assert encoded(["a"]) == 0
    assert encoded(["c"]) == 1  # b leaves: a was used later
    assert encoded(["a"]) == 0
    assert encoded(["b"]) == 1
    assert encoded(["b"], with_negative=True) == 1
    assert encoded(["x", "y", "z"]) == 3  # more than it holds


def until(condition: Any) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline, "what the test waits for did not come within 5 s"
        time.sleep(0.005)


def test_a_heartbeat_shows_the_held_leases_and_gauges_until_it_is_stopped() -> None:
    desk, held, gauges = FakeDesk([]), HeldLeases(), Gauges()
    held.add("lease7")
    gauges.set("images_per_second", 3)
    with Heartbeat("w0", desk, held, gauges.snapshot, interval_s=0.01):
        until(lambda: len(desk.beats) >= 3)
        held.discard("lease7")
        until(lambda: desk.beats[-1][1] == ())
    assert desk.beats[0] == ("w0", ("lease7",), {"images_per_second": 3.0, PROCESS_MARK: gauges.snapshot()[PROCESS_MARK]})
    count = len(desk.beats)
    time.sleep(0.05)
    assert len(desk.beats) == count


def test_a_heartbeat_that_fails_ends_the_worker_with_its_cause() -> None:
    files, _, _ = published()
    desk = FakeDesk([Wait(seconds=0.01, reason="admission")] * 1000)
    desk.beat_errors.extend([None, RuntimeError("the desk is gone")])
    shop = Shop(desk, files)
    heartbeat = Heartbeat("w0", desk, shop.held, shop.gauges.snapshot, interval_s=0.01)
    with pytest.raises(RuntimeError, match="the desk is gone"):
        shop.worker(heartbeat=heartbeat).run(time.sleep)
    assert len(desk.asked) < 1000


def test_a_heartbeat_bears_a_desk_that_is_away_for_a_moment() -> None:
    desk = FakeDesk([])
    desk.beat_errors.extend([ConnectionError("away")] * 3)
    with Heartbeat("w0", desk, HeldLeases(), dict, interval_s=0.005, retry_on=(ConnectionError,)):
        until(lambda: desk.beats)
    desk.beat_errors.extend([ConnectionError("away")] * 1000)
    heartbeat = Heartbeat("w0", desk, HeldLeases(), dict, interval_s=0.005, patience_s=0.02, retry_on=(ConnectionError,))
    heartbeat.start()
    time.sleep(0.2)
    with pytest.raises(ConnectionError):
        heartbeat.check()
    with pytest.raises(ConnectionError):
        heartbeat.stop()


def test_gauges_add_up_and_keep_few_reasons_apart() -> None:
    clock = FakeClock()
    gauges = Gauges(clock)
    with gauges.timed("decoding_seconds_total"):
        clock.now += 1.5
    gauges.add("waiting", 1.0, "a reason: with words")
    for number in range(30):
        gauges.add("waiting", 1.0, f"reason {number}")
    snapshot = gauges.snapshot()
    assert snapshot["decoding_seconds_total"] == 1.5
    assert snapshot["waiting"] == 31.0
    assert snapshot["waiting.a_reason"] == 1.0
    assert snapshot["waiting.other"] == 15.0  # 16 reasons have a total of their own
    assert sum(1 for name in snapshot if name.startswith("waiting.")) == 17
