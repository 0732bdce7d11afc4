"""Numbers that a component shows about itself, taken by its heartbeat from another thread."""

import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

PROCESS_MARK: Final = "process_mark"
"""A number that each process draws anew: its totals began at 0 with it."""
MAX_LABELS = 16  # distinct reasons kept apart; metric labels stay few and bounded


class Gauges:
    """A thread-safe table of named numbers: set the latest, add to a total, time a block."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._values: dict[str, float] = {PROCESS_MARK: float(secrets.randbits(48))}

    def set(self, name: str, value: float) -> None:
        """Put the latest value of a gauge."""
        with self._lock:
            self._values[name] = float(value)

    def add(self, name: str, amount: float, reason: str | None = None) -> None:
        """Add to a total; with a reason also to its own total `name.reason` (text before the first colon; at most 16, then "other")."""
        with self._lock:
            self._values[name] = self._values.get(name, 0.0) + amount
            if reason is not None:
                label = self._label(name, reason)
                self._values[label] = self._values.get(label, 0.0) + amount

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the seconds that the block took, whether it ends well or not."""
        started = self._clock()
        try:
            yield
        finally:
            self.add(name, self._clock() - started)

    def snapshot(self) -> dict[str, float]:
        """Return a copy of all values."""
        with self._lock:
            return dict(self._values)

    def _label(self, name: str, reason: str) -> str:
        label = f"{name}.{reason.partition(':')[0].strip().replace(' ', '_')}"
        known = [key for key in self._values if key.startswith(f"{name}.")]
        return label if label in known or len(known) < MAX_LABELS else f"{name}.other"
