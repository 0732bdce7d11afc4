"""What a run was made with: versions, commit, machine."""

import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

PACKAGES = ("torch", "diffusers", "transformers", "peft", "ray", "pyarrow", "numpy", "pillow", "onnxruntime", "rapidocr", "safetensors")
PROJECT = Path(__file__).parent.parent


def describe_environment() -> dict[str, object]:
    """Return versions, commit and machine as JSON-able values."""
    return {
        "flowfleet": metadata.version("flowfleet"),
        "commit": commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "num_cpus": os.cpu_count(),
        "memory_bytes": memory_bytes(),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def commit() -> str:
    """The checkout's commit, with "+changes" when the tree differs; outside a checkout what the image says of itself, or "unknown"."""
    try:
        head = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=PROJECT, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
        dirty = subprocess.run(["git", "status", "--porcelain"], cwd=PROJECT, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("FLOWFLEET_COMMIT", "unknown")  # set by deploy/docker
    return head + ("+changes" if dirty.strip() else "")


def cpu_model() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def memory_bytes() -> int:
    """Physical memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def encode_environment() -> str:
    """The environment as JSON text."""
    return json.dumps(describe_environment(), indent=1)
