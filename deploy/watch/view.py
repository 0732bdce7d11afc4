"""The screen of `flowfleet watch`: what a look found, as lines of text for a terminal of some width and height."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from rich.console import Group
from rich.text import Text

from common.store.directive import SlotReport
from deploy.live import waiting_sentence
from deploy.report.records import EvaluationRecord, UpdateRecord
from deploy.watch.files import Look

BLOCKS = "▁▂▃▄▅▆▇█"
RECENT_UPDATES = 10  # who waits, and the time left, are told from these
WAITS_LONG = 0.25  # of the learner's time
LOW_COVERAGE = 0.95
MOST_REWARDS, MOST_SLOTS, MOST_LINES = 8, 12, 3  # of each table; drops and decisions
UNBOUNDED = 10_000  # lines of what is no terminal
_WIDEST_NAME = 28


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """How many rows the tables may have."""

    rewards: int
    slots: int


def budget(height: int) -> Budget:
    """Rows for a screen of `height` lines: some eighteen lines stand beside the tables."""
    room = max(0, height - 18)
    rewards = max(2, min(MOST_REWARDS, room // 3))
    return Budget(rewards=rewards, slots=max(2, min(MOST_SLOTS, room - 2 * rewards)))


def view(look: Look, width: int, height: int = UNBOUNDED, trouble: str = "") -> Group:
    """Return the whole screen.

    Args:
        look: the newest one.
        width, height: of the terminal, in characters and lines.
        trouble: why the run directory could not be read since.
    """
    rows = budget(height)
    lines = [
        Text(headline(look), style="bold"), _sign_of_life(look), *alert_lines(look), *([Text(clean(trouble), style="red")] if trouble else []),
        *_rewards(look, width, rows.rewards), *_evaluations(look, width, rows.rewards), *_pipeline(look), *_fleet(look, width, rows.slots),
    ]  # fmt: skip
    if look.num_unread:
        lines.append(Text(f"{look.num_unread:,} older updates are still to be read", style="dim"))
    return Group(*lines)


def clean(text: str) -> str:
    """A text of the run without control characters: what a scorer or a host is called cannot move the cursor."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def number(value: float) -> str:
    """Three decimals, or three significant digits when it is small or large: 0.625, -0.0076, 1.28e+04."""
    return f"{value:.3f}" if 0.05 <= abs(value) < 1000 or value == 0 else f"{value:.3g}"


def span(seconds: float) -> str:
    """Seconds as people say them: 42 s, 6m12s, 3h07m."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = int(seconds // 60)
    return f"{minutes}m{int(seconds % 60):02d}s" if minutes < 90 else f"{minutes // 60}h{minutes % 60:02d}m"


def sparkline(values: Sequence[float], width: int) -> str:
    """Values from left to right as blocks of eight heights between the least and the largest; more values than `width` are averaged."""
    if len(values) > width:
        cuts = [len(values) * index // width for index in range(width + 1)]
        values = [sum(values[low:high]) / (high - low) for low, high in pairwise(cuts)]
    if not values:
        return ""
    low, high = min(values), max(values)
    if high == low:
        return BLOCKS[3] * len(values)
    return "".join(BLOCKS[min(7, int(8 * (value - low) / (high - low)))] for value in values)


def headline(look: Look) -> str:
    """Run, state, start, update, version, time left."""
    done = look.history.updates[-1].update if look.history.updates else 0
    parts = [look.history.name, state_words(look), f"incarnation {look.claim.incarnation}", f"update {done}/{look.num_updates}"]
    if look.status is not None and look.status.version >= 0:
        parts.append(f"version {look.status.version}")
    left = seconds_left(look)
    if left is not None:
        parts.append(f"ETA {span(left)}")
    return clean(" · ".join(parts))


def state_words(look: Look) -> str:
    """starting, running, done, or stopped with the reason."""
    if look.status is None or look.is_starting:
        return "starting"
    if look.status.state == "stopped":
        return f"stopped: {look.status.reason or 'no reason was told'}"
    return look.status.state


def seconds_left(look: Look) -> float | None:
    """Seconds until the last update or the time limit, from the pace of this start's last updates; None while it cannot be told."""
    if look.is_starting or look.is_over or look.is_silent:
        return None
    own = [record for record in look.history.updates if record.incarnation == look.claim.incarnation][-RECENT_UPDATES - 1 :]
    if len(own) < 2:
        return None
    pace = (own[-1].time_unix - own[0].time_unix) / (own[-1].update - own[0].update)
    left = max(0.0, pace) * max(0, look.num_updates - own[-1].update)
    return left if look.time_is_up_at is None else min(left, max(0.0, look.time_is_up_at - own[-1].time_unix))


def silence_words(look: Look) -> str:
    """The verdict on a status.json that nobody writes."""
    return (
        f"nobody writes status.json any more: it says running and is {span(look.silent_s)} old; look at the job's log, or start the same train "
        "command again"
    )


def _sign_of_life(look: Look) -> Text:
    if look.status is None or look.is_starting:
        return Text(
            f"incarnation {look.claim.incarnation} was started {look.claim.started_at} and has not begun to work yet", style="yellow"
        )
    if look.is_silent:
        return Text(silence_words(look), style="bold red")
    return Text(f"status.json: {span(look.silent_s)} old, by process {look.status.process_id} on {clean(look.status.host)}", style="dim")


def alert_lines(look: Look) -> list[Text]:
    """The alerts that stand, each once, in red."""
    told = dict.fromkeys(look.status.alerts if look.status is not None else ())
    return [Text(f"ALERT {clean(sentence)}", style="bold red") for sentence in told]


def reward_names(look: Look) -> list[str]:
    """The rewards that have scores, in the recipe's order."""
    listed = [str(reward["name"]) for reward in look.claim.config.get("reward", ())]
    scored = {name for record in look.history.updates for name in record.rewards}
    return [*(name for name in listed if name in scored), *sorted(scored - set(listed))]


def _label(name: str, width: int) -> str:
    name = clean(name)
    return name if len(name) <= width else f"{name[: width - 1]}…"


def _rewards(look: Look, width: int, rows: int) -> list[Text]:
    """A sparkline a reward."""
    names = reward_names(look)
    if not names:
        return [Text("rewards: no update has ended yet")]
    name_width = min(max(len("reward"), *(len(name) for name in names)), _WIDEST_NAME, width // 4)
    room = max(6, width - name_width - 40)
    length = min(room, max(len("mean by update"), len(look.history.updates)))
    lines = [Text(f"{'reward':<{name_width}}  {'mean by update':<{length}.{length}}  {'first':>8} {'last':>8} {'best':>8}", style="dim")]
    for name in names[:rows]:
        points = [(record.update, summary.mean) for record in look.history.updates if (summary := record.rewards.get(name)) is not None]
        known = [(update, mean) for update, mean in points if mean is not None]
        if not known:
            lines.append(Text(f"{_label(name, name_width):<{name_width}}  nothing was scored", style="red"))
            continue
        best_update, best = max(known, key=lambda point: point[1])
        line = Text(f"{_label(name, name_width):<{name_width}}  ")
        line.append(f"{sparkline([mean for _, mean in known], length):<{length}}", style="cyan")
        line.append(f"  {number(known[0][1]):>8} {number(known[-1][1]):>8} {number(best):>8} at {best_update}")
        lines.append(line + _coverage(look.history.updates[-1], name))
    return [*lines, *_more(len(names) - rows)]


def _coverage(newest: UpdateRecord, name: str) -> Text:
    summary = newest.rewards.get(name)
    if summary is None or summary.coverage >= LOW_COVERAGE:
        return Text("")
    return Text(f" scored {summary.coverage:.0%}", style="red")


def _more(count: int, words: str = "") -> list[Text]:
    return [Text(f"... and {count} more{words}", style="dim")] if count > 0 else []


def _evaluations(look: Look, width: int, rows: int) -> list[Text]:
    """The frozen evaluation: base, newest, best."""
    records = look.history.evaluations
    if not records:
        return [Text("frozen evaluation: none is on file yet")]
    base, newest = look.history.base, records[-1]
    judged = {name for record in records for name in record.rewards}
    names = [*(name for name in reward_names(look) if name in judged), *sorted(judged - set(reward_names(look)))]
    name_width = min(max(len("reward"), *(len(name) for name in names)), _WIDEST_NAME, width // 4)
    lines = [
        Text(f"frozen evaluation of version {newest.version} ({clean(newest.snapshot)}, protocol {clean(newest.digest)})"),
        Text(f"{'reward':<{name_width}}  {'base':>7} {'newest':>7} {'change':>7} {'best':>7}", style="dim"),
    ]
    for name in names[:rows]:
        before, after = mean_of(base, name), mean_of(newest, name)
        change = "" if before is None or after is None or newest.version == 0 else f"{after - before:+.3f}"
        scored = [(record.version, mean) for record in records if (mean := mean_of(record, name)) is not None]
        version, best = max(scored, key=lambda point: point[1]) if scored else (0, None)
        cells = f"{_cell(before):>7} {_cell(after):>7} {change:>7} {_cell(best):>7}"
        lines.append(Text(f"{_label(name, name_width):<{name_width}}  {cells} at v{version}"))
    return [*lines, *_more(len(names) - rows)]


def mean_of(record: EvaluationRecord | None, name: str) -> float | None:
    """A reward's mean in an evaluation; None where there is none."""
    return record.rewards[name].mean if record is not None and name in record.rewards else None


def _cell(value: float | None) -> str:
    return "-" if value is None else number(value)


def who_waits(look: Look) -> str:
    """Who waits, from the learner's seconds of the last updates and the groups that lie about."""
    firsts: dict[int, int] = {}  # the first update of a start waits for everything to start
    for record in look.history.updates:
        firsts.setdefault(record.incarnation, record.update)
    recent = [record for record in look.history.updates[-RECENT_UPDATES:] if record.update != firsts[record.incarnation]]
    total = sum(sum(record.seconds.values()) for record in recent)
    if total <= 0:
        return waiting_sentence({})
    share = sum(record.seconds.get("wait", 0.0) for record in recent) / total
    if share < WAITS_LONG:
        return f"learner waits {share:.0%}: it is the busiest role, more rollout workers would help little"
    counts: Mapping[str, int] = look.status.counts if look.status is not None else {}
    scores_are_late = counts.get("generated", 0) > counts.get("leased", 0)  # images lie unscored, and hardly anybody samples
    return waiting_sentence({"learner": share, "rollout": 1.0 if scores_are_late else 0.0, "reward": 0.0})


def _pipeline(look: Look) -> list[Text]:
    """Who waits, groups by state, staleness, drops."""
    lines = [Text(f"who waits: {who_waits(look)}")]
    if look.status is not None and look.status.counts:
        counts = {str(name): count for name, count in look.status.counts.items()}
        issued = counts.pop("issued", 0)
        states = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
        lines.append(Text(f"groups: {issued} issued ({states or 'none held'})"))
    if look.history.updates:
        newest = look.history.updates[-1]
        ages = ", ".join(f"{count} stale by {age}" if age else f"{count} fresh" for age, count in sorted(newest.staleness.items()))
        lines.append(Text(f"staleness in updates, groups of update {newest.update}: {ages or 'none'}"))
    dropped = [record for record in look.history.updates if record.drops]
    for record in reversed(dropped[-MOST_LINES:]):
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(record.drops.items()))
        lines.append(Text(f"dropped before update {record.update}: {clean(reasons)}", style="yellow"))
    return lines


def _fleet(look: Look, width: int, rows: int) -> list[Text]:
    """Slots with their state, those in trouble first; then the last decisions."""
    if look.status is None or look.is_starting or not look.status.fleet.slots:
        return []
    slots = sorted(look.status.fleet.slots.items(), key=lambda item: (not _is_ill(item[1]), _natural(item[0])))
    name_width = min(max(len("worker"), *(len(name) for name, _ in slots)), _WIDEST_NAME, width // 3)
    lines = [Text(f"{'worker':<{name_width}}  {'state':<9}  {'crashes':>7}  host", style="dim")]
    for name, slot in slots[:rows]:
        text = f"{_label(name, name_width):<{name_width}}  {clean(slot.state):<9}  {slot.crashes:>7}  {_label(slot.host or '-', 24)}"
        lines.append(Text(text, style="yellow" if _is_ill(slot) else ""))
    states = [slot.state for _, slot in slots[rows:]]
    words = ", ".join(f"{states.count(state)} {clean(state)}" for state in sorted(set(states)))
    lines += _more(len(states), f" ({words})")
    return [*lines, *(Text(clean(sentence), style="dim") for sentence in look.status.fleet.decisions[-MOST_LINES:])]


def _is_ill(slot: SlotReport) -> bool:
    return slot.crashes > 0 or slot.state != "running"


def _natural(slot: str) -> tuple[str, int]:
    """rollout.2 before rollout.10."""
    pool, _, index = slot.rpartition(".")
    return (pool, int(index)) if index.isdigit() else (slot, 0)
