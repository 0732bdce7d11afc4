"""The control plane under 64 workers: `python -m deploy.bench_control --out docs/benchmarks`. RPC times and the Coordinator's memory."""

import datetime
import json
import logging
import os
import shlex
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import ray
import typer
from rich.console import Console

from common.config import config_digest
from common.errors import FlowfleetError
from common.store.actor import CoordinatorActor
from common.store.claim import claim_run
from common.store.ending import Outcome
from common.store.manifests import read_status
from common.store.run_store import RunStore
from deploy.bench_control_actors import CrowdActor
from deploy.compose import RunParts, compose, coordinator_builder
from deploy.config import RunConfig, load_config
from deploy.coordinator_link import COORDINATOR_OPTIONS
from deploy.environment import describe_environment
from deploy.fakes import parse_fakes
from deploy.gates import PromptSets, check_fake_config
from deploy.ray_actors import prepare_own_cluster
from learner.actor import LearnerActor
from reward_servers.actor import RewardActor

RECIPE = "tiny-geneval-grpo"
FAKES = "rollout=4s..8s,learner=1s,reward=0.02s"
GROUPS_PER_UPDATE = 12  # about what 64 such workers make while the learner works
P95_LIMIT_MS = 10.0
GROWTH_LIMIT_MIB = 16.0  # between the first look at the memory and the last: what counts as flat
FULL_UPDATES = 1000
FIRST_LOOK = 100  # updates after which the memory must not grow
CALL_TIMEOUT_S = 120.0
STALL_S = 300.0  # without a finished update
LEAVE_S = 120.0
_MIB = 1 << 20


class ControlBenchError(FlowfleetError):
    """The run behind the benchmark stalled, or did not end well."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlSize:
    """How large the benchmark is."""

    num_workers: int = 64
    num_processes: int = 4  # that hold the workers
    num_updates: int = FULL_UPDATES


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlMeasurement:
    """What a run gave."""

    calls: Mapping[str, Sequence[float]]  # method -> seconds of each call, as the worker saw them
    memory_mib: Mapping[int, float]  # update -> the Coordinator's resident memory
    seconds: float  # from the first update to the last
    num_updates: int  # in these seconds


def control_config(size: ControlSize) -> RunConfig:
    """The recipe of the benchmark: small groups, one reward, nothing evaluated, group files kept for 5 updates."""
    config = load_config(RECIPE, [
        f"rollout.num_workers={size.num_workers}", "rollout.group_size=2", "rollout.num_steps=4", "rollout.window.size=1",
        f"learner.groups_per_update={GROUPS_PER_UPDATE}", "reward.0.num_servers=2", f"schedule.num_updates={size.num_updates}",
        "schedule.max_staleness=4", "store.updates_kept=5",
    ])  # fmt: skip
    return config.model_copy(update={"reward": config.reward[:1]})


def measure_control(size: ControlSize, folder: Path, console: Console) -> ControlMeasurement:
    """Run the benchmark in a Ray session of its own. Raises ControlBenchError, and what a role raises."""
    config, url = control_config(size), str(folder / "run")
    prompts = PromptSets(train=check_fake_config(config).train, test=())
    for wait in claim_run(RunStore(url), config.model_dump(mode="json"), config_digest=config_digest(config)):
        time.sleep(wait.seconds)
    parts = compose(config, prompts, url, 1, parse_fakes(FAKES))
    prepare_own_cluster()
    ray.init(
        address="local", num_cpus=2 + size.num_processes, include_dashboard=False, logging_level=logging.WARNING, configure_logging=False
    )
    try:
        return _drive(parts, size, console)
    finally:
        ray.shutdown()


def _drive(parts: RunParts, size: ControlSize, console: Console) -> ControlMeasurement:
    shell: Any = CoordinatorActor  # Ray's decorator adds `options` and `remote`
    coordinator = shell.options(**COORDINATOR_OPTIONS).remote(coordinator_builder(parts), 0)
    crowds = [_place(CrowdActor, parts.workers[index :: size.num_processes], coordinator) for index in range(size.num_processes)]
    learner = _place(LearnerActor, parts.learner, coordinator)
    servers = [_place(RewardActor, server, coordinator) for server in parts.servers]
    loops = [learner.run.remote(), *(server.run.remote() for server in servers)]
    workers = [crowd.run.remote() for crowd in crowds]
    memory_mib, finished_at = _watch(coordinator, RunStore(parts.store_url), [*loops, *workers], console)
    tables = ray.get(workers, timeout=LEAVE_S)
    ray.get(loops, timeout=LEAVE_S)
    calls = {method: [s for table in tables for s in table.get(method, ())] for method in sorted({m for table in tables for m in table})}
    first, last = min(finished_at), max(finished_at)
    return ControlMeasurement(
        calls=calls, memory_mib=memory_mib, seconds=finished_at[last] - finished_at[first], num_updates=last - first
    )  # fmt: skip


def _place(shell: Any, settings: Any, coordinator: Any) -> Any:
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    return shell.options(num_cpus=0, runtime_env={"env_vars": threads}).remote(settings, coordinator)


def _watch(coordinator: Any, store: RunStore, roles: Sequence[Any], console: Console) -> tuple[dict[int, float], dict[int, float]]:
    """Tick until the run is over. Returns update -> MiB (every FIRST_LOOK updates and at the end), and update -> seconds when it was seen."""
    memory_mib: dict[int, float] = {}
    finished_at: dict[int, float] = {}
    outcome: Outcome
    while True:
        ended, _ = ray.wait(list(roles), num_returns=len(roles), timeout=1.0)
        ray.get(ended, timeout=CALL_TIMEOUT_S)  # raises what ended a role
        outcome = ray.get(coordinator.tick.remote(), timeout=CALL_TIMEOUT_S)
        update = int(ray.get(coordinator.summary.remote(), timeout=CALL_TIMEOUT_S)["update"])
        now = time.monotonic()
        if update and update not in finished_at:
            finished_at[update] = now
            if outcome.is_over or update // FIRST_LOOK > max(memory_mib, default=0) // FIRST_LOOK:
                memory_mib[update] = _coordinator_mib(store)
                console.print(f"update {update}: the coordinator holds {memory_mib[update]:.1f} MiB", highlight=False)
        if outcome.is_over:
            break
        if finished_at and now - max(finished_at.values()) > STALL_S:
            raise ControlBenchError(f"benchmark: no update was finished for {STALL_S:.0f} s after update {update}; see Ray's logs")
    outcome.raise_if_failed()
    memory_mib.setdefault(max(finished_at), _coordinator_mib(store))
    return memory_mib, finished_at


def _coordinator_mib(store: RunStore) -> float:
    """Resident memory of the process that status.json names."""
    status = read_status(store)
    if status is None:
        raise ControlBenchError(f"benchmark: {store.url} has no status.json, so the coordinator's process is unknown")
    pages = int(Path(f"/proc/{status.process_id}/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / _MIB


def describe_calls(calls: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    """Return "all" and each method -> number of calls and p50, p95, max in milliseconds."""
    tables = {"all": [seconds for each in calls.values() for seconds in each], **calls}
    return {
        method: {
            "count": len(seconds), "p50_ms": 1e3 * float(np.percentile(seconds, 50)), "p95_ms": 1e3 * float(np.percentile(seconds, 95)),
            "max_ms": 1e3 * max(seconds),
        }
        for method, seconds in tables.items()
    }  # fmt: skip


def make_report(measurement: ControlMeasurement, size: ControlSize, command: str, load_before: float) -> dict[str, Any]:
    """What control.json holds."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
        "num_workers": size.num_workers,
        "num_processes": size.num_processes,
        "num_updates": size.num_updates,
        "groups_per_update": GROUPS_PER_UPDATE,
        "fakes": FAKES,
        "updates_per_minute": 60.0 * measurement.num_updates / measurement.seconds if measurement.seconds > 0 else None,
        "calls": describe_calls(measurement.calls),
        "coordinator_mib": {str(update): mib for update, mib in sorted(measurement.memory_mib.items())},
        "load_average": {"before": load_before, "after": os.getloadavg()[0]},
        "machine": describe_environment(),
    }


def render_control(report: Mapping[str, Any]) -> str:
    """Return control.md; every number is the report's."""
    machine, memory = report["machine"], {int(update): mib for update, mib in report["coordinator_mib"].items()}
    rows = [
        f"| {method} | {row['count']} | {row['p50_ms']:.2f} | {row['p95_ms']:.2f} | {row['max_ms']:.0f} |"
        for method, row in report["calls"].items()
    ]
    blocks = [
        ["# The control plane under many workers"],
        [f"    {report['command']}"],
        [
            f"- {report['num_workers']} fake rollout workers (coroutines in {report['num_processes']} processes), a fake learner and two fake "
            f"reward servers, {report['num_updates']} updates of {report['groups_per_update']} groups, `{report['fakes']}`; real files, ledger, RPCs",
            f"- date: {report['date']}; commit: {machine['commit']}; ray {machine['packages']['ray']}",
            f"- machine: {machine['cpu']}, {machine['num_cpus']} cores, {machine['memory_bytes'] / (1 << 30):.1f} GiB; load average before and after: "
            f"{report['load_average']['before']:.2f}, {report['load_average']['after']:.2f}",
        ],
        ["| call | number | p50, ms | p95, ms | largest, ms |", "| --- | --- | --- | --- | --- |", *rows],
        [
            "| update | coordinator's memory, MiB |",
            "| --- | --- |",
            *(f"| {update} | {mib:.1f} |" for update, mib in sorted(memory.items())),
        ],
        verdict(report),
    ]
    return "\n\n".join("\n".join(block) for block in blocks if block) + "\n"


def verdict(report: Mapping[str, Any]) -> list[str]:
    """Whether the two promises held in this run, in words."""
    memory = {int(update): mib for update, mib in report["coordinator_mib"].items()}
    if report["num_updates"] < FULL_UPDATES or min(memory) < FIRST_LOOK:
        return [
            f"A run of {report['num_updates']} updates proves nothing about {FULL_UPDATES}: its figures only show that the benchmark works."
        ]
    p95, growth = report["calls"]["all"]["p95_ms"], memory[max(memory)] - memory[min(memory)]
    return [
        f"The run made {report['updates_per_minute']:.1f} updates a minute.",
        f"95 % of all calls took at most {p95:.2f} ms ({'within' if p95 < P95_LIMIT_MS else 'NOT within'} the limit of {P95_LIMIT_MS:g} ms).",
        f"From update {min(memory)} to {max(memory)} the coordinator's memory changed by {growth:+.1f} MiB "
        f"({'flat' if growth < GROWTH_LIMIT_MIB else 'NOT flat'}: the limit is {GROWTH_LIMIT_MIB:g} MiB).",
    ]  # fmt: skip


def _command(
    out: Annotated[Path, typer.Option(help="Where control.json and control.md go.")] = Path("docs/benchmarks"),
    updates: Annotated[int, typer.Option(min=2)] = FULL_UPDATES,
    workers: Annotated[int, typer.Option(min=1)] = 64,
    processes: Annotated[int, typer.Option(min=1, help="processes that hold the workers")] = 4,
) -> None:
    """Measure the control plane and write control.json and control.md."""
    console, size = Console(), ControlSize(num_workers=workers, num_processes=processes, num_updates=updates)
    command = shlex.join(["python", "-m", "deploy.bench_control", "--out", str(out), "--updates", str(updates), "--workers", str(workers)])
    load_before = os.getloadavg()[0]
    try:
        with tempfile.TemporaryDirectory() as folder:
            report = make_report(measure_control(size, Path(folder), console), size, command, load_before)
    except FlowfleetError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {error}", soft_wrap=True, highlight=False)
        raise typer.Exit(error.exit_code) from error
    out.mkdir(parents=True, exist_ok=True)
    (out / "control.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (out / "control.md").write_text(render_control(report), encoding="utf-8")
    console.print(render_control(report), markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    typer.run(_command)
