"""`make chaos`: kill -9 random processes of a real run from outside, then prove from its files that nothing was lost.

    python -m deploy.chaos --kills 30 --seed 1        # random roles at random moments, two runs compared bit by bit

A run in synchronous mode is a function of its configuration and seed, so the killed run's adapter must equal the adapter of a
run that nobody touched. max_attempts is 100: a group that is dropped changes the data, and then nothing can be compared.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from common.errors import CorruptFile, FlowfleetError, StoreError
from common.policy.adapters import read_header
from common.store.audit import audit
from common.store.manifests import Status, read_status
from common.store.recovery import adapters
from common.store.run_store import RunStore
from deploy.environment import describe_environment

ROLES = ("rollout", "reward", "learner", "coordinator", "driver")
FIXED = (
    "schedule.max_staleness=0",
    "schedule.max_attempts=100",
    "rollout.num_workers=2",
    "evaluation.every=0",
    "evaluation.at_start=false",
)
RUN_TIMEOUT_S = 3600.0
POLL_S = 0.2
app = typer.Typer(add_completion=False, help=__doc__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """One process that was ended."""

    role: str
    process_id: int
    seconds: float  # since the first start
    update: int  # newest manifest at that moment


@dataclass(slots=True, kw_only=True)
class ChaosReport:
    """What a run under kills came to."""

    kills: list[Kill] = field(default_factory=list)
    starts: int = 0
    seconds: float = 0.0
    violations: list[str] = field(default_factory=list)
    digest: str = ""  # of the last adapter

    @property
    def by_role(self) -> dict[str, int]:
        """Kills of each role."""
        return dict(Counter(kill.role for kill in self.kills))


def victims(status: Status, driver: int) -> dict[str, list[int]]:
    """Role -> processes that may be killed: those of status.json that descend from this driver, and the driver itself.

    A status.json may outlive its processes and their ids may be given anew, so only the driver's own descendants count.
    """
    if status.state != "running":
        return {}
    found: dict[str, list[int]] = {"coordinator": [status.process_id]}
    for slot, report in status.fleet.slots.items():
        found.setdefault(slot.partition(".")[0], []).extend(report.process_ids)
    return {role: [pid for pid in pids if driver in _ancestors(pid)] for role, pids in found.items()} | {"driver": [driver]}


def last_digest(store: RunStore) -> str:
    """The digest of the newest adapter. Raises FlowfleetError when none is published."""
    published = adapters(store)
    if not published:
        raise FlowfleetError(f"chaos: {store.url} holds no adapter; the run published nothing")
    path = published[max(published)]
    return str(read_header(store.read(path), path)["digest"])


def role_order(seed: int) -> Iterator[str]:
    """Roles without end: each round holds every role once, in an order of its own."""
    generator = random.Random(seed)
    while True:
        yield from generator.sample(ROLES, len(ROLES))


class Chaos:
    """A run, and the hand that kills its processes.

    Args:
        command: the train command, started again whenever its driver has gone.
        run_dir: where it writes.
        seed: of the roles' order and of the pauses.
        pause_s: mean seconds between two kills.
        log: takes the output of every start.
    """

    def __init__(self, command: list[str], run_dir: Path, *, seed: int, pause_s: float, log: Path) -> None:
        self.report = ChaosReport()
        self._command, self._store, self._log = command, RunStore(str(run_dir)), log
        self._random, self._pause_s = random.Random(seed), pause_s
        self._roles = role_order(seed)
        self._begun = time.monotonic()

    def run(self, num_kills: int) -> ChaosReport:
        """Kill so many processes (0: none), see the run to its end, audit it.

        Raises:
            FlowfleetError: the run ended otherwise than done, or did not end in time.
        """
        driver = self._start()
        role, due = next(self._roles), self._next_pause()
        while True:
            code = driver.poll()
            if code == 0:
                break
            if code is not None:
                if code != -signal.SIGKILL:
                    raise FlowfleetError(f"chaos: the run ended with exit code {code}; its output is in {self._log}")
                driver = self._start()
            if time.monotonic() - self._begun > RUN_TIMEOUT_S:
                raise FlowfleetError(f"chaos: the run did not end within {RUN_TIMEOUT_S:.0f} s; its output is in {self._log}")
            if len(self.report.kills) < num_kills and time.monotonic() >= due and self._kill(role, driver.pid):
                role, due = next(self._roles), self._next_pause()
            time.sleep(POLL_S)
        return self._conclude()

    def _next_pause(self) -> float:
        return time.monotonic() + self._random.uniform(0.2, 1.8) * self._pause_s

    def _start(self) -> "subprocess.Popen[bytes]":
        self.report.starts += 1
        with self._log.open("ab") as output:
            return subprocess.Popen(self._command, stdout=output, stderr=subprocess.STDOUT)

    def _kill(self, role: str, driver: int) -> bool:
        """End one process of a role; False while there is none."""
        status = self._status()
        candidates = victims(status, driver).get(role, []) if status is not None else []
        if status is None or not candidates:
            return False
        victim = self._random.choice(sorted(candidates))
        try:
            os.kill(victim, signal.SIGKILL)
        except ProcessLookupError:
            return False
        seconds = round(time.monotonic() - self._begun, 1)
        self.report.kills.append(Kill(role=role, process_id=victim, seconds=seconds, update=status.manifests))
        return True

    def _status(self) -> Status | None:
        try:
            return read_status(self._store)
        except (CorruptFile, StoreError):
            return None  # a start is about to write it

    def _conclude(self) -> ChaosReport:
        self.report.seconds = round(time.monotonic() - self._begun, 1)
        self.report.violations = [f"{each.rule}: {each.where}" for each in audit(self._store).violations]
        self.report.digest = last_digest(self._store)
        return self.report


def _ancestors(process_id: int) -> set[int]:
    """The processes above one; empty when it is gone."""
    found: set[int] = set()
    while process_id > 1:
        try:
            stat = Path(f"/proc/{process_id}/stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return found
        process_id = int(stat.rpartition(")")[2].split()[1])
        found.add(process_id)
    return found


@app.command()
def chaos(
    *, recipe: Annotated[str, typer.Option()] = "tiny-geneval", updates: Annotated[int, typer.Option()] = 12,
    kills: Annotated[int, typer.Option()] = 30, seed: Annotated[int, typer.Option()] = 1,
    pause: Annotated[float, typer.Option(help="mean seconds between two kills")] = 8.0,
    work: Annotated[Path, typer.Option(help="folder of the two runs; must not exist")] = Path("runs/chaos"),
    out: Annotated[Path, typer.Option(help="the report")] = Path("docs/results/chaos.json"),
    sets: Annotated[list[str] | None, typer.Option("--set")] = None,
) -> None:  # fmt: skip
    """Run twice, once untouched and once under kills; exit with 0 only if the audit is clean and the adapters are equal."""
    console = Console()
    if work.exists():
        raise FlowfleetError(f"chaos: {work} exists; its runs are over or belong to somebody; give another --work")
    work.mkdir(parents=True)
    reports = {}
    for name, count in (("untouched", 0), ("killed", kills)):
        command = [sys.executable, "-m", "deploy.cli", "train", recipe, "--run-dir", str(work / name)]
        command += [part for item in (*FIXED, f"schedule.num_updates={updates}", *(sets or [])) for part in ("--set", item)]
        hand = Chaos(command, work / name, seed=seed, pause_s=pause, log=work / f"{name}.log")
        reports[name] = hand.run(count)
        console.print(f"{name}: {len(reports[name].kills)} kills {reports[name].by_role}, {reports[name].seconds:.0f} s", highlight=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(summarize(reports, recipe, seed, updates), indent=1, sort_keys=True) + "\n", encoding="utf-8")
    killed, untouched = reports["killed"], reports["untouched"]
    is_equal = killed.digest == untouched.digest
    console.print(f"audit: {'clean' if not killed.violations else killed.violations}; adapters {'equal' if is_equal else 'DIFFER'}; {out}")
    if len(killed.kills) < kills:
        console.print(f"only {len(killed.kills)} of {kills} kills came before the run ended; raise --updates or lower --pause")
    if killed.violations or untouched.violations or not is_equal or len(killed.kills) < kills:
        raise typer.Exit(1)


def summarize(reports: dict[str, ChaosReport], recipe: str, seed: int, updates: int) -> dict[str, Any]:
    """The report file."""
    killed = reports["killed"]
    return {
        "recipe": recipe, "seed": seed, "updates": updates, "environment": dict(describe_environment()),
        "kills": [asdict(kill) for kill in killed.kills], "kills_by_role": killed.by_role, "starts": killed.starts,
        "seconds": {name: report.seconds for name, report in reports.items()},
        "violations": {name: report.violations for name, report in reports.items()},
        "digests": {name: report.digest for name, report in reports.items()},
        "is_bit_equal": killed.digest == reports["untouched"].digest,
    }  # fmt: skip


def main() -> None:
    """Run the command line; a failure is one message."""
    try:
        app()
    except FlowfleetError as error:
        Console(stderr=True).print(f"error: {error}", style="bold red", highlight=False, soft_wrap=True, markup=False)
        raise SystemExit(error.exit_code) from None


if __name__ == "__main__":
    main()
