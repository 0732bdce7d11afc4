"""LoRA names of kohya's sd-scripts, which ComfyUI reads too: modules of the original SD3 checkpoint, with q, k and v fused.

The rule: `lora_unet_` and the checkpoint's module name with `_` for `.`; under it `.lora_down.weight` (A), `.lora_up.weight` (B) and
`.alpha`. A reader adds alpha / rows(lora_down) * up @ down to the weight. The checkpoint holds q, k and v of a stream as one matrix,
so their LoRAs become one of n times the rank: the downs stacked, the ups on the diagonal, alpha times n.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from common.errors import ConfigError, ModelError
from common.policy.config import LoraConfig, ModelConfig

KOHYA_WEIGHTS: Final = "kohya_lora.safetensors"
FAMILIES: Final = ("sd3",)
_PREFIX: Final = "lora_unet_"
_A, _B = ".lora_A.weight", ".lora_B.weight"
_DOWN, _UP, _ALPHA = ".lora_down.weight", ".lora_up.weight", ".alpha"
_MODULES, _RANK, _LORA_ALPHA = "flowfleet_modules", "ss_network_dim", "ss_network_alpha"  # keys of the file's header
_BLOCK = re.compile(r"transformer_blocks\.(?P<block>\d+)\.(?P<module>.+)")
_FUSED: Final[Mapping[str, tuple[str, str, str]]] = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
_PLAIN: Final[Mapping[str, str]] = {
    "attn.to_out.0": "x_block.attn.proj", "attn2.to_out.0": "x_block.attn2.proj", "attn.to_add_out": "context_block.attn.proj",
    "ff.net.0.proj": "x_block.mlp.fc1", "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1", "ff_context.net.2": "context_block.mlp.fc2",
}  # fmt: skip  # diffusers' module of a block -> the checkpoint's
_PARTS: Final[Mapping[str, tuple[str, int]]] = {part: (fused, row) for fused, parts in _FUSED.items() for row, part in enumerate(parts)} | {
    part: (plain, 0) for part, plain in _PLAIN.items()
}


@dataclass(frozen=True, slots=True, kw_only=True)
class KohyaLora:
    """The content of one file."""

    tensors: Mapping[str, torch.Tensor]  # float32
    header: Mapping[str, str]


def to_kohya(state: Mapping[str, torch.Tensor], model: ModelConfig) -> KohyaLora:
    """Rename and fuse an adapter's tensors; no value is changed.

    Args:
        state: canonical name -> float32, e.g. transformer_blocks.0.attn.to_q.lora_A.weight [r, in] and lora_B.weight [out, r].
        model: its family, and its adapter's rank and alpha.

    Raises:
        ConfigError: a family or module whose name in that format is not settled here.
    """
    if model.family not in FAMILIES:
        raise ConfigError(
            f"export: kohya names are settled for {', '.join(FAMILIES)} only, and this run's model.family is {model.family}; "
            "pass --format diffusers or peft"
        )
    modules = sorted(name.removesuffix(_A) for name in state if name.endswith(_A))
    gathered: dict[str, list[tuple[int, str]]] = {}  # the checkpoint's module -> (row of q, k, v; diffusers' module)
    for module in modules:
        target, row = _placed(module)
        gathered.setdefault(target, []).append((row, module))
    tensors: dict[str, torch.Tensor] = {}
    for target, parts in gathered.items():
        rows = 3 if target.endswith(".qkv") else 1
        key = _PREFIX + target.replace(".", "_")
        tensors[key + _DOWN] = torch.cat([state[module + _A] for _, module in sorted(parts)]).contiguous()
        tensors[key + _UP] = _on_diagonal([(row, state[module + _B]) for row, module in sorted(parts)], rows)
        tensors[key + _ALPHA] = torch.tensor(float(model.lora.alpha * len(parts)))
    header = {
        "ss_network_module": "networks.lora_sd3", _RANK: str(model.lora.rank), _LORA_ALPHA: str(model.lora.alpha),
        _MODULES: json.dumps(modules),
    }  # fmt: skip
    return KohyaLora(tensors=tensors, header=header)


def _placed(module: str) -> tuple[str, int]:
    found = _BLOCK.fullmatch(module)
    part = _PARTS.get(found["module"]) if found else None
    if found is None or part is None:
        raise ConfigError(
            f"export: the adapter's module {module} has no settled name in kohya's format, which covers the attention and feed-forward "
            "projections of SD3's blocks; pass --format diffusers or peft"
        )
    return f"joint_blocks.{found['block']}.{part[0]}", part[1]


def _on_diagonal(ups: Sequence[tuple[int, torch.Tensor]], rows: int) -> torch.Tensor:
    """[rows * out, n * r]: each up in its row of q, k, v and in its own columns; 0 elsewhere, also where q, k or v has no LoRA."""
    height, rank = ups[0][1].shape
    fused = torch.zeros((rows * height, len(ups) * rank), dtype=torch.float32)
    for column, (row, up) in enumerate(ups):
        fused[row * height : (row + 1) * height, column * rank : (column + 1) * rank] = up
    return fused


def from_kohya(lora: KohyaLora, where: str) -> tuple[dict[str, torch.Tensor], LoraConfig]:
    """Return the canonical state of a file that `to_kohya` made, bit for bit, and its rank and alpha.

    Raises:
        ModelError: a file of another program, or one whose tensors are not those that its header tells.
    """
    try:
        modules = [str(module) for module in json.loads(lora.header[_MODULES])]
        rank, alpha = int(lora.header[_RANK]), int(lora.header[_LORA_ALPHA])
        places = {module: _placed(module) for module in modules}
        state = _unfused(lora.tensors, places, rank)
        config = LoraConfig(rank=rank, alpha=alpha, targets=tuple(modules))
        again = to_kohya(state, ModelConfig(path=where, lora=config)).tensors
    except (KeyError, ValueError, TypeError, IndexError, RuntimeError) as error:
        raise ModelError(
            f"lora: {where} was not written by `flowfleet export --format kohya` ({error}); read it in peft's or diffusers' layout"
        ) from error
    if again.keys() != lora.tensors.keys() or any(not torch.equal(again[key], lora.tensors[key]) for key in again):
        raise ModelError(f"lora: {where}: its tensors are not those that its header tells; it was changed since; export it again")
    return state, config


def _unfused(tensors: Mapping[str, torch.Tensor], places: Mapping[str, tuple[str, int]], rank: int) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = {}
    for module, (target, row) in places.items():
        key = _PREFIX + target.replace(".", "_")
        down, up = tensors[key + _DOWN], tensors[key + _UP]
        column = sum(other == target and earlier < row for other, earlier in places.values())
        height = up.shape[0] // (3 if target.endswith(".qkv") else 1)
        state[module + _A] = down[column * rank : (column + 1) * rank].contiguous()
        state[module + _B] = up[row * height : (row + 1) * height, column * rank : (column + 1) * rank].contiguous()
    return state
