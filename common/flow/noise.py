"""Noise that depends on what it is for, not on who draws it: the same on every device and for any number of workers."""

from typing import Literal

import numpy as np
import torch

from common.seeding import derive_seed

NoisePurpose = Literal["init", "step"]
SHARED: Literal["shared"] = "shared"  # the sample key of an initial noise that the whole group starts from


def seeded_noise(seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Return standard normal noise of a seed, CPU float32.

    NumPy's Philox takes the whole 63-bit seed as its key and its normals do not depend on vector instructions; torch's CPU
    generator keeps 32 bits of a seed, so that a long run would meet equal noises by chance.
    """
    return torch.from_numpy(np.random.Generator(np.random.Philox(key=seed)).standard_normal(shape, dtype=np.float32))


def draw_noise(
    run_seed: int, group: int, sample: int | Literal["shared"], purpose: NoisePurpose, *, step: int, shape: tuple[int, ...]
) -> torch.Tensor:
    """Return the standard normal noise of one (run, group, sample, purpose, step), CPU float32.

    Args:
        run_seed: the run's seed.
        group: the group's number.
        sample: the sample's index in its group, or "shared" for an initial noise of the whole group.
        purpose: "init" (step 0) for the start, "step" for the noise of a stochastic step.
        step: the denoising step's index.
        shape: C, h, w.
    """
    return seeded_noise(derive_seed(run_seed, group, sample, purpose, step), shape)


def initial_noise(run_seed: int, group: int, sample: int, shape: tuple[int, ...], *, shared: bool) -> torch.Tensor:
    """Return a sample's start x_T [C, h, w], one for the whole group when shared."""
    return draw_noise(run_seed, group, SHARED if shared else sample, "init", step=0, shape=shape)
