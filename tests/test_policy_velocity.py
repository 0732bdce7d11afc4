"""Text, velocity and grid against diffusers' own classes called by hand, and what RL needs of them: a KL that can be trained."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from common.errors import ConfigError
from common.flow.kernels import make_kernel
from common.policy.base import FeatureBatch
from common.policy.pipeline_policy import PipelinePolicy
from tests.policy_cases import ALPHA, PROMPTS, RANK, changed, inputs, policy_of, real_pipeline
from tests.tiny_models import MAX_TOKENS, WIDTH


@pytest.fixture(scope="module")
def policy(tiny_sd3_dir: Path) -> PipelinePolicy:
    """With an adapter that changes something."""
    policy = policy_of(tiny_sd3_dir)
    policy.load_adapter(changed(policy.read_adapter()))
    return policy


@pytest.fixture(scope="module")
def batch(policy: PipelinePolicy) -> FeatureBatch:
    return policy.batch_features(policy.encode(PROMPTS, with_negative=True))


def test_the_velocity_is_the_transformers_with_the_adapter_added_to_its_weights(
    tiny_sd3_dir: Path, policy: PipelinePolicy, batch: FeatureBatch
) -> None:
    """By hand: W + alpha / rank B A in diffusers' own transformer, fed 1000 sigma."""
    latents, sigma = inputs(policy, len(PROMPTS))
    transformer, state = real_pipeline(tiny_sd3_dir).transformer, policy.read_adapter()
    for name in [name.removesuffix(".lora_A.weight") for name in state if name.endswith(".lora_A.weight")]:
        update = state[f"{name}.lora_B.weight"] @ state[f"{name}.lora_A.weight"]
        transformer.get_submodule(name).weight.data += ALPHA / RANK * update
    with torch.no_grad():
        expected = transformer(
            hidden_states=latents, timestep=1000 * sigma, encoder_hidden_states=batch.prompt_embeds, pooled_projections=batch.pooled
        ).sample
        found = policy.velocity(latents, sigma, batch)
        with policy.base():
            base = policy.velocity(latents, sigma, batch)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)  # x W + x A B rounds otherwise than x (W + A B)
    assert (found - base).abs().max() > 1e-2


def test_the_base_velocity_is_the_transformers_own(tiny_sd3_dir: Path, policy: PipelinePolicy, batch: FeatureBatch) -> None:
    latents, sigma = inputs(policy, len(PROMPTS))
    transformer = real_pipeline(tiny_sd3_dir).transformer
    with torch.no_grad(), policy.base():
        expected = transformer(latents, batch.prompt_embeds, batch.pooled, 1000 * sigma, return_dict=False)[0]
        torch.testing.assert_close(policy.velocity(latents, sigma, batch), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_grid_is_the_real_schedulers(tiny_sd3_dir: Path, tmp_path: Path, shift: float) -> None:
    policy = policy_of(with_scheduler(tiny_sd3_dir, tmp_path, shift=shift), parts=False)
    for num_steps in (1, 6, 10, 40):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        scheduler.set_timesteps(num_steps)
        torch.testing.assert_close(policy.sigmas(num_steps), scheduler.sigmas, atol=1e-6, rtol=0)


def test_a_shift_of_the_run_replaces_the_schedulers(tiny_sd3_dir: Path) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    scheduler.set_timesteps(7)
    torch.testing.assert_close(policy_of(tiny_sd3_dir, parts=False, grid_shift=5.0).sigmas(7), scheduler.sigmas, atol=1e-6, rtol=0)


def test_a_scheduler_with_another_grid_is_refused(tiny_sd3_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="use_dynamic_shifting"):
        policy_of(with_scheduler(tiny_sd3_dir, tmp_path, use_dynamic_shifting=True), parts=False)


def with_scheduler(directory: Path, folder: Path, **settings: object) -> Path:
    """A copy of the model whose scheduler has other settings."""
    copy = Path(shutil.copytree(directory, folder / "model"))
    file = copy / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return copy


def test_a_bfloat16_base_keeps_a_float32_adapter_and_stays_near_the_float32_velocity(
    tiny_sd3_dir: Path, policy: PipelinePolicy, batch: FeatureBatch
) -> None:
    half = policy_of(tiny_sd3_dir, dtype="bfloat16", parts=False)
    assert {parameter.dtype for parameter in half.adapter_parameters()} == {torch.float32}
    assert next(half._transformer.pos_embed.parameters()).dtype == torch.bfloat16
    state = policy.read_adapter()
    half.load_adapter(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in half.read_adapter().items())
    latents, sigma = inputs(policy, len(PROMPTS))
    with torch.no_grad():
        expected = policy.velocity(latents, sigma, batch)
        found = half.velocity(latents, sigma, batch)
    assert found.dtype == torch.float32
    assert float((found - expected).norm() / expected.norm()) < 2e-2  # bfloat16 keeps 8 bits: about 4e-3 an operation


@pytest.mark.parametrize("length", [0, 256])
def test_features_equal_the_pipelines_own_encoding_of_the_whole_batch(tiny_sd3_dir: Path, length: int) -> None:
    policy, pipe = policy_of(tiny_sd3_dir, max_sequence_length=length), real_pipeline(tiny_sd3_dir)
    with torch.no_grad():
        expected = pipe.encode_prompt(list(PROMPTS), None, None, do_classifier_free_guidance=True, max_sequence_length=length)
    found = policy.encode(PROMPTS, with_negative=True)
    for row, features in enumerate(found):
        rows = (features.prompt_embeds, features.negative_embeds, features.pooled, features.negative_pooled)
        for array, tensor in zip(rows, expected, strict=True):
            assert array is not None
            assert array.dtype == np.float32
            np.testing.assert_allclose(array, tensor[row].numpy(), atol=1e-6, rtol=0)  # a batch of 3 rounds otherwise than one prompt
    assert found[0].prompt_embeds.shape == (MAX_TOKENS + length, 2 * WIDTH)
    assert np.abs(found[0].prompt_embeds - found[1].prompt_embeds).max() > 0.1  # the text matters
    assert not found[0].prompt_embeds[MAX_TOKENS:].any()  # without T5 its tokens are zeros


def test_the_kl_to_the_base_is_0_for_a_fresh_adapter_and_trainable_after_a_change(tiny_sd3_dir: Path, batch: FeatureBatch) -> None:
    policy, kernel = policy_of(tiny_sd3_dir, parts=False), make_kernel("flow_sde", 0.7)
    latents, sigma = inputs(policy, len(PROMPTS))

    def divergence() -> torch.Tensor:
        with torch.no_grad(), policy.base():
            reference = kernel.transition(latents, policy.velocity(latents, sigma, batch), sigma, sigma - 0.1)
        step = kernel.transition(latents, policy.velocity(latents, sigma, batch), sigma, sigma - 0.1)
        return kernel.kl(step.mean, reference.mean, step, "exact").mean()

    assert divergence().item() == 0.0
    policy.load_adapter(changed(policy.read_adapter()))
    moved = divergence()
    moved.backward()
    assert moved.item() > 1e-4
    for name, parameter in zip(policy.read_adapter(), policy.adapter_parameters(), strict=True):
        assert parameter.grad is not None
        unused = ".1.attn.add_q_proj" in name  # in the last block text queries feed nothing
        assert bool(parameter.grad.any()) != unused
