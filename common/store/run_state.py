"""RunState: what the Coordinator keeps, and the files that follow from it: drops, null scores, evaluation results, status."""

import os
import socket
import threading
from collections.abc import Callable, Collection

from common.errors import AlreadyExists, CorruptFile, Fenced, StoreError
from common.logs import get_logger
from common.metrics import RunMetrics
from common.store import paths
from common.store.claim import check_fence
from common.store.coordinator_settings import CoordinatorSettings
from common.store.directive import Directive
from common.store.ending import EndKind, RunEnd
from common.store.eval_results import write_result
from common.store.evaluation_view import EvaluationView
from common.store.evaluations import EvalBoard
from common.store.fleet_part import FleetPart
from common.store.ledger import Ledger
from common.store.ledger_entries import GroupState
from common.store.ledger_scoring import ScoreKey
from common.store.manifests import Status, read_drop, read_manifest, read_status, write_drop, write_status
from common.store.pools import PoolWatch
from common.store.publications import Publications
from common.store.pulse import Pulse
from common.store.recovery import FoundSheets, adapters, find_sheets, read_listing, recall, summary_of
from common.store.retention import Retention
from common.store.run_store import RunStore
from common.store.score_counts import ScoreCounts
from common.store.scorer_versions import NOBODY, ScorerVersions, read_scorer_versions
from common.store.scores import read_scores, write_scores
from common.store.sensor_watch import SensorWatch
from common.store.slot_totals import SlotTotals
from common.types import Drop, Manifest, Prompt, Publication, Score, ScoreFile

POLL_S = 0.2  # between asks of somebody who waits
PERMANENT = (AlreadyExists, CorruptFile, Fenced)  # what the store may say that waiting does not mend
_log = get_logger("coordinator")


class RunState:
    """Everything behind the desks. `lock` guards the decisions; methods that touch files take it only around them."""

    def __init__(
        self, store: RunStore, settings: CoordinatorSettings, *, incarnation: int, prompt_for: Callable[[int], Prompt],
        read_publication: Callable[[str], Publication] | None, clock: Callable[[], float], wall: Callable[[], float],
    ) -> None:  # fmt: skip
        self.store, self.settings, self.incarnation, self.prompt_for, self.clock = store, settings, incarnation, prompt_for, clock
        self.lock = threading.RLock()
        self.ledger = Ledger.rebuild(read_listing(store, prompt_for), settings.ledger, prompt_for)
        self.board = EvalBoard(settings.protocol, settings.ledger)
        self.publications = Publications(lambda version: recall(store, read_publication, version))
        self.pulse, self.fleet = Pulse(clock()), FleetPart()
        self.pools = PoolWatch(settings.rewards, silence_s=settings.schedule.lease_timeout_s)
        schedule, status = settings.schedule, read_status(store)
        self.end = RunEnd(started=clock(), time_limit_s=schedule.time_limit_s, stall_timeout_s=schedule.stall_timeout_s)
        self.metrics = RunMetrics(settings.run)
        names = [reward.name for reward in settings.rewards]
        self.scorer_versions = ScorerVersions(read_scorer_versions(store, names))
        self.score_counts = ScoreCounts(self.metrics, names)
        self.totals = SlotTotals(self.metrics, names, is_restart=self.ledger.counts()["issued"] > 0)
        self._evaluations = EvaluationView(self.metrics)
        self._evaluated = self._evaluations.restore(store, self.board)  # versions whose result is durable
        self.retention = Retention(
            store, settings.store, max_staleness=schedule.max_staleness, retired_through=status.retired_through if status else 0
        )
        self.learner_waits_since: float | None = None
        self.store_trouble = ""  # the store's last refusal, while it is away
        self.learner_done = False
        self.finished_update = self.first_update = min(self.ledger.last_update, self.ledger.newest_version or 0)
        base = self.board.directory_of(0) if self.board.is_enabled and settings.protocol.config.at_start else ""
        self.sensors = SensorWatch(store, directory=base, rewards=settings.rewards, incarnation=incarnation, finished=self.finished_update)
        self.update_metrics: dict[str, float] = {}
        self.last_manifest: Manifest | None = read_manifest(store, self.ledger.last_update) if self.ledger.last_update else None
        self.status_at = float("-inf")
        self._sequence = status.sequence if status else 0
        self._wall = wall
        self._finishing = threading.Lock()  # one evaluation result at a time
        self.verdict = ""  # the newest evaluation, in words
        self._due = {
            version for version in adapters(store)
            if self._is_due(version) and (version == self.ledger.newest_version or self.publications.get(version) is not None)
        }  # fmt: skip

    # ---- leases that ran out, and files that follow

    def expire(self) -> None:
        """Expire the silent leases, and write what follows."""
        with self.lock:
            now = self.clock()
            late = self.ledger.expire(now) + self.board.expire(now)
            for book in (self.ledger.leases, self.ledger.scoring.leases, self.board.leases, self.board.scoring.leases):
                self.fleet.overran(book.take_overrun())
        if late:
            self.metrics.count("leases_expired_total", late)
            self.try_settle()

    def try_settle(self) -> None:
        """Settle; a store that is away is noted, and the next tick tries again. Raises what waiting cannot mend."""
        self.attempt(self.settle)

    def attempt(self, step: Callable[[], None]) -> None:
        """Take a step that is taken again later; a store that is away is noted. Raises what waiting cannot mend."""
        try:
            step()
        except PERMANENT:
            raise
        except StoreError as error:
            self.note_store(str(error))

    def note_store(self, trouble: str) -> None:
        """The store refused ("": it answers again). Says so once each way; nothing is acknowledged meanwhile."""
        if bool(trouble) != bool(self.store_trouble):
            _log.warning("%s", f"alert: the store is away, and the run waits: {trouble}" if trouble else "the store answers again")
        self.store_trouble = trouble

    def direct(self, directive: Directive) -> None:
        """Take the driver's word."""
        with self.lock:
            self.fleet.directive = directive
            self.learner_done = self.learner_done or directive.learner_left
            self.end.began(self.clock() - directive.elapsed_s)
            if directive.ended is not None:
                self.end.finish(directive.ended.kind, directive.ended.reason)

    def moved(self, *, learns: bool = False) -> None:
        """A file was committed: the run is alive. learns: a manifest or a policy version."""
        with self.lock:
            self.end.progress(self.clock(), learns=learns)

    def settle(self) -> None:
        """Write the drops and null scores that the ledger calls for, then the results of finished evaluations."""
        while True:
            with self.lock:
                wanted = self.ledger.decisions()
                nulls = [(each.key, each.error) for each in wanted.nulls]
                nulls += [(key, self.board.scoring.error(key)) for key in self.board.exhausted()]
            if not wanted.drops and not nulls:
                break
            for drop in wanted.drops:
                self.drop(drop)
            for key, error in nulls:
                self._file_nulls(key, error)
        self._finish_evaluations()

    def drop(self, drop: Drop) -> None:
        """Make a drop durable, then let the number leave the sum; an earlier reason stands."""
        check_fence(self.store, self.incarnation)
        try:
            write_drop(self.store, drop, writer_id=f"i{self.incarnation:04d}")
        except AlreadyExists:
            drop = read_drop(self.store, drop.number)
        with self.lock:
            self.ledger.drop_written(drop)

    def _file_nulls(self, key: ScoreKey, error: str) -> None:
        with self.lock:
            num_images = len(self.prompts_of(key))
        scores = tuple(Score(sample_index=index, value=None, error=error) for index in range(num_images))
        file = ScoreFile(
            run=self.settings.run, number=key.number, lease_id=key.lease_id, reward=key.reward, scorer_version=NOBODY, scores=scores
        )
        self.score_committed(write_scores(self.store, file, directory=key.directory))

    def score_committed(self, path: str) -> None:
        """Take in a score file. Raises CorruptFile when it breaks its schema or does not hold K scores."""
        file = read_scores(self.store, path)
        summary = summary_of(file)
        sheet = paths.parse_sheet_score(path)
        with self.lock:
            self.score_counts.take(path, file)
            self.scorer_versions.note(file)
            if sheet is None:
                self.ledger.scored(summary)
                self.pools.filed(file)
                return
            directory = path.rpartition("/")[0]
            key = ScoreKey(number=sheet.number, lease_id=sheet.lease_id, reward=sheet.reward, directory=directory)
            self.board.scored(key, summary.values)

    def prompts_of(self, key: ScoreKey) -> tuple[Prompt, ...]:
        """One prompt an image."""
        evaluation = self.board.get(key.directory)
        if evaluation is not None:
            return evaluation.sheets[key.number].prompts
        return (self.prompt_for(key.number),) * self.settings.group_size

    # ---- evaluations

    def _is_due(self, version: int) -> bool:
        """Whether the rules want a version evaluated, and nobody has; asks no file."""
        evaluation = self.settings.protocol.config
        at_start = version == 0 and evaluation.at_start
        regular = evaluation.every > 0 and version > 0 and version % evaluation.every == 0
        last = version == self.ledger.newest_version and self._is_learnt()
        return self.board.is_enabled and version not in self._evaluated and (at_start or regular or last)

    def _is_learnt(self) -> bool:
        """Whether no further version will come."""
        return self.learner_done or (self.ledger.newest_version or 0) >= self.settings.schedule.num_updates

    def _note_due(self) -> None:
        newest = self.ledger.newest_version
        if newest is not None and self._is_due(newest):
            self._due.add(newest)

    def request_evaluations(self) -> None:
        """Begin the evaluations that are due and whose publication is known; sheets and scores that exist are kept. Raises StoreError.

        Files are read without the lock: nobody draws a sheet of an evaluation that has not begun.
        """
        with self.lock:
            self._note_due()
            waiting = [version for version in sorted(self._due) if self.board.get(self.board.directory_of(version)) is None]
        for version in waiting:
            publication = self.publications.get(version)
            if publication is not None:
                found = find_sheets(self.store, self.board.directory_of(version))
                self._begin(publication, found)
        if waiting:
            self._finish_evaluations()

    def _begin(self, publication: Publication, found: FoundSheets) -> None:
        with self.lock:
            if publication.adapter.version in self._due and self.board.request(publication) is not None:
                found.tell(self.board)

    def pinned_versions(self) -> set[int]:
        """Policy versions that evaluations still need."""
        return self._due | self.board.pinned_versions()

    def _finish_evaluations(self) -> None:
        with self._finishing:
            with self.lock:
                finished = self.board.finished()
            for evaluation in finished:
                result = write_result(self.store, evaluation, self.settings.protocol)
                means = {name: table["mean"] for name, table in result["rewards"].items() if table["mean"] is not None}
                with self.lock:
                    self.board.close(evaluation.directory)
                    self._due.discard(evaluation.publication.adapter.version)
                    self._evaluated.add(evaluation.publication.adapter.version)
                    self.verdict = f"v{result['version']} " + " ".join(f"{name} {mean:.3f}" for name, mean in means.items())
                    self.end.progress(self.clock())
                self._evaluations.take(result)

    # ---- the end, and what people see

    def forget_but(self, slots: Collection[str]) -> None:
        """Forget all slots but these: they are gone for good."""
        with self.lock:
            self.pulse.keep(slots)
            self.publications.keep(slots)
            self.totals.keep(slots)

    def conclude(self) -> None:
        """Set the outcome when a guard fires, or when the learner is through and evaluations are done."""
        now = self.clock()
        cause = self.pools.cause_to_stop(now)
        if cause:
            self.end.finish(EndKind.GUARD, cause, gate="reward")
        unhealthy = self.ledger.unhealthy()
        if unhealthy:
            ill = self.pools.ill_train_rewards(now)
            said = [*ill, unhealthy] if ill else [unhealthy, self.pools.last_error()]
            sentence = "; ".join(text for text in said if text)
            self.end.finish(EndKind.GUARD, sentence, gate="reward" if ill else "drops")
        if not self._is_learnt():
            return
        self._note_due()
        if not self._due and not self.board.pending():
            all_published = (self.ledger.newest_version or 0) >= self.settings.schedule.num_updates
            kind = EndKind.DONE if all_published else EndKind.TIME_LIMIT
            self.end.finish(kind, "all updates are done" if all_published else "the time limit has passed")
            return
        idle = self.end.stalled_for(float("-inf"), now)
        if idle is not None:
            self.end.finish(EndKind.STALL, f"the evaluation of versions {sorted(self._due)} waited {idle:.0f} s for rollouts or scores")

    def conclude_faults(self) -> None:
        """End a run whose ledger lost count, or in which nothing was committed for stall_timeout_s: the learner may not even ask."""
        with self.lock:
            now = self.clock()
            if error := self.ledger.conservation_error():
                cause = f"the ledger lost count of {error} groups; this is a fault of flowfleet: `flowfleet audit` says whether any was used twice"
                self.end.finish(EndKind.GUARD, cause, gate="conservation")
            self.conclude()
            self._conclude_flat(now)
            idle = self.end.stalled_for(float("-inf"), now)
            if idle is None or self.end.outcome.is_over:
                return
            waits = self.learner_waits_since is not None
            cause = f"the learner waited for {self.waited_for()}" if waits else f"the learner works on update {self.ledger.last_update}"
            trouble = f"; the store is away: {self.store_trouble}" if self.store_trouble else ""
            self.end.finish(
                EndKind.STALL, f"{cause}, and nothing was committed for {idle:.0f} s{trouble}; mend what hangs, or raise "
                "schedule.stall_timeout_s if it is only slow; the same command goes on",
            )  # fmt: skip

    def _conclude_flat(self, now: float) -> None:
        """End a run that replaces flat groups and gets no others: every drop is a commit, so it would never count as a stall."""
        barren = self.end.barren_for(now)
        if barren is None or self._is_learnt() or self.end.is_closing(now):
            return
        num_flat = self.ledger.flat_in_a_row()
        if num_flat >= self.settings.groups_per_update:
            self.end.finish(
                EndKind.GUARD, f"{num_flat} groups in a row were dropped as flat (every train reward gave all samples of a group the same score) "
                f"and no manifest was made for {barren:.0f} s; the reward is saturated or constant: train on harder prompts or another reward, "
                "raise schedule.stall_timeout_s if a group is only rarely not flat, or set schedule.replace_flat_groups = false", gate="flat",
            )  # fmt: skip

    def write_status(self, state: str = "running", reason: str = "") -> None:
        """Refresh status.json."""
        with self.lock:
            self._sequence += 1
            self.status_at = self.clock()
            newest = self.ledger.newest_version
            status = Status(
                incarnation=self.incarnation, sequence=self._sequence, written_at=self._wall(), state=state, reason=reason,
                host=socket.gethostname(), process_id=os.getpid(), version=-1 if newest is None else newest,
                manifests=self.ledger.last_update, retired_through=self.retention.retired_through, counts=self.ledger.counts(),
                fleet=self.fleet.directive.report, alerts=(*(alert.sentence for alert in self.sensors.alerts), *self.pools.alerts(self.clock()).values()),
            )  # fmt: skip
        write_status(self.store, status)

    def waited_for(self) -> str:
        """What the next manifest waits for, naming the role."""
        held = self.ledger.holding_up()
        alive = f"{self.pulse.heard_of('rollout', self.clock())} heard in the last minute"
        if held is None:
            return f"rollout workers ({alive}): the next groups are not issued yet"
        number, state = held
        if state is not GroupState.GENERATED:
            return f"rollout workers ({alive}): group {number} is {state}"
        names = [reward.name for reward in self.settings.rewards if reward.use == "train"]
        missing = [name for name in names if any(key.number == number for key in self.ledger.wanted_scores(name))]
        return f"reward servers of {', '.join(missing)}: group {number} is not scored"
