"""`flowfleet eval|preview`. What loads torch is imported by the command."""

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from deploy.commands.training import RecipeArgument, SetOption
from deploy.config import load_config


class SnapshotChoice(StrEnum):
    """Which weights are evaluated."""

    EMA = "ema"
    LIVE = "live"
    BASE = "base"


def eval_command(
    target: Annotated[
        str, typer.Argument(help="a run directory, an exported LoRA (peft, diffusers or kohya) or a base model (both need --recipe)")
    ],
    *,
    recipe: Annotated[str | None, typer.Option(help="the recipe whose protocol and rewards judge; a run's own by default")] = None,
    prompts: Annotated[str | None, typer.Option(help="another prompt file: jsonl, GenEval's metadata jsonl, or txt")] = None,
    snapshot: Annotated[SnapshotChoice | None, typer.Option(help="weights of a run; default: the protocol's")] = None,
    version: Annotated[int | None, typer.Option(help="of a run; default: the newest that is kept")] = None,
    sets: SetOption = None,
    out: Annotated[Path | None, typer.Option(help="write the result as JSON too")] = None,
) -> None:
    """Evaluate under the frozen protocol: ODE, fixed steps and seeds, printed with the numbers."""
    from deploy.evaluate import EvaluationRequest, evaluate

    request = EvaluationRequest(
        target=target,
        recipe=recipe,
        prompts=prompts,
        snapshot=None if snapshot is None else snapshot.value,
        version=version,
        sets=tuple(sets or ()),
        out=out,
    )
    console = Console()
    show_evaluation(evaluate(request, console), console)


def show_evaluation(result: Mapping[str, Any], console: Console) -> None:
    """Print an evaluation: what was judged, the protocol, and a line a task with its interval."""
    from deploy.report.bootstrap import METHOD
    from deploy.report.eval_table import describe_protocol, eval_lines

    subject = result["subject"]
    console.print(_subject_line(subject), highlight=False, soft_wrap=True, markup=False)
    console.print(describe_protocol(result["protocol"], result["protocol_digest"]), highlight=False, soft_wrap=True, markup=False)
    table = Table("reward", "task", "prompts", "images", "mean", "95 % interval")
    previous = ""
    for line in eval_lines(result):
        interval = "" if line.low is None or line.high is None else f"{line.low:.4f} .. {line.high:.4f}"
        mean = "none" if line.mean is None else f"{line.mean:.4f}"
        name = "" if line.reward == previous else line.reward
        previous = line.reward
        cells = (name, line.task or "all", str(line.num_prompts), str(line.num_images), mean, interval)
        table.add_row(*cells, style="bold" if line.is_mean else None)
    console.print(table)
    for name, entry in result["rewards"].items():
        if entry["coverage"] < 1:
            console.print(
                f"{name}: only {entry['coverage']:.1%} of its images were scored; the others count nowhere", style="yellow", markup=False
            )
    console.print(f"intervals: {METHOD}", highlight=False, soft_wrap=True, markup=False)


def _subject_line(subject: Mapping[str, Any]) -> str:
    if subject["kind"] == "base":
        return f"{subject['name']}: the base model, no adapter"
    return f"{subject['name']}: {subject['num_modules']} LoRA modules bound, they change the velocity by {subject['canary']:.2%} on the fixed input"


def preview_command(
    recipe: RecipeArgument,
    sets: SetOption = None,
    groups: Annotated[int, typer.Option(help="prompts to draw", min=1)] = 6,
    out: Annotated[Path, typer.Option(help="the page to write")] = Path("preview.html"),
) -> None:
    """Draw ODE beside SDE images and the rewards' spread inside groups, before any training."""
    from deploy.preview import preview

    path = preview(load_config(recipe, sets or []), groups, out)
    Console().print(f"preview: {path}", highlight=False)


def register(app: typer.Typer) -> None:
    """Put these commands under the command line."""
    app.command("eval")(eval_command)
    app.command("preview")(preview_command)
