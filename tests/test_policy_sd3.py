"""The SD3 policy against diffusers' own pipeline: text, grid, guidance, decoding, half precision, and refusals of bad directories."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from common.errors import ConfigError, ModelError
from common.policy.base import FeatureBatch
from common.policy.config import LoraConfig, ModelConfig
from common.policy.load import load_policy
from common.policy.pipeline_policy import PipelinePolicy

SHORT, OTHER = "a red circle", "two blue squares"
LORA = LoraConfig(rank=4, alpha=8)


def load(directory: Path, **settings: object) -> PipelinePolicy:
    policy = load_policy(ModelConfig.model_validate({"path": str(directory), "lora": LORA, **settings}))
    assert isinstance(policy, PipelinePolicy)
    return policy


def disturb(policy: PipelinePolicy, size: float = 0.2) -> None:
    """Give the adapter a B that is not 0."""
    generator = torch.Generator().manual_seed(5)
    policy.load_adapter(
        {name: tensor + size * torch.randn(tensor.shape, generator=generator) for name, tensor in policy.read_adapter().items()}
    )


def noise(policy: PipelinePolicy, count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn((count, *policy.latent_shape), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def policy(tiny_sd3_dir: Path) -> PipelinePolicy:
    """One policy for the tests that leave its adapter as it was or do not look at it."""
    return load(tiny_sd3_dir)


@pytest.fixture(scope="module")
def pipeline(tiny_sd3_dir: Path) -> StableDiffusion3Pipeline:
    return StableDiffusion3Pipeline.from_pretrained(str(tiny_sd3_dir), text_encoder_3=None, tokenizer_3=None, dtype=torch.float32)


@pytest.fixture(scope="module")
def features(policy: PipelinePolicy) -> FeatureBatch:
    return policy.batch_features(policy.encode([SHORT, OTHER], with_negative=True))


@pytest.mark.parametrize("length", [0, 5])
def test_features_equal_the_pipelines_encode_prompt(tiny_sd3_dir: Path, pipeline: StableDiffusion3Pipeline, length: int) -> None:
    found = load(tiny_sd3_dir, max_sequence_length=length).encode([SHORT], with_negative=True)[0]
    with torch.no_grad():
        expected = pipeline.encode_prompt(SHORT, None, None, do_classifier_free_guidance=True, max_sequence_length=length)
    arrays = (found.prompt_embeds, found.negative_embeds, found.pooled, found.negative_pooled)
    assert found.prompt_embeds.shape[0] == 24 + length  # 24 CLIP tokens; without T5 the rest are zero rows
    for array, tensor in zip(arrays, expected, strict=True):
        assert array is not None
        np.testing.assert_allclose(array, tensor[0].numpy(), atol=1e-6, rtol=0)


def test_features_never_depend_on_neighbors(policy: PipelinePolicy) -> None:
    alone = policy.encode([SHORT], with_negative=False)[0]
    among = policy.encode(["x" * 60, SHORT, OTHER], with_negative=False)[1]
    np.testing.assert_array_equal(alone.prompt_embeds, among.prompt_embeds)
    np.testing.assert_array_equal(alone.pooled, among.pooled)


def test_a_velocity_does_not_depend_on_the_other_prompts_of_its_batch(policy: PipelinePolicy) -> None:
    sigma, latents = torch.tensor([0.6, 0.3]), noise(policy, 2)
    first = policy.velocity(latents, sigma, policy.batch_features(policy.encode([SHORT, OTHER], with_negative=False)))
    second = policy.velocity(latents, sigma, policy.batch_features(policy.encode([SHORT, "y" * 60], with_negative=False)))
    torch.testing.assert_close(first[0], second[0], atol=1e-6, rtol=0)  # R8
    assert not torch.equal(first[1], second[1])  # the prompt does reach the network


def test_a_prompt_that_is_cut_is_warned_of_once(tiny_sd3_dir: Path) -> None:
    policy, lines = load(tiny_sd3_dir), []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("flowfleet.policy")
    logger.addHandler(handler)
    try:
        policy.encode([SHORT, "z" * 22, "z" * 23, "z" * 23, "w" * 40], with_negative=False)  # 24 tokens hold 22 letters, begin and end
    finally:
        logger.removeHandler(handler)
    assert len(lines) == 2
    assert "25 tokens" in lines[0]
    assert "cut prompts so far: 2" in lines[1]


def test_guidance_runs_the_second_forward_only_when_it_is_not_1(policy: PipelinePolicy, features: FeatureBatch) -> None:
    fed: list[torch.Tensor] = []
    hook = policy._transformer.register_forward_pre_hook(lambda _, __, named: fed.append(named["timestep"]), with_kwargs=True)
    latents, sigma = noise(policy, 2), torch.tensor([0.7, 0.25])
    empty = FeatureBatch(prompt_embeds=features.negative_embeds, pooled=features.negative_pooled)  # type: ignore[arg-type]
    with torch.no_grad():
        conditional = policy.velocity(latents, sigma, features)
        assert len(fed) == 1
        torch.testing.assert_close(fed[0], torch.tensor([700.0, 250.0]))
        guided = policy.velocity(latents, sigma, features, guidance_scale=4.5)
        assert len(fed) == 3
        unconditional = policy.velocity(latents, sigma, empty)
    hook.remove()
    torch.testing.assert_close(guided, unconditional + 4.5 * (conditional - unconditional), atol=1e-6, rtol=0)


def test_a_detached_unconditional_branch_carries_no_gradient(tiny_sd3_dir: Path, features: FeatureBatch) -> None:
    policy = load(tiny_sd3_dir)
    disturb(policy)
    latents, sigma, scale = noise(policy, 2), torch.tensor([0.7, 0.25]), 3.0
    empty = FeatureBatch(prompt_embeds=features.negative_embeds, pooled=features.negative_pooled)  # type: ignore[arg-type]

    def gradient(velocity: torch.Tensor) -> torch.Tensor:
        found = torch.autograd.grad(velocity.sum(), policy.adapter_parameters(), allow_unused=True)
        return torch.cat([part.flatten() for part in found if part is not None])

    conditional, unconditional = gradient(policy.velocity(latents, sigma, features)), gradient(policy.velocity(latents, sigma, empty))
    detached = gradient(policy.velocity(latents, sigma, features, guidance_scale=scale))
    full = gradient(policy.velocity(latents, sigma, features, guidance_scale=scale, detach_uncond=False))
    # d v / d theta = w d v_c, and w d v_c + (1 - w) d v_u when both carry it; float32 sums over 2 x 1024 outputs: 1e-4 relative
    torch.testing.assert_close(detached, scale * conditional, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(full, scale * conditional + (1 - scale) * unconditional, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(detached, full, rtol=1e-2, atol=1e-2)


def test_guidance_without_negative_features_is_refused(policy: PipelinePolicy) -> None:
    plain = policy.batch_features(policy.encode([SHORT], with_negative=False))
    with pytest.raises(ConfigError, match="negative features"):
        policy.velocity(noise(policy, 1), torch.tensor([0.5]), plain, guidance_scale=2.0)


def test_decoding_equals_the_pipelines(policy: PipelinePolicy, pipeline: StableDiffusion3Pipeline) -> None:
    latents, vae = noise(policy, 3), pipeline.vae
    with torch.no_grad():
        decoded = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor, return_dict=False)[0]
    expected = np.stack([np.asarray(image) for image in pipeline.image_processor.postprocess(decoded, output_type="pil")])
    found = policy.decode(latents)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, expected)


def test_a_bfloat16_base_trains_a_float32_adapter(tiny_sd3_dir: Path) -> None:
    policy = load(tiny_sd3_dir, dtype="bfloat16")
    batch = policy.batch_features(policy.encode([SHORT], with_negative=True))
    latents, sigma = noise(policy, 1), torch.tensor([0.5])
    assert {parameter.dtype for parameter in policy.adapter_parameters()} == {torch.float32}
    assert policy._pipe.vae.dtype == torch.float32
    with torch.no_grad():
        fresh = policy.velocity(latents, sigma, batch)
        with policy.base():
            assert torch.equal(fresh, policy.velocity(latents, sigma, batch))  # R4, also in halves: B = 0 adds exactly 0
    assert fresh.dtype == torch.float32
    policy.velocity(latents, sigma, batch, guidance_scale=2.0).square().mean().backward()
    gradients = [parameter.grad for parameter in policy.adapter_parameters() if parameter.grad is not None]
    assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in gradients)
    assert sum(float(gradient.norm()) for gradient in gradients) > 0


def test_a_learner_loads_without_vae_and_text_encoders(tiny_sd3_dir: Path, policy: PipelinePolicy, features: FeatureBatch) -> None:
    bare = load_policy(ModelConfig(path=str(tiny_sd3_dir), lora=LORA), with_vae=False, with_text=False)
    latents, sigma = noise(policy, 2), torch.tensor([0.5, 0.9])
    assert bare.latent_shape == policy.latent_shape == (16, 8, 8)
    with torch.no_grad():
        assert torch.equal(bare.velocity(latents, sigma, features), policy.velocity(latents, sigma, features))
    bare.load_adapter({name: tensor + 0.1 for name, tensor in policy.read_adapter().items()})
    with policy.using(bare.read_adapter()):
        assert bare.inspect_adapter() == policy.inspect_adapter()
    with pytest.raises(AssertionError, match="without its VAE"):
        bare.decode(latents)
    with pytest.raises(AssertionError, match="without its text encoders"):
        bare.encode([SHORT], with_negative=False)


def write(name: str, text: str) -> Callable[[Path], None]:
    def act(root: Path) -> None:
        (root / name).write_text(text)

    return act


def edit(name: str, **values: object) -> Callable[[Path], None]:
    def act(root: Path) -> None:
        (root / name).write_text(json.dumps(json.loads((root / name).read_text()) | values))

    return act


DAMAGE: dict[str, Callable[[Path], None]] = {
    "no directory": shutil.rmtree,
    "an index that is a list": write("model_index.json", "[1]"),
    "another pipeline": edit("model_index.json", _class_name="FluxPipeline"),
    "weights of another shape": edit("transformer/config.json", joint_attention_dim=48),
}


@pytest.mark.parametrize("damage", list(DAMAGE))
def test_a_directory_of_something_else_is_a_model_error_that_names_it(tiny_sd3_dir: Path, tmp_path: Path, damage: str) -> None:
    root = tmp_path / "model"
    shutil.copytree(tiny_sd3_dir, root)
    DAMAGE[damage](root)
    with pytest.raises(ModelError, match="model: ") as caught:
        load(root)
    assert str(root) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"height": 60}, "model.height: 60"),
        ({"width": 128}, "model.width: 128"),  # 16 cells; the position table has 8
        ({"device": "nonsense"}, "model.device"),
        ({"device": "cuda:99"}, "model.device"),
    ],
)
def test_a_setting_that_the_model_cannot_serve_is_a_config_error(tiny_sd3_dir: Path, settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tiny_sd3_dir, **settings)


def test_loading_leaves_the_global_generator_alone_and_seeds_the_adapter(tiny_sd3_dir: Path, policy: PipelinePolicy) -> None:
    before = torch.get_rng_state()
    again = load_policy(ModelConfig(path=str(tiny_sd3_dir), lora=LORA)).read_adapter()
    other = load_policy(ModelConfig(path=str(tiny_sd3_dir), lora=LORA), seed=1).read_adapter()
    assert torch.equal(before, torch.get_rng_state())
    name = "transformer_blocks.0.attn.to_q.lora_A.weight"
    assert torch.equal(again[name], policy.read_adapter()[name])
    assert not torch.equal(again[name], other[name])
