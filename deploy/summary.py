"""What a command prints at its end: the before/after table with the protocol behind it, and where the report is."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from common.store.run_store import RunStore
from deploy.report.bootstrap import METHOD
from deploy.report.compare import TableRow, run_table
from deploy.report.eval_table import describe_protocol
from deploy.report.page import write_report
from deploy.report.reader import read_history
from deploy.report.reweighting import Reweighting


def results_tables(rows: list[TableRow]) -> list[Table]:
    """The frozen evaluation before and after: a table a reward, a row a task."""
    tables: dict[str, Table] = {}
    for row in rows:
        if row.reward not in tables:
            tables[row.reward] = Table(
                "task", "prompts", "base", "tuned", "change", "95 % interval", title=f"{row.reward}, frozen evaluation"
            )
        tables[row.reward].add_row(
            row.task or "all", str(row.n), f"{row.before:.3f}", f"{row.after:.3f}", f"{row.difference:+.3f}", f"{row.low:+.3f} .. {row.high:+.3f}",
            style="bold" if row.is_mean else None,
        )  # fmt: skip
    return list(tables.values())


def show_results(store: RunStore, console: Console, reweighting: Reweighting | None = None) -> list[TableRow]:
    """Write report.html, print the table, its protocol and the report's path; return the table."""
    history = read_history(store)
    rows = run_table(history)
    for table in results_tables(rows):
        console.print(table)
    if rows and history.newest is not None:
        told = f"{describe_protocol(history.newest.protocol, history.newest.digest)}; intervals: {METHOD}, paired"
        console.print(told, highlight=False, soft_wrap=True, markup=False)
    if reweighting is not None:
        console.print(reweighting.sentence, highlight=False, soft_wrap=True)
    path = write_report(store, report_path(store), reweighting)
    console.print(f"report: {path}", highlight=False, soft_wrap=True)
    return rows


def report_path(store: RunStore) -> Path:
    """reports/report.html of a local run; of a remote one, report.html here."""
    root = store.local_root
    return (root / "reports" / "report.html") if root is not None else Path("report.html")
