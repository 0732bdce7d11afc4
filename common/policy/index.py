"""A diffusers directory's JSON files (no torch: a start checks them before any process loads a model)."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from common.errors import ConfigError, ModelError
from common.policy.config import ModelConfig

RULE = "model.path names a diffusers pipeline directory on this machine"
PIPELINES: Final[Mapping[str, str]] = {"sd3": "StableDiffusion3Pipeline", "flux": "FluxPipeline"}  # family -> diffusers' class


def read_index(root: Path, family: str) -> dict[str, Any]:
    """Return the parts of a family's pipeline directory. Raises ModelError when it is none, or another family's."""
    parts, needed = _read_object(root / "model_index.json"), PIPELINES[family]
    found = parts.get("_class_name")
    if found != needed:
        fitting = next((name for name, pipeline in PIPELINES.items() if pipeline == found), None)
        remedy = f"set model.family={fitting}" if fitting else f"families are {', '.join(PIPELINES)}"
        raise ModelError(f"model: {root} holds a {found}, and model.family={family} is a {needed}; {RULE}; {remedy}")
    return parts


def present_parts(index: Mapping[str, Any]) -> list[str]:
    """The parts that an index holds, by name; [null, null] is one that the model goes without."""
    return sorted(name for name, value in index.items() if isinstance(value, list) and value[:1] not in ([], [None]))


def check_model(config: ModelConfig) -> list[str]:
    """Refuse a directory of another family, and an embedded guidance that the model does not take or lacks, by its JSON files alone.

    Returns:
        The parts that are there.

    Raises:
        ConfigError: the guidance does not fit.
        ModelError: a file cannot be read, or the directory is another family's.
    """
    root = Path(config.path)
    parts = present_parts(read_index(root, config.family))
    if config.family != "flux":
        return parts
    is_distilled = bool(_read_object(root / "transformer" / "config.json").get("guidance_embeds"))
    if is_distilled and config.embedded_guidance == 0:
        raise ConfigError(
            f"flux: {config.path} is guidance-distilled and model.embedded_guidance is 0; it must be told one; FLUX.1-dev's is 3.5"
        )
    if not is_distilled and config.embedded_guidance > 0:
        raise ConfigError(
            f"flux: model.embedded_guidance={config.embedded_guidance:g} came, and {config.path} takes none (it is no guidance-distilled model); "
            "set it to 0"
        )
    return parts


def weight_files(root: Path) -> list[Path]:
    """The safetensors files of the parts that model_index.json names: a hub's directory may hold single-file copies beside them."""
    parts = present_parts(_read_object(root / "model_index.json"))
    return [file for name in parts for file in sorted((root / name).glob("*.safetensors"))]


def read_downsampling(root: Path) -> int:
    """Pixels a side of a latent cell, from vae/config.json: the VAE itself need not be loaded. Raises ModelError."""
    path = root / "vae" / "config.json"
    channels = _read_object(path).get("block_out_channels")
    if not isinstance(channels, list) or not channels:
        raise ModelError(f"model: {path} has no block_out_channels; {RULE}; restore the file")
    return int(2 ** (len(channels) - 1))


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"model: {path} cannot be read ({error}); {RULE}; the shipped one is models/tiny-sd3") from error
    if not isinstance(content, dict):
        raise ModelError(f"model: {path} holds no JSON object; {RULE}; restore the file")
    return content
