"""A published adapter as a LoRA that PEFT or diffusers loads."""

import shutil
import tempfile
from pathlib import Path

from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig as PeftLoraConfig
from safetensors.torch import save_file

from common.errors import UserError
from common.policy.adapters import read_adapter, read_header
from common.policy.config import ModelConfig

PEFT_PREFIX = "base_model.model."


def export_adapter(content: bytes, snapshot: str, model: ModelConfig, out: Path, fmt: str) -> Path:
    """Write one snapshot of a published file as a LoRA.

    Args:
        content: bytes of policy/iNNNN/vNNNNNN.safetensors.
        snapshot: live, ema or behavior.
        model: the run's model section (rank, alpha, targets, base).
        out: the directory to make; it must not exist or be empty.
        fmt: "peft" (adapter_config.json + adapter_model.safetensors) or "diffusers" (pytorch_lora_weights.safetensors with
            its alpha in the metadata, for `load_lora_weights`).

    Returns:
        The directory.

    Raises:
        CorruptFile: the file is damaged or lacks the snapshot.
        UserError: `out` holds something.
    """
    if out.exists() and any(out.iterdir()):
        raise UserError(f"export: {out} is not empty and is not written over; name a fresh directory")
    state = {name: tensor.contiguous() for name, tensor in read_adapter(content, snapshot).items()}
    config = PeftLoraConfig(
        r=model.lora.rank, lora_alpha=model.lora.alpha, target_modules=list(model.lora.targets), lora_dropout=0.0,
        base_model_name_or_path=model.path,
    )  # fmt: skip
    with tempfile.TemporaryDirectory(dir=out.parent if out.parent.exists() else None) as folder:
        made = Path(folder) / "lora"
        if fmt == "peft":
            config.save_pretrained(str(made))
            save_file({PEFT_PREFIX + name: tensor for name, tensor in state.items()}, str(made / "adapter_model.safetensors"))
        else:
            described = {
                key: value for key, value in config.to_dict().items() if key in ("r", "lora_alpha", "target_modules", "lora_dropout")
            }
            StableDiffusion3Pipeline.save_lora_weights(
                str(made), transformer_lora_layers=state, transformer_lora_adapter_metadata={**described, "target_modules": list(model.lora.targets)}
            )  # fmt: skip
        (made / "README.md").write_text(_card(read_header(content, "adapter"), snapshot, model, fmt), encoding="utf-8")
        out.mkdir(parents=True, exist_ok=True)
        for file in made.iterdir():
            shutil.move(str(file), str(out / file.name))
    return out


def _card(header: dict[str, str], snapshot: str, model: ModelConfig, fmt: str) -> str:
    load = "`PeftModel.from_pretrained(pipe.transformer, DIRECTORY)`" if fmt == "peft" else "`pipe.load_lora_weights(DIRECTORY)`"
    return (
        f"---\nbase_model: {model.path}\nlibrary_name: {fmt}\ntags: [lora, flowfleet]\n---\n\n# LoRA, version {header['version']}, snapshot {snapshot}\n\n"
        f"Rank {model.lora.rank}, alpha {model.lora.alpha}, targets {', '.join(model.lora.targets)}. Digest of the published version: "
        f"{header['digest']}.\n\nLoad: {load}\n"
    )
