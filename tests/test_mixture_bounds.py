"""O10's bounds: a heavy weight on the distance to the base holds every objective that has one there, and stale rollouts teach as fresh ones do."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from learner.config import LearnerConfig
from learner.objectives.awm import AwmConfig
from learner.objectives.crd import CrdConfig
from learner.objectives.dgpo import DgpoConfig
from learner.objectives.dppo import DppoConfig
from learner.objectives.grpo import GrpoConfig
from learner.objectives.nft import NftConfig
from learner.objectives.orw import OrwConfig
from learner.objectives.rwr import RwrConfig
from learner.objectives.settings import ObjectiveSettings
from learner.objectives.tempflow import TempflowConfig
from learner.objectives.vgrpo import VgrpoConfig
from learner.update import Learner, make_learner
from tests.learner_fakes import manifest_of, sample_groups, sampler_spec, score_by_latents
from tests.learner_policies import mixture_policy
from tests.mixture import GROUP_SIZE, GROUPS, MixtureCase, near_target, train

ODE = sampler_spec(kernel="ode", num_steps=6, window=())
SDE = sampler_spec(num_steps=6, window=(0, 1, 2, 3), noise_level=0.9)


def case(objective: ObjectiveSettings, spec: Any = ODE, **changes: Any) -> MixtureCase:
    facts = {"learning_rate": 2e-3, "micro_batch": 1024, "optimizer_steps": 4, "weight_decay": 0.0, "anchor": "recompute"}
    return MixtureCase(config=LearnerConfig(objective=objective, **(facts | changes)), spec=spec, updates=12)


HELD: dict[str, tuple[MixtureCase, MixtureCase]] = {  # with its usual weight on the distance to the base, and with a heavy one
    "grpo": (case(GrpoConfig(clip_range=0.2), SDE), case(GrpoConfig(clip_range=0.2, kl_beta=1e3, kl_convention="exact"), SDE)),
    "tempflow": (case(TempflowConfig(clip_range=0.2), SDE), case(TempflowConfig(clip_range=0.2, kl_beta=1e3), SDE)),
    "nft": (
        case(NftConfig(kl_beta=0.0), replace(ODE, snapshot="behavior")),
        case(NftConfig(kl_beta=1e3), replace(ODE, snapshot="behavior")),
    ),
    "awm": (case(AwmConfig(weighting="uniform")), case(AwmConfig(weighting="uniform", kl_beta=1e3))),
    "vgrpo": (case(VgrpoConfig()), case(VgrpoConfig(kl_beta=1e3))),
    "dgpo": (case(DgpoConfig(timestep_fraction=1.0)), case(DgpoConfig(timestep_fraction=1.0, kl_beta=1e3))),
    "crd": (case(CrdConfig(beta=2.0, kl_beta=0.01)), case(CrdConfig(beta=2.0, kl_beta=1e3))),
    "rwr": (case(RwrConfig()), case(RwrConfig(kl_beta=1e3))),
    "orw": (case(OrwConfig(temperature=5.0, alpha=0.0)), case(OrwConfig(temperature=5.0, alpha=1e6))),
}


def samples(learner: Learner) -> np.ndarray[Any, Any]:
    """512 ODE samples on fixed seeds, [512, 2]."""
    with learner.policy.using(learner.live):
        groups = sample_groups(learner.policy, [10_000], 512, sampler_spec(kernel="ode", num_steps=12, window=()))
    return np.stack([t.final_latents.reshape(-1) for t in groups[0].trajectories])


def moved(case: MixtureCase) -> float:
    """An upper bound of W1 to the base: the mean distance of samples from the same noise."""
    before, after = samples(train(case, updates=0)), samples(train(case))
    return float(np.linalg.norm(after - before, axis=1).mean())


@pytest.mark.parametrize("name", HELD)
def test_a_heavy_weight_on_the_distance_to_the_base_keeps_the_policy_there(name: str) -> None:
    usual, heavy = HELD[name]
    assert moved(heavy) < 0.05
    assert moved(usual) > 0.2


STALE: dict[str, MixtureCase] = {
    "grpo": case(GrpoConfig(clip_range=0.2), SDE, learning_rate=5e-3),
    "dppo": case(DppoConfig(kl_limit=0.03), SDE, learning_rate=5e-3),
    "nft": case(NftConfig(kl_beta=0.0), replace(ODE, snapshot="behavior"), learning_rate=5e-3),
    "awm": case(AwmConfig(weighting="uniform"), learning_rate=5e-3),
}


def reward_curve(case: MixtureCase, staleness: int) -> list[float]:
    """The mean reward of each update's 192 samples, made with the weights from so many updates before its newest."""
    learner, curve = make_learner(mixture_policy(), case.config, {"r": 1.0}, 5), []
    published = [{key: value.clone() for key, value in learner.snapshot_state(case.spec.snapshot).items()}]
    for update in range(1, case.updates + 1):
        version = max(0, update - 1 - staleness)
        with learner.policy.using(published[version]):
            groups = sample_groups(learner.policy, range((update - 1) * GROUPS, update * GROUPS), GROUP_SIZE, case.spec, version=version)
        tables = score_by_latents(groups, near_target)
        curve.append(float(np.mean([table["r"] for table in tables])))
        learner.update(manifest_of(update, groups, tables), groups)
        published.append({key: value.clone() for key, value in learner.snapshot_state(case.spec.snapshot).items()})
    return curve


@pytest.mark.parametrize("name", STALE)
def test_rollouts_of_the_version_before_give_the_same_curve_an_update_later(name: str) -> None:
    fresh, stale = reward_curve(STALE[name], 0), reward_curve(STALE[name], 1)
    assert max(fresh) > 0.6
    later, at_once = (max(abs(a - b) for a, b in zip(stale[1:], other, strict=True)) for other in (fresh[:-1], fresh[1:]))
    assert later < 0.09 < at_once  # two means of 192 rewards that spread by .3 differ by .03
