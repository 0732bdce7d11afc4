"""Policies of a few hundred parameters whose velocity is known in closed form."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray

from common.errors import ModelError
from common.flow.grid import sigma_grid
from common.policy.base import AdapterState, FeatureBatch
from common.types import PromptFeatures, SnapshotInfo

Velocity = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class LoraLinear(torch.nn.Module):
    """dv = B A x: zero while B is; flat latents in, flat out."""

    def __init__(self, size: int, rank: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.a = torch.nn.Parameter(torch.randn((rank, size), generator=generator, dtype=dtype))
        self.b = torch.nn.Parameter(torch.zeros((size, rank), dtype=dtype))

    def forward(self, flat: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return flat @ self.a.T @ self.b.T


class Residual(torch.nn.Module):
    """An MLP of (x, t) whose last layer starts at zero."""

    def __init__(self, size: int, width: int = 64, seed: int = 0) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(size + 3, width), torch.nn.Linear(width, width), torch.nn.Linear(width, size)])
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for layer in self.layers:
                layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) / layer.in_features**0.5)
                layer.bias.zero_()
            self.layers[-1].weight.zero_()

    def forward(self, flat: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        t = sigma[:, None]
        hidden = torch.cat([flat, t, torch.sin(3 * t), torch.cos(3 * t)], dim=1)
        for layer in self.layers[:-1]:
            hidden = torch.nn.functional.silu(layer(hidden))
        return self.layers[-1](hidden)


class StubPolicy:
    """A base velocity, which guidance multiplies, and a residual adapter; both see flat latents."""

    def __init__(
        self, base: Velocity, adapter: torch.nn.Module, latent_shape: tuple[int, int, int], dtype: torch.dtype = torch.float32
    ) -> None:
        self.device = torch.device("cpu")
        self.latent_shape = latent_shape
        self.image_size = (1, 1)
        self.num_adapter_modules = 1
        self.num_forwards: dict[str, int] = {"on": 0, "off": 0}
        self._base, self._adapter, self._dtype = base, adapter, dtype
        self._enabled = True

    def sigmas(self, num_steps: int) -> torch.Tensor:
        return sigma_grid(num_steps, 1.0)

    def encode(self, texts: Sequence[str], *, with_negative: bool) -> list[PromptFeatures]:
        return [features() for _ in texts]

    def batch_features(self, features: Sequence[PromptFeatures]) -> FeatureBatch:
        return FeatureBatch(
            prompt_embeds=torch.from_numpy(np.stack([f.prompt_embeds for f in features])),
            pooled=torch.from_numpy(np.stack([f.pooled for f in features])),
        )

    def velocity(
        self, latents: torch.Tensor, sigma: torch.Tensor, features: FeatureBatch, *, guidance_scale: float = 1.0, detach_uncond: bool = True
    ) -> torch.Tensor:
        self.num_forwards["on" if self._enabled else "off"] += 1
        flat, t = latents.flatten(1).to(self._dtype), sigma.to(self._dtype)
        velocity = guidance_scale * self._base(flat, t)  # as if the unconditional velocity were 0
        if self._enabled:
            velocity = velocity + self._adapter(flat, t)
        return velocity.view(latents.shape)

    def decode(self, latents: torch.Tensor) -> NDArray[np.uint8]:
        return np.zeros((len(latents), 1, 1, 3), dtype=np.uint8)

    def _named(self) -> dict[str, torch.nn.Parameter]:
        return dict(sorted(self._adapter.named_parameters()))

    def adapter_parameters(self) -> list[torch.nn.Parameter]:
        return list(self._named().values())

    def read_adapter(self) -> dict[str, torch.Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self._named().items()}

    def load_adapter(self, state: AdapterState) -> int:
        if set(state) != set(self._named()):
            raise ModelError(f"StubPolicy: foreign adapter names {sorted(state)}")
        with torch.no_grad():
            for name, parameter in self._named().items():
                parameter.copy_(state[name])
        return 1

    @contextmanager
    def using(self, state: AdapterState) -> Iterator[None]:
        found = self.read_adapter()
        self.load_adapter(state)
        try:
            yield
        finally:
            self.load_adapter(found)

    @contextmanager
    def base(self) -> Iterator[None]:
        self._enabled = False
        try:
            yield
        finally:
            self._enabled = True

    def inspect_adapter(self) -> SnapshotInfo:
        return SnapshotInfo(num_modules=1, canary=float(sum(p.detach().double().square().sum() for p in self.adapter_parameters())))


def features() -> PromptFeatures:
    return PromptFeatures(prompt_embeds=np.zeros((1, 1), dtype=np.float32), pooled=np.zeros(1, dtype=np.float32))


def linear_policy(size: int = 4, *, dtype: torch.dtype = torch.float32, fresh: bool = True) -> StubPolicy:
    """v = M x + t c + B A x on [size, 1, 1] latents; not fresh: B is random too."""
    generator = torch.Generator().manual_seed(7)
    matrix = torch.randn((size, size), generator=generator, dtype=torch.float64).to(dtype) / 2
    offset = torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)
    adapter = LoraLinear(size, dtype=dtype)
    if not fresh:
        with torch.no_grad():
            adapter.b.copy_(torch.randn(adapter.b.shape, generator=generator, dtype=torch.float64).to(dtype) * 0.3)
    return StubPolicy(lambda x, t: x @ matrix.T + t[:, None] * offset, adapter, (size, 1, 1), dtype)


def circle_modes() -> torch.Tensor:
    """[8, 2] on a circle of radius 2."""
    angles = torch.arange(8) * (2 * torch.pi / 8)
    return 2.0 * torch.stack([angles.cos(), angles.sin()], dim=1)


def mixture_policy(std: float = 0.15) -> StubPolicy:
    """The exact velocity E[eps - x_0 | x_t] of eight equal Gaussians, plus a trainable residual."""
    modes = circle_modes()

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        level = t[:, None]
        variance = (1 - level) ** 2 * std**2 + level**2
        offset = x[:, None, :] - (1 - level)[:, :, None] * modes  # [B, 8, 2]
        weight = torch.softmax(-offset.square().sum(-1) / (2 * variance), dim=1)[:, :, None]
        clean = modes + ((1 - level) * std**2 / variance)[:, :, None] * offset
        noise = (level / variance)[:, :, None] * offset
        return (weight * (noise - clean)).sum(1)

    return StubPolicy(velocity, Residual(2), (2, 1, 1))
