"""The FLUX policy against diffusers' own pipeline: text, grid, packing, guidance, whole images, export, and refusals."""

import copy
import json
import math
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from common.errors import ConfigError, ModelError
from common.flow.grid import dynamic_shift, even_grid
from common.policy.adapters import write_adapter_bytes
from common.policy.base import FeatureBatch
from common.policy.config import LoraConfig, ModelConfig
from common.policy.flux import pack, position_ids, unpack
from common.policy.load import load_policy
from common.policy.pipeline_policy import PipelinePolicy
from common.types import SnapshotInfo
from deploy.lora.export import export_adapter
from tests.policy_cases import changed, inputs
from tests.tiny_models import make_tiny_flux

PROMPT, OTHER = "a red circle", "two blue squares"
TOKENS, GUIDANCE, STEPS = 20, 3.5, 3
TOLERANCE = 1e-5  # of latents of about 1: the same float32 arithmetic, with the grid's steps rounded once more by the scheduler


def settings(directory: Path, **changes: Any) -> ModelConfig:
    """A FLUX.1-dev's."""
    facts: dict[str, Any] = {"max_sequence_length": TOKENS, "embedded_guidance": GUIDANCE, "lora": LoraConfig(rank=4, alpha=8)}
    return ModelConfig(family="flux", path=str(directory), **(facts | changes))


def load(directory: Path, **changes: Any) -> PipelinePolicy:
    policy = load_policy(settings(directory, **changes))
    assert isinstance(policy, PipelinePolicy)
    return policy


def real_pipeline(directory: Path) -> FluxPipeline:
    pipe = FluxPipeline.from_pretrained(str(directory), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def denoise(policy: PipelinePolicy, start: torch.Tensor, batch: FeatureBatch, scale: float = 1.0) -> torch.Tensor:
    """Euler's steps along the policy's own grid."""
    latents = start
    with torch.no_grad():
        for sigma, following in pairwise(policy.sigmas(STEPS)):
            velocity = policy.velocity(latents, sigma.expand(len(start)), batch, guidance_scale=scale)
            latents = latents + (following - sigma) * velocity
    return latents


@pytest.fixture(scope="module")
def policy(tiny_flux_dir: Path) -> PipelinePolicy:
    return load(tiny_flux_dir)


@pytest.fixture(scope="module")
def pipeline(tiny_flux_dir: Path) -> FluxPipeline:
    return real_pipeline(tiny_flux_dir)


@pytest.fixture(scope="module")
def batch(policy: PipelinePolicy) -> FeatureBatch:
    return policy.batch_features(policy.encode([PROMPT, OTHER], with_negative=True))


def test_features_equal_the_pipelines_encode_prompt_and_the_negative_is_the_empty_prompt(
    policy: PipelinePolicy, pipeline: FluxPipeline
) -> None:
    found = policy.encode([PROMPT], with_negative=True)[0]
    with torch.no_grad():
        embeds, pooled, _ = pipeline.encode_prompt(PROMPT, max_sequence_length=TOKENS)
        negative, negative_pooled, _ = pipeline.encode_prompt("", max_sequence_length=TOKENS)
    arrays = (found.prompt_embeds, found.pooled, found.negative_embeds, found.negative_pooled)
    for array, tensor in zip(arrays, (embeds, pooled, negative, negative_pooled), strict=True):
        assert array is not None
        np.testing.assert_allclose(array, tensor[0].numpy(), atol=1e-6, rtol=0)
    assert found.prompt_embeds.shape == (TOKENS, 32)
    assert policy.encode([PROMPT], with_negative=False)[0].negative_embeds is None


@pytest.mark.parametrize(("height", "width"), [(4, 4), (6, 10)])
def test_packing_is_the_pipelines_and_unpacking_undoes_it(height: int, width: int) -> None:
    latents = torch.randn((2, 16, height, width), generator=torch.Generator().manual_seed(0))
    tokens = pack(latents)
    assert torch.equal(tokens, FluxPipeline._pack_latents(latents, 2, 16, height, width))
    assert torch.equal(unpack(tokens, height, width), latents)
    assert torch.equal(unpack(tokens, height, width), FluxPipeline._unpack_latents(tokens, 8 * height, 8 * width, 8))
    assert torch.equal(
        position_ids(height, width), FluxPipeline._prepare_latent_image_ids(2, height // 2, width // 2, "cpu", torch.float32)
    )


@pytest.mark.parametrize("num_tokens", [16, 256, 1024, 4096])
def test_the_shift_is_exp_of_the_pipelines_mu(num_tokens: int) -> None:
    assert dynamic_shift(num_tokens) == pytest.approx(math.exp(calculate_shift(num_tokens)), rel=1e-12)


@pytest.mark.parametrize("num_steps", [1, 6, 28])
@pytest.mark.parametrize("is_dynamic", [True, False])
def test_the_grid_is_the_schedulers_after_what_the_pipeline_hands_it(num_steps: int, is_dynamic: bool) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=is_dynamic)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / num_steps, num_steps), mu=calculate_shift(1024) if is_dynamic else None)
    found = even_grid(num_steps, dynamic_shift(1024) if is_dynamic else 3.0)
    torch.testing.assert_close(found, scheduler.sigmas, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("count", "width"), [(1, 64), (2, 64), (2, 96)])
def test_a_whole_denoising_run_is_the_pipelines(
    tiny_flux_dir: Path, pipeline: FluxPipeline, batch: FeatureBatch, count: int, width: int
) -> None:
    policy = load(tiny_flux_dir, width=width)
    start, _ = inputs(policy, count)
    assert start.shape == (count, 16, 8, width // 8)
    features = FeatureBatch(prompt_embeds=batch.prompt_embeds[:count], pooled=batch.pooled[:count])
    found = denoise(policy, start, features)
    packed = pipeline(
        [PROMPT, OTHER][:count], num_inference_steps=STEPS, guidance_scale=GUIDANCE, latents=pack(start), max_sequence_length=TOKENS,
        height=64, width=width, output_type="latent",
    ).images  # fmt: skip
    torch.testing.assert_close(found, unpack(packed, 8, width // 8), atol=TOLERANCE, rtol=0)
    assert (found - start).abs().max() > 100 * TOLERANCE
    images = pipeline(
        [PROMPT, OTHER][:count], num_inference_steps=STEPS, guidance_scale=GUIDANCE, latents=pack(start), max_sequence_length=TOKENS,
        height=64, width=width, output_type="np",
    ).images  # fmt: skip
    drawn = np.abs(policy.decode(found).astype(np.int16) - np.rint(images * 255).astype(np.int16))
    assert drawn.max() <= 1  # a value at .5 may round to either side


def test_guidance_beside_the_embedded_one_is_the_pipelines_true_cfg(
    policy: PipelinePolicy, pipeline: FluxPipeline, batch: FeatureBatch
) -> None:
    start, _ = inputs(policy, 2)
    found = denoise(policy, start, batch, scale=2.0)
    packed = pipeline(
        [PROMPT, OTHER], negative_prompt=["", ""], true_cfg_scale=2.0, num_inference_steps=STEPS, guidance_scale=GUIDANCE,
        latents=pack(start), max_sequence_length=TOKENS, height=64, width=64, output_type="latent",
    ).images  # fmt: skip
    torch.testing.assert_close(found, unpack(packed, 8, 8), atol=TOLERANCE, rtol=0)


def test_the_embedded_guidance_reaches_the_network(tiny_flux_dir: Path, policy: PipelinePolicy, batch: FeatureBatch) -> None:
    latents, sigma = inputs(policy, 2)
    with torch.no_grad():
        told, other = policy.velocity(latents, sigma, batch), load(tiny_flux_dir, embedded_guidance=1.0).velocity(latents, sigma, batch)
    assert not torch.allclose(told, other, atol=1e-3)


def test_a_model_that_is_not_distilled_takes_no_guidance_and_its_grid_is_even(tmp_path: Path) -> None:
    directory = make_tiny_flux(tmp_path / "schnell", is_distilled=False, is_dynamic=False)
    policy, pipe = load(directory, embedded_guidance=0.0), real_pipeline(directory)
    torch.testing.assert_close(policy.sigmas(4), torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0]))
    start, _ = inputs(policy, 1)
    found = denoise(policy, start, policy.batch_features(policy.encode([PROMPT], with_negative=False)))
    packed = pipe(
        PROMPT, num_inference_steps=STEPS, guidance_scale=0.0, latents=pack(start), max_sequence_length=TOKENS, height=64, width=64,
        output_type="latent",
    ).images  # fmt: skip
    torch.testing.assert_close(found, unpack(packed, 8, 8), atol=TOLERANCE, rtol=0)
    with pytest.raises(ConfigError, match=r"embedded_guidance=3.5 came, and .* takes none"):
        load(directory)


def test_a_shift_of_the_run_replaces_the_schedulers(tiny_flux_dir: Path) -> None:
    found = load(tiny_flux_dir, grid_shift=3.0).sigmas(2)
    torch.testing.assert_close(found, torch.tensor([1.0, 0.75, 0.0]))  # 3 / 2 / (1 + 2 / 2)


def test_the_adapter_binds_double_and_single_blocks_and_trains_in_float32(tiny_flux_dir: Path) -> None:
    policy = load(tiny_flux_dir, dtype="bfloat16")
    assert policy.num_adapter_modules == 8 + 2 * 3  # one double block; two single blocks have q, k and v
    batch = policy.batch_features(policy.encode([PROMPT], with_negative=False))
    latents, sigma = inputs(policy, 1)
    with torch.no_grad():
        fresh = policy.velocity(latents, sigma, batch)
        with policy.base():
            assert torch.equal(fresh, policy.velocity(latents, sigma, batch))
    assert fresh.dtype == torch.float32
    policy.load_adapter(changed(policy.read_adapter()))
    assert policy.inspect_adapter().canary > 0
    policy.velocity(latents, sigma, batch).square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in policy.adapter_parameters())


@pytest.mark.parametrize("fmt", ["diffusers", "peft"])
def test_an_exported_lora_gives_the_trainers_latents_in_a_clean_pipeline(tiny_flux_dir: Path, tmp_path: Path, fmt: str) -> None:
    model = settings(tiny_flux_dir)
    policy = load(tiny_flux_dir)
    state = changed(policy.read_adapter())
    info = SnapshotInfo(num_modules=policy.num_adapter_modules, canary=0.1)
    content, _ = write_adapter_bytes({"ema": state}, {"ema": info}, incarnation=1, version=1)
    out = export_adapter(content, "ema", model, tmp_path / "lora", fmt)
    start, _ = inputs(policy, 1)
    features = policy.batch_features(policy.encode([PROMPT], with_negative=False))
    with policy.using(state):
        trained = denoise(policy, start, features)
    pipe = real_pipeline(tiny_flux_dir)
    if fmt == "diffusers":
        pipe.load_lora_weights(str(out))
    else:
        from peft import PeftModel

        PeftModel.from_pretrained(pipe.transformer, str(out))
    packed = pipe(
        PROMPT, num_inference_steps=STEPS, guidance_scale=GUIDANCE, latents=pack(start), max_sequence_length=TOKENS, height=64, width=64,
        output_type="latent",
    ).images  # fmt: skip
    torch.testing.assert_close(trained, unpack(packed, 8, 8), atol=1e-4, rtol=0)
    assert (trained - denoise(policy, start, features)).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embedded_guidance": 0.0}, "guidance-distilled and model.embedded_guidance is 0"),
        ({"max_sequence_length": 0}, "max_sequence_length is 0"),
        ({"height": 72}, "model.height: 72 came; this model draws multiples of 16"),
        ({"lora": LoraConfig(rank=4, alpha=8, targets=("attn.nothing",))}, "names no linear module of FluxTransformer2DModel"),
    ],
)
def test_a_setting_that_the_model_cannot_serve_is_a_config_error(tiny_flux_dir: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tiny_flux_dir, **changes)


@pytest.mark.parametrize("key", ["use_karras_sigmas", "shift_terminal"])
def test_a_scheduler_of_another_grid_is_refused(tiny_flux_dir: Path, tmp_path: Path, key: str) -> None:
    root = shutil.copytree(tiny_flux_dir, tmp_path / "model")
    file = root / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: 0.1 if key == "shift_terminal" else True}))
    with pytest.raises(ConfigError, match=key):
        load(root)


def test_another_kind_of_dynamic_shift_is_refused(tiny_flux_dir: Path, tmp_path: Path) -> None:
    root = shutil.copytree(tiny_flux_dir, tmp_path / "model")
    file = root / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"time_shift_type": "linear"}))
    with pytest.raises(ConfigError, match="time_shift_type is 'linear'"):
        load(root)


def test_a_directory_of_another_family_names_the_family_to_set(tiny_flux_dir: Path, tiny_sd3_dir: Path) -> None:
    with pytest.raises(
        ModelError, match=r"holds a FluxPipeline, and model.family=sd3 is a StableDiffusion3Pipeline.*set model.family=flux"
    ):
        load_policy(ModelConfig(path=str(tiny_flux_dir)))
    with pytest.raises(ModelError, match=r"set model.family=sd3"):
        load(tiny_sd3_dir)


def test_a_part_that_flux_needs_and_the_index_leaves_out_is_named(tiny_flux_dir: Path, tmp_path: Path) -> None:
    root = shutil.copytree(tiny_flux_dir, tmp_path / "model")
    file = root / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"text_encoder_2": [None, None]}))
    with pytest.raises(ModelError, match="has no text_encoder_2, which a FluxPipeline needs"):
        load(root)
    bare = load_policy(settings(root), with_vae=False, with_text=False)  # a learner needs none of it
    assert bare.latent_shape == (16, 8, 8)


def test_a_base_that_takes_no_embedded_guidance_is_not_given_one() -> None:
    with pytest.raises(ValueError, match="embedded_guidance is FLUX's"):
        ModelConfig(path="anywhere", embedded_guidance=3.5)


def test_a_prompt_longer_than_t5_reads_is_warned_of(tiny_flux_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    policy = load(tiny_flux_dir)
    with caplog.at_level("WARNING", logger="flowfleet.policy"):
        policy.encode(["x" * (TOKENS - 2), "y" * (TOKENS - 1)], with_negative=False)  # a piece for the space before, and the end
    assert [record.args[1:3] for record in caplog.records] == [(TOKENS + 1, TOKENS)]  # type: ignore[index]


def test_a_bfloat16_base_computes_what_the_transformer_itself_does_in_bfloat16(tiny_flux_dir: Path, pipeline: FluxPipeline) -> None:
    policy, transformer = load(tiny_flux_dir, dtype="bfloat16"), copy.deepcopy(pipeline.transformer).to(torch.bfloat16)
    batch, (latents, sigma) = policy.batch_features(policy.encode([PROMPT, OTHER], with_negative=False)), inputs(policy, 2)
    with torch.no_grad():
        tokens = transformer(
            hidden_states=pack(latents).bfloat16(), timestep=sigma, encoder_hidden_states=batch.prompt_embeds.bfloat16(),
            pooled_projections=batch.pooled.bfloat16(), guidance=torch.full((2,), GUIDANCE), img_ids=position_ids(8, 8),
            txt_ids=torch.zeros(TOKENS, 3), return_dict=False,
        )[0]  # fmt: skip
        found = policy.velocity(latents, sigma, batch)
    torch.testing.assert_close(found, unpack(tokens.float(), 8, 8), atol=0.02, rtol=0)  # bfloat16 keeps 8 bits of values up to about 3


def test_kohyas_format_is_refused_with_the_ones_that_serve(tiny_flux_dir: Path, policy: PipelinePolicy, tmp_path: Path) -> None:
    info = SnapshotInfo(num_modules=policy.num_adapter_modules, canary=0.1)
    content, _ = write_adapter_bytes({"ema": policy.read_adapter()}, {"ema": info}, incarnation=1, version=1)
    with pytest.raises(ConfigError, match=r"model\.family is flux; pass --format diffusers or peft"):
        export_adapter(content, "ema", settings(tiny_flux_dir), tmp_path / "lora", "kohya")
    assert list(tmp_path.iterdir()) == []


def test_gradient_checkpointing_keeps_fewer_tensors_for_the_same_gradients(tiny_flux_dir: Path) -> None:
    found: list[tuple[int, list[torch.Tensor]]] = []
    for is_on in (False, True):
        policy, kept = load(tiny_flux_dir, gradient_checkpointing=is_on), [0]
        policy.load_adapter(changed(policy.read_adapter()))
        latents, sigma = inputs(policy, 2)
        batch = policy.batch_features(policy.encode([PROMPT, OTHER], with_negative=False))

        def keep(tensor: torch.Tensor, kept: list[int] = kept) -> torch.Tensor:
            kept[0] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = policy.velocity(latents, sigma, batch).square().mean()
        found.append((kept[0], list(torch.autograd.grad(loss, policy.adapter_parameters()))))
    (plain, gradients), (fewer, again) = found
    assert fewer < plain / 3  # three blocks' inputs instead of all that happens inside them
    assert all(torch.equal(one, other) for one, other in zip(gradients, again, strict=True))
