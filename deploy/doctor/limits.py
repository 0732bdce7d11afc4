"""The doctor's look at what the kernel and a container allow this process: open files, processes, memory."""

import os
import re
import resource
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from deploy.doctor.checks import Bench, Row

FEW_FILES, ENOUGH_FILES = 1024, 4096
FEW_PROCESSES, ENOUGH_PROCESSES = 512, 4096
CGROUP: Final = Path("/sys/fs/cgroup")
_UNLIMITED: Final = resource.RLIM_INFINITY


def look_at_limits(read: Callable[[int], tuple[int, int]] = resource.getrlimit, cgroup: Path = CGROUP) -> Sequence[Row]:
    """Open files and processes (threads count): a Ray node with a few actors holds hundreds of both."""
    files = Bench(what="ulimit files", rule=f"{FEW_FILES} open files at least, {ENOUGH_FILES} for a fleet")
    soft, hard = read(resource.RLIMIT_NOFILE)
    told = f"{_number(soft)} (may be raised to {_number(hard)})"
    remedy = "ulimit -n 65536 in the shell that starts it (systemd: LimitNOFILE=, docker: --ulimit nofile=65536)"
    rows = [_judged(files, soft, (FEW_FILES, ENOUGH_FILES), told, remedy)]
    processes = Bench(what="ulimit processes", rule=f"{FEW_PROCESSES} processes and threads at least, {ENOUGH_PROCESSES} for a fleet")
    most, _ = read(resource.RLIMIT_NPROC)
    allowed = _cgroup_number(cgroup / "pids.max")
    bound = min((limit for limit in (most, allowed) if limit not in (None, _UNLIMITED)), default=_UNLIMITED)
    told = f"{_number(most)}" + ("" if allowed is None else f", {allowed} by the container (pids.max)")
    remedy = "ulimit -u 65536 in the shell that starts it (systemd: TasksMax=, docker: --pids-limit, Kubernetes: podPidsLimit)"
    return [*rows, _judged(processes, bound, (FEW_PROCESSES, ENOUGH_PROCESSES), told, remedy)]


def _judged(bench: Bench, limit: int, bounds: tuple[int, int], told: str, remedy: str) -> Row:
    few, enough = bounds
    if limit == _UNLIMITED or limit >= enough:
        return bench.ok(told)
    return bench.warn(told, remedy) if limit >= few else bench.fail(told, remedy)


def _number(limit: int) -> str:
    return "unlimited" if limit == _UNLIMITED else str(limit)


def _cgroup_number(file: Path) -> int | None:
    """What a control group's file says; None where there is no limit or no such file."""
    try:
        content = file.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(content) if content.isdigit() else None


def memory_left(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = CGROUP) -> int:
    """Bytes that this process may still take: what the machine has available, inside the container's limit."""
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    if meminfo.exists():
        found = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text(encoding="utf-8"))
        available = int(found[1]) * 1024 if found else available
    most, taken = _cgroup_number(cgroup / "memory.max"), _cgroup_number(cgroup / "memory.current")
    return available if most is None or taken is None else max(min(available, most - taken), 0)
