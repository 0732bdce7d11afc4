"""A StableDiffusion3Pipeline directory on disk: read whole and frozen, or refused with what is wrong and the remedy."""

from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from common.errors import ConfigError, ModelError
from common.policy.config import ModelConfig
from common.policy.index import read_index
from common.policy.model_files import check_files, check_tensors

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_TEXT_PARTS = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
_T5_PARTS = ("text_encoder_3", "tokenizer_3")
_BROKEN = (OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError, SafetensorError)  # what damaged files raise
_OTHER_GRIDS = ("use_dynamic_shifting", "shift_terminal", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas")


def read_pipeline(config: ModelConfig, *, with_vae: bool, with_text: bool) -> Any:
    """Load the directory: every module frozen, in eval mode and on the device; the VAE in float32, the rest in config.dtype.

    Args:
        with_vae: False leaves the VAE out (a learner decodes nothing).
        with_text: False leaves the text encoders out (features come from the group files).

    Returns:
        The StableDiffusion3Pipeline.

    Raises:
        ModelError: the directory is missing, damaged or of another class.
        ConfigError: a device that this machine lacks, or no T5 tokens for a model that has T5.
    """
    root, device = Path(config.path), find_device(config.device)
    parts = read_index(root)
    absent = {name: None for name in _T5_PARTS if _is_absent(parts, name)}
    if with_text and not absent and config.max_sequence_length == 0:
        raise ConfigError(f"model: {root} has T5 and model.max_sequence_length is 0; its prompts need T5 tokens; set it to 77 to 512")
    absent |= {name: None for name in _TEXT_PARTS if not with_text} | {name: None for name in ("vae",) if not with_vae}
    check_files(root, [name for name in parts if name not in absent and not _is_absent(parts, name)])
    _quiet()
    try:
        pipe = StableDiffusion3Pipeline.from_pretrained(
            str(root), dtype={"default": DTYPES[config.dtype], "vae": torch.float32}, local_files_only=True, use_safetensors=True, **absent
        )
    except _BROKEN as error:
        raise ModelError(
            f"model: {root} cannot be loaded as a StableDiffusion3Pipeline ({_first_line(error)}); "
            "every part that model_index.json names must be whole; restore it"
        ) from error
    pipe.set_progress_bar_config(disable=True)
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
        if name not in absent:
            if name != "text_encoder_3":  # T5 stores one tensor for two names
                check_tensors(root / name, pipe.components[name])
            pipe.components[name].requires_grad_(False).eval().to(device)
    return pipe


def read_shift(scheduler: Any) -> float:
    """The scheduler's constant shift. Raises ConfigError for a grid that sigma_grid does not make."""
    asked = [key for key in _OTHER_GRIDS if scheduler.config.get(key)]
    if asked:
        raise ConfigError(
            f"sd3: the scheduler sets {', '.join(asked)}; this family's grid is diffusers' flow-match grid with a constant shift; "
            "unset them in scheduler/scheduler_config.json"
        )
    return float(scheduler.config.shift)


def find_device(name: str) -> torch.device:
    """The torch device of a name. Raises ConfigError when this machine has none such."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"model.device: {name!r} is no torch device ({_first_line(error)}); write cpu, cuda or cuda:0") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"model.device: {name!r} came, torch sees {torch.cuda.device_count()} CUDA devices here; set model.device = cpu")
    return device


def check_size(config: ModelConfig, factor: int, transformer: Any) -> None:
    """Refuse image sizes that the latents or the position table cannot hold. Raises ConfigError."""
    cell = factor * int(transformer.config.patch_size)
    largest = cell * int(transformer.config.pos_embed_max_size)
    for key, side in (("height", config.height), ("width", config.width)):
        if side % cell != 0 or side > largest:
            raise ConfigError(f"model.{key}: {side} came; this model draws multiples of {cell} up to {largest}; choose one")


def _is_absent(parts: dict[str, Any], name: str) -> bool:
    return not isinstance(parts.get(name), list) or parts[name][:1] in ([], [None])


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _quiet() -> None:
    """Keep the libraries' progress bars and chatter out of an actor's log; what matters is logged here."""
    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()
        library.set_verbosity_error()
