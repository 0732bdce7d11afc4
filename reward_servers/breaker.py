"""The circuit breaker of a reward server: after n failed groups in a row it rests, then tries one group, then works or rests again.

            failures in a row                pause_s over
CLOSED ----------------------> OPEN ----------------------> HALF_OPEN
  ^                              ^                              |
  |                              +------- the group failed -----+
  +---------------- the group was scored -----------------------+

MAX_TRIES such tries in a row that failed by themselves say that this process is broken for good (a GPU context that is lost): `broken`.
What another may mend, a connection or a served reward's version, is no such try: the process that is started again would accept that version.
"""

import time
from collections.abc import Callable
from enum import StrEnum
from typing import Final

from common.errors import ScorerHung

MAX_TRIES: Final = 3  # in a row, each after a rest; one that failed by what the scorer asks counts anew


class ScorerBroken(ScorerHung):
    """A scorer that cannot score again in this process; as one that hangs, it costs the process."""


class BreakerState(StrEnum):
    """Where a breaker is; the module's drawing shows how it moves."""

    CLOSED = "closed"
    HALF_OPEN = "half_open"
    OPEN = "open"


class Breaker:
    """Counts groups that failed whole.

    Args:
        failures: in a row, after which it opens.
        pause_s: seconds it stays open before one group is tried.
        clock: seconds, for durations only.
    """

    def __init__(self, *, failures: int = 5, pause_s: float = 10.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._failures, self._pause_s, self._clock = failures, pause_s, clock
        self._in_a_row = self._tries = 0
        self._rests_until = 0.0
        self.state = BreakerState.CLOSED
        self.last_error = ""
        self.broken = ""  # why this process can score no more

    def admits(self, limit: int) -> int:
        """How many groups may be asked for now: `limit` when closed, 0 during the rest, 1 after it."""
        if self.state is BreakerState.OPEN and self.rest_s() <= 0:
            self.state = BreakerState.HALF_OPEN
        return {BreakerState.CLOSED: limit, BreakerState.HALF_OPEN: 1, BreakerState.OPEN: 0}[self.state]

    def rest_s(self) -> float:
        """Seconds that are left of the rest; 0 when there is none."""
        return max(0.0, self._rests_until - self._clock()) if self.state is BreakerState.OPEN else 0.0

    def succeeded(self) -> None:
        """A group was scored, at least in part."""
        self._in_a_row = self._tries = 0
        self.state, self.broken = BreakerState.CLOSED, ""

    def failed(self, error: str, *, may_pass: bool = False) -> None:
        """A group failed whole. may_pass: at least in part by what the scorer asks (a connection, another version there)."""
        self._in_a_row += 1
        if self.state is BreakerState.HALF_OPEN:
            self._tries = 0 if may_pass else self._tries + 1
        if self._tries >= MAX_TRIES:
            self.broken = f"{self._tries} tries in a row, each after a rest of {self._pause_s:g} s, scored nothing, the last: {error}"
        if self.state is BreakerState.HALF_OPEN or self._in_a_row >= self._failures:
            self._open()
        self.last_error = error

    def gave_up(self, error: str) -> None:
        """The scorer itself says that it cannot score again in this process."""
        self._open()
        self.last_error = self.broken = error

    def _open(self) -> None:
        self.state = BreakerState.OPEN
        self._rests_until = self._clock() + self._pause_s
