"""Asks a Ray cluster for the doctor, in a process that can be killed: versions, limits and clock of every node, and the store from each."""

import json
import logging
import os
import platform
import resource
import shutil
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from common.errors import FlowfleetError
from deploy.store_probe import NODE_TIMEOUT_S, check_store_from_nodes, node_name


def node_facts() -> dict[str, Any]:
    """What this process's machine is; runs on every node."""
    shm = Path("/dev/shm")
    return {
        "ray": ray.__version__, "python": platform.python_version(), "flowfleet": metadata.version("flowfleet"),
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0], "shm_bytes": shutil.disk_usage(shm).free if shm.is_dir() else 0,
        "time": time.time(),
    }  # fmt: skip


def ask_nodes(names: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Return facts by node name, {"problem"} of who does not answer. names: node id -> name."""
    task, before = ray.remote(num_cpus=0, max_retries=0)(node_facts), time.time()
    asked = {
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)).remote(): name
        for node_id, name in names.items()
    }
    done, late = ray.wait(list(asked), num_returns=len(asked), timeout=NODE_TIMEOUT_S)
    found = {asked[ref]: _answer(ref, before) for ref in done}
    return found | {asked[ref]: {"problem": f"did not answer within {NODE_TIMEOUT_S:.0f} s"} for ref in late}


def _answer(ref: Any, before: float) -> dict[str, Any]:
    try:
        facts: dict[str, Any] = ray.get(ref)
    except RayTaskError as error:
        return {"problem": f"failed ({error.cause})"}
    except RayError as error:
        return {"problem": f"could not be asked ({type(error).__name__})"}
    return facts | {"skew_s": max(facts["time"] - time.time(), before - facts["time"], 0.0)}


def ask_cluster(address: str, run_dir: str) -> dict[str, Any]:
    """Join, ask, leave. Returns what `doctor_ray.cluster_rows` takes."""
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (RayError, RuntimeError, ConnectionError, ValueError, OSError) as error:
        return {"error": f"{address}: {' '.join(str(error).split())}"}
    nodes = [node for node in ray.nodes() if node["Alive"]]
    problem = ""
    if run_dir:
        try:
            check_store_from_nodes(run_dir, nodes)
        except FlowfleetError as error:
            problem = str(error)
    told = {"driver": node_facts(), "nodes": ask_nodes({str(node["NodeID"]): node_name(node) for node in nodes}), "store": problem}
    ray.shutdown()
    return told


def main() -> None:
    """Print one line of JSON: `python -c "..." ADDRESS RUN_DIR`, "" for no run directory."""
    address, run_dir = sys.argv[1:3]
    told = json.dumps(ask_cluster(address, run_dir))
    os.write(1, f"\n{told}\n".encode())
