"""A reward in an environment of its own: a child process that speaks the open protocol on loopback, started anew when it died."""

import json
import os
import secrets
import select
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Self

from common.errors import ConfigError, ScorerError, ScorerUnavailable
from common.logs import get_logger
from common.types import Prompt, Score
from reward_servers.breaker import ScorerBroken
from reward_servers.scorers.base import Image, PlainScorer
from reward_servers.wire.http_client import HttpScorer
from reward_servers.wire.messages import READY_PATH
from reward_servers.wire.transport import Caller, CallerSettings, Unreachable, endpoint

_MODULE: Final = "reward_servers.wire.serve_main"
_CHECKOUT: Final = str(Path(__file__).resolve().parents[2])
_START: Final = (
    f"import sys; sys.path.insert(0, sys.argv.pop(1)); import runpy; runpy.run_module({_MODULE!r}, run_name='__main__', alter_sys=True)"
)
"""`python -m` with this checkout on the path, whatever PYTHONPATH and the working directory are."""
_MAX_LINE: Final = 1 << 16
HTTP_BUSY: Final = 503
_LOG: Final = get_logger("reward.child")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildSettings:
    """What a child process is and how long it is waited for."""

    python: str  # interpreter of its environment, which needs numpy, pillow, pydantic, aiohttp, prometheus-client and the scorer's own
    reward: str  # name in the registry, or module:attribute
    options: Mapping[str, Any] = field(default_factory=dict)  # the scorer's own
    start_timeout_s: float = 300.0  # imports and model loading
    timeout_s: float = 120.0  # one scoring call
    max_restarts: int = 3  # in a row, without a score between them
    micro_batch: int = 16  # images a scorer call
    end_timeout_s: float = 10.0  # what a child gets to leave by itself


@dataclass(frozen=True, slots=True, kw_only=True)
class _Child:
    process: subprocess.Popen[bytes]
    client: HttpScorer


class ChildScorer(PlainScorer):
    """Scores in a child process; ends it at `close`, and it ends itself when this process dies (its standard input closes then).

    A child that died, or did not answer in time, is replaced before the next call. Which prompts it can judge is known to the child alone:
    one that it cannot judge comes back as null with the reason.

    Raises:
        ConfigError: the interpreter cannot be run, or the child says that its reward or an option is wrong.
        ScorerError: the child ended or was not ready in time.
    """

    def __init__(self, settings: ChildSettings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._is_closed = False
        self._num_failures = 0  # deaths since the last score
        self._child: _Child | None = _start(settings)
        self.name = self._child.client.name.removeprefix("http:")
        self.version = self._child.client.version.removeprefix("http-")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """The child's process id; None while there is none."""
        return None if self._child is None else self._child.process.pid

    def score(self, images: Image, prompts: Sequence[Prompt]) -> list[Score]:
        """Score a batch [B, H, W, 3].

        Raises:
            ScorerUnavailable: the child did not answer in time, or a new one scores with another version.
            ScorerError: it died over the batch, whose images can then be tried one by one; or it was closed.
            ScorerBroken: it was given up, after more than max_restarts deaths in a row without a score.
        """
        child = self._living()
        try:
            scores = child.client.score(images, prompts)
        except Unreachable as error:
            code = None if error.status == HTTP_BUSY else self._give_up(child)
            if code is not None:
                raise ScorerError(
                    f"{self.name}: the child process ended with status {code} while it scored {len(images)} images"
                ) from error
            raise
        if any(score.value is not None for score in scores):
            self._num_failures = 0
        return scores

    def close(self) -> None:
        """End the child. Later calls raise ScorerError."""
        with self._lock:
            self._is_closed = True
            if self._child is not None:
                _end(self._child.process, self._settings.end_timeout_s)
            self._child = None

    def _living(self) -> _Child:
        """Return the child, a new one where the last one died."""
        with self._lock:
            if self._is_closed:
                raise ScorerError(f"{self.name}: the scorer was closed")
            if self._child is not None and self._child.process.poll() is None:
                return self._child
            if self._child is not None:
                self._note_end(self._child)
            if self._num_failures > self._settings.max_restarts:
                times = f"{self._num_failures} times without a score"
                raise ScorerBroken(f"{self.name}: the child process failed {times}; see its messages on standard error, then start again")
            _LOG.warning("%s: starting the child process again", self.name)
            try:
                child = _start(self._settings)
            except (ScorerError, ConfigError):
                self._num_failures += 1
                raise
            version = child.client.version.removeprefix("http-")
            if version != self.version:
                _end(child.process, self._settings.end_timeout_s)
                raise ScorerUnavailable(f"{self.name}: the child's scorer changed from {self.version} to {version}; start again")
            self._child = child
            return child

    def _give_up(self, child: _Child) -> int | None:
        """Let a child go that did not answer. Returns its exit status when it died by itself, None when it had to be ended."""
        with self._lock:
            code = _exit_code(child.process)
            if self._child is child:
                self._note_end(child)
            return code

    def _note_end(self, child: _Child) -> None:
        self._num_failures += 1
        self._child = None
        _end(child.process, self._settings.end_timeout_s)


def _exit_code(process: subprocess.Popen[bytes]) -> int | None:
    """The exit status of a process that is dead or dying; None when it lives on."""
    try:
        return process.wait(timeout=5.0)
    except subprocess.TimeoutExpired:
        return None


def _start(settings: ChildSettings) -> _Child:
    """Start a child and wait until it is ready. Raises ConfigError, ScorerError; then no process is left behind."""
    deadline = time.monotonic() + settings.start_timeout_s
    with tempfile.TemporaryDirectory(prefix="flowfleet-reward-") as folder, ExitStack() as stack:
        token_file = str(Path(folder) / "token")
        with os.fdopen(os.open(token_file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w", encoding="ascii") as file:
            file.write(secrets.token_urlsafe(32))
        process = _process(settings, token_file)
        stack.callback(_end, process, settings.end_timeout_s)
        said = _announced(process, settings, deadline)
        url = f"http://127.0.0.1:{int(said['port'])}"
        left_s = max(deadline - time.monotonic(), 1.0)
        Caller(CallerSettings(timeout_s=left_s, retries=100)).get(endpoint(url, READY_PATH))
        caller = CallerSettings(token_file=token_file, timeout_s=settings.timeout_s, retries=0)
        client = HttpScorer(url=url, reward=str(said["name"]), caller=caller)
        stack.pop_all()
    return _Child(process=process, client=client)


def _process(settings: ChildSettings, token_file: str) -> subprocess.Popen[bytes]:
    serving = {"token_file": token_file, "micro_batch": settings.micro_batch, "deadline_s": settings.timeout_s}
    command = [
        settings.python, "-c", _START, _CHECKOUT, settings.reward, "--watch-stdin",
        "--options", json.dumps(dict(settings.options)), "--settings", json.dumps(serving),
    ]  # fmt: skip
    try:
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    except OSError as error:
        raise ConfigError(
            f"reward {settings.reward}: {settings.python!r} cannot be run ({error.strerror}); name a Python of its own"
        ) from error


def _announced(process: subprocess.Popen[bytes], settings: ChildSettings, deadline: float) -> dict[str, Any]:
    """Return the child's one line. Raises ConfigError with its complaint, ScorerError when it ends or is late."""
    line = _line(process, deadline)
    if line is None:
        raise ScorerError(
            f"reward {settings.reward}: its process was not ready within {settings.start_timeout_s:g} s; raise start_timeout_s"
        )
    try:
        said = json.loads(line)
    except ValueError:
        said = {}
    if isinstance(said, dict) and "error" in said:
        raise ConfigError(f"reward {settings.reward} in {settings.python}: {said['error']}")
    if not isinstance(said, dict) or not isinstance(said.get("port"), int):
        code = _exit_code(process)
        raise ScorerError(
            f"reward {settings.reward}: {settings.python} ended with status {code} before it served; see its messages on standard error"
        )
    return said


def _line(process: subprocess.Popen[bytes], deadline: float) -> bytes | None:
    """Read one line, or what came before the end of the stream; None when the deadline passes first."""
    pipe = _open_pipe(process.stdout)
    line = b""
    while not line.endswith(b"\n") and len(line) < _MAX_LINE:
        left_s = deadline - time.monotonic()
        if left_s <= 0 or not select.select([pipe], [], [], left_s)[0]:
            return None
        came = os.read(pipe.fileno(), 4096)
        if not came:
            break
        line += came
    return line


def _open_pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None, "the child was started with a pipe"
    return pipe


def _end(process: subprocess.Popen[bytes], timeout_s: float) -> None:
    """End a process: its standard input closes, then SIGTERM, then SIGKILL."""
    _open_pipe(process.stdin).close()
    for push in (process.terminate, process.kill):
        try:
            process.wait(timeout_s)
            break
        except subprocess.TimeoutExpired:
            push()
    with suppress(subprocess.TimeoutExpired):  # one that even SIGKILL does not end at once is the system's to bury
        process.wait(timeout_s)
    _open_pipe(process.stdout).close()
