"""A run followed by its files: what a look reads, what a rewind takes back, and when nobody is there any more."""

from pathlib import Path

import pytest

from common.errors import CorruptFile, StoreError, UserError
from common.store import paths
from common.store.run_store import RunStore
from deploy.watch.files import EVAL_LIST_S, RunTail, surviving
from tests.watch_runs import BEGAN, claim, put_evaluation, put_status, put_update, rising


class CountingStore(RunStore):
    """Remembers what was asked."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.reads: list[str] = []
        self.listed: list[str] = []

    def read(self, path: str) -> bytes:
        """Read, and remember."""
        self.reads.append(path)
        return super().read(path)

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """List, and remember."""
        self.listed.append(prefix)
        return super().sizes(prefix)

    def take(self) -> tuple[list[str], list[str]]:
        """Reads besides status.json, and listings, since the last call."""
        taken = [path for path in self.reads if path != paths.STATUS], self.listed
        self.reads, self.listed = [], []
        return taken


class Clock:
    """Seconds that a test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        """The time."""
        return self.now


def test_a_look_reads_only_what_is_new_and_never_lists_more_than_it_must(tmp_path: Path) -> None:
    store, clock = CountingStore(str(tmp_path)), Clock()
    claim(store)
    rising(store, 3)
    put_evaluation(store, 0, {"ocr": 0.5})
    put_status(store, version=3)
    tail = RunTail(store, clock=clock, wall=lambda: BEGAN)
    store.take()

    first = tail.look()
    reads, listed = store.take()
    result = paths.result_path(paths.eval_directory(0, "ema", "0123abcd"))
    assert sorted(reads) == sorted([paths.config_path(1), *(paths.metrics_path(update, 1) for update in (1, 2, 3)), result])
    assert sorted(listed) == [paths.EVAL, paths.METRICS]
    assert [record.update for record in first.history.updates] == [1, 2, 3]
    assert [record.rows for record in first.history.evaluations] == [()]  # rows are of no use here, and are the most of a result

    clock.now += 2.0
    assert tail.look().history is first.history
    assert store.take() == ([], [])  # a quiet run: nothing is listed, nothing but status.json is read

    put_update(store, 4, {"ocr": 0.04})
    put_status(store, version=4, sequence=2)
    assert [record.update for record in tail.look().history.updates] == [1, 2, 3, 4]
    assert store.take() == ([paths.metrics_path(4, 1)], [paths.METRICS])

    put_evaluation(store, 4, {"ocr": 0.75})
    clock.now = EVAL_LIST_S
    assert [record.version for record in tail.look().history.evaluations] == [0, 4]
    assert store.take() == ([paths.result_path(paths.eval_directory(4, "ema", "0123abcd"))], [paths.EVAL])


def test_a_long_run_is_read_from_its_newest_update_on(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path))
    claim(store)
    rising(store, 5)
    put_status(store, version=5)
    tail = RunTail(store, at_once=2)
    seen = [([record.update for record in look.history.updates], look.num_unread) for look in (tail.look(), tail.look(), tail.look())]
    assert seen == [([4, 5], 3), ([2, 3, 4, 5], 1), ([1, 2, 3, 4, 5], 0)]


def test_a_resume_takes_back_what_earlier_starts_did_from_its_first_update_on() -> None:
    """By hand: start 2 began at 4, start 3 at 6, so 4 and 5 of start 1, and 6 and 7 of start 2, are void."""
    names = {1: range(1, 7), 2: range(4, 8), 3: (6,)}
    files = [paths.metrics_path(update, incarnation) for incarnation, updates in names.items() for update in updates]
    wanted = [paths.metrics_path(update, incarnation) for update, incarnation in ((1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (6, 3))]
    assert sorted(surviving([*files, "metrics/else.json"])) == wanted


def test_a_rewind_leaves_the_view_at_once(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path))
    claim(store)
    rising(store, 5)
    put_status(store, version=5)
    tail = RunTail(store)
    assert len(tail.look().history.updates) == 5
    claim(store)
    put_status(store, version=2, incarnation=2, sequence=2)
    assert len(tail.look().history.updates) == 5  # the second start has done nothing yet
    put_update(store, 3, {"ocr": 0.9}, incarnation=2)
    put_status(store, version=3, incarnation=2, sequence=3)
    means = {record.update: record.rewards["ocr"].mean for record in RunTail(store).look().history.updates}
    assert means == {1: 0.01, 2: 0.02, 3: 0.9}
    put_update(store, 4, {"ocr": 0.8}, incarnation=2)
    put_status(store, version=6, incarnation=2, sequence=4)
    assert {record.update: record.incarnation for record in tail.look().history.updates} == {1: 1, 2: 1, 3: 2, 4: 2}


def test_updates_that_a_resume_runs_again_are_seen_before_it_is_further_than_the_last_start_was(tmp_path: Path) -> None:
    """By hand: start 1 got to 8 and start 2 resumes at 4; versions 4 to 8 are no news by their numbers."""
    store, clock = CountingStore(str(tmp_path)), Clock()
    claim(store)
    rising(store, 8)
    put_status(store, version=8)
    tail = RunTail(store, clock=clock, wall=lambda: BEGAN)
    tail.look()
    claim(store)
    put_status(store, version=3, incarnation=2, sequence=2)
    assert len(tail.look().history.updates) == 8
    put_update(store, 4, {"ocr": 0.9}, incarnation=2)
    put_status(store, version=4, incarnation=2, sequence=3)
    clock.now += EVAL_LIST_S
    assert {record.update: record.incarnation for record in tail.look().history.updates} == {1: 1, 2: 1, 3: 1, 4: 2}
    put_update(store, 5, {"ocr": 0.8}, incarnation=2)
    put_status(store, version=5, incarnation=2, sequence=4)
    assert [record.update for record in tail.look().history.updates] == [1, 2, 3, 4, 5]  # at once from now on
    store.take()
    clock.now += EVAL_LIST_S
    tail.look()
    assert store.take() == ([], [paths.EVAL])  # the start has caught up: metrics/ rests


def test_a_start_without_metrics_of_its_own_lists_them_now_and_then(tmp_path: Path) -> None:
    store, clock = CountingStore(str(tmp_path)), Clock()
    claim(store)
    rising(store, 2)
    claim(store)
    put_status(store, version=2, incarnation=2)
    tail = RunTail(store, clock=clock, wall=lambda: BEGAN)
    tail.look()
    listed: list[int] = []
    for _ in range(15):  # half a minute of looks
        store.take()
        clock.now += 2.0
        tail.look()
        listed.append(store.take()[1].count(paths.METRICS))
    assert sum(listed) == 30.0 // EVAL_LIST_S


def test_a_status_that_nobody_writes_is_silent_by_this_clock_whatever_the_other_host_s_says(tmp_path: Path) -> None:
    store, clock = RunStore(str(tmp_path)), Clock()
    claim(store)
    put_status(store)
    tail = RunTail(store, clock=clock, wall=lambda: BEGAN + 300.0)
    assert tail.look().silent_s == 300.0 and tail.look().is_silent  # all that a first look can tell
    put_status(store, sequence=2)
    assert tail.look().silent_s == 0.0 and not tail.look().is_silent  # the clocks differ by five minutes; somebody writes
    clock.now += 59.0
    assert not tail.look().is_silent
    clock.now += 2.0
    assert tail.look().is_silent
    put_status(store, sequence=3, state="done")
    clock.now += 100.0
    assert not tail.look().is_silent and tail.look().is_over


def test_a_new_start_is_waited_for_although_the_status_of_the_last_says_stopped(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path))
    claim(store)
    tail = RunTail(store)
    assert tail.look().is_starting
    put_status(store, state="stopped", reason="somebody asked")
    assert tail.look().is_over
    claim(store)
    look = tail.look()
    assert look.is_starting and not look.is_over and look.claim.incarnation == 2


def test_no_run_is_the_user_s_mistake_and_a_broken_file_is_named(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path))
    with pytest.raises(UserError, match="holds no run"):
        RunTail(store).look()
    claim(store)
    put_status(store, version=1)
    store.create_exclusive(paths.metrics_path(1, 1), b"{", writer_id="test")
    with pytest.raises(CorruptFile, match=r"metrics/update_000001\.i0001\.json"):
        RunTail(store).look()


def test_what_was_read_before_the_store_went_away_is_shown_when_it_is_back(tmp_path: Path) -> None:
    class Away(RunStore):
        is_away = False

        def read(self, path: str) -> bytes:
            """Refuse update 2 while the store is away."""
            if self.is_away and path == paths.metrics_path(2, 1):
                raise StoreError("away")
            return super().read(path)

    store = Away(str(tmp_path))
    claim(store)
    rising(store, 1)
    put_status(store, version=1)
    tail = RunTail(store)
    assert len(tail.look().history.updates) == 1
    rising(store, 3, first=2)
    put_status(store, version=3, sequence=2)
    store.is_away = True
    with pytest.raises(StoreError, match="away"):
        tail.look()
    store.is_away = False
    assert [record.update for record in tail.look().history.updates] == [1, 2, 3]
