"""`flowfleet watch` without a terminal: one line a change, for logs and pipes; no escape codes, no drawing characters."""

from deploy.report.records import EvaluationRecord, UpdateRecord
from deploy.watch.files import Look
from deploy.watch.view import clean, headline, mean_of, number, reward_names, seconds_left, silence_words, span, state_words

MOST_REWARDS = 8
_Place = tuple[int, int]  # incarnation, update: grows, even over a rewind


class PlainLines:
    """Remembers what was told, and says what is new: state, rewinds, updates, evaluations, alerts, silence."""

    def __init__(self) -> None:
        self._told: _Place | None = None
        self._evaluations: set[str] | None = None  # folders
        self._alerts: set[str] = set()
        self._state = ""
        self._is_silent = False

    def lines(self, look: Look) -> list[str]:
        """The lines of one look; of the first one, only the newest update and evaluation."""
        found = [*self._states(look), *self._updates(look), *self._verdicts(look), *self._alarms(look)]
        return [clean(line) for line in found]

    def _states(self, look: Look) -> list[str]:
        state = f"{look.claim.incarnation} {state_words(look)}"
        lines = [] if state == self._state else [headline(look)]
        if look.is_starting and lines:
            lines.append(f"incarnation {look.claim.incarnation} was started {look.claim.started_at} and has not begun to work yet")
        self._state = state
        if look.is_silent != self._is_silent:
            lines.append(silence_words(look) if look.is_silent else "status.json is written again")
        self._is_silent = look.is_silent
        return lines

    def _updates(self, look: Look) -> list[str]:
        updates = look.history.updates
        if not updates:
            return []
        newest = (updates[-1].incarnation, updates[-1].update)
        told, self._told = self._told, max(newest, self._told or newest)
        if told is None:
            return [_update_line(look, updates[-1])]
        new = [record for record in updates if (record.incarnation, record.update) > told]
        lines = []
        if new and new[0].incarnation > told[0] and new[0].update <= told[1]:
            lines.append(
                f"incarnation {new[0].incarnation} went back: it goes on from update {new[0].update}; what was told from there on is void"
            )
        return [*lines, *(_update_line(look, record) for record in new)]

    def _verdicts(self, look: Look) -> list[str]:
        records = look.history.evaluations
        told = self._evaluations
        new = (
            [record for record in records if told is not None and record.directory not in told] if told is not None else list(records[-1:])
        )
        self._evaluations = (told or set()) | {record.directory for record in records}
        return [_evaluation_line(look, record) for record in new]

    def _alarms(self, look: Look) -> list[str]:
        standing = set(look.status.alerts if look.status is not None else ())
        lines = [f"ALERT {sentence}" for sentence in sorted(standing - self._alerts)]
        lines += [f"alert over: {sentence}" for sentence in sorted(self._alerts - standing)]
        self._alerts = standing
        return lines


def _update_line(look: Look, record: UpdateRecord) -> str:
    rewards = [
        f"{name} {number(summary.mean)}"
        for name in reward_names(look)
        if (summary := record.rewards.get(name)) is not None and summary.mean is not None
    ]
    parts = [f"update {record.update}/{look.num_updates}", ", ".join(_cut(rewards)) or "nothing was scored"]
    groups = sum(record.staleness.values())
    if groups:
        parts.append(f"staleness {sum(age * count for age, count in record.staleness.items()) / groups:.1f}")
    total = sum(record.seconds.values())
    if total > 0:
        parts.append(f"learner waited {record.seconds.get('wait', 0.0) / total:.0%}")
    if record.drops:
        parts.append("dropped " + ", ".join(f"{count} {reason}" for reason, count in sorted(record.drops.items())))
    left = seconds_left(look)
    if left is not None and record is look.history.updates[-1]:
        parts.append(f"ETA {span(left)}")
    return "; ".join(parts)


def _evaluation_line(look: Look, record: EvaluationRecord) -> str:
    told = []
    for name, result in sorted(record.rewards.items()):
        base = mean_of(look.history.base, name)
        if result.mean is None:
            told.append(f"{name} not scored")
        elif base is None or record.version == 0:
            told.append(f"{name} {number(result.mean)}")
        else:
            told.append(f"{name} {number(result.mean)} (base {number(base)}, {result.mean - base:+.3f})")
    return f"evaluation of version {record.version} ({record.snapshot}): {', '.join(_cut(told))}"


def _cut(parts: list[str]) -> list[str]:
    left = len(parts) - MOST_REWARDS
    return [*parts[:MOST_REWARDS], f"... and {left} more"] if left > 0 else parts
