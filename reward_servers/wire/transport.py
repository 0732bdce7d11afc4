"""HTTP for scorers: a deadline over everything, retries with jitter on connection errors and 5xx, bounded answers, no redirects."""

import asyncio
import os
import random
import threading
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from functools import cache
from math import ceil
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

import aiohttp
from pydantic import ValidationError

from common.errors import ConfigError, ScorerError, ScorerUnavailable
from reward_servers.wire.bearer import bearer_header, read_token
from reward_servers.wire.messages import RefusalAnswer

_T = TypeVar("_T")
_MAY_PASS: Final = frozenset({408, 429, 502, 503, 504})
"""Statuses that say nothing about the images: too many requests, server busy, late or gone."""
_SLACK_S: Final = 10.0
_MAX_PAUSE_S: Final = 10.0
_READ_SIZE: Final = 1 << 16


class Refused(ScorerError):
    """The server answered and the answer was no, or broken; other images may fare better. `status`: what came."""

    def __init__(self, message: str, status: int = 200) -> None:
        super().__init__(message)
        self.status = status


class Unreachable(ScorerUnavailable):
    """No answer in time, whatever was sent: a failure that may pass. `status`: what came, 0 = nothing."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True, kw_only=True)
class CallerSettings:
    """How a server is asked."""

    token_file: str = ""  # sent as bearer token; empty = none
    timeout_s: float = 60.0  # of one request with all its retries
    retries: int = 3  # after the first try
    max_answer_bytes: int = 8 << 20
    num_parallel: int = 8  # requests at a time
    backoff_s: float = 0.5  # mean pause before the first retry; it doubles

    def __post_init__(self) -> None:
        """Raise ConfigError for numbers that cannot work."""
        numbers = {"timeout_s": self.timeout_s, "num_parallel": self.num_parallel, "max_answer_bytes": self.max_answer_bytes}
        for name, value in numbers.items():
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
                raise ConfigError(f"reward option {name} is {value!r}; it must be a number above 0")
        if not isinstance(self.retries, int) or isinstance(self.retries, bool) or self.retries < 0:
            raise ConfigError(f"reward option retries is {self.retries!r}; it must be an integer of at least 0")


class Caller:
    """Asks HTTP servers from plain code.

    The deadline covers connecting, sending, waiting, reading and every retry. Redirects, proxies and cookies are never used, so the
    token goes to the named host alone.

    Raises:
        ConfigError: the token file or a number of the settings is wrong.
    """

    def __init__(self, settings: CallerSettings) -> None:
        self._settings = settings
        self._headers = {"Accept-Encoding": "identity", **bearer_header(read_token(settings.token_file))}

    def get(self, url: str) -> bytes:
        """Return the body of an answer 200. Raises Refused, Unreachable."""
        return _only(self._ask_all("GET", url, [None]))

    def post(self, url: str, body: bytes) -> bytes:
        """Send JSON and return the body of an answer 200. Raises Refused, Unreachable."""
        return _only(self._ask_all("POST", url, [body]))

    def post_all(self, url: str, bodies: Sequence[bytes]) -> list[bytes | ScorerError]:
        """Send several requests, num_parallel at a time; return answers or errors in their order."""
        return self._ask_all("POST", url, bodies)

    def _ask_all(self, method: str, url: str, bodies: Sequence[bytes | None]) -> list[bytes | ScorerError]:
        rounds = ceil(len(bodies) / self._settings.num_parallel)
        return _run(self._gathered(method, url, bodies), rounds * self._settings.timeout_s + _SLACK_S)

    async def _gathered(self, method: str, url: str, bodies: Sequence[bytes | None]) -> list[bytes | ScorerError]:
        gate = asyncio.Semaphore(self._settings.num_parallel)
        session = aiohttp.ClientSession(
            headers=self._headers, timeout=aiohttp.ClientTimeout(total=None), auto_decompress=False, trust_env=False,
            cookie_jar=aiohttp.DummyCookieJar(), connector=aiohttp.TCPConnector(limit=self._settings.num_parallel),
        )  # fmt: skip

        async def answer(body: bytes | None) -> bytes | ScorerError:
            async with gate:
                try:
                    return await self._with_deadline(session, method, url, body)
                except ScorerError as error:
                    return error

        async with session:
            return await asyncio.gather(*(answer(body) for body in bodies))

    async def _with_deadline(self, session: aiohttp.ClientSession, method: str, url: str, body: bytes | None) -> bytes:
        failures: list[ScorerError] = []
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                return await self._with_retries(session, method, url, body, failures=failures)
        except TimeoutError:
            last = f"; the last try: {failures[-1]}" if failures else ""
            raise Unreachable(f"{url}: no whole answer within {self._settings.timeout_s:g} s{last}; is the server up?") from None

    async def _with_retries(
        self, session: aiohttp.ClientSession, method: str, url: str, body: bytes | None, *, failures: list[ScorerError]
    ) -> bytes:
        """Ask until an answer comes or the tries are used up. `failures`: where the failed tries are noted."""
        for attempt in range(self._settings.retries + 1):
            wait_s = 0.0
            try:
                status, content, wait_s = await self._once(session, method, url, body)
            except (aiohttp.ClientError, OSError) as error:
                failures.append(Unreachable(f"{url}: {type(error).__name__}: {str(error)[:200]}"))
            else:
                if status == 200:
                    return content
                failures.append(_failure(url, status, content))
                if status < 500:
                    break
            if attempt < self._settings.retries:
                pause_s = random.uniform(0, 2 * self._settings.backoff_s * 2**attempt)
                await asyncio.sleep(max(wait_s, min(pause_s, _MAX_PAUSE_S)))
        raise failures[-1]

    async def _once(self, session: aiohttp.ClientSession, method: str, url: str, body: bytes | None) -> tuple[int, bytes, float]:
        """Return status, body and the seconds that the server asks to wait."""
        headers = {} if body is None else {"Content-Type": "application/json"}
        async with session.request(method, url, data=body, headers=headers, allow_redirects=False) as response:
            content = bytearray()
            async for chunk in response.content.iter_chunked(_READ_SIZE):
                content += chunk
                if len(content) > self._settings.max_answer_bytes:
                    response.close()
                    raise Refused(f"{url}: the answer has more than {self._settings.max_answer_bytes} bytes; it is not read")
            if response.status == 200 and response.headers.get("Content-Encoding", "identity") != "identity":
                raise Refused(f"{url}: a compressed answer came, though none was asked for")
            asked = response.headers.get("Retry-After", "0")
            return response.status, bytes(content), float(asked) if asked.isdecimal() else 0.0


def endpoint(url: str, path: str) -> str:
    """Return the address of a path below a base address. Raises ConfigError unless that is plain http(s) with a host."""
    try:
        parts = urlsplit(url)
        is_plain = parts.scheme in ("http", "https") and bool(parts.hostname) and not (parts.username or parts.query or parts.fragment)
        is_plain = is_plain and (parts.port is None or parts.port > 0)
    except ValueError:
        is_plain = False
    if not is_plain:
        raise ConfigError(f"reward option url is {url!r}; write http://HOST:PORT or https://HOST, without user, query or fragment")
    return url.rstrip("/") + path


def _only(answers: Sequence[bytes | ScorerError]) -> bytes:
    (answer,) = answers
    if isinstance(answer, ScorerError):
        raise answer
    return answer


def _failure(url: str, status: int, content: bytes) -> ScorerError:
    try:
        said = RefusalAnswer.model_validate_json(content).error.message
    except ValidationError:
        said = content[:200].decode("utf-8", errors="replace")
    remedy = "; redirects are never followed, name the final address" if 300 <= status < 400 else ""
    message = f"{url}: status {status}: {said[:300]!r}{remedy}"
    return Unreachable(message, status) if status in _MAY_PASS else Refused(message, status)


def _run(work: Coroutine[Any, Any, _T], timeout_s: float) -> _T:
    """Run a coroutine in this process's event-loop thread and wait for it. Raises Unreachable after timeout_s."""
    future = asyncio.run_coroutine_threadsafe(work, _loop(os.getpid()))
    try:
        return future.result(timeout_s)
    except TimeoutError:
        future.cancel()
        raise Unreachable(f"the event loop gave no answer within {timeout_s:g} s") from None


@cache
def _loop(_pid: int) -> asyncio.AbstractEventLoop:
    """An event loop in a daemon thread, one a process (a forked child has none of its parent's threads)."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="reward-http", daemon=True).start()
    return loop
