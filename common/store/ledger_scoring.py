"""Scoring leases: which images are to be scored by which reward, and when a reward has failed too often."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from common.store.leases import LeaseBook


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreKey:
    """One reward's work on one group file or evaluation sheet."""

    number: int
    lease_id: str  # of the group file or sheet
    reward: str
    directory: str = ""  # of the evaluation; "" for a training group


@dataclass(frozen=True, slots=True, kw_only=True)
class GrantedScoring:
    """A scoring lease that was just granted."""

    lease_id: str
    key: ScoreKey


class ScoringBook:
    """Scoring leases of training groups or of evaluations.

    After `max_attempts` expiries or failures a key is exhausted: its scores become null(attempts), so that a poison image
    never blocks the order.
    """

    def __init__(self, *, silence_s: float, total_s: float, max_attempts: int) -> None:
        self.leases: LeaseBook[ScoreKey] = LeaseBook(silence_s=silence_s, total_s=total_s)
        self._max_attempts = max_attempts
        self._errors: dict[ScoreKey, str] = {}

    def ask(self, wanted: Iterable[ScoreKey], limit: int, *, slot: str, now: float, new_id: Callable[[], str]) -> list[GrantedScoring]:
        """Lease up to `limit` of the wanted keys, in their order."""
        granted: list[GrantedScoring] = []
        for key in wanted:
            if len(granted) >= limit:
                break
            if self.leases.holds(key) or self.is_exhausted(key):
                continue
            lease_id = new_id()
            self.leases.grant(key, lease_id, slot=slot, now=now)
            granted.append(GrantedScoring(lease_id=lease_id, key=key))
        return granted

    def fail(self, lease_id: str, error: str) -> None:
        """Count an attempt that went wrong."""
        key = self.leases.fail(lease_id)
        if key is not None:
            self._errors[key] = error

    def expire(self, now: float) -> int:
        """Fail the silent leases; return how many there were."""
        keys = self.leases.expire(now)
        for key in keys:
            self._errors.setdefault(key, "its lease expired")
        return len(keys)

    def is_exhausted(self, key: ScoreKey) -> bool:
        """Whether the reward has failed on it too often, and nobody tries now."""
        return self.leases.attempts[key] >= self._max_attempts and not self.leases.holds(key)

    def error(self, key: ScoreKey) -> str:
        """What went wrong last, for the null scores' error column."""
        return f"attempts: {self.leases.attempts[key]} failed, last: {self._errors.get(key, 'unknown')}"
