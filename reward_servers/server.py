"""The reward server's loop: ask committed groups to score, score in micro-batches, commit a score file, repeat."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from common.errors import AlreadyExists, CorruptFile, Fenced, StoreError
from common.gauges import Gauges
from common.heartbeat import HeldLeases
from common.protocols import Scorer, ScoringDesk
from common.types import MediaBatch, Score, ScoreFile, ScoringLease, Stop, Wait
from reward_servers.guarded import NOT_APPLICABLE, score_guarded

_PERMANENT = (CorruptFile, AlreadyExists)


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
        max_groups: leased at once.
        micro_batch: images a scorer call.
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
    store_patience_s: float = 120.0
    held: HeldLeases = field(default_factory=HeldLeases)
    gauges: Gauges = field(default_factory=Gauges)
    clock: Callable[[], float] = time.monotonic

    def run_until_stopped(self, sleep: Callable[[float], None]) -> None:
        """Drive the loop until the desk says Stop, sleeping between its waits."""
        for wait in scoring_loop(self):
            sleep(wait.seconds)


def scoring_loop(server: RewardServer) -> Iterator[Wait]:
    """Score until the desk says Stop; yield whenever there is nothing to do.

    Args:
        server: whose loop this is.

    Yields:
        How long to wait, and for what.

    Raises:
        Fenced: a later incarnation owns the run.
    """
    while True:
        answer = server.desk.ask_scoring(server.slot, server.reward, server.max_groups)
        if isinstance(answer, Stop):
            return
        if isinstance(answer, Wait):
            yield answer
            continue
        for lease in answer:
            server.held.add(lease.lease_id)
        for lease in answer:
            yield from _serve(server, lease)
            server.held.discard(lease.lease_id)


def _serve(server: RewardServer, lease: ScoringLease) -> Iterator[Wait]:
    """Score one group and commit; while the store is away back off, at last give the lease back as failed."""
    scores: tuple[Score, ...] | None = None
    deadline, pause_s = server.clock() + server.store_patience_s, 0.5
    while True:
        try:
            scores = scores or _scores(server, lease)
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


def _scores(server: RewardServer, lease: ScoringLease) -> tuple[Score, ...]:
    with server.gauges.timed("read_seconds_total"):
        images = server.source.read(lease.media_path).images
    prompts = lease.prompts * len(images) if len(lease.prompts) == 1 else lease.prompts
    if len(images) != len(prompts):
        raise CorruptFile(
            f"reward server {server.slot}: {lease.media_path} holds {len(images)} images for {len(prompts)} prompts; "
            "a scoring lease names one prompt an image"
        )
    with server.gauges.timed("score_seconds_total"):
        scores = score_guarded(server.scorer, images, prompts, server.micro_batch)
    server.gauges.add("images_total", len(images))
    for score in scores:
        if score.value is None and score.error != NOT_APPLICABLE:
            server.gauges.add("null_scores_total", 1, reason=score.error)
    return scores


def _score_file(server: RewardServer, lease: ScoringLease, scores: tuple[Score, ...]) -> ScoreFile:
    return ScoreFile(
        run=server.run, number=lease.number, lease_id=lease.group_lease_id, reward=server.reward,
        scorer_version=server.scorer.version, scores=scores,
    )  # fmt: skip
