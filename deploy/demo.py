"""The demo's verdict: did the frozen evaluation rise?"""

from rich.console import Console

from common.store.run_store import RunStore
from deploy.report.compare import TableRow
from deploy.summary import show_results


def conclude_demo(store: RunStore, console: Console) -> bool:
    """Print the before/after table and the report's path; whether every evaluated reward's mean rose."""
    rows = show_results(store, console)
    means = [row for row in rows if row.is_mean]
    for row in means:
        console.print(verdict(row), highlight=False)
    return bool(means) and all(row.difference > 0 for row in means)


def verdict(row: TableRow) -> str:
    """One sentence on a reward's mean."""
    word = "rose" if row.difference > 0 else "did not rise"
    return (
        f"frozen {row.reward} {word}: {row.before:.3f} -> {row.after:.3f} ({row.difference:+.3f}, 95 % {row.low:+.3f} .. {row.high:+.3f})"
    )
