"""The learner's loops: next manifest -> groups -> update -> files -> repeat; rank 0 asks and writes, the others follow."""

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Protocol

from common.protocols import LearnerDesk
from common.types import RolloutGroup, Stop, Wait
from learner.archive import FrozenUpdate, RunArchive
from learner.ranks import Answer, decode_answer, encode_answer
from learner.state import StateArchive
from learner.update import Learner
from learner.writer import InlineWriter, Writer

Clock = Callable[[], float]


class GroupSource(Protocol):
    """Where the learner reads groups (common.store.faces.GroupFiles)."""

    def read_group(self, path: str) -> RolloutGroup:
        """Return a committed group. Raises CorruptFile, StoreError."""
        ...


class Stopwatch:
    """Seconds by name, from an injected monotonic clock."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._last = clock()
        self.seconds: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """Book the time since the last lap under `name`."""
        now = self._clock()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now


def learner_loop(
    learner: Learner, desk: LearnerDesk, source: GroupSource, archive: RunArchive, *,
    writer: Writer | None = None, clock: Clock = time.monotonic,
) -> Iterator[Wait]:  # fmt: skip
    """Train until the desk says stop; yields whenever there is nothing to do. On rank 0, or alone.

    Starts from the newest LearnerState of the run directory, or publishes version 0. An update's files are the writer's
    (InlineWriter when absent) while the loop goes on with the next update; one update's files at a time.

    Raises:
        GateError: parity, kl_not_zero, ratio, non_finite, ranks_differ.
        StoreError, CorruptFile: the run directory refused, or a group file is damaged.
        RankLost: another rank ended or is silent.
    """
    writer = writer or InlineWriter()
    desk.publish(archive.begin(learner))
    learner.ranks.broadcast(str(learner.version).encode())
    while True:
        watch = Stopwatch(clock)
        manifest = _ask(learner, desk)
        while isinstance(manifest, Wait):
            yield manifest
            writer.check()
            manifest = _ask(learner, desk)
        if isinstance(manifest, Stop):
            yield from writer.idle()
            archive.save_last_state(learner)
            learner.ranks.barrier()
            return
        watch.lap("wait")
        groups = [source.read_group(entry.path) for entry in manifest.groups]
        watch.lap("read")
        result = learner.update(manifest, groups)
        watch.lap("learn")
        yield from _let_write(learner, writer)
        frozen = archive.freeze(learner, manifest, groups, result)
        watch.lap("save")
        writer.submit(f"the files of update {manifest.update}", partial(file_update, frozen, desk, archive, watch.seconds))


def file_update(frozen: FrozenUpdate, desk: LearnerDesk, archive: RunArchive, seconds: dict[str, float]) -> None:
    """Make an update durable, in the order that a replay relies on: LearnerState, policy version, history."""
    archive.save_state(frozen)
    desk.publish(archive.publish(frozen))
    archive.is_state_wanted = desk.finish_update(frozen.manifest.update, archive.record(frozen, seconds))


def _ask(learner: Learner, desk: LearnerDesk) -> Answer:
    """The desk's answer, once the other ranks have it too."""
    answer = desk.next_manifest(learner.version + 1)
    learner.ranks.broadcast(encode_answer(answer))
    return answer


def _let_write(learner: Learner, writer: Writer) -> Iterator[Wait]:
    """Wait for the files of the update before; the other ranks wait too, and hear why."""
    for wait in writer.idle():
        learner.ranks.broadcast(encode_answer(wait))
        yield wait


def follower_loop(learner: Learner, source: GroupSource, states: StateArchive) -> Iterator[Wait]:
    """Take part in every update of rank 0 and write nothing; yields when rank 0 waits, returns when it stops.

    Raises:
        GateError: parity, kl_not_zero, ratio, non_finite, ranks_differ.
        StoreError, CorruptFile: the run directory refused, or a file is damaged.
        RankLost: another rank ended or is silent.
    """
    states.load(learner, int(learner.ranks.broadcast(b"")))
    while True:
        manifest = decode_answer(learner.ranks.broadcast(b""))
        if isinstance(manifest, Wait):
            yield manifest
            continue
        if isinstance(manifest, Stop):
            learner.ranks.barrier()
            return
        learner.update(manifest, [source.read_group(entry.path) for entry in manifest.groups])
