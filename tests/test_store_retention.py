"""Retention: the bytes of a long run stay under the cap at every moment, and what leaves is never missed by the audit."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common.store import paths
from common.store.audit import audit
from common.store.config import StoreConfig
from common.store.coordinator import Coordinator
from common.store.groups import write_group
from common.store.manifests import Claim, encode_record, read_status
from common.store.retention import Retention
from common.store.run_store import RunStore
from common.types import LeaseKind, RolloutLease
from tests.log_lines import heard
from tests.store_fixtures import Clock, learn, make_coordinator, make_group, make_media, make_settings, publish, work

CONFIG = {"schedule": {"max_staleness": 1}, "learner": {"groups_per_update": 2}}


class CountingStore(RunStore):
    """Knows its bytes after every operation, and the most that they ever were."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.held: dict[str, int] = {}
        self.peak = self.removed = 0

    def _count(self, path: str, num_bytes: int) -> None:
        self.held[path] = num_bytes
        self.peak = max(self.peak, sum(self.held.values()) if len(self.held) % 16 == 0 or num_bytes > 4096 else 0)

    def create_exclusive(self, path: str, content: bytes, *, writer_id: str) -> None:
        super().create_exclusive(path, content, writer_id=writer_id)
        self._count(path, len(content))

    def replace(self, path: str, content: bytes, *, writer_id: str = "replace") -> None:
        super().replace(path, content, writer_id=writer_id)
        self._count(path, len(content))

    def remove(self, path: str) -> None:
        super().remove(path)
        self.removed += self.held.pop(path, 0)


def begin(store: RunStore, num_updates: int, **limits: Any) -> Coordinator:
    """A claimed run, P = 2, S = 1, with version 0."""
    claim = Claim(incarnation=1, writer_id="w", started_at="", config_digest="c0", config=CONFIG)
    store.create_exclusive(paths.config_path(1), encode_record(claim), writer_id="w")
    settings = replace(
        make_settings(num_updates=num_updates), store=StoreConfig.model_construct(**{"max_bytes": 10**9, "updates_kept": None, **limits})
    )
    desk = make_coordinator(store, settings, Clock())
    publish(store, desk, 0)
    return desk


def run_capped(store: CountingStore, num_updates: int, max_bytes: int) -> None:
    """A whole run whose learner keeps its newest two states."""
    desk = begin(store, num_updates, max_bytes=max_bytes)
    for update in range(1, num_updates + 1):
        for _ in work(store, desk):
            pass
        learn(store, desk, update)
        for path in store.list(f"learner/update_{update - 2:06d}") if update > 2 else []:
            store.remove(path)
    desk.close("done")


@pytest.mark.parametrize(
    ("num_updates", "max_bytes"), [(36, 600_000), pytest.param(1000, 10_000_000, marks=pytest.mark.slow)]
)  # fmt: skip
def test_bytes_stay_under_the_cap_at_every_moment_and_the_audit_stays_clean(num_updates: int, max_bytes: int, tmp_path: Path) -> None:
    store = CountingStore(str(tmp_path / "run"))
    run_capped(store, num_updates, max_bytes)
    on_disk = sum(file.stat().st_size for file in (tmp_path / "run").rglob("*") if file.is_file())
    assert on_disk == sum(store.held.values())  # the count below is the disk's
    assert on_disk <= store.peak <= max_bytes
    assert store.peak + store.removed > 1.4 * max_bytes  # without retirement the cap would not have held
    report = audit(store)
    assert report.violations == ()
    assert (report.num_manifests, report.num_groups) == (num_updates, 2 * num_updates)
    assert 0 < report.num_retired < 2 * num_updates


def test_a_state_is_wanted_where_the_cap_would_be_passed_and_then_old_groups_leave(tmp_path: Path) -> None:
    num_updates, max_bytes = 36, 600_000
    store = CountingStore(str(tmp_path))
    desk = begin(store, num_updates, max_bytes=max_bytes)
    saved_at: list[int] = []
    is_wanted = False
    for update in range(1, num_updates + 1):
        for _ in work(store, desk):
            pass
        learn(store, desk, update, saves_state=is_wanted)
        saved_at += [update] if is_wanted else []
        is_wanted = desk.finish_update(update, {})  # told again: the answer is the same
    assert store.peak <= max_bytes < store.peak + store.removed
    assert 0 < len(saved_at) < num_updates // 2  # not at every update
    assert audit(store).violations == ()


def test_groups_after_the_newest_learner_state_stay_though_the_cap_is_passed(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path))
    desk = begin(store, 4)
    for update in (1, 2):
        for _ in work(store, desk):
            pass
        learn(store, desk, update)
    store.remove(paths.learner_complete_path(2))
    limits = StoreConfig.model_construct(max_bytes=1, updates_kept=None)
    retention = Retention(store, limits, max_staleness=1, retired_through=0)
    announced: list[int] = []
    with heard() as lines:
        retention.retire_groups(2, announced.append)
    kept = {name.number for path in store.list("groups") if (name := paths.parse_group(path))}
    assert (announced, kept) == ([1], {2, 3, 4, 5})
    assert "nothing more may leave: updates after the LearnerState of update 1" in lines.text


def test_a_late_file_of_a_retired_number_leaves_at_the_next_call(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path))
    desk = begin(store, 3, updates_kept=1)
    for update in (1, 2):
        for _ in work(store, desk):
            pass
        learn(store, desk, update)
    status = read_status(store)
    assert status is not None and status.retired_through == 1
    late = write_group(store, make_group(1, "slow0", version=0), make_media())
    again = Retention(store, StoreConfig(updates_kept=1), max_staleness=1, retired_through=1)  # as after a restart
    assert again.retire_groups(2, pytest.fail) == [late, paths.media_path_of(late)]
    assert not store.exists(late)


def test_files_of_dropped_numbers_leave_with_the_update_that_reports_them(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path))
    desk = begin(store, 3, updates_kept=1)
    lease: Any = None
    for _ in range(3):
        lease = desk.ask_rollout("rollout.0")
        assert isinstance(lease, RolloutLease) and lease.kind is LeaseKind.TRAIN
        desk.fail_rollout(lease.lease_id, "out of memory")
    roll = write_group(store, make_group(lease.number, lease.lease_id), make_media())  # it comes after the drop was written
    for update in (1, 2):
        for _ in work(store, desk):
            pass
        learn(store, desk, update)
    assert not store.exists(roll)
    assert audit(store).violations == ()


def test_an_interrupted_retirement_is_finished_and_never_a_violation(tmp_path: Path) -> None:
    fails = True

    def hook(stage: str, path: str) -> None:
        if fails and stage == "remove" and path.startswith("groups/"):
            raise OSError(5, "Input/output error")

    store = RunStore(str(tmp_path), hook=hook)
    desk = begin(store, 3, updates_kept=1)
    for update in (1, 2):
        for _ in work(store, desk):
            pass
        learn(store, desk, update)
    assert "Input/output error" in desk.summary()["store_trouble"]
    assert {name.number for path in store.list("groups") if (name := paths.parse_group(path))} == set(range(6))
    assert audit(store).violations == ()
    fails = False
    desk.finish_update(2, {})
    assert {name.number for path in store.list("groups") if (name := paths.parse_group(path))} == {2, 3, 4, 5}
    assert audit(store).violations == ()
