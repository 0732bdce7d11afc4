"""LeaseBook: who holds what, until when, and how often it went wrong. No I/O, no clock of its own."""

from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

KeyT = TypeVar("KeyT", bound=Hashable)


@dataclass(slots=True, kw_only=True)
class Lease(Generic[KeyT]):
    """A grant of one key to one slot."""

    lease_id: str
    key: KeyT
    slot: str
    version: int  # policy version it is pinned to; -1 when none
    granted_s: float
    heard_s: float


class LeaseBook(Generic[KeyT]):
    """Leases by key. Only expiries and failures count as attempts; a return is free.

    Args:
        silence_s: a lease expires after this long without a beat.
        total_s: a lease expires this long after its grant, beats or not.
    """

    def __init__(self, *, silence_s: float, total_s: float) -> None:
        self._silence_s = silence_s
        self._total_s = total_s
        self._by_id: dict[str, Lease[KeyT]] = {}
        self._by_key: dict[KeyT, Lease[KeyT]] = {}
        self.attempts: Counter[KeyT] = Counter()
        self._overrun: list[str] = []

    def __len__(self) -> int:
        return len(self._by_id)

    def get(self, lease_id: str) -> Lease[KeyT] | None:
        """The lease of this id, None when it ended."""
        return self._by_id.get(lease_id)

    def holds(self, key: KeyT) -> bool:
        """Whether somebody holds this key."""
        return key in self._by_key

    def versions(self) -> set[int]:
        """The policy versions that leases are pinned to."""
        return {lease.version for lease in self._by_id.values()}

    def grant(self, key: KeyT, lease_id: str, *, slot: str, now: float, version: int = -1) -> None:
        """Lease a free key."""
        assert key not in self._by_key
        assert lease_id not in self._by_id
        lease = Lease(lease_id=lease_id, key=key, slot=slot, version=version, granted_s=now, heard_s=now)
        self._by_id[lease_id] = self._by_key[key] = lease

    def beat(self, lease_ids: Iterable[str], now: float) -> None:
        """Keep leases alive; ids that ended are ignored."""
        for lease_id in lease_ids:
            if lease_id in self._by_id:
                self._by_id[lease_id].heard_s = now

    def end(self, lease_id: str) -> KeyT | None:
        """End a lease unharmed (done or returned). Returns its key, None when it had ended."""
        lease = self._by_id.pop(lease_id, None)
        if lease is None:
            return None
        del self._by_key[lease.key]
        return lease.key

    def end_key(self, key: KeyT) -> None:
        """End whatever lease holds this key."""
        if key in self._by_key:
            self.end(self._by_key[key].lease_id)

    def fail(self, lease_id: str) -> KeyT | None:
        """End a lease as an attempt that went wrong. Returns its key, None when it had ended."""
        key = self.end(lease_id)
        if key is not None:
            self.attempts[key] += 1
        return key

    def take_overrun(self) -> list[str]:
        """Slots whose leases outlived total_s while they went on beating, since the last call: alive, but hanging."""
        taken, self._overrun = self._overrun, []
        return taken

    def expire(self, now: float) -> list[KeyT]:
        """Fail every lease that was silent or held for too long. Returns their keys."""
        late = [
            lease.lease_id
            for lease in self._by_id.values()
            if now - lease.heard_s > self._silence_s or now - lease.granted_s > self._total_s
        ]
        held = [self._by_id[lease_id] for lease_id in late]
        self._overrun += sorted({lease.slot for lease in held if now - lease.heard_s <= self._silence_s})
        return [key for lease_id in late if (key := self.fail(lease_id)) is not None]
