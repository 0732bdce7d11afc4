"""`flowfleet train|demo|pretrain`. What loads torch is imported by the command that needs it: `--help` answers at once."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from common.store.run_store import RunStore
from deploy.config import load_config
from deploy.fakes import parse_fakes
from deploy.options import StartOptions, default_run_dir
from deploy.plan import describe

RecipeArgument = Annotated[str, typer.Argument(help="a recipe of `flowfleet recipes ls`, or a TOML file")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="override a key: learner.learning_rate=1e-3 (repeatable)")]
RunDirOption = Annotated[str | None, typer.Option("--run-dir", help="path or URL of the run directory; default runs/NAME")]
LocalOption = Annotated[bool, typer.Option("--local", help="one process instead of Ray actors")]


class Resume(StrEnum):
    """What to do with a run directory that holds a run."""

    AUTO = "auto"
    NEVER = "never"


def train(
    recipe: RecipeArgument,
    *,
    sets: SetOption = None,
    run_dir: RunDirOption = None,
    local: LocalOption = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the plan and start nothing")] = False,
    resume: Annotated[Resume, typer.Option(help="auto: go on where the run directory stands")] = Resume.AUTO,
    allow_change: Annotated[list[str] | None, typer.Option("--allow-change", help="a config key that a resume may change")] = None,
    takeover: Annotated[bool, typer.Option("--takeover", help="drive a run that another job seems to drive")] = False,
    address: Annotated[str | None, typer.Option(help="a Ray cluster to join; default: one on this machine", envvar="RAY_ADDRESS")] = None,
    autoscale: Annotated[
        bool, typer.Option("--autoscale", help="let who waits decide the sizes, within the bounds of the section autoscale")
    ] = False,
    fake: Annotated[
        str | None, typer.Option(help="engines that sleep: rollout=1.0s,learner=1.0s,reward=0.3s; a range spreads slots")
    ] = None,
) -> None:
    """Train a recipe; the same command again resumes it."""
    console = Console()
    config = load_config(recipe, [*(sets or []), *(["autoscale.enabled=true"] if autoscale else [])])
    fakes = parse_fakes(fake) if fake is not None else None
    if dry_run:
        for line in [*describe(config, local=local), *([fakes.describe()] if fakes else [])]:
            console.print(line, highlight=False, soft_wrap=True)
        return
    options = StartOptions(
        run_dir=run_dir or default_run_dir(config, fakes), local=local, resume=resume is Resume.AUTO, takeover=takeover,
        allow_changes=tuple(allow_change or ()), address=address, fakes=fakes,
    )  # fmt: skip
    from deploy.session import run_session
    from deploy.summary import show_results

    run_session(config, options, console)
    show_results(RunStore(options.run_dir), console)


def demo(
    run_dir: RunDirOption = None,
    sets: SetOption = None,
    local: LocalOption = False,
) -> None:
    """Train the shipped model for some minutes; exits with 0 only if the frozen evaluation rose."""
    console = Console()
    config = load_config("tiny-demo", sets or [])
    options = StartOptions(run_dir=run_dir or default_run_dir(config), local=local)
    from deploy.demo import conclude_demo
    from deploy.session import run_session

    run_session(config, options, console)
    if not conclude_demo(RunStore(options.run_dir), console):
        raise typer.Exit(1)


def pretrain(
    out: Annotated[Path, typer.Option(help="directory of the pipeline to write")] = Path("models/tiny-sd3"),
    config: Annotated[Path | None, typer.Option(help="TOML file; default: the shipped model's own")] = None,
    processes: Annotated[int, typer.Option(help="processes that share the training, one thread each")] = 2,
) -> None:
    """Make the shipped tiny model from nothing; the same command again resumes."""
    from deploy.pretrain.command import run_pretrain

    run_pretrain(config, out, processes)


def register(app: typer.Typer) -> None:
    """Put these commands under the command line."""
    app.command("train")(train)
    app.command("demo")(demo)
    app.command("pretrain")(pretrain)
