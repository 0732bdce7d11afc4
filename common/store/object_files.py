"""Run directories that are reached through fsspec: memory, and object stores whose put can be conditional."""

import errno
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

FaultHook = Callable[[str, str], None]
"""(stage, path): a test raises OSError here. Stages: open, write, sync, link, read, stat, list, remove."""

METADATA_LIMIT_S = 60.0  # of a listing, a look or a delete, retries included
READ_LIMIT_S = 600.0  # of one file; silence ends it much earlier
BYTES_PER_S = 1_000_000  # a write slower than this (above METADATA_LIMIT_S) counts as a store that is away

_memory_lock = threading.Lock()


def no_fault(stage: str, path: str) -> None:
    """The hook of production: nothing happens."""


class MemoryFiles:
    """fsspec's memory file system: one process, gone with it."""

    def __init__(self, filesystem: Any, root: str, hook: FaultHook = no_fault) -> None:
        self._filesystem = filesystem
        self._root = root.rstrip("/")
        self._hook = hook

    def _full(self, path: str) -> str:
        return f"{self._root}/{path}" if path else self._root

    def create(self, path: str, content: bytes, writer_id: str) -> None:
        """Look and put under one lock."""
        with _memory_lock:
            self._hook("write", path)
            if self._filesystem.exists(self._full(path)):
                raise FileExistsError(path)
            self._filesystem.pipe_file(self._full(path), content)

    def replace(self, path: str, content: bytes, writer_id: str) -> None:
        """Put."""
        self._hook("write", path)
        self._filesystem.pipe_file(self._full(path), content)

    def read(self, path: str) -> bytes:
        """Get."""
        self._hook("read", path)
        content: bytes = self._filesystem.cat_file(self._full(path))
        return content

    def sizes(self, prefix: str) -> dict[str, int]:
        """List."""
        self._hook("list", prefix)
        found: dict[str, Any] = self._filesystem.find(self._full(prefix), detail=True)
        start = len(self._filesystem._strip_protocol(self._root)) + 1
        return {name[start:]: int(entry["size"]) for name, entry in found.items()}

    def size(self, path: str) -> int:
        """Look."""
        self._hook("stat", path)
        return int(self._filesystem.size(self._full(path)))

    def remove(self, path: str) -> None:
        """Delete."""
        self._hook("remove", path)
        try:
            self._filesystem.rm_file(self._full(path))
        except FileNotFoundError:
            return

    def sweep(self, older_than_s: float) -> list[str]:
        """Nothing to sweep: there are no half-written files."""
        return []

    def free_bytes(self) -> int | None:
        """No limit known."""
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectClient:
    """How an object store is spoken to.

    Attributes:
        filesystem: fsspec's, asynchronous inside, without a listings cache; it takes its endpoint and credentials from the environment.
        weather: errors of its client, besides OSError, that say that the store is away.
        read_options, write_options: keywords of `cat_file` and `pipe_file`.
        is_taken, is_contested, is_gone: whether an error says that the name exists (a failed condition), that somebody is writing it
            at this moment, or that the whole bucket is missing.
    """

    filesystem: Any
    weather: tuple[type[Exception], ...]
    read_options: dict[str, Any] = field(default_factory=dict)
    write_options: dict[str, Any] = field(default_factory=dict)
    is_taken: Callable[[OSError], bool] = lambda error: isinstance(error, FileExistsError)
    is_contested: Callable[[OSError], bool] = lambda error: False
    is_gone: Callable[[OSError], bool] = lambda error: False


class ObjectFiles:
    """An object store. A file is one put, whole or absent, so nothing half-written is ever left to sweep.

    Every call has a deadline; whatever the client raises while the store is away arrives as an OSError.
    """

    def __init__(self, client: ObjectClient, root: str, hook: FaultHook = no_fault) -> None:
        self._client = client
        self._root = root.strip("/")
        self._hook = hook

    def _full(self, path: str) -> str:
        return f"{self._root}/{path}" if path else self._root

    def _call(self, operation: Callable[..., Any], path: str, *arguments: Any, limit_s: float, **options: Any) -> Any:
        try:
            return operation(self._full(path), *arguments, timeout=limit_s, **options)
        except TimeoutError as error:
            raise TimeoutError(errno.ETIMEDOUT, f"no answer within {limit_s:.0f} s") from error
        except OSError as error:
            if self._client.is_gone(error):
                raise OSError(errno.ENODEV, f"the bucket is gone ({error})") from error
            raise
        except self._client.weather as error:
            raise OSError(errno.EIO, f"{type(error).__name__}: {error}") from error

    def create(self, path: str, content: bytes, writer_id: str) -> None:
        """Conditional put: If-None-Match, by fsspec's mode="create". A put that meets another one in flight asks again."""
        for attempt in range(3):
            try:
                self._put(path, content, mode="create")
                return
            except OSError as error:
                if self._client.is_taken(error):
                    raise FileExistsError(path) from error
                if attempt == 2 or not self._client.is_contested(error):
                    raise

    def replace(self, path: str, content: bytes, writer_id: str) -> None:
        """Put: whole or not at all."""
        self._put(path, content)

    def _put(self, path: str, content: bytes, **options: Any) -> None:
        self._hook("write", path)
        limit_s = METADATA_LIMIT_S + len(content) / BYTES_PER_S
        self._call(self._client.filesystem.pipe_file, path, content, limit_s=limit_s, **self._client.write_options, **options)

    def read(self, path: str) -> bytes:
        """Get."""
        self._hook("read", path)
        content: bytes = self._call(self._client.filesystem.cat_file, path, limit_s=READ_LIMIT_S, **self._client.read_options)
        return content

    def sizes(self, prefix: str) -> dict[str, int]:
        """List, from the store itself."""
        self._hook("list", prefix)
        found: dict[str, Any] = self._call(self._client.filesystem.find, prefix, limit_s=READ_LIMIT_S, detail=True)
        start = len(self._root) + 1
        return {name[start:]: int(entry["size"]) for name, entry in found.items() if entry["type"] == "file"}

    def size(self, path: str) -> int:
        """Head."""
        self._hook("stat", path)
        entry: dict[str, Any] = self._call(self._client.filesystem.info, path, limit_s=METADATA_LIMIT_S)
        if entry["type"] != "file":
            raise FileNotFoundError(path)
        return int(entry["size"])

    def remove(self, path: str) -> None:
        """Delete."""
        self._hook("remove", path)
        try:
            self._call(self._client.filesystem.rm_file, path, limit_s=METADATA_LIMIT_S)
        except FileNotFoundError:
            return

    def sweep(self, older_than_s: float) -> list[str]:
        """Nothing to sweep: one put a file, no multipart uploads."""
        return []

    def free_bytes(self) -> int | None:
        """No limit known."""
        return None
