"""An exported LoRA on disk, of peft's, diffusers' or kohya's layout: bound to its base whole, or refused with its keys named."""

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from common.errors import ModelError
from common.policy.config import LoraConfig
from deploy.lora.kohya import KOHYA_WEIGHTS, KohyaLora, from_kohya

PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
_METADATA = "lora_adapter_metadata"  # diffusers' key in the safetensors header
_PREFIXES = ("base_model.model.", "transformer.")  # of peft, of diffusers
_A, _B, _ALPHA = ".lora_A.weight", ".lora_B.weight", ".alpha"
_SHOWN = 3
_REFUSED: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",), "bias": ("none",), "use_dora": (False,), "use_rslora": (False,), "fan_in_fan_out": (False,),
    "rank_pattern": ({},), "alpha_pattern": ({},), "modules_to_save": (None, []),
}  # fmt: skip  # key -> the values that a plain LoRA has


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraFile:
    """One exported LoRA."""

    directory: Path
    state: Mapping[str, torch.Tensor]  # canonical name -> float32: transformer_blocks.0.attn.to_q.lora_A.weight
    config: LoraConfig  # its rank, alpha, and as targets the whole names of its modules


def is_lora(directory: Path) -> bool:
    """Whether a directory looks like an exported LoRA."""
    return any((directory / name).is_file() for name in (PEFT_CONFIG, PEFT_WEIGHTS, DIFFUSERS_WEIGHTS, KOHYA_WEIGHTS))


def read_lora(directory: Path, base: Path) -> LoraFile:
    """Read a LoRA and bind it to the base's transformer by name.

    Args:
        directory: adapter_config.json + adapter_model.safetensors (peft), pytorch_lora_weights.safetensors (diffusers), or
            kohya_lora.safetensors as `flowfleet export` writes it.
        base: the diffusers pipeline directory that it was trained on.

    Returns:
        The LoRA, every one of its tensors bound.

    Raises:
        ModelError: a file is missing or damaged; a kind of adapter that is no plain LoRA; not one, or not every, tensor names a
            module of the base (the keys are named).
    """
    if (directory / KOHYA_WEIGHTS).is_file():
        return _read_kohya(directory, base)
    is_peft = not (directory / DIFFUSERS_WEIGHTS).is_file()
    file = directory / (PEFT_WEIGHTS if is_peft else DIFFUSERS_WEIGHTS)
    tensors, header = _read_tensors(file)
    alphas = {name: float(tensor) for name, tensor in tensors.items() if name.endswith(_ALPHA) and tensor.numel() == 1}
    state = {_canonical(name): tensor.float() for name, tensor in tensors.items() if name not in alphas}
    modules = _bound_modules(file, state, _linear_modules(base), list(tensors))
    rank = _one(file, "rank", (int(state[module + _A].shape[0]) for module in modules))
    alpha = _peft_alpha(directory / PEFT_CONFIG) if is_peft else _diffusers_alpha(file, header, alphas, rank)
    if alpha != int(alpha):
        raise ModelError(f"lora: {file} has alpha {alpha:g}; model.lora.alpha is an integer; scale B by the rest and save it again")
    return LoraFile(directory=directory, state=state, config=LoraConfig(rank=rank, alpha=int(alpha), targets=tuple(modules)))


def _read_kohya(directory: Path, base: Path) -> LoraFile:
    file = directory / KOHYA_WEIGHTS
    tensors, header = _read_tensors(file)
    state, config = from_kohya(KohyaLora(tensors=tensors, header=header), str(file))
    _bound_modules(file, state, _linear_modules(base), list(state))
    return LoraFile(directory=directory, state=state, config=config)


def _read_tensors(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    try:
        with safe_open(str(file), framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}, dict(opened.metadata() or {})  # noqa: SIM118  (no mapping)
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"lora: {file} cannot be read ({error}); a LoRA directory holds {PEFT_CONFIG} with {PEFT_WEIGHTS}, or {DIFFUSERS_WEIGHTS}; "
            "export it again (`flowfleet export`)"
        ) from error


def _canonical(name: str) -> str:
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _linear_modules(base: Path) -> set[str]:
    """Names of the transformer's modules that have a weight, from the headers of its files."""
    files = sorted((base / "transformer").glob("*.safetensors"))
    if not files:
        raise ModelError(
            f"lora: {base}/transformer holds no safetensors file to bind to; name the base's directory in the recipe (model.path)"
        )
    found: set[str] = set()
    for file in files:
        try:
            with safe_open(str(file), framework="pt") as opened:
                found |= {name.removesuffix(".weight") for name in opened.keys() if name.endswith(".weight")}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ModelError(f"lora: {file} of the base cannot be read ({error}); copy or download it again") from error
    return found


def _bound_modules(file: Path, state: Mapping[str, torch.Tensor], known: set[str], keys: Sequence[str]) -> list[str]:
    """Modules that have both halves and stand in the base; anything else in the file is an error."""
    halves = {name.removesuffix(suffix) for name in state for suffix in (_A, _B) if name.endswith(suffix)}
    modules = sorted(module for module in halves & known if {module + _A, module + _B} <= state.keys())
    bound = {module + suffix for module in modules for suffix in (_A, _B)}
    if not bound:
        near = difflib.get_close_matches(_canonical(min(keys, default="")), sorted(known), n=_SHOWN, cutoff=0.0)
        raise ModelError(
            f"lora: {file} binds 0 modules of the base: its {len(keys)} keys are {_some(keys)}, the base's nearest modules are {_some(near)}; "
            f"keys are [{'|'.join(_PREFIXES)}]MODULE{_A} and {_B}; name the base that it was trained on (--recipe, --set model.path=...)"
        )
    foreign = sorted(set(state) - bound)
    if foreign:
        raise ModelError(
            f"lora: {file}: {len(foreign)} of {len(state)} tensors bind to no module of the base ({_some(foreign)}); "
            "a LoRA is loaded whole or not at all; export it for this base, without text encoder or other parts"
        )
    return modules


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:_SHOWN]) + (", ..." if len(listed) > _SHOWN else "") if listed else "none"


def _one(file: Path, what: str, values: Iterable[float]) -> int:
    found = sorted(set(values))
    if len(found) != 1:
        raise ModelError(f"lora: {file} has {what}s {found}; one {what} for all modules is read; export it with a uniform {what}")
    return int(found[0])


def _peft_alpha(path: Path) -> float:
    config = _read_json(path)
    for key, plain in _REFUSED.items():
        if config.get(key, plain[0]) not in plain:
            raise ModelError(
                f"lora: {path} has {key} = {config[key]!r}; a plain LoRA is read, with {key} = {plain[0]!r}; merge or export it as one"
            )
    alpha = config.get("lora_alpha")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool):
        raise ModelError(f"lora: {path} has lora_alpha {alpha!r}; it must be a number; restore the file")
    return float(alpha)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"lora: {path} cannot be read ({error}); it stands beside {PEFT_WEIGHTS}; restore it") from error
    if not isinstance(config, dict):
        raise ModelError(f"lora: {path} holds no JSON object; restore it")
    return config


def _diffusers_alpha(file: Path, header: Mapping[str, str], alphas: Mapping[str, float], rank: int) -> float:
    """The header's alpha, else the file's alpha tensors, else the rank (diffusers' own order)."""
    if _METADATA in header:
        try:
            told = json.loads(header[_METADATA])
            alpha = told.get("transformer.lora_alpha")
        except (ValueError, AttributeError) as error:
            raise ModelError(f"lora: {file}: its {_METADATA} does not parse ({error}); export it again") from error
        if alpha is not None:
            return float(alpha)
    return float(_one(file, "alpha", alphas.values())) if alphas else float(rank)
