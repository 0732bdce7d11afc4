"""The doctor's look at the machine: interpreter, packages, devices, memory, disk, ports, Ray. Nothing is left behind."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from common.store.run_store import RunStore
from deploy.config import RunConfig, shipped_path
from deploy.doctor import Bench, Check, Row
from deploy.environment import memory_bytes

MIN_PYTHON: Final = (3, 11)
DASHBOARD_PORT: Final = 8265
SMALL_SHM, SMALL_DISK = 256 * 2**20, 2 * 2**30
RAY_START_S: Final = 120.0
HUB: Final = ("huggingface.co", 443)
_REQUIREMENT = re.compile(r"(?P<name>[A-Za-z0-9_.-]+)(?:\[[^\]]*\])?>=(?P<version>[0-9.]+)")
_RAY_TRIAL: Final = (
    "import ray; ray.init(address='local', num_cpus=1, include_dashboard=False, log_to_driver=False, configure_logging=False, "
    "object_store_memory=80_000_000); assert ray.cluster_resources()['CPU'] == 1; ray.shutdown()"
)


def look_at_python() -> Sequence[Row]:
    """The interpreter's version."""
    bench = Bench(what="python", rule=f"{'.'.join(map(str, MIN_PYTHON))} or newer")
    told = f"{sys.version.split()[0]} at {sys.executable}"
    return [bench.ok(told) if sys.version_info[:2] >= MIN_PYTHON else bench.fail(told, "make an environment with a newer Python")]


def look_at_packages() -> Sequence[Row]:
    """What pyproject asks for, without the extras."""
    bench = Bench(what="packages", rule="pyproject.toml's dependencies are installed, new enough")
    wanted = [_REQUIREMENT.match(line) for line in metadata.requires("flowfleet") or () if "extra ==" not in line]
    problems = [_package_problem(found["name"], found["version"]) for found in wanted if found is not None]
    told = [problem for problem in problems if problem]
    if told:
        return [bench.fail("; ".join(told), "pip install -c constraints.txt -e .")]
    return [bench.ok(f"{len(problems)} found, torch {metadata.version('torch')}, ray {metadata.version('ray')}")]


def _package_problem(name: str, least: str) -> str:
    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        return f"{name} is missing"
    return "" if version_key(found) >= version_key(least) else f"{name} {found} is older than {least}"


def version_key(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: 2.13.0+cpu -> (2, 13, 0)."""
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


def look_at_devices(config: RunConfig | None) -> Sequence[Row]:
    """CPU cores and GPUs, and whether the recipe's device is among them."""
    import torch  # a broken torch is this check's finding, not the doctor's end

    asked = "cpu" if config is None else config.model.device
    bench = Bench(what="devices", rule=f"model.device = {asked} is here")
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    told = f"{os.cpu_count()} CPU cores, " + (f"{len(gpus)} GPU(s): {', '.join(gpus)}" if gpus else "no GPU that torch sees")
    index = int(asked.partition(":")[2] or 0) if asked.startswith("cuda") else -1
    if index >= len(gpus):
        return [bench.fail(told, "set model.device = cpu, or install a torch build for this GPU and its driver")]
    return [bench.ok(told)]


def look_at_memory(config: RunConfig | None) -> Sequence[Row]:
    """Whether every process on the CPU can hold the model."""
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        found = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text(encoding="utf-8"))
        available = int(found[1]) * 1024 if found else available
    told = f"{_gib(available)} available of {_gib(memory_bytes())}"
    if config is None or config.model.device != "cpu":
        return [Bench(what="memory", rule="enough for the recipe's processes (checked with a recipe on the CPU)").ok(told)]
    processes = config.rollout.num_workers + 1
    needed = processes * model_bytes(config)
    bench = Bench(what="memory", rule=f"{processes} processes hold the model: {_gib(needed)} at least")
    return [
        bench.ok(told) if available >= needed else bench.warn(told, "lower rollout.num_workers, or pass --local (one process, one model)")
    ]


def model_bytes(config: RunConfig) -> int:
    """Bytes of the model directory's weights."""
    return sum(file.stat().st_size for file in shipped_path(config.model.path).rglob("*.safetensors"))


def look_at_disk(place: Path, config: RunConfig | None) -> Sequence[Row]:
    """Free space where the run will lie, and /dev/shm."""
    needed = SMALL_DISK if config is None else config.store.max_bytes
    standing = next(path for path in (place, *place.parents) if path.exists())
    free = shutil.disk_usage(standing).free
    disk = Bench(what="disk", rule=f"{_gib(needed)} free" + (" (store.max_bytes)" if config else ""))
    rows = [disk.ok(f"{_gib(free)} free at {standing}")]
    if free < needed:
        rows = [disk.fail(f"{_gib(free)} free at {standing}", "free some, choose another --run-dir, or lower store.max_bytes")]
    shm, bench = Path("/dev/shm"), Bench(what="/dev/shm", rule=f"{_gib(SMALL_SHM)} for Ray's object store")
    if not shm.is_dir():
        return [*rows, bench.warn("there is none", "Ray then uses /tmp, which is slower; or pass --local")]
    room = shutil.disk_usage(shm).free
    small = bench.warn(f"{_gib(room)} free", "in a container: docker run --shm-size=1g; or pass --local")
    return [*rows, bench.ok(f"{_gib(room)} free") if room >= SMALL_SHM else small]


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


def look_at_ports(config: RunConfig | None) -> Sequence[Row]:
    """The port of /metrics, and that loopback can be listened on at all."""
    port = 0 if config is None else config.cluster.metrics_port
    bench = Bench(what="port", rule=f"127.0.0.1:{port} is free (cluster.metrics_port)" if port else "loopback can be listened on")
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
        except OSError as error:
            return [
                bench.fail(f"127.0.0.1:{port}: {error.strerror}", "set cluster.metrics_port to a free one, or 0 for none; end who holds it")
            ]
    return [bench.ok(f"port {port} is free" if port else "yes")]


def look_at_dashboard(tables: Iterable[Path] = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))) -> Sequence[Row]:
    """A Ray dashboard that the network reaches runs anybody's code, unless it asks for a token."""
    bench = Bench(what="ray dashboard", rule=f"port {DASHBOARD_PORT} listens on loopback only, or asks for a token")
    wide = [address for table in tables if table.exists() for address in wide_listeners(table.read_text(encoding="utf-8"), DASHBOARD_PORT)]
    if wide and os.environ.get("RAY_AUTH_MODE") != "token":
        remedy = "start Ray with --dashboard-host 127.0.0.1, or with RAY_AUTH_MODE=token and a token file of mode 600"
        return [bench.fail(f"something listens on {', '.join(wide)}:{DASHBOARD_PORT} without a token", remedy)]
    return [bench.ok("asks for a token" if wide else "not open to the network")]


def wide_listeners(table: str, port: int) -> list[str]:
    """Local addresses (hex, as the kernel prints them) that listen on a port beyond loopback, from a /proc/net/tcp table."""
    found = []
    for line in table.splitlines()[1:]:
        fields = line.split()
        address, _, number = fields[1].partition(":")
        loopback = address.endswith("7F") if len(address) == 8 else address == "00000000000000000000000001000000"
        if fields[3] == "0A" and int(number, 16) == port and not loopback:
            found.append(address)
    return found


def look_at_network() -> Sequence[Row]:
    """Whether models could be downloaded; the doctor itself never does."""
    bench = Bench(what="network", rule=f"{HUB[0]} answers (only models that are named by id need it)")
    try:
        with socket.create_connection(HUB, timeout=4.0):
            return [bench.ok("reachable")]
    except OSError as error:
        return [bench.warn(f"not reachable ({error})", "name models by a local path, or fill the cache where there is a network")]


def look_at_ray(address: str | None) -> Sequence[Row]:
    """A cluster's door when one is named, else a start of Ray in a child process that is gone afterwards."""
    if address is not None:
        return [_knock(address)]
    bench = Bench(what="ray", rule="ray.init starts a cluster on this machine")
    child = subprocess.Popen(
        [sys.executable, "-c", _RAY_TRIAL], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "RAY_ADDRESS": ""},
    )  # fmt: skip
    try:
        _, told = child.communicate(timeout=RAY_START_S)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        return [bench.fail(f"did not start within {RAY_START_S:g} s", "look at /tmp/ray/session_latest/logs; train with --local meanwhile")]
    if child.returncode != 0:
        last = next((line for line in reversed(told.splitlines()) if line.strip()), "no message")
        return [bench.fail(f"did not start: {last.strip()}", "look at /tmp/ray/session_latest/logs; train with --local meanwhile")]
    return [bench.ok("started and stopped")]


def _knock(address: str) -> Row:
    bench = Bench(what="ray", rule="the cluster at --address (RAY_ADDRESS) takes connections")
    parts = urlsplit(address if "//" in address else f"ray://{address}")
    try:
        with socket.create_connection((parts.hostname or "", parts.port or 6379), timeout=5.0):
            return bench.ok(f"{address} answers")
    except (OSError, ValueError) as error:
        return bench.fail(
            f"{address} does not answer ({error})", "start the head, mend the address, or unset RAY_ADDRESS for a cluster of your own"
        )


def machine_checks(config: RunConfig | None, run_dir: str | None, address: str | None, *, starts_ray: bool) -> list[Check]:
    """The checks of this file, in the order of the table."""
    place = Path.cwd() if run_dir is None or "://" in run_dir else Path(run_dir).absolute()
    checks = [
        Check(what="python", rule="3.11 or newer", remedy="install one", look=look_at_python),
        Check(what="packages", rule="installed", remedy="pip install -c constraints.txt -e .", look=look_at_packages),
        Check(what="devices", rule="torch sees them", remedy="reinstall torch", look=partial(look_at_devices, config), deadline_s=90.0),
        Check(what="memory", rule="enough", remedy="look at the model's directory", look=partial(look_at_memory, config)),
        Check(what="disk", rule="enough", remedy="choose another --run-dir", look=partial(look_at_disk, place, config)),
        Check(what="port", rule="free", remedy="choose another", look=partial(look_at_ports, config)),
        Check(what="ray dashboard", rule="not open", remedy="start Ray on loopback", look=look_at_dashboard),
        Check(
            what="network",
            rule="only models that are named by id need it",
            remedy="name models by a local path",
            look=look_at_network,
            is_needed=False,
        ),
    ]
    if run_dir is not None:
        checks.append(
            Check(what="store", rule="exclusive creates, fresh listings", remedy="choose another --run-dir; s3:// needs the extra s3 and its keys",
                  look=partial(look_at_store, run_dir), deadline_s=90.0)
        )  # fmt: skip
    if starts_ray or address is not None:
        remedy = "train with --local meanwhile"
        checks.append(Check(what="ray", rule="starts", remedy=remedy, look=partial(look_at_ray, address), deadline_s=RAY_START_S + 30))
    return checks


def _gib(number: int) -> str:
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"
