"""An exported LoRA changes diffusers' own image exactly as the trainer's policy does."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from common.errors import UserError
from common.policy.adapters import write_adapter_bytes
from common.policy.config import LoraConfig, ModelConfig
from common.policy.load import load_policy
from common.types import SnapshotInfo
from deploy.export import export_adapter

PROMPT, STEPS = "a red circle", 3


@pytest.fixture(scope="module")
def trained(tiny_sd3_dir: Path) -> tuple[ModelConfig, bytes, torch.Tensor, torch.Tensor]:
    """The model section, a published file, the initial latents and the trainer's own clean latents."""
    model = ModelConfig(path=str(tiny_sd3_dir), lora=LoraConfig(rank=4, alpha=12))
    policy = load_policy(model)
    generator = torch.Generator().manual_seed(3)
    state = {name: tensor + 0.2 * torch.randn(tensor.shape, generator=generator) for name, tensor in policy.read_adapter().items()}
    content, _ = write_adapter_bytes(
        {"ema": state}, {"ema": SnapshotInfo(num_modules=policy.num_adapter_modules, canary=0.1)}, incarnation=1, version=7
    )
    start = torch.randn((1, *policy.latent_shape), generator=generator)
    features, sigmas, latents = policy.batch_features(policy.encode([PROMPT], with_negative=False)), policy.sigmas(STEPS), start
    with torch.no_grad(), policy.using(state):
        for sigma, following in pairwise(sigmas):
            latents = latents + (following - sigma) * policy.velocity(latents, sigma.reshape(1), features)
    return model, content, start, latents


def clean_pipeline(directory: Path) -> StableDiffusion3Pipeline:
    pipe = StableDiffusion3Pipeline.from_pretrained(str(directory), text_encoder_3=None, tokenizer_3=None, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: StableDiffusion3Pipeline, start: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return pipe(
            PROMPT,
            num_inference_steps=STEPS,
            guidance_scale=1.0,
            latents=start,
            max_sequence_length=0,
            height=64,
            width=64,
            output_type="latent",
        ).images


@pytest.mark.parametrize("fmt", ["peft", "diffusers"])
def test_an_exported_lora_gives_the_trainers_latents_in_a_clean_pipeline(trained, tiny_sd3_dir, tmp_path, fmt) -> None:
    model, content, start, expected = trained
    out = export_adapter(content, "ema", model, tmp_path / "lora", fmt)
    pipe = clean_pipeline(tiny_sd3_dir)
    base = draw(pipe, start)
    if fmt == "peft":
        pipe.transformer = PeftModel.from_pretrained(pipe.transformer, str(out)).base_model.model
    else:
        pipe.load_lora_weights(str(out))
    layers = [module for module in pipe.transformer.modules() if isinstance(module, LoraLayer)]
    assert len(layers) == 15
    assert all(list(layer.scaling.values()) == [3.0] for layer in layers)  # alpha 12 / rank 4 survived
    tuned = draw(pipe, start)
    assert (tuned - base).abs().max() > 1e-2
    torch.testing.assert_close(tuned, expected, atol=1e-4, rtol=0)  # the same float32 arithmetic in another order of calls


def test_an_export_never_writes_over_a_directory_that_holds_something(trained, tmp_path) -> None:
    model, content, _, _ = trained
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="not empty"):
        export_adapter(content, "ema", model, tmp_path, "peft")
    assert (tmp_path / "mine.txt").read_text() == "keep"
