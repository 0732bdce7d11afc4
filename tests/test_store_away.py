"""A run directory on a local path that goes away for a while: refused by name, never taken for empty, and then gone on with."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from common.errors import StoreError
from common.store import paths
from common.store.audit import audit
from common.store.coordinator import Coordinator
from common.store.manifests import Claim, encode_record
from common.store.run_store import RunStore
from tests.log_lines import heard
from tests.store_fixtures import Clock, learn, make_coordinator, make_settings, publish, work

DEADLINE_S = 120.0


def operations(store: RunStore) -> dict[str, Callable[[], Any]]:
    """One call of each kind."""
    return {
        "create": lambda: store.create_exclusive("groups/new", b"1", writer_id="w"), "list": store.list, "sweep": store.sweep,
        "replace": lambda: store.replace("status.json", b"1"), "read": lambda: store.read("groups/a"),
        "exists": lambda: store.exists("groups/a"), "size": lambda: store.size("groups/a"), "remove": lambda: store.remove("groups/a"),
    }  # fmt: skip


class Permissions:
    """chmod 000 of a folder. Root reads and writes all the same, so as root a fault hook refuses in the kernel's place."""

    def __init__(self, root: Path) -> None:
        self.root, self.is_refused = root, False

    def __call__(self, stage: str, path: str) -> None:
        if self.is_refused and os.geteuid() == 0:
            raise PermissionError(13, "Permission denied")

    def take(self) -> None:
        self.is_refused = True
        self.root.chmod(0o000)

    def give(self) -> None:
        self.is_refused = False
        self.root.chmod(0o755)


@pytest.fixture
def permissions(tmp_path: Path) -> Iterator[Permissions]:
    (tmp_path / "run").mkdir()
    found = Permissions(tmp_path / "run")
    yield found
    found.give()


def test_a_directory_without_permission_is_a_store_error_for_every_operation(permissions: Permissions) -> None:
    store = RunStore(str(permissions.root), hook=permissions)
    store.create_exclusive("groups/a", b"1", writer_id="w")
    permissions.take()
    for name, operation in operations(store).items():
        with pytest.raises(StoreError, match=f"RunStore.{name}: .*Permission denied.*mend the path"):
            operation()
    permissions.give()
    for operation in operations(store).values():
        operation()
    assert store.list() == ["groups/new", "status.json"]


def test_a_directory_that_was_moved_away_is_neither_empty_nor_made_anew(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path / "run"))
    store.create_exclusive("groups/a", b"1", writer_id="w")
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    for operation in operations(store).values():
        with pytest.raises(StoreError, match="it was moved, or its file system is not mounted"):
            operation()
    assert os.listdir(tmp_path) == ["elsewhere"]
    (tmp_path / "elsewhere").rename(tmp_path / "run")
    assert store.list() == ["groups/a"]


def test_a_folder_that_cannot_be_listed_is_an_error_and_not_an_empty_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, scan = RunStore(str(tmp_path)), os.scandir
    store.create_exclusive("manifests/a", b"1", writer_id="w")

    def refuse(folder: str) -> Any:
        if str(folder).endswith("manifests"):
            raise PermissionError(13, "Permission denied", folder)
        return scan(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(StoreError, match=r"RunStore\.list: .*Permission denied"):
        store.list()


@pytest.mark.parametrize("look", [1, 2])
def test_a_temporary_file_whose_writer_finishes_during_a_sweep_is_passed_over(
    look: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, stat = RunStore(str(tmp_path)), Path.stat
    store.create_exclusive("groups/a", b"1", writer_id="w")
    busy, looks = tmp_path / "groups" / ".b.w.1234.tmp", []
    busy.write_bytes(b"half")

    def racing(file: Path, **options: Any) -> os.stat_result:
        if file == busy:
            looks.append(file)
            if len(looks) == look:
                busy.unlink(missing_ok=True)
        return stat(file, **options)

    monkeypatch.setattr(Path, "stat", racing)
    store.sweep(older_than_s=3600.0)
    assert store.list() == ["groups/a"]


def test_patience_ends_with_the_refusal_and_a_missing_file_needs_none(tmp_path: Path) -> None:
    naps: list[float] = []

    def hook(stage: str, path: str) -> None:
        if path == "a":
            raise OSError(5, "Input/output error")

    def nap(seconds: float) -> None:
        naps.append(seconds)
        time.sleep(min(seconds, 0.01))

    store = RunStore(str(tmp_path), hook=hook, patience_s=0.2, sleep=nap)
    with pytest.raises(StoreError, match="Input/output error"):
        store.create_exclusive("a", b"1", writer_id="w")
    assert naps and max(naps) <= 0.2
    tries = len(naps)
    with pytest.raises(StoreError, match="missing"):
        store.read("b")
    with pytest.raises(StoreError, match=r"RunStore\.size"):
        store.size("b")
    assert not store.exists("b")
    assert len(naps) == tries


def run_while(store: RunStore, take: Callable[[], None], give: Callable[[], None]) -> Coordinator:
    """A run of three updates during whose second one the store is away for a second."""
    config = {"schedule": {"max_staleness": 1}, "learner": {"groups_per_update": 2}}
    claim = Claim(incarnation=1, writer_id="w", started_at="", config_digest="c0", config=config)
    store.create_exclusive(paths.config_path(1), encode_record(claim), writer_id="w")
    desk = make_coordinator(store, make_settings(), Clock())
    publish(store, desk, 0)
    returning = threading.Timer(1.0, give)
    for update in (1, 2, 3):
        for count, _ in enumerate(work(store, desk)):
            if (update, count) == (2, 1):
                take()
                returning.start()
        learn(store, desk, update)
    returning.join(DEADLINE_S)
    desk.close("done")
    return desk


@pytest.mark.parametrize("how", ["moved", "refused"])
def test_a_patient_run_stalls_while_the_store_is_away_and_loses_nothing(how: str, tmp_path: Path, permissions: Permissions) -> None:
    store = RunStore(str(permissions.root), hook=permissions, patience_s=DEADLINE_S)
    away = tmp_path / "away"
    with heard() as lines:
        if how == "refused":
            run_while(store, permissions.take, permissions.give)
        else:
            run_while(store, lambda: void(permissions.root.rename(away)), lambda: void(away.rename(permissions.root)))
    assert "the store is away, everything waits" in lines.text
    assert "the store is back after" in lines.text
    report = audit(store)
    assert (report.violations, report.num_manifests, report.num_groups) == ((), 3, 6)


def void(_: Path) -> None:
    """Let a call count as a statement."""
