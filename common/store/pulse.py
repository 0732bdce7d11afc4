"""Pulse: who was heard when, what it reported, and which share of the last minute each role spent waiting."""

from collections import deque
from collections.abc import Collection, Mapping

WINDOW_S = 60.0


class Pulse:
    """Signs of life by slot and waits by role. The caller holds the lock and passes its clock's time."""

    def __init__(self, started: float) -> None:
        self._started = started
        self.heard: dict[str, float] = {}
        self.gauges: dict[str, dict[str, float]] = {}
        self._waits: dict[tuple[str, str], deque[tuple[float, float]]] = {}

    def hear(self, slot: str, now: float, gauges: Mapping[str, float] | None = None) -> None:
        """A slot spoke."""
        self.heard[slot] = now
        if gauges is not None:
            self.gauges[slot] = dict(gauges)

    def asked(self, role: str, slot: str, now: float, wait_s: float) -> None:
        """A slot asked for work and is to wait this long (0: it got some)."""
        self.hear(slot, now)
        waits = self._waits.setdefault((role, slot), deque())
        if waits and waits[-1][1] > now:  # it asked again before its wait was over
            waits[-1] = (waits[-1][0], now)
        if wait_s > 0:
            waits.append((now, now + wait_s))
        while waits and waits[0][1] < now - WINDOW_S:
            waits.popleft()

    def waiting_shares(self, now: float) -> dict[str, float]:
        """Role -> share of the last minute that its slots spent waiting, in [0, 1]; slots silent for longer do not count."""
        by_role: dict[str, list[float]] = {}
        for (role, _), share in self._shares(now).items():
            by_role.setdefault(role, []).append(share)
        return {role: sum(shares) / len(shares) for role, shares in by_role.items()}

    def slot_shares(self, now: float) -> dict[str, float]:
        """Slot -> share of the last minute that it spent waiting, in [0, 1]; slots silent for longer are left out."""
        return {slot: share for (_, slot), share in self._shares(now).items()}

    def heard_of(self, role: str, now: float) -> int:
        """How many slots of a role spoke in the last minute."""
        return sum(1 for asker, slot in self._waits if asker == role and now - self.heard.get(slot, now - 2 * WINDOW_S) <= WINDOW_S)

    def heard_within(self, seconds: float, now: float) -> set[str]:
        """The slots that spoke in the last seconds."""
        return {slot for slot, heard in self.heard.items() if now - heard <= seconds}

    def keep(self, slots: Collection[str]) -> None:
        """Forget the slots but these: they are gone for good."""
        self.heard = {slot: at for slot, at in self.heard.items() if slot in slots}
        self.gauges = {slot: gauges for slot, gauges in self.gauges.items() if slot in slots}
        self._waits = {key: waits for key, waits in self._waits.items() if key[1] in slots}

    def _shares(self, now: float) -> dict[tuple[str, str], float]:
        start = max(self._started, now - WINDOW_S)
        span = max(now - start, 1e-9)
        return {
            key: min(1.0, sum(max(0.0, min(end, now) - max(begin, start)) for begin, end in waits) / span)
            for key, waits in self._waits.items()
            if now - self.heard.get(key[1], start) <= WINDOW_S
        }
