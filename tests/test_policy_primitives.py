"""The two primitives: a stored step replays to its log-prob (R3), and the flow-matching error is the paper's."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from common.flow.kernels import make_kernel
from common.policy.pipeline_policy import PipelinePolicy
from common.policy.primitives import fm_errors, replay_step
from common.types import PromptFeatures, SamplerSpec, Trajectory
from rollout_workers.sampler import sample_group
from tests.oracles import flow_sde
from tests.policy_cases import PROMPTS, changed, inputs, policy_of

ETA, COUNT = 0.02, 4
SPEC = SamplerSpec(
    kernel="flow_sde", noise_level=ETA, num_steps=10, guidance_scale=1.0, height=64, width=64, snapshot="live", window=(4, 5, 6),
    shared_init=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def policy(tiny_sd3_dir: Path) -> PipelinePolicy:
    policy = policy_of(tiny_sd3_dir)
    policy.load_adapter(changed(policy.read_adapter()))
    return policy


@pytest.fixture(scope="module")
def features(policy: PipelinePolicy) -> PromptFeatures:
    return policy.encode([PROMPTS[0]], with_negative=False)[0]


@pytest.fixture(scope="module")
def trajectories(policy: PipelinePolicy, features: PromptFeatures) -> tuple[Trajectory, ...]:
    return sample_group(policy, features, SPEC, run_seed=3, group=0, group_size=COUNT, micro_batch=COUNT)


def replay(
    policy: PipelinePolicy, features: PromptFeatures, trajectories: tuple[Trajectory, ...], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """|replayed - stored log-prob| [K, W] after latents were stored as `dtype`, and the steps' std [K, W]."""
    kernel, batch = make_kernel(SPEC.kernel, ETA), policy.batch_features([features] * COUNT)
    latents = torch.stack(
        [torch.frombuffer(bytearray(row.latents.tobytes()), dtype=torch.float32).reshape(row.latents.shape) for row in trajectories]
    )
    latents = latents.to(dtype).float()
    stored = torch.from_numpy(np.stack([row.behavior_log_prob for row in trajectories]))
    sigma, next_sigma = (torch.from_numpy(np.stack([getattr(row, name) for row in trajectories])) for name in ("sigma", "next_sigma"))
    differences, stds = [], []
    for step in range(len(SPEC.window)):
        with torch.no_grad():
            found = replay_step(
                policy, kernel, latents[:, step], latents[:, step + 1], batch, sigma=sigma[:, step], next_sigma=next_sigma[:, step]
            )
        differences.append((found.log_prob - stored[:, step]).abs())
        stds.append(found.transition.std.flatten())
    return torch.stack(differences, dim=1), torch.stack(stds, dim=1)


def test_a_trajectory_stored_as_float32_replays_to_its_log_probs(
    policy: PipelinePolicy, features: PromptFeatures, trajectories: tuple[Trajectory, ...]
) -> None:
    difference, std = replay(policy, features, trajectories, torch.float32)
    assert difference.max() <= 1e-6
    assert ((std > 0.008) & (std < 0.0125)).all()  # where errors hurt: they count in units of the std


def test_a_trajectory_stored_as_bfloat16_would_not(
    policy: PipelinePolicy, features: PromptFeatures, trajectories: tuple[Trajectory, ...]
) -> None:
    """8 bits of a value near 1 are .1 std here: above every clip range. The test above can fail."""
    difference, _ = replay(policy, features, trajectories, torch.bfloat16)
    assert difference.mean() > 1e-3


def test_a_replayed_step_is_the_kernels_on_the_policys_velocity(policy: PipelinePolicy, features: PromptFeatures) -> None:
    """Log-prob against the NumPy oracle in float64; gradient through the velocity alone."""
    kernel, (latents, sigma) = make_kernel("flow_sde", 0.7), inputs(policy, 2)
    following = inputs(policy, 2, seed=8)[0].requires_grad_()
    found = replay_step(policy, kernel, latents, following, policy.batch_features([features] * 2), sigma=sigma, next_sigma=sigma - 0.1)
    for row, t in enumerate(sigma.tolist()):
        x, v, y = (tensor.detach()[row].double().numpy() for tensor in (latents, found.velocity, following))
        mean, std, _ = flow_sde(x, v, t, t - 0.1, 0.7)
        np.testing.assert_allclose(found.mean[row].detach().numpy(), mean, atol=1e-5)
        density = -((y - mean) ** 2) / (2 * std**2) - math.log(std) - math.log(2 * math.pi) / 2
        assert found.log_prob[row].item() == pytest.approx(density.mean(), rel=1e-4)  # sigma - .1 is rounded to float32
    found.log_prob.sum().backward()
    assert following.grad is None
    assert all(parameter.grad is not None for parameter in policy.adapter_parameters())


def test_the_flow_matching_error_is_the_mean_square_to_noise_minus_clean(policy: PipelinePolicy, features: PromptFeatures) -> None:
    (clean, sigma), noise = inputs(policy, 2), inputs(policy, 2, seed=8)[0]
    batch = policy.batch_features([features] * 2)
    with torch.no_grad():
        found = fm_errors(policy, clean, sigma, noise, batch)
        level = sigma.double().numpy()[:, None, None, None]
        noised = (1 - level) * clean.double().numpy() + level * noise.double().numpy()
        velocity = policy.velocity(torch.from_numpy(noised).float(), sigma, batch).double().numpy()
    target = noise.double().numpy() - clean.double().numpy()
    np.testing.assert_allclose(found.noised.numpy(), noised, atol=1e-6)
    np.testing.assert_allclose(found.target.numpy(), target, atol=1e-6)
    np.testing.assert_allclose(found.velocity.numpy(), velocity, atol=1e-5)  # its input differs in the last bit
    np.testing.assert_allclose(found.error.numpy(), ((velocity - target) ** 2).mean(axis=(1, 2, 3)), rtol=1e-5)
