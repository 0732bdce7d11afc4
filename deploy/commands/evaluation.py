"""`flowfleet eval|preview`. What loads torch is imported by the command."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

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
    target: Annotated[str, typer.Argument(help="a run directory, or a model directory (needs --recipe)")],
    *,
    recipe: Annotated[str | None, typer.Option(help="the recipe whose protocol and rewards judge; a run's own by default")] = None,
    prompts: Annotated[str | None, typer.Option(help="another prompt file than the protocol's")] = None,
    snapshot: Annotated[
        SnapshotChoice | None, typer.Option(help="weights; default: the protocol's (a model directory has base only)")
    ] = None,
    sets: SetOption = None,
    out: Annotated[Path | None, typer.Option(help="write the result as JSON too")] = None,
) -> None:
    """Evaluate under the frozen protocol: ODE, fixed steps and seeds, printed with the numbers."""
    from deploy.evaluate import EvaluationRequest, evaluate

    console = Console()
    request = EvaluationRequest(
        target=target,
        recipe=recipe,
        prompts=prompts,
        snapshot=None if snapshot is None else snapshot.value,
        sets=tuple(sets or ()),
        out=out,
    )
    result = evaluate(request, console)
    protocol = result["protocol"]
    console.print(
        f"protocol {result['digest_of_protocol']}: ODE, {protocol['num_steps']} steps, guidance {protocol['guidance_scale']:g}, seed {protocol['seed']}, "
        f"{protocol['num_prompts']} prompts (sha256 {protocol['prompts_digest'][:12]}), snapshot {result['snapshot']}, version {result['version']}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    table = Table("reward", "task", "images", "mean")
    for name, entry in result["rewards"].items():
        table.add_row(name, "mean over tasks", "", "none" if entry["mean"] is None else f"{entry['mean']:.4f}")
        for tag, task in entry["tasks"].items():
            table.add_row("", tag, str(task["n"]), f"{task['mean']:.4f}")
    console.print(table)


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
