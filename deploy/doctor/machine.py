"""The doctor's look at the machine itself: interpreter, packages, memory, disk, network, and the list of all its checks."""

import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Final, Protocol

from deploy.config import RunConfig
from deploy.doctor.checks import Bench, Check, Row
from deploy.doctor.gpu import look_at_devices, look_at_gpus, look_at_torch, model_bytes
from deploy.doctor.limits import look_at_limits, memory_left
from deploy.doctor.ports import look_at_dashboard, look_at_heads, look_at_ports
from deploy.doctor.ray import CLUSTER_S, RAY_START_S, look_at_cluster, look_at_ray, look_at_store, look_at_token
from deploy.environment import memory_bytes

SMALL_SHM, SMALL_DISK = 256 * 2**20, 2 * 2**30
HUB: Final = ("huggingface.co", 443)
_REQUIREMENT = re.compile(r"(?P<name>[A-Za-z0-9_.-]+)(?:\[[^\]]*\])?>=(?P<version>[0-9.]+)")
_MEGABYTES: Final = 2**20
SKEW_S: Final = 30.0
"""A start beside a living run reads the age of status.json, which counts as fresh for 60 s: clocks must agree better than that."""


class Usage(Protocol):
    """What is used of shutil.disk_usage's answer."""

    @property
    def free(self) -> int:
        """Bytes."""
        ...


def look_at_python(requires: str | None = None) -> Sequence[Row]:
    """The interpreter's version against what the installed package asks for."""
    asked = requires or metadata.metadata("flowfleet")["Requires-Python"] or ""
    bench = Bench(what="python", rule=f"flowfleet asks for Python {asked}")
    least = re.search(r">=\s*([0-9.]+)", asked)
    told = f"{sys.version.split()[0]} at {sys.executable}"
    is_enough = least is None or sys.version_info[:2] >= version_key(least[1])[:2]
    return [bench.ok(told) if is_enough else bench.fail(told, f"make an environment with Python {asked} and install into that")]


def look_at_packages(extra: Mapping[str, str] | None = None) -> Sequence[Row]:
    """What pyproject asks for, without the extras; `extra`: further packages with their least versions."""
    bench = Bench(what="packages", rule="pyproject.toml's dependencies are installed, new enough")
    wanted = [_REQUIREMENT.match(line) for line in metadata.requires("flowfleet") or () if "extra ==" not in line]
    asked = {found["name"]: found["version"] for found in wanted if found is not None} | dict(extra or {})
    told = [problem for name, version in asked.items() if (problem := _package_problem(name, version))]
    if told:
        return [bench.fail("; ".join(told), "pip install -c constraints.txt -e .")]
    return [
        bench.ok(
            f"flowfleet {metadata.version('flowfleet')}; {len(asked)} found, torch {metadata.version('torch')}, ray {metadata.version('ray')}"
        )
    ]


def _package_problem(name: str, least: str) -> str:
    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        return f"{name} is missing"
    return "" if version_key(found) >= version_key(least) else f"{name} {found} is older than {least}"


def version_key(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: 2.13.0+cpu -> (2, 13, 0)."""
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


def look_at_memory(config: RunConfig | None) -> Sequence[Row]:
    """Whether every process on the CPU can hold the model, inside a container's limit where there is one."""
    available = memory_left()
    told = f"{_gib(available)} available of {_gib(memory_bytes())}"
    if config is None or config.model.device != "cpu":
        return [Bench(what="memory", rule="enough for the recipe's processes (checked with a recipe on the CPU)").ok(told)]
    processes = config.rollout.num_workers + 1
    needed = processes * model_bytes(config)
    bench = Bench(what="memory", rule=f"{processes} processes hold the model: {_gib(needed)} at least")
    return [
        bench.ok(told) if available >= needed else bench.warn(told, "lower rollout.num_workers, or pass --local (one process, one model)")
    ]


def look_at_disk(place: Path, config: RunConfig | None, usage: Callable[[Path], Usage] = shutil.disk_usage) -> Sequence[Row]:
    """Free space where the run lies or will lie; what an existing run there takes already counts."""
    needed = SMALL_DISK if config is None else max(config.store.max_bytes - _taken(place), 0)
    standing = next(path for path in (place, *place.parents) if path.exists())
    free = usage(standing).free
    disk = Bench(what="disk", rule=f"{_gib(needed)} free" + (" (store.max_bytes, less what the run has)" if config else ""))
    if free < needed:
        return [disk.fail(f"{_gib(free)} free at {standing}", "free some, choose another --run-dir, or lower store.max_bytes")]
    return [disk.ok(f"{_gib(free)} free at {standing}")]


def _taken(place: Path) -> int:
    if not (place / "config.i0001.json").exists():
        return 0
    return sum(path.stat().st_size for path in place.rglob("*") if path.is_file())


def look_at_shm(folder: Path = Path("/dev/shm"), usage: Callable[[Path], Usage] = shutil.disk_usage) -> Sequence[Row]:
    """Shared memory for Ray's object store."""
    bench = Bench(what="/dev/shm", rule=f"{_gib(SMALL_SHM)} for Ray's object store")
    if not folder.is_dir():
        return [bench.warn("there is none", "Ray then uses /tmp, which is slower; or pass --local")]
    room = usage(folder).free
    small = "in a container: docker run --shm-size=1g (Kubernetes: an emptyDir of medium Memory there); or pass --local"
    return [bench.ok(f"{_gib(room)} free") if room >= SMALL_SHM else bench.warn(f"{_gib(room)} free", small)]


def look_at_clock(place: Path) -> Sequence[Row]:
    """This machine's clock against that of the file system that holds the run, which may be another host's.

    Leases, staleness and time limits use versions and one process's monotonic clock; the age of status.json alone is a wall clock's.
    """
    bench = Bench(what="clock", rule=f"within {SKEW_S:g} s of the file system's: only the age of status.json depends on it")
    standing = next(path for path in (place, *place.parents) if path.exists())
    if not os.access(standing, os.W_OK):
        return [bench.skip(f"{standing} is not writable: not compared")]
    trial = standing / f".flowfleet-clock-{os.getpid()}"
    try:
        before = time.time()
        trial.write_bytes(b"")
        written, after = trial.stat().st_mtime, time.time()
    finally:
        trial.unlink(missing_ok=True)
    skew_s = max(written - after, before - written, 0.0)
    if skew_s > SKEW_S:
        return [bench.warn(f"{skew_s:.0f} s apart at {standing}", "run an NTP client on this host and on the file server")]
    return [bench.ok(f"within {max(skew_s, 1.0):.0f} s; nothing else needs one")]


def look_at_network() -> Sequence[Row]:
    """Whether models could be downloaded; the doctor itself never does."""
    bench = Bench(what="network", rule=f"{HUB[0]} answers (only models that are named by id need it)")
    try:
        with socket.create_connection(HUB, timeout=4.0):
            return [bench.ok("reachable")]
    except OSError as error:
        return [bench.warn(f"not reachable ({error})", "name models by a local path, or fill the cache where there is a network")]


def machine_checks(config: RunConfig | None, run_dir: str | None, address: str | None, *, starts_ray: bool) -> list[Check]:
    """All checks but those of a recipe, in the order of the table.

    Args:
        config: of a recipe, None: the machine alone.
        run_dir: path or URL of the run directory; None: the working directory is looked at, and no store is probed.
        address: of a cluster to join.
        starts_ray: whether Ray is started on trial where no address is given.
    """
    place = Path.cwd() if run_dir is None or "://" in run_dir else Path(run_dir).absolute()
    checks = [
        Check(what="python", rule="new enough", remedy="install one", look=look_at_python),
        Check(what="packages", rule="installed", remedy="pip install -c constraints.txt -e .", look=look_at_packages),
        Check(what="torch", rule="torch works", remedy="reinstall torch", look=look_at_torch, deadline_s=90.0),
        Check(what="devices", rule="torch sees them", remedy="reinstall torch", look=partial(look_at_devices, config), deadline_s=90.0),
        Check(what="gpu", rule="torch sees them", remedy="reinstall torch", look=partial(look_at_gpus, config), deadline_s=90.0),
        Check(what="memory", rule="enough", remedy="look at the model's directory", look=partial(look_at_memory, config)),
        Check(what="/dev/shm", rule="enough", remedy="look at /dev/shm", look=look_at_shm),
        Check(what="disk", rule="enough", remedy="choose another --run-dir", look=partial(look_at_disk, place, config)),
        Check(what="limits", rule="high enough", remedy="raise them", look=look_at_limits),
        Check(what="clock", rule="agrees", remedy="choose another --run-dir", look=partial(look_at_clock, place), is_needed=False),
        Check(what="port", rule="free", remedy="choose another", look=partial(look_at_ports, config)),
        Check(what="ray dashboard", rule="not open", remedy="start Ray on loopback", look=look_at_dashboard),
        Check(what="ray head", rule="not open", remedy="start Ray with RAY_AUTH_MODE=token", look=look_at_heads, is_needed=False),
        Check(what="ray token", rule="read by its owner alone", remedy="chmod 600", look=partial(look_at_token, address)),
        Check(what="network", rule="only models that are named by id need it", remedy="name models by a local path", look=look_at_network,
              is_needed=False),
    ]  # fmt: skip
    if run_dir is not None:
        checks.append(
            Check(what="store", rule="exclusive creates, fresh listings", remedy="choose another --run-dir; s3:// needs the extra s3 and its keys",
                  look=partial(look_at_store, run_dir), deadline_s=90.0)
        )  # fmt: skip
    if starts_ray or address is not None:
        remedy = "train with --local meanwhile"
        checks.append(Check(what="ray", rule="starts", remedy=remedy, look=partial(look_at_ray, address), deadline_s=RAY_START_S + 30))
    if address is not None:
        remedy = "look at the head with `ray status`"
        checks.append(
            Check(what="cluster", rule="every node answers", remedy=remedy, look=partial(look_at_cluster, address, run_dir),
                  deadline_s=CLUSTER_S + 30)
        )  # fmt: skip
    return checks


def _gib(number: int) -> str:
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / _MEGABYTES:.0f} MiB"
