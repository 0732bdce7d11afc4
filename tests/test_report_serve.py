"""`report --serve`: the page, its JSON and its images from a run's files, refused to everybody who asks for more, drawn again as files come."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import report_runs

from common.errors import UserError
from common.store import paths
from common.store.arrow_files import decode
from common.store.manifests import Status, encode_record
from common.store.media import MEDIA_SCHEMA
from common.store.run_store import RunStore
from deploy.cli import app
from deploy.report.live import REST_S, LiveRun
from deploy.report.serve import LivePages, is_loopback
from tests import s3_server
from tests.live_report import PATIENCE_S, HandClock, ask, drawn_state, files_of, served, wait_for

EVIL = "<script>alert(1)</script>"
SECRET = "planted-beside-the-run"
ROOT = Path(__file__).resolve().parent.parent


def put_status(store: RunStore, **changes: Any) -> None:
    """Refresh status.json."""
    told: dict[str, Any] = {
        "incarnation": 1, "sequence": 1, "written_at": 1000.0, "state": "running", "reason": "", "host": "h", "process_id": 1, "version": 2,
        "manifests": 2, "retired_through": 0,
    }  # fmt: skip
    store.replace(paths.STATUS, encode_record(Status(**told | changes)))


def hostile_run(store: RunStore) -> None:
    """Two updates, a base evaluation and one after, images of a group; every text that a user gives is an attack."""
    report_runs.start(store, name=f"run {EVIL}")
    for update in (1, 2):
        report_runs.put_json(store, paths.metrics_path(update, 1), report_runs.metrics(update, 2) | {"drops": {EVIL: 1}})
    report_runs.evaluation(store, 0, {"colors": [1.0, 0.0]}, text=f"{EVIL} {{index}}")
    report_runs.evaluation(store, 2, {"colors": [1.0, 1.0]}, text=f"{EVIL} {{index}}")
    report_runs.training_samples(store, 2, groups=1, size=2, prompt=EVIL)
    put_status(store)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> RunStore:
    """A run with a secret beside its directory."""
    folder = tmp_path_factory.mktemp("live")
    (folder / "secret.json").write_text(SECRET)
    (folder / "secret.media.arrow").write_text(SECRET)
    made = RunStore(str(folder / "run"))
    hostile_run(made)
    return made


@pytest.fixture(scope="module")
def live(store: RunStore) -> LiveRun:
    """The run, drawn."""
    found = LiveRun(store)
    assert drawn_state(found).trouble == ""
    return found


@pytest.fixture(scope="module")
def url(live: LiveRun) -> Iterator[str]:
    """Where it is served."""
    with served(live) as address:
        yield address


def test_the_page_shows_every_part_and_hostile_texts_as_text(url: str, live: LiveRun) -> None:
    answer = ask(url, "/")
    assert answer.status == 200 and answer.headers["Content-Type"] == "text/html; charset=utf-8"
    page = answer.text
    for heading in (
        "Rewards",
        "Before and after",
        "Samples over time",
        "Training",
        "The fleet",
        "Training samples of the last update",
        "The record",
    ):
        assert f"<h2>{heading}</h2>" in page
    assert EVIL not in page and "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert re.findall(r"<script\b[^>]*>", page) == ['<script src="/page.js">']  # none inside the page: the policy forbids it
    assert not re.search(r"https?://", page)
    assert dict(re.findall(r'data-part="(\w+)" data-digest="(\w+)"', page)) == live.state().parts
    for name, digest in live.state().parts.items():
        part = ask(url, f"/parts/{name}")
        assert part.headers["X-Digest"] == digest and EVIL not in part.text and part.text in page


def test_images_are_links_to_the_very_images_of_the_run(url: str, store: RunStore) -> None:
    links = sorted(set(re.findall(r'src="(/samples/[^"]+)"', ask(url, "/").text)))
    groups = [link for link in links if "/groups/" in link]
    assert len(links) == 2 * 2 + len(groups) and len(groups) >= 1  # 2 prompts of 2 versions, best and worst of the one group
    for link in links:
        answer = ask(url, link)
        path, _, row = link.removeprefix("/samples/").removesuffix(".webp").rpartition("/")
        batch: pa.RecordBatch = decode(path, store.read(path), schema_version=MEDIA_SCHEMA)[0]
        assert answer.headers["Content-Type"] == "image/webp"
        assert answer.body == batch.column("image")[int(row)].as_py()


@pytest.mark.parametrize(
    "path",
    [
        "/samples/../secret.json", "/samples/../secret.media.arrow/0.webp", "/samples/%2e%2e/secret.media.arrow/0.webp",
        "/samples/..%2fsecret.media.arrow/0.webp", "/samples/eval/../../secret.media.arrow/0.webp",
        "/samples/eval/%2e%2e/%2e%2e/secret.media.arrow/0.webp", "/samples//etc/passwd/0.webp", "/samples/%2fetc%2fpasswd/0.webp",
        "/samples/config.i0001.json", "/samples/config.i0001.json/0.webp", "/samples/status.json", "/samples/eval/",
        "/samples/eval/v000000.ema.0123abcd/s0000.aa11.media.arrow", "/samples/eval/v000000.ema.0123abcd/s0000.aa11.media.arrow/99.webp",
        "/samples/eval/v000000.ema.0123abcd/s0000.aa11.media.arrow/-1.webp", "/parts/../live.html.j2", "/parts/..%2flive.html.j2",
        "/parts/macros", "/parts/", "/secret.json", "/../secret.json", "/config.i0001.json", "/api/", "/api/state.json/..", "//secret.json",
    ],
)  # fmt: skip
def test_nothing_but_what_a_page_names_is_sent(url: str, path: str) -> None:
    answer = ask(url, path)
    assert answer.status == 404
    assert SECRET not in answer.text and "config_digest" not in answer.text and len(answer.body) < 100


@pytest.mark.parametrize(
    ("path", "status"), [("/", 200), ("/api/state.json", 200), ("/page.js", 200), ("/nothing", 404), ("/samples/x", 404)]
)
def test_every_answer_carries_the_security_headers(url: str, path: str, status: int) -> None:
    answer = ask(url, path)
    assert answer.status == status
    policy = dict(rule.split(" ", 1) for rule in answer.headers["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == policy["script-src"] == policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert "aiohttp" not in answer.headers["Server"]


@pytest.mark.parametrize(
    "host", ["attacker.example", "attacker.example:8266", "127.0.0.1.attacker.example", "[::1", "192.0.2.7", "localhost."]
)
def test_a_foreign_host_header_is_refused(url: str, host: str) -> None:
    answer = ask(url, "/api/curves.json", host=host)
    assert answer.status == 403 and b"updates" not in answer.body
    assert "Content-Security-Policy" in answer.headers


def test_a_request_without_a_host_header_gets_nothing(url: str) -> None:
    answer = ask(url, "/api/curves.json", host="")
    assert answer.status in (400, 403) and b"updates" not in answer.body


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "LOCALHOST:1", "[::1]:8266"])
def test_loopback_names_are_answered_whatever_the_port(url: str, host: str) -> None:
    assert ask(url, "/api/state.json", host=host).status == 200


def test_a_server_on_every_address_answers_to_addresses_and_its_own_name_only(live: LiveRun) -> None:
    wide, named = LivePages(live, "0.0.0.0"), LivePages(live, "box.example")
    names = ("10.1.2.3:8266", f"{socket.gethostname()}:8266", "box.example", "attacker.example")
    assert [wide._is_ours(name) for name in names] == [True, True, False, False]
    assert [named._is_ours(name) for name in names] == [False, False, True, False]
    assert [is_loopback(name) for name in ("127.0.0.1", "localhost", "::1")] == [True] * 3
    assert [is_loopback(name) for name in ("0.0.0.0", "10.1.2.3", "box.example")] == [False] * 3


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "HEAD", "OPTIONS"])
def test_only_get_is_answered(url: str, method: str) -> None:
    answer = ask(url, "/", method=method)
    assert answer.status == 405 and answer.headers["Allow"] == "GET"


def test_serving_writes_nothing_into_the_run_directory(store: RunStore) -> None:
    before = files_of(store)
    fresh = LiveRun(store)
    drawn_state(fresh)
    with served(fresh) as address:
        for path in ("/", "/api/state.json", "/api/curves.json", "/page.js"):
            assert ask(address, path).status == 200
    assert files_of(store) == before


def test_the_curves_are_the_files_and_what_a_resume_superseded_is_left_out(tmp_path: Path) -> None:
    """Start 1 wrote updates 1 to 3; start 2 began again at 2, and has only 2 so far: 3 of start 1 never happened to this policy."""
    store = RunStore(str(tmp_path / "run"))
    report_runs.start(store)
    report_runs.start(store, 2)
    reward = {"a": {"mean": 0.25, "std_in_group": 0.5, "coverage": 0.75, "flat_share": 0.0}}
    learner = {"ratio_mean": 1.5, "ratio_max": 2.0, "clip_fraction_up": 0.125, "kl_exact": 0.01, "approx_kl": float("nan"), "loss": None}
    for update, incarnation, ended in ((1, 1, 100.0), (2, 1, 110.0), (3, 1, 120.0), (2, 2, 500.0)):
        record = report_runs.metrics(update, 3, incarnation) | {
            "time_unix": ended, "seconds": {"wait": 1.0, "learn": 4.0}, "learner": learner, "rewards": reward, "staleness": {"0": 3, "2": 1},
        }  # fmt: skip
        report_runs.put_json(store, paths.metrics_path(update, incarnation), record)
    report_runs.evaluation(store, 0, {"colors": [1.0, 0.0], "counting": [0.0, 0.0]})
    report_runs.evaluation(store, 2, {"colors": [1.0, 1.0], "counting": [1.0, 0.0]})
    curves = LiveRun(store).curves()
    assert json.loads(json.dumps(curves, allow_nan=False)) == curves
    assert [(row["update"], row["incarnation"], row["time_unix"], row["elapsed_s"]) for row in curves["updates"]] == [
        (1, 1, 100.0, 5.0), (2, 2, 500.0, 10.0),
    ]  # fmt: skip
    newest = curves["updates"][1]
    assert newest["rewards"] == reward
    assert newest["ratio"] == {"mean": 1.5, "max": 2.0} and newest["clip"] == {"up": 0.125}
    assert newest["kl"] == {"kl_exact": 0.01, "approx_kl": None}
    assert newest["staleness"] == {"groups": {"0": 3, "2": 1}, "mean": 0.5, "max": 2}
    assert (newest["images"], newest["images_per_s"]) == (192, 192 / 5)
    found = [(row["version"], row["is_base"], row["elapsed_s"], row["rewards"]["geneval_strict"]) for row in curves["evaluations"]]
    assert found == [
        (0, True, 0.0, {"mean": 0.25, "coverage": 1.0, "tasks": {"colors": {"mean": 0.5, "n": 2}, "counting": {"mean": 0.0, "n": 2}}}),
        (2, False, 10.0, {"mean": 0.75, "coverage": 1.0, "tasks": {"colors": {"mean": 1.0, "n": 2}, "counting": {"mean": 0.5, "n": 2}}}),
    ]


def test_the_json_over_http_is_the_curves(url: str, live: LiveRun) -> None:
    answer = ask(url, "/api/curves.json")
    assert answer.headers["Content-Type"].startswith("application/json") and answer.headers["Cache-Control"] == "no-store"
    assert json.loads(answer.body) == live.curves()


def test_a_new_update_is_drawn_after_a_rest_and_only_its_parts_change() -> None:
    """In memory:, as in an object store there is no folder to look into."""
    store, clock = RunStore("memory://live/new-update"), HandClock()
    report_runs.start(store)
    report_runs.put_json(store, paths.metrics_path(1, 1), report_runs.metrics(1, 3))
    live = LiveRun(store, clock=clock)
    first = drawn_state(live)
    report_runs.put_json(store, paths.metrics_path(2, 1), report_runs.metrics(2, 3))
    assert live.state().update == 1  # one look serves everybody for a moment
    clock.now = REST_S - 1
    resting = live.state()
    assert (resting.update, resting.is_behind, resting.parts) == (2, True, first.parts)
    clock.now = REST_S + 1
    second = drawn_state(live)
    changed = {name for name in first.parts if first.parts[name] != second.parts[name]}
    assert {"rewards", "training", "fleet", "findings"} <= changed and not changed & {"head", "record", "samples", "table"}


def test_a_run_in_an_object_store_is_the_same_page(store: RunStore, live: LiveRun) -> None:
    with s3_server.served():
        remote = RunStore(f"s3://{s3_server.BUCKET}/live")
        for path in store.list():
            remote.create_exclusive(path, store.read(path), writer_id="copy")
        found = LiveRun(remote)
        assert drawn_state(found).parts == live.state().parts
        assert found.curves() == live.curves()
        link = re.findall(r'src="(/samples/[^"]+)"', str(found.drawn.page.parts["samples"] if found.drawn else ""))[0]
        assert found.image(link) == live.image(link) is not None


def test_a_file_that_breaks_its_form_is_told_and_what_was_drawn_stays(tmp_path: Path) -> None:
    store, clock = RunStore(str(tmp_path / "run")), HandClock()
    report_runs.start(store)
    report_runs.evaluation(store, 0, {"colors": [1.0]})
    live = LiveRun(store, clock=clock)
    first = drawn_state(live)
    sheet = paths.sheet_path(report_runs.evaluation(store, 1, {"colors": [1.0]}), 0, "aa11")
    store.create_exclusive(paths.history_path(1), b"no parquet", writer_id="test")
    clock.now = 100.0
    with served(live) as address:
        answer = ask(address, "/api/state.json")
        assert answer.status == 503 and paths.history_path(1) in answer.text
        store.remove(paths.history_path(1))
        store.remove(sheet)  # an image that is gone is said, never an error of the page
        wait_for(lambda: ask(address, "/api/state.json").status == 200, "the look after the file went")
        assert drawn_state(live).parts["samples"] != first.parts["samples"]
        assert "not kept" in ask(address, "/").text


@pytest.mark.parametrize(
    ("status", "now", "state", "sentence", "left_s"),
    [
        (None, 30.0, "waiting", "waiting · update 3 of 60", None),
        ({"written_at": 28.0}, 30.0, "running", "running · update 3 of 60", 570.0),  # 57 updates of 10 s
        ({"written_at": 28.0}, 128.0, "silent", "silent · update 3 of 60", None),
        ({"state": "done", "reason": "all updates"}, 30.0, "done", "done: all updates · update 3 of 60", None),
        ({"written_at": 28.0, "alerts": ("a", "b")}, 30.0, "running", "running · update 3 of 60 · 2 alerts", 570.0),
    ],
)
def test_the_status_line_tells_state_progress_and_ages(
    tmp_path: Path, status: dict[str, Any] | None, now: float, state: str, sentence: str, left_s: float | None
) -> None:
    store = RunStore(str(tmp_path / "run"))
    report_runs.start(store)
    for update in (1, 2, 3):
        record = report_runs.metrics(update, 60) | {"time_unix": 10.0 * update - 5.0}
        report_runs.put_json(store, paths.metrics_path(update, 1), record)
    if status is not None:
        put_status(store, **status)
    found = LiveRun(store, wall=lambda: now).state()
    assert (found.state, found.sentence, found.left_s) == (state, sentence, left_s)
    assert (found.update, found.planned, found.share, found.update_age_s) == (3, 60, 3 / 60, now - 25.0)


def test_a_port_that_is_taken_is_said_with_the_remedy(store: RunStore) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        arguments = ["report", store.url, "--serve", "--port", str(taken.getsockname()[1])]
        with pytest.raises(UserError, match=r"cannot be bound .*--port \(0 = any free one\)"):
            app(args=arguments, standalone_mode=False)


def test_the_command_prints_its_address_warns_beyond_loopback_and_ends_cleanly_on_ctrl_c(store: RunStore) -> None:
    command = [sys.executable, "-m", "deploy.cli", "report", store.url, "--serve", "--port", "0", "--host", "0.0.0.0"]
    before = files_of(store)
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}) as process:
        assert process.stderr is not None
        lines = [process.stderr.readline(), process.stderr.readline()]
        assert "anyone who reaches this port can read the run" in lines[0]
        found = re.search(r"http://[^:]+:(\d+)/ shows", lines[1])
        assert found is not None, lines
        assert json.loads(ask(f"http://127.0.0.1:{found[1]}", "/api/state.json").body)["update"] == 2
        process.send_signal(signal.SIGINT)
        rest = process.communicate(timeout=PATIENCE_S)[1]
    assert process.returncode == 0 and "Traceback" not in rest and "ended; nothing was written" in rest
    assert files_of(store) == before
