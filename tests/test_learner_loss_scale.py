"""The loss scale of a float16 base: gradients that float16 cannot hold come out as float32 would give them, and no step is lost."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from common.errors import GateError
from common.policy.base import FeatureBatch
from common.policy.config import LoraConfig, ModelConfig
from common.policy.load import load_policy
from common.types import Manifest, RolloutGroup
from learner.advantages import make_estimator
from learner.config import LearnerConfig
from learner.gates import StartGates
from learner.loss_scale import GROWTH_INTERVAL, HIGHEST, LossScale
from learner.objectives.base import LossContext, LossTerm, MicroBatch
from learner.objectives.nft import NftConfig
from learner.state import freeze_state, restore
from learner.update import Learner, make_learner
from tests.learner_fakes import manifest_of, sample_groups, sampler_spec, score_by_latents
from tests.learner_policies import LoraLinear, StubPolicy, linear_policy

LARGE_MODEL = 1e-7  # brings the gradient by an element of these four-element latents to the size that it has on SD3.5's 65,536
SPEC = sampler_spec()


class HalfPolicy(StubPolicy):
    """A linear policy whose velocity passes gradients on as float16, as a float16 transformer does."""

    def velocity(
        self, latents: torch.Tensor, sigma: torch.Tensor, features: FeatureBatch, *, guidance_scale: float = 1.0, detach_uncond: bool = True
    ) -> torch.Tensor:
        found = super().velocity(latents, sigma, features, guidance_scale=guidance_scale)
        if found.requires_grad:
            found.register_hook(lambda gradient: gradient.half().float())
        return found


@dataclass(frozen=True)
class Shrunk:
    """An objective's losses times a factor."""

    inner: Any
    factor: float

    @property
    def needs(self) -> Any:
        return self.inner.needs

    def anchors(self, batch: MicroBatch, context: LossContext) -> Any:
        return self.inner.anchors(batch, context)

    def losses(self, batch: MicroBatch, anchors: Any, context: LossContext) -> Iterator[LossTerm]:
        return (replace(term, loss=term.loss * self.factor) for term in self.inner.losses(batch, anchors, context))


def half_policy() -> HalfPolicy:
    like = linear_policy()
    adapter = LoraLinear(4, dtype=torch.float32)
    adapter.load_state_dict(like._adapter.state_dict())
    return HalfPolicy(like._base, adapter, (4, 1, 1), torch.float32)


def learner_of(policy: StubPolicy, *, scaled: bool, factor: float = LARGE_MODEL) -> Learner:
    config = LearnerConfig(groups_per_update=4, optimizer_steps=2, micro_batch=5, learning_rate=1e-2, max_grad_norm=1e9, adam_eps=1e-30)
    return Learner(
        policy, config, Shrunk(NftConfig(kl_beta=0.1).make("recompute"), factor), make_estimator(config.advantage), weights={"r": 1.0},
        run_seed=11, gates=StartGates(micro_batch=5), loss_scale=LossScale(enabled=scaled),
    )  # fmt: skip


def batch_of(update: int = 1) -> tuple[Manifest, list[RolloutGroup]]:
    groups = sample_groups(linear_policy(), range((update - 1) * 4, update * 4), 6, SPEC, version=update - 1)
    return manifest_of(update, groups, score_by_latents(groups, lambda x: float(x[0]))), groups


def flat(state: Any) -> torch.Tensor:
    return torch.cat([state[name].flatten() for name in sorted(state)])


def test_a_large_models_gradient_survives_float16_with_the_scale_as_float32_computes_it() -> None:
    exact, scaled = learner_of(linear_policy(), scaled=False), learner_of(half_policy(), scaled=True)
    for update in (1, 2):
        found, expected = scaled.update(*batch_of(update)), exact.update(*batch_of(update))
        assert found.num_steps == expected.num_steps == 2
        assert found.metrics["grad_norm"] == pytest.approx(expected.metrics["grad_norm"], rel=2e-3)  # float16 keeps 11 bits
        assert found.metrics["loss"] == pytest.approx(expected.metrics["loss"], rel=1e-3)
        torch.testing.assert_close(flat(scaled.live), flat(exact.live), rtol=0, atol=5e-4)  # of steps of 1e-2 each


def test_without_the_scale_it_is_exactly_zero_which_the_first_update_refuses() -> None:
    learner = learner_of(half_policy(), scaled=False)
    with pytest.raises(GateError, match=r"gradient of the first update is exactly 0.*model\.dtype") as caught:
        learner.update(*batch_of())
    assert caught.value.name == "gradient"


def test_an_overflow_halves_the_scale_and_runs_the_minibatch_again() -> None:
    exact, scaled = learner_of(linear_policy(), scaled=False, factor=1.0), learner_of(half_policy(), scaled=True, factor=1.0)
    result = scaled.update(*batch_of())
    exact.update(*batch_of())
    assert (result.num_steps, result.num_skipped, scaled.num_nonfinite) == (2, 0, 0)
    assert 1.0 < scaled.loss_scale.value < HIGHEST
    assert np.log2(scaled.loss_scale.value) % 1 == 0
    torch.testing.assert_close(flat(scaled.live), flat(exact.live), rtol=0, atol=5e-4)


def test_a_gradient_that_no_scale_brings_into_range_is_skipped_and_counted() -> None:
    learner = learner_of(half_policy(), scaled=True, factor=1e9)
    result = learner.update(*batch_of())
    assert (result.num_steps, result.num_skipped, learner.num_nonfinite) == (0, 2, 2)
    assert learner.loss_scale.value == HIGHEST  # as it was found: the next minibatch does not pay for this one


def test_a_loss_that_is_not_a_number_says_nothing_about_the_scale() -> None:
    learner = learner_of(half_policy(), scaled=True)
    manifest, groups = batch_of()
    bad = tuple(replace(row, final_latents=row.final_latents * np.float32("nan")) for row in groups[0].trajectories)
    result = learner.update(manifest, [replace(groups[0], trajectories=bad), *groups[1:]])
    assert (result.num_steps, result.num_skipped) == (1, 1)
    assert learner.loss_scale.value == HIGHEST


def test_the_scale_doubles_after_steps_without_overflow_up_to_where_it_began() -> None:
    scale = LossScale(enabled=True)
    assert scale.shrink() and scale.shrink()
    for _ in range(GROWTH_INTERVAL - 1):
        scale.step_taken()
    assert scale.value == HIGHEST / 4
    resumed = LossScale(enabled=True)
    resumed.load_state(scale.read_state())
    resumed.step_taken()
    assert resumed.value == HIGHEST / 2
    for _ in range(5 * GROWTH_INTERVAL):
        resumed.step_taken()
    assert resumed.value == HIGHEST
    resumed.load_state(LossScale(enabled=False).read_state())  # --allow-change model.dtype: a float32 run had no use for a scale
    assert resumed.value == HIGHEST


def test_another_dtype_is_never_scaled() -> None:
    scale = LossScale(enabled=False)
    for _ in range(2 * GROWTH_INTERVAL):
        scale.step_taken()
    assert scale.value == 1.0
    assert not scale.shrink()
    config = LearnerConfig(groups_per_update=4)
    dtypes = ("float32", "bfloat16", "float16")
    values = {dtype: make_learner(linear_policy(), config, {"r": 1.0}, 1, base_dtype=dtype).loss_scale.value for dtype in dtypes}
    assert values == {"float32": 1.0, "bfloat16": 1.0, "float16": HIGHEST}


def test_a_resumed_learner_goes_on_with_the_scale_bit_for_bit() -> None:
    whole = learner_of(half_policy(), scaled=True, factor=1.0)
    whole.update(*batch_of(1))
    resumed = learner_of(half_policy(), scaled=True, factor=1.0)
    state = freeze_state(whole)
    restore(resumed, safetensors.torch.load(state.content), state.facts)
    assert resumed.loss_scale.value == whole.loss_scale.value < HIGHEST
    for learner in (whole, resumed):
        learner.update(*batch_of(2))
    assert torch.equal(flat(resumed.live), flat(whole.live))


def test_a_float16_transformer_gives_the_direction_that_float32_gives_only_with_the_scale(tiny_sd3_dir: Path) -> None:
    """The real model class on a CPU, its loss as small as SD3.5's sizes make it."""
    size = 1e-6
    gradients = {}
    for dtype, factor in (("float32", 1.0), ("float16", 1.0), ("float16", 2.0**20)):
        policy = load_policy(
            ModelConfig(path=str(tiny_sd3_dir), dtype=dtype, height=64, width=64, max_sequence_length=16, lora=LoraConfig(rank=4, alpha=8)),
            with_vae=False,
        )
        features = policy.batch_features(policy.encode(["a red square"], with_negative=False))
        generator = torch.Generator().manual_seed(3)
        latents, target = (torch.randn((1, *policy.latent_shape), generator=generator) for _ in range(2))
        error = (policy.velocity(latents, torch.tensor([0.7]), features) - target).square().mean()
        (error * size * factor).backward()
        found = [parameter.grad.flatten() / factor for parameter in policy.adapter_parameters() if parameter.grad is not None]
        gradients[dtype, factor] = torch.cat(found).double()
    exact, lost, kept = gradients.values()
    assert float(lost.norm()) == 0.0
    assert float(torch.nn.functional.cosine_similarity(exact, kept, dim=0)) > 0.999
    assert float(kept.norm()) == pytest.approx(float(exact.norm()), rel=0.02)
