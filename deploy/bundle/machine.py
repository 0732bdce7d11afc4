"""What a bundle takes from this machine: versions, kernel, processor and GPUs, installed packages, and the ends of Ray's logs of the run."""

import json
import os
import platform
import re
import resource
import socket
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from common.store.manifests import Status
from deploy.bundle.parts import Part
from deploy.doctor.gpu import driver_version, list_gpus
from deploy.environment import describe_environment

RAY_FOLDER: Final = Path("/tmp/ray")
NUM_LOGS: Final = 24
TAIL: Final = 48 << 10  # bytes of each log's end
SHOWN_VARIABLES: Final = re.compile(
    r"RAY_(?!AUTH_TOKEN$)\w+|OMP_\w+|MKL_NUM_THREADS|OPENBLAS_NUM_THREADS|CUDA_\w+|NVIDIA_VISIBLE_DEVICES|NCCL_\w+|GLOO_\w+|TORCH\w*|PYTORCH\w*"
    r"|HF_HOME|HF_HUB_\w+|TRANSFORMERS_\w+|TOKENIZERS_PARALLELISM|AWS_ENDPOINT_URL|AWS_DEFAULT_REGION|MALLOC_\w+|PYTHONPATH|SLURM_JOB_\w+"
)
"""Variables whose values say how a run behaves; of all others not even the names are taken."""
_LOG_ORDER: Final = (
    "job-driver-", "worker-", "raylet.", "gcs_server.", "dashboard.log", "monitor.log", "python-core-driver-", "runtime_env_agent.log",
)  # fmt: skip


def machine_parts(environ: Mapping[str, str]) -> list[Part]:
    """Versions and machine as JSON, installed packages as pip writes them."""
    import torch  # a bundle without GPU facts is made by the caller when torch cannot be imported

    limits = {"open_files": resource.getrlimit(resource.RLIMIT_NOFILE), "processes": resource.getrlimit(resource.RLIMIT_NPROC)}
    gpus = [
        {"name": gpu.name, "total_bytes": gpu.total_bytes, "capability": list(gpu.capability), "bf16": gpu.has_bf16} for gpu in list_gpus()
    ]
    table: dict[str, Any] = {
        **describe_environment(), "kernel": platform.release(), "machine": platform.machine(), "limits": limits, "gpus": gpus,
        "cuda": torch.version.cuda, "driver": driver_version(),
        "variables": {name: value for name, value in sorted(environ.items()) if SHOWN_VARIABLES.fullmatch(name)},
    }  # fmt: skip
    return [Part(path="machine.json", text=json.dumps(table), is_json=True), Part(path="pip-freeze.txt", text=installed_packages())]


def installed_packages() -> str:
    """Every installed distribution with its version, sorted. Where one came from is left out: such URLs can carry passwords."""
    found = {f"{name}=={package.version}" for package in metadata.distributions() if (name := package.metadata["Name"])}
    return "".join(f"{line}\n" for line in sorted(found, key=str.lower))


def log_parts(status: Status | None, folder: Path = RAY_FOLDER) -> tuple[list[Part], list[str]]:
    """The ends of Ray's logs of the run's newest start, and why there are none or not all.

    A session belongs to the run when its driver started it, or when a log bears the number of one of its processes.
    """
    if status is None:
        return [], ["ray logs: no status.json that says which processes the run had"]
    if status.host != socket.gethostname():
        return [], [f"ray logs: the run's Coordinator was on {status.host}; make the bundle there"]
    processes = {
        status.process_id,
        status.fleet.driver_process_id,
        *(number for slot in status.fleet.slots.values() for number in slot.process_ids),
    }
    processes.discard(0)
    sessions = [path for path in folder.glob("session_*_*") if path.is_dir() and not path.is_symlink()]
    own = [path for path in sessions if path.name.rpartition("_")[2] == str(status.fleet.driver_process_id)]
    chosen = sorted(own or [path for path in sessions if _logs_of(path, processes)])
    if not chosen:
        return [], [f"ray logs: no session under {folder} is this run's"]
    session = chosen[-1]
    files = _logs_of(session, None if own else processes)
    left_out = [f"ray logs: {min(NUM_LOGS, len(files))} of {len(files)} files of {session.name}, the last {TAIL} bytes of each"]
    return [Part(path=f"ray/{file.name}", text=tail(file)) for file in files[:NUM_LOGS]], left_out


def _logs_of(session: Path, processes: set[int] | None) -> list[Path]:
    """A session's logs that are not empty, most telling first; with processes: the workers among them, and the session's own logs."""
    found = [file for file in (session / "logs").glob("*") if file.is_file() and file.name.startswith(_LOG_ORDER) and file.stat().st_size]
    if processes is not None:
        theirs = {file for file in found if _process_of(file) in processes}
        found = [file for file in found if file in theirs or not file.name.startswith("worker-")] if theirs else []
    rank: dict[str, int] = {start: place for place, start in enumerate(_LOG_ORDER)}
    return sorted(found, key=lambda file: (next(rank[start] for start in _LOG_ORDER if file.name.startswith(start)), file.name))


def _process_of(file: Path) -> int:
    found = re.search(r"-(\d+)\.(?:out|err)$", file.name)
    return int(found[1]) if found else -1


def tail(file: Path, most: int = TAIL) -> str:
    """The last bytes of a log, from the first whole line on."""
    with file.open("rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(size - most, 0))
        text = stream.read(most).decode("utf-8", errors="replace")
    return text if size <= most else "[...]\n" + text.partition("\n")[2]
