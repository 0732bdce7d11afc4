"""`flowfleet doctor`. What loads torch or scorers is imported by the command."""

import os
from typing import Annotated

import typer
from rich.console import Console

from common.errors import UserError
from deploy.commands.training import RunDirOption, SetOption
from deploy.config import RunConfig, load_config


def doctor(
    recipe: Annotated[
        str | None, typer.Argument(help="a recipe of `flowfleet recipes ls`, or a TOML file; none: the machine alone")
    ] = None,
    *,
    sets: SetOption = None,
    run_dir: RunDirOption = None,
    address: Annotated[
        str | None, typer.Option(help="a Ray cluster to join; default: one is started on trial", envvar="RAY_ADDRESS")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="do not start Ray on trial (10 s)")] = False,
    patience: Annotated[float, typer.Option(help="multiplies every check's deadline, for a busy machine", min=0.1)] = 1.0,
) -> None:
    """Say what can run here, row by row, with the remedy for what cannot; exits with 1 when a run would stop."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # the doctor downloads nothing; read at the library's import, so before it
    from deploy.doctor import Bench, has_failed, run_checks, show
    from deploy.doctor_machine import machine_checks
    from deploy.doctor_recipe import optional_checks, recipe_checks
    from deploy.reward_card import known_cards

    console = Console()
    config: RunConfig | None = None
    rows = []
    if recipe is not None:
        bench = Bench(what="recipe", rule="every key is known, the sections agree")
        try:
            config = load_config(recipe, sets or [])
            rows.append(bench.ok(f"{recipe}: {len(config.reward)} reward(s)"))
        except UserError as error:
            rows.append(bench.fail(str(error), "mend the key that is named"))
    checks = machine_checks(config, run_dir, address, starts_ray=not quick)
    checks += recipe_checks(config) if config is not None else optional_checks(known_cards())
    rows += run_checks(checks, console, patience)
    show(rows, console)
    if has_failed(rows):
        raise typer.Exit(1)


def register(app: typer.Typer) -> None:
    """Put this command under the command line."""
    app.command("doctor")(doctor)
