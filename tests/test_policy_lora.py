"""The adapter: exactly the listed modules, values swapped in place, and off means off."""

import hashlib
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch import nn

from common.errors import ConfigError, ModelError
from common.policy.base import FeatureBatch
from common.policy.config import SD3_ATTENTION, LoraConfig, ModelConfig
from common.policy.load import load_policy
from common.policy.lora import LoraHandle
from common.policy.pipeline_policy import PipelinePolicy

EMBEDS, POOLED, TOKENS = 64, 64, 10  # of the tiny model


def load(directory: Path, **lora: object) -> PipelinePolicy:
    config = ModelConfig(path=str(directory), lora=LoraConfig.model_validate({"rank": 4, "alpha": 8} | lora))
    policy = load_policy(config, with_vae=False, with_text=False)
    assert isinstance(policy, PipelinePolicy)
    return policy


@pytest.fixture
def policy(tiny_sd3_dir: Path) -> PipelinePolicy:
    return load(tiny_sd3_dir)


def probe(policy: PipelinePolicy) -> tuple[torch.Tensor, torch.Tensor, FeatureBatch]:
    generator = torch.Generator().manual_seed(11)
    features = FeatureBatch(
        prompt_embeds=torch.randn(2, TOKENS, EMBEDS, generator=generator), pooled=torch.randn(2, POOLED, generator=generator)
    )
    return torch.randn(2, *policy.latent_shape, generator=generator), torch.tensor([0.8, 0.3]), features


def moved(policy: PipelinePolicy, seed: int) -> dict[str, torch.Tensor]:
    """A state with A and B that are not the loaded one's."""
    generator = torch.Generator().manual_seed(seed)
    return {name: tensor + 0.2 * torch.randn(tensor.shape, generator=generator) for name, tensor in policy.read_adapter().items()}


def base_digest(policy: PipelinePolicy) -> str:
    """Of every parameter and buffer of the transformer but the adapter's."""
    digest = hashlib.sha256()
    for name, tensor in sorted(policy._transformer.state_dict().items()):
        if "lora_" not in name:
            digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_the_adapter_binds_exactly_the_listed_modules(policy: PipelinePolicy) -> None:
    image, text = ("to_q", "to_k", "to_v", "to_out.0"), ("add_q_proj", "add_k_proj", "add_v_proj")
    modules = [f"transformer_blocks.{block}.attn.{name}" for block in (0, 1) for name in image + text]
    modules += ["transformer_blocks.0.attn.to_add_out"]  # the last block throws the text stream away
    assert policy.num_adapter_modules == len(modules) == 15
    assert list(policy.read_adapter()) == sorted(f"{module}.lora_{half}.weight" for module in modules for half in "AB")
    trained = [name for name, parameter in policy._transformer.named_parameters() if parameter.requires_grad]
    assert len(trained) == 30
    assert all("lora_" in name for name in trained)


def test_sd35_medium_has_191_attention_projections() -> None:
    """24 blocks x (4 image + 3 text) + 23 to_add_out: attn2 of the first 13 blocks is not trained, as in Flow-GRPO's target list.

    SD3.5-M's blocks, narrow: only their modules count.
    """
    transformer = SD3Transformer2DModel(
        sample_size=8, num_layers=24, attention_head_dim=4, num_attention_heads=2, joint_attention_dim=8, caption_projection_dim=8,
        pooled_projection_dim=8, pos_embed_max_size=8, dual_attention_layers=tuple(range(13)), qk_norm="rms_norm",
    )  # fmt: skip
    assert LoraHandle(transformer, LoraConfig(rank=1, alpha=1, targets=SD3_ATTENTION)).num_modules == 24 * 7 + 23


def test_an_optimizer_step_moves_the_adapter_and_no_bit_of_the_base(policy: PipelinePolicy) -> None:
    latents, sigma, features = probe(policy)
    before, fresh = base_digest(policy), policy.read_adapter()
    with torch.no_grad():
        plain = policy.velocity(latents, sigma, features)
    optimizer = torch.optim.AdamW(policy.adapter_parameters(), lr=1e-2)
    for _ in range(2):  # B = 0 hides A from the first gradient
        optimizer.zero_grad()
        policy.velocity(latents, sigma, features).square().mean().backward()
        optimizer.step()
    now = policy.read_adapter()
    assert base_digest(policy) == before
    used = [name for name in fresh if "1.attn.add_q_proj" not in name]  # that query feeds only the discarded text stream
    assert all(not torch.equal(now[name], fresh[name]) for name in used)
    with torch.no_grad():
        assert not torch.equal(policy.velocity(latents, sigma, features), plain)
        with policy.base():
            assert torch.equal(policy.velocity(latents, sigma, features), plain)


def test_a_fresh_adapter_changes_no_bit_and_its_canary_is_0(policy: PipelinePolicy) -> None:
    latents, sigma, features = probe(policy)
    with torch.no_grad():
        adapted = policy.velocity(latents, sigma, features)
        with policy.base():
            assert torch.equal(adapted, policy.velocity(latents, sigma, features))  # R4: the KL to the base is exactly 0
    assert policy.inspect_adapter().canary == 0.0
    assert policy.inspect_adapter().num_modules == 15


def test_the_canary_is_the_relative_change_of_the_velocity_on_the_documented_input(policy: PipelinePolicy) -> None:
    policy.load_adapter(moved(policy, 1))
    generator = torch.Generator().manual_seed(20250505)
    latents = torch.randn((1, 16, 8, 8), generator=generator)
    features = FeatureBatch(
        prompt_embeds=torch.randn((1, 16, EMBEDS), generator=generator), pooled=torch.randn((1, POOLED), generator=generator)
    )
    with torch.no_grad():
        on = policy.velocity(latents, torch.tensor([0.7]), features)
        with policy.base():
            off = policy.velocity(latents, torch.tensor([0.7]), features)
    found = policy.inspect_adapter().canary
    assert found == pytest.approx(float((on - off).norm() / off.norm()), rel=1e-6)
    assert found > 0.05
    scaled = {name: tensor * 1.2 if "lora_B" in name else tensor for name, tensor in policy.read_adapter().items()}
    policy.load_adapter(scaled)
    assert abs(policy.inspect_adapter().canary / found - 1) > 0.05  # the receipt's tolerance tells these apart


def test_the_update_is_alpha_over_rank_times_b_a(tiny_sd3_dir: Path) -> None:
    """With both alphas the same A and B: the weight change is (alpha / rank) B A, so alpha 16 with B equals alpha 8 with 2 B."""
    eight, sixteen = load(tiny_sd3_dir, alpha=8), load(tiny_sd3_dir, alpha=16)
    state = moved(eight, 2)
    sixteen.load_adapter(state)
    eight.load_adapter({name: tensor * 2 if "lora_B" in name else tensor for name, tensor in state.items()})
    latents, sigma, features = probe(eight)
    with torch.no_grad():  # powers of two scale exactly, float32 sums in another order do not: 1e-5
        torch.testing.assert_close(eight.velocity(latents, sigma, features), sixteen.velocity(latents, sigma, features), atol=1e-5, rtol=0)


def test_a_gaussian_a_has_std_1_over_rank_and_b_is_0(tiny_sd3_dir: Path) -> None:
    state = load(tiny_sd3_dir, rank=16).read_adapter()
    a = torch.cat([tensor.flatten() for name, tensor in state.items() if "lora_A" in name])  # 15 x 16 x 32 draws
    assert float(a.std()) == pytest.approx(1 / 16, rel=0.04)  # 4 standard errors of a std over 7,680 draws are 3.2 %
    assert all(not tensor.any() for name, tensor in state.items() if "lora_B" in name)


def test_loading_is_in_place(policy: PipelinePolicy) -> None:
    before = [(id(parameter), parameter.data_ptr()) for parameter in policy.adapter_parameters()]
    state = moved(policy, 3)
    assert policy.load_adapter(state) == 15
    assert [(id(parameter), parameter.data_ptr()) for parameter in policy.adapter_parameters()] == before
    assert same(policy.read_adapter(), state)
    policy.read_adapter()[next(iter(state))].add_(1.0)  # a copy: the policy does not notice
    assert same(policy.read_adapter(), state)


def test_using_restores_bitwise_also_after_an_error(policy: PipelinePolicy) -> None:
    held, other = moved(policy, 4), moved(policy, 5)
    policy.load_adapter(held)
    with policy.using(other):
        assert same(policy.read_adapter(), other)
    assert same(policy.read_adapter(), held)
    with pytest.raises(RuntimeError, match="on purpose"), policy.using(other):
        raise RuntimeError("on purpose")
    assert same(policy.read_adapter(), held)
    with pytest.raises(ModelError), policy.using({}):
        pass
    assert same(policy.read_adapter(), held)


def test_base_nests_and_keeps_a_pending_graph(policy: PipelinePolicy) -> None:
    policy.load_adapter(moved(policy, 6))
    latents, sigma, features = probe(policy)

    def gradient(interrupted: bool) -> torch.Tensor:
        velocity = policy.velocity(latents, sigma, features)
        if interrupted:
            with torch.no_grad(), policy.base():
                reference = policy.velocity(latents, sigma, features)
                with policy.base():
                    pass
                assert torch.equal(reference, policy.velocity(latents, sigma, features))  # still off after the inner exit
        return torch.autograd.grad(velocity.square().mean(), policy.adapter_parameters()[0])[0]

    assert torch.equal(gradient(True), gradient(False))
    assert all(parameter.requires_grad for parameter in policy.adapter_parameters())


@pytest.mark.parametrize("change", ["missing", "foreign", "shape"])
def test_a_state_of_another_adapter_is_refused_whole(policy: PipelinePolicy, change: str) -> None:
    held, state = policy.read_adapter(), moved(policy, 7)
    name = next(iter(state))
    tensor = state.pop(name)
    if change == "foreign":
        state |= {name: tensor, "somewhere.lora_A.weight": tensor}
    elif change == "shape":
        state[name] = tensor[:2]
    with pytest.raises(ModelError, match="rank" if change == "shape" else "model.lora.targets"):
        policy.load_adapter(state)
    assert same(policy.read_adapter(), held)


def test_a_target_that_names_no_module_is_refused_with_the_nearest_names(tiny_sd3_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"'attn\.to_qq'.*attn\.to_q"):
        load(tiny_sd3_dir, targets=("attn.to_k", "attn.to_qq"))


def test_no_target_at_all_is_refused(tiny_sd3_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.lora\.targets"):
        load(tiny_sd3_dir, targets=())


def test_a_target_that_is_a_convolution_is_refused() -> None:
    with pytest.raises(ConfigError, match="no linear module"):
        LoraHandle(nn.ModuleDict({"proj": nn.Conv2d(1, 1, 1)}), LoraConfig(targets=("proj",)))
