"""The shipped directory: a StableDiffusion3Pipeline in half precision."""

import os
import shutil
import tempfile
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

from deploy.pretrain.checkpoints import read_checkpoint, read_json, restore_module, write_json
from deploy.pretrain.config import PretrainSettings
from deploy.pretrain.latents import load_autoencoder, load_moments
from deploy.pretrain.text import build_tokenizer
from deploy.pretrain.train_flow import build_flow


def build_pipeline(settings: PretrainSettings, work: Path) -> StableDiffusion3Pipeline:
    """Return the pipeline of the newest averaged weights, in float32.

    Args:
        settings: what the stages were run with.
        work: folder of the stages' results.

    Raises:
        FileNotFoundError: a stage has left nothing yet.
    """
    found = read_checkpoint(work / "transformer")
    if found is None:
        raise FileNotFoundError(f"build_pipeline: {work} holds no transformer checkpoint; run that stage first")
    flow = build_flow(settings, work)
    restore_module(flow, found[0], "average")
    flow.eval()
    vae, (shift, scale) = load_autoencoder(settings, work), load_moments(work)
    vae.register_to_config(shift_factor=shift, scaling_factor=scale)
    tokenizer = build_tokenizer(work / "tokenizer", max_tokens=settings.transformer.max_tokens)
    return StableDiffusion3Pipeline(
        transformer=flow.transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=settings.transformer.sampling_shift),
        vae=vae,
        text_encoder=flow.text.first,
        tokenizer=tokenizer,
        text_encoder_2=flow.text.second,
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def export_pipeline(settings: PretrainSettings, work: Path, out: Path) -> None:
    """Write the pipeline beside `out` and swap it in, keeping the files that training does not make.

    The files hold half precision. Without a torch_dtype diffusers loads its models in float32, but transformers takes
    the dtype that a config names; so the text encoders' configs name float32, and the plain load is float32 throughout.

    Args:
        settings: what the stages were run with.
        work: folder of the stages' results.
        out: the model's directory; may exist.
    """
    pipeline = build_pipeline(settings, work)
    pipeline.to(dtype=torch.float16)
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    pipeline.save_pretrained(beside)
    for tokenizer in ("tokenizer", "tokenizer_2"):
        for name in ("vocab.json", "merges.txt"):
            shutil.copy2(work / "tokenizer" / name, beside / tokenizer / name)
    for encoder in ("text_encoder", "text_encoder_2"):
        path = beside / encoder / "config.json"
        write_json(path, read_json(path) | {"dtype": "float32"})
    beside.chmod(0o755)
    if out.exists():
        for kept in out.iterdir():
            if kept.is_file() and not (beside / kept.name).exists():
                shutil.copy2(kept, beside / kept.name)
        before = beside.with_name(beside.name + "-before")
        os.rename(out, before)
        os.rename(beside, out)
        shutil.rmtree(before)
    else:
        os.rename(beside, out)
