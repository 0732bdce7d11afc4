"""The fleet's book: which slots are wanted, which are there, and what follows. Pure decisions; deploy/ray_actors.py carries them out.

Lifecycle of a slot (learner, rollout.0 ..., reward.NAME.0 ...):

    (wanted) --> STARTING --ready--> RUNNING --fewer wanted--> DRAINING --its loop returned, or drain_timeout_s--> (gone)
                    ^  |                |
                    |  +---its process ended or hung--> RESTING (back-off, doubling)
                    +-----------------------------------+          five times in a row without work between: the run stops
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from common.errors import FlowfleetError, GateError

LEARNER = "learner"
MAX_CRASHES = 5  # in a row, at start or without work between
STEADY_S = 10.0  # a process that was lost (not one that raised) after so long was no crash at start
FIRST_REST_S, LONGEST_REST_S = 0.5, 10.0


class Phase(StrEnum):
    """Where a slot is; the module's drawing shows how it moves."""

    STARTING = "starting"
    RUNNING = "running"
    DRAINING = "draining"
    RESTING = "resting"


class SlotEnd(StrEnum):
    """How a slot's loop ended."""

    LEFT = "left"  # the desk said Stop
    LOST = "lost"  # its process or node is gone
    RAISED = "raised"  # an unexpected exception
    HUNG = "hung"  # its scorer's call outlived its deadline, so it ended itself
    STORE = "store"  # the store was away for longer than it could wait: no fault of its own


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetLimits:
    """Seconds that things may take."""

    start_timeout_s: float  # until a process answers
    drain_timeout_s: float  # until a drained process has left
    grows: bool = False  # the cluster adds nodes for what waits: a new process may wait for one


@dataclass(frozen=True, slots=True, kw_only=True)
class Orders:
    """What the shell is to do now, in this order; kill: slot -> why."""

    kill: Mapping[str, str]
    drain: tuple[str, ...]
    start: tuple[str, ...]


@dataclass(slots=True, kw_only=True)
class SlotRecord:
    """What the book knows of one slot."""

    slot: str
    pool: str  # learner | rollout | reward.NAME
    index: int
    phase: Phase
    since: float  # when the phase began
    crashes: int = 0  # in a row
    was_ready: bool = False  # ever
    work: int = 0  # the Coordinator's counts when this process started
    overruns: int = 0
    restart_at: float = 0.0


def slot_name(pool: str, index: int) -> str:
    """rollout.0, reward.ocr.1; the learner is alone."""
    return pool if pool == LEARNER else f"{pool}.{index}"


class FleetBook:
    """Keeps the slots and decides. Times are the caller's, in seconds; counts are the Coordinator's, by slot."""

    def __init__(self, limits: FleetLimits) -> None:
        self.slots: dict[str, SlotRecord] = {}
        self._limits = limits

    def orders(self, wanted: Mapping[str, int], now: float) -> Orders:
        """Compare what is wanted with what there is.

        Args:
            wanted: pool -> slots; a pool that is not named is wanted nowhere.
            now: the time.

        Returns:
            Slots to start (lowest free index first, the learner before all), to drain (resting and starting ones first, then the
            highest index), and to kill because they did not leave in time.
        """
        late = [r for r in self.slots.values() if r.phase is Phase.DRAINING and now - r.since > self._limits.drain_timeout_s]
        kill = {record.slot: f"it did not leave within {self._limits.drain_timeout_s:.0f} s" for record in late}
        drain: list[str] = []
        start: list[str] = []
        for pool in sorted(wanted.keys() | {record.pool for record in self.slots.values()}, key=lambda name: (name != LEARNER, name)):
            staying = [record for record in self.slots.values() if record.pool == pool and record.phase is not Phase.DRAINING]
            surplus = len(staying) - wanted.get(pool, 0)
            leaving = sorted(staying, key=_who_leaves)[: max(0, surplus)]
            drain += [record.slot for record in leaving]
            start += [r.slot for r in staying if r.phase is Phase.RESTING and r.restart_at <= now and r not in leaving]
            start += self._free_names(pool, -surplus)
        return Orders(kill=kill, drain=tuple(drain), start=tuple(start))

    def _free_names(self, pool: str, count: int) -> list[str]:
        taken = {record.index for record in self.slots.values() if record.pool == pool}
        free = [index for index in range(len(taken) + max(0, count)) if index not in taken]
        return [slot_name(pool, index) for index in free[: max(0, count)]]

    def started(self, slot: str, now: float, *, work: int = 0, overruns: int = 0) -> None:
        """A process was asked for."""
        pool, _, index = slot.rpartition(".") if slot != LEARNER else (LEARNER, "", "0")
        before = self.slots.get(slot)
        self.slots[slot] = SlotRecord(
            slot=slot, pool=pool, index=int(index), phase=Phase.STARTING, since=now, crashes=before.crashes if before else 0,
            was_ready=before.was_ready if before else False, work=work, overruns=overruns,
        )  # fmt: skip

    def became_ready(self, slot: str, now: float) -> None:
        """Its process answered."""
        record = self.slots[slot]
        record.was_ready = True
        if record.phase is Phase.STARTING:
            record.phase, record.since = Phase.RUNNING, now

    def draining(self, slot: str, now: float) -> bool:
        """It is to leave; False when there was no process to wait for, and it is gone at once."""
        record = self.slots[slot]
        if record.phase is Phase.RESTING:
            del self.slots[slot]
            return False
        record.phase, record.since = Phase.DRAINING, now
        return True

    def ended(self, slot: str, kind: SlotEnd, cause: str, now: float, *, work: int = 0) -> str:
        """Its process is gone. Returns what follows, in words.

        Raises:
            FlowfleetError: it ended for the fifth time in a row without work between; the message holds the cause. GateError("reward")
                when its scorer hung.
        """
        record = self.slots[slot]
        if record.phase is Phase.DRAINING or kind is SlotEnd.LEFT:
            del self.slots[slot]
            return f"{slot} left" if kind is SlotEnd.LEFT else f"{slot} ended while it was drained ({cause})"
        lived_s = now - record.since if record.phase is Phase.RUNNING else 0.0
        if work > record.work or (kind is SlotEnd.LOST and lived_s >= STEADY_S and slot != LEARNER):  # a learner's work is an update
            record.crashes = 0
        if kind is not SlotEnd.STORE:
            record.crashes += 1
        if record.crashes >= MAX_CRASHES:
            text = (
                f"{slot}: ended {record.crashes} times in a row without doing any work, the last time by: {cause}; a process that cannot "
                "work is not started for ever; mend the cause, then start the same command again"
            )
            raise GateError("reward", text) if kind is SlotEnd.HUNG else FlowfleetError(text)
        rest_s = min(LONGEST_REST_S, FIRST_REST_S * 2 ** max(0, record.crashes - 1)) if kind is not SlotEnd.STORE else LONGEST_REST_S
        record.phase, record.since, record.restart_at = Phase.RESTING, now, now + rest_s
        return f"{slot} ended ({cause}); it is started again in {rest_s:g} s"

    def hanging(self, overruns: Mapping[str, int]) -> list[str]:
        """Slots that beat but held a lease for longer than group_timeout_s since they started."""
        return [r.slot for r in self.slots.values() if r.phase is not Phase.RESTING and overruns.get(r.slot, 0) > r.overruns]

    def late(self, now: float) -> list[SlotRecord]:
        """Slots whose process has not answered within start_timeout_s."""
        return [r for r in self.slots.values() if r.phase is Phase.STARTING and now - r.since > self._limits.start_timeout_s]

    def may_wait(self, record: SlotRecord) -> bool:
        """Whether a late slot is only spoken of. A learner never is, nor what never answered on a cluster that does not grow: there a
        mistake is the likelier cause. schedule.stall_timeout_s bounds the wait of all of them together."""
        return record.slot != LEARNER and (record.was_ready or self._limits.grows)

    def drained(self) -> frozenset[str]:
        """Slots that are to get Stop at their next ask."""
        return frozenset(record.slot for record in self.slots.values() if record.phase is Phase.DRAINING)


def _who_leaves(record: SlotRecord) -> tuple[int, int]:
    order = {Phase.RESTING: 0, Phase.STARTING: 1, Phase.RUNNING: 2}
    return order[record.phase], -record.index
