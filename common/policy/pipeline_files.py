"""A diffusers pipeline directory on disk: read whole and frozen, or refused with what is wrong and the remedy."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from common.errors import ConfigError, ModelError
from common.policy.config import ModelConfig
from common.policy.index import check_model
from common.policy.model_files import REMEDY, check_files, check_tensors

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_BROKEN = (OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError, SafetensorError)  # what damaged files raise
OTHER_GRIDS = ("shift_terminal", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas")  # nobody's here


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineParts:
    """What a family's directory consists of beside its transformer, VAE and scheduler."""

    pipeline: Any  # diffusers' class
    encoders: tuple[str, ...]  # text encoders; a tokenizer stands beside each
    t5: str  # the encoder of them that is T5
    is_t5_needed: bool

    @property
    def text(self) -> tuple[str, ...]:
        """Every part that only encoding needs."""
        return (*self.encoders, *map(tokenizer_of, self.encoders))


def tokenizer_of(encoder: str) -> str:
    """The tokenizer beside a text encoder."""
    return encoder.replace("text_encoder", "tokenizer")


def read_pipeline(config: ModelConfig, kind: PipelineParts, *, with_vae: bool, with_text: bool) -> Any:
    """Load the directory: every module frozen, in eval mode and on the device; the VAE in float32, the rest in config.dtype.

    Args:
        kind: the family's parts.
        with_vae: False leaves the VAE out (a learner decodes nothing).
        with_text: False leaves the text encoders out (features come from the group files).

    Returns:
        The pipeline.

    Raises:
        ModelError: the directory is missing, damaged or of another class.
        ConfigError: a device that this machine lacks, no T5 tokens for a model that has T5, a guidance that does not fit.
    """
    root, device = Path(config.path), find_device(config.device)
    parts = check_model(config)
    has_t5 = kind.is_t5_needed or all(name in parts for name in (kind.t5, tokenizer_of(kind.t5)))
    if with_text and has_t5 and config.max_sequence_length == 0:
        raise ConfigError(f"model: {root} has T5 and model.max_sequence_length is 0; its prompts need T5 tokens; set it to 77 to 512")
    left_out = [*(() if has_t5 else (kind.t5, tokenizer_of(kind.t5))), *(() if with_text else kind.text), *(() if with_vae else ("vae",))]
    absent = dict.fromkeys(left_out)
    missing = [name for name in ("transformer", "vae", *kind.text) if name not in absent and name not in parts]
    if missing:
        raise ModelError(f"model: {root} has no {', '.join(missing)}, which a {kind.pipeline.__name__} needs; {REMEDY}")
    check_files(root, [name for name in parts if name not in absent])
    _quiet()
    try:
        pipe = kind.pipeline.from_pretrained(
            str(root), dtype={"default": DTYPES[config.dtype], "vae": torch.float32}, local_files_only=True, use_safetensors=True, **absent
        )
    except _BROKEN as error:
        raise ModelError(
            f"model: {root} cannot be loaded as a {kind.pipeline.__name__} ({_first_line(error)}); "
            "every part that model_index.json names must be whole; restore it"
        ) from error
    pipe.set_progress_bar_config(disable=True)
    for name in ("transformer", "vae", *kind.encoders):
        if name not in absent:
            if name != kind.t5:  # T5 stores one tensor for two names
                check_tensors(root / name, pipe.components[name])
            pipe.components[name].requires_grad_(False).eval().to(device)
    return pipe


def find_device(name: str) -> torch.device:
    """The torch device of a name. Raises ConfigError when this machine has none such."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"model.device: {name!r} is no torch device ({_first_line(error)}); write cpu, cuda or cuda:0") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"model.device: {name!r} came, torch sees {torch.cuda.device_count()} CUDA devices here; set model.device = cpu")
    return device


def check_sides(config: ModelConfig, cell: int, largest: int | None) -> None:
    """Refuse image sides that are no multiple of `cell` pixels, or above `largest`. Raises ConfigError."""
    limit = f" up to {largest}" if largest is not None else ""
    for key, side in (("height", config.height), ("width", config.width)):
        if side % cell != 0 or (largest is not None and side > largest):
            raise ConfigError(f"model.{key}: {side} came; this model draws multiples of {cell}{limit}; choose one")


def refuse_grids(scheduler: Any, keys: Sequence[str], family: str, grid: str) -> None:
    """Refuse a scheduler that asks for another grid than the family's. Raises ConfigError."""
    asked = [key for key in keys if scheduler.config.get(key)]
    if asked:
        raise ConfigError(
            f"{family}: the scheduler sets {', '.join(asked)}; this family's grid is {grid}; unset them in scheduler/scheduler_config.json"
        )


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _quiet() -> None:
    """Keep the libraries' progress bars and chatter out of an actor's log; what matters is logged here."""
    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()
        library.set_verbosity_error()
