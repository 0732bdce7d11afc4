"""`flowfleet scale|stop`: requests to a running job, through files of its run directory; and the fleet's part of `status`."""

import secrets
import time
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from common.errors import UserError
from common.store.claim import FRESH_S, newest_incarnation
from common.store.control import ROLLOUT, ControlRequest, reward_pool, write_request
from common.store.directive import FleetReport
from common.store.manifests import read_status
from common.store.run_store import RunStore
from deploy.config import RunConfig
from deploy.options import run_config_of

RunArgument = Annotated[str, typer.Argument(help="a run directory")]


def parse_rewards(given: list[str], config: RunConfig) -> dict[str, int]:
    """Turn NAME=M texts into pool -> size. Raises UserError naming the run's rewards."""
    names = [reward.name for reward in config.reward]
    sizes = {}
    for text in given:
        name, separator, count = text.rpartition("=")
        if not separator or not count.isdigit():
            raise UserError(f"scale: --reward {text!r} is no NAME=COUNT; an example: --reward {names[0]}=2")
        if name not in names:
            raise UserError(f"scale: this run has no reward {name!r}; choose one of {', '.join(names)}")
        sizes[reward_pool(name)] = int(count)
    return sizes


def request_scale(store: RunStore, sizes: dict[str, int]) -> int:
    """Write a scale request; return its number. Raises StoreError."""
    return write_request(store, _request(store, "scale", sizes))


def request_stop(store: RunStore) -> int:
    """Write a stop request for the incarnation that runs; return its number.

    Raises:
        UserError: nobody runs this run.
        StoreError: the store refused.
    """
    status = read_status(store)
    if status is None or status.state != "running" or time.time() - status.written_at > FRESH_S:
        state = "no status yet" if status is None else f"{status.state}, last seen {time.time() - status.written_at:.0f} s ago"
        raise UserError(f"stop: nobody seems to run {store.url} ({state}); there is nothing to stop")
    return write_request(store, _request(store, "stop", {}))


def _request(store: RunStore, kind: str, sizes: dict[str, int]) -> ControlRequest:
    asked_at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    incarnation, writer_id = newest_incarnation(store), secrets.token_hex(8)
    if kind == "stop":
        return ControlRequest(kind="stop", incarnation=incarnation, asked_at=asked_at, writer_id=writer_id)
    return ControlRequest(kind="scale", incarnation=incarnation, asked_at=asked_at, writer_id=writer_id, sizes=sizes)


def scale(
    run: RunArgument,
    rollout: Annotated[int | None, typer.Option(min=0, help="rollout workers wanted")] = None,
    reward: Annotated[list[str] | None, typer.Option(help="NAME=COUNT: servers of a reward wanted (repeatable)")] = None,
) -> None:
    """Change the number of workers or reward servers of a run, while it runs or for its next start."""
    store = RunStore(run)
    config = run_config_of(store)
    sizes = parse_rewards(reward or [], config)
    if rollout is not None:
        sizes[ROLLOUT] = rollout
    if not sizes:
        raise UserError("scale: nothing was asked for; pass --rollout N or --reward NAME=COUNT")
    number = request_scale(store, sizes)
    words = ", ".join(f"{pool}={size}" for pool, size in sorted(sizes.items()))
    Console().print(
        f"control/{number:04d}.json asks for {words}; the driver follows within seconds, `flowfleet status {run}` shows it; the sizes hold "
        "until another request, across resumes too",
        highlight=False, soft_wrap=True,
    )  # fmt: skip


def stop(run: RunArgument) -> None:
    """Ask a running job to drain, save its state and end (its exit code is 130); the same train command goes on."""
    number = request_stop(RunStore(run))
    Console().print(
        f"control/{number:04d}.json asks for a stop; `flowfleet status {run}` says when it has", highlight=False, soft_wrap=True
    )


def show_fleet(report: FleetReport, console: Console) -> None:
    """Slots with their processes, sizes and the last decisions."""
    if not report.slots:
        return
    sizes = ", ".join(f"{pool} {size}" for pool, size in sorted(report.sizes.items()))
    console.print(f"driver process {report.driver_process_id}; wanted: {sizes}", highlight=False, soft_wrap=True)
    table = Table("slot", "state", "host", "processes", "crashes in a row")
    for name, slot in sorted(report.slots.items()):
        table.add_row(name, slot.state, slot.host, " ".join(str(number) for number in slot.process_ids), str(slot.crashes))
    console.print(table)
    for sentence in report.decisions:
        console.print(sentence, highlight=False, soft_wrap=True, markup=False)


def register(app: typer.Typer) -> None:
    """Put these commands under the command line."""
    app.command("scale")(scale)
    app.command("stop")(stop)
