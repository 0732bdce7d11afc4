"""The sentences at the top of a report: what rose, what waited, what to look at."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from deploy.report.compare import TableRow
from deploy.report.image_curves import SensorRecord
from deploy.report.records import RunHistory

WAITS_LONG = 0.25  # of the learner's time
LOW_COVERAGE = 0.95
MANY_FLAT = 0.6
LAST_UPDATES = 5
Tone = Literal["good", "bad", "plain"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sentence:
    """One finding."""

    tone: Tone
    text: str


def duration(seconds: float) -> str:
    """Return seconds as people say them: 42 s, 6.1 min, 3.2 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def figure(value: float, *, signed: bool = False) -> str:
    """Return a number with three decimals, or three significant digits when it is small: 0.625, -0.0076, +0.242."""
    sign = "+" if signed else ""
    return f"{value:{sign}.3f}" if abs(value) >= 0.05 or value == 0 else f"{value:{sign}.3g}"


def waiting_share(history: RunHistory) -> float | None:
    """The share of the learner's time spent waiting for groups, each start's first update left out (it waits for everything to start)."""
    starts: dict[int, int] = {}
    for record in history.updates:
        starts.setdefault(record.incarnation, record.update)
    counted = [record for record in history.updates if record.update != starts[record.incarnation]]
    total = sum(sum(record.seconds.values()) for record in counted)
    return sum(record.seconds.get("wait", 0.0) for record in counted) / total if total > 0 else None


def sentences(history: RunHistory, rows: Sequence[TableRow], sensors: SensorRecord) -> list[Sentence]:
    """Return the findings, the frozen evaluation first."""
    return [*_outcomes(history, rows), *_waiting(history), *_rewards(history), *_dropped(history), *_sensors(sensors)]


def _sensors(sensors: SensorRecord) -> list[Sentence]:
    """That sensors alerted; else that those with a band stayed quiet."""
    if sensors.alerts:
        names = ", ".join(dict.fromkeys(alert.sensor.replace("_", " ") for alert in sensors.alerts))
        text = f"Sensors alerted ({names}): a train reward rose while the images left the base model's band. Look at the box below."
        return [Sentence(tone="bad", text=text)]
    if not sensors.bands:
        return []
    count = len(sensors.bands)
    text = (
        f"No sensor alerted: {count} image statistic{'' if count == 1 else 's'} or watch rewards were held against the base model's band."
    )
    return [Sentence(tone="plain", text=text)]


def _outcomes(history: RunHistory, rows: Sequence[TableRow]) -> list[Sentence]:
    """One sentence a reward, on its mean over tasks (or its only task)."""
    first: dict[str, TableRow] = {}
    for row in rows:
        first.setdefault(row.reward, row)
    if not first:
        return [_no_outcome(history)]
    newest = history.newest
    version = newest.version if newest else 0
    seconds = history.elapsed_at(version)
    span = f"over {version} updates" + (f" in {duration(seconds)}" if seconds else "")
    return [_outcome(row, span) for row in first.values()]


def _no_outcome(history: RunHistory) -> Sentence:
    if not history.updates and not history.evaluations:
        return Sentence(tone="plain", text="Nothing has happened yet: no update and no evaluation is on file.")
    missing = "base model's frozen evaluation" if history.base is None else "second frozen evaluation"
    return Sentence(tone="plain", text=f"No before/after verdict yet: the {missing} is not on file.")


def _outcome(row: TableRow, span: str) -> Sentence:
    change, low, high = (figure(value, signed=True) for value in (row.difference, row.low, row.high))
    move = f"{figure(row.before)} → {figure(row.after)} ({change}, 95% interval {low} to {high})"
    if row.verdict == "unclear":
        return Sentence(tone="plain", text=f"Frozen {row.reward} went {move} {span}: the interval includes 0, so this may be noise.")
    return Sentence(tone="good" if row.verdict == "rose" else "bad", text=f"Frozen {row.reward} {row.verdict} {move} {span}.")


def _waiting(history: RunHistory) -> list[Sentence]:
    share = waiting_share(history)
    if share is None:
        return []
    text = f"The learner waited {share:.0%} of its time for rollouts: more rollout workers would make the run faster."
    if share < WAITS_LONG:
        text = f"The learner waited only {share:.0%} of its time: it is the busiest role, more rollout workers would help little."
    return [Sentence(tone="plain", text=text)]


def _rewards(history: RunHistory) -> list[Sentence]:
    """Failing scorers and dead signals."""
    last = history.updates[-LAST_UPDATES:]
    found = []
    for name in sorted({name for record in last for name in record.rewards}):
        coverage = [record.rewards[name].coverage for record in last if name in record.rewards]
        if sum(coverage) / len(coverage) < LOW_COVERAGE:
            text = f"{name} scored only {sum(coverage) / len(coverage):.0%} of the last updates' images; the score files hold the errors."
            found.append(Sentence(tone="bad", text=text))
    flat = [record.flat_group_share for record in last]
    if flat and sum(flat) / len(flat) > MANY_FLAT:
        text = (
            f"{sum(flat) / len(flat):.0%} of the last updates' groups were flat: most prompts are too easy or too hard to teach anything."
        )
        found.append(Sentence(tone="plain", text=text))
    return found


def _dropped(history: RunHistory) -> list[Sentence]:
    counts: dict[str, int] = {}
    for record in history.updates:
        for reason, count in record.drops.items():
            counts[reason] = counts.get(reason, 0) + count
    if not counts:
        return []
    total = sum(counts.values())
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))
    return [Sentence(tone="plain", text=f"{total} group{'' if total == 1 else 's'} dropped ({reasons}).")]
