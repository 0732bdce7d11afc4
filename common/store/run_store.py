"""RunStore: the run directory. A file is written once, by one writer, whole or not at all."""

import secrets
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

from common.errors import AlreadyExists, GateError, StoreError
from common.store.backends import Backend, FaultHook, LocalFiles, no_fault, open_backend

SWEEP_AGE_S = 3600.0
_PROBE_TIMEOUT_S = 60.0
Paths = list[str]  # RunStore.list hides the builtin inside the class


class RunStore:
    """A run directory at a URL: a plain path or file://, memory:// (one process), or an object store.

    Args:
        url: where the run lies; made on the first write.
        hook: a test's way to make a stage of an operation fail; production passes none.
    """

    def __init__(self, url: str, *, hook: FaultHook = no_fault) -> None:
        self.url = url
        self._backend: Backend = open_backend(url, hook)

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
            StoreError: the store refused; no file of this name was made.
        """
        _check_path(path)
        try:
            self._backend.create(path, content, writer_id)
        except FileExistsError:
            if self.read(path) != content:
                raise AlreadyExists(
                    f"RunStore.create: {self.url}/{path} exists with other content (writer {writer_id} came second); "
                    "a committed file never changes; read the existing one"
                ) from None
        except OSError as error:
            self._refuse("create", path, error)

    def replace(self, path: str, content: bytes, *, writer_id: str = "replace") -> None:
        """Write over a file atomically: for status.json and files that only their own writer derives. Raises StoreError."""
        _check_path(path)
        try:
            self._backend.replace(path, content, writer_id)
        except OSError as error:
            self._refuse("replace", path, error)

    def read(self, path: str) -> bytes:
        """Return a file's bytes. Raises StoreError when it is missing or unreadable."""
        _check_path(path)
        try:
            return self._backend.read(path)
        except FileNotFoundError:
            raise StoreError(
                f"RunStore.read: {self.url}/{path} is missing; it was retired, or the run directory was moved in part; restore it"
            ) from None
        except OSError as error:
            self._refuse("read", path, error)

    def exists(self, path: str) -> bool:
        """Whether a committed file of this name is there, freshly looked up."""
        _check_path(path)
        try:
            self._backend.size(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            self._refuse("exists", path, error)
        return True

    def size(self, path: str) -> int:
        """Return a file's length in bytes. Raises StoreError."""
        _check_path(path)
        try:
            return self._backend.size(path)
        except OSError as error:
            self._refuse("size", path, error)

    def list(self, prefix: str = "") -> Paths:
        """Return the sorted paths of all committed files under a folder ("" = the whole run), freshly listed."""
        return sorted(self.sizes(prefix))

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Return path -> bytes of all committed files under a folder, freshly listed; empty when there is no such folder."""
        try:
            return self._backend.sizes(prefix)
        except FileNotFoundError:
            return {}
        except OSError as error:
            self._refuse("list", prefix, error)

    def remove(self, path: str) -> None:
        """Delete a file (retirement only); a missing one is fine. Raises StoreError."""
        _check_path(path)
        try:
            self._backend.remove(path)
        except OSError as error:
            self._refuse("remove", path, error)

    def sweep(self, older_than_s: float = SWEEP_AGE_S) -> Paths:
        """Delete temporary files that dead writers left, by the store's own clock; return their paths."""
        try:
            return self._backend.sweep(older_than_s)
        except OSError as error:
            self._refuse("sweep", "", error)

    def free_bytes(self) -> int | None:
        """Return the free space, None where the store has no such limit."""
        return self._backend.free_bytes()

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

    def _refuse(self, action: str, path: str, error: OSError) -> NoReturn:
        free = self.free_bytes()
        space = "unknown" if free is None else f"{free:,}"
        raise StoreError(
            f"RunStore.{action}: {self.url}/{path}: {error.strerror or error} ({space} bytes free); nothing was acknowledged and "
            "no part of the file is listed; free some space or mend the path, then start the same command again"
        ) from error


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
