"""One denoising step from sigma to next_sigma: mean, std, draw, log-prob. Sampling and recomputation both call this.

Symbols (arXiv 2505.05470): x latents, v velocity = eps - x_0, t sigma, t' next sigma, dt = t' - t < 0, eta noise level,
x0hat = x - t v, epshat = x + (1 - t) v, D latent elements. Formulas are evaluated in float32 at least: halves are upcast
first, float64 stays float64. Each tensor argument of one value a sample ([B]) is broadcast over the latents.
"""

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from common.errors import ConfigError

KlConvention = Literal["flow_grpo", "exact"]
LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)


@dataclass(frozen=True, slots=True, kw_only=True)
class Transition:
    """The distribution of the next latents: Normal(mean, std), or a point where std is 0."""

    mean: torch.Tensor  # [B, C, h, w]
    std: torch.Tensor  # [B, 1, 1, 1]
    diffusion: torch.Tensor  # [B, 1, 1, 1]; s(t), where std = s sqrt|dt| for an SDE and std = s for cps


class TransitionKernel(Protocol):
    """How latents move by one step. Pure: noise comes in, nothing is drawn inside."""

    @property
    def has_log_prob(self) -> bool:
        """Whether log_prob is defined (a step that is a point has none)."""
        ...

    @property
    def has_gaussian_kl(self) -> bool:
        """Whether kl is defined."""
        ...

    @property
    def has_last_log_prob(self) -> bool:
        """Whether the step to sigma 0 has a log-prob too; where not, it is masked to 0 and must not be trained."""
        ...

    @property
    def consistent_marginals(self) -> bool:
        """Whether the marginals tend to the ODE's as the steps shrink."""
        ...

    def transition(self, latents: torch.Tensor, velocity: torch.Tensor, sigma: torch.Tensor, next_sigma: torch.Tensor) -> Transition:
        """Return the distribution of the next latents; latents, velocity [B, C, h, w], sigma, next_sigma [B]."""
        ...

    def draw(self, transition: Transition, noise: torch.Tensor) -> torch.Tensor:
        """Return the next latents [B, C, h, w] for standard normal noise of that shape."""
        ...

    def log_prob(self, next_latents: torch.Tensor, transition: Transition) -> torch.Tensor:
        """Return [B], the mean over latent elements; no gradient flows through next_latents. 0 where std is 0."""
        ...

    def kl(self, mean: torch.Tensor, ref_mean: torch.Tensor, transition: Transition, convention: KlConvention) -> torch.Tensor:
        """Return [B], KL(N(mean, std) || N(ref_mean, std)), mean over latent elements. 0 where std is 0."""
        ...


def clean_estimate(latents: torch.Tensor, velocity: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Return x0hat = x - t v, [B, C, h, w] float32 or wider."""
    x, v, t, _ = _aligned(latents, velocity, sigma, sigma)
    return x - t * v


def noise_estimate(latents: torch.Tensor, velocity: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Return epshat = x + (1 - t) v, [B, C, h, w] float32 or wider; the score is -epshat / t."""
    x, v, t, _ = _aligned(latents, velocity, sigma, sigma)
    return x + (1 - t) * v


@dataclass(frozen=True, slots=True)
class _GaussianKernel:
    """What every noisy kernel shares: draw, log-density and KL of a Normal with one std a sample."""

    noise_level: float  # eta

    @property
    def has_log_prob(self) -> bool:
        return self.noise_level > 0

    @property
    def has_gaussian_kl(self) -> bool:
        return self.noise_level > 0

    @property
    def has_last_log_prob(self) -> bool:
        return self.noise_level > 0

    @property
    def consistent_marginals(self) -> bool:
        return True

    def draw(self, transition: Transition, noise: torch.Tensor) -> torch.Tensor:
        """x' = mean + std z."""
        return transition.mean + transition.std * noise

    def log_prob(self, next_latents: torch.Tensor, transition: Transition) -> torch.Tensor:
        """mean_d [ -(x' - mean)^2 / (2 std^2) - log std - log(2 pi) / 2 ]."""
        std = _positive(transition.std)
        z = (next_latents.detach() - transition.mean) / std
        density = -0.5 * z.square() - torch.log(std) - LOG_SQRT_2PI
        return _where_noisy(density.flatten(1).mean(1), transition.std)

    def kl(self, mean: torch.Tensor, ref_mean: torch.Tensor, transition: Transition, convention: KlConvention) -> torch.Tensor:
        """mean_d (mean - ref_mean)^2 / (2 scale^2): scale = std when exact; flow_grpo's code omits |dt|, so scale = s there."""
        scale = _positive(transition.std if convention == "exact" else transition.diffusion)
        return _where_noisy(((mean - ref_mean) / scale).square().flatten(1).mean(1) / 2, transition.std)


@dataclass(frozen=True, slots=True)
class OdeKernel:
    """Euler: x' = x + v dt, a point."""

    @property
    def has_log_prob(self) -> bool:
        return False

    @property
    def has_gaussian_kl(self) -> bool:
        return False

    @property
    def has_last_log_prob(self) -> bool:
        return False

    @property
    def consistent_marginals(self) -> bool:
        return True

    def transition(self, latents: torch.Tensor, velocity: torch.Tensor, sigma: torch.Tensor, next_sigma: torch.Tensor) -> Transition:
        """Return the point x + v dt with std 0."""
        x, v, t, t_next = _aligned(latents, velocity, sigma, next_sigma)
        return Transition(mean=x + v * (t_next - t), std=torch.zeros_like(t), diffusion=torch.zeros_like(t))

    def draw(self, transition: Transition, noise: torch.Tensor) -> torch.Tensor:
        """Return the mean; the noise is not used."""
        return transition.mean

    def log_prob(self, next_latents: torch.Tensor, transition: Transition) -> torch.Tensor:
        """Raise ConfigError: a point has no density."""
        raise ConfigError("kernel ode: a log-prob was asked, a point has none; set rollout.kernel = flow_sde, dance_sde, cps or dpm_sde")

    def kl(self, mean: torch.Tensor, ref_mean: torch.Tensor, transition: Transition, convention: KlConvention) -> torch.Tensor:
        """Raise ConfigError: two points have no finite KL."""
        raise ConfigError("kernel ode: a KL was asked, a deterministic step has none; use a velocity KL or rollout.kernel = flow_sde")


@dataclass(frozen=True, slots=True)
class FlowSdeKernel(_GaussianKernel):
    """Flow-GRPO's SDE (arXiv 2505.05470): s(t) = eta sqrt(t / (1 - tbar)).

    mean = x (1 + s^2 dt / (2t)) + v (1 + s^2 (1-t) / (2t)) dt, std = s sqrt|dt|. tbar = t, but at t = 1, where s would be
    infinite, tbar = sigma_grid[1], as in the published code: the first step's next_sigma. s^2 / t is used as one number
    (eta^2 / (1 - tbar)), so that nothing is divided by t.
    """

    def transition(self, latents: torch.Tensor, velocity: torch.Tensor, sigma: torch.Tensor, next_sigma: torch.Tensor) -> Transition:
        """Return mean and std of the step."""
        x, v, t, t_next = _aligned(latents, velocity, sigma, next_sigma)
        dt = t_next - t
        half_rate = self.noise_level**2 / (2 * (1 - torch.where(t >= 1, t_next, t)))  # s^2 / (2t)
        mean = x * (1 + half_rate * dt) + v * (1 + half_rate * (1 - t)) * dt
        diffusion = torch.sqrt(2 * half_rate * t)
        return Transition(mean=mean, std=diffusion * torch.sqrt(-dt), diffusion=diffusion)


@dataclass(frozen=True, slots=True)
class DanceSdeKernel(_GaussianKernel):
    """DanceGRPO's SDE (arXiv 2505.07818): the same drift with s = eta constant.

    Deviation: the published code hands the last step's x0hat to the reward model; here the last step is a step like the
    others, and an ODE step when the window excludes it, which is x0hat as well.
    """

    def transition(self, latents: torch.Tensor, velocity: torch.Tensor, sigma: torch.Tensor, next_sigma: torch.Tensor) -> Transition:
        """mean = x + (v + eta^2 epshat / (2t)) dt, std = eta sqrt|dt|."""
        x, v, t, t_next = _aligned(latents, velocity, sigma, next_sigma)
        dt = t_next - t
        mean = x + (v + self.noise_level**2 / (2 * t) * (x + (1 - t) * v)) * dt
        diffusion = torch.full_like(t, self.noise_level)
        return Transition(mean=mean, std=diffusion * torch.sqrt(-dt), diffusion=diffusion)


@dataclass(frozen=True, slots=True)
class CpsKernel(_GaussianKernel):
    """Coefficients-preserving sampling (FlowCPS): part of the next noise is fresh, its total is t'. No sqrt|dt|.

    Not an SDE with the ODE's marginals: the excess noise of few-step SDEs is gone, a bias stays however many the steps.
    At the last step t' = 0, std = 0: the log-prob is masked to 0.
    """

    @property
    def has_last_log_prob(self) -> bool:
        return False

    @property
    def consistent_marginals(self) -> bool:
        return False

    def transition(self, latents: torch.Tensor, velocity: torch.Tensor, sigma: torch.Tensor, next_sigma: torch.Tensor) -> Transition:
        """mean = (1-t') x0hat + sqrt(t'^2 - s^2) epshat, std = s = t' sin(eta pi/2); the root is t' cos(eta pi/2)."""
        x, v, t, t_next = _aligned(latents, velocity, sigma, next_sigma)
        angle = self.noise_level * math.pi / 2
        mean = (1 - t_next) * (x - t * v) + t_next * math.cos(angle) * (x + (1 - t) * v)
        std = t_next * math.sin(angle)
        return Transition(mean=mean, std=std, diffusion=std)

    def log_prob(self, next_latents: torch.Tensor, transition: Transition) -> torch.Tensor:
        """-mean_d (x' - mean)^2: no 1 / (2 s^2) and no constants, as published, so ratios are tempered by 2 s^2."""
        return _where_noisy(-(next_latents.detach() - transition.mean).square().flatten(1).mean(1), transition.std)


@dataclass(frozen=True, slots=True)
class DpmSdeKernel(_GaussianKernel):
    """flow_sde's SDE, each step solved exactly for a fixed x0hat: SDE-DPM-Solver++ of order 1 (arXiv 2211.01095).

    With q = exp(-h) = ((1-t) t') / (t (1-t')), h the step in log((1-t) / t), and e = eta^2 / 2:
    mean = (t'/t) q^e x + (1-t') (1 - q^(1+e)) x0hat, std = t' sqrt(1 - q^(2e)). The published solver is eta = sqrt(2) (e = 1).
    Signal and noise keep their coefficients 1-t' and t' at any number of steps, as under cps, and the marginals tend to the ODE's,
    which those of cps do not. A step from t = 1, where q = 0, replaces all noise; at the last step std = 0: the log-prob is masked to 0.
    """

    @property
    def has_last_log_prob(self) -> bool:
        return False

    def transition(self, latents: torch.Tensor, velocity: torch.Tensor, sigma: torch.Tensor, next_sigma: torch.Tensor) -> Transition:
        """Return mean and std of the step; diffusion = std / sqrt|dt|, the step's average s."""
        x, v, t, t_next = _aligned(latents, velocity, sigma, next_sigma)
        e = self.noise_level**2 / 2
        q = (1 - t) * t_next / (t * (1 - t_next))
        mean = t_next / t * q**e * x + (1 - t_next) * (1 - q ** (1 + e)) * (x - t * v)
        std = t_next * torch.sqrt(1 - q ** (2 * e))
        return Transition(mean=mean, std=std, diffusion=std / torch.sqrt(t - t_next))


def make_kernel(name: str, noise_level: float) -> TransitionKernel:
    """Return the kernel of that name.

    Raises:
        ConfigError: an unknown name, a negative noise level, or more than 1 for cps.
    """
    if noise_level < 0 or (name == "cps" and noise_level > 1):
        raise ConfigError(f"kernel {name}: noise_level {noise_level} came; it is >= 0, for cps in [0, 1]; mend rollout.noise_level")
    match name:
        case "ode":
            return OdeKernel()
        case "flow_sde":
            return FlowSdeKernel(noise_level)
        case "dance_sde":
            return DanceSdeKernel(noise_level)
        case "cps":
            return CpsKernel(noise_level)
        case "dpm_sde":
            return DpmSdeKernel(noise_level)
    raise ConfigError(f"kernel {name!r} is not known; set rollout.kernel to ode, flow_sde, dance_sde, cps or dpm_sde")


def _aligned(
    latents: torch.Tensor, velocity: torch.Tensor, sigma: torch.Tensor, next_sigma: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Upcast to float32 at least and give sigmas the latents' rank."""
    dtype = torch.promote_types(latents.dtype, torch.float32)
    column = (-1,) + (1,) * (latents.ndim - 1)
    return latents.to(dtype), velocity.to(dtype), sigma.to(dtype).reshape(column), next_sigma.to(dtype).reshape(column)


def _positive(std: torch.Tensor) -> torch.Tensor:
    """Put 1 where std is 0, so that masked rows give no NaN, nor their gradients."""
    return torch.where(std > 0, std, torch.ones_like(std))


def _where_noisy(values: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    return torch.where(std.flatten() > 0, values, torch.zeros_like(values))
