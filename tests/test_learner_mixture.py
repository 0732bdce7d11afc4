"""O10: both objectives move an eight-mode mixture to the rewarded mode."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from common.types import SamplerSpec
from learner.config import LearnerConfig
from learner.objectives.grpo import GrpoConfig
from learner.objectives.nft import NftConfig
from learner.update import Learner, make_learner
from tests.learner_fakes import manifest_of, sample_groups, sampler_spec, score_by_latents
from tests.learner_policies import circle_modes, mixture_policy

TARGET = circle_modes()[0].numpy()
CASES = {
    "grpo": (
        LearnerConfig(objective=GrpoConfig(clip_range=0.2), learning_rate=1e-2, anchor="behavior", micro_batch=1024, optimizer_steps=2),
        sampler_spec(num_steps=6, window=(0, 1, 2, 3), noise_level=0.9), 25,
    ),
    "nft": (
        LearnerConfig(objective=NftConfig(kl_beta=0.0), learning_rate=5e-3, micro_batch=1024, optimizer_steps=2),
        sampler_spec(kernel="ode", num_steps=6, window=(), snapshot="behavior"), 40,
    ),
}  # fmt: skip


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


def train(name: str, config: LearnerConfig, spec: SamplerSpec, updates: int) -> list[float]:
    learner = make_learner(mixture_policy(), config, {"r": 1.0}, 5)
    shares = [share_of_target(learner, "live")]
    for update in range(1, updates + 1):
        with learner.policy.using(learner.snapshot_state(spec.snapshot)):
            groups = sample_groups(learner.policy, range((update - 1) * 8, update * 8), 24, spec, version=update - 1)
        learner.update(manifest_of(update, groups, score_by_latents(groups, near_target)), groups)
    return [*shares, share_of_target(learner, "live"), share_of_target(learner, "ema")]


@pytest.mark.parametrize("name", CASES)
def test_training_raises_the_share_of_the_rewarded_mode_from_an_eighth_above_four_fifths(name: str) -> None:
    config, spec, updates = CASES[name]
    before, after, ema = train(name, config, spec, updates)
    assert before == pytest.approx(0.125, abs=0.045)  # 3 standard errors of 512 draws
    assert after > 0.8
    assert ema > 0.8


def test_a_heavy_kl_keeps_the_policy_where_it_was() -> None:
    config, spec, _ = CASES["nft"]
    objective: Any = NftConfig(kl_beta=1e3)
    before, after, _ = train("nft", config.model_copy(update={"objective": objective}), spec, 10)
    assert abs(after - before) < 0.05
