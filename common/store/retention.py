"""Retirement: old adapters, and group files of consumed updates. Nothing that an update may still need is ever removed."""

from collections.abc import Callable, Mapping

from common.errors import StoreError
from common.logs import get_logger
from common.store import paths
from common.store.config import StoreConfig
from common.store.manifests import read_manifest
from common.store.recovery import adapters
from common.store.run_store import RunStore

RECOUNT_EVERY = 32  # updates between full listings (the first ones come at 1, 2, 4, 8, 16); between them growth is extrapolated

_log = get_logger("retention")


class Retention:
    """Keeps a run directory inside its limits.

    Group files leave in consumption order, whole updates at a time, after `announce(update)` was told: so the audit can tell
    retirement from loss. Only updates at or before the newest complete LearnerState are retired, since a recovery replays later ones.
    Strict order makes an update's files a range of numbers: those above the numbers of the update before, up to its own highest.
    A cap that would be passed asks for a LearnerState (`is_state_wanted`), after which more may leave.
    Room is kept under the cap for what may be committed before the next call: (S + 1) updates, all that admission allows.
    """

    def __init__(self, store: RunStore, config: StoreConfig, *, max_staleness: int, retired_through: int) -> None:
        self._store = store
        self._config = config
        self._max_staleness = max_staleness
        self.retired_through = retired_through
        self._records = (0, 0.0)  # call and bytes of the last count of the small files that stay: all but groups, adapters and states
        self._growth = 0.0  # of them, bytes a call
        self._calls = 0
        self.is_state_wanted = False  # updates after the newest state fill the directory up to its cap
        self._retired_numbers: int | None = None  # numbers below it are retired; None until a manifest was read
        self.bytes_by_kind: Mapping[str, int] = {}  # groups, policy, learner, other; as of the last retirement
        self.newest_state = max(self._states(), default=0)  # update of the newest complete LearnerState, as of the last retirement

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
        """Remove group and media files of updates that are too old, or beyond the cap on the whole directory.

        Args:
            last_update: the newest consumed update.
            announce: told the newest update that loses files, before they go.

        Returns:
            The removed paths; late files of numbers that were retired before are among them.
        """
        self.newest_state = removable = max(self._states(), default=0)
        kept = self._config.updates_kept
        too_old = min(last_update - kept, removable) if kept is not None else 0
        sizes = self._store.sizes(paths.GROUPS)
        by_number = _by_number(sizes)
        others = self._other_bytes()
        total = sum(sizes.values()) + sum(others.values())
        most = self._config.max_bytes - self._room(last_update, sizes, by_number)
        update, bound = self.retired_through, self._bound()
        gone = [path for number in sorted(by_number) if number < bound for path in by_number[number]]
        total -= sum(sizes[path] for path in gone)
        while update < too_old or (update < removable and total > most):
            update += 1
            first, bound = bound, self._numbers_through(update)
            files = [path for number in range(first, bound) for path in by_number.get(number, [])]
            total -= sum(sizes[path] for path in files)
            gone += files
        if update != self.retired_through:
            before = self.retired_through, self._retired_numbers
            self.retired_through, self._retired_numbers = update, bound
            try:
                announce(update)
            except StoreError:  # nothing left: the next call announces again, before anything goes
                self.retired_through, self._retired_numbers = before
                raise
        for path in gone:
            self._store.remove(path)
        self.bytes_by_kind = {paths.GROUPS: total - sum(others.values()), **others}
        self.is_state_wanted = total > most and removable < last_update
        self._tell_excess(total, removable)
        return gone

    def _room(self, last_update: int, sizes: Mapping[str, int], by_number: Mapping[int, list[str]]) -> int:
        """Bytes that rollout workers may still commit before the next call."""
        largest = max((sum(sizes[path] for path in files) for files in by_number.values()), default=0)
        num_groups = len(read_manifest(self._store, last_update).groups) if last_update else 0
        return (self._max_staleness + 1) * num_groups * largest

    def _tell_excess(self, total: int, removable: int) -> None:
        if total > self._config.max_bytes:
            _log.warning(
                "retention: the run directory holds %d bytes, store.max_bytes is %d, and nothing more may leave: updates after the "
                "LearnerState of update %d would be replayed; a state is asked for; raise the cap, or lower learner.states_kept",
                total, self._config.max_bytes, removable,
            )  # fmt: skip

    def _other_bytes(self) -> dict[str, int]:
        """Bytes outside groups/ by kind: adapters and LearnerStates freshly, the slowly growing records counted now and then."""
        calls = self._calls
        if calls % RECOUNT_EVERY == 0 or (calls < RECOUNT_EVERY and calls & (calls - 1) == 0):
            self._store.sweep()
            large = (f"{paths.GROUPS}/", f"{paths.POLICY}/", f"{paths.LEARNER}/")
            counted = sum(size for path, size in self._store.sizes().items() if not path.startswith(large))
            before, num_bytes = self._records
            self._growth = max(counted - num_bytes, 0.0) / (calls - before) if calls > before else 0.0
            self._records = (calls, counted)
        self._calls += 1
        records = self._records[1] + self._growth * (calls - self._records[0])
        large_ones = {folder: sum(self._store.sizes(folder).values()) for folder in (paths.POLICY, paths.LEARNER)}
        return {**large_ones, "other": round(records)}

    def _states(self) -> set[int]:
        return {update for path in self._store.list(paths.LEARNER) if (update := paths.parse_learner_complete(path)) is not None}

    def _bound(self) -> int:
        """Numbers below it belong to retired updates."""
        if self._retired_numbers is None:
            self._retired_numbers = self._numbers_through(self.retired_through) if self.retired_through else 0
        return self._retired_numbers

    def _numbers_through(self, update: int) -> int:
        """Numbers below this are settled by the updates up to here: consumed, or dropped."""
        return 1 + max(group.number for group in read_manifest(self._store, update).groups)


def _by_number(sizes: Mapping[str, int]) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for path in sorted(sizes):
        name = paths.parse_group(path) or paths.parse_media(path)
        if name is not None:
            found.setdefault(name.number, []).append(path)
    return found
