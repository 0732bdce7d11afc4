"""The reward server's loop: ask committed groups to score, score in micro-batches, commit a score file, repeat.

What fails is tried again where it may pass; a group that failed whole goes back, a run of them makes the server rest (its breaker);
a scorer that hangs or is broken for good costs the process, since nothing else ends or mends it.
"""

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Final, Protocol

from common.errors import AlreadyExists, CorruptFile, Fenced, ScorerHung, StoreError
from common.gauges import Gauges
from common.heartbeat import Heartbeat, HeldLeases
from common.protocols import Scorer, ScoringDesk
from common.types import LeaseKind, MediaBatch, Score, ScoreFile, ScoringLease, Stop, Wait
from reward_servers.breaker import Breaker, BreakerState, ScorerBroken
from reward_servers.calls import CountedCalls, DirectCalls, ScorerCalls
from reward_servers.config import OnFailure, Use
from reward_servers.guarded import NOT_APPLICABLE, GuardRules, scoring_rounds

_PERMANENT = (CorruptFile, AlreadyExists)
BREAKER_GAUGE = "breaker_open"  # what common.store.pools reads
_LEVELS = {BreakerState.CLOSED: 0.0, BreakerState.HALF_OPEN: 0.5, BreakerState.OPEN: 1.0}
_REST_POLL_S = 1.0  # a resting server still hears that the run ends
LEASED_WORK_S: Final = 10.0
"""No lease waits for longer than this and the group before it: groups are served in turn, but the time of each lease
(schedule.group_timeout_s, past which a server counts as hanging) runs from its grant."""


class MediaSource(Protocol):
    """Where images are read."""

    def read(self, path: str) -> MediaBatch:
        """Return the images of a group or sheet, by its path in the run directory. Raises StoreError."""
        ...


class ScoreSink(Protocol):
    """Where scores are committed."""

    def write(self, score_file: ScoreFile, lease: ScoringLease) -> str:
        """Commit a score file and return the path of the one that stands: the first commit wins. Raises StoreError."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardServer:
    """One reward's server: what its loop works with.

    Attributes:
        desk: gives and takes scoring leases.
        slot: this server's name at the desk.
        run: the run's name, as group files carry it.
        reward: the reward's name in the config.
        scorer: judges.
        source: reads media.
        sink: commits scores.
        max_groups: leased at once; fewer where they take longer than LEASED_WORK_S.
        micro_batch: images a scorer call.
        retries: of images whose failure may pass.
        on_failure: what a failed group or image leads to; see RewardConfig.
        calls: runs the scorer's calls, with a deadline or without.
        breaker: says when to rest.
        is_restarted: whether somebody starts this process again when its scorer hangs or is broken; else the one ends the run, and the
            other rests.
        use: of the reward; one that watches rests where it is broken, since a process that cannot start again would end the run.
        store_patience_s: how long an unreachable store is tried again before a lease is given back as failed.
        held: lease ids that the heartbeat keeps alive.
        gauges: what the heartbeat reports.
        clock: seconds, for durations only.
    """

    desk: ScoringDesk
    slot: str
    run: str
    reward: str
    scorer: Scorer
    source: MediaSource
    sink: ScoreSink
    max_groups: int = 4
    micro_batch: int = 16
    retries: int = 0
    on_failure: OnFailure = "retry"
    calls: ScorerCalls = field(default_factory=DirectCalls)
    breaker: Breaker = field(default_factory=Breaker)
    is_restarted: bool = False
    use: Use = "train"
    store_patience_s: float = 120.0
    held: HeldLeases = field(default_factory=HeldLeases)
    gauges: Gauges = field(default_factory=Gauges)
    clock: Callable[[], float] = time.monotonic

    def run_until_stopped(self, sleep: Callable[[float], None], heartbeat: Heartbeat | None = None) -> None:
        """Drive the loop until the desk says Stop, sleeping between its waits. Raises what ended it, or what ended the heartbeat."""
        with heartbeat or nullcontext():
            for wait in scoring_loop(self, heartbeat):
                with self.gauges.timed("waiting_seconds_total"):
                    sleep(wait.seconds)

    def beat(self) -> None:
        """Keep the held leases alive and hand over the gauges, out of turn or without a heartbeat (--local)."""
        self.desk.beat(self.slot, self.held.snapshot(), self.gauges.snapshot())


def scoring_loop(server: RewardServer, heartbeat: Heartbeat | None = None) -> Iterator[Wait]:
    """Score until the desk says Stop; yield whenever there is nothing to do.

    Args:
        server: whose loop this is.
        heartbeat: looked at before each ask, a busy server's too: without it leases expire. None: the caller beats.

    Yields:
        How long to wait, and for what.

    Raises:
        Fenced: a later incarnation owns the run.
        ScorerHung: the scorer hangs; every lease was given back, and this process must end.
        ScorerBroken: the same, since it scores nothing any more.
    """
    told, group_s = BreakerState.CLOSED, 0.0
    while True:
        if heartbeat is not None:
            heartbeat.check()
        limit = server.breaker.admits(_num_groups(server, group_s))
        if server.breaker.state is not told:
            told = _tell_breaker(server)
        answer = server.desk.ask_scoring(server.slot, server.reward, limit)
        if isinstance(answer, Stop):
            return
        if isinstance(answer, Wait) or not answer:
            yield answer if limit and isinstance(answer, Wait) else _rest(server)
            continue
        group_s = yield from _serve_all(server, answer)
        if server.calls.hung:
            if server.is_restarted:
                raise ScorerHung(server.calls.hung)
            return
        if _must_end(server):
            raise ScorerBroken(
                f"reward {server.reward}: {server.breaker.broken}; a process that scores nothing any more is ended and started again; "
                "if that does not help, mend the scorer"
            )


def _num_groups(server: RewardServer, group_s: float) -> int:
    """How many groups to ask for when the last took so many seconds each."""
    return server.max_groups if group_s * server.max_groups <= LEASED_WORK_S else max(1, int(LEASED_WORK_S / group_s))


def _must_end(server: RewardServer) -> bool:
    return bool(server.breaker.broken) and server.is_restarted and server.use == "train"


def _tell_breaker(server: RewardServer) -> BreakerState:
    """Report the breaker at once: the desk decides on admission by it, and --local has no heartbeat."""
    server.gauges.set(BREAKER_GAUGE, _LEVELS[server.breaker.state])
    server.beat()
    return server.breaker.state


def _rest(server: RewardServer) -> Wait:
    left_s = server.breaker.rest_s()
    reason = f"reward {server.reward}: its breaker is open for {left_s:.0f} s more: {server.breaker.last_error}"
    return Wait(seconds=min(left_s, _REST_POLL_S), reason=reason)


def _serve_all(server: RewardServer, leases: Sequence[ScoringLease]) -> Generator[Wait, None, float]:
    """Serve leases in turn; once the breaker opened, the scorer hangs or LEASED_WORK_S is over, the rest goes back unharmed.

    Returns:
        The mean seconds of a group that was served.
    """
    for lease in leases:
        server.held.add(lease.lease_id)
    began, num_served, served_s = server.clock(), 0, 0.0
    for lease in leases:
        if server.breaker.state is BreakerState.OPEN or server.calls.hung:
            server.desk.return_scoring(lease.lease_id, server.calls.hung or server.breaker.last_error)
        elif served_s > LEASED_WORK_S:
            server.desk.return_scoring(lease.lease_id, "")  # no failure: nothing to hold against the reward
        else:
            yield from _serve(server, lease)
            num_served, served_s = num_served + 1, server.clock() - began
        server.held.discard(lease.lease_id)
    return served_s / max(1, num_served)


def _serve(server: RewardServer, lease: ScoringLease) -> Iterator[Wait]:
    """Score one group and commit, or give it back; while the store is away back off, at last give the lease back as failed.

    A scorer of another version than the run's scores so far ends the run: its scores would be of another curve.
    """
    if lease.scorer_version not in ("", server.scorer.version):
        server.desk.stop_scoring(
            lease.lease_id,
            f"its server at {server.slot} scores with {server.scorer.version}, the run's scores so far are of {lease.scorer_version}; "
            "bring that scorer back (its package, checkpoint or options), and the same command goes on; or begin another run with the new one",
        )
        return
    scores: tuple[Score, ...] | None = None
    deadline, pause_s, is_judged = server.clock() + server.store_patience_s, 0.5, False
    while True:
        if scores is not None and not is_judged:
            if _gives_back(server, lease, scores):
                return
            is_judged = True
        try:
            if scores is None:
                scores = yield from _scores(server, lease)
                continue
            server.desk.commit_scores(lease.lease_id, server.sink.write(_score_file(server, lease, scores), lease))
            return
        except Fenced:
            raise
        except StoreError as error:
            if isinstance(error, _PERMANENT) or server.clock() >= deadline:
                server.desk.fail_scoring(lease.lease_id, str(error))
                return
            server.gauges.add("store_retries_total", 1)
            yield Wait(seconds=pause_s, reason=f"store: {error}")
            pause_s = min(2 * pause_s, 10.0)


def _scores(server: RewardServer, lease: ScoringLease) -> Generator[Wait, None, tuple[Score, ...]]:
    with server.gauges.timed("read_seconds_total"):
        images = server.source.read(lease.media_path).images
    prompts = lease.prompts * len(images) if len(lease.prompts) == 1 else lease.prompts
    if len(images) != len(prompts):
        raise CorruptFile(
            f"reward server {server.slot}: {lease.media_path} holds {len(images)} images for {len(prompts)} prompts; "
            "a scoring lease names one prompt an image"
        )
    calls = CountedCalls(server.calls, server.gauges)
    rules = GuardRules(micro_batch=server.micro_batch, retries=server.retries, calls=calls, clock=server.clock)
    scores = yield from scoring_rounds(server.scorer, images, prompts, rules)
    if calls.broken:
        server.breaker.gave_up(calls.broken)
    server.gauges.add("images_total", len(images))
    for score in _failures(scores):
        server.gauges.add("null_scores_total", 1, reason=score.error)
    return scores


def _failures(scores: Sequence[Score]) -> list[Score]:
    return [score for score in scores if score.value is None and score.error != NOT_APPLICABLE]


def _gives_back(server: RewardServer, lease: ScoringLease, scores: Sequence[Score]) -> bool:
    """Note what the scores say of the server, and give the lease back when they are not to be committed.

    A training group fails whole when no image that it applies to was scored. An evaluation sheet holds images of many prompts: there only
    failures that may pass are the server's; others are its scorer's word on those prompts, and are committed.
    """
    failures = _failures(scores)
    if not failures:
        if any(score.value is not None for score in scores):
            server.breaker.succeeded()
        return False
    error, may_pass = failures[0].error, all(score.may_pass for score in failures)
    hung = server.calls.hung
    is_lost = bool(hung) or _must_end(server)
    is_whole = all(score.value is None for score in scores) and (lease.kind is LeaseKind.TRAIN or may_pass)
    is_probe = server.breaker.state is BreakerState.HALF_OPEN
    if is_whole:
        server.breaker.failed(error, may_pass=any(score.may_pass for score in failures))
    elif any(score.value is not None for score in scores) and not is_lost:
        server.breaker.succeeded()
    if server.on_failure == "stop" or (hung and not server.is_restarted):
        place = (
            f"image {failures[0].sample_index} of group {lease.number}"
            if lease.kind is LeaseKind.TRAIN
            else f"evaluation sheet {lease.number}"
        )
        server.desk.stop_scoring(lease.lease_id, f"{place} could not be scored: {hung or error}")
    elif server.on_failure == "drop_sample" or not (is_whole or is_lost):
        return False
    elif is_probe and may_pass and lease.kind is LeaseKind.TRAIN:  # trying whether the server is back costs the group nothing
        server.desk.return_scoring(lease.lease_id, error)
    else:
        server.desk.fail_scoring(lease.lease_id, error)
    return True


def _score_file(server: RewardServer, lease: ScoringLease, scores: tuple[Score, ...]) -> ScoreFile:
    return ScoreFile(
        run=server.run, number=lease.number, lease_id=lease.group_lease_id, reward=server.reward,
        scorer_version=server.scorer.version, scores=scores,
    )  # fmt: skip
