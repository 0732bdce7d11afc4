"""How a run ends: done, at its time limit, by a guard, because it waited too long, or because somebody stopped it."""

from dataclasses import dataclass
from enum import StrEnum

from common.errors import GateError, Interrupted, StallError


class EndKind(StrEnum):
    """RUNNING until one of the others is set, once."""

    RUNNING = "running"
    DONE = "done"  # all updates and evaluations
    TIME_LIMIT = "time_limit"  # done as far as the time went
    GUARD = "guard"  # too many drops, or a reward that cannot score
    STALL = "stall"  # nothing moved for stall_timeout_s
    STOPPED = "stopped"  # somebody asked for it: `flowfleet stop`, SIGINT, SIGTERM


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Where the run stands, or how it ended."""

    kind: EndKind
    reason: str
    gate: str = "drops"  # of a guard's end: which guard

    @property
    def is_over(self) -> bool:
        """Whether everybody is to leave."""
        return self.kind is not EndKind.RUNNING

    def raise_if_failed(self) -> None:
        """Raise GateError or StallError (exit code 3) when a guard ended the run, Interrupted (130) when somebody did."""
        if self.kind is EndKind.GUARD:
            raise GateError(self.gate, self.reason)
        if self.kind is EndKind.STALL:
            raise StallError(self.reason)
        if self.kind is EndKind.STOPPED:
            raise Interrupted(self.reason)


class RunEnd:
    """Keeps the clock of progress and the outcome."""

    def __init__(self, *, started: float, time_limit_s: float | None, stall_timeout_s: float) -> None:
        self._time_limit_s, self._started = time_limit_s, started
        self._stall_timeout_s = stall_timeout_s
        self._progress = self._learnt = started
        self.outcome = Outcome(kind=EndKind.RUNNING, reason="running")

    def progress(self, now: float, *, learns: bool = False) -> None:
        """A file was committed, or a micro-batch learnt. learns: it was a manifest, a policy version or a micro-batch."""
        self._progress = now
        if learns:
            self._learnt = now

    def idle_s(self, now: float) -> float:
        """Seconds since the last progress, or since the start."""
        return max(0.0, now - self._progress)

    def began(self, at: float) -> None:
        """This start began earlier than this object (its Coordinator restarted): the time limit counts from there."""
        self._started = min(self._started, at)

    def is_closing(self, now: float) -> bool:
        """Whether the time limit has passed: no new manifests."""
        return self._time_limit_s is not None and now >= self._started + self._time_limit_s

    def stalled_for(self, since: float, now: float) -> float | None:
        """Seconds without progress since `since`, when they pass the limit; else None."""
        idle = now - max(since, self._progress)
        return idle if idle > self._stall_timeout_s else None

    def barren_for(self, now: float) -> float | None:
        """Seconds since the last manifest, policy version or micro-batch, when they pass the limit; else None."""
        barren = now - self._learnt
        return barren if barren > self._stall_timeout_s else None

    def finish(self, kind: EndKind, reason: str, gate: str = "drops") -> None:
        """Set the outcome; the first one stands. gate: which guard, when one ends it."""
        if not self.outcome.is_over:
            self.outcome = Outcome(kind=kind, reason=reason, gate=gate)
