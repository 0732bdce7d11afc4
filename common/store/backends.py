"""How bytes reach a run directory: local files, memory, or an object store. Each creates exclusively in its own way.

Measured on fsspec: `mv` and `put` overwrite and listings are cached, so neither can commit. Locally a hard link of a synced
temporary file is atomic and refuses an existing name; object stores have a conditional put; memory has a lock.
"""

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import fsspec

from common.errors import ConfigError
from common.store.object_files import FaultHook, MemoryFiles, ObjectClient, ObjectFiles, no_fault

__all__ = ["Backend", "FaultHook", "LocalFiles", "no_fault", "open_backend"]

TEMPORARY_SUFFIX = ".tmp"


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
    """A folder on a file system that can link (shared, for several nodes).

    Once the folder was seen, its absence is a store that is away (an unmounted share, a folder that was moved): it is refused,
    never taken for an empty run, and never made anew.
    """

    def __init__(self, root: Path, hook: FaultHook = no_fault) -> None:
        self.root = root
        self._hook = hook
        self._was_there = False

    def _begin(self, stage: str, path: str) -> None:
        """Meet the hook, and refuse when the folder has gone."""
        self._hook(stage, path)
        if self.root.is_dir():
            self._was_there = True
        elif self._was_there:
            raise OSError(errno.ESTALE, f"{self.root} has gone: it was moved, or its file system is not mounted")

    def create(self, path: str, content: bytes, writer_id: str) -> None:
        """Write a temporary file beside the target, sync, link, unlink, sync the folder."""
        target, temporary = self._prepare(path, writer_id)
        try:
            self._write(temporary, path, content)
            self._hook("link", path)
            os.link(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(target.parent)
        self._was_there = True

    def replace(self, path: str, content: bytes, writer_id: str) -> None:
        """Write a temporary file and rename it over the target."""
        target, temporary = self._prepare(path, writer_id)
        try:
            self._write(temporary, path, content)
            self._hook("link", path)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
        self._was_there = True

    def _prepare(self, path: str, writer_id: str) -> tuple[Path, Path]:
        """The target, its folder made, and a temporary file's name beside it."""
        self._begin("open", path)
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        return target, target.parent / f".{target.name[:80]}.{writer_id}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}"

    def _write(self, temporary: Path, path: str, content: bytes) -> None:
        with temporary.open("xb") as file:
            self._hook("write", path)
            file.write(content)
            self._hook("sync", path)
            file.flush()
            os.fsync(file.fileno())

    def read(self, path: str) -> bytes:
        """Read the whole file."""
        self._begin("read", path)
        return (self.root / path).read_bytes()

    def sizes(self, prefix: str) -> dict[str, int]:
        """Walk the folder."""
        self._begin("list", prefix)
        found: dict[str, int] = {}
        for path in self._walk(prefix):
            if path.endswith(TEMPORARY_SUFFIX):
                continue
            try:
                found[path] = os.stat(f"{self.root}/{path}").st_size
            except FileNotFoundError:  # removed between the listing and the look
                continue
        return found

    def _walk(self, prefix: str) -> Iterator[str]:
        """The path of every file under a folder. A folder that cannot be read raises: what is unreadable must not look empty.

        Strings, no Path objects: a long run's listing holds tens of thousands of names, and pathlib interns each.
        """
        start = len(str(self.root)) + 1
        for folder, _, names in os.walk(self.root / prefix, onerror=_refuse_unreadable):
            inside = f"{folder}/"[start:]
            for name in names:
                yield inside + name

    def size(self, path: str) -> int:
        """Stat the file."""
        self._begin("stat", path)
        return (self.root / path).stat().st_size

    def remove(self, path: str) -> None:
        """Unlink."""
        self._begin("remove", path)
        (self.root / path).unlink(missing_ok=True)

    def sweep(self, older_than_s: float) -> list[str]:
        """Compare times of modification with that of a file written now, so that only the store's clock counts."""
        self._begin("list", "")
        if not self.root.is_dir():
            return []
        clock = self.root / f".clock.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}"
        clock.write_bytes(b"")
        now = clock.stat().st_mtime
        clock.unlink()
        swept = []
        for path in self._walk(""):
            if not path.endswith(TEMPORARY_SUFFIX):
                continue
            file = self.root / path
            try:
                is_old = now - file.stat().st_mtime > older_than_s
            except FileNotFoundError:  # its writer has just finished
                continue
            if is_old:
                file.unlink(missing_ok=True)
                swept.append(path)
        return swept

    def free_bytes(self) -> int | None:
        """What the file system has left."""
        folder = self.root
        while not folder.exists():
            folder = folder.parent
        return shutil.disk_usage(folder).free


def _refuse_unreadable(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):  # a folder that is not there holds nothing
        raise error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_backend(url: str, hook: FaultHook = no_fault) -> Backend:
    """The backend of a URL: plain paths and file:// are local.

    Raises:
        ConfigError: the URL carries credentials, or the package for its protocol is not installed.
    """
    protocol, separator, rest = url.partition("://")
    if not separator or protocol == "file":
        return LocalFiles(Path(rest if separator else url).expanduser().absolute(), hook)
    if protocol == "memory":
        return MemoryFiles(fsspec.filesystem("memory"), "/" + rest.strip("/"), hook)
    if "@" in rest.partition("/")[0]:
        raise ConfigError(
            f"RunStore: a {protocol}:// URL with credentials came; they would stand in configs and logs; keep them in the environment "
            f"(AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL) and write {protocol}://BUCKET/PATH"
        )
    try:
        return ObjectFiles(_object_client(protocol), rest, hook)
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"RunStore: {protocol}:// cannot be opened ({error}); s3:// needs `pip install flowfleet[s3]`, other stores their own fsspec package"
        ) from error


def _object_client(protocol: str) -> ObjectClient:
    if protocol in ("s3", "s3a"):
        from common.store.s3_files import s3_client  # noqa: PLC0415  (needs the extra s3)

        return s3_client()
    return ObjectClient(filesystem=fsspec.filesystem(protocol, use_listings_cache=False), weather=())
