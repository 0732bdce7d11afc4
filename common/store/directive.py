"""What the driver tells the Coordinator at every tick: who is to leave, whether the run ends, and what status.json shows of the fleet.

It is sent whole each time, so a Coordinator that restarts in mid-run knows it again after one tick.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from common.store.ending import Outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotReport:
    """One worker, server or learner, as status.json shows it."""

    state: str  # starting | running | draining | resting
    host: str = ""  # "" until it answered
    process_ids: tuple[int, ...] = ()  # one a rank
    crashes: int = 0  # in a row, without work between


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetReport:
    """The fleet, as status.json shows it."""

    driver_process_id: int = 0  # 0: no driver has told
    sizes: Mapping[str, int] = field(default_factory=dict)  # pool (rollout, reward.NAME) -> wanted
    slots: Mapping[str, SlotReport] = field(default_factory=dict)
    decisions: tuple[str, ...] = ()  # the last ones, oldest first


@dataclass(frozen=True, slots=True, kw_only=True)
class Directive:
    """The driver's word; the default says nothing."""

    drained: frozenset[str] = frozenset()  # slots that get Stop at their next ask
    ended: Outcome | None = None  # a stop that was asked for, or an end that an earlier Coordinator of this start declared
    elapsed_s: float = 0.0  # since this start began, on the driver's clock: a restarted Coordinator keeps the time limit
    learner_left: bool = False  # the learner got its Stop and saved its state
    report: FleetReport = FleetReport()
