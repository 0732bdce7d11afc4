"""The doctor's look at Ray: its token, a start on trial, and a cluster that is to be joined, asked from a process of its own."""

import json
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from common.store.run_store import RunStore
from deploy.doctor.checks import Bench, Row

RAY_START_S: Final = 120.0
CLUSTER_S: Final = 240.0  # a node's first task starts a Python process
LOGS: Final = "look at /tmp/ray/session_latest/logs; train with --local meanwhile"
_SKEW_S: Final = 30.0
_RAY_TRIAL: Final = (
    "import ray; ray.init(address='local', num_cpus=1, include_dashboard=False, log_to_driver=False, configure_logging=False, "
    "object_store_memory=80_000_000); assert ray.cluster_resources()['CPU'] == 1; ray.shutdown()"
)
_ASK_CLUSTER: Final = "from deploy.doctor.cluster import main; main()"


def look_at_token(address: str | None, environ: Mapping[str, str] | None = None, home: Path | None = None) -> Sequence[Row]:
    """Whether Ray will ask for a token, and whether only its owner can read that."""
    environ = os.environ if environ is None else environ
    bench = Bench(what="ray token", rule="with RAY_AUTH_MODE=token: in a file that its owner alone reads (mode 600)")
    mode = environ.get("RAY_AUTH_MODE", "")
    if mode == "token" and environ.get("RAY_AUTH_TOKEN"):
        return [
            bench.warn("in the variable RAY_AUTH_TOKEN, which every child inherits", "put it into a file; set RAY_AUTH_TOKEN_PATH to that")
        ]
    named = environ.get("RAY_AUTH_TOKEN_PATH")
    file = Path(named) if named else (home or Path.home()) / ".ray" / "auth_token"
    if mode != "token":
        if file.exists() and _is_open(file):
            return [bench.warn(f"{file} has mode {_mode(file)}: others can read it", f"chmod 600 {file}")]
        if address is not None:
            return [
                bench.warn("RAY_AUTH_MODE is not token: whoever reaches that cluster runs code on it", "start it with RAY_AUTH_MODE=token")
            ]
        return [bench.ok("RAY_AUTH_MODE is not set: a cluster of one's own follows Ray's default (2.60: a token)")]
    if not file.is_file() or not file.read_bytes().strip():
        remedy = "ray get-auth-token --generate, then chmod 600; or set RAY_AUTH_TOKEN_PATH to the cluster's token file"
        return [bench.fail(f"RAY_AUTH_MODE=token, and {file} {'is empty' if file.is_file() else 'is missing'}", remedy)]
    if _is_open(file):
        return [
            bench.fail(f"{file} has mode {_mode(file)}: others can read it", f"chmod 600 {file}; if others log in here, make a new token")
        ]
    return [bench.ok(f"{file}, mode {_mode(file)}")]


def _mode(file: Path) -> str:
    return f"{stat.S_IMODE(file.stat().st_mode):o}"


def _is_open(file: Path) -> bool:
    return bool(file.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO))


def look_at_store(url: str) -> Sequence[Row]:
    """The promises that a run directory must keep, proved on the spot; what the probe made is removed."""
    bench = Bench(what="store", rule="a second create is refused, another process sees the first's file")
    store = RunStore(url)
    root = store.local_root
    made = [] if root is None else [path for path in (root / ".probe", root, *root.parents) if not path.exists()]
    try:
        store.probe()
    finally:
        for path in made:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
    return [bench.ok(f"{url} keeps them")]


def look_at_ray(address: str | None) -> Sequence[Row]:
    """A cluster's door when one is named, else a start of Ray in a child process that is gone afterwards."""
    if address is not None:
        return [_knock(address)]
    bench = Bench(what="ray", rule="ray.init starts a cluster on this machine")
    code, _, told = _child([_RAY_TRIAL], RAY_START_S)
    if code is None:
        return [bench.fail(f"did not start within {RAY_START_S:g} s", LOGS)]
    return [bench.ok("started and stopped") if code == 0 else bench.fail(f"did not start: {_last_line(told)}", LOGS)]


def _child(arguments: Sequence[str], timeout_s: float) -> tuple[int | None, str, str]:
    """Run Python code in a session of its own, with no cluster named. Returns (exit code, None: too late; output; messages)."""
    child = subprocess.Popen(
        [sys.executable, "-c", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "RAY_ADDRESS": ""}, errors="replace",
    )  # fmt: skip
    try:
        output, told = child.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
        return None, "", ""
    return child.returncode, output, told


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no message")


def _knock(address: str) -> Row:
    bench = Bench(what="ray", rule="the cluster at --address (RAY_ADDRESS) takes connections")
    if address in ("auto", "local"):
        return bench.skip(f"{address}: Ray looks for it itself")
    parts = urlsplit(address if "//" in address else f"ray://{address}")
    try:
        with socket.create_connection((parts.hostname or "", parts.port or 6379), timeout=5.0):
            return bench.ok(f"{address} answers")
    except (OSError, ValueError) as error:
        return bench.fail(
            f"{address} does not answer ({error})", "start the head, mend the address, or unset RAY_ADDRESS for a cluster of your own"
        )


def look_at_cluster(address: str, run_dir: str | None) -> Sequence[Row]:
    """Join the cluster from a child process, ask every node what it is, and have each look at the run directory."""
    bench = Bench(what="cluster", rule="this Ray may join it")
    if address.startswith("http"):
        return [bench.skip("that is a dashboard; give the head's address (HOST:6379) and the nodes are asked, too")]
    if address == "local":
        return [bench.skip("a cluster of one's own has one node: this one")]
    code, output, told = _child([_ASK_CLUSTER, address, run_dir or ""], CLUSTER_S)
    if code is None:
        return [
            bench.fail(
                f"{address}: no answer within {CLUSTER_S:g} s", "look at `ray status` there, and at the firewall between here and it"
            )
        ]
    lines = [line for line in output.splitlines() if line.startswith("{")]
    if not lines:
        return [bench.fail(f"{address}: {_last_line(told)}", "look at `ray status` there")]
    return cluster_rows(json.loads(lines[-1]), run_dir)


def cluster_rows(told: Mapping[str, Any], run_dir: str | None) -> list[Row]:
    """Rows of what `deploy.doctor.cluster` said.

    Args:
        told: {"error"}, or {"driver": facts, "nodes": {name: facts or {"problem"}}, "store": problem or ""}.
        run_dir: that the nodes were to look at; None: none.
    """
    version = Bench(what="cluster versions", rule="every node has the driver's Ray, Python and flowfleet")
    if told.get("error"):
        error = str(told["error"])
        if "ersion mismatch" in error:
            return [version.fail(error, "install the cluster's versions here (constraints.txt), or rebuild its image from this checkout")]
        remedy = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to the cluster's token if it asks for one; look at `ray status` there"
        return [Bench(what="cluster", rule="this Ray may join it").fail(error, remedy)]
    nodes: Mapping[str, Mapping[str, Any]] = told["nodes"]
    mine: Mapping[str, Any] = told["driver"]
    silent = [f"{name} {facts['problem']}" for name, facts in nodes.items() if "problem" in facts]
    heard = {name: facts for name, facts in nodes.items() if "problem" not in facts}
    wrong = [
        f"{name}: {key} {facts[key]}, here {mine[key]}"
        for name, facts in heard.items() for key in ("ray", "python", "flowfleet") if facts[key] != mine[key]
    ]  # fmt: skip
    same = f"{len(heard)} node(s): Ray {mine['ray']}, Python {mine['python']}, flowfleet {mine['flowfleet']}"
    rows = [
        version.fail("; ".join([*silent, *wrong]), "give every node the same image or environment (constraints.txt)")
        if silent or wrong else version.ok(same),
        _clocks(heard), _limits(heard),
    ]  # fmt: skip
    store = Bench(what="cluster store", rule="every node sees the run directory as the driver does")
    if run_dir is None:
        return [*rows, store.skip("no --run-dir was given")]
    return [*rows, store.fail(str(told["store"]), "see there") if told["store"] else store.ok(f"{len(heard)} node(s) share {run_dir}")]


def _clocks(heard: Mapping[str, Mapping[str, Any]]) -> Row:
    """Clocks cannot be compared better than a round trip takes; what is certain is told."""
    bench = Bench(what="cluster clocks", rule=f"within {_SKEW_S:g} s: only the age of status.json is compared between hosts")
    apart = [f"{name} {facts['skew_s']:.0f} s" for name, facts in heard.items() if facts["skew_s"] > _SKEW_S]
    return bench.warn("; ".join(apart), "run an NTP client on these hosts") if apart else bench.ok("nothing else needs one")


def _limits(heard: Mapping[str, Mapping[str, Any]]) -> Row:
    bench = Bench(what="cluster limits", rule="1024 open files and 256 MiB of /dev/shm on every node")
    low = [f"{name} {facts['open_files']} open files" for name, facts in heard.items() if 0 <= facts["open_files"] < 1024]
    low += [f"{name} {facts['shm_bytes'] // 2**20} MiB of /dev/shm" for name, facts in heard.items() if facts["shm_bytes"] < 256 * 2**20]
    return bench.warn("; ".join(low), "ulimit -n 65536 before `ray start`; docker run --shm-size=1g") if low else bench.ok("enough")
