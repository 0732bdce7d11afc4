"""Starts a follower process a sink beside a run, and lets it go at the end. Whatever becomes of one is a line in the log."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from common.logs import get_logger
from deploy.redact import Redactor, known_secrets, token_files
from deploy.signals import StopSignals
from deploy.sinks.settings import SinksSection

PROJECT = Path(__file__).parent.parent.parent
GRACE_S = 5.0  # a follower ends itself finish_timeout_s after it was let go; so much later it is killed
TAIL_BYTES = 4096  # kept of a follower's standard error
WORDS = 300  # characters of its last line that are told
_log = get_logger("sinks")


@contextmanager
def following(section: SinksSection, store_url: str) -> Iterator[None]:
    """Follow a run while the body lasts; then wait for the followers, until the first SIGINT or SIGTERM, which changes no exit code.

    A body that ends by KeyboardInterrupt ends the followers at once. Stand outside the signals and the live line of the run: they are over then.

    Args:
        section: the recipe's [sinks].
        store_url: the run directory; its run is claimed.
    """
    followers = [found for name in section.enabled if (found := _start(name, section, store_url)) is not None]
    patience_s = section.finish_timeout_s + GRACE_S
    try:
        yield
    except KeyboardInterrupt:
        patience_s = 0.0
        raise
    finally:
        _let_go(followers, patience_s)


class FollowerProcess:
    """One follower and the thread that hears its last words."""

    def __init__(self, name: str, process: "subprocess.Popen[bytes]") -> None:
        self.name, self._process = name, process
        self._is_let_go = False
        self._said = b""  # the end of its standard error
        self._listener = threading.Thread(target=self._listen, name=f"sink-{name}", daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        if self._process.stderr is not None:
            while piece := os.read(self._process.stderr.fileno(), TAIL_BYTES):
                self._said = (self._said + piece)[-TAIL_BYTES:]
        code = self._process.wait()
        if code != 0 or not self._is_let_go:
            self._tell(code)

    def _tell(self, code: int) -> None:
        _log.warning(
            "sink %s ended (code %d): %s; %s`flowfleet sink RUN --to %s` sends the rest later",
            self.name, code, last_words(self._said), "" if self._is_let_go else "the run goes on without it; ", self.name,
        )  # fmt: skip

    @property
    def is_alive(self) -> bool:
        """Whether its process runs."""
        return self._process.poll() is None

    def let_go(self) -> None:
        """Ask it to send the rest and leave."""
        self._is_let_go = True
        if self._process.stdin is not None:
            with suppress(OSError):  # it left before
                self._process.stdin.close()

    def wait_or_kill(self, patience_s: float) -> None:
        """Wait for its end; then end its process group, which holds what it started."""
        try:
            self._process.wait(patience_s)
        except subprocess.TimeoutExpired:
            self.kill()
        self._listener.join(GRACE_S)

    def kill(self) -> None:
        """End it and what it started; nothing once it has ended, for its number may be another's by now."""
        if self.is_alive:
            with suppress(OSError):  # it ended this moment
                os.killpg(self._process.pid, signal.SIGKILL)


def last_words(said: bytes) -> str:
    """The last line of a standard error's end, without secrets; of a long one the beginning, or the end if that is all there is."""
    lines = re.split(rb"[\r\n]+", said)
    number, line = max(((number, line) for number, line in enumerate(lines) if line.strip()), default=(0, b""))
    text = redacted(line.decode(errors="replace").strip())
    if not text:
        return "it said nothing"
    if len(text) <= WORDS:
        return text
    is_cut = number == 0 and len(said) >= TAIL_BYTES  # maybe within a secret
    return f"...{text[-WORDS:]}" if is_cut else f"{text[:WORDS]}..."


def redacted(text: str) -> str:
    """A foreign line by the rules that hold for bundles and cards: known secrets and what looks like one are gone."""
    return Redactor(known_secrets(os.environ, token_files(os.environ))).text(text)


def _start(name: str, section: SinksSection, store_url: str) -> FollowerProcess | None:
    if store_url.startswith("memory://"):
        _log.warning("sink %s: %s lives in one process and cannot be followed; give a --run-dir on disk", name, store_url)
        return None
    command = [sys.executable, "-P", "-m", "deploy.sinks.follow", store_url, name, section.model_dump_json()]
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(path for path in (str(PROJECT), environment.get("PYTHONPATH", "")) if path)
    environment |= {"OMP_NUM_THREADS": "1"}
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment, start_new_session=True
        )
    except OSError as error:
        _log.warning("sink %s: its process cannot be started (%s); the run goes on without it", name, error)
        return None
    return FollowerProcess(name, process)


def _let_go(followers: list[FollowerProcess], patience_s: float) -> None:
    """All at once. The first signal while they are waited for ends them, later ones are ignored: the run itself is over."""
    for follower in followers:
        follower.let_go()
    alive = [follower.name for follower in followers if follower.is_alive]
    deadline = time.monotonic() + patience_s
    with StopSignals(_log.info):  # never armed: its first signal raises
        try:
            if alive and patience_s > 0:
                _log.info("waiting up to %.0f s for sinks (%s); Ctrl-C ends them at once", patience_s, ", ".join(alive))
            for follower in followers:
                follower.wait_or_kill(max(0.0, deadline - time.monotonic()))
        except KeyboardInterrupt:
            for follower in followers:
                follower.kill()
            for follower in followers:
                follower.wait_or_kill(GRACE_S)
