"""A headless Chromium driven over the DevTools protocol, offline but for loopback."""

import asyncio
import base64
import contextlib
import shutil
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp

PATIENCE_S = 240.0  # a busy machine is slow; nothing here measures speed
ARGUMENTS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run", "--disable-extensions",
    "--disable-background-networking", "--disable-component-update", "--remote-debugging-port=0", "--mute-audio",
)  # fmt: skip


class Page:
    """One tab.

    Args:
        socket: its DevTools connection.
    """

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._number = 0
        self.complaints: list[str] = []  # errors and violations of the content policy

    async def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol; return its result."""
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": parameters})
        while True:
            message = await self._socket.receive_json(timeout=PATIENCE_S)
            self._note(message)
            if message.get("id") == self._number:
                assert "error" not in message, (method, message)
                found: dict[str, Any] = message["result"]
                return found

    def _note(self, message: dict[str, Any]) -> None:
        if message.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(str(message["params"]["exceptionDetails"]))
        entry = message.get("params", {}).get("entry", {}) if message.get("method") == "Log.entryAdded" else {}
        if entry.get("level") == "error":
            self.complaints.append(f"{entry.get('text')} {entry.get('url', '')}")

    async def open(self, url: str) -> None:
        """Go somewhere and wait until it is loaded."""
        await self.send("Page.navigate", url=url)
        await self.wait(f"document.readyState === 'complete' && location.href.startsWith({url.partition('#')[0]!r})")

    async def value(self, expression: str) -> Any:
        """Evaluate a JavaScript expression."""
        answer = await self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, (expression, answer)
        return answer["result"].get("value")

    async def wait(self, expression: str) -> None:
        """Return as soon as the expression is true. Fails naming it."""
        deadline = time.monotonic() + PATIENCE_S
        while not await self.value(f"Boolean({expression})"):
            assert time.monotonic() < deadline, f"waited {PATIENCE_S:.0f} s for {expression}"
            await asyncio.sleep(0.1)

    async def press(self, key: str) -> None:
        """Press and release a key."""
        for kind in ("rawKeyDown", "keyUp"):
            await self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key)

    async def look_like(self, *, width: int, scheme: str = "light") -> None:
        """Take a width and a color scheme (light or dark)."""
        await self.send("Emulation.setDeviceMetricsOverride", width=width, height=1600, deviceScaleFactor=1, mobile=False)
        await self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    async def screenshot(self, path: Path) -> Path:
        """Write a PNG of what is in view."""
        answer = await self.send("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(answer["data"]))
        return path


@contextlib.asynccontextmanager
async def chromium(profile: Path) -> AsyncIterator[Page]:
    """A browser with one tab; it ends with the block.

    Args:
        profile: an empty folder for what it keeps.
    """
    binary = shutil.which("chromium")
    assert binary is not None, "chromium is not installed; apt-get install chromium"
    process = await asyncio.create_subprocess_exec(
        binary,
        *ARGUMENTS,
        f"--user-data-dir={profile}",
        "about:blank",
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        port = await _port(profile)
        async with aiohttp.ClientSession() as session:
            targets: list[dict[str, Any]] = []
            while not targets:
                async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                    targets = [target for target in await answer.json() if target["type"] == "page"]
            async with session.ws_connect(targets[0]["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                page = Page(socket)
                for domain in ("Page", "Runtime", "Log"):
                    await page.send(f"{domain}.enable")
                yield page
    finally:
        process.terminate()
        await process.wait()


async def _port(profile: Path) -> int:
    """The DevTools port that the browser chose."""
    found, deadline = profile / "DevToolsActivePort", time.monotonic() + PATIENCE_S
    while not found.exists() or not found.read_text():
        assert time.monotonic() < deadline, f"waited {PATIENCE_S:.0f} s for the browser"
        await asyncio.sleep(0.1)
    return int(found.read_text().splitlines()[0])
