"""What the learner writes: LearnerStates, policy versions, history and metrics. Files are created once; a replay keeps what it finds."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from common.errors import AlreadyExists
from common.logs import get_logger
from common.store.paths import history_path, metrics_path
from common.types import Manifest, Publication, RolloutGroup
from learner.config import LearnerConfig
from learner.history import encode_history
from learner.metrics import live_metrics, metrics_record
from learner.publishing import FrozenVersion, Publisher
from learner.state import FrozenState, RunFiles, StateArchive, freeze_state
from learner.update import Learner, UpdateResult

_log = get_logger("learner.archive")


class ImageStatistics(Protocol):
    """Gives the mean image statistics of a manifest's groups, e.g. from their media files."""

    def read(self, manifest: Manifest) -> Mapping[str, float]:
        """Return name -> mean over all images."""
        ...


class NoImageStatistics:
    """Statistics stay in the media files."""

    def read(self, manifest: Manifest) -> Mapping[str, float]:
        """Return nothing."""
        return {}


@dataclass(frozen=True, slots=True, kw_only=True)
class FrozenUpdate:
    """What an update leaves behind, for the writer: nothing in it moves while the learner goes on."""

    manifest: Manifest
    groups: tuple[RolloutGroup, ...]
    result: UpdateResult
    version: FrozenVersion
    state: FrozenState | None  # where one is due


class RunArchive:
    """The learner's files in one run directory, for one incarnation."""

    def __init__(
        self, files: RunFiles, config: LearnerConfig, publisher: Publisher, *,
        incarnation: int, statistics: ImageStatistics | None = None, unix_clock: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        """statistics: of the images, NoImageStatistics when absent. unix_clock: seconds since 1970, for the record only."""
        self._files = files
        self._interval = config.state_interval
        self._publisher = publisher
        self._incarnation = incarnation
        self._writer_id = f"learner.i{incarnation:04d}"
        self._states = StateArchive(files, states_kept=config.states_kept, writer_id=self._writer_id)
        self._statistics: ImageStatistics = statistics or NoImageStatistics()
        self._unix_clock = unix_clock
        self._num_history_differences = 0
        self.is_state_wanted = False  # the Coordinator's word: the next update saves a state out of its turn

    @property
    def num_differences(self) -> int:
        """Files that a replay would have written otherwise: states, adapters and histories that were found and kept."""
        return self._states.num_differences + self._publisher.num_differences + self._num_history_differences

    def begin(self, learner: Learner) -> Publication:
        """Restore the newest complete state whose history is durable too (so that none is ever missing), or save and publish version 0."""
        update = self._resumable()
        if update is None:
            self._states.save(learner)
        else:
            self._states.load(learner, update)
            _log.info("resumed from the state of update %d", update)
        return self._publisher.publish(self._publisher.freeze(learner))

    def _resumable(self) -> int | None:
        complete = self._states.complete_updates()
        recorded = set(self._files.list("history"))
        sound = [update for update in complete if update == 0 or history_path(update) in recorded]
        return max(sound or complete, default=None)

    def save_last_state(self, learner: Learner) -> None:
        """Commit the LearnerState of the learner's version, unless there is one: before the run ends."""
        if learner.version not in self._states.complete_updates():
            self._states.save(learner)

    def freeze(self, learner: Learner, manifest: Manifest, groups: Sequence[RolloutGroup], result: UpdateResult) -> FrozenUpdate:
        """Return what an update leaves behind, with its LearnerState every state_interval updates, or where one is wanted."""
        is_state_due = learner.version % self._interval == 0 or self.is_state_wanted
        return FrozenUpdate(
            manifest=manifest, groups=tuple(groups), result=result, version=self._publisher.freeze(learner),
            state=freeze_state(learner) if is_state_due else None,
        )  # fmt: skip

    def save_state(self, frozen: FrozenUpdate) -> None:
        """Commit the LearnerState of an update where one is due."""
        if frozen.state is not None:
            self._states.commit(frozen.state)

    def publish(self, frozen: FrozenUpdate) -> Publication:
        """Commit the adapter file of an update, or find the one that exists; return what stands."""
        return self._publisher.publish(frozen.version)

    def record(self, frozen: FrozenUpdate, seconds: Mapping[str, float]) -> dict[str, float]:
        """Commit history and metrics of an update; return its numbers for the live line."""
        manifest, groups, result = frozen.manifest, frozen.groups, frozen.result
        record = metrics_record(
            manifest, result.batch, incarnation=self._incarnation, time_unix=self._unix_clock(), seconds=seconds,
            learner={**result.metrics, "replay_differences": float(self.num_differences)}, image_statistics=self._statistics.read(manifest),
        )  # fmt: skip
        self._create(metrics_path(manifest.update, self._incarnation), json.dumps(record, sort_keys=True, allow_nan=False).encode())
        if not self._create(history_path(manifest.update), encode_history(manifest, groups, result.batch)):
            self._num_history_differences += 1
            _log.warning("history of update %d exists with other content; the replay keeps the file it found", manifest.update)
        return live_metrics(record, result.batch)

    def _create(self, path: str, content: bytes) -> bool:
        """Whether the file that stands is this one (metrics hold times, so a replay's always differ)."""
        try:
            self._files.create_exclusive(path, content, writer_id=self._writer_id)
        except AlreadyExists:
            return False
        return True
