"""Stable Diffusion 3 (and the tiny model, which has the same classes): diffusers' own modules behind the Policy interface."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.utils import logging as diffusers_logging
from numpy.typing import NDArray
from transformers.utils import logging as transformers_logging

from common.errors import ConfigError, ModelError
from common.flow.grid import sigma_grid
from common.logs import get_logger
from common.policy.base import AdapterState, FeatureBatch
from common.policy.config import ModelConfig
from common.policy.index import read_index
from common.policy.lora import LoraHandle
from common.types import FloatArray, PromptFeatures, SnapshotInfo

TIMESTEPS = 1000.0  # diffusers feeds 1000 sigma
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CANARY_SEED = 20250505
_CANARY_SIGMA = 0.7
_log = get_logger("policy")


class Sd3Policy:
    """A frozen SD3 base with one LoRA adapter. Velocities come back in float32, whatever the base's dtype."""

    def __init__(self, pipeline: Any, config: ModelConfig) -> None:
        """Wrap a loaded pipeline; the adapter is added here."""
        self._pipe, self._config = pipeline, config
        self._transformer = pipeline.transformer
        self.device = torch.device(config.device)
        self._dtype = _DTYPES[config.dtype]
        self._lora = LoraHandle(self._transformer, config.lora)
        self.num_adapter_modules = self._lora.num_modules
        factor = 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
        self.latent_shape = (int(self._transformer.config.in_channels), config.height // factor, config.width // factor)
        self.image_size = (config.height, config.width)
        self._shift = _grid_shift(pipeline.scheduler)
        self._canary_features: FeatureBatch | None = None

    def sigmas(self, num_steps: int) -> torch.Tensor:
        """The scheduler's own grid, [T+1] float32, 1 -> 0."""
        return sigma_grid(num_steps, self._shift)

    def encode(self, texts: Sequence[str], *, with_negative: bool) -> list[PromptFeatures]:
        """Encode as diffusers' pipeline does, a prompt at a time; max_sequence_length is the config's."""
        return [self._encode_one(text, with_negative) for text in texts]

    def batch_features(self, features: Sequence[PromptFeatures]) -> FeatureBatch:
        """Stack features onto the device, float32."""

        def stack(arrays: Sequence[FloatArray | None]) -> torch.Tensor | None:
            present = [array for array in arrays if array is not None]
            return torch.from_numpy(np.stack(present)).to(self.device) if len(present) == len(arrays) else None

        prompt_embeds, pooled = stack([f.prompt_embeds for f in features]), stack([f.pooled for f in features])
        assert prompt_embeds is not None and pooled is not None, "prompt embeddings are never absent"
        return FeatureBatch(
            prompt_embeds=prompt_embeds, pooled=pooled,
            negative_embeds=stack([f.negative_embeds for f in features]), negative_pooled=stack([f.negative_pooled for f in features]),
        )  # fmt: skip

    def velocity(
        self, latents: torch.Tensor, sigma: torch.Tensor, features: FeatureBatch, *,
        guidance_scale: float = 1.0, detach_uncond: bool = True,
    ) -> torch.Tensor:  # fmt: skip
        """Predict v = eps - x_0, [B, C, h, w] float32; with guidance v_u + w (v_c - v_u).

        Raises:
            ConfigError: guidance without negative features.
        """
        conditional = self._forward(latents, sigma, features.prompt_embeds, features.pooled)
        if guidance_scale == 1.0:
            return conditional
        if features.negative_embeds is None or features.negative_pooled is None:
            raise ConfigError(f"sd3: guidance_scale {guidance_scale} needs negative features, which this group does not carry; sample with guidance")
        with torch.no_grad() if detach_uncond else nullcontext():
            unconditional = self._forward(latents, sigma, features.negative_embeds, features.negative_pooled)
        return unconditional + guidance_scale * (conditional - unconditional)

    def decode(self, latents: torch.Tensor) -> NDArray[np.uint8]:
        """[B, C, h, w] clean latents -> [B, H, W, 3] uint8 RGB; the VAE runs in float32."""
        vae = self._pipe.vae
        with torch.no_grad():
            scaled = latents.to(self.device, torch.float32) / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
            images = vae.decode(scaled, return_dict=False)[0]
        pixels = ((images / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
        return pixels.permute(0, 2, 3, 1).cpu().numpy()

    def adapter_parameters(self) -> list[torch.nn.Parameter]:
        """The trained parameters, in canonical name order."""
        return self._lora.parameters()

    def read_adapter(self) -> dict[str, torch.Tensor]:
        """A float32 CPU copy of the adapter."""
        return self._lora.read()

    def load_adapter(self, state: AdapterState) -> int:
        """Copy a state in place; return the modules bound. Raises ModelError on foreign or missing names."""
        return self._lora.load(state)

    @contextmanager
    def using(self, state: AdapterState) -> Iterator[None]:
        """Run with another adapter's values, then restore."""
        with self._lora.using(state):
            yield

    @contextmanager
    def base(self) -> Iterator[None]:
        """Run with the adapter off."""
        with self._lora.off():
            yield

    def inspect_adapter(self) -> SnapshotInfo:
        """Bound modules, and the canary ||v(on) - v(off)|| / ||v(off)|| on a fixed latent, sigma .7 and the empty prompt."""
        generator = torch.Generator().manual_seed(_CANARY_SEED)
        latents = torch.randn((1, *self.latent_shape), generator=generator).to(self.device)
        sigma = torch.tensor([_CANARY_SIGMA], device=self.device)
        if self._canary_features is None:
            self._canary_features = self.batch_features(self.encode([""], with_negative=False))
        with torch.no_grad():
            adapted = self.velocity(latents, sigma, self._canary_features)
            with self.base():
                plain = self.velocity(latents, sigma, self._canary_features)
        return SnapshotInfo(num_modules=self.num_adapter_modules, canary=float((adapted - plain).norm() / plain.norm()))

    def _forward(self, latents: torch.Tensor, sigma: torch.Tensor, embeds: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
        lower = self._dtype != torch.float32
        with torch.autocast(self.device.type, self._dtype) if lower else nullcontext():
            result: torch.Tensor = self._transformer(
                hidden_states=latents.to(self._dtype), timestep=(sigma * TIMESTEPS).to(latents.dtype),
                encoder_hidden_states=embeds.to(self._dtype), pooled_projections=pooled.to(self._dtype), return_dict=False,
            )[0]  # fmt: skip
        return result.float()

    def _encode_one(self, text: str, with_negative: bool) -> PromptFeatures:
        self._warn_if_cut(text)
        with torch.no_grad():
            embeds, negative, pooled, negative_pooled = self._pipe.encode_prompt(
                prompt=text, prompt_2=None, prompt_3=None, device=self.device, do_classifier_free_guidance=with_negative,
                max_sequence_length=self._config.max_sequence_length,
            )  # fmt: skip
        rows = [None if tensor is None else tensor[0].float().cpu().numpy() for tensor in (embeds, pooled, negative, negative_pooled)]
        assert rows[0] is not None and rows[1] is not None, "the pipeline encodes every prompt"
        return PromptFeatures(prompt_embeds=rows[0], pooled=rows[1], negative_embeds=rows[2], negative_pooled=rows[3])

    def _warn_if_cut(self, text: str) -> None:
        if self._pipe.text_encoder_3 is not None:
            return  # T5 reads what CLIP cuts
        count, limit = len(self._pipe.tokenizer(text).input_ids), int(self._pipe.tokenizer.model_max_length)
        if count > limit:
            _log.warning("prompt %r has %d tokens, the text encoders read %d: the rest is not seen", text[:60], count, limit)


def load_sd3(config: ModelConfig, *, seed: int = 0) -> Sd3Policy:
    """Load a StableDiffusion3Pipeline directory.

    Raises:
        ModelError: what is wrong with the directory, and the remedy.
        ConfigError: LoRA targets that name no module.
    """
    root = Path(config.path)
    parts = read_index(root)
    absent = {name: None for name in ("text_encoder_3", "tokenizer_3") if parts.get(name, [None])[0] is None}
    _quiet()
    dtypes = {"default": _DTYPES[config.dtype], "vae": torch.float32}
    try:
        pipe = StableDiffusion3Pipeline.from_pretrained(str(root), dtype=dtypes, local_files_only=True, **absent)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"model: {root} cannot be loaded as a StableDiffusion3Pipeline ({first}); every part of model_index.json must be whole; restore it") from error
    pipe.set_progress_bar_config(disable=True)
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
        module = getattr(pipe, name)
        if module is not None:
            module.requires_grad_(False).eval().to(config.device)
    generator_state = torch.get_rng_state()
    torch.manual_seed(seed)  # PEFT draws A from the global generator; put back below
    try:
        return Sd3Policy(pipe, config)
    finally:
        torch.set_rng_state(generator_state)


def _quiet() -> None:
    """Keep the libraries' progress bars out of the log of an actor."""
    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()
        library.set_verbosity_error()


def _grid_shift(scheduler: Any) -> float:
    if scheduler.config.use_dynamic_shifting:
        raise ConfigError("sd3: the scheduler asks for dynamic shifting, which this family does not use; set use_dynamic_shifting to false")
    return float(scheduler.config.shift)
