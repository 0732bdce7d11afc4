"""A Ray cluster of three nodes on this machine, with token authentication, and a run submitted to it (`make cluster`).

python -m deploy.local_cluster tiny-geneval --minutes 3
"""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
from rich.console import Console

from common.errors import FlowfleetError

BIN = Path(sys.executable).parent
START_TIMEOUT_S, END_TIMEOUT_S, POLL_S = 180.0, 60.0, 0.5
app = typer.Typer(add_completion=False, help=__doc__)


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalNode:
    """One `ray start` on this host."""

    num_cpus: int  # what it says it has: reservations, not cores
    resources: str = "{}"  # custom resources as JSON: the roles that it takes


NODES = (
    LocalNode(num_cpus=0),  # the head: driver and Coordinator, no work
    LocalNode(num_cpus=2, resources='{"learner": 1}'),
    LocalNode(num_cpus=8, resources='{"rollout": 4, "reward": 4}'),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalCluster:
    """A cluster that is up."""

    dashboard: str  # http://127.0.0.1:PORT
    address: str  # of the head, for drivers on this host
    environment: dict[str, str]  # with the token's path: for who talks to it
    sessions: Path  # Ray's logs


def free_port() -> int:
    """A port of loopback that nobody has now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def local_cluster(nodes: tuple[LocalNode, ...] = NODES) -> Iterator[LocalCluster]:
    """Bring nodes up on loopback behind a token, and end them by their own process ids.

    Raises:
        FlowfleetError: a node ended, or the dashboard did not answer in time.
    """
    folder = Path(tempfile.mkdtemp(prefix="ff"))  # short: a socket's path is
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    environment = os.environ | {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0",
    }  # fmt: skip
    port, dashboard = free_port(), free_port()
    address = f"127.0.0.1:{port}"
    commands = [[
        str(BIN / "ray"), "start", "--head", "--block", "--dashboard-agent-listen-port=0", "--node-ip-address=127.0.0.1", f"--port={port}", "--dashboard-host=127.0.0.1",
        f"--dashboard-port={dashboard}", f"--num-cpus={nodes[0].num_cpus}", f"--resources={nodes[0].resources}", f"--temp-dir={folder}/s",
    ]]  # fmt: skip
    commands += [
        [str(BIN / "ray"), "start", "--block", "--dashboard-agent-listen-port=0", f"--address={address}", f"--node-ip-address=127.0.0.{number}",
         f"--num-cpus={node.num_cpus}", f"--resources={node.resources}"]
        for number, node in enumerate(nodes[1:], start=2)  # an address each: Ray tells nodes apart by it
    ]  # fmt: skip
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for command in commands:
            log = (folder / f"node{len(processes)}.log").open("wb")
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True))
            log.close()
            if len(processes) == 1:
                _wait(lambda: _listens(dashboard), "the dashboard to answer", processes, folder)
            # One after the other: two that start at once on a host may choose the same ports.
            _wait(lambda: _num_alive(address, environment) == len(processes), f"node {len(processes)} to register", processes, folder)
        yield LocalCluster(dashboard=f"http://127.0.0.1:{dashboard}", address=address, environment=environment, sessions=folder / "s")
    finally:
        _end(processes)
        shutil.rmtree(folder, ignore_errors=True)


def _wait(holds: Callable[[], bool], what: str, processes: list["subprocess.Popen[bytes]"], folder: Path) -> None:
    """Until it holds. Raises FlowfleetError when a node ended or it takes too long."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while not holds():
        for number, process in enumerate(processes):
            if process.poll() is not None:
                told = (folder / f"node{number}.log").read_text(errors="replace")[-1500:]
                raise FlowfleetError(f"local cluster: node {number} ended with {process.returncode}; its last words:\n{told}")
        if time.monotonic() > deadline:
            raise FlowfleetError(f"local cluster: waited {START_TIMEOUT_S:.0f} s for {what}; look for what else holds this machine")
        time.sleep(POLL_S)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _num_alive(address: str, environment: dict[str, str]) -> int:
    """Nodes of the cluster, asked by a process of its own: a driver's connection is process-wide."""
    command = [sys.executable, "-m", "deploy.count_nodes", address]
    told = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=START_TIMEOUT_S, check=False).stdout.split()
    return int(told[-1]) if told and told[-1].isdigit() else 0


def _end(processes: list["subprocess.Popen[bytes]"]) -> None:
    """SIGTERM to each node, the head last; SIGKILL to who stays."""
    for process in reversed(processes):
        process.send_signal(signal.SIGTERM)
    for process in reversed(processes):
        try:
            process.wait(timeout=END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


@app.command()
def run(
    recipe: Annotated[str, typer.Argument()] = "tiny-geneval",
    minutes: Annotated[float, typer.Option(help="of training", min=0.1)] = 3.0,
    run_dir: Annotated[Path, typer.Option()] = Path("runs/cluster"),
    sets: Annotated[list[str] | None, typer.Option("--set", help="key=value")] = None,
) -> None:
    """Start the cluster, submit a run to it as a user would, end the cluster; ends with the run's exit code."""
    console = Console()
    signal.signal(signal.SIGTERM, _leave)  # a default SIGTERM would leave the nodes behind
    with local_cluster() as cluster:
        console.print(f"three nodes are up behind a token; dashboard {cluster.dashboard}", highlight=False)
        command = [str(BIN / "flowfleet"), "submit", recipe, "--address", cluster.dashboard, "--run-dir", str(run_dir.resolve())]
        for item in (f"schedule.time_limit_s={minutes * 60:g}", *(sets or ())):
            command += ["--set", item]
        code = subprocess.run(command, env=cluster.environment, check=False).returncode
    raise typer.Exit(code)


if __name__ == "__main__":
    app()
