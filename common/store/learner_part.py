"""The Coordinator as the learner sees it: manifests out, publications in."""

from collections.abc import Mapping
from threading import Lock

from common.errors import AlreadyExists, Fenced, StoreError
from common.store import paths
from common.store.claim import check_fence
from common.store.ending import EndKind
from common.store.manifests import read_drop, read_manifest, write_manifest
from common.store.metrics_view import observe_staleness
from common.store.run_state import PERMANENT, POLL_S, RunState
from common.types import Manifest, Publication, Stop, Wait


class LearnerPart:
    """LearnerDesk but for the beat."""

    def __init__(self, state: RunState) -> None:
        self._state = state
        self._cutting = Lock()  # one manifest at a time

    def next_manifest(self, update: int) -> Manifest | Wait | Stop:
        """Return the manifest of `update`, cutting it when its groups are ready, or adopting the file that exists.

        Raises:
            Fenced: a later incarnation owns the run.
            StoreError: the update is not the next one.
        """
        self._state.expire()
        with self._cutting:
            answer = self._answer_learner(update)
        with self._state.lock:
            self._state.learner_done = self._state.learner_done or isinstance(answer, Stop)
            self._state.pulse.asked("learner", "learner", self._state.clock(), answer.seconds if isinstance(answer, Wait) else 0.0)
            if not isinstance(answer, Wait):
                self._state.learner_waits_since = None
        if isinstance(answer, Stop):
            self._state.attempt(self._state.request_evaluations)
        return answer

    def _answer_learner(self, update: int) -> Manifest | Wait | Stop:
        with self._state.lock:
            now, last, schedule = self._state.clock(), self._state.ledger.last_update, self._state.settings.schedule
            self._state.conclude()
            if self._state.end.outcome.is_over:
                return Stop(reason=self._state.end.outcome.reason)
            ends = update > last and (update > schedule.num_updates or self._state.end.is_closing(now))
            if ends and (self._state.ledger.newest_version or 0) < update - 1:  # it asks ahead while it saves
                return Wait(seconds=POLL_S, reason=f"learner: version {update - 1} is being saved")
            if update > schedule.num_updates and update > last:
                return Stop(reason="all updates are done")
            if update > last and self._state.end.is_closing(now):
                return Stop(reason=f"the time limit of {schedule.time_limit_s} s has passed")
            if update > last + 1:
                raise StoreError(f"coordinator: update {update} was asked for after {last}; updates are contiguous; restart the learner")
            digest = self._state.settings.config_digest
            manifest = self._state.ledger.next_manifest(incarnation=self._state.incarnation, config_digest=digest)
        if update <= last:
            return read_manifest(self._state.store, update)
        if manifest is None:
            return self._let_learner_wait(now)
        try:
            return self._cut(manifest)
        except PERMANENT:
            raise
        except StoreError as error:
            self._state.note_store(str(error))
            return self._let_learner_wait(now, f"the store: {error}")

    def _cut(self, manifest: Manifest) -> Manifest | Wait:
        check_fence(self._state.store, self._state.incarnation)
        late = [group.number for group in manifest.groups if self._state.store.exists(paths.drop_path(group.number))]
        for number in late:  # written by an earlier incarnation after this one had listed the directory
            with self._state.lock:
                self._state.ledger.drop_written(read_drop(self._state.store, number))
        if late:
            return Wait(seconds=POLL_S, reason=f"rollout workers: groups {late} were dropped by an earlier incarnation")
        try:
            write_manifest(self._state.store, manifest)
        except AlreadyExists:
            manifest = read_manifest(self._state.store, manifest.update)
        with self._state.lock:
            is_news = manifest.update > self._state.ledger.last_update
            self._state.ledger.adopt(manifest)
            self._state.last_manifest = manifest
        if is_news:
            observe_staleness(self._state.metrics, manifest)
        self._state.moved(learns=True)
        return manifest

    def _let_learner_wait(self, now: float, reason: str = "") -> Wait | Stop:
        with self._state.lock:
            if self._state.learner_waits_since is None:
                self._state.learner_waits_since = now
            reason = reason or self._state.waited_for()
            idle = self._state.end.stalled_for(self._state.learner_waits_since, now)
            if idle is None:
                return Wait(seconds=POLL_S, reason=reason)
            self._state.end.finish(EndKind.STALL, f"the learner waited for {reason}, and nothing was committed for {idle:.0f} s")
            return Stop(reason=self._state.end.outcome.reason)

    def publish(self, publication: Publication) -> None:
        """Announce a published policy version; at or below the newest it is kept and ignored.

        Raises:
            Fenced: a new version by another incarnation.
            StoreError: its file is missing, or its update has no manifest.
        """
        version = publication.adapter.version
        with self._state.lock:
            newest, last = self._state.ledger.newest_version, self._state.ledger.last_update
        if newest is None or version > newest:
            check_fence(self._state.store, self._state.incarnation)
            if publication.adapter.incarnation != self._state.incarnation:
                raise Fenced(f"coordinator: v{version} is of incarnation {publication.adapter.incarnation}; {self._state.incarnation} runs")
            if version > last or not self._state.store.exists(publication.path):
                raise StoreError(f"coordinator: v{version} at {publication.path} has no file or no manifest; publish after writing it")
            self._state.moved(learns=True)
        with self._state.lock:
            self._state.publications.add(publication)
            self._state.ledger.published(version)
        self._state.attempt(self._state.request_evaluations)

    def finish_update(self, update: int, metrics: Mapping[str, float]) -> bool:
        """Announce that history of `update` is durable, with its metrics; old files are retired. Returns whether a state is wanted.

        What the store refuses to list or remove is retired after the next update.
        """
        with self._state.lock:
            self._state.finished_update = max(self._state.finished_update, update)
            self._state.fleet.worked("learner")
            self._state.update_metrics = dict(metrics)
            self._state.sensors.announced(update)
            leased = self._state.ledger.leases.versions() | self._state.board.leases.versions()
            protected = leased | self._state.pinned_versions()
        self._state.attempt(lambda: self._retire(update, protected))
        return self._state.retention.is_state_wanted

    def _retire(self, update: int, protected: set[int]) -> None:
        self._state.retention.retire_adapters(protected)
        self._state.retention.retire_groups(update, lambda _: self._state.write_status())
