"""A run directory on S3 (moto's server on loopback): exclusive, fresh, bounded, and the same run as on a local directory."""

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from common.errors import AlreadyExists, ConfigError, StoreError
from common.policy.adapters import read_header
from common.store import object_files
from common.store.audit import audit
from common.store.recovery import adapters
from common.store.run_store import RunStore
from deploy.cli import app
from deploy.options import StartOptions
from deploy.session import run_session
from tests.log_lines import heard
from tests.run_fixtures import QUIET, small_config
from tests.s3_server import BUCKET, SECRET, S3Server, served

DEADLINE_S = 240.0
SYNC = ("schedule.max_staleness=0", "evaluation.at_start=false")


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with served() as running:
        yield running


@pytest.fixture
def store(server: S3Server, request: pytest.FixtureRequest) -> RunStore:
    return RunStore(f"s3://{BUCKET}/{request.node.name[:60]}")


def test_the_contract_of_a_run_directory_holds(store: RunStore) -> None:
    store.create_exclusive("groups/000/a", b"abc", writer_id="w1")
    store.create_exclusive("groups/000/a", b"abc", writer_id="w1")  # a retry meets its own file
    with pytest.raises(AlreadyExists, match="other content"):
        store.create_exclusive("groups/000/a", b"abd", writer_id="w2")
    RunStore(f"{store.url}-neighbor").create_exclusive("groups/x", b"1", writer_id="w")
    assert store.list() == store.list("groups") == ["groups/000/a"]
    assert (store.read("groups/000/a"), store.size("groups/000/a"), store.list("scores")) == (b"abc", 3, [])
    assert (store.exists("groups/000/a"), store.exists("groups/000"), store.exists("groups/000/b")) == (True, False, False)
    for content in (b"1", b"22"):
        store.replace("status.json", content)
    assert store.sizes() == {"groups/000/a": 3, "status.json": 2}
    assert (store.read("status.json"), store.free_bytes(), store.sweep(0)) == (b"22", None, [])
    for _ in range(2):
        store.remove("status.json")
    with pytest.raises(StoreError, match=r"status\.json is missing"):
        store.read("status.json")
    store.probe()
    assert store.list() == ["groups/000/a"]


def test_the_listing_is_fresh_when_another_writer_writes(store: RunStore) -> None:
    other = RunStore(store.url)
    for number in range(5):
        assert store.list() == [f"f{each}" for each in range(number)]
        assert not store.exists(f"f{number}")
        other.create_exclusive(f"f{number}", b"1", writer_id="x")


def test_of_two_writers_that_race_for_a_name_exactly_one_wins(store: RunStore) -> None:
    num_names = 15
    barrier, won = threading.Barrier(2), {"left": set[int](), "right": set[int]()}

    def race(name: str) -> None:
        mine = RunStore(store.url)
        for number in range(num_names):
            barrier.wait(DEADLINE_S)
            try:
                mine.create_exclusive(f"m/{number}", name.encode(), writer_id=name)
            except AlreadyExists:
                continue
            won[name].add(number)

    racers = [threading.Thread(target=race, args=(name,)) for name in won]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join(DEADLINE_S)
    assert won["left"] & won["right"] == set()
    assert won["left"] | won["right"] == set(range(num_names))
    assert {number for number in range(num_names) if store.read(f"m/{number}") == b"left"} == won["left"]


def test_a_file_above_the_multipart_size_is_one_conditional_put(store: RunStore, server: S3Server) -> None:
    content = b"\7" * (101 * 2**20)  # s3fs sends parts from 100 MiB on
    before = server.num_conditional_puts
    store.create_exclusive("big", content, writer_id="w")
    assert server.num_conditional_puts == before + 1
    assert store.size("big") == len(content)
    with pytest.raises(AlreadyExists):
        store.create_exclusive("big", b"other", writer_id="w")
    store.remove("big")


def operations(store: RunStore) -> dict[str, Callable[[], Any]]:
    """One call of each kind."""
    return {
        "create": lambda: store.create_exclusive("new", b"1", writer_id="w"), "replace": lambda: store.replace("status.json", b"1"),
        "read": lambda: store.read("a"), "exists": lambda: store.exists("a"), "size": lambda: store.size("a"), "list": store.list,
        "remove": lambda: store.remove("a"),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("away", "words"), [("stopped", "EndpointConnectionError"), ("busy", "(away for a while|Service Unavailable)"), ("hangs", "no answer")]
)
def test_every_operation_on_a_store_that_is_away_is_a_store_error_and_then_goes_on(
    away: str, words: str, store: RunStore, server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.create_exclusive("a", b"1", writer_id="w")
    try:
        if away == "stopped":
            server.stop()
        if away == "hangs":
            monkeypatch.setattr(object_files, "METADATA_LIMIT_S", 0.3)
            monkeypatch.setattr(object_files, "READ_LIMIT_S", 0.3)
        server.is_busy, server.hang_s = away == "busy", 1.5 if away == "hangs" else 0.0
        for name, operation in operations(store).items():
            with pytest.raises(StoreError, match=f"RunStore.{name}: .*{words}") as caught:
                operation()
            assert SECRET not in str(caught.value)
    finally:
        server.is_busy, server.hang_s = False, 0.0
        if away == "stopped":
            server.start()
    monkeypatch.undo()
    store.create_exclusive("new", b"1", writer_id="w")  # a put whose answer was lost is met, and accepted
    assert store.read("new") == b"1"


def test_a_missing_bucket_is_never_an_empty_run(server: S3Server) -> None:
    gone = RunStore("s3://no-such-bucket/run")
    for operation in operations(gone).values():
        with pytest.raises(StoreError, match="the bucket is gone"):
            operation()


def test_credentials_in_a_url_are_refused_and_not_repeated() -> None:
    with pytest.raises(ConfigError, match="keep them in the environment") as caught:
        RunStore(f"s3://key:{SECRET}@{BUCKET}/run")
    assert SECRET not in str(caught.value)


# ---- whole runs


def outage(server: S3Server, seconds: float) -> threading.Thread:
    """Stop the server once the run has made 40 further requests, and start it again."""
    target, deadline = server.num_requests + 40, time.monotonic() + DEADLINE_S

    def work() -> None:
        while server.num_requests < target and time.monotonic() < deadline:
            time.sleep(0.01)
        server.stop()
        time.sleep(seconds)
        server.start()

    thread = threading.Thread(target=work)
    thread.start()
    return thread


@pytest.fixture(scope="module")
def runs(server: S3Server, tiny_sd3_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunStore, RunStore, str]:
    """A run on a local directory; the same one on S3, cut in two, its second half with the server away for some seconds; the log."""
    folder, remote = tmp_path_factory.mktemp("s3") / "local", f"s3://{BUCKET}/whole/run"
    whole = small_config(tiny_sd3_dir, "tiny-geneval", *SYNC)
    first = small_config(tiny_sd3_dir, "tiny-geneval", *SYNC, "schedule.num_updates=1")
    run_session(whole, StartOptions(run_dir=str(folder), local=True), QUIET)
    with heard() as lines:
        run_session(first, StartOptions(run_dir=remote, local=True), QUIET)
        away = outage(server, 3.0)
        run_session(whole, StartOptions(run_dir=remote, local=True), QUIET)
        away.join(DEADLINE_S)
    return RunStore(str(folder)), RunStore(remote), lines.text


def facts(store: RunStore) -> tuple[list[Any], str, list[str]]:
    """What manifests say but for random lease ids, the last adapter's digest, the histories' digests."""
    manifests = [json.loads(store.read(path)) for path in store.list("manifests")]
    keys = ("number", "version", "prompt_id", "scores", "kept")
    said = [(each["update"], each["drops"], [[group[key] for key in keys] for group in each["groups"]]) for each in manifests]
    digest = read_header(store.read(adapters(store)[3]), "v3")["digest"]
    return said, digest, [hashlib.sha256(store.read(path)).hexdigest() for path in store.list("history")]


def test_a_run_on_s3_that_was_cut_and_lost_its_store_for_a_while_is_the_local_run(runs: tuple[RunStore, RunStore, str]) -> None:
    local, remote, log = runs
    assert "the store is away" in log or "the store refused" in log
    assert facts(remote) == facts(local)
    report = audit(remote)
    assert (report.violations, report.num_manifests, report.num_groups) == ((), 3, 6)


def test_the_secret_is_in_no_file_and_no_log_line_of_the_run(runs: tuple[RunStore, RunStore, str]) -> None:
    _, remote, log = runs
    listed = remote.list()
    assert len(listed) > 20
    for path in listed:
        assert SECRET.encode() not in remote.read(path), path
    assert log and SECRET not in log


def test_the_commands_read_a_run_on_s3(runs: tuple[RunStore, RunStore, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # report.html of a remote run is written here
    url = runs[1].url
    for command, words in (("audit", "3 manifests, 6 groups consumed"), ("status", "updates 3/3"), ("report", "report: report.html")):
        done = CliRunner().invoke(app, [command, url])
        assert (done.exit_code, words in done.output) == (0, True), done.output
    assert "jpeg_compressibility" in (tmp_path / "report.html").read_text()
