"""A run directory that grows while it is looked at: each committed file is read once, images are handed out by the links that a page holds."""

import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import quote

import pyarrow as pa

from common.store import paths
from common.store.claim import newest_incarnation
from common.store.run_store import RunStore
from deploy.report.samples import read_media_batch, small_webp, statistics_of

LINKS = "/samples/"
LINKED_SIDE = 384  # pixels: sharp on a dense screen
_KEPT: Final = (f"{paths.METRICS}/", f"{paths.EVAL}/", "config.", "environment.")
_KEPT_BYTES = 16 << 20  # a larger file is read again
_MAX_BATCHES = 4  # decoded media files
_MAX_THUMBNAIL_BYTES = 64 << 20
ListedPaths = list[str]  # the method below hides the builtin inside the class


class LiveFiles:
    """The run directory as the last look found it (a RunFiles). Nothing is written.

    Args:
        store: the run directory, local or remote.
    """

    def __init__(self, store: RunStore) -> None:
        self._store = store
        self._kept: dict[str, bytes] = {}
        self._starts = newest_incarnation(store)
        self._environments: list[str] = []
        self._listing: tuple[str, ...] = ()

    def look(self) -> frozenset[str]:
        """List anew what a report is drawn from; return the files whose arrival changes it. Raises StoreError."""
        while self._store.exists(paths.config_path(self._starts + 1)):
            self._starts += 1
        configs = [paths.config_path(number) for number in range(1, self._starts + 1)]
        environment = paths.environment_path(self._starts)
        if environment not in self._environments and self._store.exists(environment):
            self._environments.append(environment)
        metrics, history = self._store.list(paths.METRICS), self._store.list(paths.HISTORY)
        evaluated = self._store.list(paths.EVAL)
        self._listing = (*configs, *self._environments, *metrics, *history, *evaluated)
        return frozenset(path for path in self._listing if not path.startswith(f"{paths.EVAL}/") or path.endswith("/result.json"))

    def list(self, prefix: str = "") -> ListedPaths:
        """The last look's files ("" = all that a report is drawn from), or a folder's, freshly listed. Raises StoreError."""
        return sorted(self._listing) if prefix == "" else self._store.list(prefix)

    def read(self, path: str) -> bytes:
        """Return a file's bytes; committed files never change, so small ones are kept. Raises StoreError."""
        kept = self._kept.get(path)
        if kept is not None:
            return kept
        content = self._store.read(path)
        if path.startswith(_KEPT) and path.endswith(".json") and len(content) <= _KEPT_BYTES:
            self._kept[path] = content
        return content


@dataclass(slots=True)
class LinkedShelf:
    """Images as links (an ImageShelf). Only what a page linked is handed out; anything else is not found."""

    files: LiveFiles
    _linked: dict[str, tuple[str, int]] = field(default_factory=dict)  # link -> media file, row
    _statistics: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    _batches: OrderedDict[str, pa.RecordBatch] = field(default_factory=OrderedDict)
    _thumbnails: OrderedDict[str, bytes] = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def uri(self, path: str, row: int) -> str:
        """Return an image's link, "" when there is no file of it."""
        if not path:
            return ""
        link = f"{LINKS}{path}/{row}.webp"
        self._linked[link] = (path, row)
        return quote(link)

    def statistics(self, path: str) -> dict[str, list[float]]:
        """Return the statistics of a media file's images by name, read once. Raises CorruptFile or StoreError."""
        if path not in self._statistics:
            self._statistics[path] = statistics_of(self._batch(path))
        return self._statistics[path]

    def image(self, link: str) -> bytes | None:
        """Return a linked image as WebP of at most LINKED_SIDE pixels; None when no page linked it. Raises CorruptFile or StoreError."""
        found = self._linked.get(link)
        if found is None:
            return None
        with self._lock:
            if link in self._thumbnails:
                self._thumbnails.move_to_end(link)
                return self._thumbnails[link]
        path, row = found
        images = self._batch(path).column("image")
        if row >= len(images):
            return None
        content = small_webp(images[row].as_py(), LINKED_SIDE)
        with self._lock:
            self._thumbnails[link] = content
            while sum(len(kept) for kept in self._thumbnails.values()) > _MAX_THUMBNAIL_BYTES:
                self._thumbnails.popitem(last=False)
        return content

    def _batch(self, path: str) -> pa.RecordBatch:
        with self._lock:
            batch = self._batches.get(path)
        if batch is None:
            batch = read_media_batch(self.files, path)
        with self._lock:
            self._batches[path] = batch
            self._batches.move_to_end(path)
            while len(self._batches) > _MAX_BATCHES:
                self._batches.popitem(last=False)
        return batch
