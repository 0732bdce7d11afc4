"""The Coordinator: the plain object that rollout workers, reward servers and the learner talk to.

Every call is idempotent (lease id, path or number is the key). One lock guards the decisions; files are read and written
outside it where they are large. Only this object creates manifests and drop files.
"""

import re
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from common.errors import StoreError
from common.heartbeat import MICRO_BATCHES
from common.logs import get_logger
from common.metrics import RunMetrics
from common.store import paths
from common.store.claim import check_fence
from common.store.coordinator_settings import CoordinatorSettings
from common.store.directive import Directive
from common.store.ending import EndKind, Outcome
from common.store.learner_part import LearnerPart
from common.store.ledger_entries import GroupFile
from common.store.metrics_view import MetricsView
from common.store.recovery import group_file
from common.store.run_state import PERMANENT, POLL_S, RunState
from common.store.run_store import RunStore
from common.store.scoring_part import ScoringPart
from common.store.summary import summary_of
from common.store.watches import Watches
from common.types import LeaseKind, LoadReceipt, Manifest, Prompt, Publication, RolloutLease, ScoringLease, Stop, Wait

__all__ = ["Coordinator", "CoordinatorSettings"]

STATUS_S = 2.0
_ASKS_AT_ONCE = 8
_EVAL_SHARE = 8  # at least one lease in eight while evaluations wait
_TRAIN_LEASE = re.compile(r"t(\d+)-[0-9a-f]+")
_log = get_logger("coordinator")


class Coordinator:
    """RolloutDesk, ScoringDesk and LearnerDesk of one run.

    Args:
        store: the run directory.
        settings: the rules in force.
        incarnation: as claimed by `claim_run`; a higher one fences this object.
        prompt_for: number -> Prompt, a pure function (PromptOrder).
        read_publication: path of a published file -> Publication, for versions published before a restart; without it the
            learner's word is waited for.
        settle_s: after a restart, how long to wait for workers to show the leases that they still hold.
        clock: monotonic seconds; only durations are taken from it.
        wall: wall clock for status.json.
    """

    def __init__(
        self, store: RunStore, settings: CoordinatorSettings, *, incarnation: int, prompt_for: Callable[[int], Prompt],
        read_publication: Callable[[str], Publication] | None = None, settle_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        self._store, self._settings, self._incarnation, self._clock = store, settings, incarnation, clock
        self._state = RunState(
            store, settings, incarnation=incarnation, prompt_for=prompt_for, read_publication=read_publication, clock=clock, wall=wall
        )
        self._lock = self._state.lock
        self._ledger, self._board = self._state.ledger, self._state.board
        self._learner, self._scoring = LearnerPart(self._state), ScoringPart(self._state)
        self._watches, self._view, self._looking = Watches(self._state), MetricsView(self._state), threading.Lock()
        restarted = self._ledger.counts()["issued"] > 0
        self._settled_at = clock() + (settle_s if restarted else 0.0)
        self._since_eval = 0  # training leases since the last evaluation lease
        self._state.settle()
        self._state.request_evaluations()

    @property
    def metrics(self) -> RunMetrics:
        """The run's Prometheus metrics, for serve_metrics(metrics.registry, port)."""
        return self._state.metrics

    # ---- RolloutDesk

    def ask_rollout(self, slot: str) -> RolloutLease | Wait | Stop:
        """Lease the next group or evaluation sheet, say how long to wait, or say that the run ends."""
        self._state.expire()
        with self._lock:
            now = self._clock()
            answer = self._answer_rollout(slot, now)
            self._state.pulse.asked("rollout", slot, now, answer.seconds if isinstance(answer, Wait) else 0.0)
            return answer

    def _answer_rollout(self, slot: str, now: float) -> RolloutLease | Wait | Stop:
        self._state.conclude()
        if self._state.end.outcome.is_over:
            return Stop(reason=self._state.end.outcome.reason)
        dismissal = self._state.fleet.dismissal(slot)
        if dismissal is not None:
            return dismissal
        refusal = self._state.publications.refusal(slot)
        if refusal is not None:
            return Wait(seconds=5.0, reason=refusal)
        if now < self._settled_at:
            return Wait(seconds=POLL_S, reason="workers that outlived a restart to show their leases")
        first, second = self._lease_group, self._lease_sheet
        if self._since_eval >= _EVAL_SHARE - 1:
            first, second = second, first
        return first(slot, now) or second(slot, now) or Wait(seconds=self._poll_s(now), reason=self._why_no_lease(now))

    def _poll_s(self, now: float) -> float:
        """What a worker waits: longer where many ask, so that they ask at most _ASKS_AT_ONCE times in POLL_S all together."""
        return POLL_S * max(1.0, self._state.pulse.heard_of("rollout", now) / _ASKS_AT_ONCE)

    def _lease_group(self, slot: str, now: float) -> RolloutLease | None:
        newest = self._ledger.newest_version
        if newest is None or self._state.end.is_closing(now):
            return None
        publication = self._state.publications.get(newest)
        token = secrets.token_hex(6)
        admits = not self._state.pools.blocking(now)
        number = self._ledger.lease(slot, lambda number: f"t{number}-{token}", now, admits=admits) if publication else None
        if number is None or publication is None:
            return None
        self._since_eval = self._since_eval + 1 if self._board.pending() else 0
        return RolloutLease(
            lease_id=f"t{number}-{token}", kind=LeaseKind.TRAIN, number=number, prompts=(self._state.prompt_for(number),),
            publication=publication, snapshot=self._settings.rollout_snapshot, window_round=number // self._settings.groups_per_update,
        )  # fmt: skip

    def _lease_sheet(self, slot: str, now: float) -> RolloutLease | None:
        lease_id = f"e-{secrets.token_hex(6)}"
        granted = self._board.lease(slot, lease_id, now)
        if granted is None:
            return None
        evaluation, sheet = granted
        self._since_eval = 0
        return RolloutLease(
            lease_id=lease_id, kind=LeaseKind.EVAL, number=sheet.number, prompts=sheet.prompts, publication=evaluation.publication,
            snapshot=evaluation.snapshot, directory=evaluation.directory,
        )  # fmt: skip

    def _why_no_lease(self, now: float) -> str:
        newest = self._ledger.newest_version
        if newest is None or self._state.publications.get(newest) is None:
            return "learner: no policy version is published yet"
        if self._ledger.last_update >= self._settings.schedule.num_updates or self._state.end.is_closing(now):
            return "learner: the run is about to end"
        blocking = self._state.pools.blocking(now)
        if blocking:
            return f"reward servers of {', '.join(blocking)}: every breaker is open"
        return "learner: max_staleness admits no further group"

    def confirm_weights(self, slot: str, receipt: LoadReceipt) -> None:
        """Report a load receipt. Raises GateError("weights") when it differs from the publication."""
        with self._lock:
            self._state.pulse.hear(slot, self._clock())
            self._state.publications.confirm(slot, receipt)

    def commit_rollout(self, lease_id: str, path: str, seconds: float) -> None:
        """Announce a committed group file or evaluation sheet.

        Raises:
            StoreError: there is no such file, or it is not the lease's.
            CorruptFile: the file of a lease that outlived a restart breaks its schema.
        """
        sheet = paths.parse_sheet(path)
        name = sheet or paths.parse_group(path)
        if name is None or name.lease_id != lease_id:
            raise StoreError(f"coordinator: {path} is no file of lease {lease_id}; announce the path that write_group returned")
        num_bytes = self._store.size(path)
        with self._lock:
            held = self._ledger.leases.get(lease_id)
            sheet_lease = self._board.leases.get(lease_id)
            self._state.fleet.worked(held.slot if held is not None else sheet_lease.slot if sheet_lease is not None else None)
            if sheet is not None:
                self._board.drawn(path.rpartition("/")[0], name.number, lease_id)
        if sheet is None:
            version = held.version if held is not None else -1
            file = GroupFile(number=name.number, lease_id=lease_id, path=path, version=version, num_bytes=num_bytes)
            if version < 0:  # the lease outlived a restart or expired: the file knows
                file = group_file(self._store, path, num_bytes)
            with self._lock:
                self._ledger.generated(file)
        self._state.moved()
        self._state.settle()

    def fail_rollout(self, lease_id: str, error: str) -> None:
        """Give a lease back as failed: counts as an attempt."""
        _log.warning("lease %s failed: %s", lease_id, error)
        with self._lock:
            held = self._ledger.leases.get(lease_id) or self._board.leases.get(lease_id)
            self.metrics.count("leases_failed_total", int(held is not None), "rollout")
            self._ledger.fail(lease_id, error)
            self._board.leases.fail(lease_id)
        self._state.settle()

    def return_rollout(self, lease_id: str, reason: str) -> None:
        """Give a lease back unharmed (drain, version gone): free."""
        _log.info("lease %s came back: %s", lease_id, reason)
        with self._lock:
            self._ledger.leases.end(lease_id)
            self._board.leases.end(lease_id)

    def beat(self, slot: str, lease_ids: Sequence[str], metrics: Mapping[str, float]) -> None:
        """Keep leases alive and hand over gauges; leases that outlived a restart are re-adopted."""
        with self._lock:
            now = self._clock()
            self._state.pulse.hear(slot, now, metrics)
            self._state.pools.heard(slot, metrics, now)
            for book in (self._ledger.leases, self._board.leases):
                book.beat(lease_ids, now)
            for scoring in (self._ledger.scoring.leases, self._board.scoring.leases):
                scoring.beat(lease_ids, now)
            for lease_id in lease_ids:
                outlived = _TRAIN_LEASE.fullmatch(lease_id)
                if outlived and now < self._settled_at:
                    self._ledger.readopt(int(outlived[1]), lease_id, slot, now)
            grown = self._state.totals.heard(slot, metrics, self._state.pools.reward_of(slot))
            if grown.get(MICRO_BATCHES, 0.0) > 0:  # an update in progress is no stall, though it commits nothing until its end
                self._state.end.progress(now, learns=True)

    # ---- ScoringDesk

    def ask_scoring(self, slot: str, reward: str, limit: int) -> tuple[ScoringLease, ...] | Wait | Stop:
        """Lease up to `limit` committed groups or sheets to score with `reward`; 0: only hear whether the run ends."""
        return self._scoring.ask_scoring(slot, reward, limit)

    def commit_scores(self, lease_id: str, path: str) -> None:
        """Announce a committed score file. Raises CorruptFile when it breaks its schema or does not hold K scores."""
        self._scoring.commit_scores(lease_id, path)

    def fail_scoring(self, lease_id: str, error: str) -> None:
        """Give a scoring lease back as failed: counts as an attempt."""
        self._scoring.fail_scoring(lease_id, error)

    def return_scoring(self, lease_id: str, reason: str) -> None:
        """Give a scoring lease back unharmed: free."""
        self._scoring.return_scoring(lease_id, reason)

    def stop_scoring(self, lease_id: str, error: str) -> None:
        """End the run: a reward could not score, and its config (or a scorer that hangs in the only process) wants that."""
        self._scoring.stop_scoring(lease_id, error)

    # ---- LearnerDesk

    def next_manifest(self, update: int) -> Manifest | Wait | Stop:
        """Return the manifest of `update`, cutting or adopting it; say how long to wait, or that the run ends. Raises Fenced."""
        return self._learner.next_manifest(update)

    def publish(self, publication: Publication) -> None:
        """Announce a published policy version; at or below the newest it is kept and ignored. Raises Fenced, StoreError."""
        self._learner.publish(publication)

    def finish_update(self, update: int, metrics: Mapping[str, float]) -> bool:
        """Announce that history of `update` is durable, with its metrics; old files are retired. Returns whether a state is wanted."""
        return self._learner.finish_update(update, metrics)

    # ---- what the shell calls

    def tick(self, directive: Directive | None = None) -> Outcome:
        """Every second or so: take the driver's word, expire leases, refresh status.json and /metrics, see whether the run is over.

        A store that is away is alerted of and waited for, up to stall_timeout_s.

        Raises:
            Fenced: a later incarnation owns the run.
        """
        if directive is not None:
            self._state.direct(directive)
        self._state.expire()
        try:
            self._state.settle()
            self._state.request_evaluations()
            if self._looking.acquire(blocking=False):  # a tick that the driver gave up on may still look
                try:
                    self._watches.look()
                finally:
                    self._looking.release()
            if self._clock() - self._state.status_at >= STATUS_S:
                check_fence(self._store, self._incarnation)
                self._state.write_status()
                self._state.note_store("")
        except PERMANENT:
            raise
        except StoreError as error:
            self._state.note_store(str(error))
        self._view.show()
        self._state.conclude_faults()
        return self.outcome()

    def outcome(self) -> Outcome:
        """Where the run stands, or how it ended; `raise_if_failed` turns a guard's end into its error."""
        with self._lock:
            self._state.conclude()
            return self._state.end.outcome

    def summary(self) -> dict[str, Any]:
        """Figures for the live line."""
        return summary_of(self._state)

    def close(self, reason: str) -> None:
        """Say in status.json that nobody runs this run any more."""
        self._state.write_status(state="done" if self.outcome().kind is EndKind.DONE else "stopped", reason=reason)
        self._view.show()
