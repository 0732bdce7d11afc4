"""Where clean latents are noised: the sigmas and noises that every forward-process objective draws from its samples' seeds alone."""

from dataclasses import dataclass

import numpy as np
import torch

from common.flow.noise import seeded_noise
from common.seeding import derive_seed
from learner.objectives.base import MicroBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Probes:
    """Where a micro-batch is noised: n sigmas a sample with a noise each."""

    sigma: torch.Tensor  # [n, B]
    noise: torch.Tensor  # [n, B, C, h, w]


def num_probe_sigmas(num_steps: int, timestep_fraction: float) -> int:
    """How many of the sampler's sigmas, from high noise, probes are drawn from."""
    return max(1, round(timestep_fraction * num_steps))


def probe_problems(num_steps: int, timesteps_per_sample: int, timestep_fraction: float) -> list[str]:
    """Say when more sigmas are asked for than the grid has."""
    num_sigmas = num_probe_sigmas(num_steps, timestep_fraction)
    if timesteps_per_sample <= num_sigmas:
        return []
    return [
        f"learner.objective.timesteps_per_sample={timesteps_per_sample} exceeds the {num_sigmas} sigmas to draw from "
        f"(rollout.num_steps={num_steps} x timestep_fraction={timestep_fraction:g}); lower it"
    ]


def draw_probes(batch: MicroBatch, count: int, fraction: float = 1.0, *, shared: bool = False) -> Probes:
    """Draw each sample's sigmas and fresh noise from its probe seed alone.

    Args:
        count: sigmas a sample, without replacement.
        fraction: of the sampler's own grid, counted from high noise, that they are drawn from.
        shared: one draw for all members of a group.
    """
    num_sigmas = num_probe_sigmas(len(batch.grid), fraction)
    sigmas, noises = [], []
    for seed in batch.group_probe_seeds if shared else batch.probe_seeds:
        order = np.random.Generator(np.random.Philox(key=derive_seed(seed, "sigma"))).permutation(num_sigmas)
        sigmas.append(batch.grid[torch.from_numpy(order[:count])])
        noises.append(seeded_noise(derive_seed(seed, "noise"), (count, *batch.clean.shape[1:])))
    return Probes(sigma=torch.stack(sigmas, dim=1).to(batch.clean), noise=torch.stack(noises, dim=1).to(batch.clean))
