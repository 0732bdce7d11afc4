"""Groups and evaluation images: what is kept, what is reproducible, what stays out of the window."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from common.errors import DataError
from common.flow.kernels import OdeKernel, make_kernel
from common.flow.noise import draw_noise, initial_noise
from common.seeding import derive_seed
from common.types import SamplerSpec, Trajectory
from rollout_workers.sampler import SamplingError, evaluation_seed, sample_group, sample_images
from tests import oracles
from tests.fakes import FakePolicy, adapter_state

NUM_STEPS, GROUP_SIZE = 6, 5


def spec_of(**changes: Any) -> SamplerSpec:
    facts: dict[str, Any] = {
        "kernel": "flow_sde", "noise_level": 0.7, "num_steps": NUM_STEPS, "guidance_scale": 1.0, "height": 16, "width": 16,
        "snapshot": "live", "window": (0, 1, 4), "shared_init": False,
    }  # fmt: skip
    return SamplerSpec(**(facts | changes))


def policy_of(scale: float = 0.1) -> FakePolicy:
    policy = FakePolicy()
    policy.load_adapter(adapter_state(scale))
    return policy


def group_of(spec: SamplerSpec, *, policy: FakePolicy | None = None, group: int = 3, micro_batch: int = 2) -> tuple[Trajectory, ...]:
    policy = policy or policy_of()
    (features,) = policy.encode(["a red circle"], with_negative=spec.guidance_scale > 1)
    return sample_group(policy, features, spec, run_seed=11, group=group, group_size=GROUP_SIZE, micro_batch=micro_batch)


def bits(rows: tuple[Trajectory, ...]) -> list[bytes]:
    return [row.latents.tobytes() + row.final_latents.tobytes() + row.behavior_log_prob.tobytes() for row in rows]


def test_a_trajectory_keeps_the_states_around_its_window_and_the_sigmas_as_used() -> None:
    grid = FakePolicy().sigmas(NUM_STEPS).numpy()
    rows = group_of(spec_of())
    assert [row.sample_index for row in rows] == list(range(GROUP_SIZE)) == [row.media_row for row in rows]
    for row in rows:
        assert row.seed == derive_seed(11, 3, row.sample_index)
        assert row.step_index.tolist() == [0, 1, 4]
        assert row.step_index.dtype == row.latent_index.dtype == np.int16
        assert row.latent_index.tolist() == [0, 1, 2, 4, 5]  # 0-1-2 share, then a gap
        assert row.latents.shape == (5, 4, 4, 4)
        assert row.latents.dtype == row.final_latents.dtype == row.behavior_log_prob.dtype == np.float32
        assert row.sigma.tolist() == grid[[0, 1, 4]].tolist()
        assert row.next_sigma.tolist() == grid[[1, 2, 5]].tolist()
        assert row.timestep.tolist() == (grid[[0, 1, 4]] * np.float32(1000)).tolist()


def test_a_run_is_the_one_of_a_slow_loop_over_the_formulas() -> None:
    """Float64 NumPy against the sampler's float32: 6 steps at unit scale, 2e-5."""
    rows, policy = group_of(spec_of(window=(0, 1, 5))), policy_of()
    grid = policy.sigmas(NUM_STEPS).double().numpy()
    features = policy.batch_features(policy.encode(["a red circle"], with_negative=False))
    for row in rows:
        x = initial_noise(11, 3, row.sample_index, (4, 4, 4), shared=False).double().numpy()
        log_probs = []
        for step in range(NUM_STEPS):
            with torch.no_grad():
                sigma = torch.tensor([grid[step]], dtype=torch.float32)
                v = policy.velocity(torch.from_numpy(x[None]).float(), sigma, features)[0].double().numpy()
            if step in (0, 1, 5):
                mean, std, _ = oracles.flow_sde(x, v, float(grid[step]), float(grid[step + 1]), 0.7)
                x = mean + std * draw_noise(11, 3, row.sample_index, "step", step=step, shape=(4, 4, 4)).double().numpy()
                log_probs.append(oracles.gaussian_log_prob(x, mean, std))
            else:
                x = x + v * (grid[step + 1] - grid[step])
        assert np.abs(row.final_latents - x).max() < 2e-5
        assert np.abs(row.behavior_log_prob - log_probs).max() < 2e-5


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("kernel", ["flow_sde", "dance_sde", "cps", "dpm_sde"])
def test_outside_the_window_a_step_is_bitwise_the_ode_kernels(kernel: str, guidance_scale: float) -> None:
    """R6: with the window at step 2 the state before it is 2 Euler steps from the noise; what follows it is Euler steps."""
    spec = spec_of(kernel=kernel, window=(2,), guidance_scale=guidance_scale)
    rows, policy, ode = group_of(spec, micro_batch=GROUP_SIZE), policy_of(), OdeKernel()
    grid = policy.sigmas(NUM_STEPS)
    features = policy.batch_features(policy.encode(["a red circle"], with_negative=guidance_scale > 1) * GROUP_SIZE)

    @torch.no_grad()
    def integrate(x: torch.Tensor, first: int, last: int) -> torch.Tensor:
        for step in range(first, last):
            t, t_next = grid[step].expand(GROUP_SIZE), grid[step + 1].expand(GROUP_SIZE)
            x = ode.transition(x, policy.velocity(x, t, features, guidance_scale=guidance_scale), t, t_next).mean
        return x

    start = torch.stack([initial_noise(11, 3, k, (4, 4, 4), shared=False) for k in range(GROUP_SIZE)])
    before, after, final = (torch.from_numpy(np.stack([row[j] for row in [(*r.latents, r.final_latents) for r in rows]])) for j in range(3))
    assert torch.equal(integrate(start, 0, 2), before)
    assert torch.equal(integrate(after, 3, NUM_STEPS), final)
    assert not torch.equal(integrate(before, 2, 3), after)


def test_a_stored_log_prob_is_remade_bitwise_from_the_stored_states() -> None:
    """R1 and R6 on one side: the same code on the same micro-batch, so the ratio is exactly 1."""
    rows, policy = group_of(spec_of(), micro_batch=GROUP_SIZE), policy_of()
    features = policy.batch_features(policy.encode(["a red circle"], with_negative=False) * GROUP_SIZE)
    kernel = make_kernel("flow_sde", 0.7)
    for column, (before, after) in enumerate([(0, 1), (1, 2), (3, 4)]):
        x = torch.from_numpy(np.stack([row.latents[before] for row in rows]))
        x_next = torch.from_numpy(np.stack([row.latents[after] for row in rows]))
        t = torch.from_numpy(np.stack([row.sigma[column] for row in rows]))
        t_next = torch.from_numpy(np.stack([row.next_sigma[column] for row in rows]))
        log_prob = kernel.log_prob(x_next, kernel.transition(x, policy.velocity(x, t, features), t, t_next))
        assert log_prob.detach().numpy().tolist() == [row.behavior_log_prob[column] for row in rows]


def test_without_a_window_only_the_clean_latents_are_kept() -> None:
    rows = group_of(spec_of(kernel="ode", noise_level=0.0, window=()))
    for row in rows:
        assert row.step_index.shape == row.behavior_log_prob.shape == row.sigma.shape == (0,)
        assert row.latents.shape == (0, 4, 4, 4)
        assert row.latent_index.shape == (0,)
        assert np.isfinite(row.final_latents).all()


@pytest.mark.parametrize("kernel", ["flow_sde", "dance_sde", "cps", "dpm_sde"])
@pytest.mark.parametrize("noise_level", [0.0, 0.7])
def test_the_last_step_gives_no_nan_under_any_kernel(kernel: str, noise_level: float) -> None:
    rows = group_of(spec_of(kernel=kernel, noise_level=noise_level, window=tuple(range(NUM_STEPS))))
    for row in rows:
        assert row.latent_index.tolist() == list(range(NUM_STEPS + 1))
        assert np.array_equal(row.latents[-1], row.final_latents)
        assert np.isfinite(row.behavior_log_prob).all()
        assert (row.behavior_log_prob[-1] == 0.0) == (kernel in ("cps", "dpm_sde") or noise_level == 0.0)


def test_the_same_numbers_come_again_whatever_was_sampled_before() -> None:
    """R5: two policy objects, another group in between, other global random states: equal bits."""
    policy = policy_of()
    first = group_of(spec_of(), policy=policy)
    group_of(spec_of(), policy=policy, group=4)
    torch.manual_seed(99)
    np.random.seed(99)
    assert bits(group_of(spec_of(), policy=policy)) == bits(first) == bits(group_of(spec_of()))


def test_another_micro_batch_changes_at_most_the_last_bits() -> None:
    """Same noise and formulas in another batch shape: float32 rounding, 1e-5 after 6 steps."""
    whole, single = group_of(spec_of(), micro_batch=GROUP_SIZE), group_of(spec_of(), micro_batch=1)
    for one, other in zip(whole, single, strict=True):
        assert np.abs(one.final_latents - other.final_latents).max() < 1e-5
        assert np.abs(one.behavior_log_prob - other.behavior_log_prob).max() < 1e-5


def test_samples_of_a_group_differ_and_share_their_start_only_when_asked() -> None:
    independent, shared = group_of(spec_of()), group_of(spec_of(shared_init=True))
    assert len({row.latents[0].tobytes() for row in independent}) == GROUP_SIZE
    assert len({row.latents[0].tobytes() for row in shared}) == 1
    assert len({row.final_latents.tobytes() for row in shared}) == GROUP_SIZE


def test_guidance_moves_the_samples_to_the_prompts_mean() -> None:
    """v_u + w (v_c - v_u) pulls w times as far from the unconditional mean 0: the group's mean moves outward along m."""
    policy = policy_of(0.0)
    (features,) = policy.encode(["a red circle"], with_negative=False)
    plain, guided = (
        np.mean([row.final_latents for row in group_of(spec_of(window=(), guidance_scale=w), policy=policy)], axis=(0, 2, 3))
        for w in (1.0, 3.0)
    )
    assert float(guided @ features.pooled) > 1.5 * float(plain @ features.pooled) > 0


def test_latents_that_are_not_finite_are_an_error_and_not_a_group() -> None:
    policy = policy_of()
    policy.load_adapter(adapter_state(float("nan")))
    with pytest.raises(SamplingError, match="group 3, sample 0"):
        group_of(spec_of(), policy=policy)


def images_of(ids: list[str], *, micro_batch: int = 4, seed: int = 5, policy: FakePolicy | None = None) -> dict[str, np.ndarray[Any, Any]]:
    policy = policy or policy_of()
    features = policy.encode([f"text of {name}" for name in ids], with_negative=False)
    seeds = [evaluation_seed(seed, name, 0) for name in ids]
    final = sample_images(policy, features, seeds, num_steps=8, guidance_scale=1.0, micro_batch=micro_batch)
    return dict(zip(ids, final, strict=True))


def test_an_evaluation_image_depends_on_its_seed_and_prompt_and_not_on_its_neighbors() -> None:
    """Float32 in another batch shape: 1e-5; equal shapes: equal bits."""
    together, reordered, alone = images_of(["a", "b", "c", "d"]), images_of(["d", "c", "b", "a"]), images_of(["c"])
    for name in "abcd":
        assert np.abs(together[name] - reordered[name]).max() < 1e-5
    assert np.abs(together["c"] - alone["c"]).max() < 1e-5
    assert images_of(["a", "b", "c", "d"])["b"].tobytes() == together["b"].tobytes()
    assert np.abs(images_of(["c"], seed=6)["c"] - alone["c"]).max() > 0.01
    assert len({evaluation_seed(seed, name, repeat) for seed in (5, 6) for name in "ab" for repeat in (0, 1)}) == 8


def test_evaluation_samples_the_prompts_distribution() -> None:
    """Euler on Gaussian data is an affine recursion: 1024 pixels a channel have its mean and std within 4 standard errors."""
    policy = policy_of(0.0)
    final = sample_images(
        policy, policy.encode(["same"] * 64, with_negative=False), [evaluation_seed(1, "same", n) for n in range(64)],
        num_steps=40, guidance_scale=1.0, micro_batch=16,
    )  # fmt: skip
    mean = policy.encode(["same"], with_negative=False)[0].pooled.astype(np.float64)
    grid, expected_mean, expected_std = policy.sigmas(40).double().numpy(), np.zeros(4), 1.0
    for t, t_next in itertools.pairwise(grid):
        variance = (1 - t) ** 2 * 0.4**2 + t**2
        slope = (1 - (1 - t) * 0.4**2 / variance) / t  # v = slope x + offset m
        offset = -(1 - (1 - t) ** 2 * 0.4**2 / variance) / t
        expected_mean = expected_mean * (1 + slope * (t_next - t)) + offset * mean * (t_next - t)
        expected_std *= 1 + slope * (t_next - t)
    assert np.abs(final.mean(axis=(0, 2, 3)) - expected_mean).max() < 4 * 0.4 / 32
    assert np.abs(final.std(axis=(0, 2, 3)) - expected_std).max() < 4 * 0.4 / 2048**0.5
    assert np.abs(expected_mean - mean).max() < 0.05


def test_a_seed_that_comes_twice_in_a_sheet_is_refused() -> None:
    policy = policy_of()
    with pytest.raises(DataError, match="comes twice"):
        sample_images(policy, policy.encode(["x", "x"], with_negative=False), [4, 4], num_steps=4, guidance_scale=1.0, micro_batch=2)
