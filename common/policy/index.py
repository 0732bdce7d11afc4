"""A diffusers directory's model_index.json (no torch: a start checks it before any process loads a model)."""

import json
from pathlib import Path
from typing import Any

from common.errors import ModelError


def read_index(root: Path) -> dict[str, Any]:
    """Return the parts of a StableDiffusion3Pipeline directory. Raises ModelError when it is none."""
    index = root / "model_index.json"
    rule = "model.path names a diffusers StableDiffusion3Pipeline directory on this machine"
    try:
        parts: dict[str, Any] = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"model: {index} cannot be read ({error}); {rule}; the shipped one is models/tiny-sd3") from error
    if parts.get("_class_name") != "StableDiffusion3Pipeline":
        raise ModelError(f"model: {root} holds a {parts.get('_class_name')}; {rule}; set model.family for another family")
    return parts
