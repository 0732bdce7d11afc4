"""The trained whole: text encoders and SD3 transformer, and the loss of rectified flow."""

from collections.abc import Callable

import torch
from diffusers import SD3Transformer2DModel
from torch import nn
from torch.nn import functional
from transformers import CLIPTokenizer

from deploy.pretrain.config import TransformerSettings
from deploy.pretrain.padding import BiasedJointAttention, append_zero_token, pad_bias
from deploy.pretrain.sampling import FlowBatch
from deploy.pretrain.text import TextStack, build_text_encoder

GATE_BIAS = 0.3
"""Start of the residual gates: each block takes part from the first step, but weakly."""


def build_transformer(settings: TransformerSettings, *, channels: int, side: int) -> SD3Transformer2DModel:
    """Return a transformer with fresh weights.

    Args:
        settings: its shape.
        channels: latent channels.
        side: latent height and width.
    """
    width = settings.num_heads * settings.head_size
    transformer = SD3Transformer2DModel(
        sample_size=side,
        patch_size=1,
        in_channels=channels,
        out_channels=channels,
        num_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        attention_head_dim=settings.head_size,
        joint_attention_dim=2 * settings.text_width,
        caption_projection_dim=width,
        pooled_projection_dim=2 * settings.text_width,
        pos_embed_max_size=side,
        qk_norm="rms_norm",
    )
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear) and ".norm1" in name:
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)
            if module.out_features == 6 * width:
                chunks = module.bias.data.view(6, width)
                chunks[2], chunks[5] = GATE_BIAS, GATE_BIAS
    nn.init.zeros_(transformer.proj_out.weight)
    nn.init.zeros_(transformer.proj_out.bias)
    return transformer


class FlowModel(nn.Module):
    """Text to velocity."""

    def __init__(self, settings: TransformerSettings, tokenizer: CLIPTokenizer, *, channels: int, side: int) -> None:
        """Build with fresh weights."""
        super().__init__()
        self.text = TextStack(build_text_encoder(settings, tokenizer), build_text_encoder(settings, tokenizer))
        self.transformer = build_transformer(settings, channels=channels, side=side)

    def attend_with_bias(self) -> None:
        """Switch the transformer to attention that can stand one zero token for many."""
        self.transformer.set_attn_processor(BiasedJointAttention())

    def forward(self, noisy: torch.Tensor, times: torch.Tensor, ids: torch.Tensor, last_key_bias: torch.Tensor) -> torch.Tensor:
        """Predict the velocity eps - x_0.

        Args:
            noisy: [B, C, h, w].
            times: [B] in (0, 1).
            ids: [B, n].
            last_key_bias: [B], from pad_bias.

        Returns:
            [B, C, h, w].
        """
        embeds, pooled = self.text(ids)
        velocity: torch.Tensor = self.transformer(
            hidden_states=noisy,
            encoder_hidden_states=append_zero_token(embeds),
            pooled_projections=pooled,
            timestep=1000 * times,
            joint_attention_kwargs={"last_key_bias": last_key_bias},
            return_dict=False,
        )[0]
        return velocity


VelocityModel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""A FlowModel or its compiled form."""


def flow_loss(model: VelocityModel, batch: FlowBatch, *, t5_tokens: int) -> torch.Tensor:
    """Return rectified flow's mean square error (Liu et al. 2022) on x_t = (1 - t) x_0 + t eps, float32 scalar.

    Args:
        model: a FlowModel that attends with bias.
        batch: the samples.
        t5_tokens: zero tokens that padded samples see.
    """
    times = batch.times[:, None, None, None]
    noisy = (1 - times) * batch.clean + times * batch.noise
    velocity = model(noisy, batch.times, batch.ids, pad_bias(batch.is_padded, t5_tokens))
    return functional.mse_loss(velocity.float(), batch.noise - batch.clean)
