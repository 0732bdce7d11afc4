"""The command as a whole, very small: it ends with a pipeline that diffusers loads, and it goes on where it stopped."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file

from deploy.pretrain.checkpoints import read_json
from deploy.pretrain.config import PretrainSettings
from deploy.pretrain.run import pretrain

SMALL = {
    "checkpoint_interval": 2,
    "scenes": {"num_images": 64},
    "autoencoder": {"channels": [8, 8, 8, 8], "latent_channels": 4, "num_steps": 2, "refining_steps": 2, "batch_size": 4},
    "transformer": {
        "num_layers": 2,
        "num_heads": 2,
        "head_size": 8,
        "text_width": 32,
        "text_layers": 2,
        "batch_size": 4,
        "num_steps": 4,
        "padded_from": 0.5,
    },
}


def _settings(**transformer: int) -> PretrainSettings:
    return PretrainSettings.model_validate(SMALL | {"transformer": SMALL["transformer"] | transformer})  # type: ignore[operator]


def test_it_makes_a_pipeline_that_samples_in_half_precision_files(tmp_path: Path) -> None:
    out = tmp_path / "model"
    pretrain(_settings(), out, work=tmp_path / "work")
    pipeline = StableDiffusion3Pipeline.from_pretrained(out, text_encoder_3=None, tokenizer_3=None)
    assert load_file(out / "transformer" / "diffusion_pytorch_model.safetensors")["proj_out.bias"].dtype == torch.float16
    images = pipeline(
        "a circle", num_inference_steps=2, guidance_scale=1.0, max_sequence_length=0, height=64, width=64, output_type="np"
    ).images
    assert images.shape == (1, 64, 64, 3) and np.isfinite(images).all()
    assert (out / "pretrain_config.json").exists() and (out / "pretrain_log.jsonl").exists()


def test_a_stopped_run_ends_with_the_numbers_of_one_that_never_stopped(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    # A plateau without decay makes the learning rates of a 2-step and a 4-step run equal.
    for num_steps, work in ((4, whole), (2, parts), (4, parts)):
        settings = _settings(num_steps=num_steps, decay_share=0.0, padded_from=1.0)
        pretrain(settings, tmp_path / f"{work.name}-out", work=work)
    assert read_json(parts / "transformer" / "state.json")["step"] == 4
    expected = load_file(whole / "transformer" / "step_0000004.safetensors")
    resumed = load_file(parts / "transformer" / "step_0000004.safetensors")
    for name, tensor in expected.items():
        torch.testing.assert_close(resumed[name], tensor, atol=1e-6, rtol=1e-5, msg=name)


def test_two_processes_train_too(tmp_path: Path) -> None:
    pretrain(_settings(), tmp_path / "model", work=tmp_path / "work", num_processes=2)
    assert read_json(tmp_path / "work" / "transformer" / "state.json")["step"] == 4


def test_an_unknown_key_is_an_error() -> None:
    with pytest.raises(ValueError, match="batchsize"):
        PretrainSettings.model_validate({"batchsize": 3})
