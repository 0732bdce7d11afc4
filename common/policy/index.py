"""A diffusers directory's JSON files (no torch: a start checks them before any process loads a model)."""

import json
from pathlib import Path
from typing import Any

from common.errors import ModelError

RULE = "model.path names a diffusers StableDiffusion3Pipeline directory on this machine"


def read_index(root: Path) -> dict[str, Any]:
    """Return the parts of a StableDiffusion3Pipeline directory. Raises ModelError when it is none."""
    parts = _read_object(root / "model_index.json")
    if parts.get("_class_name") != "StableDiffusion3Pipeline":
        raise ModelError(f"model: {root} holds a {parts.get('_class_name')}; {RULE}; set model.family for another family")
    return parts


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
