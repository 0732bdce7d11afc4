"""Retirement: old adapters, and group files of consumed updates. Nothing that an update may still need is ever removed."""

from collections.abc import Callable

from common.store import paths
from common.store.config import StoreConfig
from common.store.manifests import read_manifest
from common.store.recovery import adapters
from common.store.run_store import RunStore


class Retention:
    """Keeps a run directory inside its limits.

    Group files leave in consumption order, whole updates at a time, after `announce(update)` was told: so the audit can tell
    retirement from loss. Only updates at or before the newest complete LearnerState are retired, since a recovery replays later ones.
    """

    def __init__(self, store: RunStore, config: StoreConfig, *, max_staleness: int, retired_through: int) -> None:
        self._store = store
        self._config = config
        self._max_staleness = max_staleness
        self.retired_through = retired_through

    def retire_adapters(self, protected: set[int]) -> list[str]:
        """Remove adapters but the newest S + 2, the checkpointed and the protected (leased, under evaluation) versions."""
        published = adapters(self._store)
        keep = set(sorted(published)[-(self._max_staleness + 2) :]) | self._states() | protected
        gone = []
        for path in self._store.list(paths.POLICY):
            name = paths.parse_adapter(path)
            if name is not None and name[1] not in keep:
                self._store.remove(path)
                gone.append(path)
        return gone

    def retire_groups(self, last_update: int, announce: Callable[[int], None]) -> list[str]:
        """Remove group and media files of updates that are too old, or beyond the cap.

        Args:
            last_update: the newest consumed update.
            announce: told the newest update that loses files, before they go.
        """
        removable = max(self._states(), default=0)
        kept = self._config.updates_kept
        too_old = min(last_update - kept, removable) if kept is not None else 0
        sizes = self._store.sizes(paths.GROUPS)
        total = sum(sizes.values())
        update = self.retired_through
        gone: list[str] = []
        while update < too_old or (update < removable and total > self._config.max_bytes):
            update += 1
            files = self._files_of(update, sizes)
            total -= sum(sizes[path] for path in files)
            gone += files
        if update == self.retired_through:
            return []
        self.retired_through = update
        announce(update)
        for path in gone:
            self._store.remove(path)
        return gone

    def _states(self) -> set[int]:
        return {update for path in self._store.list(paths.LEARNER) if (update := paths.parse_learner_complete(path)) is not None}

    def _files_of(self, update: int, sizes: dict[str, int]) -> list[str]:
        """Group and media files, rivals too, of the numbers that an update consumed or reported as dropped."""
        manifest = read_manifest(self._store, update)
        numbers = {group.number for group in manifest.groups} | {drop.number for drop in manifest.drops}
        found = []
        for path in sorted(sizes):
            name = paths.parse_group(path) or paths.parse_media(path)
            if name is not None and name.number in numbers:
                found.append(path)
        return found
