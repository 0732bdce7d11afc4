"""RunStore: the run directory. A file is written once, by one writer, whole or not at all."""

import secrets
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from common.errors import AlreadyExists, GateError, StoreError
from common.logs import get_logger
from common.store.backends import Backend, FaultHook, LocalFiles, no_fault, open_backend

SWEEP_AGE_S = 3600.0
STORE_PATIENCE_S = 600.0  # `patience_s` of a role that cannot back off: the learner, and all of them under --local
_PROBE_TIMEOUT_S = 60.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.25, 5.0  # between tries of a store that is away
Paths = list[str]  # RunStore.list hides the builtin inside the class
T = TypeVar("T")

_log = get_logger("store")


class RunStore:
    """A run directory at a URL: a plain path or file://, memory:// (one process), or an object store.

    A store that is away (no permission, no connection, no answer in time, a server's 5xx, a full disk) is a StoreError; the caller
    backs off. For a caller that cannot, `patience_s` makes every operation hold on by itself, saying so, before it gives up.

    Args:
        url: where the run lies; made on the first write.
        hook: a test's way to make a stage of an operation fail; production passes none.
        patience_s: how long one operation is tried again while the store is away.
        sleep: how it waits then.
    """

    def __init__(
        self, url: str, *, hook: FaultHook = no_fault, patience_s: float = 0.0, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self.url = url
        self._backend: Backend = open_backend(url, hook)
        self._patience_s, self._sleep = patience_s, sleep

    @property
    def local_root(self) -> Path | None:
        """The folder when the store is local, else None."""
        return self._backend.root if isinstance(self._backend, LocalFiles) else None

    def create_exclusive(self, path: str, content: bytes, *, writer_id: str) -> None:
        """Commit a file: after this returns it exists whole and durable, and nobody else's file was touched.

        A retried create meets its own file: existing bytes equal to `content` are accepted. Where it matters who wrote, the
        caller puts its id into the bytes (the lease id, the incarnation's claim).

        Raises:
            AlreadyExists: the name holds other bytes; they stay.
            StoreError: the store refused; no file of this name was acknowledged.
        """
        _check_path(path)
        try:
            self._ask("create", path, lambda: self._backend.create(path, content, writer_id), names=(FileExistsError,))
        except FileExistsError:
            if self.read(path) != content:
                raise AlreadyExists(
                    f"RunStore.create: {self.url}/{path} exists with other content (writer {writer_id} came second); "
                    "a committed file never changes; read the existing one"
                ) from None

    def replace(self, path: str, content: bytes, *, writer_id: str = "replace") -> None:
        """Write over a file atomically: for status.json and files that only their own writer derives. Raises StoreError."""
        _check_path(path)
        self._ask("replace", path, lambda: self._backend.replace(path, content, writer_id))

    def read(self, path: str) -> bytes:
        """Return a file's bytes. Raises StoreError when it is missing or unreadable."""
        _check_path(path)
        try:
            return self._ask("read", path, lambda: self._backend.read(path), names=(FileNotFoundError,))
        except FileNotFoundError:
            raise StoreError(
                f"RunStore.read: {self.url}/{path} is missing; it was retired, or the run directory was moved in part; restore it"
            ) from None

    def exists(self, path: str) -> bool:
        """Whether a committed file of this name is there, freshly looked up."""
        _check_path(path)
        try:
            self._ask("exists", path, lambda: self._backend.size(path), names=(FileNotFoundError, NotADirectoryError))
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def size(self, path: str) -> int:
        """Return a file's length in bytes. Raises StoreError."""
        _check_path(path)
        return self._ask("size", path, lambda: self._backend.size(path))

    def list(self, prefix: str = "") -> Paths:
        """Return the sorted paths of all committed files under a folder ("" = the whole run), freshly listed."""
        return sorted(self.sizes(prefix))

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Return path -> bytes of all committed files under a folder, freshly listed; empty when there is no such folder."""
        try:
            return self._ask("list", prefix, lambda: self._backend.sizes(prefix), names=(FileNotFoundError,))
        except FileNotFoundError:
            return {}

    def remove(self, path: str) -> None:
        """Delete a file (retirement only); a missing one is fine. Raises StoreError."""
        _check_path(path)
        self._ask("remove", path, lambda: self._backend.remove(path))

    def sweep(self, older_than_s: float = SWEEP_AGE_S) -> Paths:
        """Delete temporary files that dead writers left, by the store's own clock; return their paths. Raises StoreError."""
        return self._ask("sweep", "", lambda: self._backend.sweep(older_than_s))

    def free_bytes(self) -> int | None:
        """Return the free space, None where the store has no such limit. Raises StoreError."""
        return self._ask("free_bytes", "", self._backend.free_bytes)

    def probe(self) -> None:
        """Prove that this store can carry a run: exclusive creates are refused the second time, other processes see files.

        Raises:
            GateError: named "store", saying which promise the store breaks.
            StoreError: the store refused the write.
        """
        path = f".probe/{secrets.token_hex(8)}"
        first = b"first " + secrets.token_hex(8).encode()
        self.create_exclusive(path, first, writer_id="probe")
        try:
            self._probe_refusal(path, first)
            if self.local_root is not None:
                _probe_other_process(self.local_root / path, first)
        finally:
            self.remove(path)

    def _probe_refusal(self, path: str, first: bytes) -> None:
        try:
            self.create_exclusive(path, b"second", writer_id="probe")
        except AlreadyExists:
            if self.read(path) == first and path in self.list(".probe"):
                return
            raise GateError("store", f"{self.url} lists or reads stale files; a run needs read-after-write; choose another one") from None
        raise GateError(
            "store",
            f"{self.url} let a second writer create the same file; commits must be exclusive (local: hard links; object stores: "
            "conditional put); choose another file system",
        )

    def _ask(self, action: str, path: str, operation: Callable[[], T], *, names: tuple[type[OSError], ...] = ()) -> T:
        """Return the operation's answer; `names` are errors about this name, which pass. Raises StoreError when patience ends."""
        started, pause_s, tries = time.monotonic(), _FIRST_PAUSE_S, 0
        while True:
            try:
                answer = operation()
            except names:
                raise
            except OSError as error:
                refusal = self._refusal(action, path, error)
                away_s = time.monotonic() - started
                if isinstance(error, FileNotFoundError) or away_s >= self._patience_s:
                    raise refusal from error
                if tries == 0:
                    _log.warning("the store is away, everything waits up to %.0f s: %s", self._patience_s, refusal)
                tries += 1
                self._sleep(min(pause_s, self._patience_s - away_s))
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            else:
                if tries:
                    _log.warning("the store is back after %.1f s (%s %s)", time.monotonic() - started, action, path)
                return answer

    def _refusal(self, action: str, path: str, error: OSError) -> StoreError:
        try:
            free = self._backend.free_bytes()
        except OSError:
            free = None
        space = "unknown" if free is None else f"{free:,}"
        remedy = "free some space or mend the path" if self.local_root else "mend the connection, the credentials or the bucket"
        reason = error.strerror or str(error) or type(error).__name__
        return StoreError(
            f"RunStore.{action}: {self.url}/{path}: {reason} ({space} bytes free); nothing was acknowledged, and a file appears whole or not "
            f"at all; {remedy}, then start the same command again if the run has ended"
        )


def _probe_other_process(file: Path, expected: bytes) -> None:
    command = [sys.executable, "-I", "-c", "import sys; sys.stdout.buffer.write(open(sys.argv[1], 'rb').read())", str(file)]
    try:
        seen = subprocess.run(command, capture_output=True, timeout=_PROBE_TIMEOUT_S, check=False).stdout
    except subprocess.TimeoutExpired:
        seen = b""
    if seen != expected:
        raise GateError("store", f"another process does not see {file}; all processes of a run share its directory; mount it everywhere")


def _check_path(path: str) -> None:
    parts = path.split("/")
    if not path or path.startswith("/") or ".." in parts or "" in parts:
        raise ValueError(f"RunStore: path {path!r} is not relative to the run directory; use the functions of common.store.paths")
