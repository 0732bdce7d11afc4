"""Compare the objectives: tune each on training prompts, run seeds, and draw one table and one plot (`python -m deploy.objective_runs`).

python -m deploy.objective_runs run      # resumable: a raw file a run under docs/results/objectives; what exists is not run again
python -m deploy.objective_runs draw     # docs/results/objectives/table.md and comparison.svg from the raw files alone
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, median_low
from typing import Annotated, Any

import typer
from matplotlib import rc_context
from matplotlib.figure import Figure
from pydantic import Field
from rich.console import Console

from common.config import StrictModel, parse, read_toml
from common.errors import UserError
from common.store.run_store import RunStore
from deploy.config import PROJECT, load_config
from deploy.plan import make_plan
from deploy.report.image_curves import numbers_of, read_sensors
from deploy.report.reader import read_history
from deploy.report.samples import MediaShelf
from deploy.results import run_app, run_facts, train_for

PLAN = Path(__file__).with_name("objective_plan.toml")
RAW = PROJECT / "docs" / "results" / "objectives"
RUNS = Path("runs") / "objectives"
REFERENCE = "tiny-geneval-grpo-full"  # full-window Flow-GRPO: what the others are compared with
REWARD = "geneval_strict"
LEVELS = (0.80, 0.90)
LAST_UPDATES = 5  # over which sensors are averaged
LAST_EVALUATIONS = 3
COLORS = tuple(f"C{number}" for number in range(10))
app = typer.Typer(add_completion=False, help=__doc__, pretty_exceptions_enable=False)


class Entry(StrictModel):
    """One recipe of the comparison."""

    recipe: str
    trials: tuple[dict[str, str | float | int], ...] = ({},)  # settings to choose from, on training prompts
    seeds: tuple[int, ...] = (1,)


class ComparisonPlan(StrictModel):
    """What `run` runs."""

    trial_minutes: float = Field(gt=0)
    run_minutes: float = Field(gt=0)
    evaluate_every: int = Field(ge=1)  # updates
    objective: tuple[Entry, ...] = Field(min_length=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reached:
    """What a run had spent when a frozen evaluation first stood at a level."""

    seconds: float
    images: float
    forwards: float  # of the learner


@dataclass(frozen=True, slots=True, kw_only=True)
class Sooner:
    """How many times less than the reference was spent to the highest level that both reach."""

    level: float
    seconds: float
    images: float
    forwards: float


def sets_of(settings: Mapping[str, object]) -> list[str]:
    """Settings as --set assignments."""
    return [f"{key}={value}" for key, value in settings.items()]


def raw_path(recipe: str, kind: str, number: int) -> Path:
    """Where a run's raw file stands: kind t = trial, s = seed."""
    return RAW / f"{recipe}-{kind}{number}.json"


def trial_score(facts: Mapping[str, Any]) -> float:
    """Mean strict reward on training prompts over the last third of a trial's updates; no frozen evaluation enters the choice."""
    means = [update["rewards"][REWARD] for update in facts["train"] if update["rewards"].get(REWARD) is not None]
    return fmean(means[-max(1, len(means) // 3) :]) if means else float("-inf")


def best_trial(recipe: str, trials: Sequence[Mapping[str, object]]) -> int:
    """The number of the trial with the best score; 0 where there is one alone. Raises UserError when a trial has no raw file."""
    if len(trials) == 1:
        return 0
    missing = [str(raw_path(recipe, "t", k)) for k in range(len(trials)) if not raw_path(recipe, "t", k).exists()]
    if missing:
        raise UserError(
            f"objective_runs: {', '.join(missing)} is missing; trials come before seeds: run `python -m deploy.objective_runs run`"
        )
    scores = [trial_score(_read(raw_path(recipe, "t", k))) for k in range(len(trials))]
    return scores.index(max(scores))


def comparison_facts(run_dir: Path, recipe: str, seed: int, command: str, settings: Sequence[str]) -> dict[str, Any]:
    """A raw file: results.run_facts with the learner's forwards and the sensors at the end."""
    store = RunStore(str(run_dir))
    history = read_history(store)
    last = history.updates[-LAST_UPDATES:]
    names = sorted(last[-1].image_statistics) if last else []
    forwards = make_plan(load_config(recipe, list(settings))).learning_forwards
    judged = {update.update: update.images * (1 - update.flat_group_share) for update in history.updates}  # flat groups see no forward
    facts = run_facts(run_dir, recipe, seed, command)
    for point in facts["evaluations"]:
        point["forwards"] = forwards * sum(count for update, count in judged.items() if update <= point["version"])
    statistics = {name: fmean(update.image_statistics[name] for update in last) for name in names}
    return facts | {
        "settings": list(settings),
        "sensors": statistics,
        "bands": numbers_of(read_sensors(history, MediaShelf(store)))["bands"],
    }


def reached(facts: Mapping[str, Any], level: float) -> Reached | None:
    """The first frozen evaluation at or above a level; None when there is none."""
    for point in facts["evaluations"]:
        if point["rewards"][REWARD]["mean"] >= level:
            return Reached(seconds=point["seconds"], images=point["images"], forwards=point["forwards"])
    return None


def best_of(facts: Mapping[str, Any]) -> float:
    """The best frozen evaluation."""
    return max(float(point["rewards"][REWARD]["mean"]) for point in facts["evaluations"])


def end_of(facts: Mapping[str, Any]) -> float:
    """The mean of the last frozen evaluations: the best one flatters whoever was evaluated more often."""
    return fmean(point["rewards"][REWARD]["mean"] for point in facts["evaluations"][-LAST_EVALUATIONS:])


def median_reached(runs: Sequence[Mapping[str, Any]], level: float) -> Reached | None:
    """The median run's spending at a level; a run that does not reach it counts as infinite."""
    found = [reached(facts, level) for facts in runs]
    if sum(one is not None for one in found) * 2 <= len(runs):
        return None
    infinite = Reached(seconds=float("inf"), images=float("inf"), forwards=float("inf"))
    spent = [one or infinite for one in found]
    return Reached(
        seconds=median(one.seconds for one in spent),
        images=median(one.images for one in spent),
        forwards=median(one.forwards for one in spent),
    )


def speedup(runs: Sequence[Mapping[str, Any]], reference: Sequence[Mapping[str, Any]]) -> Sooner | None:
    """Return the highest level that the median runs of both reach, and how much sooner the first one does; None if either never rises."""
    level = min(median_low(best_of(facts) for facts in each) for each in (runs, reference))  # low: most runs reach it, of two, too
    ours, theirs = median_reached(runs, level), median_reached(reference, level)
    if ours is None or theirs is None or ours.seconds == 0 or theirs.seconds == 0:
        return None
    return Sooner(
        level=level,
        seconds=theirs.seconds / ours.seconds,
        images=theirs.images / ours.images,
        forwards=theirs.forwards / ours.forwards,
    )


def outside(facts: Mapping[str, Any]) -> list[str]:
    """The sensors that stood outside the base model's band at the end of a run, by name."""
    found = []
    for name, value in sorted(facts["sensors"].items()):
        band = facts["bands"].get(name)
        if band is not None and not band["low"] <= value <= (float("inf") if band["high"] is None else band["high"]):
            found.append(name)
    return found


@app.command("run")
def run(plan_file: Annotated[Path, typer.Option("--plan")] = PLAN, only: Annotated[str | None, typer.Option()] = None) -> None:
    """Run what has no raw file yet: every trial of an objective, then its seeds with the better settings."""
    plan, console = parse(ComparisonPlan, read_toml(plan_file), str(plan_file)), Console()
    for entry in plan.objective:
        if only is not None and entry.recipe != only:
            continue
        if len(entry.trials) > 1:
            for number, settings in enumerate(entry.trials):
                given = [*sets_of(settings), "run.seed=100", "evaluation.every=0"]
                _run_one(entry, "t", number, minutes=plan.trial_minutes, given=given, console=console)
        chosen = entry.trials[best_trial(entry.recipe, entry.trials)]
        for seed in entry.seeds:
            given = [*sets_of(chosen), f"run.seed={seed}", f"evaluation.every={plan.evaluate_every}"]
            _run_one(entry, "s", seed, minutes=plan.run_minutes, given=given, console=console)


def _run_one(entry: Entry, kind: str, number: int, *, minutes: float, given: Sequence[str], console: Console) -> None:
    recipe = entry.recipe
    target = raw_path(recipe, kind, number)
    if target.exists():
        console.print(f"{target} exists: this run is done")
        return
    sets = [*given, f"schedule.time_limit_s={minutes * 60:g}", "schedule.num_updates=100000"]
    run_dir = RUNS / target.stem
    command = f"flowfleet train {recipe} " + " ".join(f"--set {item}" for item in sets)
    train_for(recipe, given, run_dir, seconds=minutes * 60, console=console)
    target.parent.mkdir(parents=True, exist_ok=True)
    seed = next(int(item.partition("=")[2]) for item in given if item.startswith("run.seed="))
    facts = comparison_facts(run_dir, recipe, seed, command, given)
    target.write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    console.print(f"wrote {target}")


@app.command("draw")
def draw(plan_file: Annotated[Path, typer.Option("--plan")] = PLAN) -> None:
    """Write table.md and comparison.svg from the raw files; objectives without a run say so."""
    plan = parse(ComparisonPlan, read_toml(plan_file), str(plan_file))
    runs = {entry.recipe: [_read(path) for path in sorted(RAW.glob(f"{entry.recipe}-s[0-9].json"))] for entry in plan.objective}
    (RAW / "table.md").write_text("\n".join(table_lines(plan, runs)) + "\n", encoding="utf-8")
    with rc_context({"svg.hashsalt": "flowfleet"}):  # the same runs give the same bytes
        curves(runs).savefig(RAW / "comparison.svg", metadata={"Date": None})
    Console().print(f"drew {RAW / 'comparison.svg'} and {RAW / 'table.md'} from {sum(map(len, runs.values()))} runs")


def curves(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Frozen evaluations over minutes: a panel a family of objectives, a line a run; the reference stands in both."""
    figure = Figure(figsize=(9, 8), layout="constrained")
    over_steps = [recipe for recipe in runs if load_config(recipe, []).learner.objective.make("behavior").needs.trajectory]
    over_latents = [recipe for recipe in runs if recipe not in over_steps]
    for axes, title, recipes in zip(
        figure.subplots(2, 1, sharex=True, sharey=True),
        ("over stored steps", "over clean latents"),
        (over_steps, over_latents),
        strict=True,
    ):
        drawn = [REFERENCE, *(recipe for recipe in recipes if recipe != REFERENCE)]
        for color, recipe in enumerate(drawn):
            for number, facts in enumerate(runs.get(recipe, ())):
                minutes = [point["seconds"] / 60 for point in facts["evaluations"]]
                means = [point["rewards"][REWARD]["mean"] for point in facts["evaluations"]]
                line = (
                    {"color": "black", "linewidth": 2.2}
                    if recipe == REFERENCE
                    else {"color": COLORS[color % len(COLORS)], "linewidth": 1.2}
                )
                axes.plot(minutes, means, marker="o", markersize=3, label=None if number else recipe.removeprefix("tiny-geneval-"), **line)
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_ylabel(f"frozen evaluation, {REWARD}")
        axes.set_ylim(0.4, 1)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        axes.set_xlabel("minutes of training, 2 CPU cores")
        axes.label_outer()
    return figure


def table_lines(plan: ComparisonPlan, runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """The comparison as a Markdown table: a row an objective."""
    levels = [f"to {level:.2f}: min / images / learner forwards" for level in LEVELS]
    best = "best frozen, each seed: at min / images / learner forwards"
    sooner = f"times sooner than {REFERENCE}: min / images / learner forwards"
    end = f"mean of the last {LAST_EVALUATIONS} evaluations, each seed"
    header = ["recipe", "seeds", "settings", best, end, *levels, sooner, "diversity at the end", "sensors outside the base's band", "audit"]
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    for entry in plan.objective:
        found = runs[entry.recipe]
        if not found:
            lines.append(f"| {entry.recipe} | 0 | | not measured |" + " |" * (len(header) - 4))
            continue
        settings = "; ".join(item for item in found[0]["settings"] if not item.startswith(("run.", "evaluation."))) or "the recipe's"
        spent = [_spent(median_reached(found, level)) for level in LEVELS]
        diversity = ", ".join(f"{facts['sensors']['diversity']:.3f}" for facts in found if "diversity" in facts["sensors"])
        strayed = ", ".join(sorted({name for facts in found for name in outside(facts)})) or "none"
        audits = ", ".join(sorted({facts["audit"] if isinstance(facts["audit"], str) else "violated" for facts in found}))
        ends = ", ".join(f"{end_of(facts):.3f}" for facts in found)
        cells = [entry.recipe, str(len(found)), settings, "; ".join(map(_best, found)), ends, *spent]
        lines.append("| " + " | ".join([*cells, _sooner(entry.recipe, found, runs.get(REFERENCE, ())), diversity, strayed, audits]) + " |")
    return lines


def _best(facts: Mapping[str, Any]) -> str:
    level = best_of(facts)
    return f"{level:.3f}: {_spent(reached(facts, level))}"


def _sooner(recipe: str, found: Sequence[Mapping[str, Any]], reference: Sequence[Mapping[str, Any]]) -> str:
    if recipe == REFERENCE:
        return "-"
    ratio = speedup(found, reference) if reference else None
    if ratio is None:
        return "not comparable"
    return f"{ratio.seconds:.1f}x / {ratio.images:.1f}x / {ratio.forwards:.1f}x to {ratio.level:.3f}"


def _spent(value: Reached | None) -> str:
    return "not reached" if value is None else f"{value.seconds / 60:.1f} / {value.images:,.0f} / {value.forwards:,.0f}"


def _read(path: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return facts


if __name__ == "__main__":
    run_app(app)
