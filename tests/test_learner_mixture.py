"""O10: grpo and nft move an eight-mode mixture to the rewarded mode."""

from dataclasses import replace

import pytest

from learner.config import LearnerConfig
from learner.objectives.grpo import GrpoConfig
from learner.objectives.nft import NftConfig
from tests.learner_fakes import sampler_spec
from tests.mixture import MixtureCase, share_of_target, train

CASES = {
    "grpo": MixtureCase(
        config=LearnerConfig(objective=GrpoConfig(clip_range=0.2), learning_rate=1e-2, anchor="behavior", micro_batch=1024, optimizer_steps=2),
        spec=sampler_spec(num_steps=6, window=(0, 1, 2, 3), noise_level=0.9), updates=25,
    ),
    "nft": MixtureCase(
        config=LearnerConfig(objective=NftConfig(kl_beta=0.0), learning_rate=5e-3, micro_batch=1024, optimizer_steps=2),
        spec=sampler_spec(kernel="ode", num_steps=6, window=(), snapshot="behavior"), updates=40,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_training_raises_the_share_of_the_rewarded_mode_from_an_eighth_above_four_fifths(name: str) -> None:
    assert share_of_target(train(CASES[name], updates=0), "live") == pytest.approx(0.125, abs=0.045)  # 3 standard errors of 512 draws
    learner = train(CASES[name])
    assert share_of_target(learner, "live") > 0.8
    assert share_of_target(learner, "ema") > 0.8


def test_a_heavy_kl_keeps_the_policy_where_it_was() -> None:
    heavy = CASES["nft"].config.model_copy(update={"objective": NftConfig(kl_beta=1e3)})
    before, after = (share_of_target(train(replace(CASES["nft"], config=heavy), updates=n), "live") for n in (0, 10))
    assert abs(after - before) < 0.05
