"""K8 to K10: on an analytic mixture the SDE kernels keep the ODE's marginals, and a wrong score is caught."""

import functools
import itertools
import math

import numpy as np
import pytest
import torch

from common.flow.grid import shift_sigma
from common.flow.kernels import DanceSdeKernel, FlowSdeKernel, OdeKernel, Transition, TransitionKernel, make_kernel
from tests.oracles import GaussianMixture

MIXTURE = GaussianMixture(weights=(0.4, 0.6), means=(-1.5, 1.0), stds=(0.3, 0.5))
NUM_PARTICLES = 200_000  # the Monte Carlo floor of W1 is then about .003
BOUNDS = {40: 0.06, 160: 0.02, 640: 0.008}
KERNELS = [("ode", 0.0), ("flow_sde", 0.7), ("dance_sde", 0.3), ("dance_sde", 0.7)]


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
    generator = torch.Generator().manual_seed(num_steps)
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
