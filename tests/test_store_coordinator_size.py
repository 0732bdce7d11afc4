"""What a long run with many workers costs its Coordinator: calls a second, and memory."""

import sys
from pathlib import Path

from common.store.publications import KEPT, Publications
from common.store.run_store import RunStore
from common.types import AdapterId, Publication, SnapshotInfo, Wait
from tests.store_fixtures import Clock, make_coordinator, make_settings

INFO = SnapshotInfo(num_modules=1, canary=0.1)


def test_waiting_workers_ask_at_most_forty_times_a_second_together_however_many_they_are(tmp_path: Path) -> None:
    clock = Clock()
    desk = make_coordinator(RunStore(str(tmp_path)), make_settings(), clock)  # nothing is published: everybody waits
    for count in (1, 8, 64):
        slots = [f"rollout.{index}" for index in range(count)]
        for slot in slots:
            desk.ask_rollout(slot)
        waits = [answer.seconds for slot in slots if isinstance(answer := desk.ask_rollout(slot), Wait)]
        assert len(waits) == count
        asks_a_second = sum(1 / seconds for seconds in waits)
        assert asks_a_second <= 40 + 1e-6
        assert max(waits) <= 0.2 * max(1, count / 8) + 1e-9  # nobody sleeps longer than that asks


def test_publications_far_behind_the_newest_leave_the_memory_and_are_read_from_their_file_again() -> None:
    reads: list[int] = []

    def make(version: int) -> Publication:
        return Publication(
            adapter=AdapterId(incarnation=1, version=version, digest=f"d{version}"), path=f"p{version}", snapshots={"live": INFO}
        )

    def read(version: int) -> Publication:
        reads.append(version)
        return make(version)

    known = Publications(read)
    for version in range(10 * KEPT):
        known.add(make(version))
    assert known.get(10 * KEPT - 1) == make(10 * KEPT - 1) and reads == []
    assert known.get(3) == make(3) and reads == [3]
    assert sys.getsizeof(known._known) < 16_384  # a dict of KEPT entries, not of all


def test_a_version_that_is_published_nowhere_is_not_known() -> None:
    assert Publications(lambda version: None).get(7) is None
