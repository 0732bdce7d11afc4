"""crd against closed forms, and on the mixture."""

import pytest
import torch

from learner.config import LearnerConfig
from learner.objectives.crd import Crd, CrdConfig, centered
from learner.objectives.probes import draw_probes
from learner.snapshots import EMA_REF
from tests.learner_fakes import sampler_spec
from tests.learner_policies import linear_policy
from tests.mixture import MixtureCase, share_of_target, train
from tests.test_learner_objectives import context, run_terms
from tests.test_learner_update import flat
from tests.test_objectives_preference import (
    SCORES,
    check_parallel,
    facts,
    make_batch,
    matching_errors,
    matching_gradient,
    moved,
    reference_errors,
)

CASE = MixtureCase(
    config=LearnerConfig(
        objective=CrdConfig(beta=2.0, kl_beta=0.01, timesteps_per_sample=2), learning_rate=5e-3, micro_batch=1024, optimizer_steps=2,
        anchor="behavior",
    ),
    spec=sampler_spec(kernel="ode", num_steps=6, window=()), updates=24,
)  # fmt: skip


def crd(**changes: float) -> Crd:
    return Crd(config=CrdConfig(**({"kl_beta": 0.0, "timesteps_per_sample": 2} | changes)))  # type: ignore[arg-type]


def test_values_are_centered_in_their_own_group() -> None:
    values, group = torch.tensor([1.0, 5.0, 3.0, 9.0]), torch.tensor([0, 1, 0, 1])
    assert centered(values, group).tolist() == [-1.0, -2.0, 1.0, 2.0]


@pytest.mark.parametrize("beta", [1.0, 100.0])
def test_at_the_reference_the_gradient_is_that_of_advantage_weighted_flow_matching(beta: float) -> None:
    policy, objective = linear_policy(dtype=torch.float64, fresh=False), crd(beta=beta)
    batch = make_batch(policy, objective, [SCORES, SCORES[::-1]])  # each sums to 0
    value, gradient, terms = run_terms(objective, batch, context(policy, ema_ref=policy.read_adapter()))
    probes = draw_probes(batch, 2, shared=True)
    check_parallel(gradient, matching_gradient(policy, batch, probes, batch.advantages))
    assert value == pytest.approx(float(batch.advantages.square().sum()) / (2 * beta))  # c = 0
    assert all((term.means["implicit_reward"] == 0).all() for term in terms)


def test_away_from_the_reference_it_is_its_formula_with_groups_apart() -> None:
    policy, objective = linear_policy(dtype=torch.float64, fresh=False), crd(beta=6.0)
    batch, state = make_batch(policy, objective, [SCORES, SCORES[::-1]]), moved(policy)
    probes = draw_probes(batch, 2, shared=True)
    value, _, _ = run_terms(objective, batch, context(policy, ema_ref=state))
    expected = 0.0
    for old, new in zip(reference_errors(policy, state, batch, probes), matching_errors(policy, batch, probes), strict=True):
        for members in (slice(0, 4), slice(4, 8)):
            implicit = 6.0 * (old - new.detach())[members]
            expected += float(((implicit - implicit.mean() - batch.advantages[members]) ** 2).sum()) / 12.0 / 2
    assert value == pytest.approx(expected, rel=1e-10)


def test_a_group_whose_implicit_rewards_are_its_advantages_pulls_no_more() -> None:
    policy = linear_policy(dtype=torch.float64, fresh=False)
    objective, state = crd(beta=6.0, timesteps_per_sample=1), moved(policy)
    batch = make_batch(policy, objective, [SCORES, SCORES[::-1]])
    probes = draw_probes(batch, 1, shared=True)
    old, new = reference_errors(policy, state, batch, probes)[0], matching_errors(policy, batch, probes)[0].detach()
    batch.advantages[:] = centered(6.0 * (old - new), batch.group)
    value, gradient, _ = run_terms(objective, batch, context(policy, ema_ref=state))
    assert value == pytest.approx(0.0, abs=1e-18)
    assert float(gradient.abs().max()) < 1e-12


def test_a_split_group_and_a_guided_kl_without_weight_are_refused() -> None:
    told = CrdConfig(kl_beta=0.0, kl_guidance=4.5).problems(facts(micro_batch=8, advantage="best"))
    assert len(told) == 3
    assert "couples the members" in told[0] and "centers a group" in told[1] and "guides a KL whose weight is 0" in told[2]


def test_training_raises_the_share_of_the_rewarded_mode_and_a_constant_reward_moves_nothing() -> None:
    assert share_of_target(train(CASE, updates=0), "live") == pytest.approx(0.125, abs=0.045)  # 3 standard errors of 512 draws
    learner = train(CASE)
    assert share_of_target(learner, "live") > 0.8 and EMA_REF in learner.snapshots.counts
    before, after = (flat(train(CASE, updates=updates, reward=lambda clean: 0.5).live) for updates in (0, 2))
    assert torch.equal(before, after)
