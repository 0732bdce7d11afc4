"""Very small random StableDiffusion3Pipeline and FluxPipeline directories, of the real classes, in about a second each."""

import string
import tempfile
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel, T5TokenizerFast

from common.policy.pipeline_policy import seeded_adapter
from deploy.pretrain.text import build_tokenizer

WIDTH = 32
MAX_TOKENS = 24


def make_tiny_sd3(directory: Path, *, seed: int = 0, image_size: int = 64, shift: float = 3.0) -> Path:
    """Write the directory and return it. Two blocks of width 32, f8 VAE with 16 channels, byte-level tokenizers."""
    with seeded_adapter(seed):
        pipeline = _pipeline(image_size, shift)
    pipeline.save_pretrained(str(directory))
    return directory


def make_tiny_flux(directory: Path, *, seed: int = 0, is_distilled: bool = True, is_dynamic: bool = True) -> Path:
    """Write the directory and return it: one double and two single blocks of width 32, CLIP and T5 of width 32, the VAE of the tiny SD3.

    Args:
        is_distilled: with an embedded guidance, as FLUX.1-dev; False: none, as FLUX.1-schnell.
        is_dynamic: the grid is shifted by the image's size, as FLUX.1-dev's; False: not at all, as FLUX.1-schnell's.
    """
    with seeded_adapter(seed):
        pipeline = _flux_pipeline(is_distilled, is_dynamic)
    pipeline.save_pretrained(str(directory))
    return directory


def _flux_pipeline(is_distilled: bool, is_dynamic: bool) -> FluxPipeline:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = build_tokenizer(Path(folder), max_tokens=MAX_TOKENS)
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, guidance_embeds=is_distilled, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    _shake(transformer)
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), *((letter, -3.0) for letter in string.printable[:95])]
    t5 = T5Config(vocab_size=128, d_model=WIDTH, d_kv=16, d_ff=2 * WIDTH, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu")
    return FluxPipeline(
        transformer=transformer, vae=_vae(64),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0 if is_dynamic else 1.0, use_dynamic_shifting=is_dynamic),
        text_encoder=CLIPTextModel(_clip_config()), tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel(t5), tokenizer_2=T5TokenizerFast(vocab=pieces, extra_ids=0),
    )  # fmt: skip


def _pipeline(image_size: int, shift: float) -> StableDiffusion3Pipeline:
    with tempfile.TemporaryDirectory() as folder:
        tokenizers = [build_tokenizer(Path(folder) / name, max_tokens=MAX_TOKENS) for name in ("one", "two")]
    transformer = SD3Transformer2DModel(
        sample_size=image_size // 8, patch_size=1, in_channels=16, out_channels=16, num_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=2 * WIDTH, caption_projection_dim=32, pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=image_size // 8,
    )  # fmt: skip
    _shake(transformer)
    return StableDiffusion3Pipeline(
        transformer=transformer, vae=_vae(image_size), scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        text_encoder=_encoder(), tokenizer=tokenizers[0], text_encoder_2=_encoder(), tokenizer_2=tokenizers[1],
        text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip


def _shake(transformer: nn.Module) -> None:
    with torch.no_grad():
        for parameter in transformer.parameters():  # modulation layers start at 0, which would hide every input
            parameter.add_(0.05 * torch.randn_like(parameter))


def _vae(image_size: int) -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=16, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, sample_size=image_size,
        scaling_factor=1.5, shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False,
    )  # fmt: skip


def _encoder() -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(_clip_config())


def _clip_config() -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=514, hidden_size=WIDTH, intermediate_size=2 * WIDTH, projection_dim=WIDTH, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=MAX_TOKENS, bos_token_id=512, eos_token_id=513, pad_token_id=513,
    )  # fmt: skip
