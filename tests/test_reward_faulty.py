"""A reward server whose process is broken for good, whose scorer answers nonsense, whose heart stopped, or whose groups take minutes."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from common.errors import ScorerHung
from common.heartbeat import HeldLeases
from common.store.faces import MediaFiles, ScoreFiles
from common.store.run_store import RunStore
from common.store.scores import read_scores, write_scores
from common.types import LeaseKind, Prompt, RolloutLease, Score, ScoreFile, Wait
from deploy.ray_actors import SlotEnd, _raised
from reward_servers import breaker as breakers
from reward_servers.actor import RewardActor
from reward_servers.breaker import Breaker
from reward_servers.guarded import score_guarded
from reward_servers.scorers.base import PlainScorer
from reward_servers.server import RewardServer, scoring_loop
from reward_servers.wire.http_client import HttpScorer
from reward_servers.wire.transport import CallerSettings
from tests.store_fixtures import Clock, make_coordinator, make_settings, publish, roll_out
from tests.test_reward_serving import IMAGES, PROMPTS, Desk, Disk, Scripted, away, lease, serve
from tests.wire_servers import Reply, open_protocol, results_reply, scripted_server


def lost_gpu(level: int, call: int) -> float:
    """A CUDA context after its first error: every call raises, for ever."""
    raise RuntimeError("CUDA error: device-side assert triggered")


def lost_gpu_after(num_calls: int) -> Callable[[int, int], float]:
    """The same once each image was scored so often."""
    return lambda level, call: 1.0 if call <= num_calls else lost_gpu(level, call)


# ---- broken for good


def test_three_failed_tries_in_a_row_end_the_process_as_a_hanging_scorer_does() -> None:
    desk = Desk(*(lease(number) for number in range(12)))
    with pytest.raises(ScorerHung, match=r"reward scripted: 3 tries in a row, .* RuntimeError: CUDA error.*started again") as caught:
        serve(desk, lost_gpu, max_groups=2, is_restarted=True)
    assert [lease_id for _, lease_id in desk.notes] == ["s0", "s1", "s2", "s3", "s4"]  # two open the breaker, each try costs one
    assert all(note == "fail RuntimeError: CUDA error: device-side assert triggered" for note, _ in desk.notes)
    end = _raised(caught.value)  # what the fleet makes of it
    assert end.kind is SlotEnd.HUNG
    assert end.cause.startswith("ScorerBroken: reward scripted: 3 tries in a row")


def test_a_scorer_that_worked_once_and_broke_ends_its_process_too() -> None:
    desk = Desk(*(lease(number) for number in range(12)))
    with pytest.raises(ScorerHung, match="3 tries in a row"):
        serve(desk, lost_gpu_after(1), max_groups=2, is_restarted=True)
    assert desk.notes[0] == ("commit", "s0")


def test_a_connection_that_stays_away_never_ends_the_process() -> None:
    desk = Desk(*(lease(number) for number in range(9)))
    serve(desk, away, is_restarted=True)
    assert [note for note, _ in desk.notes] == ["fail no route"] * 2 + ["return no route"] * 7


def test_a_try_that_scored_or_that_found_nobody_counts_anew() -> None:
    clock = Clock()
    breaker = Breaker(failures=1, pause_s=10.0, clock=clock)
    breaker.failed("lost")
    for outcome in ("lost", "lost", "away", "lost", "lost", "scored", "lost", "lost", "lost"):
        clock.now += 10.0
        breaker.admits(1)
        if outcome == "scored":
            breaker.succeeded()
            breaker.failed("lost")
        else:
            assert breaker.broken == ""
            breaker.failed(outcome, may_pass=outcome == "away")
    assert breaker.broken == "3 tries in a row, each after a rest of 10 s, scored nothing, the last: lost"


def test_where_nobody_restarts_the_process_a_broken_server_goes_on_resting() -> None:
    desk = Desk(*(lease(number) for number in range(8)))
    serve(desk, lost_gpu, max_groups=2)
    assert len(desk.notes) == 8


@pytest.mark.parametrize("said", [{}, {"score": None, "error": "CUDA error"}])
def test_a_served_reward_of_another_version_never_ends_the_process_whose_successor_would_accept_it(said: dict[str, Any]) -> None:
    def redeployed(results: list[dict[str, Any]]) -> Reply:
        return results_reply([one | {"scorer_version": "level-4"} | said for one in results])

    desk = Desk(*(lease(number) for number in range(9)))
    with scripted_server(open_protocol(redeployed)) as (url, _):
        serve(desk, away, scorer=HttpScorer(url=url, reward="level", caller=CallerSettings(retries=0)), is_restarted=True)
    refused = "the server now scores with version 'level-4', it began with 'level-3'; start again to accept it"
    assert [note for note, _ in desk.notes] == [f"fail {refused}"] * 2 + [f"return {refused}"] * 7


def test_a_try_that_failed_only_in_part_by_itself_is_none() -> None:
    def judge(level: int, call: int) -> float:
        return away(level, call) if level == 30 else lost_gpu(level, call)

    desk = Desk(*(lease(number) for number in range(12)))
    serve(desk, away, scorer=Scripted(judge), micro_batch=1, max_groups=2, is_restarted=True)
    assert len(desk.notes) == 12


def test_a_watch_reward_rests_and_never_ends_its_process_though_it_scored_once() -> None:
    for scorer in (Scripted(lost_gpu), Scripted(lost_gpu_after(2)), GivenUp(lost_gpu)):
        desk = Desk(*(lease(number) for number in range(12)))
        serve(desk, away, scorer=scorer, max_groups=2, is_restarted=True, use="watch")
        assert len(desk.notes) == 12  # a process that cannot start again would end the run, which a watch reward must not


class GivenUp(Scripted):
    """Scores its first image, then cannot score again in this process, as a ChildScorer that gave its child up."""

    def score(self, images: NDArray[np.uint8], prompts: Sequence[Prompt]) -> list[Score]:
        """One image of the first call, nothing more."""
        self.batches.append(len(images))
        if len(self.batches) > 1:
            raise breakers.ScorerBroken("the child process failed 4 times")
        return [Score(sample_index=0, value=1.0)]


@pytest.mark.parametrize("kind", [LeaseKind.TRAIN, LeaseKind.EVAL])
def test_a_scorer_that_gives_itself_up_ends_its_process_at_once_and_costs_one_attempt(kind: LeaseKind) -> None:
    desk = Desk(lease(0, kind), lease(1), lease(2))
    with pytest.raises(ScorerHung, match="reward scripted: the child process failed 4 times; a process that scores nothing any more"):
        serve(desk, lost_gpu, scorer=GivenUp(lost_gpu), micro_batch=1, is_restarted=True)
    told = "the child process failed 4 times"
    assert desk.notes == [(f"fail {told}", "s0"), (f"return {told}", "s1"), (f"return {told}", "s2")]


# ---- nonsense


class Answers(PlainScorer):
    """Returns what it was given, for the image of level 10; 0.5 for the others."""

    name = "answers"
    version = "1"

    def __init__(self, answer: Any) -> None:
        self._answer = answer

    def score(self, images: NDArray[np.uint8], prompts: Sequence[Prompt]) -> list[Score]:
        """B answers."""
        return [self._answer if image[0, 0, 0] == 10 else Score(sample_index=0, value=0.5) for image in images]


def scored(value: Any, **fields: Any) -> Score:
    return Score(sample_index=0, value=value, **fields)


@pytest.mark.parametrize(
    ("answer", "rule"),
    [
        (0.5, "scorer answers returned 0.5 for an image; it must return a Score (common.types)"),
        (None, "scorer answers returned None for an image; it must return a Score (common.types)"),
        (scored("0.5"), "scorer answers returned a Score whose value is '0.5'; it must be a number: give float(...)"),
        (scored(np.ones(2)), "whose value is array([1., 1.]); it must be a number"),
        (scored(10**400), "it must be a number"),
        (scored(0.5, details={"sharp": "very"}), "whose details['sharp'] is 'very'; it must be a number"),
        (scored(0.5, details={1: 0.5}), "returned the details {1: 0.5}; they must be numbers by name"),
        (scored(0.5, details=[0.5]), "returned the details [0.5]; they must be numbers by name"),
        (scored(None, error=ValueError("bad")), "returned the error ValueError('bad'); it must be a text"),
        (scored(0.5, latency_s="fast"), "whose latency_s is 'fast'; it must be a number"),
    ],
)
def test_an_answer_that_no_score_file_could_hold_is_null_and_spoils_no_neighbor(answer: Any, rule: str, tmp_path: Path) -> None:
    scores = score_guarded(Answers(answer), IMAGES, PROMPTS, micro_batch=4)
    assert [score.value for score in scores] == [0.5, None, 0.5, 0.5]
    assert rule in scores[1].error
    store = RunStore(f"memory://{tmp_path.name}")
    file = ScoreFile(run="t", number=0, lease_id="g0", reward="answers", scorer_version="1", scores=scores)
    assert read_scores(store, write_scores(store, file)).scores[1].value is None


@pytest.mark.parametrize("answer", [None, 0.5, {0: scored(0.5)}, np.ones(4), (scored(0.5) for _ in range(4))])
def test_an_answer_that_is_no_list_of_scores_makes_the_batch_null(answer: Any) -> None:
    class Whole(Answers):
        def score(self, images: NDArray[np.uint8], prompts: Sequence[Prompt]) -> Any:
            return answer

    scores = score_guarded(Whole(None), IMAGES, PROMPTS, micro_batch=4)
    assert [score.value for score in scores] == [None] * 4
    assert "for 4 images; it must return a list of Score" in scores[0].error


def test_numbers_of_numpy_are_numbers_and_an_absent_error_or_latency_is_none() -> None:
    given = Score(sample_index=0, value=np.float32(0.25), details={"n": np.int64(3), "ok": True}, error=None, latency_s=None)  # type: ignore[arg-type]
    score = score_guarded(Answers(given), IMAGES, PROMPTS, micro_batch=4)[1]
    assert (score.value, score.error) == (0.25, "")
    assert (type(score.value), score.details, score.latency_s > 0) == (float, {"n": 3.0, "ok": 1.0}, True)


def test_a_server_outlives_a_malformed_answer() -> None:
    desk = Desk(lease(0), lease(1))
    _, disk = serve(desk, away, scorer=Answers(0.5))
    assert desk.notes == [("commit", "s0"), ("commit", "s1")]
    assert [score.value for score in disk.files[0].scores] == [0.5, None, 0.5, 0.5]


# ---- the heart


class NoBeat(Desk):
    """Hears no beat. `is_busy`: has always a group more; else always says wait."""

    def __init__(self, is_busy: bool) -> None:
        super().__init__(*(lease(number) for number in range(300 if is_busy else 1)), stop_after=300)
        self._is_busy = is_busy

    def ask_scoring(self, slot: str, reward: str, limit: int) -> Any:
        """Groups or waits, at last Stop."""
        if self._is_busy or len(self.asked) >= 300:
            return super().ask_scoring(slot, reward, limit)
        self.asked.append(limit)
        return Wait(seconds=0.01, reason="none")

    def beat(self, slot: str, lease_ids: Sequence[str], metrics: Mapping[str, float]) -> None:
        """Fail."""
        raise RuntimeError("the desk hears no beat")


@pytest.mark.parametrize("is_busy", [False, True])
def test_a_heartbeat_that_ended_ends_the_server_with_its_cause_idle_or_busy(is_busy: bool) -> None:
    def judge(level: int, call: int) -> float:
        time.sleep(0.001)
        return 1.0

    desk, disk = NoBeat(is_busy), Disk()
    shell = object.__new__(RewardActor.__ray_metadata__.modified_class)  # the actor without Ray
    shell._desk, shell._built = (
        desk,
        RewardServer(desk=desk, slot="s", run="t", reward="scripted", scorer=Scripted(judge), source=disk, sink=disk, max_groups=1),
    )
    with pytest.raises(RuntimeError, match="the desk hears no beat"):
        shell.run()
    assert len(desk.asked) < 150


# ---- groups that take minutes


class Slow(PlainScorer):
    """Each image takes so many seconds of the clock; `meanwhile` is what others do after each."""

    name = "slow"
    version = "1"

    def __init__(self, clock: Clock, image_s: float, meanwhile: Callable[[], object] = bool) -> None:
        self._clock, self._image_s, self._meanwhile = clock, image_s, meanwhile

    def score(self, images: NDArray[np.uint8], prompts: Sequence[Prompt]) -> list[Score]:
        """Let the time pass."""
        for _ in images:
            self._clock.now += self._image_s
            self._meanwhile()
        return [Score(sample_index=index, value=1.0) for index in range(len(images))]


@pytest.mark.parametrize(
    ("image_s", "asked", "returned"),
    [(0.5, [4, 4, 4], []), (1.0, [4, 2, 2, 2, 2], ["s3"]), (40.0, [4, 1, 1, 1, 1, 1, 1, 1, 1], ["s1", "s2", "s3"])],
)  # fmt: skip
def test_a_server_leases_no_more_groups_than_it_scores_in_ten_seconds(image_s: float, asked: list[int], returned: list[str]) -> None:
    clock, disk = Clock(), Disk()
    desk = Desk(*(lease(number) for number in range(8 + len(returned))))
    RewardServer(
        desk=desk, slot="s", run="t", reward="slow", scorer=Slow(clock, image_s), source=disk, sink=disk, clock=clock
    ).run_until_stopped(bool)
    assert [given for given in desk.asked if given][: len(asked)] == asked
    assert [lease_id for note, lease_id in desk.notes if note == "return "] == returned  # no failure, so no reason


def test_a_slow_healthy_server_is_not_judged_hanging(tmp_path: Path) -> None:
    """K = 4 images of 40 s: each group well within group_timeout_s = 600, four in turn beyond it. The driver ticks all the while."""
    clock, store = Clock(), RunStore(f"memory://{tmp_path.name}")
    coordinator = make_coordinator(store, make_settings(group_timeout_s=600.0, lease_timeout_s=60.0), clock)
    publish(store, coordinator, 0)
    for _ in range(4):
        given = coordinator.ask_rollout("rollout.0")
        assert isinstance(given, RolloutLease)
        roll_out(store, coordinator, given)
    held = HeldLeases()

    def meanwhile() -> None:
        coordinator.beat("reward.r.0", held.snapshot(), {})
        coordinator.tick()

    server = RewardServer(
        desk=coordinator, slot="reward.r.0", run="test", reward="r", scorer=Slow(clock, 40.0, meanwhile), source=MediaFiles(store),
        sink=ScoreFiles(store), held=held, clock=clock,
    )  # fmt: skip
    next(scoring_loop(server))  # the first wait: all four are scored
    assert coordinator.summary()["work"]["reward.r.0"] == 4
    assert coordinator.summary()["overruns"] == {}
