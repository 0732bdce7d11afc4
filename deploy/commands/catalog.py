"""`flowfleet recipes ls|show|cp`, `flowfleet reward ls|show|test|serve`, `flowfleet prompts make`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

from common.config import json_object, parse
from common.errors import UserError
from common.prompts import check_prompts, read_prompts
from deploy.config import read_recipe, recipe_names, recipe_path, shipped_path
from deploy.geneval_prompts import geneval_line, make_prompts, split_prompts
from deploy.reward_card import find_card, render_card
from reward_servers.cards import RewardCard
from reward_servers.registry import list_scorers, make_scorer
from reward_servers.testing import test_scorer
from reward_servers.wire.http_server import serve
from reward_servers.wire.messages import SCORE_PATH
from reward_servers.wire.settings import ServeSettings

NameArgument = Annotated[str, typer.Argument(help="a name of the list")]


def recipes_ls() -> None:
    """List the shipped recipes."""
    table = Table("recipe", "what it does")
    for name in recipe_names():
        table.add_row(name, str(read_recipe(name).get("run", {}).get("about", "")))
    Console().print(table)


def recipes_show(name: NameArgument) -> None:
    """Print a recipe; one that extends another holds only what differs, the other is shown by its own name."""
    Console().print(recipe_path(name).read_text(encoding="utf-8"), highlight=False, markup=False)


def recipes_cp(name: NameArgument, to: Annotated[Path | None, typer.Argument(help="file to write; default NAME.toml here")] = None) -> None:
    """Copy a recipe to a file of your own, as it stands: a copy that extends a shipped recipe goes on extending it."""
    target = to or Path(f"{name}.toml")
    if target.exists():
        raise UserError(f"recipes cp: {target} exists and is not overwritten; name another file")
    target.write_text(recipe_path(name).read_text(encoding="utf-8"), encoding="utf-8")
    Console().print(f"wrote {target}; start it with: flowfleet train {target}")


def reward_ls() -> None:
    """List the rewards."""
    table = Table(Column("reward", no_wrap=True), "raw range", Column("needs", min_width=9), "what it measures")
    for card in list_scorers():
        table.add_row(card.name, card.range, needs(card), card.description)
    Console().print(table)
    Console().print(
        "flowfleet reward show NAME: source, licence, model, preprocessing, what was verified; flowfleet doctor: which run here"
    )


def needs(card: RewardCard) -> str:
    """What a reward needs besides flowfleet, in a few words."""
    parts = [f"extra {card.extra}"] if card.extra else []
    if not card.is_self_contained:
        parts.append(f"a {card.needs}")
    return ", ".join(parts) or "nothing"


def reward_show(name: NameArgument) -> None:
    """Print a reward's card: definition, model and revision, range, licence, preprocessing, memory, speed, what was verified."""
    Console().print(render_card(find_card(name, list_scorers())))


def reward_test(
    name: NameArgument,
    prompts: Annotated[Path, typer.Option(help="prompt file (jsonl or txt)")],
    images: Annotated[Path, typer.Option(help="directory of images, named by prompt id or in prompt order")],
    options: Annotated[str, typer.Option(help="the scorer's options as JSON")] = "{}",
    show: Annotated[int, typer.Option(help="how many rows to print")] = 10,
) -> None:
    """Score a directory of images; exits with 1 when a score is missing or not finite."""
    parsed = json_object("--options", options)
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


def reward_serve(
    name: NameArgument,
    options: Annotated[str, typer.Option(help="the scorer's options as JSON")] = "{}",
    host: Annotated[str, typer.Option(help="other than loopback needs a token")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 = a free one")] = 8009,
    token_file: Annotated[Path | None, typer.Option(help="file with the bearer token that clients must send")] = None,
) -> None:
    """Serve a reward over HTTP by the open protocol (docs/reward-protocol.md) until Ctrl-C."""
    settings = parse(ServeSettings, {"host": host, "port": port, "token_file": str(token_file or "")}, "reward serve")
    scorer = make_scorer(name, json_object("--options", options))

    def announce(chosen: int) -> None:
        Console().print(f"{scorer.name} {scorer.version} at http://{host}:{chosen}; POST {SCORE_PATH}, GET /metrics", highlight=False)

    serve(scorer, settings, announce=announce)


def prompts_make(
    out: Annotated[Path, typer.Argument(help="folder for train.jsonl and test.jsonl")],
    per_task: Annotated[int, typer.Option(help="prompts a task, both files together")] = 100,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Write GenEval-style prompts over the 80 COCO classes, six tasks, with GenEval's metadata: train and test apart."""
    sides = dict(zip(("train", "test"), split_prompts(make_prompts(seed, per_task)), strict=True))
    targets = {side: out / f"{side}.jsonl" for side in sides}
    for target in targets.values():
        if target.exists():
            raise UserError(f"prompts make: {target} exists and is not overwritten; name another folder")
    out.mkdir(parents=True, exist_ok=True)
    for side, prompts in sides.items():
        targets[side].write_text("".join(f"{geneval_line(prompt)}\n" for prompt in prompts), encoding="utf-8")
        Console().print(f"wrote {len(prompts)} prompts to {targets[side]}", highlight=False)


def _prompts() -> None:
    """Prompt files."""


def register(app: typer.Typer, recipes_app: typer.Typer, reward_app: typer.Typer) -> None:
    """Put these commands under the command line."""
    prompts_app = typer.Typer(help="Prompt files.", no_args_is_help=True)
    app.add_typer(prompts_app, name="prompts")
    prompts_app.callback()(_prompts)
    prompts_app.command("make")(prompts_make)
    recipes_app.command("ls")(recipes_ls)
    recipes_app.command("show")(recipes_show)
    recipes_app.command("cp")(recipes_cp)
    reward_app.command("ls")(reward_ls)
    reward_app.command("show")(reward_show)
    reward_app.command("test")(reward_test)
    reward_app.command("serve")(reward_serve)
