"""The live line: reward, flat groups, KL, clip fraction, images/s, staleness, time left, and who waits."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

PLAIN_INTERVAL_S = 10.0


def waiting_sentence(shares: Mapping[str, float]) -> str:
    """Name the role that waits most and the remedy.

    Args:
        shares: share of recent time that each role spent waiting, in [0, 1]: "rollout", "reward", "learner".
    """
    if not shares:
        return "starting"
    learner, rollout, reward = (shares.get(role, 0.0) for role in ("learner", "rollout", "reward"))
    if learner >= 0.25:
        if rollout >= 0.25 and rollout > reward:
            return f"learner waits {learner:.0%} for scores: add reward servers"
        return f"learner waits {learner:.0%} for rollouts: add rollout workers"
    if rollout >= 0.25:
        return f"rollout waits {rollout:.0%} for the learner: more rollout workers cannot help"
    return "balanced: nobody waits for long"


@dataclass(slots=True)
class LiveLine:
    """One line on a terminal, plain lines elsewhere; `update` is called with the Coordinator's summary."""

    console: Console
    num_updates: int
    time_limit_s: float | None = None  # of this start
    started: float = field(default_factory=time.monotonic)
    _last_plain: float = 0.0
    _last_update: int = -1
    _live: Live | None = None

    def __enter__(self) -> "LiveLine":
        if self.console.is_terminal:
            self._live = Live(console=self.console, refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, summary: Mapping[str, Any]) -> None:
        """Show the newest summary."""
        line = format_line(summary, self.num_updates, time.monotonic() - self.started, self.time_limit_s)
        if self._live is not None:
            self._live.update(Text(line))
            return
        done, now = int(summary.get("update", 0)), time.monotonic()
        due = done != self._last_update and now - self._last_plain >= PLAIN_INTERVAL_S
        if due or self._last_plain == 0.0:
            self._last_plain, self._last_update = now, done
            self.console.print(line, highlight=False, soft_wrap=True)


def format_line(summary: Mapping[str, Any], num_updates: int, elapsed_s: float, time_limit_s: float | None = None) -> str:
    """The live line's text; figures that do not exist yet are left out."""
    done = int(summary.get("update", 0))
    parts = [f"update {done}/{num_updates}"]
    metrics: Mapping[str, float] = summary.get("metrics", {})
    named = [
        ("reward", "reward", "{:.3f}"), ("flat_group_share", "flat", "{:.0%}"), ("kl", "KL", "{:.2e}"), ("clip_fraction", "clip", "{:.1%}"),
        ("images_per_s", "images/s", "{:.1f}"), ("staleness", "staleness", "{:.1f}"),
    ]  # fmt: skip
    parts += [f"{label} {form.format(metrics[key])}" for key, label, form in named if key in metrics]
    if summary.get("evaluation"):
        parts.append(f"eval {summary['evaluation']}")
    alerted = dict.fromkeys(summary.get("alerts", ()))
    if alerted:
        parts.append(f"ALERT {', '.join(alerted)}: see `flowfleet status`")
    first = int(summary.get("first_update", 0))
    if done > first:
        left = elapsed_s / (done - first) * (num_updates - done)
        if time_limit_s is not None:
            left = min(left, max(0.0, time_limit_s - elapsed_s))
        parts.append(f"ETA {int(left // 60)}m{int(left % 60):02d}s")
    parts.append(waiting_sentence(summary.get("waiting", {})))
    return " · ".join(parts)
