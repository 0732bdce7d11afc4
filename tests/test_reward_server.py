"""The reward server's loop against a desk, a source and a sink in memory."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from common.errors import CorruptFile, Fenced, ScorerError, ScorerUnavailable, StoreError
from common.gauges import Gauges
from common.types import LeaseKind, MediaBatch, Prompt, Score, ScoreFile, ScoringLease, Stop, Wait
from reward_servers.guarded import NOT_APPLICABLE, score_guarded
from reward_servers.scorers.base import PlainScorer
from reward_servers.server import RewardServer, scoring_loop

PROMPTS = tuple(Prompt(id=str(i), text=f"p{i}") for i in range(5))
IMAGES = np.stack([np.full((4, 4, 3), i, dtype=np.uint8) for i in range(5)])


class LevelScorer(PlainScorer):
    """Scores an image by its gray level; what `levels` says is returned or raised instead."""

    name = "level"
    version = "3"

    def __init__(self, levels: Mapping[int, float | Exception] | None = None, skips: str = "") -> None:
        self._levels = dict(levels or {})
        self._skips = skips
        self.batch_sizes: list[int] = []

    def applies_to(self, prompt: Prompt) -> bool:
        """Judge all but the prompt to be skipped."""
        return prompt.id != self._skips

    def score(self, images: NDArray[np.uint8], prompts: Sequence[Prompt]) -> list[Score]:
        """Return or raise what the image's level stands for."""
        self.batch_sizes.append(len(images))
        values = [self._levels.get(int(image[0, 0, 0]), float(image[0, 0, 0])) for image in images]
        for value in values:
            if isinstance(value, Exception):
                raise value
        return [Score(sample_index=i, value=value) for i, value in enumerate(values) if not isinstance(value, Exception)]


class ShortScorer(LevelScorer):
    """Forgets one image of a batch."""

    def score(self, images: NDArray[np.uint8], prompts: Sequence[Prompt]) -> list[Score]:
        """Return one score too few."""
        return super().score(images, prompts)[1:]


def test_a_batch_of_n_equals_n_batches_of_one_in_any_order() -> None:
    scorer = LevelScorer()
    whole = score_guarded(scorer, IMAGES, PROMPTS, micro_batch=5)
    single = score_guarded(scorer, IMAGES, PROMPTS, micro_batch=1)
    turned = score_guarded(scorer, IMAGES[::-1], PROMPTS[::-1], micro_batch=2)
    assert scorer.batch_sizes == [5, 1, 1, 1, 1, 1, 2, 2, 1]
    assert [s.value for s in whole] == [s.value for s in single] == [s.value for s in turned][::-1] == [0, 1, 2, 3, 4]
    assert [s.sample_index for s in turned] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("error", [ScorerError("bad pixel"), ValueError("bad pixel"), RuntimeError("bad pixel"), KeyError("bad pixel")])
def test_a_failing_image_becomes_null_with_its_error_and_its_neighbors_are_scored(error: Exception) -> None:
    scores = score_guarded(LevelScorer({2: error}), IMAGES, PROMPTS, micro_batch=5)
    assert [s.value for s in scores] == [0, 1, None, 3, 4]
    assert "bad pixel" in scores[2].error


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e39])  # 1e39 is infinite in float32
def test_a_score_that_is_not_finite_becomes_null(value: float) -> None:
    scores = score_guarded(LevelScorer({1: value}), IMAGES, PROMPTS, micro_batch=5)
    assert [s.value for s in scores] == [0, None, 2, 3, 4]
    assert scores[1].error.startswith("not finite")


def test_a_wrong_number_of_scores_makes_the_whole_batch_null() -> None:
    scores = score_guarded(ShortScorer(), IMAGES, PROMPTS, micro_batch=5)
    assert [s.value for s in scores] == [None] * 5
    assert scores[4].error == "scorer level returned 4 scores for 5 images; it must return one an image"


def test_a_prompt_that_the_scorer_does_not_judge_is_marked_and_never_shown_to_it() -> None:
    scorer = LevelScorer({3: ScorerError("must not be asked")}, skips="3")
    scores = score_guarded(scorer, IMAGES, PROMPTS, micro_batch=5)
    assert [s.value for s in scores] == [0, 1, 2, None, 4]
    assert scores[3].error == NOT_APPLICABLE
    assert scorer.batch_sizes == [4]


class Desk:
    """Answers from a script and keeps what it is told."""

    def __init__(self, *answers: tuple[ScoringLease, ...] | Wait) -> None:
        self._answers = list(answers)
        self.asked: list[tuple[str, str, int]] = []
        self.committed: list[tuple[str, str]] = []
        self.failed: list[tuple[str, str]] = []
        self.stopped: list[tuple[str, str]] = []

    def ask_scoring(self, slot: str, reward: str, limit: int) -> tuple[ScoringLease, ...] | Wait | Stop:
        """Return the next answer, at last Stop."""
        self.asked.append((slot, reward, limit))
        return self._answers.pop(0) if self._answers else Stop(reason="done")

    def commit_scores(self, lease_id: str, path: str) -> None:
        """Keep a commit."""
        self.committed.append((lease_id, path))

    def fail_scoring(self, lease_id: str, error: str) -> None:
        """Keep a failure."""
        self.failed.append((lease_id, error))

    def stop_scoring(self, lease_id: str, error: str) -> None:
        """Keep what ends the run."""
        self.stopped.append((lease_id, error))

    def beat(self, slot: str, lease_ids: Sequence[str], metrics: Mapping[str, float]) -> None:
        """Hear nothing."""


class Disk:
    """Source and sink; each operation first raises the next error of its script."""

    def __init__(self, read_errors: Sequence[StoreError] = (), write_errors: Sequence[StoreError] = ()) -> None:
        self.read_errors, self.write_errors = list(read_errors), list(write_errors)
        self.files: list[ScoreFile] = []
        self.reads = 0

    def read(self, path: str) -> MediaBatch:
        """Return the five images."""
        self.reads += 1
        if self.read_errors:
            raise self.read_errors.pop(0)
        return MediaBatch(images=IMAGES, statistics={})

    def write(self, score_file: ScoreFile, lease: ScoringLease) -> str:
        """Keep a file."""
        if self.write_errors:
            raise self.write_errors.pop(0)
        self.files.append(score_file)
        return f"scores/{score_file.number}"


class Clock:
    """Time that passes only while somebody waits."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds


def lease(number: int, prompts: tuple[Prompt, ...] = PROMPTS[:1]) -> ScoringLease:
    return ScoringLease(
        lease_id=f"s{number}", kind=LeaseKind.TRAIN, number=number, reward="level", group_lease_id=f"g{number}", media_path=f"m{number}",
        prompts=prompts,
    )  # fmt: skip


def serve(desk: Desk, disk: Disk, clock: Clock | None = None) -> tuple[RewardServer, list[Wait]]:
    clock = clock or Clock()
    server = RewardServer(
        desk=desk, slot="r0", run="run", reward="level", scorer=LevelScorer(), source=disk, sink=disk, max_groups=2, micro_batch=2,
        store_patience_s=20.0, clock=clock,
    )  # fmt: skip
    waits = []
    for wait in scoring_loop(server):
        waits.append(wait)
        clock.sleep(wait.seconds)
    return server, waits


def test_the_loop_scores_every_lease_commits_and_leaves_on_stop() -> None:
    desk, disk = Desk((lease(4), lease(7)), Wait(seconds=1.5, reason="no groups"), (lease(9, PROMPTS),)), Disk()
    server, waits = serve(desk, disk)
    assert [wait.seconds for wait in waits] == [1.5]
    assert desk.asked == [("r0", "level", 2)] * 4
    assert desk.committed == [("s4", "scores/4"), ("s7", "scores/7"), ("s9", "scores/9")]
    assert server.held.snapshot() == ()
    file = disk.files[0]
    assert (file.run, file.number, file.lease_id, file.reward, file.scorer_version) == ("run", 4, "g4", "level", "3")
    assert [score.value for score in file.scores] == [0, 1, 2, 3, 4]
    assert server.gauges.snapshot()["images_total"] == 15


def test_a_scorer_of_another_version_than_the_runs_scores_ends_the_run_and_scores_nothing() -> None:
    same, other = (replace(lease(number), scorer_version=version) for number, version in ((1, "3"), (2, "2")))
    desk, disk = Desk((same, other)), Disk()
    server, _ = serve(desk, disk)
    assert [number for number, _ in desk.committed] == ["s1"]
    assert (disk.reads, len(disk.files)) == (1, 1)
    ((lease_id, error),) = desk.stopped
    assert lease_id == "s2"
    assert error.startswith("its server at r0 scores with 3, the run's scores so far are of 2; bring that scorer back")
    assert server.held.snapshot() == ()


def test_a_prompt_a_group_is_repeated_and_other_numbers_of_prompts_are_refused() -> None:
    desk, disk = Desk((lease(1, PROMPTS[:2]),)), Disk()
    serve(desk, disk)
    assert desk.committed == []
    assert "5 images for 2 prompts" in desk.failed[0][1]


def test_a_store_that_is_away_for_a_moment_costs_waits_and_no_score() -> None:
    desk, disk = Desk((lease(1),)), Disk([StoreError("read away")], [StoreError("disk full"), StoreError("disk full")])
    _, waits = serve(desk, disk)
    assert [wait.seconds for wait in waits] == [0.5, 1.0, 2.0]
    assert waits[1].reason == "store: disk full"
    assert disk.reads == 2  # images that were scored are not read again
    assert desk.committed == [("s1", "scores/1")]
    assert desk.failed == []


def test_a_store_that_stays_away_gives_the_lease_back_as_failed_after_its_deadline() -> None:
    desk, disk, clock = Desk((lease(1),)), Disk(write_errors=[StoreError("disk full")] * 100), Clock()
    server, _ = serve(desk, disk, clock)
    assert desk.failed == [("s1", "disk full")]
    assert desk.committed == []
    assert 20 <= clock.now < 31  # the deadline, and at most one pause more
    assert server.held.snapshot() == ()


def test_a_corrupt_file_is_given_back_at_once_and_a_fenced_server_leaves() -> None:
    desk = Desk((lease(1),))
    _, waits = serve(desk, Disk([CorruptFile("bad magic")]))
    assert waits == []
    assert desk.failed == [("s1", "bad magic")]
    with pytest.raises(Fenced):
        serve(Desk((lease(1),)), Disk([Fenced("a later incarnation runs")]))


def test_leases_are_held_from_the_answer_until_each_is_done() -> None:
    disk, clock = Disk([StoreError("away")]), Clock()
    server = RewardServer(
        desk=Desk((lease(1), lease(2))), slot="r0", run="run", reward="level", scorer=LevelScorer(), source=disk, sink=disk, clock=clock
    )
    loop = scoring_loop(server)
    next(loop)  # the store is away in the first lease
    assert server.held.snapshot() == ("s1", "s2")
    assert list(loop) == []
    assert server.held.snapshot() == ()


def test_a_plain_server_runs_with_a_sleep_function() -> None:
    clock, disk = Clock(), Disk()
    desk = Desk(Wait(seconds=2.0, reason="none"), (lease(1),))
    RewardServer(
        desk=desk, slot="r0", run="run", reward="level", scorer=LevelScorer(), source=disk, sink=disk, clock=clock
    ).run_until_stopped(clock.sleep)
    assert clock.now == 2.0
    assert desk.committed == [("s1", "scores/1")]


class SlowScorer(LevelScorer):
    """Each call takes 3 s of a clock; the first finds nobody."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock

    def score(self, images: NDArray[np.uint8], prompts: Sequence[Prompt]) -> list[Score]:
        """Let the call's time pass."""
        self._clock.sleep(3.0)
        scores = super().score(images, prompts)
        if len(self.batch_sizes) == 1:
            raise ScorerUnavailable("connection refused")
        return scores


def slow_server(desk: Desk, clock: Clock) -> RewardServer:
    disk = Disk()
    return RewardServer(
        desk=desk, slot="r0", run="run", reward="level", scorer=SlowScorer(clock), source=disk, sink=disk, retries=1,
        gauges=Gauges(clock), clock=clock,
    )  # fmt: skip


def test_the_seconds_of_scoring_are_those_of_the_calls_and_a_pause_before_a_retry_is_waiting_alone() -> None:
    desk, clock = Desk((lease(1),)), Clock()
    server = slow_server(desk, clock)
    server.run_until_stopped(clock.sleep)
    totals = server.gauges.snapshot()
    assert desk.committed == [("s1", "scores/1")]
    assert (totals["calls_total"], totals["score_seconds_total"]) == (2.0, 6.0)
    assert totals["waiting_seconds_total"] >= 0.25  # a jittered pause of 0.5 s
    assert totals["score_seconds_total"] + totals["waiting_seconds_total"] == pytest.approx(clock.now, rel=1e-9)  # rounding alone


def test_the_turns_of_other_loops_during_a_pause_are_no_scoring() -> None:
    """As --local drives it: whoever else is in turn takes 100 s."""
    desk, clock = Desk((lease(1),)), Clock()
    server = slow_server(desk, clock)
    for _ in scoring_loop(server):
        clock.sleep(100.0)
    assert desk.committed == [("s1", "scores/1")]
    assert server.gauges.snapshot()["score_seconds_total"] == 6.0
