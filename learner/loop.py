"""The learner's loop: next manifest -> groups -> update -> LearnerState -> publish -> history -> repeat."""

import time
from collections.abc import Callable, Iterator
from typing import Protocol

from common.protocols import LearnerDesk
from common.types import RolloutGroup, Stop, Wait
from learner.archive import RunArchive
from learner.update import Learner

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
    learner: Learner, desk: LearnerDesk, source: GroupSource, archive: RunArchive, *, clock: Clock = time.monotonic
) -> Iterator[Wait]:
    """Train until the desk says stop; yields whenever there is nothing to do.

    Starts from the newest LearnerState of the run directory, or publishes version 0.

    Raises:
        GateError: parity, kl_not_zero, ratio, non_finite.
        StoreError, CorruptFile: the run directory refused, or a group file is damaged.
    """
    desk.publish(archive.begin(learner))
    while True:
        watch = Stopwatch(clock)
        manifest = desk.next_manifest(learner.version + 1)
        while isinstance(manifest, Wait):
            yield manifest
            manifest = desk.next_manifest(learner.version + 1)
        if isinstance(manifest, Stop):
            archive.save_state(learner)
            return
        watch.lap("wait")
        groups = [source.read_group(entry.path) for entry in manifest.groups]
        watch.lap("read")
        result = learner.update(manifest, groups)
        watch.lap("learn")
        archive.save_state_when_due(learner)
        desk.publish(archive.publish(learner))
        watch.lap("save")
        desk.finish_update(manifest.update, archive.record(manifest, groups, result, watch.seconds))
