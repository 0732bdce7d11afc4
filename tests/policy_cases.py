"""What the policy tests share: a small policy, changed adapters, the real pipeline, fixed inputs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline

from common.policy.config import LoraConfig, ModelConfig
from common.policy.load import load_policy
from common.policy.pipeline_policy import PipelinePolicy

RANK, ALPHA = 4, 8
PROMPTS = ("a red circle", "three blue squares left of a star", "")


def policy_of(directory: Path, *, rank: int = RANK, seed: int = 0, parts: bool = True, **model: Any) -> PipelinePolicy:
    """A policy; parts=False leaves out VAE and text encoders."""
    config = ModelConfig(path=str(directory), **({"lora": LoraConfig(rank=rank, alpha=ALPHA)} | model))
    policy = load_policy(config, seed=seed, with_vae=parts, with_text=parts)
    assert isinstance(policy, PipelinePolicy)
    return policy


def changed(state: Mapping[str, torch.Tensor], *, seed: int = 1, scale: float = 0.1) -> dict[str, torch.Tensor]:
    """The state with normal noise on every value, so that B is no longer 0."""
    generator = torch.Generator().manual_seed(seed)
    return {name: tensor + scale * torch.randn(tensor.shape, generator=generator) for name, tensor in state.items()}


def real_pipeline(directory: Path) -> StableDiffusion3Pipeline:
    """diffusers' own pipeline, as the model card says it is loaded."""
    pipe = StableDiffusion3Pipeline.from_pretrained(str(directory), text_encoder_3=None, tokenizer_3=None, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def inputs(policy: PipelinePolicy, count: int, seed: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents [B, C, h, w] and as many different sigmas [B]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((count, *policy.latent_shape), generator=generator), torch.linspace(0.9, 0.2, count)
