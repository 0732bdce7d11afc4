"""How bytes reach a run directory: local files, memory, or an object store. Each creates exclusively in its own way.

Measured on fsspec: `mv` and `put` overwrite and listings are cached, so neither can commit. Locally a hard link of a synced
temporary file is atomic and refuses an existing name; object stores have a conditional put; memory has a lock.
"""

import os
import secrets
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import fsspec

TEMPORARY_SUFFIX = ".tmp"
FaultHook = Callable[[str, str], None]  # (stage, path): a test raises OSError here; stages: write, sync, link, read

_memory_lock = threading.Lock()


def no_fault(stage: str, path: str) -> None:
    """The hook of production: nothing happens."""


class Backend(Protocol):
    """A flat space of files by relative POSIX path. Missing files raise FileNotFoundError, taken names FileExistsError."""

    def create(self, path: str, content: bytes, writer_id: str) -> None:
        """Make the whole file appear under a free name, or nothing."""
        ...

    def replace(self, path: str, content: bytes, writer_id: str) -> None:
        """Make the whole file appear, over an existing one too."""
        ...

    def read(self, path: str) -> bytes:
        """The file's bytes."""
        ...

    def sizes(self, prefix: str) -> dict[str, int]:
        """Every finished file under a folder ("" = all) with its bytes, freshly listed."""
        ...

    def size(self, path: str) -> int:
        """The file's length in bytes."""
        ...

    def remove(self, path: str) -> None:
        """Delete a file; a missing one is fine."""
        ...

    def sweep(self, older_than_s: float) -> list[str]:
        """Delete temporary files older than this by the store's own clock; return their paths."""
        ...

    def free_bytes(self) -> int | None:
        """Free space, None where there is no such limit."""
        ...


class LocalFiles:
    """A folder on a file system that can link (shared, for several nodes)."""

    def __init__(self, root: Path, hook: FaultHook = no_fault) -> None:
        self.root = root
        self._hook = hook

    def create(self, path: str, content: bytes, writer_id: str) -> None:
        """Write a temporary file beside the target, sync, link, unlink, sync the folder."""
        target = self.root / path
        temporary = self._temporary(target, writer_id)
        try:
            self._write(temporary, path, content)
            self._hook("link", path)
            os.link(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(target.parent)

    def replace(self, path: str, content: bytes, writer_id: str) -> None:
        """Write a temporary file and rename it over the target."""
        target = self.root / path
        temporary = self._temporary(target, writer_id)
        try:
            self._write(temporary, path, content)
            self._hook("link", path)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)

    def _temporary(self, target: Path, writer_id: str) -> Path:
        target.parent.mkdir(parents=True, exist_ok=True)
        return target.parent / f".{target.name[:80]}.{writer_id}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}"

    def _write(self, temporary: Path, path: str, content: bytes) -> None:
        with temporary.open("xb") as file:
            self._hook("write", path)
            file.write(content)
            self._hook("sync", path)
            file.flush()
            os.fsync(file.fileno())

    def read(self, path: str) -> bytes:
        """Read the whole file."""
        self._hook("read", path)
        return (self.root / path).read_bytes()

    def sizes(self, prefix: str) -> dict[str, int]:
        """Walk the folder."""
        found: dict[str, int] = {}
        for folder, _, names in os.walk(self.root / prefix):
            for name in names:
                if not name.endswith(TEMPORARY_SUFFIX):
                    self._add(found, Path(folder) / name)
        return found

    def _add(self, found: dict[str, int], file: Path) -> None:
        try:
            found[file.relative_to(self.root).as_posix()] = file.stat().st_size
        except FileNotFoundError:  # removed between the listing and the look
            return

    def size(self, path: str) -> int:
        """Stat the file."""
        return (self.root / path).stat().st_size

    def remove(self, path: str) -> None:
        """Unlink."""
        (self.root / path).unlink(missing_ok=True)

    def sweep(self, older_than_s: float) -> list[str]:
        """Compare times of modification with that of a file written now, so that only the store's clock counts."""
        if not self.root.is_dir():
            return []
        clock = self.root / f".clock.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}"
        clock.write_bytes(b"")
        now = clock.stat().st_mtime
        clock.unlink()
        swept = []
        for folder, _, names in os.walk(self.root):
            for name in names:
                file = Path(folder) / name
                if name.endswith(TEMPORARY_SUFFIX) and file.exists() and now - file.stat().st_mtime > older_than_s:
                    file.unlink(missing_ok=True)
                    swept.append(file.relative_to(self.root).as_posix())
        return swept

    def free_bytes(self) -> int | None:
        """What the file system has left."""
        folder = self.root
        while not folder.exists():
            folder = folder.parent
        return shutil.disk_usage(folder).free


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class FsspecFiles:
    """Shared parts of the backends that go through fsspec."""

    def __init__(self, filesystem: Any, root: str, hook: FaultHook = no_fault) -> None:
        self._filesystem = filesystem
        self._root = root.rstrip("/")
        self._hook = hook

    def _full(self, path: str) -> str:
        return f"{self._root}/{path}" if path else self._root

    def replace(self, path: str, content: bytes, writer_id: str) -> None:
        """Put: whole or not at all in these stores."""
        self._hook("write", path)
        self._filesystem.pipe_file(self._full(path), content)

    def read(self, path: str) -> bytes:
        """Get."""
        self._hook("read", path)
        content: bytes = self._filesystem.cat_file(self._full(path))
        return content

    def sizes(self, prefix: str) -> dict[str, int]:
        """List, past fsspec's cache."""
        self._filesystem.invalidate_cache()
        found: dict[str, Any] = self._filesystem.find(self._full(prefix), detail=True)
        start = len(self._filesystem._strip_protocol(self._root)) + 1
        return {name[start:]: int(entry["size"]) for name, entry in found.items()}

    def size(self, path: str) -> int:
        """Head."""
        self._filesystem.invalidate_cache()
        return int(self._filesystem.size(self._full(path)))

    def remove(self, path: str) -> None:
        """Delete."""
        try:
            self._filesystem.rm_file(self._full(path))
        except FileNotFoundError:
            return

    def sweep(self, older_than_s: float) -> list[str]:
        """Nothing to sweep: these stores have no half-written files."""
        return []

    def free_bytes(self) -> int | None:
        """No limit known."""
        return None


class MemoryFiles(FsspecFiles):
    """fsspec's memory file system: one process, gone with it."""

    def create(self, path: str, content: bytes, writer_id: str) -> None:
        """Look and put under one lock."""
        with _memory_lock:
            self._hook("write", path)
            if self._filesystem.exists(self._full(path)):
                raise FileExistsError(path)
            self._filesystem.pipe_file(self._full(path), content)


class ObjectFiles(FsspecFiles):
    """An object store whose put can be conditional (s3fs, gcsfs)."""

    def create(self, path: str, content: bytes, writer_id: str) -> None:
        """Conditional put: If-None-Match, by fsspec's mode="create"."""
        self._hook("write", path)
        self._filesystem.pipe_file(self._full(path), content, mode="create")


def open_backend(url: str, hook: FaultHook = no_fault) -> Backend:
    """The backend of a URL: plain paths and file:// are local."""
    protocol, separator, rest = url.partition("://")
    if not separator or protocol == "file":
        return LocalFiles(Path(rest if separator else url).expanduser().absolute(), hook)
    if protocol == "memory":
        return MemoryFiles(fsspec.filesystem("memory"), "/" + rest.strip("/"), hook)
    return ObjectFiles(fsspec.filesystem(protocol), rest, hook)
