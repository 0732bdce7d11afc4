"""The doctor's look at torch and its accelerators: names, memory, driver and CUDA, bf16, peer access. Without a GPU the rows say so."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from common.errors import ModelError
from common.policy.index import weight_files
from deploy.config import RunConfig, shipped_path
from deploy.doctor.checks import Bench, Row

DRIVER: Final = Path("/proc/driver/nvidia/version")
NO_GPU: Final = "no GPU here: not checked"


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One accelerator as torch sees it."""

    name: str
    free_bytes: int
    total_bytes: int
    capability: tuple[int, int]
    has_bf16: bool  # in hardware, not emulated


def driver_version(file: Path = DRIVER) -> str:
    """The NVIDIA kernel driver's version, "" where there is none."""
    try:
        found = re.search(r"NVRM version:.*?\s([0-9]+(?:\.[0-9]+)+)\s", file.read_text(encoding="utf-8"))
    except OSError:
        return ""
    return found[1] if found else ""


def look_at_torch(file: Path = DRIVER) -> Sequence[Row]:
    """torch computes, and its build goes with the driver."""
    import torch  # a broken torch is this check's finding, not the doctor's end

    bench = Bench(what="torch", rule="it computes; a CUDA build where there is an NVIDIA driver")
    cuda, driver = torch.version.cuda, driver_version(file)
    told = f"{torch.__version__}, " + (f"CUDA {cuda}" if cuda else "a CPU build") + (f", driver {driver}" if driver else "")
    if float((torch.ones(2, 2) @ torch.ones(2, 2)).sum()) != 8.0:
        return [bench.fail(f"{told}: a product of ones is wrong", "reinstall torch for this processor")]
    if driver and not cuda:
        return [bench.warn(told, "this torch uses no GPU; install a CUDA build: pip install torch --index-url of pytorch.org's table")]
    if driver and cuda and not torch.cuda.is_available():
        return [bench.fail(f"{told}: torch sees no device", "the driver is too old for this CUDA build, or the device is not passed in")]
    return [bench.ok(told)]


def look_at_devices(config: RunConfig | None) -> Sequence[Row]:
    """CPU cores and GPUs, and whether the recipe's device is among them."""
    asked = "cpu" if config is None else config.model.device
    bench = Bench(what="devices", rule=f"model.device = {asked} is here")
    gpus = [gpu.name for gpu in list_gpus()]
    told = f"{os.cpu_count()} CPU cores, " + (f"{len(gpus)} GPU(s): {', '.join(gpus)}" if gpus else "no GPU that torch sees")
    index = int(asked.partition(":")[2] or 0) if asked.startswith("cuda") else -1
    if index >= len(gpus):
        return [bench.fail(told, "set model.device = cpu, or install a torch build for this GPU and its driver")]
    return [bench.ok(told)]


def list_gpus() -> list[Gpu]:
    """What torch sees."""
    import torch

    found = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        capability = torch.cuda.get_device_capability(index)
        name, has_bf16 = torch.cuda.get_device_name(index), capability >= (8, 0)
        found.append(Gpu(name=name, free_bytes=free, total_bytes=total, capability=capability, has_bf16=has_bf16))
    return found


def look_at_gpus(config: RunConfig | None) -> Sequence[Row]:
    """Every GPU's memory and formats, and whether they reach each other."""
    import torch

    gpus = list_gpus()
    pairs = [(a, b) for a in range(len(gpus)) for b in range(len(gpus)) if a != b]
    blocked = [(a, b) for a, b in pairs if not torch.cuda.can_device_access_peer(a, b)]
    return [*gpu_rows(gpus, config), peer_row(len(gpus), blocked)]


def gpu_rows(gpus: Sequence[Gpu], config: RunConfig | None) -> list[Row]:
    """One row a GPU: it holds the model's weights and computes in the recipe's format."""
    on_gpu = config is not None and config.model.device.startswith("cuda")
    needed = model_bytes(config) if on_gpu and config is not None else 0
    rule = f"holds the model's weights: {needed / 2**30:.1f} GiB" if on_gpu else "memory and formats"
    if not gpus:
        return [Bench(what="gpu", rule=rule).skip(NO_GPU)]
    rows = []
    for index, gpu in enumerate(gpus):
        bench = Bench(what=f"gpu {index}", rule=rule)
        formats = "bf16" if gpu.has_bf16 else "no bf16 in hardware"
        told = (
            f"{gpu.name}, {gpu.free_bytes / 2**30:.1f} of {gpu.total_bytes / 2**30:.1f} GiB free, "
            f"compute capability {gpu.capability[0]}.{gpu.capability[1]}, {formats}"
        )
        if gpu.free_bytes < needed:
            rows.append(bench.fail(told, "end what else runs on it, choose another device, or a smaller model"))
        elif on_gpu and config is not None and config.model.dtype == "bfloat16" and not gpu.has_bf16:
            rows.append(bench.warn(told, "set model.dtype = float32 (or float16): bf16 is emulated here, slowly"))
        else:
            rows.append(bench.ok(told))
    return rows


def peer_row(num_gpus: int, blocked: Sequence[tuple[int, int]]) -> Row:
    """Whether GPUs copy to each other directly; only several learner ranks on one host gain by it."""
    bench = Bench(what="gpu peers", rule="GPUs of one host reach each other (learner.num_ranks > 1)")
    if num_gpus < 2:
        return bench.skip(NO_GPU if num_gpus == 0 else "one GPU here: not checked")
    if blocked:
        pairs = ", ".join(f"{a}-{b}" for a, b in blocked)
        return bench.warn(f"no direct access: {pairs}", "copies go through the host; look at `nvidia-smi topo -m` and the IOMMU's setting")
    return bench.ok(f"all {num_gpus * (num_gpus - 1)} pairs")


def model_bytes(config: RunConfig) -> int:
    """Bytes of the weights that a process loads; 0 where the directory cannot be read, which the check of the model tells."""
    try:
        return sum(file.stat().st_size for file in weight_files(shipped_path(config.model.path)))
    except ModelError:
        return 0
