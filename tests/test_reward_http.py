"""Rewards over HTTP on loopback: the server under bad clients, the client under bad servers, and a reward in a child process."""

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from common.errors import ConfigError, ScorerError, ScorerHung
from common.types import Prompt, Score
from reward_servers.guarded import score_guarded
from reward_servers.wire.child import ChildScorer, ChildSettings
from reward_servers.wire.http_client import HttpScorer, make_http
from reward_servers.wire.pixels import PixelFormat, encode_image
from reward_servers.wire.settings import ServeSettings
from reward_servers.wire.transport import CallerSettings, Refused
from tests.wire_servers import (
    PATIENCE_S,
    VERSION,
    Asked,
    Level,
    Reply,
    black_hole,
    level_images,
    open_protocol,
    prompts_of,
    results_reply,
    reward_server,
    scripted_server,
    token_file,
)

ROOT = Path(__file__).resolve().parent.parent
IMAGES, PROMPTS = level_images(5, 6, 7), prompts_of(3)
Results = list[dict[str, Any]]


def client(url: str, *, timeout_s: float = PATIENCE_S, retries: int = 0, max_answer_bytes: int = 1 << 16) -> HttpScorer:
    """A client of the level reward that hardly pauses between tries."""
    caller = CallerSettings(timeout_s=timeout_s, retries=retries, backoff_s=0.001, max_answer_bytes=max_answer_bytes)
    return HttpScorer(url=url, reward="level", caller=caller)


def request_body(*levels: int, metadata: dict[str, Any] | None = None) -> bytes:
    """A request written by hand."""
    items = [
        {"id": str(index), "prompt": {"text": "a", "metadata": metadata or {}}, "image": encode_image(image, "png")}
        for index, image in enumerate(level_images(*levels))
    ]
    return json.dumps({"reward": "level", "items": items}).encode()


def ask(url: str, body: bytes | None = None, path: str = "/v1/score", **headers: str) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Send a request as any client might; returns status, JSON and headers. `headers`: _ stands for -."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=PATIENCE_S)
    given = {"Content-Type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
    with contextlib.closing(connection):
        connection.request("GET" if body is None else "POST", path, body=body, headers=given)
        response = connection.getresponse()
        content = response.read()
        is_json = response.headers.get_content_type() == "application/json"
        return response.status, json.loads(content) if is_json else {"text": content.decode()}, dict(response.headers.items())


def until(holds: Callable[[], bool]) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def level_url() -> Iterator[str]:
    """A real server of the level reward, shared by the tests that leave it whole."""
    with reward_server(Level(), ServeSettings(max_items=4, max_body_bytes=1 << 20, max_pending=200)) as url:
        yield url


class Held(Level):
    """Holds every call until it is released."""

    def __init__(self) -> None:
        self.began, self.release = threading.Event(), threading.Event()

    def score(self, images: NDArray[np.uint8], prompts: Sequence[Prompt]) -> list[Score]:
        """Wait, then score."""
        self.began.set()
        assert self.release.wait(PATIENCE_S)
        return super().score(images, prompts)


@pytest.mark.parametrize("pixel_format", ["png", "webp"])
def test_scores_over_http_equal_local_ones_in_any_batch_and_order(level_url: str, pixel_format: PixelFormat) -> None:
    images = np.random.default_rng(1).integers(0, 256, size=(6, 9, 5, 3), dtype=np.uint8)
    prompts = prompts_of(6)  # empty, unicode and 10,000-character texts; more than the server's max_items, so two requests
    scorer = make_http(url=level_url, reward="level", pixel_format=pixel_format)
    local = [score.value for score in Level().score(images, prompts)]
    together = scorer.score(images, prompts)
    assert [score.value for score in together] == local
    assert [score.sample_index for score in together] == list(range(6))
    assert [scorer.score(images[i : i + 1], prompts[i : i + 1])[0].value for i in range(6)] == local
    assert [score.value for score in scorer.score(images[::-1], prompts[::-1])] == local[::-1]
    assert together[0].details == {"size": 9.0}
    assert (scorer.name, scorer.version) == ("http:level", f"http-{VERSION}")


def test_a_hundred_concurrent_clients_all_get_their_own_answer(level_url: str) -> None:
    scorer = make_http(url=level_url, reward="level")

    def one(number: int) -> list[float | None]:
        return [score.value for score in scorer.score(level_images(number, 255 - number), prompts_of(2))]

    with ThreadPoolExecutor(100) as pool:
        assert list(pool.map(one, range(100))) == [[number, 255 - number] for number in range(100)]


def test_a_batch_that_is_none_is_an_error_and_not_a_number(level_url: str) -> None:
    scorer = make_http(url=level_url, reward="level")
    with pytest.raises(ScorerError, match="uint8 RGB"):
        scorer.score(IMAGES.astype(np.float32), PROMPTS)  # type: ignore[arg-type]


def test_options_that_cannot_work_are_errors_at_the_start(level_url: str, tmp_path: Path) -> None:
    for options, rule in [
        ({"url": "ftp://x"}, "http://HOST:PORT"), ({"url": "http://user:word@x"}, "without user"), ({"pixel_format": "jpeg"}, "png, webp"),
        ({"timeout_s": 0}, "timeout_s"), ({"retries": -1}, "retries"), ({"token_file": str(tmp_path / "absent")}, "token_file"),
        ({"reward": "other"}, "serves level"), ({"url": level_url + "/elsewhere"}, "404"),
    ]:  # fmt: skip
        with pytest.raises(ConfigError, match=rule):
            make_http(**({"url": level_url, "reward": "level"} | options))  # type: ignore[arg-type]


def test_only_the_right_token_is_answered_and_probes_need_none(tmp_path: Path) -> None:
    good = token_file(tmp_path)
    with reward_server(Level(), ServeSettings(token_file=good)) as url:
        for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic s3cret-token-of-a-test"}):
            for path in ("/v1/score", "/v1/rewards", "/metrics", "/nowhere"):
                status, said, headers = ask(url, request_body(1) if path == "/v1/score" else None, path, **header)
                assert (status, said["error"]["code"], headers["WWW-Authenticate"]) == (401, "unauthorized", "Bearer")
        assert [ask(url, None, path)[0] for path in ("/health", "/ready")] == [200, 200]
        assert make_http(url=url, reward="level", token_file=good).score(IMAGES, PROMPTS)[2].value == 7.0
        (tmp_path / "other").write_text("another-token", encoding="ascii")
        with pytest.raises(ConfigError, match="status 401"):
            make_http(url=url, reward="level", token_file=str(tmp_path / "other"))


def test_requests_that_break_a_rule_get_their_status_and_a_json_error(level_url: str) -> None:
    fine = request_body(1)
    assert ask(level_url, fine)[0] == 200
    for status, code, came in [
        (413, "too_large", ask(level_url, b" " * (1 << 20) + fine)),
        (413, "too_large", ask(level_url, request_body(1, 2, 3, 4, 5))),
        (415, "unsupported", ask(level_url, fine, Content_Type="text/plain")),
        (415, "unsupported", ask(level_url, fine, Content_Encoding="gzip")),
        (404, "no_such_endpoint", ask(level_url, fine, "/v1/else")),
        (405, "no_such_endpoint", ask(level_url, fine, "/health")),
        (404, "unknown_reward", ask(level_url, fine.replace(b'"level"', b'"other"'))),
        (422, "bad_image", ask(level_url, fine.replace(b'"image": "iVBO', b'"image": "iVBA'))),
        (400, "bad_body", ask(level_url, fine[:-1])),
    ]:
        assert (came[0], came[1]["error"]["code"]) == (status, code)
        assert came[1]["error"]["message"]


def test_a_body_without_a_length_is_not_read_beyond_the_limit(level_url: str) -> None:
    connection = http.client.HTTPConnection(urlsplit(level_url).netloc, timeout=PATIENCE_S)
    with contextlib.closing(connection):
        chunks = (b"x" * (1 << 16) for _ in range(17))  # 17 x 64 KiB, one more than the limit
        connection.request("POST", "/v1/score", body=chunks, headers={"Content-Type": "application/json"}, encode_chunked=True)
        response = connection.getresponse()
        assert (response.status, json.loads(response.read())["error"]["code"]) == (413, "too_large")


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["reward", "items", "id", "prompt", "image", "x"]), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=st.binary(max_size=200) | JSON_VALUES.map(lambda value: json.dumps(value).encode()))
def test_a_fuzzed_body_gets_a_4xx_and_the_server_lives(level_url: str, body: bytes) -> None:
    status, said, _ = ask(level_url, body)
    assert 400 <= status < 500, said
    assert said["error"]["message"]
    assert ask(level_url, None, "/ready")[0] == 200


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, len(request_body(3)) - 1), byte=st.integers(0, 255), cut=st.booleans())
def test_a_damaged_request_is_refused_or_scored_and_the_server_lives(level_url: str, place: int, byte: int, cut: bool) -> None:
    """One byte differs, or the end is missing: a flip inside a text leaves a request whole, so 200 is right too."""
    fine = request_body(3)
    body = fine[:place] if cut else fine[:place] + bytes([byte]) + fine[place + 1 :]
    status, said, _ = ask(level_url, body)
    assert (status == 200 and not cut) or 400 <= status < 500, said
    assert ask(level_url, request_body(3))[1]["results"][0]["score"] == 3.0


@pytest.mark.parametrize("raises", ["stop", "exit"])
def test_whatever_a_scorer_raises_is_an_answer_and_never_the_servers_end(level_url: str, raises: str) -> None:
    status, said, _ = ask(level_url, request_body(1, metadata={"raises": raises}))
    assert (status, said["error"]["code"]) == (500, "scorer_failed")
    assert ask(level_url, request_body(4))[1]["results"][0]["score"] == 4.0


def test_a_full_queue_says_busy_and_when_to_come_again() -> None:
    scorer = Held()
    with reward_server(scorer, ServeSettings(max_pending=2)) as url, ThreadPoolExecutor(2) as pool:
        first = pool.submit(ask, url, request_body(1))
        assert scorer.began.wait(PATIENCE_S)
        second = pool.submit(ask, url, request_body(2))
        until(lambda: 'pending{reward="level"} 2.0' in ask(url, None, "/metrics")[1]["text"])
        status, said, headers = ask(url, request_body(3))
        assert (status, said["error"]["code"], headers["Retry-After"]) == (503, "busy", "1")
        assert ask(url, None, "/health")[0] == 200
        scorer.release.set()
        assert [one.result()[1]["results"][0]["score"] for one in (first, second)] == [1.0, 2.0]
        text = ask(url, None, "/metrics")[1]["text"]
        assert 'flowfleet_reward_http_requests_total{reward="level",status="503"} 1.0' in text
        assert 'flowfleet_reward_http_images_total{outcome="scored",reward="level"} 2.0' in text


def test_bodies_that_wait_are_bounded_in_bytes() -> None:
    scorer, body = Held(), request_body(1)
    with reward_server(scorer, ServeSettings(max_pending_bytes=2 * len(body) - 1)) as url, ThreadPoolExecutor(1) as pool:
        first = pool.submit(ask, url, body)
        assert scorer.began.wait(PATIENCE_S)
        assert ask(url, body)[0] == 503
        scorer.release.set()
        assert first.result()[0] == 200
        assert ask(url, body)[0] == 200


def test_a_scorer_that_hangs_gets_a_504_and_the_server_is_not_ready_until_it_returns() -> None:
    scorer = Held()
    with reward_server(scorer, ServeSettings(deadline_s=0.3)) as url:
        status, said, _ = ask(url, request_body(1))
        assert (status, said["error"]["code"]) == (504, "late")
        until(lambda: ask(url, None, "/ready")[0] == 503)
        assert ask(url, None, "/health")[0] == 200
        scorer.release.set()
        until(lambda: ask(url, None, "/ready")[0] == 200)
        until(lambda: ask(url, request_body(9))[0] == 200)


# --- the client under bad servers -------------------------------------------------------------------------------------------------


def test_answers_in_another_order_are_put_in_order() -> None:
    with scripted_server(open_protocol(lambda results: results_reply(results[::-1]))) as (url, _):
        assert [score.value for score in client(url).score(IMAGES, PROMPTS)] == [10.0, 11.0, 12.0]


BROKEN: dict[str, Callable[[Results], Reply]] = {
    "not json": lambda _: Reply(body=b"{"),
    "html": lambda _: Reply(body=b"<html>"),
    "no results": lambda _: Reply(body=b"{}"),
    "a missing one": lambda results: results_reply(results[:-1]),
    "one twice": lambda results: results_reply([*results, results[0]]),
    "one twice in place of another": lambda results: results_reply([*results[:-1], results[0]]),
    "an unknown id": lambda results: results_reply([*results[:-1], results[-1] | {"id": "x"}]),
    "a number as text": lambda results: results_reply([one | {"score": "10"} for one in results]),
    "true as number": lambda results: results_reply([one | {"score": True} for one in results]),
    "a list as number": lambda results: results_reply([one | {"score": [1]} for one in results]),
    "no score": lambda results: results_reply([{"id": one["id"], "scorer_version": VERSION} for one in results]),
    "a number as id": lambda results: results_reply([one | {"id": int(one["id"])} for one in results]),
    "no version": lambda results: results_reply([{"id": one["id"], "score": 1.0} for one in results]),
    "too large": lambda results: Reply(body=results_reply(results).body + b" " * (1 << 17)),
    "compressed": lambda results: Reply(body=results_reply(results).body, headers={"Content-Encoding": "gzip"}),
    "a redirect": lambda _: Reply(status=307, headers={"Location": "http://127.0.0.1:1/"}),
    "a refusal": lambda _: Reply(status=422, body=b'{"error": {"code": "bad_image", "message": "no"}}'),
    "always 500": lambda _: Reply(status=500),
}  # fmt: skip


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_answer_is_an_error_and_at_last_null_never_a_number(fault: str) -> None:
    with scripted_server(open_protocol(BROKEN[fault])) as (url, asked):
        scorer = client(url)
        with pytest.raises(Refused):
            scorer.score(IMAGES, PROMPTS)
        assert len(asked) == 2  # the listing and one try: a refusal is not asked again
        scores = score_guarded(scorer, IMAGES, PROMPTS, micro_batch=3)
    if fault == "one twice in place of another":  # image by image this server has nothing to double
        assert [score.value for score in scores] == [10.0] * 3
    else:
        assert [score.value for score in scores] == [None] * 3
        assert all(score.error for score in scores)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e39])
def test_a_number_that_is_not_finite_is_null_and_its_neighbors_are_scored(value: float) -> None:
    with scripted_server(open_protocol(lambda results: results_reply([results[0], results[1] | {"score": value}, results[2]]))) as (url, _):
        scores = client(url).score(IMAGES, PROMPTS)
    assert [score.value for score in scores] == [10.0, None, 12.0]
    assert scores[1].error.startswith("not finite")


def test_nulls_scores_with_an_error_and_other_versions_are_null() -> None:
    def respond(results: Results) -> Reply:
        changes: list[dict[str, Any]] = [{"score": None, "error": "no face"}, {"error": "but"}, {"scorer_version": "level-4"}]
        return results_reply([one | change for one, change in zip(results, changes, strict=True)])

    with scripted_server(open_protocol(respond)) as (url, _):
        scores = client(url).score(IMAGES, PROMPTS)
    assert [score.value for score in scores] == [None, None, None]
    assert [score.error for score in scores][:2] == ["no face", "but"]
    assert "'level-4'" in scores[2].error
    assert [score.may_pass for score in scores] == [False, False, True]  # a server that was rolled back scores again


def test_a_third_of_5xx_is_retried_until_every_image_has_its_score() -> None:
    count = iter(range(10_000))
    with scripted_server(open_protocol(lambda results: Reply(status=503) if next(count) % 10 in (0, 4, 7) else results_reply(results))) as (
        url,
        asked,
    ):
        scorer = client(url, retries=5)
        assert all([score.value for score in scorer.score(IMAGES, PROMPTS)] == [10.0, 11.0, 12.0] for _ in range(20))
    assert len(asked) == 1 + next(count)
    assert 20 < next(count) - 1 <= 30  # three tries in ten fail: about 29 for 20 answers


def test_without_retries_a_third_of_5xx_is_null_and_no_zero() -> None:
    count = iter(range(10_000))
    with scripted_server(open_protocol(lambda results: Reply(status=503) if next(count) % 10 in (0, 4, 7) else results_reply(results))) as (
        url,
        _,
    ):
        scorer = client(url)
        values = [score.value for _ in range(10) for score in score_guarded(scorer, IMAGES, PROMPTS, micro_batch=3)]
    assert values.count(None) == 9 and set(values) == {None, 10.0, 11.0, 12.0}


def test_a_server_that_is_late_or_gone_makes_nulls_within_the_deadline() -> None:
    free = threading.Event()
    with scripted_server(open_protocol(lambda results: Reply(body=results_reply(results).body, before=lambda: free.wait(PATIENCE_S)))) as (
        url,
        asked,
    ):
        scorer = client(url, timeout_s=0.5, retries=3)
        scores = score_guarded(scorer, IMAGES, PROMPTS, micro_batch=3)
        assert [score.value for score in scores] == [None] * 3
        assert "no whole answer within 0.5 s" in scores[0].error
        assert all(score.may_pass for score in scores)
        assert len(asked) == 2  # one deadline for the batch, and no image asked for alone
        free.set()
    assert [score.value for score in score_guarded(scorer, IMAGES, PROMPTS, micro_batch=3)] == [None] * 3  # nothing listens there any more
    with black_hole() as nowhere, pytest.raises(ScorerError, match=r"no whole answer within 0\.3 s"):
        client(nowhere, timeout_s=0.3)


def test_a_redirect_is_never_followed_and_shows_the_token_to_nobody(tmp_path: Path) -> None:
    with scripted_server(lambda _: Reply()) as (thief, stolen):

        def away(_: Asked) -> Reply:
            return Reply(status=302, headers={"Location": thief + "/v1/rewards"})

        with scripted_server(away) as (url, asked), pytest.raises(ConfigError, match="redirects are never followed"):
            make_http(url=url, reward="level", token_file=token_file(tmp_path))
        assert asked[0].headers["Authorization"] == "Bearer s3cret-token-of-a-test"
        assert not stolen


def test_the_pages_server_in_plain_python_speaks_the_protocol() -> None:
    page = (ROOT / "docs" / "reward-protocol.md").read_text(encoding="utf-8")
    program = page.partition("```python\n")[2].partition("```")[0]
    names: dict[str, Any] = {"__name__": "page"}
    exec(compile(program, "reward-protocol.md", "exec"), names)
    server = ThreadingHTTPServer(("127.0.0.1", 0), names["Handler"])
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        scorer = make_http(url=f"http://127.0.0.1:{server.server_address[1]}", reward="brightness", pixel_format="webp")
        images = level_images(0, 51, 255)
        values = [score.value for score in scorer.score(images, PROMPTS)]
    finally:
        server.shutdown()
        server.server_close()
        thread.join(PATIENCE_S)
    assert values == pytest.approx([float(image.mean()) / 255 for image in images], abs=1e-9)


# --- an environment of its own ----------------------------------------------------------------------------------------------------

CHILD_CODE = """
import os, time
print("a module that talks while it is loaded")

def level(image, prompt, metadata, offset=0.0):
    if "poison" in metadata:
        os._exit(7)
    if "hang" in metadata:
        time.sleep(600)
    print("a scorer that talks")
    return float(image[0, 0, 0]) + offset
"""


@pytest.fixture(scope="module")
def child(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChildScorer]:
    """User code in a child process of this interpreter."""
    folder = tmp_path_factory.mktemp("child")
    (folder / "child_rewards.py").write_text(CHILD_CODE, encoding="utf-8")
    before = Path.cwd()
    os.chdir(folder)
    settings = ChildSettings(python=sys.executable, reward="child_rewards:level", options={"offset": 0.5}, max_restarts=1)
    try:
        with ChildScorer(settings) as scorer:
            yield scorer
            pid = scorer.pid
        assert pid is None or not is_running(pid)
        with pytest.raises(ScorerError, match="closed"):
            scorer.score(IMAGES, PROMPTS)
    finally:
        os.chdir(before)


def is_running(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_child_process_scores_and_is_replaced_when_it_was_killed(child: ChildScorer) -> None:
    assert child.name == "child_rewards:level"
    assert [score.value for score in child.score(IMAGES, PROMPTS)] == [5.5, 6.5, 7.5]
    first = child.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    until(lambda: not is_running(first))
    assert [score.value for score in score_guarded(child, IMAGES, PROMPTS, micro_batch=3)] == [5.5, 6.5, 7.5]
    assert child.pid not in (None, first)


def test_an_image_that_kills_the_child_is_null_and_its_neighbors_are_scored(child: ChildScorer) -> None:
    prompts = [PROMPTS[0], Prompt(id="bad", text="", metadata={"poison": 1}), PROMPTS[2]]
    scores = score_guarded(child, IMAGES, prompts, micro_batch=3)
    assert [score.value for score in scores] == [5.5, None, 7.5]
    assert "ended with status 7" in scores[1].error


def test_a_child_that_dies_again_and_again_is_given_up(child: ChildScorer) -> None:
    poison = [Prompt(id="bad", text="", metadata={"poison": 1})]
    errors = []
    for _ in range(4):
        with pytest.raises(ScorerError) as caught:
            child.score(IMAGES[:1], poison)
        errors.append(caught.value)
    assert ["failed 2 times without a score" in str(error) for error in errors] == [False, False, True, True]
    assert [isinstance(error, ScorerHung) for error in errors] == [False, False, True, True]  # what costs the server its process


def test_a_child_of_another_version_is_refused_for_as_long_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / "child_rewards.py"
    module.write_text(CHILD_CODE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with ChildScorer(ChildSettings(python=sys.executable, reward="child_rewards:level")) as scorer:
        first = scorer.pid
        assert first is not None
        module.write_text(CHILD_CODE.replace("+ offset", "+ offset + 1.0"), encoding="utf-8")
        os.kill(first, signal.SIGKILL)
        until(lambda: not is_running(first))
        scores = score_guarded(scorer, IMAGES, PROMPTS, micro_batch=3)
        assert [(score.value, score.may_pass) for score in scores] == [(None, True)] * 3  # no failure of this process
        assert "the child's scorer changed from" in scores[0].error
        module.write_text(CHILD_CODE, encoding="utf-8")
        assert [score.value for score in score_guarded(scorer, IMAGES, PROMPTS, micro_batch=3)] == [5.0, 6.0, 7.0]


def test_a_childs_complaint_is_the_users_error() -> None:
    with pytest.raises(ConfigError, match="no_such_module_here"):
        ChildScorer(ChildSettings(python=sys.executable, reward="no_such_module_here:f"))
    with pytest.raises(ConfigError, match="cannot be run"):
        ChildScorer(ChildSettings(python="/nonexistent/python", reward="jpeg_compressibility"))
    with pytest.raises(ScorerError, match="ended with status"):
        ChildScorer(ChildSettings(python="/bin/false", reward="jpeg_compressibility"))


def test_a_child_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    (tmp_path / "child_rewards.py").write_text(CHILD_CODE, encoding="utf-8")
    program = f"""
        import sys, time
        sys.path.insert(0, {str(ROOT)!r})
        from reward_servers.wire.child import ChildScorer, ChildSettings
        scorer = ChildScorer(ChildSettings(python=sys.executable, reward="child_rewards:level"))
        sys.stdout.write(f"{{scorer.pid}}\\n")
        sys.stdout.flush()
        time.sleep(600)
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent:
        pid = int(parent.stdout.readline())
        assert is_running(pid)
        parent.kill()
    until(lambda: not is_running(pid))


@pytest.mark.slow
def test_a_child_that_hangs_is_ended_and_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "child_rewards.py").write_text(CHILD_CODE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    settings = ChildSettings(python=sys.executable, reward="child_rewards:level", timeout_s=20.0, end_timeout_s=1.0)
    with ChildScorer(settings) as scorer:
        first = scorer.pid
        assert first is not None
        (score,) = score_guarded(scorer, IMAGES[:1], [Prompt(id="h", text="", metadata={"hang": 1})], micro_batch=1)
        assert score.value is None and score.may_pass
        assert not is_running(first)
        assert scorer.score(IMAGES[:1], PROMPTS[:1])[0].value == 5.0
