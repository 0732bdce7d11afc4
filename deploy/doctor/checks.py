"""`flowfleet doctor`: what this machine can run, one row a check, each with a deadline."""

import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Final

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from common.errors import FlowfleetError
from reward_servers.guarded import SCORER_FAILURES

FAILURES: Final = (FlowfleetError, ImportError, *SCORER_FAILURES)
"""What a check may raise: its row then fails with that text."""


class Status(StrEnum):
    """How a check went."""

    OK = "pass"
    SKIP = "skip"  # could not be looked at here; the row says why
    WARN = "warn"  # works, or is not needed by this recipe
    FAIL = "fail"  # a run would stop


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One finding."""

    status: Status
    what: str
    found: str
    rule: str
    remedy: str = ""  # empty where nothing is to be done
    details: tuple[str, ...] = ()  # lines below the table: every offending line of a prompt file


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing to look at."""

    what: str
    rule: str
    remedy: str  # of a look that raises or does not come back
    look: Callable[[], Sequence[Row]]
    deadline_s: float = 20.0
    is_needed: bool = True  # False: what goes wrong is a warning


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """Makes the rows of one thing: what and rule stand once."""

    what: str
    rule: str

    def ok(self, found: str) -> Row:
        """As it should be."""
        return Row(status=Status.OK, what=self.what, found=found, rule=self.rule)

    def skip(self, found: str) -> Row:
        """Not looked at, and why."""
        return Row(status=Status.SKIP, what=self.what, found=found, rule=self.rule)

    def warn(self, found: str, remedy: str) -> Row:
        """Worth a look."""
        return Row(status=Status.WARN, what=self.what, found=found, rule=self.rule, remedy=remedy)

    def fail(self, found: str, remedy: str, details: tuple[str, ...] = ()) -> Row:
        """A run would stop."""
        return Row(status=Status.FAIL, what=self.what, found=found, rule=self.rule, remedy=remedy, details=details)


def run_check(check: Check, patience: float = 1.0) -> list[Row]:
    """Return a check's rows; one bad row when it raises, or does not come back within `patience` deadlines (its thread is left behind)."""
    deadline_s = check.deadline_s * patience
    rows: list[Row] = []
    bench = Bench(what=check.what, rule=check.rule)
    blame = bench.fail if check.is_needed else bench.warn

    def body() -> None:
        try:
            found = list(check.look())
        except FAILURES as error:
            found = [blame(str(error) if isinstance(error, FlowfleetError) else f"{type(error).__name__}: {error}", check.remedy)]
        rows.extend(found)

    thread = threading.Thread(target=body, daemon=True, name=f"doctor-{check.what}")
    thread.start()
    thread.join(deadline_s)
    if thread.is_alive():
        return [blame(f"no answer within {deadline_s:g} s; on a busy machine pass --patience 5", check.remedy)]
    return rows


def run_checks(checks: Sequence[Check], console: Console, patience: float = 1.0) -> list[Row]:
    """Run the checks one after another, each within `patience` times its deadline."""
    rows: list[Row] = []
    for check in checks:
        with console.status(f"looking at {check.what}"):
            rows += run_check(check, patience)
    return rows


def show(rows: Sequence[Row], console: Console) -> None:
    """Print the table, then the details, then a sum."""
    table = Table("", *(Column(name, overflow="fold") for name in ("what", "found", "rule", "remedy")))
    styles = {Status.OK: "green", Status.SKIP: "dim", Status.WARN: "yellow", Status.FAIL: "bold red"}
    for row in rows:
        mark = Text(row.status.value, style=styles[row.status])
        table.add_row(mark, Text(row.what), Text(row.found), Text(row.rule, style="dim"), Text(row.remedy))
    console.print(table)
    for row in rows:
        for line in row.details:
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(", ".join(f"{count} {status}" for status, count in counted(rows).items()), highlight=False)


def counted(rows: Sequence[Row]) -> dict[str, int]:
    """How many rows of each status."""
    return {status.value: sum(row.status is status for row in rows) for status in Status}


def as_json(rows: Sequence[Row]) -> str:
    """The rows for machines: {"schema", "failed", "counts", "rows": [{"status", "what", "found", "rule", "remedy", "details"}]}.

    Keys and the four statuses are stable; `what` names a check and is stable, too; the texts are for people.
    """
    table = {"schema": "doctor/1", "failed": has_failed(rows), "counts": counted(rows), "rows": [asdict(row) for row in rows]}
    return json.dumps(table, indent=1, ensure_ascii=False) + "\n"


def has_failed(rows: Sequence[Row]) -> bool:
    """Whether a run would stop."""
    return any(row.status is Status.FAIL for row in rows)
