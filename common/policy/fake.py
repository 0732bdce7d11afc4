"""A Policy without a model: one LoRA pair of sixteen numbers, images of 8 x 8 pixels. For fake engines."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray

from common.errors import ModelError
from common.policy.base import AdapterState, FeatureBatch
from common.types import PromptFeatures, SnapshotInfo

_SIDE = 4  # of the latents
_RANK = 2
_A, _B = "fake.lora_A.weight", "fake.lora_B.weight"


class FakePolicy:
    """v(x) = x + B A x: an adapter that is loaded, swapped and inspected like a real one, in microseconds."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.latent_shape = (1, _SIDE, _SIDE)
        self.image_size = (2 * _SIDE, 2 * _SIDE)
        self.num_adapter_modules = 1
        self._is_on = True
        self._parameters = {
            _A: torch.nn.Parameter(torch.full((_RANK, _SIDE), 0.5)),
            _B: torch.nn.Parameter(torch.zeros(_SIDE, _RANK)),
        }

    def sigmas(self, num_steps: int) -> torch.Tensor:
        """[T+1], evenly from 1 to 0."""
        return torch.linspace(1.0, 0.0, num_steps + 1)

    def encode(self, texts: Sequence[str], *, with_negative: bool) -> list[PromptFeatures]:
        """One number a text."""
        embeds, pooled = np.zeros((1, 1), dtype=np.float32), np.zeros(1, dtype=np.float32)
        negative = {"negative_embeds": embeds, "negative_pooled": pooled} if with_negative else {}
        return [PromptFeatures(prompt_embeds=embeds, pooled=pooled, **negative) for _ in texts]

    def batch_features(self, features: Sequence[PromptFeatures]) -> FeatureBatch:
        """B rows; the velocity does not look at them."""
        return FeatureBatch(prompt_embeds=torch.zeros(len(features), 1, 1), pooled=torch.zeros(len(features), 1))

    def velocity(
        self, latents: torch.Tensor, sigma: torch.Tensor, features: FeatureBatch, *,
        guidance_scale: float = 1.0, detach_uncond: bool = True,
    ) -> torch.Tensor:  # fmt: skip
        """[B, 1, 4, 4] -> the same shape."""
        return latents + self._parameters[_B] @ (self._parameters[_A] @ latents) if self._is_on else latents

    def decode(self, latents: torch.Tensor) -> NDArray[np.uint8]:
        """[B, 1, 4, 4] -> [B, 8, 8, 3]: each latent number is a gray square."""
        gray = np.rint(255.0 / (1.0 + np.exp(-latents.numpy()[:, 0].astype(np.float64)))).astype(np.uint8)
        return np.repeat(np.repeat(gray, 2, axis=1), 2, axis=2)[..., None].repeat(3, axis=3)

    def adapter_parameters(self) -> list[torch.nn.Parameter]:
        """A, then B."""
        return list(self._parameters.values())

    def read_adapter(self) -> dict[str, torch.Tensor]:
        """A copy by name."""
        return {name: parameter.detach().clone() for name, parameter in self._parameters.items()}

    def load_adapter(self, state: AdapterState) -> int:
        """Copy a state in place; 1 module. Raises ModelError for the names of another model."""
        if set(state) != set(self._parameters):
            raise ModelError(
                f"fake policy: an adapter of {len(state)} tensors ({', '.join(sorted(state)[:2])} ...) came, fake engines know {_A} and {_B}; "
                "a run directory is either of real engines or of --fake: choose another --run-dir, or resume as it was begun"
            )
        with torch.no_grad():
            for name, tensor in state.items():
                self._parameters[name].copy_(tensor)
        return self.num_adapter_modules

    @contextmanager
    def using(self, state: AdapterState) -> Iterator[None]:
        """Another adapter within the context."""
        found = self.read_adapter()
        self.load_adapter(state)
        try:
            yield
        finally:
            self.load_adapter(found)

    @contextmanager
    def base(self) -> Iterator[None]:
        """No adapter within the context."""
        self._is_on = False
        try:
            yield
        finally:
            self._is_on = True

    @torch.no_grad()
    def inspect_adapter(self) -> SnapshotInfo:
        """One module; the canary on latents of 1."""
        ones = torch.ones(_SIDE, _SIDE)
        change = self._parameters[_B] @ (self._parameters[_A] @ ones)
        return SnapshotInfo(num_modules=self.num_adapter_modules, canary=float(change.norm() / ones.norm()))
