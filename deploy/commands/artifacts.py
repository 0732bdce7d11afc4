"""`flowfleet audit|report|status`. What loads torch or matplotlib is imported by the command."""

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from common.errors import UserError
from common.store.claim import newest_incarnation
from common.store.manifests import read_status
from common.store.run_store import RunStore
from deploy.commands.control import show_fleet
from deploy.options import run_config_of

RunArgument = Annotated[str, typer.Argument(help="a run directory")]


def open_run(run: str) -> RunStore:
    """The store of an existing run. Raises UserError when there is none."""
    store = RunStore(run)
    if newest_incarnation(store) == 0:
        raise UserError(f"{run} holds no run (no config.i0001.json); name the --run-dir of a `flowfleet train`")
    return store


def audit_command(run: RunArgument) -> None:
    """Prove from the files alone: consumed once, staleness, strict order, conservation, digests."""
    from common.store.audit import audit

    outcome = audit(open_run(run))
    console = Console()
    for violation in outcome.violations:
        console.print(
            f"{violation.rule}: {violation.where}: {violation.message}", style="red", highlight=False, markup=False, soft_wrap=True
        )
    console.print(
        f"{outcome.num_manifests} manifests, {outcome.num_groups} groups consumed ({outcome.num_retired} retired), {outcome.num_drops} drops, "
        f"{outcome.num_adapters} adapters: " + ("clean" if outcome.is_clean else f"{len(outcome.violations)} violations"),
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    if not outcome.is_clean:
        raise typer.Exit(1)


def report(
    run: RunArgument,
    reward_weights: Annotated[
        str | None, typer.Option(help="NAME=NUMBER,...: also show what these weights would have said of the run's scores; no image is made")
    ] = None,
    serve: Annotated[
        bool, typer.Option("--serve", help="serve the report as a page that refreshes while the run goes on; writes nothing")
    ] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="with --serve: where to listen; 0 = any free port")] = 8266,
    host: Annotated[
        str, typer.Option(help="with --serve: the address to listen on; other than loopback, anyone who reaches it can read the run")
    ] = "127.0.0.1",
) -> None:
    """Write report.html: curves, sample grids over time, before/after table; or serve it live."""
    from deploy.report.reweighting import parse_weights, read_reweighting
    from deploy.summary import show_results

    store = open_run(run)
    if serve:
        from deploy.report.serve import is_loopback, serve_report

        if reward_weights is not None:
            raise UserError("report: --reward-weights came with --serve; the live page shows the run's own weights; leave one of them out")
        console = Console(stderr=True)
        if not is_loopback(host):
            text = f"{host} is no loopback address: anyone who reaches this port can read the run, its prompts and its images"
            console.print(f"warning: {text}", style="yellow", highlight=False, soft_wrap=True, markup=False)
        serve_report(
            store, host=host, port=port,
            announce=lambda url: console.print(f"{url} shows {run}; Ctrl-C ends it", highlight=False, soft_wrap=True, markup=False),
        )  # fmt: skip
        console.print("ended; nothing was written", highlight=False)
        return
    reweighting = None if reward_weights is None else read_reweighting(store, parse_weights(reward_weights))
    show_results(store, Console(), reweighting)


def status(run: RunArgument) -> None:
    """Say where a run stands, from its files."""
    store = open_run(run)
    found, config, console = read_status(store), run_config_of(store), Console()
    console.print(f"run {config.run.name} at {run}, incarnation {newest_incarnation(store)}", highlight=False)
    if found is None:
        console.print("no status.json yet: the run has not begun to work")
        return
    console.print(f"{found.state} on {found.host} (process {found.process_id}): {found.reason or 'working'}", highlight=False)
    console.print(f"updates {found.manifests}/{config.schedule.num_updates}, newest version {found.version}", highlight=False)
    for sentence in found.alerts:
        console.print(f"alert: {sentence}", style="red", highlight=False, markup=False, soft_wrap=True)
    show_fleet(found.fleet, console)
    table = Table("groups", "count")
    for state, count in found.counts.items():
        table.add_row(str(state), str(count))
    console.print(table)


def register(app: typer.Typer) -> None:
    """Put these commands under the command line."""
    app.command("audit")(audit_command)
    app.command("report")(report)
    app.command("status")(status)
