"""O10's world: a two-dimensional mixture of eight modes on a circle, a small MLP as adapter, a reward near one mode."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from common.types import SamplerSpec
from learner.config import LearnerConfig
from learner.update import Learner, make_learner
from tests.learner_fakes import manifest_of, sample_groups, sampler_spec, score_by_latents
from tests.learner_policies import circle_modes, mixture_policy

TARGET = circle_modes()[0].numpy()
GROUPS, GROUP_SIZE = 8, 24


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureCase:
    """How an objective is trained here."""

    config: LearnerConfig
    spec: SamplerSpec
    updates: int


def near_target(clean: NDArray[np.float32]) -> float:
    """A smooth indicator of the mode at (2, 0)."""
    return float(np.exp(-np.square(clean - TARGET).sum() / 2))


def share_of_target(learner: Learner, snapshot: str) -> float:
    """How many of 512 ODE samples lie nearest to the target mode, on fixed seeds."""
    spec = sampler_spec(kernel="ode", num_steps=12, window=())
    with learner.policy.using(learner.snapshot_state(snapshot)):
        groups = sample_groups(learner.policy, [10_000], 512, spec)
    clean = torch.from_numpy(np.stack([t.final_latents.reshape(-1) for t in groups[0].trajectories]))
    return float((torch.cdist(clean, circle_modes()).argmin(1) == 0).float().mean())


def train(case: MixtureCase, updates: int | None = None, reward: Callable[[NDArray[np.float32]], float] = near_target) -> Learner:
    """Train the mixture policy on a reward of its clean latents; each update samples with the snapshot that the case names."""
    learner = make_learner(mixture_policy(), case.config, {"r": 1.0}, 5)
    for update in range(1, (case.updates if updates is None else updates) + 1):
        with learner.policy.using(learner.snapshot_state(case.spec.snapshot)):
            groups = sample_groups(learner.policy, range((update - 1) * GROUPS, update * GROUPS), GROUP_SIZE, case.spec, version=update - 1)
        learner.update(manifest_of(update, groups, score_by_latents(groups, reward)), groups)
    return learner
