"""One curve is of one scorer: a run remembers who scored it, over restarts, and no server of another version adds to it."""

from pathlib import Path

import pytest

from common.errors import GateError
from common.store import paths
from common.store.coordinator import Coordinator
from common.store.run_store import RunStore
from common.store.scorer_versions import NOBODY, ScorerVersions, read_scorer_versions
from common.store.scores import write_scores
from common.types import Score, ScoreFile, ScoringLease
from tests.store_fixtures import Clock, make_coordinator, make_settings, publish, roll_out, score


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return RunStore(str(tmp_path))


def next_scoring(store: RunStore, desk: Coordinator) -> ScoringLease:
    """Roll out one more group, and lease its scoring."""
    roll_out(store, desk, desk.ask_rollout("rollout.0"))  # type: ignore[arg-type]  # a Wait would fail there
    leases = desk.ask_scoring("reward.r.0", "r", 1)
    assert isinstance(leases, tuple)
    return leases[0]


def file_of(number: int, version: str, reward: str = "r") -> ScoreFile:
    return ScoreFile(
        run="test", number=number, lease_id=f"L{number}", reward=reward, scorer_version=version,
        scores=(Score(sample_index=0, value=None if version == NOBODY else 0.5, error="why" if version == NOBODY else ""),),
    )  # fmt: skip


def test_leases_name_the_version_of_the_first_score_and_a_restart_remembers_it(store: RunStore, clock: Clock) -> None:
    desk = make_coordinator(store, make_settings(), clock)
    publish(store, desk, 0)
    lease = next_scoring(store, desk)
    assert lease.scorer_version == ""
    score(store, desk, lease)
    assert next_scoring(store, desk).scorer_version == "1"
    again = make_coordinator(store, make_settings(), clock, incarnation=2)
    leases = again.ask_scoring("reward.r.0", "r", 9)  # the group whose scoring the first start had leased
    assert isinstance(leases, tuple)
    assert [lease.scorer_version for lease in leases] == ["1"]


def test_another_version_ends_the_run_with_both_named_and_the_remedy(store: RunStore, clock: Clock) -> None:
    desk = make_coordinator(store, make_settings(), clock)
    publish(store, desk, 0)
    score(store, desk, next_scoring(store, desk))
    desk.stop_scoring(next_scoring(store, desk).lease_id, "its server at x scores with 2, the run's scores so far are of 1")
    with pytest.raises(GateError, match="gate reward: reward r: its server at x scores with 2, the run's scores so far are of 1"):
        desk.outcome().raise_if_failed()


def test_the_newest_readable_file_of_a_reward_says_its_version(store: RunStore) -> None:
    for number, version in enumerate(["a", "b", NOBODY]):
        write_scores(store, file_of(number, version))
    write_scores(store, file_of(3, "c", reward="other"))
    write_scores(store, file_of(0, "d", reward="watched only"), directory="eval/v000000.ema.p")
    write_scores(store, file_of(9, "e"), directory="eval/v000000.ema.p")  # a training group's comes before it
    store.create_exclusive(paths.score_path(4, "L4", "r"), b"no Arrow file", writer_id="x")
    found = read_scorer_versions(store, ["r", "other", "watched only", "new"])
    assert found == {"r": "b", "other": "c", "watched only": "d"}


def test_nulls_that_nobody_scored_name_no_scorer_and_the_first_version_stays() -> None:
    versions = ScorerVersions({})
    for version, kept in ((NOBODY, ""), ("a", "a"), ("b", "a"), (NOBODY, "a")):
        versions.note(file_of(0, version))
        assert versions.of("r") == kept
