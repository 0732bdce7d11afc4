"""`flowfleet doctor` and `flowfleet bundle`. What loads torch or scorers is imported by the command."""

import os
from pathlib import Path
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
    as_json: Annotated[bool, typer.Option("--json", help="the rows as JSON on standard output, for machines")] = False,
) -> None:
    """Say what can run here, row by row, with the remedy for what cannot; exits with 1 when a run would stop."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # the doctor downloads nothing; read at the library's import, so before it
    from deploy.doctor import checks as rows_of
    from deploy.doctor.machine import machine_checks
    from deploy.doctor.recipe import optional_checks, recipe_checks
    from deploy.reward_card import known_cards

    console = Console(stderr=as_json)
    config: RunConfig | None = None
    rows = []
    if recipe is not None:
        bench = rows_of.Bench(what="recipe", rule="every key is known, the sections agree")
        try:
            config = load_config(recipe, sets or [])
            rows.append(bench.ok(f"{recipe}: {len(config.reward)} reward(s)"))
        except UserError as error:
            rows.append(bench.fail(str(error), "mend the key that is named"))
    checks = machine_checks(config, run_dir, address, starts_ray=not quick)
    checks += recipe_checks(config) if config is not None else optional_checks(known_cards())
    rows += rows_of.run_checks(checks, console, patience)
    if as_json:
        typer.echo(rows_of.as_json(rows), nl=False)
    else:
        rows_of.show(rows, console)
    if rows_of.has_failed(rows):
        raise typer.Exit(1)


def bundle(
    run: Annotated[str, typer.Argument(help="a run directory, on any store")],
    *,
    out: Annotated[Path | None, typer.Option(help="zip to write; default flowfleet-bundle-NAME.zip here")] = None,
    with_prompts: Annotated[
        bool,
        typer.Option(
            "--with-prompts/--no-prompts",
            help="prompt texts stand in run/eval/*/result.json (rows) and may stand in Ray's logs; without them rows are left out and known "
            "texts replaced",
        ),
    ] = False,
    with_names: Annotated[bool, typer.Option("--with-names", help="keep home directory, user name and host name as they are")] = False,
    audit_seconds: Annotated[float, typer.Option(help="how long the audit may take; 0 leaves it out", min=0)] = 60.0,
    ray_folder: Annotated[Path, typer.Option(help="where Ray's sessions lie")] = Path("/tmp/ray"),
) -> None:
    """Write one zip for a bug report: doctor, config, status, newest records, audit, log ends. No images, no weights; secrets are removed."""
    from deploy.bundle.bundle import BundleOptions, make_bundle
    from deploy.doctor.checks import run_checks
    from deploy.doctor.machine import machine_checks

    target = out or Path(f"flowfleet-bundle-{Path(run.rstrip('/')).name}.zip")
    if target.exists():
        raise UserError(f"bundle: {target} exists and is not overwritten; name another file with --out")
    console = Console()
    rows = run_checks([check for check in machine_checks(None, None, None, starts_ray=False) if check.what != "network"], console)
    options = BundleOptions(with_prompts=with_prompts, with_names=with_names, audit_s=audit_seconds, ray_folder=ray_folder)
    with console.status(f"reading {run}"):
        content = make_bundle(run, rows, options, os.environ)
    with os.fdopen(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as stream:
        stream.write(content)
    console.print(
        f"wrote {target} ({len(content):,} bytes); look through it before you publish it: MANIFEST.json lists what is in it and what was left out",
        highlight=False, soft_wrap=True,
    )  # fmt: skip


def register(app: typer.Typer) -> None:
    """Put these commands under the command line."""
    app.command("doctor")(doctor)
    app.command("bundle")(bundle)
