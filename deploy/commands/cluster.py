"""`flowfleet submit`. What loads Ray is imported by the command."""

from typing import Annotated

import typer
from rich.console import Console

from deploy.commands.training import RecipeArgument, RunDirOption, SetOption
from deploy.config import load_config

ADDRESS = "http://127.0.0.1:8265"


def submit_command(
    recipe: RecipeArgument,
    *,
    sets: SetOption = None,
    run_dir: RunDirOption = None,
    address: Annotated[str, typer.Option(help="the cluster's dashboard", envvar="RAY_API_SERVER_ADDRESS")] = ADDRESS,
    job_id: Annotated[str | None, typer.Option(help="name of the job; default: Ray chooses one")] = None,
    upload: Annotated[bool, typer.Option(help="ship this checkout; else the cluster's own installation runs")] = True,
    wait: Annotated[bool, typer.Option(help="stream the log and end with the job's exit code")] = True,
    allow_change: Annotated[list[str] | None, typer.Option("--allow-change", help="a config key that a resume may change")] = None,
    takeover: Annotated[bool, typer.Option("--takeover", help="drive a run that another job seems to drive")] = False,
) -> None:
    """Submit a train command to a Ray cluster as a job; the same command again resumes the run."""
    from deploy.submit import connect_jobs, plan_submission, submit

    config = load_config(recipe, sets or [])
    flags = [part for key in allow_change or [] for part in ("--allow-change", key)] + (["--takeover"] if takeover else [])
    submission = plan_submission(recipe, config, run_dir=run_dir, sets=tuple(sets or ()), flags=tuple(flags), upload=upload, job_id=job_id)
    code = submit(connect_jobs(address), submission, Console(), wait=wait)
    if code:
        raise typer.Exit(code)


def register(app: typer.Typer) -> None:
    """Put the command under the command line."""
    app.command("submit")(submit_command)
