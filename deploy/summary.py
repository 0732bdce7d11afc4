"""What a command prints at its end: the before/after table and where the report is."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from common.store.run_store import RunStore
from deploy.report.compare import TableRow, run_table
from deploy.report.page import write_report
from deploy.report.reader import read_history


def results_table(rows: list[TableRow]) -> Table:
    """The frozen evaluation before and after, a row a task."""
    table = Table("reward", "task", "prompts", "base", "tuned", "difference", "95 % interval")
    for row in rows:
        table.add_row(
            row.reward, row.task, str(row.n), f"{row.before:.3f}", f"{row.after:.3f}", f"{row.difference:+.3f}",
            f"{row.low:+.3f} .. {row.high:+.3f}",
        )  # fmt: skip
    return table


def show_results(store: RunStore, console: Console) -> list[TableRow]:
    """Write report.html, print the table and the report's path; return the table."""
    rows = run_table(read_history(store))
    if rows:
        console.print(results_table(rows))
    path = write_report(store, report_path(store))
    console.print(f"report: {path}", highlight=False, soft_wrap=True)
    return rows


def report_path(store: RunStore) -> Path:
    """reports/report.html of a local run; of a remote one, report.html here."""
    root = store.local_root
    return (root / "reports" / "report.html") if root is not None else Path("report.html")
