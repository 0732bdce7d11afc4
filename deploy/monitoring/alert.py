"""One alert rule as data, from which the Prometheus rule and the row of docs/observability.md are written."""

import inspect
from dataclasses import dataclass
from typing import Final, Literal

Area = Literal["learning", "pipeline", "rewards", "fleet", "store", "target"]
Severity = Literal["critical", "warning", "info"]
"""critical: the run is wrong or about to end; warning: it loses time or quality; info: it goes on well, only slower than it could."""
PAGE: Final = "docs/observability.md"


@dataclass(frozen=True, slots=True, kw_only=True)
class Alert:
    """An alert rule and what to do about it."""

    name: str  # Flowfleet...
    area: Area
    severity: Severity
    expr: str  # PromQL; what it returns keeps the label run
    hold: str = "0s"  # Prometheus' `for`: how long expr must hold
    hold_reason: str
    summary: str  # one line, with Prometheus' templates
    when: str  # the condition in words, with its numbers
    means: str  # one or two sentences
    remedy: str  # commands; RUN is the run directory

    @property
    def description(self) -> str:
        """What it means and what to do."""
        return f"{self.means} {self.remedy}"

    @property
    def anchor(self) -> str:
        """Where docs/observability.md tells of it."""
        return f"{PAGE}#{self.name.lower()}"


def promql(text: str) -> str:
    """An expression as it is written over several lines, without the indentation of the code around it."""
    return inspect.cleandoc(text)
