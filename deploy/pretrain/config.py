"""Settings of `flowfleet pretrain`: one strict model a stage."""

import tomllib
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from reward_servers.shapes.vocabulary import IMAGE_SIZE


class Section(BaseModel):
    """Base of every section: unknown keys are errors and values cannot be changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class SceneSettings(Section):
    """Which scenes are drawn."""

    shares: dict[str, float] = {"single": 0.13, "pair": 0.30, "counting": 0.19, "text": 0.38}
    """Layout -> relative weight among the training pictures."""
    num_images: int = Field(default=72_000, ge=64)
    """Pictures whose latents are cached for the transformer."""


class AutoencoderSettings(Section):
    """The autoencoder and its training."""

    channels: list[int] = [16, 16, 32, 64]
    """Width a level; one level halves the side, so four levels make f8."""
    layers: int = Field(default=1, ge=1)
    latent_channels: int = Field(default=16, ge=1)
    num_steps: int = Field(default=2600, ge=1)
    batch_size: int = Field(default=32, ge=1)
    """Pictures a step, all processes together."""
    refining_steps: int = Field(default=1200, ge=0)
    """Steps after those, in which the pictures' low frequencies count too: they settle the objects' colors."""
    learning_rate: float = Field(default=2e-3, gt=0)
    kl_weight: float = Field(default=3e-4, ge=0)
    edge_weight: float = Field(default=1.0, ge=0)
    """Weight of the L1 distance of the pictures' gradients, which keeps letters legible."""
    color_weight: float = Field(default=20.0, ge=0)
    """Weight, while refining, of the mean square error of the pictures shrunk fourfold."""

    @property
    def total_steps(self) -> int:
        """All steps."""
        return self.num_steps + self.refining_steps


class TransformerSettings(Section):
    """The text encoders and the transformer: shapes and training."""

    num_layers: int = Field(default=6, ge=1)
    num_heads: int = Field(default=4, ge=1)
    head_size: int = Field(default=32, ge=2)
    text_width: int = Field(default=64, ge=8)
    text_layers: int = Field(default=3, ge=2)
    max_tokens: int = Field(default=36, ge=8)
    """The tokenizer's model_max_length: prompts are padded to it."""
    shares: dict[str, float] = {"single": 0.20, "pair": 0.50, "counting": 0.20, "text": 0.10}
    """Layout -> relative weight among the pictures that training draws from the cache."""
    batch_size: int = Field(default=64, ge=1)
    """Pictures a step, all processes together."""
    num_steps: int = Field(default=4000, ge=1)
    stop_step: int | None = Field(default=None, ge=1)
    """Where training ends before its schedule does: an early stop keeps the model mediocre."""
    warmup_steps: int = Field(default=100, ge=0)
    decay_share: float = Field(default=0.35, ge=0, le=1)
    """Share of the steps, at the end, over which the learning rate falls to 0."""
    learning_rate: float = Field(default=2e-3, gt=0)
    ema_decay: float = Field(default=0.998, ge=0, lt=1)
    caption_dropout: float = Field(default=0.1, ge=0, le=1)
    wrong_captions: dict[str, float] = {"single": 0.03, "pair": 0.03, "counting": 0.03, "text": 0.4}
    """Layout -> share of its samples that carry the caption of another picture of that layout, as web pictures do."""
    time_mean: float = 0.0
    time_std: float = Field(default=1.0, gt=0)
    """The flow time is sigmoid(normal(time_mean, time_std))."""
    padded_from: float = Field(default=0.6, ge=0, le=1)
    """Share of the steps after which part of the samples sees diffusers' default padding too."""
    padded_share: float = Field(default=0.3, ge=0, le=1)
    t5_tokens: int = Field(default=256, ge=1)
    """Zero tokens that diffusers appends at its default max_sequence_length."""
    sampling_shift: float = Field(default=3.0, gt=0)
    """The scheduler's shift in the exported pipeline."""

    @property
    def last_step(self) -> int:
        """The step at which training ends."""
        return self.num_steps if self.stop_step is None else min(self.stop_step, self.num_steps)


class PretrainSettings(Section):
    """Everything `flowfleet pretrain` decides."""

    seed: int = Field(default=20261121, ge=0)
    device: Literal["cpu", "cuda"] = "cpu"
    threads: int = Field(default=1, ge=1)
    """CPU threads of each process."""
    checkpoint_interval: int = Field(default=250, ge=1)
    """Steps between checkpoints, and between preliminary exports."""
    compile: bool = False
    """Compile the transformer with torch.compile: needs a C++ compiler on CPU."""
    scenes: SceneSettings = SceneSettings()
    autoencoder: AutoencoderSettings = AutoencoderSettings()
    transformer: TransformerSettings = TransformerSettings()

    @property
    def latent_side(self) -> int:
        """Height and width of a picture's latents."""
        return IMAGE_SIZE >> (len(self.autoencoder.channels) - 1)


def load_settings(path: Path | None) -> PretrainSettings:
    """Read settings from a TOML file; without a file, the defaults.

    Args:
        path: the file.

    Returns:
        The checked settings.

    Raises:
        ValueError: an unknown key or a bad value.
    """
    if path is None:
        return PretrainSettings()
    with path.open("rb") as file:
        return PretrainSettings.model_validate(tomllib.load(file))
