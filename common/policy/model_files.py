"""What a model directory promises, checked before and after it is loaded: a part that is missing or cut is named, never guessed."""

import json
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from common.errors import ModelError

REMEDY = "copy or download it again"
_LENGTH_BYTES = 8  # of a safetensors file's header
_VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model")  # without one, a tokenizer is made that knows no word


def check_files(root: Path, parts: Sequence[str]) -> None:
    """Look at the files of the parts that are to be loaded, before a library meets them.

    Raises:
        ModelError: a folder or a vocabulary is missing, a JSON file does not parse, a safetensors file is cut.
    """
    for folder in (root / name for name in sorted(parts)):
        if not folder.is_dir():
            raise ModelError(f"model: {folder} is missing, which model_index.json names; {REMEDY}")
        if folder.name.startswith("tokenizer") and not any((folder / name).is_file() for name in _VOCABULARIES):
            raise ModelError(f"model: {folder} holds no vocabulary, which is one of {', '.join(_VOCABULARIES)}; {REMEDY}")
        for file in sorted(folder.glob("*.json")):
            _check_json(file)
        for file in sorted(folder.glob("*.safetensors")):
            count_tensors(file)


def check_tensors(folder: Path, module: nn.Module) -> None:
    """Check that a loaded module got every tensor from its files: libraries fill what is missing with noise.

    Raises:
        ModelError: the files hold fewer tensors than the module.
    """
    stored, needed = sum(count_tensors(file) for file in sorted(folder.glob("*.safetensors"))), len(module.state_dict())
    if stored < needed:
        raise ModelError(f"model: {folder} holds {stored} tensors, {type(module).__name__} by its config.json has {needed}; {REMEDY}")


def count_tensors(file: Path) -> int:
    """Return how many tensors a safetensors file holds.

    Raises:
        ModelError: the header does not parse, or the file is shorter than its header says.
    """
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
            size = file.stat().st_size
            header = json.loads(stream.read(length)) if length < size else {}
            spans = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"model: {file} is no safetensors file ({error}); a pointer of a large-file store is none either; {REMEDY}"
        ) from error
    promised = _LENGTH_BYTES + length + max(spans, default=0)
    if size != promised:
        raise ModelError(f"model: {file} has {size} bytes, its header promises {promised}; it is cut or was changed; {REMEDY}")
    return len(spans)


def _check_json(file: Path) -> None:
    try:
        json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"model: {file} does not parse ({error}); {REMEDY}") from error
