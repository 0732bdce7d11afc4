"""O10 (algorithms, section 27): the forward-process objectives move an eight-mode mixture to the rewarded mode, and only for a reason."""

from typing import Any

import numpy as np
import pytest
import torch

from learner.config import AdvantageConfig, LearnerConfig
from learner.objectives.awm import AwmConfig
from learner.objectives.orw import OrwConfig
from learner.objectives.rwr import RwrConfig
from learner.objectives.settings import ObjectiveSettings
from learner.objectives.sft import SftConfig
from learner.objectives.vgrpo import VgrpoConfig
from learner.update import Learner
from tests.learner_fakes import sample_groups, sampler_spec
from tests.mixture import MixtureCase, share_of_target, train


def case(objective: ObjectiveSettings, updates: int, **changes: Any) -> MixtureCase:
    """Eight optimizer steps an update, a group each."""
    facts = {"learning_rate": 5e-3, "micro_batch": 1024, "optimizer_steps": 8, "weight_decay": 0.0}
    return MixtureCase(
        config=LearnerConfig(objective=objective, **(facts | changes)),
        spec=sampler_spec(kernel="ode", num_steps=6, window=()),
        updates=updates,
    )


CASES = {
    "awm": case(AwmConfig(weighting="uniform", timesteps_per_sample=2), 20),
    "vgrpo": case(VgrpoConfig(timesteps_per_sample=2), 25),
    "rwr": case(RwrConfig(), 8),
    "sft": case(SftConfig(timesteps_per_sample=8), 8, advantage=AdvantageConfig(kind="best")),
    "orw": case(OrwConfig(temperature=5.0, alpha=10.0), 18),
}
OBJECTIVES = pytest.mark.parametrize("name", CASES)


def spread(learner: Learner) -> float:
    """Root mean square distance of 512 ODE samples from their mean."""
    with learner.policy.using(learner.live):
        groups = sample_groups(learner.policy, [10_000], 512, sampler_spec(kernel="ode", num_steps=12, window=()))
    clean = np.stack([t.final_latents.reshape(-1) for t in groups[0].trajectories])
    return float(np.sqrt(np.square(clean - clean.mean(0)).sum(1).mean()))


@OBJECTIVES
def test_training_raises_the_share_of_the_rewarded_mode_above_four_fifths(name: str) -> None:
    learner = train(CASES[name])
    assert share_of_target(learner, "live") > 0.8  # from an eighth
    assert share_of_target(learner, "ema") > 0.8


@OBJECTIVES
def test_a_constant_reward_leaves_the_adapter_as_it_was(name: str) -> None:
    fresh = train(CASES[name], updates=0).live
    learner = train(CASES[name], updates=1, reward=lambda clean: 0.7)
    assert all(torch.equal(learner.live[key], tensor) for key, tensor in fresh.items())  # O11: bitwise
    assert learner.version == 1 and learner.num_optimizer_steps == 0


def test_without_its_w2_term_orw_collapses_further() -> None:
    bounded, free = (spread(train(case(OrwConfig(temperature=5.0, alpha=alpha), 8))) for alpha in (100.0, 0.0))
    assert free < 0.75 * bounded  # the base's is 2; seeds move either by a tenth
