"""Images a second of one run while `flowfleet scale` changes its workers: `python -m deploy.bench_scale`, with fake engines or real ones."""

import datetime
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from common.errors import FlowfleetError
from common.store.manifests import Status, read_status
from common.store.run_store import RunStore
from deploy.commands.control import request_scale
from deploy.config import load_config
from deploy.environment import describe_environment

RECIPE = "tiny-geneval"
FAKES = "rollout=1.0s,learner=0.2s,reward=0.05s"  # a rollout worker is the bottleneck at every size that is measured
SETS = {
    "fake": ("schedule.max_staleness=2", "learner.groups_per_update=4", "rollout.group_size=4"),
    "real": ("schedule.max_staleness=0",),
}
COMMON_SETS = ("schedule.num_updates=100000", "evaluation.every=0", "evaluation.at_start=false", "learner.warmup_steps=0")
SETTLE_UPDATES = 2  # after a change: what was begun at the old size passes
STAGE_TIMEOUT_S = 900.0
POLL_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """The run at one size."""

    workers: int
    updates: int
    seconds: float
    images_per_second: float
    learner_process: int


class ScaledRun:
    """A run in a process of its own, and what its status.json says."""

    def __init__(self, command: Sequence[str], run_dir: Path, log: Path) -> None:
        self._store, self._log = RunStore(str(run_dir)), log
        with log.open("ab") as output:
            self._driver = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)

    def scale(self, workers: int) -> None:
        """Ask for a number of workers and wait until they run. Raises FlowfleetError."""
        request_scale(self._store, {"rollout": workers})
        self.wait(lambda status: _running(status, "rollout.") == workers == status.fleet.sizes.get("rollout"), f"{workers} running workers")

    def wait(self, holds: Callable[[Status], bool], what: str) -> Status:
        """Return the first status for which it holds. Raises FlowfleetError: the run ended, or time is over."""
        deadline = time.monotonic() + STAGE_TIMEOUT_S
        while time.monotonic() < deadline:
            if self._driver.poll() is not None:
                raise FlowfleetError(
                    f"bench: the run ended with exit code {self._driver.returncode} before {what}; its output is in {self._log}"
                )
            status = read_status(self._store)
            if status is not None and status.state == "running" and holds(status):
                return status
            time.sleep(POLL_S)
        raise FlowfleetError(f"bench: {STAGE_TIMEOUT_S:.0f} s passed before {what}; the run's output is in {self._log}")

    def published(self) -> int:
        """The newest version."""
        status = read_status(self._store)
        return -1 if status is None else status.version

    def learner_process(self) -> int:
        """The learner's process id."""
        status = self.wait(lambda status: _running(status, "learner") == 1, "a running learner")
        return status.fleet.slots["learner"].process_ids[0]

    def end(self) -> None:
        """SIGTERM: it saves and leaves."""
        if self._driver.poll() is None:
            self._driver.terminate()
            self._driver.wait(STAGE_TIMEOUT_S)


def _running(status: Status, prefix: str) -> int:
    return sum(slot.startswith(prefix) and report.state == "running" for slot, report in status.fleet.slots.items())


def measure_stage(run: ScaledRun, workers: int, updates: int, images_per_update: int) -> Stage:
    """Scale, let the change settle, and time whole updates."""
    run.scale(workers)
    first = run.published() + SETTLE_UPDATES
    run.wait(lambda status: status.version >= first, f"update {first}")
    begun, first = time.monotonic(), run.published()
    run.wait(lambda status: status.version >= first + updates, f"update {first + updates}")
    seconds, done = time.monotonic() - begun, run.published() - first
    return Stage(
        workers=workers, updates=done, seconds=round(seconds, 1), images_per_second=round(done * images_per_update / seconds, 2),
        learner_process=run.learner_process(),
    )  # fmt: skip


def train_command(engines: str, run_dir: Path, items: Sequence[str]) -> list[str]:
    """The run's command line."""
    fakes = ["--fake", FAKES] if engines == "fake" else []
    command = [sys.executable, "-m", "deploy.cli", "train", RECIPE, "--run-dir", str(run_dir), *fakes]
    return command + [part for item in items for part in ("--set", item)]


def render(reports: Mapping[str, Any]) -> str:
    """Return scale.md: every kind of engines that was measured."""
    blocks = [
        "# Workers that come and go",
        "Images a second over whole updates, after `flowfleet scale RUN --rollout N` in a run that goes on.",
    ]
    for engines, report in sorted(reports.items()):
        machine, base = report["machine"], report["stages"][0]["images_per_second"]
        rows = [
            f"| {each['workers']} | {each['updates']} | {each['seconds']:.1f} | {each['images_per_second']:.2f} | {each['images_per_second'] / base:.2f} |"
            for each in report["stages"]
        ]
        untouched = len({each["learner_process"] for each in report["stages"]}) == 1
        blocks += [
            f"## {engines} engines",
            f"    {report['command']}",
            f"- {report['date']}; commit {machine['commit']}; {machine['cpu']}, {machine['num_cpus']} cores; load average before "
            f"{report['load_before']:.2f}; {report['what']}\n- the learner's process is {'the same in all stages' if untouched else 'NOT the same'}",
            "\n".join(["| workers | updates | seconds | images/s | ratio to the first |", "| --- | --- | --- | --- | --- |", *rows]),
        ]
    return "\n\n".join(blocks) + "\n"


def _command(
    engines: Annotated[str, typer.Option(help="fake or real")] = "fake",
    sizes: Annotated[str, typer.Option(help="numbers of workers, one stage each")] = "1,4,2",
    updates: Annotated[int, typer.Option(min=1, help="timed in each stage")] = 8,
    out: Annotated[Path, typer.Option(help="where scale.json and scale.md go")] = Path("docs/benchmarks"),
    sets: Annotated[list[str] | None, typer.Option("--set")] = None,
) -> None:
    """Measure one kind of engines; the other's figures in scale.json stay."""
    console, wanted, load_before = Console(), [int(size) for size in sizes.split(",")], os.getloadavg()[0]
    if engines not in SETS:
        raise typer.BadParameter(f"--engines is one of {', '.join(SETS)}, not {engines}")
    items = [*COMMON_SETS, *SETS[engines], f"rollout.num_workers={wanted[0]}", *(sets or ())]
    shown = shlex.join(["python", "-m", "deploy.bench_scale", "--engines", engines, "--sizes", sizes, "--updates", str(updates)])
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        run = ScaledRun(train_command(engines, run_dir, items), run_dir, Path(folder) / "run.log")
        try:
            run.learner_process()
            stages = [_shown(measure_stage(run, size, updates, load_config(RECIPE, items).images_per_update), console) for size in wanted]
        finally:
            run.end()
    file = out / "scale.json"
    reports = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    reports[engines] = {
        "command": shown, "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "machine": dict(describe_environment()),
        "load_before": load_before, "stages": [asdict(stage) for stage in stages],
        "what": f"`--fake {FAKES}`, {', '.join(SETS['fake'])}" if engines == "fake" else f"{RECIPE} as shipped, {', '.join(SETS['real'])}, one thread each",
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(reports, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    (out / "scale.md").write_text(render(reports), encoding="utf-8")
    console.print(render(reports), markup=False, highlight=False, soft_wrap=True)


def _shown(stage: Stage, console: Console) -> Stage:
    console.print(f"{stage.workers} workers: {stage.images_per_second:.2f} images/s", highlight=False)
    return stage


if __name__ == "__main__":
    typer.run(_command)
