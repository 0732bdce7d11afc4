"""A diffusers pipeline behind the Policy interface: what all model families share."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from common.errors import ConfigError
from common.logs import get_logger
from common.policy.base import AdapterState, FeatureBatch
from common.policy.config import ModelConfig
from common.policy.lora import LoraHandle
from common.policy.pipeline_files import DTYPES, PipelineParts, read_pipeline
from common.types import FloatArray, PromptFeatures, SnapshotInfo

_CANARY_SEED = 20250505
_CANARY_SIGMA = 0.7
_CANARY_TOKENS = 16
_log = get_logger("policy")


class Network(Protocol):
    """What differs between families: the shape of the latents, the grid, how text is encoded and how the transformer is called."""

    name: str  # of the family, for messages
    parts: PipelineParts  # of its directories
    latent_shape: tuple[int, int, int]  # C, h, w

    def __init__(self, pipeline: Any, config: ModelConfig) -> None:
        """Check a loaded pipeline against the config. Raises ConfigError."""
        ...

    def sigmas(self, num_steps: int) -> torch.Tensor:
        """The family's grid: [T+1] float32 on CPU, 1 -> 0."""
        ...

    def forward(self, latents: torch.Tensor, sigma: torch.Tensor, embeds: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
        """The transformer's velocity [B, C, h, w] in the base's dtype; latents and embeds come in that dtype, sigma [B] and pooled in float32."""
        ...

    def encode(self, text: str, *, with_negative: bool) -> tuple[torch.Tensor | None, ...]:
        """One prompt as diffusers' pipeline encodes it: embeds, pooled, negative embeds, negative pooled, each [1, ...]."""
        ...

    def count_tokens(self, text: str) -> tuple[int, int]:
        """A prompt's tokens in the encoder that reads the most, and how many that one reads."""
        ...


class PipelinePolicy:
    """A frozen base with one LoRA adapter. Velocities come back in float32, whatever the base's dtype."""

    def __init__(self, pipeline: Any, config: ModelConfig, network: Network) -> None:
        """Wrap a loaded pipeline; the adapter is added here.

        Raises:
            ConfigError: LoRA targets that name no module.
        """
        self._pipe, self._network = pipeline, network
        self._transformer = pipeline.transformer
        self.device = torch.device(config.device)
        self._dtype = DTYPES[config.dtype]
        self.latent_shape = network.latent_shape
        self.image_size = (config.height, config.width)
        self._lora = LoraHandle(self._transformer, config.lora)
        if config.gradient_checkpointing:
            self._transformer.enable_gradient_checkpointing()
        self.num_adapter_modules = self._lora.num_modules
        self._cut_prompts: set[str] = set()

    def sigmas(self, num_steps: int) -> torch.Tensor:
        """The family's grid, [T+1] float32, 1 -> 0."""
        return self._network.sigmas(num_steps)

    def encode(self, texts: Sequence[str], *, with_negative: bool) -> list[PromptFeatures]:
        """Encode as diffusers' pipeline does, a prompt at a time; max_sequence_length is the config's.

        A prompt longer than the encoders read is encoded cut, with one warning a prompt.
        """
        assert self._pipe.text_encoder is not None, "this policy was loaded without its text encoders"
        return [self._encode_one(text, with_negative) for text in texts]

    def batch_features(self, features: Sequence[PromptFeatures]) -> FeatureBatch:
        """Stack features onto the device, float32."""

        def stack(arrays: Sequence[FloatArray | None]) -> torch.Tensor | None:
            present = [array for array in arrays if array is not None]
            return torch.from_numpy(np.stack(present)).to(self.device) if len(present) == len(arrays) else None

        prompt_embeds, pooled = stack([f.prompt_embeds for f in features]), stack([f.pooled for f in features])
        assert prompt_embeds is not None, "prompt embeddings are never absent"
        assert pooled is not None, "pooled embeddings are never absent"
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
            raise ConfigError(
                f"{self._network.name}: guidance_scale {guidance_scale} needs negative features, which this group does not carry; sample with guidance"
            )
        with torch.no_grad() if detach_uncond else nullcontext():
            unconditional = self._forward(latents, sigma, features.negative_embeds, features.negative_pooled)
        return unconditional + guidance_scale * (conditional - unconditional)

    def decode(self, latents: torch.Tensor) -> NDArray[np.uint8]:
        """[B, C, h, w] clean latents -> [B, H, W, 3] uint8 RGB; the VAE runs in float32."""
        vae = self._pipe.vae
        assert vae is not None, "this policy was loaded without its VAE"
        with torch.no_grad():
            scaled = latents.to(self.device, torch.float32) / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
            images = vae.decode(scaled, return_dict=False)[0]
        pixels = ((images / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
        decoded: NDArray[np.uint8] = pixels.permute(0, 2, 3, 1).cpu().numpy()
        return decoded

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
        """Bound modules, and the canary ||v(on) - v(off)|| / ||v(off)|| on one fixed input.

        The input is standard normal latents, prompt embeddings of 16 tokens and a pooled vector, drawn in this order in float32
        by a CPU generator of seed 20250505, at sigma .7: the same on every device, and it needs no text encoder.
        """
        generator = torch.Generator().manual_seed(_CANARY_SEED)
        shape = self._transformer.config
        sizes = ((1, *self.latent_shape), (1, _CANARY_TOKENS, shape.joint_attention_dim), (1, shape.pooled_projection_dim))
        latents, embeds, pooled = (torch.randn(size, generator=generator).to(self.device) for size in sizes)
        sigma = torch.full((1,), _CANARY_SIGMA, device=self.device)
        with torch.no_grad():
            adapted = self._forward(latents, sigma, embeds, pooled)
            with self.base():
                plain = self._forward(latents, sigma, embeds, pooled)
        return SnapshotInfo(num_modules=self.num_adapter_modules, canary=float((adapted - plain).norm() / plain.norm()))

    def _forward(self, latents: torch.Tensor, sigma: torch.Tensor, embeds: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
        lower = self._dtype != torch.float32
        with torch.autocast(self.device.type, self._dtype) if lower else nullcontext():
            result = self._network.forward(latents.to(self._dtype), sigma, embeds.to(self._dtype), pooled)
        return result.float()

    def _encode_one(self, text: str, with_negative: bool) -> PromptFeatures:
        self._warn_if_cut(text)
        with torch.no_grad():
            tensors = self._network.encode(text, with_negative=with_negative)
        embeds, pooled, negative, negative_pooled = (None if one is None else one[0].float().cpu().numpy() for one in tensors)
        assert embeds is not None, "the pipeline encodes every prompt"
        assert pooled is not None, "the pipeline pools every prompt"
        return PromptFeatures(prompt_embeds=embeds, pooled=pooled, negative_embeds=negative, negative_pooled=negative_pooled)

    def _warn_if_cut(self, text: str) -> None:
        count, limit = self._network.count_tokens(text)
        if count > limit and text not in self._cut_prompts:
            self._cut_prompts.add(text)
            _log.warning(
                "prompt %r has %d tokens, the text encoders read %d: the rest is not seen (cut prompts so far: %d)",
                text[:60], count, limit, len(self._cut_prompts),
            )  # fmt: skip


def load_pipeline(config: ModelConfig, family: type[Network], *, seed: int, with_vae: bool, with_text: bool) -> PipelinePolicy:
    """Load a pipeline directory as a policy with a fresh adapter; arguments and errors are load_policy's. Without its VAE or its text
    encoders, decode or encode fail an assertion."""  # fmt: skip
    pipe = read_pipeline(config, family.parts, with_vae=with_vae, with_text=with_text)
    network = family(pipe, config)
    with seeded_adapter(seed):
        return PipelinePolicy(pipe, config, network)


@contextmanager
def seeded_adapter(seed: int) -> Iterator[None]:
    """Draw a fresh adapter's A from a seed: PEFT takes the global CPU generator, which is put back."""
    generator_state = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(generator_state)
