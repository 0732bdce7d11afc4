"""Files of unfinished work: tensors as safetensors, numbers as JSON, each written whole or not at all."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file by renaming a finished one into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(path.suffix + ".part")
    beside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(beside, path)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Add one line to a JSON-lines log."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def optimizer_tensors(optimizer: torch.optim.Optimizer, prefix: str) -> dict[str, torch.Tensor]:
    """Return an optimizer's state as named tensors: `<prefix>.<parameter number>.<name>`."""
    tensors = {}
    for number, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            tensors[f"{prefix}.{number}.{name}"] = torch.as_tensor(value)
    return tensors


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor], prefix: str) -> None:
    """Put back what `optimizer_tensors` returned."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith(f"{prefix}."):
            number, name = key.removeprefix(f"{prefix}.").split(".", 1)
            state.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def module_tensors(module: nn.Module, prefix: str) -> dict[str, torch.Tensor]:
    """Return a module's state under a prefix."""
    return {f"{prefix}.{name}": value for name, value in module.state_dict().items()}


def restore_module(module: nn.Module, tensors: dict[str, torch.Tensor], prefix: str) -> None:
    """Put back what `module_tensors` returned."""
    start = f"{prefix}."
    module.load_state_dict({key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)})


def write_checkpoint(folder: Path, tensors: dict[str, torch.Tensor], numbers: dict[str, Any]) -> None:
    """Write a checkpoint; the JSON, written last, names the tensor file and so commits it.

    Args:
        folder: where checkpoints of this stage live; the one before is removed.
        tensors: named tensors.
        numbers: JSON content; must hold "step".
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = f"step_{numbers['step']:07d}.safetensors"
    save_file({key: value.detach().contiguous().clone() for key, value in tensors.items()}, folder / name)
    write_json(folder / "state.json", {**numbers, "tensors": name})
    for other in folder.glob("step_*.safetensors"):
        if other.name != name:
            other.unlink()


def read_checkpoint(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """Return (tensors, numbers) of the newest checkpoint, or None where there is none."""
    if not (folder / "state.json").exists():
        return None
    numbers = read_json(folder / "state.json")
    return load_file(folder / numbers["tensors"]), numbers
