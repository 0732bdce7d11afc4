"""Loading of transformers checkpoints by id or local path: safetensors only, whole or not at all."""

import hashlib
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from common.errors import ConfigError, ScorerError

_READ_BY_MODELS: Final = ("*.safetensors", "*.json", "*.txt")


def load_model(model_class: Any, model: str, *, revision: str, device: str) -> Any:
    """Load a model's float32 weights for inference.

    Args:
        model_class: a transformers model class.
        model: id on the hub, or a local directory.
        revision: commit or branch on the hub ("" = main); of no use with a directory.
        device: as torch names it.

    Returns:
        The model on its device, in eval mode.

    Raises:
        ConfigError: it cannot be read, it lacks parameters that the class has, or the device is none.
    """
    import torch  # noqa: PLC0415  (heavy, needed by model-backed scorers only)

    loaded, report = _load(model_class, model, revision, use_safetensors=True, dtype=torch.float32, output_loading_info=True)
    parameters = dict(loaded.named_parameters())
    absent = sorted(name for name in report["missing_keys"] if name in parameters)
    if absent:
        raise ConfigError(
            f"{model_class.__name__}: {model} lacks {len(absent)} of its parameters, e.g. {absent[0]}; it is a checkpoint of another class"
        )
    try:
        return loaded.to(torch.device(device)).eval()
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"{model_class.__name__}: device {device!r} cannot be used ({error}); name cpu, or cuda with a GPU") from error


def load_image_processor(model: str, *, revision: str) -> Any:
    """Load the checkpoint's preprocessing, by Pillow wherever it runs: one preprocessing, one score. Raises ConfigError."""
    from transformers import AutoImageProcessor  # noqa: PLC0415

    return _load(AutoImageProcessor, model, revision, backend="pil")


def load_tokenizer(model: str, *, revision: str) -> Any:
    """Load the checkpoint's tokenizer. Raises ConfigError."""
    from transformers import AutoTokenizer  # noqa: PLC0415

    return _load(AutoTokenizer, model, revision)


def _load(part_class: Any, model: str, revision: str, **options: Any) -> Any:
    try:
        return part_class.from_pretrained(model, revision=revision or "main", **options)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError) as error:
        reason = str(error).strip().split("\n")[0][:300]
        raise ConfigError(
            f"{part_class.__name__}: {model} cannot be loaded ({reason}); name a checkpoint of this class with safetensors weights, "
            "by its id or as a local directory (an id is fetched once: it needs the network or a filled cache)"
        ) from error


def checkpoint_version(model: str, revision: str) -> str:
    """Return what a score's version says of a checkpoint: the digest of a local directory's files, or id@revision."""
    folder = Path(model)
    if not folder.is_dir():
        return f"{model}@{revision or 'main'}"
    digest = hashlib.sha256()
    for file in sorted({file for pattern in _READ_BY_MODELS for file in folder.glob(pattern)}):
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:12]


def checked_image(image: NDArray[np.uint8], component: str) -> NDArray[np.uint8]:
    """Return the image; raise ScorerError when it is not [H, W, 3] uint8 with at least a pixel."""
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or image.size == 0:
        raise ScorerError(f"{component}: an image of shape {image.shape} and {image.dtype} came; it reads [H, W, 3] uint8 RGB")
    return image
