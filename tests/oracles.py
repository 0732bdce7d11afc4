"""Slow NumPy float64 oracles, written like the papers: one loop, one symbol, one line a formula."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class GaussianMixture:
    """p_0 = sum_k w_k N(m_k, c_k^2) in one dimension, with everything a flow needs in closed form (algorithms, section 24)."""

    weights: tuple[float, ...]
    means: tuple[float, ...]
    stds: tuple[float, ...]

    def variances(self, t: float) -> list[float]:
        """V_k = (1-t)^2 c_k^2 + t^2."""
        return [(1 - t) ** 2 * c**2 + t**2 for c in self.stds]

    def velocity(self, x: Array, t: float) -> Array:
        """v = (x - E[x_0 | x]) / t with E[x_0 | x] = sum_k gamma_k (m_k + a c_k^2 / V_k (x - a m_k)), a = 1 - t."""
        a = 1 - t
        variances = self.variances(t)
        density = [
            w / math.sqrt(big_v) * np.exp(-((x - a * m) ** 2) / (2 * big_v))
            for w, m, big_v in zip(self.weights, self.means, variances, strict=True)
        ]
        total = np.sum(density, axis=0)
        clean = np.zeros_like(x)
        for gamma, m, c, big_v in zip(density, self.means, self.stds, variances, strict=True):
            clean += gamma / total * (m + a * c**2 / big_v * (x - a * m))
        return (x - clean) / t

    def cdf(self, x: Array, t: float) -> Array:
        """Distribution function of x_t."""
        parts = [w * ndtr((x - (1 - t) * m) / math.sqrt(v)) for w, m, v in zip(self.weights, self.means, self.variances(t), strict=True)]
        return np.asarray(np.sum(parts, axis=0))

    def wasserstein(self, samples: Array, t: float) -> float:
        """W1 between an empirical sample of x_t and the analytic marginal: the integral of |F_n - F|."""
        ordered = np.sort(samples)
        grid = np.linspace(min(ordered[0], -8.0), max(ordered[-1], 8.0), 20_001)
        empirical = np.searchsorted(ordered, grid, side="right") / len(ordered)
        return float(np.trapezoid(np.abs(empirical - self.cdf(grid, t)), grid))


def flow_sde(x: Array, v: Array, t: float, t_next: float, eta: float) -> tuple[Array, float, float]:
    """Return mean, std and s of Flow-GRPO's step (tbar = t_next at t = 1)."""
    tbar = t_next if t == 1 else t
    s = eta * math.sqrt(t / (1 - tbar))
    dt = t_next - t
    mean = x * (1 + s**2 * dt / (2 * t)) + v * (1 + s**2 * (1 - t) / (2 * t)) * dt
    return mean, s * math.sqrt(abs(dt)), s


def dance_sde(x: Array, v: Array, t: float, t_next: float, eta: float) -> tuple[Array, float, float]:
    """Return mean, std and s of DanceGRPO's step, by the score."""
    clean = x - t * v
    score = -(x - (1 - t) * clean) / t**2
    dt = t_next - t
    return x + (v - 0.5 * eta**2 * score) * dt, eta * math.sqrt(abs(dt)), eta


def cps(x: Array, v: Array, t: float, t_next: float, eta: float) -> tuple[Array, float, float]:
    """Return mean, std and s of coefficients-preserving sampling."""
    clean, noise = x - t * v, x + (1 - t) * v
    s = t_next * math.sin(eta * math.pi / 2)
    return (1 - t_next) * clean + math.sqrt(max(t_next**2 - s**2, 0.0)) * noise, s, s


def dpm_sde(x: Array, v: Array, t: float, t_next: float, eta: float) -> tuple[Array, float, float]:
    """Return mean, std and std / sqrt|dt| of SDE-DPM-Solver++ of order 1 with its noise's share eta^2 / 2, by lambda = log((1-t)/t)."""
    share, clean, dt = eta**2 / 2, x - t * v, t - t_next
    if t == 1 or t_next == 0:  # h is infinite
        kept = 1.0 if share == 0 else 0.0
        std = t_next * math.sqrt(1 - kept)
        return t_next / t * kept * x + (1 - t_next) * clean, std, std / math.sqrt(dt)
    h = math.log((1 - t_next) / t_next) - math.log((1 - t) / t)
    mean = t_next / t * math.exp(-share * h) * x - (1 - t_next) * math.expm1(-(1 + share) * h) * clean
    std = t_next * math.sqrt(-math.expm1(-2 * share * h))
    return mean, std, std / math.sqrt(dt)


def gaussian_log_prob(x_next: Array, mean: Array, std: float) -> float:
    """Mean over elements of log N(x_next; mean, std^2)."""
    total = 0.0
    for a, b in zip(x_next.ravel(), mean.ravel(), strict=True):
        total += -((a - b) ** 2) / (2 * std**2) - math.log(std) - 0.5 * math.log(2 * math.pi)
    return total / x_next.size


def gaussian_kl(mean: Array, ref_mean: Array, std: float) -> float:
    """Mean over elements of KL(N(mean, std^2) || N(ref_mean, std^2))."""
    return float(np.mean((mean - ref_mean) ** 2)) / (2 * std**2)
