"""How a reward server treats failures: retries, whole groups, deadlines, hanging scorers, its breaker; and groupwise scorers."""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from common.errors import ConfigError, ScorerError, ScorerHung, ScorerUnavailable, StoreError
from common.protocols import GroupScorer
from common.types import NOT_APPLICABLE, LeaseKind, MediaBatch, Prompt, Score, ScoreFile, ScoringLease, Stop, Wait
from reward_servers.breaker import Breaker
from reward_servers.calls import DeadlineCalls, DirectCalls
from reward_servers.guarded import GuardRules, score_guarded, scoring_rounds
from reward_servers.scorers.base import PlainScorer
from reward_servers.scorers.diversity import Diversity, block_means, make_diversity
from reward_servers.scorers.groupwise import GroupwiseScorer
from reward_servers.server import RewardServer, scoring_loop

Images = NDArray[np.uint8]
SAME = Prompt(id="p", text="a star")
PROMPTS = tuple(Prompt(id=str(index), text=f"p{index}") for index in range(4))
IMAGES = np.stack([np.full((8, 8, 3), 10 * index, dtype=np.uint8) for index in range(4)])


class Clock:
    """Time that passes only while somebody waits."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Scripted(PlainScorer):
    """Calls `judge` with the image's level; counts its calls by level."""

    name = "scripted"
    version = "1"

    def __init__(self, judge: Callable[[int, int], float]) -> None:
        self._judge, self.calls = judge, dict.fromkeys((0, 10, 20, 30), 0)
        self.batches: list[int] = []

    def score(self, images: Images, prompts: Sequence[Prompt]) -> list[Score]:
        """Each image by itself; a failure that may pass is a null that says so."""
        self.batches.append(len(images))
        scores = []
        for index, image in enumerate(images):
            level = int(image[0, 0, 0])
            self.calls[level] += 1
            try:
                scores.append(Score(sample_index=index, value=self._judge(level, self.calls[level])))
            except ScorerError as error:
                scores.append(Score(sample_index=index, value=None, error=str(error), may_pass=isinstance(error, ScorerUnavailable)))
        return scores


def flaky(level: int, call: int) -> float:
    """Level 10 answers at the third call, level 20 never and is no connection's fault."""
    if level == 10 and call < 3:
        raise ScorerUnavailable("no route")
    if level == 20:
        raise ScorerError("bad pixel")
    return level / 10


def away(level: int, call: int) -> float:
    """Never answers."""
    raise ScorerUnavailable("no route")


def broken(level: int, call: int) -> float:
    """Always fails by itself."""
    raise ScorerError("bad pixel")


def rounds(scorer: Any, rules: GuardRules, clock: Clock) -> tuple[tuple[Score, ...], list[float]]:
    """Drive scoring_rounds; the seconds of its pauses."""
    generator, waits = scoring_rounds(scorer, IMAGES, PROMPTS, rules), []
    while True:
        try:
            wait = next(generator)
        except StopIteration as done:
            return done.value, waits
        waits.append(wait.seconds)
        clock.now += wait.seconds


def test_failures_that_may_pass_are_tried_again_after_growing_jittered_pauses_and_others_are_not() -> None:
    clock, scorer = Clock(), Scripted(flaky)
    scores, waits = rounds(scorer, GuardRules(micro_batch=3, retries=4, clock=clock), clock)
    assert [score.value for score in scores] == [0.0, 1.0, None, 3.0]
    assert scores[2].error == "bad pixel"
    assert scorer.calls == {0: 1, 10: 3, 20: 1, 30: 1}
    assert scorer.batches == [3, 1, 1, 1]  # the retries show the waiting image alone
    assert len(waits) == 2
    assert 0.25 <= waits[0] <= 0.75 and 0.5 <= waits[1] <= 1.5


def test_without_retries_nothing_is_tried_again_and_after_them_the_null_keeps_its_reason() -> None:
    clock = Clock()
    assert rounds(Scripted(away), GuardRules(micro_batch=4, clock=clock), clock)[1] == []
    scorer = Scripted(away)
    scores, waits = rounds(scorer, GuardRules(micro_batch=4, retries=2, clock=clock), clock)
    assert [(score.value, score.error) for score in scores] == [(None, "no route")] * 4
    assert (len(waits), scorer.batches) == (2, [4, 4, 4])


def test_a_batch_that_could_not_be_reached_is_not_asked_image_by_image() -> None:
    class Unreachable(Scripted):
        def score(self, images: Images, prompts: Sequence[Prompt]) -> list[Score]:
            self.batches.append(len(images))
            raise ScorerUnavailable("refused")

    scorer, clock = Unreachable(away), Clock()
    scores, _ = rounds(scorer, GuardRules(micro_batch=2, retries=1, clock=clock), clock)
    assert scorer.batches == [2, 2, 2, 2]
    assert all(score.may_pass for score in scores)


# ---- the loop


class Desk:
    """Gives out leases until there are none, then Stop; takes note of everything."""

    def __init__(self, *leases: ScoringLease, stop_after: int = 99) -> None:
        self.waiting, self.stop_after = list(leases), stop_after
        self.asked: list[int] = []
        self.notes: list[tuple[str, str]] = []
        self.beats: list[float] = []

    def ask_scoring(self, slot: str, reward: str, limit: int) -> tuple[ScoringLease, ...] | Wait | Stop:
        """The next `limit` leases."""
        self.asked.append(limit)
        if not self.waiting or len(self.asked) > self.stop_after:
            return Stop(reason="done")
        given, self.waiting = self.waiting[:limit], self.waiting[limit:]
        return tuple(given) or Wait(seconds=0.2, reason="none")

    def commit_scores(self, lease_id: str, path: str) -> None:
        """Note it."""
        self.notes.append(("commit", lease_id))

    def fail_scoring(self, lease_id: str, error: str) -> None:
        """Note it."""
        self.notes.append((f"fail {error}", lease_id))

    def return_scoring(self, lease_id: str, reason: str) -> None:
        """Note it."""
        self.notes.append((f"return {reason}", lease_id))

    def stop_scoring(self, lease_id: str, error: str) -> None:
        """Note it."""
        self.notes.append((f"stop {error}", lease_id))

    def beat(self, slot: str, lease_ids: Sequence[str], metrics: Mapping[str, float]) -> None:
        """Keep the breaker's gauge."""
        self.beats.append(metrics["breaker_open"])


class Disk:
    """The four images, and score files in memory; the first writes fail as often as told."""

    def __init__(self, write_errors: int = 0) -> None:
        self.files: list[ScoreFile] = []
        self.write_errors = write_errors

    def read(self, path: str) -> MediaBatch:
        """The images."""
        return MediaBatch(images=IMAGES, statistics={})

    def write(self, score_file: ScoreFile, lease: ScoringLease) -> str:
        """Keep a file."""
        if self.write_errors:
            self.write_errors -= 1
            raise StoreError("away")
        self.files.append(score_file)
        return "scores"


def lease(number: int, kind: LeaseKind = LeaseKind.TRAIN) -> ScoringLease:
    return ScoringLease(
        lease_id=f"s{number}", kind=kind, number=number, reward="scripted", group_lease_id=f"g{number}", media_path="m",
        prompts=(SAME,) if kind is LeaseKind.TRAIN else PROMPTS,
    )  # fmt: skip


def serve(desk: Desk, judge: Callable[[int, int], float], disk: Disk | None = None, **settings: Any) -> tuple[list[Wait], Disk]:
    """Run a loop to its end on a clock of its own."""
    clock, disk, waits = Clock(), disk or Disk(), []
    settings = {"breaker": Breaker(failures=2, pause_s=5.0, clock=clock), "scorer": Scripted(judge)} | settings
    server = RewardServer(desk=desk, slot="reward.scripted.0", run="t", reward="scripted", source=disk, sink=disk, clock=clock, **settings)
    for wait in scoring_loop(server):
        waits.append(wait)
        clock.now += wait.seconds
    assert server.held.snapshot() == ()
    return waits, disk


def test_a_group_that_failed_in_part_is_committed_with_its_nulls() -> None:
    desk = Desk(lease(0))
    _, disk = serve(desk, flaky, retries=2)
    assert desk.notes == [("commit", "s0")]
    assert [score.value for score in disk.files[0].scores] == [0.0, 1.0, None, 3.0]


@pytest.mark.parametrize(
    ("on_failure", "note"), [("retry", "fail bad pixel"), ("drop_sample", "commit"), ("stop", "stop image 0 of group 0 could not be scored: bad pixel")]
)  # fmt: skip
def test_a_group_that_failed_whole_goes_back_or_is_committed_or_ends_the_run(on_failure: str, note: str) -> None:
    desk = Desk(lease(0))
    serve(desk, broken, on_failure=on_failure)
    assert desk.notes == [(note, "s0")]


def test_stop_ends_the_run_at_the_first_failed_image_of_a_group_that_was_scored_in_part() -> None:
    desk = Desk(lease(3))
    serve(desk, flaky, on_failure="stop", retries=2)
    assert desk.notes == [("stop image 2 of group 3 could not be scored: bad pixel", "s3")]


def test_a_sheet_that_its_scorer_refuses_is_committed_and_one_that_could_not_be_reached_goes_back() -> None:
    sheet = lease(0, LeaseKind.EVAL)
    for judge, note in ((broken, "commit"), (away, "fail no route")):
        desk = Desk(sheet)
        serve(desk, judge)
        assert desk.notes == [(note, "s0")]


def test_the_breaker_rests_returns_what_is_held_and_asks_for_nothing_until_one_group_is_tried() -> None:
    desk = Desk(*(lease(number) for number in range(8)), stop_after=9)
    waits, _ = serve(desk, away, max_groups=4)
    assert desk.notes[:4] == [("fail no route", "s0"), ("fail no route", "s1"), ("return no route", "s2"), ("return no route", "s3")]
    assert desk.notes[4:] == [("return no route", "s4")]  # the trial: no fault of the group's
    assert desk.asked[:8] == [4, 0, 0, 0, 0, 0, 1, 0]
    assert desk.beats == [1.0, 0.5, 1.0]
    assert waits[0].seconds == 1.0
    assert waits[0].reason == "reward scripted: its breaker is open for 5 s more: no route"


def test_a_trial_that_is_scored_closes_the_breaker() -> None:
    desk = Desk(*(lease(number) for number in range(4)))
    serve(desk, lambda level, call: away(level, call) if call <= 2 else 1.0, max_groups=2)
    assert desk.notes == [("fail no route", "s0"), ("fail no route", "s1"), ("commit", "s2"), ("commit", "s3")]
    assert desk.beats == [1.0, 0.5, 0.0]


def test_a_group_is_judged_once_however_often_its_file_is_written() -> None:
    desk, disk = Desk(lease(0)), Disk(write_errors=2)
    _, disk = serve(desk, broken, disk, on_failure="drop_sample", breaker=Breaker(failures=2))
    assert (desk.notes, desk.beats) == ([("commit", "s0")], [])


# ---- deadlines


def hangs_on(level: int, released: threading.Event) -> Callable[[int, int], float]:
    def judge(seen: int, call: int) -> float:
        if seen == level:
            released.wait(60.0)
        return seen / 10

    return judge


def test_a_call_past_its_deadline_nulls_its_images_and_what_follows_and_costs_the_process() -> None:
    released = threading.Event()
    for on_failure, note in (("retry", "fail deadline: "), ("drop_sample", "commit")):
        desk = Desk(lease(0), lease(1))
        calls, disk = DeadlineCalls("scripted", 0.05), Disk()
        with pytest.raises(ScorerHung, match=r"deadline: scorer scripted did not answer for 2 images within 0\.1 s"):
            serve(desk, hangs_on(20, released), disk, calls=calls, micro_batch=2, is_restarted=True, on_failure=on_failure)
        assert desk.notes[0][0].startswith(note)
        assert desk.notes[1][0].startswith("return deadline: ")  # the next lease goes back unharmed
        if disk.files:
            assert [score.value for score in disk.files[0].scores] == [0.0, 1.0, None, None]
            assert disk.files[0].scores[3].error.startswith("deadline: ")
    released.set()


def test_where_nobody_restarts_the_process_a_hanging_scorer_ends_the_run() -> None:
    released = threading.Event()
    desk = Desk(lease(0), lease(1))
    serve(desk, hangs_on(0, released), calls=DeadlineCalls("scripted", 0.02), on_failure="drop_sample")
    released.set()
    assert desk.notes[0][0].startswith("stop image 0 of group 0 could not be scored: deadline: scorer scripted did not answer")
    assert desk.notes[1][0].startswith("return deadline")


def test_calls_run_one_after_another_in_one_thread_and_carry_whatever_they_raise() -> None:
    calls, threads = DeadlineCalls("t", 60.0), set()

    def call() -> list[Score]:
        threads.add(threading.current_thread().name)
        return [Score(sample_index=0, value=1.0)]

    def refuse() -> list[Score]:
        raise SystemExit(3)

    def late() -> list[Score]:
        raise TimeoutError("the scorer's own")

    assert calls.run(call, 1) == calls.run(call, 1) == DirectCalls().run(lambda: [Score(sample_index=0, value=1.0)], 1)
    with pytest.raises(SystemExit):
        calls.run(refuse, 1)
    with pytest.raises(TimeoutError, match="the scorer's own"):
        calls.run(late, 1)
    assert (threads, calls.hung) == ({"scorer-t"}, "")


# ---- groupwise


class Rank(GroupwiseScorer):
    """The rank of an image's level in its group."""

    name = "rank"
    version = "1"

    def __init__(self, fails: int = 0) -> None:
        self.sizes: list[int] = []
        self._fails = fails

    def score_group(self, images: Images, prompt: Prompt) -> list[Score]:
        """Ranks; the first calls fail as often as told."""
        self.sizes.append(len(images))
        if len(self.sizes) <= self._fails:
            raise ScorerUnavailable("no route")
        if prompt.text == "broken":
            raise ValueError("cannot rank")
        order = np.argsort(np.argsort(images[:, 0, 0, 0]))
        return [Score(sample_index=index, value=float(rank)) for index, rank in enumerate(order)]


def test_a_groupwise_scorer_sees_whole_groups_whatever_the_micro_batch() -> None:
    scorer = Rank()
    assert isinstance(scorer, GroupScorer) and not isinstance(Scripted(flaky), GroupScorer)
    assert [score.value for score in score_guarded(scorer, IMAGES[::-1], [SAME] * 4, micro_batch=1)] == [3, 2, 1, 0]
    assert scorer.sizes == [4]
    other = Prompt(id="q", text="a cup")
    mixed = score_guarded(scorer, IMAGES, [SAME, other, SAME, other], micro_batch=1)
    assert [score.value for score in mixed] == [0, 0, 1, 1]
    assert [score.sample_index for score in mixed] == [0, 1, 2, 3]
    assert [score.value for score in scorer.score(IMAGES, [SAME, other, SAME, other])] == [0, 0, 1, 1]


def test_a_group_that_fails_is_null_as_a_whole_and_tried_again_as_a_whole() -> None:
    other = Prompt(id="q", text="broken")
    scores = score_guarded(Rank(), IMAGES, [SAME, SAME, other, other], micro_batch=2)
    assert [score.value for score in scores] == [0, 1, None, None]
    assert scores[3].error == "ValueError: cannot rank"
    scorer, clock = Rank(fails=1), Clock()
    generator = scoring_rounds(scorer, IMAGES, [SAME] * 4, GuardRules(micro_batch=1, retries=1, clock=clock))
    clock.now += next(generator).seconds
    with pytest.raises(StopIteration) as done:
        next(generator)
    assert [score.value for score in done.value.value] == [0, 1, 2, 3]
    assert scorer.sizes == [4, 4]


def test_diversity_is_the_mean_block_distance_to_the_others_by_hand_and_by_a_slow_oracle() -> None:
    scorer = make_diversity(num_blocks=2)
    flat = [score.value for score in scorer.score_group(np.stack([IMAGES[0], IMAGES[0] + 51, IMAGES[0] + 102]), SAME)]
    assert flat == pytest.approx([0.3, 0.2, 0.3], abs=1e-12)  # levels 0, .2, .4
    images = np.random.default_rng(0).integers(0, 256, (3, 7, 9, 3), dtype=np.uint8)

    def slow(image: Images) -> list[float]:
        edges = [(0, 3, 7), (0, 4, 9)]  # floor(i * side / 2)
        return [
            float(image[edges[0][r] : edges[0][r + 1], edges[1][c] : edges[1][c + 1], channel].mean()) / 255
            for r in range(2) for c in range(2) for channel in range(3)
        ]  # fmt: skip

    blocks = [slow(image) for image in images]
    assert block_means(images, 2).reshape(3, -1) == pytest.approx(np.array(blocks), abs=1e-12)
    pairs = [[np.sqrt(np.mean(np.subtract(a, b) ** 2)) for b in blocks] for a in blocks]
    expected = [sum(row) / 2 for row in pairs]
    assert [score.value for score in scorer.score_group(images, SAME)] == pytest.approx(expected, abs=1e-12)
    turned = scorer.score_group(images[::-1], SAME)
    assert [score.value for score in turned] == pytest.approx(expected[::-1], abs=1e-12)


def test_diversity_of_one_image_is_not_applicable_and_a_bad_image_is_an_error() -> None:
    (alone,) = score_guarded(Diversity(8), IMAGES[:1], [SAME], micro_batch=4)
    assert (alone.value, alone.error) == (None, NOT_APPLICABLE)
    for bad in (IMAGES.astype(np.float32), IMAGES[:, :4], IMAGES[..., 0]):
        scores = score_guarded(Diversity(8), bad, [SAME] * 4, micro_batch=4)
        assert all(score.value is None and "they must be uint8" in score.error for score in scores)
    with pytest.raises(ConfigError, match="num_blocks"):
        make_diversity(num_blocks=0)
