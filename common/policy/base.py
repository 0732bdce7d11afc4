"""The Policy: a model family behind one interface. Sampling and recomputation go through the same object and code."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from common.types import PromptFeatures, SnapshotInfo

AdapterState = Mapping[str, torch.Tensor]  # canonical LoRA names -> float32 CPU or device tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureBatch:
    """Encoded text for a batch, on the policy's device."""

    prompt_embeds: torch.Tensor  # [B, N, D]
    pooled: torch.Tensor  # [B, Dp]
    negative_embeds: torch.Tensor | None = None  # [B, N, D]
    negative_pooled: torch.Tensor | None = None  # [B, Dp]


class Policy(Protocol):
    """A frozen base with one LoRA adapter whose values are swapped in place."""

    device: torch.device
    latent_shape: tuple[int, int, int]  # C, h, w
    image_size: tuple[int, int]  # H, W
    num_adapter_modules: int

    def sigmas(self, num_steps: int) -> torch.Tensor:
        """The family's grid: [T+1] float32 on CPU, 1 -> 0, equal to diffusers' scheduler."""
        ...

    def encode(self, texts: Sequence[str], *, with_negative: bool) -> list[PromptFeatures]:
        """Encode prompts one by one (so that features never depend on neighbours)."""
        ...

    def batch_features(self, features: Sequence[PromptFeatures]) -> FeatureBatch:
        """Stack features onto the device."""
        ...

    def velocity(
        self, latents: torch.Tensor, sigma: torch.Tensor, features: FeatureBatch, *,
        guidance_scale: float = 1.0, detach_uncond: bool = True,
    ) -> torch.Tensor:  # fmt: skip
        """Predict v = eps - x_0.

        Args:
            latents: [B, C, h, w] float32. sigma: [B] float32 in [0, 1]. features: B rows.
            guidance_scale: 1 runs no unconditional forward; else v_u + w (v_c - v_u).

        Returns:
            [B, C, h, w] float32.
        """
        ...

    def decode(self, latents: torch.Tensor) -> NDArray[np.uint8]:
        """[B, C, h, w] clean latents -> [B, H, W, 3] uint8 RGB."""
        ...

    def adapter_parameters(self) -> list[torch.nn.Parameter]:
        """The trained parameters, in canonical name order."""
        ...

    def read_adapter(self) -> dict[str, torch.Tensor]:
        """A float32 CPU copy of the adapter, by canonical name."""
        ...

    def load_adapter(self, state: AdapterState) -> int:
        """Copy a state in place; return the number of LoRA modules bound. Raises ModelError on foreign or missing names."""
        ...

    def using(self, state: AdapterState) -> AbstractContextManager[None]:
        """Run with another adapter's values, then restore. Never between a forward and its backward."""
        ...

    def base(self) -> AbstractContextManager[None]:
        """Run with the adapter off."""
        ...

    def inspect_adapter(self) -> SnapshotInfo:
        """Bound modules and the canary of the loaded adapter on the fixed input."""
        ...
