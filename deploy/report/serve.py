"""`flowfleet report --serve`: the live report over HTTP. GET only, reads the run's files only, sends what the run's pages name and no more."""

import asyncio
import contextlib
import ipaddress
import json
import signal
import socket
from collections.abc import Callable
from typing import Any, Final
from urllib.parse import urlsplit

from aiohttp import web
from aiohttp.typedefs import Handler

from common.errors import StoreError, UserError
from common.store.run_store import RunStore
from deploy.report.live import LiveRun, as_json
from deploy.report.live_files import LINKS
from deploy.report.page import PARTS, make_environment, script_text

DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 8266
FIRST_PAGE_S = 5.0  # how long a request waits for the first drawing before it gets the page that asks again
NICENESS = 5  # of drawing: the run's own processes come first
GRACE_S = 2.0  # for requests under way when the server ends
_POLL_S = 0.1
_POLICY: Final = (
    "default-src 'self'; img-src 'self' data:; style-src 'self' 'unsafe-inline'; script-src 'self'; connect-src 'self'; object-src 'none'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS: Final = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Server": "flowfleet",
}
_IMMUTABLE: Final = "private, max-age=86400, immutable"


class LivePages:
    """The routes of one run.

    Args:
        live: the run.
        host: what the server is bound to: beside the loopback names the only name that a request may ask for. Bound to every address,
            numeric addresses and this machine's own name pass, since no foreign DNS name can be rebound to those.
    """

    def __init__(self, live: LiveRun, host: str = DEFAULT_HOST) -> None:
        self._live = live
        self._names = {"127.0.0.1", "localhost", "::1", host.lower()}
        self._is_wide = _is_wide(host)
        if self._is_wide:
            self._names |= {socket.gethostname().lower(), socket.getfqdn().lower()}
        self._templates = make_environment()
        self._script = str(script_text("samples.js", "live.js"))

    def application(self) -> web.Application:
        """Return the aiohttp application."""
        app = web.Application(middlewares=[self._guard])
        app.on_response_prepare.append(_secure)
        app.router.add_get("/", self._page)
        app.router.add_get("/page.js", self._page_script)
        app.router.add_get("/api/state.json", self._state)
        app.router.add_get("/api/curves.json", self._curves)
        app.router.add_get("/parts/{name}", self._part)
        app.router.add_get(LINKS + "{path:.+}", self._image)
        return app

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Refuse foreign names and other methods; turn refusals and a store that is away into plain text."""
        if not self._is_ours(request.headers.get("Host", "")):
            return _text(403, "this server answers to its own address only; open the address that it printed")
        if request.method != "GET":
            return _text(405, "GET only: this page reads a run and changes nothing", Allow="GET")
        try:
            return await handler(request)
        except web.HTTPException as error:
            return _text(error.status, error.reason)
        except StoreError as error:
            return _text(503, str(error))

    def _is_ours(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        return name in self._names or (self._is_wide and _is_address(name))

    async def _page(self, _: web.Request) -> web.Response:
        """The newest drawing at once; before the first, wait for it a while."""
        try:
            state = await asyncio.to_thread(self._live.state)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(FIRST_PAGE_S):
                    while self._live.drawn is None and not self._live.trouble:
                        await asyncio.sleep(_POLL_S)
        except StoreError as error:
            return self._wait(str(error))
        drawn = self._live.drawn
        if drawn is None:
            return self._wait(self._live.trouble or f"{state.name}: {state.sentence}. The first drawing is under way.")
        html = self._templates.get_template("live.html.j2").render(
            title=drawn.page.title, parts=drawn.page.parts, digests=drawn.digests, state=state.state, sentence=state.sentence, share=state.share
        )  # fmt: skip
        return _html(html)

    def _wait(self, reason: str) -> web.Response:
        html = self._templates.get_template("wait.html.j2").render(title="not drawn yet", reason=reason)
        return _html(html, status=503)

    async def _page_script(self, _: web.Request) -> web.Response:
        return web.Response(text=self._script, content_type="text/javascript", charset="utf-8", headers={"Cache-Control": "no-cache"})

    async def _state(self, _: web.Request) -> web.Response:
        return _json(as_json(await asyncio.to_thread(self._live.state)))

    async def _curves(self, _: web.Request) -> web.Response:
        return _json(await asyncio.to_thread(self._live.curves))

    async def _part(self, request: web.Request) -> web.Response:
        name, drawn = request.match_info["name"], self._live.drawn
        if name not in PARTS:
            raise web.HTTPNotFound()
        if drawn is None:
            return _text(503, "nothing is drawn yet; ask again")
        return _html(str(drawn.page.parts[name]), digest=drawn.digests[name])

    async def _image(self, request: web.Request) -> web.Response:
        content = await asyncio.to_thread(self._live.image, LINKS + request.match_info["path"])
        if content is None:
            raise web.HTTPNotFound()
        return web.Response(body=content, content_type="image/webp", headers={"Cache-Control": _IMMUTABLE})


async def _secure(_: web.Request, response: web.StreamResponse) -> None:
    response.headers.update(_HEADERS)
    response.headers.setdefault("Cache-Control", "no-store")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_wide(host: str) -> bool:
    """Whether this binds every address."""
    return _is_address(host) and ipaddress.ip_address(host).is_unspecified


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server bound to `host`."""
    return host.lower() == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)


def _text(status: int, message: str, **headers: str) -> web.Response:
    return web.Response(status=status, text=f"{message}\n", content_type="text/plain", headers=headers)


def _html(html: str, *, status: int = 200, digest: str = "") -> web.Response:
    headers = {"X-Digest": digest} if digest else {}
    response = web.Response(status=status, text=html, content_type="text/html", charset="utf-8", headers=headers)
    response.enable_compression()
    return response


def _json(tables: dict[str, Any]) -> web.Response:
    response = web.Response(text=json.dumps(tables, allow_nan=False, separators=(",", ":")), content_type="application/json")
    response.enable_compression()
    return response


async def run_pages(pages: LivePages, address: tuple[str, int], *, announce: Callable[[str], None], stop: asyncio.Event) -> None:
    """Serve until `stop` is set.

    Args:
        pages: what is served.
        address: host and port; port 0 = any free one.
        announce: told the page's URL once clients can connect.
        stop: set by a signal.

    Raises:
        UserError: the address cannot be bound.
    """
    runner = web.AppRunner(pages.application(), access_log=None, shutdown_timeout=GRACE_S)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, *address).start()
        except OSError as error:
            host, port = address
            raise UserError(
                f"report --serve: {host}:{port} cannot be bound ({error.strerror or error}); end what listens there, or name another port "
                "with --port (0 = any free one)"
            ) from error
        announce(f"http://{_shown(address[0])}:{int(runner.addresses[0][1])}/")
        await stop.wait()
    finally:
        await runner.cleanup()


def _shown(host: str) -> str:
    name = socket.gethostname() if _is_wide(host) else host
    return f"[{name}]" if ":" in name else name


def serve_report(store: RunStore, *, host: str, port: int, announce: Callable[[str], None]) -> None:
    """Serve a run's live report until SIGINT or SIGTERM; to be called from the main thread.

    Raises:
        UserError: the address cannot be bound.
        StoreError: the store refused the first look.
    """
    pages = LivePages(LiveRun(store, niceness=NICENESS), host)

    async def main() -> None:
        stop, loop = asyncio.Event(), asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop.set)
        await run_pages(pages, (host, port), announce=announce, stop=stop)

    asyncio.run(main())
