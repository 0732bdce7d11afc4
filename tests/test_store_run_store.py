"""RunStore: commits are exclusive, whole or absent, and refused with a remedy."""

import errno
import multiprocessing
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import AlreadyExists, GateError, StoreError
from common.store.run_store import RunStore


@pytest.fixture(params=["file", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> RunStore:
    return RunStore(str(tmp_path / "run") if request.param == "file" else f"memory://{tmp_path.name}")


def test_a_committed_file_reads_back_and_is_listed(store: RunStore) -> None:
    store.create_exclusive("groups/000/a.arrow", b"abc", writer_id="w1")
    assert store.read("groups/000/a.arrow") == b"abc"
    assert store.list() == store.list("groups") == ["groups/000/a.arrow"]
    assert store.list("scores") == []
    assert store.size("groups/000/a.arrow") == 3
    assert store.exists("groups/000/a.arrow")
    assert not store.exists("groups/000/b.arrow")


def test_a_second_writer_is_refused_and_changes_nothing(store: RunStore) -> None:
    store.create_exclusive("m.json", b"first", writer_id="w1")
    with pytest.raises(AlreadyExists, match=r"m\.json exists with other content"):
        store.create_exclusive("m.json", b"second", writer_id="w2")
    assert store.read("m.json") == b"first"


def test_a_retried_commit_meets_its_own_file_and_succeeds(store: RunStore) -> None:
    store.create_exclusive("m.json", b"mine", writer_id="w1")
    store.create_exclusive("m.json", b"mine", writer_id="w1")
    assert store.list() == ["m.json"]


def test_replace_writes_over_and_remove_forgets(store: RunStore) -> None:
    store.replace("status.json", b"1")
    store.replace("status.json", b"2")
    assert store.read("status.json") == b"2"
    store.remove("status.json")
    store.remove("status.json")
    assert store.list() == []
    with pytest.raises(StoreError, match=r"status\.json is missing"):
        store.read("status.json")


def test_the_listing_is_fresh_when_another_store_object_writes(store: RunStore) -> None:
    other = RunStore(store.url)
    assert store.list() == []
    other.create_exclusive("a", b"1", writer_id="x")
    assert store.list() == ["a"]


def test_the_probe_passes_on_a_sound_store_and_leaves_no_file(store: RunStore) -> None:
    store.probe()
    assert store.list() == []


def test_the_probe_names_a_store_whose_second_create_overwrites(tmp_path: Path) -> None:
    class Overwriting(RunStore):
        def create_exclusive(self, path: str, content: bytes, *, writer_id: str) -> None:
            self.replace(path, content)

    with pytest.raises(GateError, match="second writer create the same file") as caught:
        Overwriting(str(tmp_path)).probe()
    assert caught.value.name == "store"


@pytest.mark.parametrize("stage", ["write", "sync", "link"])
def test_a_full_disk_names_path_space_and_remedy_and_lists_nothing(tmp_path: Path, stage: str) -> None:
    full = True

    def hook(at: str, path: str) -> None:
        if full and at == stage:
            raise OSError(errno.ENOSPC, "No space left on device")

    store = RunStore(str(tmp_path), hook=hook)
    with pytest.raises(StoreError, match=r"g\.arrow: No space left on device \([\d,]+ bytes free\); .* free some space"):
        store.create_exclusive("groups/g.arrow", b"x" * 1000, writer_id="w")
    assert store.list() == []
    assert list((tmp_path / "groups").iterdir()) == []
    full = False
    store.create_exclusive("groups/g.arrow", b"x" * 1000, writer_id="w")
    assert store.size("groups/g.arrow") == 1000


def test_a_write_that_the_kernel_cuts_short_leaves_nothing(tmp_path: Path) -> None:
    code = (
        "import resource, sys; from common.errors import StoreError; from common.store.run_store import RunStore\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)); store = RunStore(sys.argv[1])\n"
        "try: store.create_exclusive('g', b'x' * 5000, writer_id='w')\n"
        "except StoreError as error: assert 'File too large' in str(error); assert store.list() == []; sys.exit(7)"
    )
    assert resource.RLIMIT_FSIZE is not None
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=60, check=False).returncode == 7
    assert os.listdir(tmp_path) == []


def _race(root: str, name: str, barrier: "multiprocessing.synchronize.Barrier", wins: "multiprocessing.Queue[tuple[int, str]]") -> None:
    store = RunStore(root)
    for number in range(40):
        barrier.wait(30)
        try:
            store.create_exclusive(f"m/{number}", name.encode(), writer_id=name)
        except AlreadyExists:
            continue
        wins.put((number, name))
    wins.put((-1, name))


def test_of_two_processes_that_race_for_forty_names_exactly_one_gets_each(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, wins = context.Barrier(2), context.Queue()
    racers = [context.Process(target=_race, args=(str(tmp_path), name, barrier, wins)) for name in ("left", "right")]
    for racer in racers:
        racer.start()
    won: dict[int, str] = {}
    ended = 0
    while ended < 2:
        number, name = wins.get(timeout=60)
        ended += number < 0
        assert number < 0 or number not in won
        won[number] = name
    for racer in racers:
        racer.join(30)
        assert racer.exitcode == 0
    store = RunStore(str(tmp_path))
    assert {number: store.read(f"m/{number}").decode() for number in range(40)} == {n: who for n, who in won.items() if n >= 0}


def test_only_temporary_files_older_than_an_hour_are_swept(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path))
    store.create_exclusive("groups/a", b"1", writer_id="w")
    for name, age in (("old", 3700), ("young", 3500)):
        file = tmp_path / "groups" / f".{name}.tmp"
        file.write_bytes(b"half")
        now = file.stat().st_mtime
        os.utime(file, (now - age, now - age))
    assert store.list() == ["groups/a"]
    assert store.sweep() == ["groups/.old.tmp"]
    assert (tmp_path / "groups" / ".young.tmp").exists()


@pytest.mark.parametrize("path", ["/etc/passwd", "../x", "a/../../x", "", "a//b"])
def test_a_path_that_leaves_the_run_directory_is_refused(store: RunStore, path: str) -> None:
    with pytest.raises(ValueError, match="not relative to the run directory"):
        store.read(path)
