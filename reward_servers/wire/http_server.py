"""The HTTP shell of a RewardService: bearer token, limits before reading, one scoring thread behind a bounded queue."""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

from aiohttp import web
from aiohttp.http import HttpProcessingError
from aiohttp.typedefs import Handler
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from common.errors import ConfigError
from common.logs import get_logger
from common.protocols import Scorer
from reward_servers.wire.bearer import is_authorized, read_token
from reward_servers.wire.messages import (
    HEALTH_PATH,
    METRICS_PATH,
    READY_PATH,
    REWARDS_PATH,
    SCORE_PATH,
    RefusalAnswer,
    RefusalText,
    RequestRefused,
    decode_request,
)
from reward_servers.wire.serve_metrics import ServeMetrics
from reward_servers.wire.service import RewardService
from reward_servers.wire.settings import ServeSettings

_OPEN_PATHS: Final = frozenset({HEALTH_PATH, READY_PATH})
"""What is answered without a token: probes; they say nothing but a word."""
_RETRY_AFTER_S: Final = 1
_READ_SIZE: Final = 1 << 16
_LOG: Final = get_logger("reward.http")


class RewardApp:
    """The endpoints of one reward.

    A request passes token, headers, the bounds on pending requests and bytes, and only then is read; it is decoded and scored in
    the one scoring thread. The deadline runs from its head; a client that leaves or is too late is not scored if its turn has not come.

    Args:
        service: answers decoded requests.
        settings: limits and durations.
        token: what clients must show; "" = nothing.
    """

    def __init__(self, service: RewardService, settings: ServeSettings, token: str) -> None:
        self._service, self._settings, self._token = service, settings, token
        self.metrics = ServeMetrics(service.name)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="scoring")
        self._num_pending = self._pending_bytes = 0
        self._busy_since: float | None = None

    def application(self) -> web.Application:
        """Return the aiohttp application."""
        app = web.Application(middlewares=[self._guard])
        app.router.add_post(SCORE_PATH, self._score)
        app.router.add_get(REWARDS_PATH, self._rewards)
        app.router.add_get(HEALTH_PATH, self._health)
        app.router.add_get(READY_PATH, self._ready)
        app.router.add_get(METRICS_PATH, self._metrics)
        return app

    def close(self) -> bool:
        """Score nothing more. Returns whether the scoring thread is free; one that hangs in a scorer cannot be ended."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        return self._busy_since is None

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Ask for the token, and turn refusals into JSON."""
        try:
            if self._token and request.path not in _OPEN_PATHS and not is_authorized(request.headers.get("Authorization", ""), self._token):
                raise RequestRefused(
                    401, "unauthorized", "the bearer token is missing or wrong; send the header Authorization: Bearer TOKEN"
                )
            response = await handler(request)
        except RequestRefused as refusal:
            response = _refusal(refusal)
        except (web.RequestPayloadError, HttpProcessingError) as error:
            response = _refusal(RequestRefused(400, "bad_body", f"the body cannot be read: {error}"))
        except web.HTTPException as error:
            response = _refusal(RequestRefused(error.status, "no_such_endpoint", f"{request.method} {request.path[:80]}: {error.reason}"))
        if request.path == SCORE_PATH:
            self.metrics.count_request(response.status)
        return response

    async def _score(self, request: web.Request) -> web.Response:
        with self._admitted(_checked_length(request, self._settings.max_body_bytes)), self.metrics.timed():
            try:
                async with asyncio.timeout(self._settings.deadline_s):
                    answer = await self._scored(await self._body(request))
            except TimeoutError:
                raise RequestRefused(504, "late", f"no answer within {self._settings.deadline_s:g} s; send fewer images") from None
        return web.Response(body=answer, content_type="application/json")

    @contextlib.contextmanager
    def _admitted(self, num_bytes: int) -> Iterator[None]:
        """Hold a place among the pending requests, or raise RequestRefused (503)."""
        settings = self._settings
        if self._num_pending >= settings.max_pending or self._pending_bytes + num_bytes > settings.max_pending_bytes:
            message = f"{self._num_pending} requests of {self._pending_bytes} bytes are pending; ask again after Retry-After"
            raise RequestRefused(503, "busy", message, retry_after_s=_RETRY_AFTER_S)
        self._num_pending += 1
        self._pending_bytes += num_bytes
        self.metrics.show_pending(self._num_pending)
        try:
            yield
        finally:
            self._num_pending -= 1
            self._pending_bytes -= num_bytes
            self.metrics.show_pending(self._num_pending)

    async def _body(self, request: web.Request) -> bytes:
        body = bytearray()
        async for chunk in request.content.iter_chunked(_READ_SIZE):
            body += chunk
            if len(body) > self._settings.max_body_bytes:
                raise _too_large(self._settings.max_body_bytes)
        return bytes(body)

    async def _scored(self, body: bytes) -> bytes:
        """Have the scoring thread decode and score; whatever a scorer raises becomes a refusal (500), never the end of the process."""
        loop, done = asyncio.get_running_loop(), asyncio.Event()

        def wake(_: Future[bytes]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(done.set)

        future = self._thread.submit(self._job, body)
        future.add_done_callback(wake)
        try:
            await done.wait()
        finally:
            future.cancel()
        if future.cancelled():
            raise RequestRefused(503, "stopping", "the server is stopping; ask again after Retry-After", retry_after_s=_RETRY_AFTER_S)
        error = future.exception()
        if error is None:
            return future.result()
        if isinstance(error, RequestRefused):
            raise error
        _LOG.error("scoring raised %s: %s", type(error).__name__, error)
        raise RequestRefused(500, "scorer_failed", f"the scorer raised {type(error).__name__}: {error}")

    def _job(self, body: bytes) -> bytes:
        self._busy_since = time.monotonic()
        try:
            answer = self._service.answer(decode_request(body))
            self.metrics.count_scores(result.score is not None for result in answer.results)
            return answer.model_dump_json().encode()
        finally:
            self._busy_since = None

    async def _rewards(self, _: web.Request) -> web.Response:
        return web.Response(body=self._service.rewards().model_dump_json().encode(), content_type="application/json")

    async def _health(self, _: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def _ready(self, _: web.Request) -> web.Response:
        """Ready unless one request has been in the scorer for longer than a deadline."""
        since = self._busy_since
        if since is not None and time.monotonic() - since > self._settings.deadline_s:
            raise RequestRefused(
                503, "stuck", f"one request has been scored for more than {self._settings.deadline_s:g} s; restart the server"
            )
        return web.json_response({"status": "ready"})

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=generate_latest(self.metrics.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})


def _checked_length(request: web.Request, max_body_bytes: int) -> int:
    """Return the bytes to reserve for a request, by its headers alone. Raises RequestRefused."""
    if request.content_type != "application/json":
        raise RequestRefused(415, "unsupported", f"the content type {request.content_type[:80]!r} came; send application/json")
    if request.headers.get("Content-Encoding", "identity") != "identity":
        raise RequestRefused(415, "unsupported", "a compressed body came; send it plain")
    length = max_body_bytes if request.content_length is None else request.content_length
    if length > max_body_bytes:
        raise _too_large(max_body_bytes)
    return length


def _too_large(max_body_bytes: int) -> RequestRefused:
    return RequestRefused(413, "too_large", f"the body has more than {max_body_bytes} bytes; send fewer images a request")


def _refusal(refusal: RequestRefused) -> web.Response:
    answer = RefusalAnswer(error=RefusalText(code=refusal.code, message=str(refusal)))
    headers = {"Retry-After": str(refusal.retry_after_s)} if refusal.retry_after_s else {}
    if refusal.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return web.Response(status=refusal.status, body=answer.model_dump_json().encode(), content_type="application/json", headers=headers)


async def run_app(app: RewardApp, settings: ServeSettings, *, announce: Callable[[int], None], stop: asyncio.Event) -> None:
    """Serve until `stop` is set; requests under way get grace_s to end.

    Args:
        app: whose endpoints these are.
        settings: host, port and grace.
        announce: told the port once clients can connect.
        stop: set by a signal.

    Raises:
        ConfigError: the address cannot be bound.
    """
    runner = web.AppRunner(
        app.application(), handler_cancellation=True, auto_decompress=False, access_log=None, shutdown_timeout=settings.grace_s
    )
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, settings.host, settings.port).start()
        except OSError as error:
            raise ConfigError(f"reward serve: {settings.host}:{settings.port} cannot be bound ({error}); choose another port") from error
        announce(int(runner.addresses[0][1]))
        await stop.wait()
    finally:
        await runner.cleanup()


def serve(scorer: Scorer, settings: ServeSettings, announce: Callable[[int], None] | None = None) -> None:
    """Serve a reward until SIGTERM or SIGINT; to be called from the main thread.

    A scorer that does not return within grace_s after the signal is left behind: the process then ends at once with status 1.

    Raises:
        ConfigError: the token file or the address is wrong.
    """
    token = read_token(settings.token_file)
    app = RewardApp(RewardService(scorer, settings.limits, micro_batch=settings.micro_batch), settings, token)

    def say(port: int) -> None:
        _LOG.info("%s is served on http://%s:%d%s", scorer.name, settings.host, port, "" if token else " (no token)")
        if announce is not None:
            announce(port)

    async def until_stopped() -> None:
        stop, loop = asyncio.Event(), asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        await run_app(app, settings, announce=say, stop=stop)

    asyncio.run(until_stopped())
    if not app.close():
        _LOG.error("%s did not return within %g s; the process ends without it", scorer.name, settings.grace_s)
        os._exit(1)
