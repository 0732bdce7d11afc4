"""A published version as a LoRA that PEFT, diffusers, ComfyUI or kohya's sd-scripts loads, with its model card."""

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig as PeftLoraConfig
from safetensors import SafetensorError
from safetensors.torch import save_file

from common.errors import UserError
from common.policy.adapters import read_adapter, read_publication
from common.policy.base import AdapterState
from common.policy.config import ModelConfig
from common.store.recovery import adapters
from common.store.run_store import RunStore
from deploy.lora.kohya import KOHYA_WEIGHTS, to_kohya
from deploy.model_card.card import make_card
from deploy.model_card.facts import CardRequest
from deploy.model_card.sources import base_facts
from deploy.options import run_config_of

PEFT_PREFIX = "base_model.model."
_STAGED: Final = ("r", "lora_alpha", "target_modules", "lora_dropout")  # of PEFT's config: what diffusers' header needs


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportRequest:
    """What to export, and where to."""

    out: Path  # the directory to make; it must not exist or be empty
    fmt: str = "diffusers"  # peft, diffusers or kohya
    snapshot: str = "ema"  # live, ema or behavior
    version: int | None = None  # None: the newest that is kept
    card_samples: bool = True


def export_run(store: RunStore, request: ExportRequest) -> int:
    """Export one version of a run with its model card; the directory is there whole, or not at all.

    Returns:
        The version.

    Raises:
        UserError: `out` holds something; the run keeps no such version or snapshot.
        CorruptFile: the published file's weights do not match its digest, or a file of the run breaks its form.
    """
    refuse_filled(request.out)
    published = adapters(store)
    version = max(published, default=None) if request.version is None else request.version
    if version is None or version not in published:
        raise UserError(f"export: {store.url} holds no version {version}; published and kept: {sorted(published)}")
    config, content = run_config_of(store), store.read(published[version])
    publication = read_publication(content, published[version])
    if request.snapshot not in publication.snapshots:
        raise UserError(
            f"export: version {version} holds no snapshot {request.snapshot!r}, only {', '.join(sorted(publication.snapshots))}; "
            "pass --snapshot with one of them"
        )
    wanted = CardRequest(
        version=version, snapshot=request.snapshot, fmt=request.fmt, digest=publication.adapter.digest, with_samples=request.card_samples
    )
    export_adapter(content, request.snapshot, config.model, request.out, request.fmt, beside=lambda: make_card(store, config, wanted))
    return version


def export_adapter(
    content: bytes, snapshot: str, model: ModelConfig, out: Path, fmt: str, *, beside: Callable[[], Mapping[str, bytes]] | None = None
) -> Path:
    """Write one snapshot of a published file as a LoRA.

    Args:
        content: bytes of policy/iNNNN/vNNNNNN.safetensors.
        snapshot: live, ema or behavior.
        model: the run's model section (rank, alpha, targets, base).
        out: the directory to make; it must not exist or be empty.
        fmt: "peft" (adapter_config.json + adapter_model.safetensors), "diffusers" (pytorch_lora_weights.safetensors with its alpha in
            the header, for `load_lora_weights`) or "kohya" (kohya_lora.safetensors, for ComfyUI and sd-scripts).
        beside: makes more files, by their paths inside the directory; asked once the weights are known to be right.

    Returns:
        The directory.

    Raises:
        CorruptFile: the file is damaged (its weights do not match its digest) or lacks the snapshot.
        ConfigError: an adapter that the format cannot tell.
        UserError: `out` holds something, or cannot be written.
    """
    refuse_filled(out)
    state = {name: tensor.contiguous() for name, tensor in read_adapter(content, snapshot).items()}
    with _staged(out) as made:
        _WRITERS[fmt](state, model, made)
        for file in made.iterdir():
            file.chmod(made.stat().st_mode & 0o666)  # as the user's mask has it: safetensors leaves files that only their owner reads
        for name, more in (beside() if beside is not None else {}).items():
            (made / name).parent.mkdir(parents=True, exist_ok=True)
            (made / name).write_bytes(more)
    return out


def refuse_filled(out: Path) -> None:
    """Raise UserError when a path is a file, or a directory that holds something."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"export: {out} is not empty and is not written over; name a fresh directory")


@contextmanager
def _staged(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out` that takes its name when the block has ended, and is gone when it failed."""
    place = next(parent for parent in out.absolute().parents if parent.is_dir())
    try:
        with tempfile.TemporaryDirectory(dir=place, prefix=".export-") as folder:
            made = Path(folder) / "lora"
            made.mkdir()
            yield made
            out.parent.mkdir(parents=True, exist_ok=True)
            os.replace(made, out)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"export: {out} cannot be written ({error}); nothing of it was left; name a directory on a disk with room"
        ) from error


def _write_peft(state: AdapterState, model: ModelConfig, made: Path) -> None:
    _peft_config(model).save_pretrained(str(made))
    save_file({PEFT_PREFIX + name: tensor for name, tensor in state.items()}, str(made / "adapter_model.safetensors"))


def _write_diffusers(state: AdapterState, model: ModelConfig, made: Path) -> None:
    described = {key: value for key, value in _peft_config(model).to_dict().items() if key in _STAGED}
    StableDiffusion3Pipeline.save_lora_weights(  # what it writes is the same for every transformer
        str(made), transformer_lora_layers=dict(state),
        transformer_lora_adapter_metadata={**described, "target_modules": list(model.lora.targets)},
    )  # fmt: skip


def _write_kohya(state: AdapterState, model: ModelConfig, made: Path) -> None:
    lora = to_kohya(state, model)
    save_file(dict(lora.tensors), str(made / KOHYA_WEIGHTS), metadata=dict(lora.header))


_WRITERS: Final[Mapping[str, Callable[[AdapterState, ModelConfig, Path], None]]] = {
    "peft": _write_peft, "diffusers": _write_diffusers, "kohya": _write_kohya
}  # fmt: skip


def _peft_config(model: ModelConfig) -> PeftLoraConfig:
    base = base_facts(model.path)
    return PeftLoraConfig(
        r=model.lora.rank, lora_alpha=model.lora.alpha, target_modules=list(model.lora.targets), lora_dropout=0.0,
        base_model_name_or_path=base.hub_id or model.path, revision=base.revision or None,
    )  # fmt: skip
