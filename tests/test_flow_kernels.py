"""The step kernels against the papers' formulas: K1 to K7 and K11 of the invariants."""

import itertools
import math
from typing import get_args

import numpy as np
import pytest
import torch

from common.errors import ConfigError
from common.flow.grid import sigma_grid
from common.flow.kernels import (
    CpsKernel,
    DanceSdeKernel,
    DpmSdeKernel,
    FlowSdeKernel,
    OdeKernel,
    TransitionKernel,
    clean_estimate,
    make_kernel,
    noise_estimate,
)
from learner.objectives.settings import QUIET_AT_THE_END
from rollout_workers.config import RolloutConfig
from tests import oracles

STEPS = [(1.0, 0.96), (0.96, 0.913), (0.7, 0.6), (0.278, 0.0089), (0.0089, 0.0)]  # of the SD3.5 grid, ends included
SHAPE = (3, 4, 5, 5)


def tensors(seed: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, v, other = (torch.randn(SHAPE, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3))
    return x, v, other


def column(value: float) -> torch.Tensor:
    return torch.full((SHAPE[0],), value, dtype=torch.float64)


@pytest.mark.parametrize("name", ["flow_sde", "dance_sde", "cps", "dpm_sde"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])  # K1: a few roundings at unit scale
@pytest.mark.parametrize(("t", "t_next"), STEPS)
def test_a_kernel_without_noise_is_the_euler_step(name: str, dtype: torch.dtype, tolerance: float, t: float, t_next: float) -> None:
    x, v, noise = tensors(0, dtype)
    kernel = make_kernel(name, 0.0)
    step = kernel.transition(x, v, column(t), column(t_next))
    euler = OdeKernel().transition(x, v, column(t), column(t_next)).mean
    assert (kernel.draw(step, noise) - euler).abs().max() <= tolerance
    assert not kernel.has_log_prob
    assert torch.equal(kernel.log_prob(euler, step), torch.zeros(SHAPE[0], dtype=dtype))


def test_the_ode_kernel_is_x_plus_v_dt() -> None:
    step = OdeKernel().transition(torch.tensor([[[[2.0]]]]), torch.tensor([[[[3.0]]]]), torch.tensor([0.5]), torch.tensor([0.25]))
    assert step.mean.item() == 2.0 - 0.75
    assert step.std.item() == 0.0


@pytest.mark.parametrize(("t", "t_next"), STEPS)
def test_the_drift_equals_the_form_with_the_noise_estimate(t: float, t_next: float) -> None:
    """K2, relative 1e-13: the kernel's form and x + (v + s^2 epshat / (2t)) dt are one identity."""
    x, v, _ = tensors(1)
    for kernel in (FlowSdeKernel(0.7), DanceSdeKernel(0.3)):
        step = kernel.transition(x, v, column(t), column(t_next))
        s = step.diffusion
        epshat = noise_estimate(x, v, column(t))
        expected = x + (v + s**2 * epshat / (2 * t)) * (t_next - t)
        assert ((step.mean - expected) / expected.abs().clamp_min(1)).abs().max() <= 1e-13


@pytest.mark.parametrize(("t", "t_next"), STEPS)
@pytest.mark.parametrize(
    ("name", "eta"), [("flow_sde", 0.7), ("dance_sde", 0.3), ("cps", 0.8), ("dpm_sde", 0.7), ("dpm_sde", math.sqrt(2))]
)
def test_the_kernels_equal_the_papers_formulas(name: str, eta: float, t: float, t_next: float) -> None:
    """1e-12: float64 on both sides, a dozen roundings."""
    x, v, _ = tensors(2)
    step = make_kernel(name, eta).transition(x, v, column(t), column(t_next))
    mean, std, s = getattr(oracles, name)(x.numpy(), v.numpy(), t, t_next, eta)
    assert np.abs(step.mean.numpy() - mean).max() <= 1e-12
    assert step.std.flatten().tolist() == pytest.approx([std] * SHAPE[0], abs=1e-14)
    assert step.diffusion.flatten().tolist() == pytest.approx([s] * SHAPE[0], abs=1e-14)


@pytest.mark.parametrize(("t", "t_next"), [step for step in STEPS if step[1] > 0])
def test_the_mean_difference_is_an_amplified_velocity_difference(t: float, t_next: float) -> None:
    """K3: mu - mu_ref = (1 + eta^2/2) dt dv for 0 < t < 1, and dt dv at t = 1."""
    eta = 0.7
    x, v, v_ref = tensors(3)
    kernel = FlowSdeKernel(eta)
    difference = kernel.transition(x, v, column(t), column(t_next)).mean - kernel.transition(x, v_ref, column(t), column(t_next)).mean
    amplification = 1.0 if t == 1.0 else 1 + eta**2 / 2
    assert (difference - amplification * (t_next - t) * (v - v_ref)).abs().max() <= 1e-12


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("kernel", [FlowSdeKernel(0.7), DanceSdeKernel(0.3), DpmSdeKernel(0.7)])
def test_the_log_prob_is_the_mean_normal_density(kernel: TransitionKernel, dtype: torch.dtype, tolerance: float) -> None:
    """K4, against torch.distributions and against a loop in NumPy."""
    x, v, noise = tensors(4, dtype)
    step = kernel.transition(x, v, column(0.7), column(0.6))
    x_next = kernel.draw(step, noise)
    ours = kernel.log_prob(x_next, step)
    theirs = torch.distributions.Normal(step.mean, step.std.expand_as(step.mean)).log_prob(x_next).flatten(1).mean(1)
    assert (ours - theirs).abs().max() <= tolerance
    std = float(step.std[0])
    slow = [oracles.gaussian_log_prob(a.double().numpy(), b.double().numpy(), std) for a, b in zip(x_next, step.mean, strict=True)]
    assert np.abs(ours.double().numpy() - slow).max() <= tolerance


def test_the_cps_log_prob_is_minus_the_squared_distance() -> None:
    kernel = CpsKernel(0.8)
    x, v, noise = tensors(5)
    step = kernel.transition(x, v, column(0.7), column(0.6))
    expected = -((step.std * noise) ** 2).flatten(1).mean(1)
    assert (kernel.log_prob(kernel.draw(step, noise), step) - expected).abs().max() <= 1e-12


@pytest.mark.parametrize("kernel", [FlowSdeKernel(0.7), DanceSdeKernel(0.3), CpsKernel(0.8), DpmSdeKernel(0.7)])
def test_what_is_drawn_is_standard_normal_around_the_mean(kernel: TransitionKernel) -> None:
    """K5 at 1e5 draws: 4 standard errors are 0.0126 for the mean, 0.0179 for the variance, 0.0090 for E[log p]."""
    generator = torch.Generator().manual_seed(6)
    x, v = torch.randn(2, 1, 100_000, 1, 1, generator=generator)
    t, t_next = torch.tensor([0.7]), torch.tensor([0.6])
    step = kernel.transition(x, v, t, t_next)
    x_next = kernel.draw(step, torch.randn(x.shape, generator=generator))
    z = (x_next - step.mean) / step.std
    assert abs(z.mean().item()) < 0.013
    assert abs(z.var().item() - 1) < 0.018
    std = step.std.item()
    is_cps = isinstance(kernel, CpsKernel)
    expected = -(std**2) if is_cps else -0.5 - math.log(std) - 0.5 * math.log(2 * math.pi)
    four_se = 4 * math.sqrt(2) * std**2 / math.sqrt(1e5) if is_cps else 4 * math.sqrt(0.5) / math.sqrt(1e5)
    assert abs(kernel.log_prob(x_next, step).item() - expected) < four_se


def test_the_first_step_from_sigma_1_is_finite_and_uses_the_second_sigma() -> None:
    """K6: s(1) = eta / sqrt(1 - sigma_1), and a gradient that is finite."""
    grid = sigma_grid(10, 3.0)
    x, v, noise = tensors(7, torch.float32)
    v.requires_grad_()
    kernel = FlowSdeKernel(0.7)
    step = kernel.transition(x, v, grid[:1].expand(3), grid[1:2].expand(3))
    s = 0.7 / math.sqrt(1 - float(grid[1]))
    assert step.diffusion.flatten().tolist() == pytest.approx([s] * 3, rel=1e-6)
    assert step.std.flatten().tolist() == pytest.approx([0.7] * 3, rel=1e-6)  # sqrt|dt| = sqrt(1 - sigma_1) cancels
    log_prob = kernel.log_prob(kernel.draw(step, noise).detach(), step)
    log_prob.sum().backward()
    assert torch.isfinite(log_prob).all()
    assert v.grad is not None
    assert torch.isfinite(v.grad).all()
    assert v.grad.abs().sum() > 0


@pytest.mark.parametrize("kernel", [FlowSdeKernel(0.7), DanceSdeKernel(0.3), CpsKernel(0.8), DpmSdeKernel(0.7), FlowSdeKernel(0.0)])
def test_the_last_step_to_sigma_0_is_finite_or_masked(kernel: TransitionKernel) -> None:
    """K6: where std is 0 the log-prob and the KL are 0 with a zero gradient, never NaN."""
    x, v, noise = tensors(8)
    v.requires_grad_()
    step = kernel.transition(x, v, column(0.0089), column(0.0))
    x_next = kernel.draw(step, noise).detach() + 0.01  # off the mean, as after an update of the weights
    log_prob = kernel.log_prob(x_next, step)
    kl = kernel.kl(step.mean, step.mean.detach() + 0.1, step, "exact")
    (log_prob.sum() + kl.sum()).backward()
    assert v.grad is not None
    assert torch.isfinite(v.grad).all()
    assert torch.isfinite(log_prob).all()
    if not kernel.has_last_log_prob:
        assert log_prob.tolist() == [0.0] * 3
        assert kl.tolist() == [0.0] * 3
        assert v.grad.abs().max() == 0
    else:
        assert v.grad.abs().max() > 0


def test_the_gradient_flows_through_the_mean_and_not_through_the_stored_latents() -> None:
    kernel = FlowSdeKernel(0.7)
    x, v, noise = tensors(9)
    v.requires_grad_()
    step = kernel.transition(x, v, column(0.7), column(0.6))
    kernel.log_prob(kernel.draw(step, noise), step).sum().backward()
    assert v.grad is not None
    size = noise[0].numel()
    expected = (1 + 0.7**2 / 2) * (0.6 - 0.7) * noise / step.std.detach() / size  # section 1.9: (1/D)(1 + eta^2/2) dt / std z
    assert (v.grad - expected).abs().max() <= 1e-12


@pytest.mark.parametrize("kernel", [CpsKernel(0.6), DpmSdeKernel(0.6), DpmSdeKernel(math.sqrt(2))])
@pytest.mark.parametrize("t_next", [0.96, 0.5, 0.0089])
def test_cps_and_dpm_sde_keep_the_coefficients_of_signal_and_noise(kernel: TransitionKernel, t_next: float) -> None:
    """K7: with v chosen so that epshat = 0 the mean is (1-t') x0hat; with x0hat = 0 it is c epshat, and c^2 + s^2 = t'^2."""
    t, one = 0.97, torch.ones(1, 1, 1, 1, dtype=torch.float64)
    sigma, next_sigma = torch.tensor([t], dtype=torch.float64), torch.tensor([t_next], dtype=torch.float64)
    signal = kernel.transition((1 - t) * one, -one, sigma, next_sigma)  # x0hat = 1, epshat = 0
    noise = kernel.transition(t * one, one, sigma, next_sigma)  # x0hat = 0, epshat = 1
    assert signal.mean.item() == pytest.approx(1 - t_next, abs=1e-14)
    assert math.hypot(noise.mean.item(), noise.std.item()) == pytest.approx(t_next, abs=1e-14)


@pytest.mark.parametrize("kernel", [CpsKernel(0.8), DpmSdeKernel(0.7), DpmSdeKernel(math.sqrt(2))])
def test_cps_and_dpm_sde_on_point_mass_data_have_std_t(kernel: TransitionKernel) -> None:
    """K7: x_0 = 0, v = x / t; 1e5 draws give the std to 1 % (4.5 standard errors). Flow-SDE has excess noise there."""
    generator = torch.Generator().manual_seed(10)
    grid = sigma_grid(10, 3.0)

    def spread(kernel: TransitionKernel, num_steps: int) -> float:
        x = torch.randn(1, 100_000, 1, 1, generator=generator)
        for t, t_next in itertools.pairwise(grid[: num_steps + 1]):
            step = kernel.transition(x, x / t, t[None], t_next[None])
            x = kernel.draw(step, torch.randn(x.shape, generator=generator))
        return x.std().item()

    for num_steps in (2, 5, 8):
        assert spread(kernel, num_steps) == pytest.approx(float(grid[num_steps]), rel=0.01)
    assert spread(FlowSdeKernel(0.7), 8) > 1.05 * float(grid[8])


@pytest.mark.parametrize(("t", "t_next"), [(0.96, 0.913), (0.7, 0.6), (0.278, 0.0089)])
def test_the_exact_kl_is_the_closed_form(t: float, t_next: float) -> None:
    """K11, 1e-10: against torch's kl_divergence, a NumPy oracle, and the velocity form; flow_grpo's is |dt| times smaller."""
    eta = 0.7
    x, v, v_ref = tensors(11)
    kernel = FlowSdeKernel(eta)
    step, ref = (kernel.transition(x, u, column(t), column(t_next)) for u in (v, v_ref))
    exact = kernel.kl(step.mean, ref.mean, step, "exact")
    std = step.std.expand_as(step.mean)
    theirs = torch.distributions.kl_divergence(torch.distributions.Normal(step.mean, std), torch.distributions.Normal(ref.mean, std))
    assert (exact - theirs.flatten(1).mean(1)).abs().max() <= 1e-10
    assert exact[0].item() == pytest.approx(oracles.gaussian_kl(step.mean[0].numpy(), ref.mean[0].numpy(), float(step.std[0])), abs=1e-10)
    dt = t - t_next
    factor = (1 + eta**2 / 2) ** 2 * dt * (1 - t) / (2 * eta**2 * t)
    assert (exact - factor * (v - v_ref).square().flatten(1).mean(1)).abs().max() <= 1e-10
    assert (kernel.kl(step.mean, ref.mean, step, "flow_grpo") - dt * exact).abs().max() <= 1e-10


def test_the_kl_of_equal_means_is_exactly_zero() -> None:
    x, v, _ = tensors(12, torch.float32)
    step = FlowSdeKernel(0.7).transition(x, v, column(0.7), column(0.6))
    assert FlowSdeKernel(0.7).kl(step.mean, step.mean.clone(), step, "exact").tolist() == [0.0] * 3


@pytest.mark.parametrize("kernel", [OdeKernel(), FlowSdeKernel(0.7), DanceSdeKernel(0.3), CpsKernel(0.8), DpmSdeKernel(0.7)])
def test_halves_are_upcast_before_the_formula(kernel: TransitionKernel) -> None:
    x, v, _ = tensors(13, torch.bfloat16)
    low = kernel.transition(x, v, column(0.7), column(0.6))
    full = kernel.transition(x.float(), v.float(), column(0.7), column(0.6))
    assert low.mean.dtype == torch.float32
    assert torch.equal(low.mean, full.mean)
    assert torch.equal(low.std, full.std)


def test_rows_may_stand_at_different_sigmas() -> None:
    x, v, _ = tensors(14)
    t, t_next = torch.tensor([1.0, 0.7, 0.0089]), torch.tensor([0.96, 0.6, 0.0])
    together = FlowSdeKernel(0.7).transition(x, v, t, t_next)
    for row in range(3):
        alone = FlowSdeKernel(0.7).transition(x[row : row + 1], v[row : row + 1], t[row : row + 1], t_next[row : row + 1])
        assert torch.equal(together.mean[row : row + 1], alone.mean)
        assert torch.equal(together.std[row : row + 1], alone.std)


def test_the_estimates_recover_the_ends_of_the_path() -> None:
    clean, noise, _ = tensors(15)
    x = 0.3 * clean + 0.7 * noise
    assert (clean_estimate(x, noise - clean, column(0.7)) - clean).abs().max() <= 1e-14
    assert (noise_estimate(x, noise - clean, column(0.7)) - noise).abs().max() <= 1e-14


def test_flags_tell_what_a_kernel_can_do() -> None:
    flags = {
        name: (k.has_log_prob, k.has_gaussian_kl, k.has_last_log_prob, k.consistent_marginals)
        for name in ("ode", "flow_sde", "dance_sde", "cps", "dpm_sde")
        for k in [make_kernel(name, 0.7)]
    }
    assert flags == {
        "ode": (False, False, False, True),
        "flow_sde": (True, True, True, True),
        "dance_sde": (True, True, True, True),
        "cps": (True, True, False, False),
        "dpm_sde": (True, True, False, True),
    }


def test_the_config_offers_each_kernel_and_knows_whose_last_step_is_a_point() -> None:
    offered = get_args(RolloutConfig.model_fields["kernel"].annotation)
    noisy = {name: make_kernel(name, 0.7) for name in offered if name != "ode"}
    assert {name for name, kernel in noisy.items() if not kernel.has_last_log_prob} == set(QUIET_AT_THE_END)


@pytest.mark.parametrize(("name", "eta"), [("euler", 0.7), ("cps", 1.5), ("flow_sde", -0.1)])
def test_a_wrong_name_or_noise_level_is_a_config_error(name: str, eta: float) -> None:
    with pytest.raises(ConfigError, match=r"rollout\."):
        make_kernel(name, eta)


def test_the_ode_kernel_refuses_a_log_prob_and_a_kl() -> None:
    x, v, _ = tensors(16)
    step = OdeKernel().transition(x, v, column(0.7), column(0.6))
    with pytest.raises(ConfigError, match="log-prob"):
        OdeKernel().log_prob(x, step)
    with pytest.raises(ConfigError, match="KL"):
        OdeKernel().kl(step.mean, step.mean, step, "exact")
