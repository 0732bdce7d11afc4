"""K8 to K10 and K13: on analytic data the SDE kernels keep the ODE's marginals with errors of first order; a wrong score is caught."""

import functools
import itertools
import math

import numpy as np
import pytest
import torch

from common.flow.grid import shift_sigma, sigma_grid
from common.flow.kernels import DanceSdeKernel, DpmSdeKernel, FlowSdeKernel, OdeKernel, Transition, TransitionKernel, make_kernel
from tests.oracles import GaussianMixture

MIXTURE = GaussianMixture(weights=(0.4, 0.6), means=(-1.5, 1.0), stds=(0.3, 0.5))
NUM_PARTICLES = 200_000  # the Monte Carlo floor of W1 is then about .003
BOUNDS = {40: 0.06, 160: 0.02, 640: 0.008}
KERNELS = [("ode", 0.0), ("flow_sde", 0.7), ("dance_sde", 0.3), ("dance_sde", 0.7), ("dpm_sde", 0.7)]


def velocity(x: torch.Tensor, t: float) -> torch.Tensor:
    """The mixture's exact velocity in float32 torch, for two components (their posterior is one sigmoid)."""
    a = 1 - t
    (w1, w2), (m1, m2), (c1, c2) = MIXTURE.weights, MIXTURE.means, MIXTURE.stds
    v1, v2 = MIXTURE.variances(t)
    logit = math.log(w2 / w1) + 0.5 * math.log(v1 / v2) + (x - a * m1) ** 2 / (2 * v1) - (x - a * m2) ** 2 / (2 * v2)
    first = m1 + a * c1**2 / v1 * (x - a * m1)
    second = m2 + a * c2**2 / v2 * (x - a * m2)
    return (x - torch.lerp(first, second, torch.sigmoid(logit))) / t


def distances(kernel: TransitionKernel, num_steps: int) -> tuple[float, float]:
    """W1 to the analytic marginal halfway (the first t <= .5) and at the end, in float32 with the real kernel."""
    generator = torch.Generator().manual_seed(num_steps + 1)  # a draw of shares in fifty adds .005 to W1: seed 640 is one, for dpm_sde
    grid = shift_sigma(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64), 3.0)
    x = torch.randn(1, NUM_PARTICLES, 1, 1, generator=generator)
    halfway = math.nan
    for t, t_next in itertools.pairwise(grid):
        step = kernel.transition(x, velocity(x, float(t)), t[None], t_next[None])
        x = step.mean if isinstance(kernel, OdeKernel) else kernel.draw(step, torch.randn(x.shape, generator=generator))
        if math.isnan(halfway) and t_next <= 0.5:
            halfway = MIXTURE.wasserstein(x.double().numpy().ravel(), float(t_next))
    return halfway, MIXTURE.wasserstein(x.double().numpy().ravel(), 0.0)


@functools.cache
def named_distances(name: str, eta: float, num_steps: int) -> tuple[float, float]:
    return distances(make_kernel(name, eta), num_steps)


def test_the_fast_velocity_is_the_oracles() -> None:
    x = np.linspace(-4, 4, 401)
    for t in (1.0, 0.5, 0.01):
        ours = velocity(torch.from_numpy(x), t).numpy()
        assert np.abs(ours - MIXTURE.velocity(x, t)).max() <= 1e-10


def test_the_distance_itself_is_right() -> None:
    """W1 of a sample shifted by d is d (up to the floor)."""
    generator = np.random.default_rng(0)
    component = generator.choice(2, NUM_PARTICLES, p=MIXTURE.weights)
    x = np.asarray(MIXTURE.means)[component] + np.asarray(MIXTURE.stds)[component] * generator.standard_normal(NUM_PARTICLES)
    assert MIXTURE.wasserstein(x, 0.0) < 0.006
    assert MIXTURE.wasserstein(x + 0.1, 0.0) == pytest.approx(0.1, abs=0.006)


@pytest.mark.parametrize(("name", "eta"), KERNELS)
@pytest.mark.parametrize("num_steps", [40, 160, 640])
def test_the_final_marginal_is_the_data(name: str, eta: float, num_steps: int) -> None:
    """K8."""
    assert named_distances(name, eta, num_steps)[1] < BOUNDS[num_steps]


@pytest.mark.parametrize(("name", "eta"), KERNELS)
def test_the_error_is_of_first_order(name: str, eta: float) -> None:
    """K8: four times the steps, W1 divided by 2 to 6."""
    ratio = named_distances(name, eta, 40)[1] / named_distances(name, eta, 160)[1]
    assert 2 <= ratio <= 6


@pytest.mark.parametrize(("name", "eta"), KERNELS)
def test_the_marginal_halfway_is_the_paths(name: str, eta: float) -> None:
    """K9."""
    assert named_distances(name, eta, 160)[0] < 0.015


def test_cps_keeps_a_bias_however_many_the_steps() -> None:
    """K8's documentation: the plateau of cps at noise level .8."""
    assert named_distances("cps", 0.8, 640)[1] > 0.05


K13_DATA = (0.3, 0.5)  # mean and std


def affine_errors(kernel: TransitionKernel, grid: torch.Tensor, data: tuple[float, float] = K13_DATA) -> tuple[float, float]:
    """Errors of mean and std at the end of a float64 grid, on Gaussian data with the exact velocity, from the exact marginal at its start.

    Everything is affine, so that a step on two points gives its slope and intercept: no draws.
    """
    m, c = data
    mean, variance = float(1 - grid[0]) * m, (float(1 - grid[0]) * c) ** 2 + float(grid[0]) ** 2
    for t, t_next in itertools.pairwise(grid):
        x = torch.tensor([mean, mean + 1.0], dtype=torch.float64).view(2, 1, 1, 1)
        gain = (1 - t) * c**2 / (((1 - t) * c) ** 2 + t**2)
        clean = m + gain * (x - (1 - t) * m)  # E[x_0 | x_t]
        step = kernel.transition(x, (x - clean) / t, t.expand(2), t_next.expand(2))
        low, high = step.mean.flatten().tolist()
        mean, variance = low, (high - low) ** 2 * variance + float(step.std[0]) ** 2
    return mean - m, math.sqrt(variance) - c


def k13_grid(num_steps: int) -> torch.Tensor:
    """Shift 3, from t = .999."""
    return shift_sigma(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64), 3.0).clamp(max=0.999)


K13_STEPS = (10, 20, 40, 80, 160)


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        (DpmSdeKernel(math.sqrt(2)), (-0.170, -0.112, -0.0688, -0.0396, -0.0218)),  # SDE-1
        (DpmSdeKernel(0.0), (-0.130, -0.0684, -0.0353, -0.0179, -0.0090)),  # ODE-1
        (OdeKernel(), (-0.130, -0.0684, -0.0353, -0.0179, -0.0090)),  # the same step: t'/t x + (1 - t'/t) x0hat
    ],
)
def test_the_solvers_of_order_one_have_the_published_errors_on_a_gaussian(kernel: TransitionKernel, expected: tuple[float, ...]) -> None:
    """K13: the mean is exact (1e-12), the std as tabulated (its last digit)."""
    errors = [affine_errors(kernel, k13_grid(num_steps)) for num_steps in K13_STEPS]
    assert max(abs(mean) for mean, _ in errors) <= 1e-12
    assert [std for _, std in errors] == pytest.approx(expected, abs=5e-4)


def test_the_ode_converges_with_order_one_and_the_sde_towards_it() -> None:
    """K13: twice the steps divide the ODE's error by 1.85 to 2.1 from 20 steps on, the SDE's by more than 1.5 from 40 on."""
    for kernel, steps, low, high in [(DpmSdeKernel(0.0), (20, 40, 80), 1.85, 2.1), (DpmSdeKernel(math.sqrt(2)), (40, 80), 1.5, 2.0)]:
        for num_steps in steps:
            assert low < affine_errors(kernel, k13_grid(num_steps))[1] / affine_errors(kernel, k13_grid(2 * num_steps))[1] < high


def test_on_the_grid_that_is_sampled_dpm_sde_leaves_no_noise_where_flow_sde_does() -> None:
    """Ten steps at eta .7: on one point flow_sde has a std of .25 at sigma .009 and of .06 at the end, dpm_sde .009 and 0."""
    grid, point = sigma_grid(10, 3.0).double(), (0.0, 0.0)
    euler, exact = FlowSdeKernel(0.7), DpmSdeKernel(0.7)
    assert [affine_errors(kernel, grid[:-1], point)[1] for kernel in (euler, exact)] == pytest.approx([0.249, float(grid[-2])], abs=1e-3)
    assert [affine_errors(kernel, grid, point)[1] for kernel in (euler, exact)] == pytest.approx([0.062, 0.0], abs=1e-3)
    ode, exact_error, euler_error = (affine_errors(kernel, grid)[1] for kernel in (OdeKernel(), exact, euler))
    assert exact_error == pytest.approx(ode, abs=0.015)
    assert ode < euler_error < 0  # on N(.3, .5^2) flow_sde's excess makes up for half of what ten steps contract


class _ScoreMutant:
    """An SDE whose score term is multiplied: -1 flips it, 2 forgets the half of s^2 / 2."""

    def __init__(self, kernel: TransitionKernel, factor: float) -> None:
        self._kernel, self._factor = kernel, factor

    def transition(self, latents: torch.Tensor, velocity: torch.Tensor, sigma: torch.Tensor, next_sigma: torch.Tensor) -> Transition:
        right = self._kernel.transition(latents, velocity, sigma, next_sigma)
        euler = OdeKernel().transition(latents, velocity, sigma, next_sigma).mean
        return Transition(mean=euler + self._factor * (right.mean - euler), std=right.std, diffusion=right.diffusion)

    def __getattr__(self, name: str) -> object:
        return getattr(self._kernel, name)


@pytest.mark.parametrize("kernel", [FlowSdeKernel(0.7), DanceSdeKernel(0.7)])
@pytest.mark.parametrize("factor", [-1.0, 2.0])
def test_a_wrong_score_term_fails_the_marginal_test(kernel: TransitionKernel, factor: float) -> None:
    """K10: the mutants break K8's bounds at 40 and at 160 steps; with factor 1 the wrapper passes them."""
    for num_steps in (40, 160):
        assert distances(_ScoreMutant(kernel, factor), num_steps)[1] > BOUNDS[num_steps]  # type: ignore[arg-type]
    assert distances(_ScoreMutant(kernel, 1.0), 40)[1] < BOUNDS[40]  # type: ignore[arg-type]
