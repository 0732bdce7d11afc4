"""A live report on loopback in a thread of its own, and a client that sends what no polite client would."""

import asyncio
import contextlib
import http.client
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from common.store.run_store import RunStore
from deploy.report.live import LiveRun, LiveState
from deploy.report.serve import LivePages, run_pages

PATIENCE_S = 240.0  # a busy machine is slow; nothing here measures speed


@dataclass(slots=True)
class HandClock:
    """A clock that tests turn."""

    now: float = 0.0

    def __call__(self) -> float:
        """The time."""
        return self.now


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came back."""

    status: int
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The body as text."""
        return self.body.decode()


def ask(url: str, path: str, *, method: str = "GET", host: str | None = None) -> Answer:
    """Send a request whose path and Host header go out as they are written."""
    address = url.removeprefix("http://").rstrip("/")
    with contextlib.closing(http.client.HTTPConnection(address, timeout=PATIENCE_S)) as connection:
        connection.putrequest(method, path, skip_host=True)
        if host is None or host:
            connection.putheader("Host", address if host is None else host)
        connection.endheaders()
        response = connection.getresponse()
        return Answer(status=response.status, body=response.read(), headers=dict(response.headers.items()))


def wait_for(ready: Callable[[], bool], what: str) -> None:
    """Return as soon as `ready` says so. Fails naming what it waited for."""
    deadline = time.monotonic() + PATIENCE_S
    while not ready():
        assert time.monotonic() < deadline, f"waited {PATIENCE_S:.0f} s for {what}"
        time.sleep(0.02)


def drawn_state(live: LiveRun) -> LiveState:
    """The state once everything that is on file is drawn."""
    wait_for(lambda: not live.state().is_behind or bool(live.trouble), "the drawing")
    return live.state()


@contextlib.contextmanager
def served(live: LiveRun, host: str = "127.0.0.1") -> Iterator[str]:
    """Serve a run on a free port; yields the URL."""
    urls: list[str] = []
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()
    main = run_pages(LivePages(live, host), (host, 0), announce=urls.append, stop=stop)
    thread = threading.Thread(target=loop.run_until_complete, args=(main,), daemon=True)
    thread.start()
    try:
        wait_for(lambda: bool(urls) or not thread.is_alive(), "the server")
        yield urls[0]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
        loop.close()


def files_of(store: RunStore) -> dict[str, tuple[int, int]]:
    """Every file of a local run with its size and time of change."""
    assert store.local_root is not None
    found = [path for path in store.local_root.rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in found}
