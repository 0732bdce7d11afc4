"""Published curves: run recipes over seeds, keep the raw numbers, redraw the plot from them (`python -m deploy.results`).

python -m deploy.results run tiny-geneval --seeds 1,2,3 --minutes 45    # resumable: the same command goes on
python -m deploy.results draw                                           # plots and table from docs/results/*.json
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from matplotlib.figure import Figure
from rich.console import Console

from common.errors import FlowfleetError, Interrupted
from common.store.audit import audit
from common.store.run_store import RunStore
from deploy.config import PROJECT, load_config, recipe_names
from deploy.options import StartOptions
from deploy.report.reader import read_history
from deploy.session import run_session

RESULTS = PROJECT / "docs" / "results"
RUNS = Path("runs") / "results"
SHORTEST_S = 1.0  # of a start that only evaluates the last version
app = typer.Typer(add_completion=False, help=__doc__, pretty_exceptions_enable=False)


def train_for(recipe: str, sets: Sequence[str], run_dir: Path, *, seconds: float, console: Console) -> None:
    """Train until a run has worked for so many seconds in all its starts together: an interrupted one gets what is left, not all again.

    Args:
        sets: --set assignments besides the schedule's.
        seconds: the whole budget; what a start does before its first update counts for that start alone.

    Raises:
        FlowfleetError: with the exit code that the command ends with.
    """
    history = read_history(RunStore(str(run_dir)))
    spent = (0.0, *history.elapsed_s)[-1]
    if spent >= seconds and history.updates[-1].update in {evaluation.version for evaluation in history.evaluations}:
        console.print(f"{run_dir} has worked for {spent:.0f} of {seconds:g} s: it is not trained further")
        return
    given = [*sets, f"schedule.time_limit_s={max(seconds - spent, SHORTEST_S):g}", "schedule.num_updates=100000"]
    run_session(load_config(recipe, given), StartOptions(run_dir=str(run_dir)), console)


def run_facts(run_dir: Path, recipe: str, seed: int, command: str) -> dict[str, Any]:
    """The raw file of one run: its frozen evaluations over updates, images and seconds, and where they came from."""
    store = RunStore(str(run_dir))
    history, report = read_history(store), audit(store)
    images = {record.update: record.images for record in history.updates}
    points = [
        {
            "version": evaluation.version,
            "seconds": 0.0 if evaluation.version == 0 else history.elapsed_at(evaluation.version),
            "images": sum(count for update, count in images.items() if update <= evaluation.version),
            "rewards": {
                name: {"mean": result.mean, "tasks": {tag: task.mean for tag, task in result.tasks.items()}}
                for name, result in evaluation.rewards.items()
            },
        }
        for evaluation in history.evaluations
    ]  # fmt: skip
    train = [{"update": r.update, "rewards": {name: s.mean for name, s in r.rewards.items()}} for r in history.updates]
    return {
        "recipe": recipe, "seed": seed, "command": command, "environment": dict(history.environment), "config": history.config,
        "protocol": dict(history.evaluations[0].protocol) if history.evaluations else {}, "evaluations": points, "train": train,
        "updates": len(history.updates), "starts": history.incarnations, "audit": "clean" if report.is_clean else [f"{v.rule}: {v.where}" for v in report.violations],
    }  # fmt: skip


@app.command("run")
def run(
    recipe: str, *, seeds: Annotated[str, typer.Option()] = "1", minutes: Annotated[float, typer.Option()] = 45.0,
    sets: Annotated[list[str] | None, typer.Option("--set")] = None, name: Annotated[str | None, typer.Option()] = None,
) -> None:  # fmt: skip
    """Train a recipe for some minutes on each seed and write docs/results/<name>-s<seed>.json."""
    console, label = Console(), name or recipe
    for seed in (int(part) for part in seeds.split(",")):
        command = f"python -m deploy.results run {recipe} --seeds {seed} --minutes {minutes:g}" + "".join(f" --set {s}" for s in sets or [])
        run_dir = RUNS / f"{label}-s{seed}"
        target = RESULTS / f"{label}-s{seed}.json"
        if target.exists():
            console.print(f"{target} exists: this seed is done")
            continue
        train_for(recipe, [*(sets or []), f"run.seed={seed}"], run_dir, seconds=minutes * 60, console=console)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(run_facts(run_dir, recipe, seed, command), indent=1, sort_keys=True) + "\n", encoding="utf-8")
        console.print(f"wrote {target}")


@app.command("draw")
def draw() -> None:
    """Redraw docs/results/curves.svg from the raw files of the shipped recipes; other variants stand in the tables only."""
    files = [path for path in sorted(RESULTS.glob("*-s[0-9].json")) if label_of(path) in recipe_names()]
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.subplots()
    lines: dict[str, str] = {}  # what a line shows -> its color; seeds share one
    for path in files:
        points = json.loads(path.read_text(encoding="utf-8"))["evaluations"]
        for reward in points[0]["rewards"]:
            name = f"{label_of(path)}: {reward}"
            is_first = name not in lines
            color = lines.setdefault(name, f"C{len(lines)}")
            minutes = [point["seconds"] / 60 for point in points]
            means = [point["rewards"][reward]["mean"] for point in points]
            axes.plot(minutes, means, marker="o", markersize=3, color=color, label=name if is_first else None)
    axes.set_xlabel("minutes of training, 2 CPU cores")
    axes.set_ylabel("frozen evaluation")
    axes.set_ylim(0, 1)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, frameon=False, loc="lower right")
    figure.savefig(RESULTS / "curves.svg")
    Console().print(f"drew {RESULTS / 'curves.svg'} from {len(files)} runs")


def label_of(path: Path) -> str:
    """The recipe, or its variant's name, of a raw file <label>-s<seed>.json."""
    return path.stem.rpartition("-s")[0]


def run_app(commands: typer.Typer) -> None:
    """Run a command line that ends as `flowfleet` does: an error is one message and its exit code."""
    errors = Console(stderr=True)
    try:
        commands()
    except Interrupted as stopped:
        errors.print(f"stopped, the state is saved: {stopped}", style="bold", highlight=False, soft_wrap=True, markup=False)
        raise SystemExit(stopped.exit_code) from None
    except FlowfleetError as error:
        errors.print(f"error: {error}", style="bold red", highlight=False, soft_wrap=True, markup=False)
        raise SystemExit(error.exit_code) from None


if __name__ == "__main__":
    run_app(app)
