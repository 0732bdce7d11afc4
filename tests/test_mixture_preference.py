"""O10, O11: dgpo and dpo, and grpo with other advantages, move an eight-mode mixture to the rewarded mode, and only for a reason."""

from typing import Any

import pytest
import torch

from learner.config import AdvantageConfig, LearnerConfig
from learner.objectives.dgpo import DgpoConfig
from learner.objectives.dpo import DpoConfig
from learner.objectives.grpo import GrpoConfig
from learner.objectives.settings import ObjectiveSettings
from tests.learner_fakes import sampler_spec
from tests.mixture import MixtureCase, share_of_target, train
from tests.test_learner_update import flat

ODE = sampler_spec(kernel="ode", num_steps=6, window=())
SDE = sampler_spec(num_steps=6, window=(0, 1, 2, 3), noise_level=0.9)


def learning(objective: ObjectiveSettings, rate: float, **changes: Any) -> LearnerConfig:
    return LearnerConfig(objective=objective, learning_rate=rate, micro_batch=1024, optimizer_steps=2, anchor="behavior", **changes)


CASES = {
    "dgpo": MixtureCase(config=learning(DgpoConfig(kl_beta=0.01, timesteps_per_sample=2, timestep_fraction=1.0), 5e-3), spec=ODE, updates=24),
    "dpo": MixtureCase(
        config=learning(DpoConfig(beta=5.0, reference_interval=5), 1e-2, advantage=AdvantageConfig(kind="pair")), spec=ODE, updates=20
    ),
    "grpo_super_linear": MixtureCase(
        config=learning(GrpoConfig(clip_range=0.2), 1e-2, advantage=AdvantageConfig(kind="super_linear")), spec=SDE, updates=25
    ),
    "grpo_subset": MixtureCase(
        config=learning(GrpoConfig(clip_range=0.2), 1e-2, advantage=AdvantageConfig(subset=8)), spec=SDE, updates=25
    ),
}  # fmt: skip
OWN = pytest.mark.parametrize("name", ["dgpo", "dpo"])


@pytest.mark.parametrize("name", CASES)
def test_training_raises_the_share_of_the_rewarded_mode_from_an_eighth_above_four_fifths(name: str) -> None:
    assert share_of_target(train(CASES[name], updates=0), "live") == pytest.approx(0.125, abs=0.045)  # 3 standard errors of 512 draws
    learner = train(CASES[name])
    assert share_of_target(learner, "live") > 0.8
    assert share_of_target(learner, "ema") > 0.8


@OWN
def test_a_constant_reward_leaves_the_adapter_bitwise_as_it_was(name: str) -> None:
    before, after = (flat(train(CASES[name], updates=updates, reward=lambda clean: 0.5).live) for updates in (0, 2))
    assert torch.equal(before, after)
