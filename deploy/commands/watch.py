"""`flowfleet watch|sink`: look at a run while it goes on, and copy its numbers elsewhere. Both need the run's files alone."""

from enum import StrEnum
from typing import Annotated, Any

import typer
from rich.console import Console

from common.errors import UserError
from common.store.run_store import RunStore
from deploy.sinks.settings import SinksSection, TensorboardSettings, WandbSettings

RunArgument = Annotated[str, typer.Argument(help="a run directory: a folder or a URL")]


class SinkName(StrEnum):
    """Where to."""

    TENSORBOARD = "tensorboard"
    WANDB = "wandb"


def watch(
    run: RunArgument,
    every: Annotated[float, typer.Option(min=0.2, help="seconds between looks")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="one look, then exit")] = False,
) -> None:
    """Watch a run from its files: rewards, evaluation, who waits, workers, drops, alerts; plain lines without a terminal.

    Ends with the run: 0 when it is done or its time is up, 1 when it stopped before (it says why). Ctrl-C leaves with 0 and does not touch the run.
    --once: 1 also when nobody writes the run's status any more.
    """
    from deploy.watch.files import RunTail
    from deploy.watch.watch import watch_once, watch_run

    store, console = RunStore(run), Console()
    code = watch_once(RunTail(store, at_once=None), console) if once else watch_run(RunTail(store), console, every)
    raise typer.Exit(code)


def sink(
    run: RunArgument,
    *,
    to: Annotated[SinkName, typer.Option(help="tensorboard or wandb")],
    directory: Annotated[str | None, typer.Option("--dir", help="where the sink's own files go")] = None,
    project: Annotated[str | None, typer.Option(help="wandb: the project")] = None,
    entity: Annotated[str | None, typer.Option(help="wandb: the team")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="wandb: write files for `wandb sync`")] = False,
) -> None:
    """Send to TensorBoard or Weights & Biases what they have not got of a run; again after more updates, only those."""
    from deploy.sinks.follow import open_follower, tensorboard_directory
    from deploy.watch.files import RunTail

    store, console = RunStore(run), Console()
    look = RunTail(store, at_once=0).look()
    section = section_of(look.claim.config.get("sinks", {}), directory=directory, project=project, entity=entity, offline=offline)
    is_running = look.status is not None and look.status.state == "running" and not look.is_silent
    if is_running and to.value in SinksSection.model_validate(look.claim.config.get("sinks", {})).enabled:
        raise UserError(f"sink: {run} runs and sends its numbers to {to.value} itself ([sinks] of its recipe); wait until it ends")
    follower = open_follower(store, to.value, section)
    try:
        sent = follower.step()
    finally:
        follower.close()
    console.print(
        f"{to.value} has update {sent.update} and {len(sent.evaluations)} evaluations of {look.history.name}",
        highlight=False,
        soft_wrap=True,
    )
    if to is SinkName.TENSORBOARD:
        where = tensorboard_directory(store, section, look.history.name)
        console.print(f"tensorboard --logdir {where}", highlight=False, markup=False, soft_wrap=True)


def section_of(recipe: dict[str, Any], *, directory: str | None, project: str | None, entity: str | None, offline: bool) -> SinksSection:
    """The run's own [sinks] with the command's options over it."""
    own = SinksSection.model_validate(recipe)
    board = TensorboardSettings(directory=directory or own.tensorboard.directory)
    wandb = WandbSettings(
        project=project or own.wandb.project, entity=entity or own.wandb.entity, directory=directory or own.wandb.directory,
        mode="offline" if offline else own.wandb.mode,
    )  # fmt: skip
    return SinksSection(tensorboard=board, wandb=wandb)


def register(app: typer.Typer) -> None:
    """Put these commands under the command line."""
    app.command("watch")(watch)
    app.command("sink")(sink)
