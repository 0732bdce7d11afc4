"""The text side and the padding of the tiny model, against diffusers."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

from deploy.pretrain.autoencoder import build_autoencoder
from deploy.pretrain.config import AutoencoderSettings, TransformerSettings
from deploy.pretrain.flow_model import FlowModel
from deploy.pretrain.padding import pad_bias
from deploy.pretrain.text import build_tokenizer, tokenize

TINY = TransformerSettings(num_layers=2, num_heads=2, head_size=8, text_width=32, text_layers=2, max_tokens=36)
PROMPTS = ['a sign that says "CAFE" in red', "an orange square and a purple triangle", ""]


@pytest.fixture
def flow(tmp_path: Path) -> FlowModel:
    torch.manual_seed(0)
    tokenizer = build_tokenizer(tmp_path, max_tokens=TINY.max_tokens)
    model = FlowModel(TINY, tokenizer, channels=4, side=8).eval().requires_grad_(False)
    torch.nn.init.normal_(model.transformer.proj_out.weight)
    return model


def _pipeline(flow: FlowModel, folder: Path) -> StableDiffusion3Pipeline:
    tokenizer = build_tokenizer(folder, max_tokens=TINY.max_tokens)
    vae: AutoencoderKL = build_autoencoder(AutoencoderSettings(latent_channels=4, channels=[8, 8, 8, 8]))
    return StableDiffusion3Pipeline(
        transformer=flow.transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=flow.text.first,
        tokenizer=tokenizer,
        text_encoder_2=flow.text.second,
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def test_one_byte_is_one_token_and_case_is_lost(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(tmp_path, max_tokens=36)
    assert len(tokenizer) == 514
    tokens = tokenizer.convert_ids_to_tokens(tokenizer('a "CAB"').input_ids)
    assert tokens == ["<|startoftext|>", "a</w>", '"</w>', "c", "a", "b</w>", '"</w>', "<|endoftext|>"]


def test_training_encodes_prompts_exactly_as_the_pipeline_without_t5_tokens(flow: FlowModel, tmp_path: Path) -> None:
    pipeline = _pipeline(flow, tmp_path)
    expected, _, expected_pooled, _ = pipeline.encode_prompt(PROMPTS, None, None, do_classifier_free_guidance=False, max_sequence_length=0)
    embeds, pooled = flow.text(tokenize(pipeline.tokenizer, PROMPTS))
    torch.testing.assert_close(embeds, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(pooled, expected_pooled, atol=1e-5, rtol=0)


@pytest.mark.parametrize("num_tokens", [0, 256])
def test_one_biased_zero_token_equals_the_default_padding(flow: FlowModel, tmp_path: Path, num_tokens: int) -> None:
    pipeline = _pipeline(flow, tmp_path)
    embeds, _, pooled, _ = pipeline.encode_prompt(PROMPTS, None, None, do_classifier_free_guidance=False, max_sequence_length=num_tokens)
    noisy, times = torch.randn(3, 4, 8, 8), torch.tensor([0.1, 0.5, 0.9])
    expected = flow.transformer(
        hidden_states=noisy,
        encoder_hidden_states=embeds,
        pooled_projections=pooled,
        timestep=1000 * times,
        return_dict=False,
    )[0]
    ids = tokenize(pipeline.tokenizer, PROMPTS)
    flow.attend_with_bias()
    velocity = flow(noisy, times, ids, pad_bias(torch.full((3,), num_tokens > 0), 256))
    torch.testing.assert_close(velocity, expected, atol=1e-4, rtol=1e-4)
