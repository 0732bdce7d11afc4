"""O12: rewards that know nothing of the images do not drift a policy towards any mode, with every objective."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from learner.objectives.registry import OBJECTIVES
from tests import test_learner_mixture, test_mixture_forward, test_mixture_preference, test_mixture_trajectory, test_objectives_crd
from tests.learner_fakes import sample_groups, sampler_spec
from tests.mixture import MixtureCase, near_target, train

Reward = Callable[[NDArray[np.float32]], float]
CASES: dict[str, MixtureCase] = {
    **test_learner_mixture.CASES,
    **test_mixture_forward.CASES,
    **{name: test_mixture_preference.CASES[name] for name in ("dgpo", "dpo")},
    **{name: test_mixture_trajectory.CASES[name] for name in ("guard", "dppo", "tempflow", "dance")},
    "crd": test_objectives_crd.CASE,
}


def unrelated(seed: int) -> Reward:
    """Numbers in [0, 1) that say nothing about the sample."""
    draws = np.random.default_rng(seed)
    return lambda clean: float(draws.random())


def rewarded(case: MixtureCase, updates: int, reward: Reward) -> float:
    """The mean of the true reward over 512 ODE samples on fixed seeds, after some updates on a reward."""
    learner = train(case, updates, reward)
    with learner.policy.using(learner.live):
        groups = sample_groups(learner.policy, [10_000], 512, sampler_spec(kernel="ode", num_steps=12, window=()))
    return float(np.mean([near_target(t.final_latents.reshape(-1)) for t in groups[0].trajectories]))


def test_every_objective_is_asked() -> None:
    assert set(CASES) == set(OBJECTIVES)


@pytest.mark.parametrize("name", CASES)
def test_rewards_that_know_nothing_move_less_than_a_third_of_what_the_true_one_does(name: str) -> None:
    """The same few steps, of the same length (AdamW moves as far on noise as on a signal), on the true reward and on three that are noise."""
    config = CASES[name].config.model_copy(update={"learning_rate": 2e-3})
    case = replace(CASES[name], config=config)
    base = rewarded(case, 0, near_target)
    true = rewarded(case, 4, near_target) - base
    drifts = [rewarded(case, 4, unrelated(seed)) - base for seed in (1, 2, 3)]
    assert true > 0.02
    assert max(abs(drift) for drift in drifts) < true / 3  # O12
