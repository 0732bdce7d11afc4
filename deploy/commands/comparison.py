"""`flowfleet compare`. What loads torch or matplotlib is imported by the command."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from deploy.commands.evaluation import SnapshotChoice
from deploy.commands.training import SetOption

if TYPE_CHECKING:
    from deploy.report.compare_page import Comparison, PairTable


def compare_command(
    first: Annotated[str, typer.Argument(metavar="A", help="a run, an exported LoRA or a base model directory")],
    second: Annotated[str, typer.Argument(metavar="B", help="the same; it is held against A")],
    *,
    recipe: Annotated[str | None, typer.Option(help="whose base, protocol and rewards judge; default: A's run's, else B's")] = None,
    prompts: Annotated[str | None, typer.Option(help="another prompt file: jsonl, GenEval's metadata jsonl, or txt")] = None,
    snapshot: Annotated[SnapshotChoice | None, typer.Option(help="weights of runs; default: the protocol's")] = None,
    version_a: Annotated[int | None, typer.Option(help="of run A; default: the newest that is kept")] = None,
    version_b: Annotated[int | None, typer.Option(help="of run B")] = None,
    sets: SetOption = None,
    out: Annotated[Path, typer.Option(help="the page to write")] = Path("compare.html"),
) -> None:
    """Base, A and B side by side on the same prompts and seeds, sorted by where B loses; one page that opens offline."""
    from deploy.compare import CompareRequest, compare
    from deploy.subjects import JudgeOptions

    judge = JudgeOptions(recipe=recipe, prompts=prompts, snapshot=None if snapshot is None else snapshot.value, sets=tuple(sets or ()))
    request = CompareRequest(first=first, second=second, judge=judge, first_version=version_a, second_version=version_b, out=out)
    console = Console()
    show_comparison(compare(request, console), console)
    console.print(f"page: {out}", highlight=False, soft_wrap=True)


def show_comparison(comparison: "Comparison", console: Console) -> None:
    """Print B against A, and the method of the intervals."""
    from deploy.report.bootstrap import METHOD

    for side in comparison.sides:
        console.print(f"{side.letter}: {side.name}, {side.origin}", highlight=False, soft_wrap=True, markup=False)
    for name in comparison.rewards:
        console.print(_table(name, comparison.main))
    console.print(f"intervals: {METHOD}; paired; a tie is half a win", highlight=False, soft_wrap=True, markup=False)


def _table(reward: str, pairs: "PairTable") -> Table:
    table = Table("task", "n", "A", "B", "B - A, 95 % interval", "win rate of B", title=f"{reward}: B against A", box=SIMPLE_HEAD)
    for _, pair in pairs.lines:
        row, rate = pair.row, pair.win_rate
        change = f"{row.difference:+.3f}, {row.low:+.3f} to {row.high:+.3f}"
        often = f"{rate.value:.1%}, {rate.low:.1%} to {rate.high:.1%}"
        if row.reward == reward:
            cells = (row.task or "all", str(row.n), f"{row.before:.3f}", f"{row.after:.3f}", change, often)
            table.add_row(*cells, style="bold" if row.is_mean else None)
    return table


def register(app: typer.Typer) -> None:
    """Put this command under the command line."""
    app.command("compare")(compare_command)
