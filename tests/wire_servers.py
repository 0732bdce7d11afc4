"""Servers on loopback in threads: the real reward server, and one whose every answer a test writes."""

import asyncio
import contextlib
import json
import queue
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.protocols import Scorer
from common.types import Prompt, Score
from reward_servers.scorers.base import PlainScorer
from reward_servers.wire.bearer import read_token
from reward_servers.wire.http_server import RewardApp, run_app
from reward_servers.wire.service import RewardService
from reward_servers.wire.settings import ServeSettings

PATIENCE_S = 240.0
VERSION = "level-3"


class Level(PlainScorer):
    """An image's score is its first pixel's red value; a prompt's metadata may ask for a failure."""

    name = "level"
    version = VERSION

    def score(self, images: NDArray[np.uint8], prompts: Sequence[Prompt]) -> list[Score]:
        """Score, or raise what metadata["raises"] names."""
        for prompt in prompts:
            if "raises" in prompt.metadata:
                raise {"value": ValueError("bad pixel"), "stop": StopIteration("no more"), "exit": SystemExit("leave")}[
                    prompt.metadata["raises"]
                ]
        details = {"size": float(images.shape[1]), "odd": float("nan")}
        return [Score(sample_index=index, value=float(image[0, 0, 0]), details=details) for index, image in enumerate(images)]


def level_images(*levels: int, size: int = 8) -> NDArray[np.uint8]:
    """Images [B, size, size, 3] of one gray each, with a gradient in blue so that no encoder has it easy."""
    images = np.stack([np.full((size, size, 3), level, dtype=np.uint8) for level in levels])
    images[..., 2] = np.arange(size, dtype=np.uint8)
    return images


def prompts_of(number: int) -> list[Prompt]:
    """Prompts of an empty text, a unicode text, a long text, and so on."""
    texts = ("", 'ein Schild "größer" 猫 🐈', "x" * 10_000)
    return [Prompt(id=f"p{index}", text=texts[index % 3], metadata={"index": index, "nested": {"ü": [1, None]}}) for index in range(number)]


@contextlib.contextmanager
def reward_server(scorer: Scorer, settings: ServeSettings | None = None) -> Iterator[str]:
    """Serve a scorer as `serve` does, but in a thread; yields the base address."""
    settings = settings or ServeSettings()
    app = RewardApp(RewardService(scorer, settings.limits, micro_batch=settings.micro_batch), settings, read_token(settings.token_file))
    ports: queue.Queue[int] = queue.Queue()
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()
    thread = threading.Thread(target=lambda: loop.run_until_complete(run_app(app, settings, announce=ports.put, stop=stop)), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{ports.get(timeout=PATIENCE_S)}"
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(PATIENCE_S)
        app.close()
        assert not thread.is_alive(), "the server's thread must end"
        loop.close()


@dataclass
class Asked:
    """One request that the scripted server got."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def table(self) -> dict[str, Any]:
        """The JSON body."""
        table: dict[str, Any] = json.loads(self.body)
        return table


@dataclass
class Reply:
    """What the scripted server answers."""

    status: int = 200
    body: bytes = b"{}"
    headers: dict[str, str] = field(default_factory=dict)
    before: Callable[[], object] = lambda: None  # called ahead of the answer, e.g. to be late


@contextlib.contextmanager
def scripted_server(reply: Callable[[Asked], Reply]) -> Iterator[tuple[str, list[Asked]]]:
    """Serve what `reply` says; yields the base address and the requests so far."""
    asked: list[Asked] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
            request = Asked(self.command, self.path, dict(self.headers.items()), body)
            asked.append(request)
            said = reply(request)
            said.before()
            with contextlib.suppress(OSError):  # the client has gone
                self.send_response(said.status)
                for name, value in {"Content-Length": str(len(said.body)), **said.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(said.body)

        do_GET = do_POST = answer

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        thread.join(PATIENCE_S)
        server.socket.close()


def open_protocol(respond: Callable[[list[dict[str, Any]]], Reply]) -> Callable[[Asked], Reply]:
    """A scripted server's answers: the level reward's listing, and to a score request what `respond` makes of honest results."""

    def reply(asked: Asked) -> Reply:
        if asked.method == "GET":
            return Reply(body=json.dumps({"rewards": [{"name": "level", "version": VERSION}]}).encode())
        results = [
            {"id": item["id"], "score": 10.0 + index, "error": "", "details": {}, "scorer_version": VERSION}
            for index, item in enumerate(asked.table["items"])
        ]
        return respond(results)

    return reply


def results_reply(results: Sequence[dict[str, Any]]) -> Reply:
    """An answer with these results; NaN and infinity as Python writes them."""
    return Reply(body=json.dumps({"results": list(results)}).encode())


@contextlib.contextmanager
def black_hole() -> Iterator[str]:
    """A server that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def token_file(folder: Path, token: str = "s3cret-token-of-a-test") -> str:
    """A file that holds a token."""
    path = folder / "token"
    path.write_text(token + "\n", encoding="ascii")
    return str(path)
