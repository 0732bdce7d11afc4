"""`flowfleet recipes ls|show|cp`, `flowfleet reward ls|test`."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from common.config import read_toml
from common.errors import UserError
from common.prompts import check_prompts, read_prompts
from deploy.config import recipe_names, recipe_path, shipped_path
from reward_servers.registry import list_scorers, make_scorer
from reward_servers.testing import test_scorer

NameArgument = Annotated[str, typer.Argument(help="a name of the list")]


def recipes_ls() -> None:
    """List the shipped recipes."""
    table = Table("recipe", "what it does")
    for name in recipe_names():
        table.add_row(name, str(read_toml(recipe_path(name)).get("run", {}).get("about", "")))
    Console().print(table)


def recipes_show(name: NameArgument) -> None:
    """Print a recipe."""
    Console().print(recipe_path(name).read_text(encoding="utf-8"), highlight=False, markup=False)


def recipes_cp(name: NameArgument, to: Annotated[Path | None, typer.Argument(help="file to write; default NAME.toml here")] = None) -> None:
    """Copy a recipe to a file of your own."""
    target = to or Path(f"{name}.toml")
    if target.exists():
        raise UserError(f"recipes cp: {target} exists and is not overwritten; name another file")
    target.write_text(recipe_path(name).read_text(encoding="utf-8"), encoding="utf-8")
    Console().print(f"wrote {target}; start it with: flowfleet train {target}")


def reward_ls() -> None:
    """List the rewards."""
    table = Table("reward", "range", "licence", "what it measures", "source")
    for row in list_scorers():
        table.add_row(row.name, row.range, row.licence, row.description, row.source)
    Console().print(table)


def reward_test(
    name: NameArgument,
    prompts: Annotated[Path, typer.Option(help="prompt file (jsonl or txt)")],
    images: Annotated[Path, typer.Option(help="directory of images, named by prompt id or in prompt order")],
    options: Annotated[str, typer.Option(help="the scorer's options as JSON")] = "{}",
    show: Annotated[int, typer.Option(help="how many rows to print")] = 10,
) -> None:
    """Score a directory of images; exits with 1 when a score is missing or not finite."""
    parsed: dict[str, Any] = json.loads(options)
    given = read_prompts(shipped_path(str(prompts)))
    scorer = make_scorer(name, parsed)
    check_prompts(given, [scorer], str(prompts))
    outcome = test_scorer(name, parsed, images, given)
    console = Console()
    table = Table("prompt", "text", "score", "error")
    for row in outcome.rows[:show]:
        table.add_row(row.prompt_id, row.text[:60], "null" if row.value is None else f"{row.value:.4f}", row.error)
    console.print(table)
    mean = "none" if outcome.mean is None else f"{outcome.mean:.4f}"
    scored = len(outcome.rows) - outcome.num_nulls
    console.print(f"{name}: {scored} of {len(outcome.rows)} scored, mean {mean}, {outcome.images_per_s:.1f} images/s")
    if outcome.num_nulls or outcome.has_non_finite:
        raise typer.Exit(1)


def register(app: typer.Typer, recipes_app: typer.Typer, reward_app: typer.Typer) -> None:
    """Put these commands under the command line."""
    del app
    recipes_app.command("ls")(recipes_ls)
    recipes_app.command("show")(recipes_show)
    recipes_app.command("cp")(recipes_cp)
    reward_app.command("ls")(reward_ls)
    reward_app.command("test")(reward_test)
