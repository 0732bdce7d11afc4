"""A very small random StableDiffusion3Pipeline directory, of the real classes, in about a second."""

import tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from deploy.pretrain.text import build_tokenizer

WIDTH = 32
MAX_TOKENS = 24


def make_tiny_sd3(directory: Path, *, seed: int = 0, image_size: int = 64, shift: float = 3.0) -> Path:
    """Write the directory and return it. Two blocks of width 32, f8 VAE with 16 channels, byte-level tokenizers."""
    generator_state = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        pipeline = _pipeline(image_size, shift)
    finally:
        torch.set_rng_state(generator_state)
    pipeline.save_pretrained(str(directory))
    return directory


def _pipeline(image_size: int, shift: float) -> StableDiffusion3Pipeline:
    with tempfile.TemporaryDirectory() as folder:
        tokenizers = [build_tokenizer(Path(folder) / name, max_tokens=MAX_TOKENS) for name in ("one", "two")]
    transformer = SD3Transformer2DModel(
        sample_size=image_size // 8, patch_size=1, in_channels=16, out_channels=16, num_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=2 * WIDTH, caption_projection_dim=32, pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=image_size // 8,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in transformer.parameters():  # modulation layers start at 0, which would hide every input
            parameter.add_(0.05 * torch.randn_like(parameter))
    vae = AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=16, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, sample_size=image_size,
        scaling_factor=1.5, shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False,
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=transformer, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        text_encoder=_encoder(), tokenizer=tokenizers[0], text_encoder_2=_encoder(), tokenizer_2=tokenizers[1],
        text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip


def _encoder() -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=514, hidden_size=WIDTH, intermediate_size=2 * WIDTH, projection_dim=WIDTH, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=MAX_TOKENS, bos_token_id=512, eos_token_id=513, pad_token_id=513,
    )  # fmt: skip
    return CLIPTextModelWithProjection(config)
