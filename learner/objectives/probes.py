"""Where clean latents are noised: the sigmas and noises that every forward-process objective draws from its samples' seeds alone."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from pydantic import Field

from common.flow.noise import seeded_noise
from common.seeding import derive_seed
from learner.objectives.base import MicroBatch
from learner.objectives.settings import ObjectiveSettings, RunFacts

Times = Literal["grid", "grid_without_first", "stratified", "uniform", "logit_normal"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Probes:
    """Where a micro-batch is noised: n sigmas a sample with a noise each."""

    sigma: torch.Tensor  # [n, B]
    noise: torch.Tensor  # [n, B, C, h, w]


class ProbeSettings(ObjectiveSettings):
    """The keys of an objective that noises clean latents at sigmas of its choice; such objectives derive their settings from it."""

    timesteps_per_sample: int = Field(2, ge=1)  # n: sigmas an image is noised at in an update
    timestep_fraction: float = Field(1.0, gt=0, le=1)  # of the range, from high noise on, that they are drawn from
    times: Times = "grid"  # the sampler's own sigmas without replacement (with or without the first, t = 1), strata, uniform, logit-normal

    def problems(self, run: RunFacts) -> list[str]:
        """More sigmas than the grid has; a part of a logit-normal."""
        if self.times in ("grid", "grid_without_first"):
            return probe_problems(run.num_steps, self.timesteps_per_sample, self.timestep_fraction, self.times)
        if self.times == "logit_normal" and self.timestep_fraction < 1:
            return [
                f"learner.objective.timestep_fraction={self.timestep_fraction:g} cuts a range, and times='logit_normal' has none; leave it "
                "out, or choose times='uniform'"
            ]
        return []

    def draw(self, batch: MicroBatch, *, shared: bool = False) -> Probes:
        """The probes of a micro-batch; shared: one draw for all members of a group."""
        return draw_probes(batch, self.timesteps_per_sample, self.timestep_fraction, shared=shared, times=self.times)


def probe_steps(num_steps: int, timestep_fraction: float, times: Times = "grid") -> range:
    """Which of the sampler's sigmas, from high noise on, probes are drawn from; grid_without_first leaves t = 1 out."""
    return range(int(times == "grid_without_first"), max(1, round(timestep_fraction * num_steps)))


def probe_problems(num_steps: int, timesteps_per_sample: int, timestep_fraction: float, times: Times = "grid") -> list[str]:
    """Say when more sigmas are asked for than the grid has."""
    num_sigmas = len(probe_steps(num_steps, timestep_fraction, times))
    if timesteps_per_sample <= num_sigmas:
        return []
    return [
        f"learner.objective.timesteps_per_sample={timesteps_per_sample} exceeds the {num_sigmas} sigmas to draw from "
        f"(rollout.num_steps={num_steps} x timestep_fraction={timestep_fraction:g}); lower it"
    ]


def draw_probes(batch: MicroBatch, count: int, fraction: float = 1.0, *, shared: bool = False, times: Times = "grid") -> Probes:
    """Draw each sample's sigmas and fresh noise from its probe seed alone.

    Args:
        count: sigmas a sample.
        fraction: of the range, counted from high noise, that they are drawn from.
        shared: one draw for all members of a group.
        times: grid: of the sampler's own sigmas, without replacement. grid_without_first: the same but for t = 1. stratified: one uniform draw from each of `count` equal
            strata of (1 - fraction, 1], in random order. uniform: from (1 - fraction, 1]. logit_normal: sigmoid of a standard
            normal (Stable Diffusion 3, arXiv 2403.03206). None but the sampler's own is shifted for the resolution (flow_grpo's DPO
            draws logit-normal positions of the shifted grid: at SD3.5's shift of 3 a median of .75, here .5).
    """
    sigmas, noises = [], []
    for seed in batch.group_probe_seeds if shared else batch.probe_seeds:
        generator = np.random.Generator(np.random.Philox(key=derive_seed(seed, "sigma")))
        sigmas.append(_draw_sigmas(generator, batch.grid, count, fraction, times))
        noises.append(seeded_noise(derive_seed(seed, "noise"), (count, *batch.clean.shape[1:])))
    return Probes(sigma=torch.stack(sigmas, dim=1).to(batch.clean), noise=torch.stack(noises, dim=1).to(batch.clean))


def _draw_sigmas(generator: np.random.Generator, grid: torch.Tensor, count: int, fraction: float, times: Times) -> torch.Tensor:
    """[count] float32 on CPU."""
    if times in ("grid", "grid_without_first"):
        order = generator.permutation(list(probe_steps(len(grid), fraction, times)))
        return grid[torch.from_numpy(order[:count])]
    if times == "logit_normal":
        drawn = 1.0 / (1.0 + np.exp(-generator.standard_normal(count)))
    elif times == "uniform":
        drawn = 1.0 - fraction * generator.random(count)
    else:
        drawn = 1.0 - fraction * (generator.permutation(count) + generator.random(count)) / count
    return torch.from_numpy(drawn.astype(np.float32))
