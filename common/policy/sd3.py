"""Stable Diffusion 3 (and the tiny model, which has the same classes): diffusers' own modules as a Network."""

from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline

from common.flow.grid import sigma_grid, timesteps_of
from common.policy.config import ModelConfig
from common.policy.index import read_downsampling
from common.policy.pipeline_files import OTHER_GRIDS, PipelineParts, check_sides, refuse_grids

PARTS = PipelineParts(
    pipeline=StableDiffusion3Pipeline,
    encoders=("text_encoder", "text_encoder_2", "text_encoder_3"),
    t5="text_encoder_3",
    is_t5_needed=False,
)
_GRID = "diffusers' flow-match grid with a constant shift"


class Sd3Network:
    """SD3's grid, text encoders (T5 may be absent) and transformer, which is fed 1000 sigma."""

    name, parts = "sd3", PARTS

    def __init__(self, pipeline: Any, config: ModelConfig) -> None:
        """Check a loaded pipeline against the config.

        Raises:
            ConfigError: an image size or a scheduler that this family cannot serve.
        """
        self._pipe, self._config = pipeline, config
        refuse_grids(pipeline.scheduler, ("use_dynamic_shifting", *OTHER_GRIDS), self.name, _GRID)
        self._shift = float(pipeline.scheduler.config.shift) if config.grid_shift == 0 else config.grid_shift
        shape, factor = pipeline.transformer.config, read_downsampling(Path(config.path))
        cell = factor * int(shape.patch_size)
        check_sides(config, cell, cell * int(shape.pos_embed_max_size))
        self.latent_shape = (int(shape.in_channels), config.height // factor, config.width // factor)

    def sigmas(self, num_steps: int) -> torch.Tensor:
        """The scheduler's own grid, [T+1] float32, 1 -> 0."""
        return sigma_grid(num_steps, self._shift)

    def forward(self, latents: torch.Tensor, sigma: torch.Tensor, embeds: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
        """The velocity [B, C, h, w]."""
        velocity: torch.Tensor = self._pipe.transformer(
            hidden_states=latents, timestep=timesteps_of(sigma), encoder_hidden_states=embeds, pooled_projections=pooled, return_dict=False
        )[0]
        return velocity

    def encode(self, text: str, *, with_negative: bool) -> tuple[torch.Tensor | None, ...]:
        """Embeds [1, N, D], pooled [1, Dp] and their negatives, max_sequence_length being the config's."""
        embeds, negative, pooled, negative_pooled = self._pipe.encode_prompt(
            prompt=text, prompt_2=None, prompt_3=None, device=torch.device(self._config.device), do_classifier_free_guidance=with_negative,
            max_sequence_length=self._config.max_sequence_length,
        )  # fmt: skip
        return embeds, pooled, negative, negative_pooled

    def count_tokens(self, text: str) -> tuple[int, int]:
        """Where there is T5 it reads what CLIP cuts, so its limit counts."""
        has_t5 = self._pipe.text_encoder_3 is not None
        tokenizer = self._pipe.tokenizer_3 if has_t5 else self._pipe.tokenizer
        limit = self._config.max_sequence_length if has_t5 else int(tokenizer.model_max_length)
        return len(tokenizer(text).input_ids), limit
