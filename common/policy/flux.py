"""FLUX.1: diffusers' own modules as a Network. Latents stay [B, C, h, w]; they are packed for the transformer alone."""

from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline

from common.errors import ConfigError
from common.flow.grid import dynamic_shift, even_grid
from common.policy.config import ModelConfig
from common.policy.index import read_downsampling
from common.policy.pipeline_files import OTHER_GRIDS, PipelineParts, check_sides, refuse_grids

PARTS = PipelineParts(pipeline=FluxPipeline, encoders=("text_encoder", "text_encoder_2"), t5="text_encoder_2", is_t5_needed=True)
PATCH = 2  # latent cells a side of a token
_GRID = "FluxPipeline's: even steps, shifted by a constant or by exp(mu)"


def pack(latents: torch.Tensor) -> torch.Tensor:
    """[B, C, h, w] -> [B, (h / 2) (w / 2), 4 C]: a token is 2 x 2 cells, channel first, as in diffusers' FluxPipeline."""
    batch, channels, height, width = latents.shape
    cells = latents.reshape(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH).permute(0, 2, 4, 1, 3, 5)
    return cells.reshape(batch, (height // PATCH) * (width // PATCH), channels * PATCH * PATCH)


def unpack(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """[B, (h / 2) (w / 2), 4 C] -> [B, C, h, w]: the inverse of pack."""
    channels = tokens.shape[2] // (PATCH * PATCH)
    cells = tokens.reshape(len(tokens), height // PATCH, width // PATCH, channels, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5)
    return cells.reshape(len(tokens), channels, height, width)


def position_ids(height: int, width: int) -> torch.Tensor:
    """[(h / 2) (w / 2), 3] float32: 0, row and column of each token of an image, for the rotary embedding."""
    rows, columns = torch.meshgrid(torch.arange(height // PATCH), torch.arange(width // PATCH), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).float()


class FluxNetwork:
    """FLUX's grid, text encoders (CLIP's pooled vector, T5's tokens) and transformer, which is fed sigma and the embedded guidance.

    The embedded guidance of a distilled model (FLUX.1-dev) is a constant of the run, the same in sampling, training and evaluation.
    Classifier-free guidance beside it (rollout.guidance_scale > 1) is diffusers' true_cfg_scale, with an empty negative prompt.
    """

    name, parts = "flux", PARTS

    def __init__(self, pipeline: Any, config: ModelConfig) -> None:
        """Check a loaded pipeline against the config.

        Raises:
            ConfigError: an image size or a scheduler that this model cannot serve.
        """
        self._pipe, self._config = pipeline, config
        refuse_grids(pipeline.scheduler, OTHER_GRIDS, self.name, _GRID)
        shape, factor = pipeline.transformer.config, read_downsampling(Path(config.path))
        check_sides(config, factor * PATCH, None)
        height, width = config.height // factor, config.width // factor
        self.latent_shape = (int(shape.in_channels) // PATCH**2, height, width)
        self._positions = position_ids(height, width).to(config.device)
        scheduler_shift = read_shift(pipeline.scheduler, (height // PATCH) * (width // PATCH))
        self._shift = scheduler_shift if config.grid_shift == 0 else config.grid_shift

    def sigmas(self, num_steps: int) -> torch.Tensor:
        """FluxPipeline's own grid, [T+1] float32, 1 -> 0; a larger image is shifted further where the scheduler shifts dynamically."""
        return even_grid(num_steps, self._shift)

    def forward(self, latents: torch.Tensor, sigma: torch.Tensor, embeds: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
        """The velocity [B, C, h, w]."""
        guidance = self._config.embedded_guidance
        tokens = self._pipe.transformer(
            hidden_states=pack(latents), timestep=sigma, encoder_hidden_states=embeds, pooled_projections=pooled,
            guidance=torch.full_like(sigma, guidance) if guidance > 0 else None, img_ids=self._positions,
            txt_ids=torch.zeros((embeds.shape[1], 3), device=latents.device), return_dict=False,
        )[0]  # fmt: skip
        return unpack(tokens, *latents.shape[2:])

    def encode(self, text: str, *, with_negative: bool) -> tuple[torch.Tensor | None, ...]:
        """T5's embeds [1, N, D] and CLIP's pooled [1, Dp]; the negative is the empty prompt."""
        embeds, pooled = self._encode(text)
        negative, negative_pooled = self._encode("") if with_negative else (None, None)
        return embeds, pooled, negative, negative_pooled

    def count_tokens(self, text: str) -> tuple[int, int]:
        """T5 reads the prompt; CLIP, which reads less of a long one, only pools it."""
        return len(self._pipe.tokenizer_2(text).input_ids), self._config.max_sequence_length

    def _encode(self, text: str) -> tuple[torch.Tensor, torch.Tensor]:
        device, length = torch.device(self._config.device), self._config.max_sequence_length
        embeds, pooled, _ = self._pipe.encode_prompt(prompt=text, prompt_2=None, device=device, max_sequence_length=length)
        return embeds, pooled


def read_shift(scheduler: Any, num_tokens: int) -> float:
    """The factor by which a FLUX scheduler shifts even steps for an image of so many tokens. Raises ConfigError."""
    settings = scheduler.config
    if not settings.use_dynamic_shifting:
        return float(settings.shift)
    if settings.time_shift_type != "exponential":
        raise ConfigError(
            f"flux: the scheduler's time_shift_type is {settings.time_shift_type!r}; this family's grid is {_GRID}; set it to exponential"
        )
    return dynamic_shift(
        num_tokens, base_tokens=settings.base_image_seq_len, max_tokens=settings.max_image_seq_len,
        base_mu=settings.base_shift, max_mu=settings.max_shift,
    )  # fmt: skip
