"""The writer beside the loop: an update's files come in their order, one update at a time, and its failure ends the loop."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from common.errors import StallError, StoreError
from common.store.run_store import RunStore
from common.types import Manifest, Publication, Stop, Wait
from learner.archive import RunArchive
from learner.config import LearnerConfig
from learner.loop import learner_loop
from learner.objectives.grpo import GrpoConfig
from learner.publishing import Publisher
from learner.update import make_learner
from learner.writer import BackgroundWriter
from tests.learner_fakes import MemoryFiles, RolloutWorld, sampler_spec
from tests.learner_policies import linear_policy
from tests.store_fixtures import Clock, make_coordinator, make_settings, publish, work

PATIENCE_S = 120.0


@dataclass
class WatchedFiles(MemoryFiles):
    """Records every write and announcement in order; a closed gate holds the first state of an update back."""

    order: list[str] = field(default_factory=list)
    gate: threading.Event = field(default_factory=threading.Event)

    def create_exclusive(self, path: str, content: bytes, *, writer_id: str) -> None:
        if path.startswith("learner/update_000001/"):
            assert self.gate.wait(PATIENCE_S)
        super().create_exclusive(path, content, writer_id=writer_id)
        self.order.append(path)


@dataclass
class EagerWorld(RolloutWorld):
    """max_staleness 1: the next manifest does not wait for the version before it."""

    files: WatchedFiles = field(default_factory=WatchedFiles)

    def next_manifest(self, update: int):  # type: ignore[no-untyped-def]
        if update <= self.num_updates and update not in self.manifests:
            self._make(update)
        return super().next_manifest(update)

    def publish(self, publication: Publication) -> None:
        super().publish(publication)
        self.files.order.append(f"publish {publication.adapter.version}")

    def finish_update(self, update: int, metrics: object) -> bool:
        is_state_wanted = super().finish_update(update, metrics)  # type: ignore[arg-type]
        self.files.order.append(f"finish {update}")
        return is_state_wanted


def kinds(order: list[str]) -> list[str]:
    """What was written, without digests."""
    return ["state" if "/state." in path else path.rpartition("/")[2] if path.startswith("learner") else path for path in order]


def test_the_loop_goes_on_while_files_are_written_in_their_order() -> None:
    files = WatchedFiles()
    world = EagerWorld(
        policy=linear_policy(), group_size=4, num_groups=2, spec=sampler_spec(), num_updates=3, files=files,
        states=lambda _: linear_policy().read_adapter(),
    )  # fmt: skip
    config = LearnerConfig(groups_per_update=2, objective=GrpoConfig(clip_range=0.1), learning_rate=1e-2, anchor="recompute")
    learner = make_learner(linear_policy(), config, {"r": 1.0}, 3)
    archive = RunArchive(files, config, Publisher(files, incarnation=1, snapshots=["live"]), incarnation=1)
    writer = BackgroundWriter()
    waits: list[Wait] = []
    for wait in learner_loop(learner, world, world, archive, writer=writer):
        waits.append(wait)
        if not files.gate.is_set():
            assert learner.version == 2  # the second update is done, and nothing of the first one is durable
            assert kinds(files.order) == ["state", "complete.json", "policy/i0001/v000000.safetensors", "publish 0"]
            files.gate.set()
        time.sleep(0.001)
    writer.close()
    assert learner.version == 3
    assert waits[0].reason == "store: the files of update 1"
    start = ["state", "complete.json", "policy/i0001/v000000.safetensors", "publish 0"]
    updates = [
        ["state", "complete.json", f"policy/i0001/v{m:06d}.safetensors", f"publish {m}",
         f"metrics/update_{m:06d}.i0001.json", f"history/update_{m:06d}.parquet", f"finish {m}"]
        for m in (1, 2, 3)
    ]  # fmt: skip
    assert kinds(files.order) == [*start, *updates[0], *updates[1], *updates[2]]


def drain(writer: BackgroundWriter) -> None:
    """Wait for the job, as the loop's driver does."""
    for wait in writer.idle():
        time.sleep(wait.seconds)


def test_what_ends_a_job_ends_the_loop_and_no_later_job_runs() -> None:
    writer = BackgroundWriter()
    done: list[str] = []
    writer.submit("one", lambda: done.append("one"))
    drain(writer)

    def refuse() -> None:
        raise StoreError("the store is away")

    writer.submit("two", refuse)
    with pytest.raises(StoreError, match="away"):
        drain(writer)
    with pytest.raises(StoreError, match="away"):
        writer.check()  # still: nothing is written after it
    with pytest.raises(AssertionError):
        writer.submit("three", lambda: done.append("three"))
    writer.close()
    assert done == ["one"]


def test_a_write_that_hangs_is_named_after_its_deadline() -> None:
    gate, ticks = threading.Event(), iter(range(0, 100, 10))
    clock: Callable[[], float] = lambda: float(next(ticks))  # noqa: E731
    writer = BackgroundWriter(timeout_s=15.0, clock=clock)
    writer.submit("the files of update 7", lambda: assert_set(gate))
    try:
        with pytest.raises(StallError, match="the files of update 7 took longer than 15 s"):
            drain(writer)
    finally:
        gate.set()
        writer.close()


def assert_set(gate: threading.Event) -> None:
    """Hold the writer until the test lets it go."""
    assert gate.wait(PATIENCE_S)


def test_the_run_does_not_end_while_its_last_version_is_being_saved() -> None:
    """The learner asks for the update after the last one while its writer is at the last one."""
    store = RunStore("memory://learner-asks-ahead")
    desk = make_coordinator(store, make_settings(num_updates=1), Clock())
    publish(store, desk, 0)
    for _ in work(store, desk):
        pass
    assert isinstance(desk.next_manifest(1), Manifest)
    answer = desk.next_manifest(2)
    assert isinstance(answer, Wait)
    assert answer.reason == "learner: version 1 is being saved"
    assert not desk.outcome().is_over
    publish(store, desk, 1)
    assert isinstance(desk.next_manifest(2), Stop)
