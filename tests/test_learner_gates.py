"""Start gates: each stops the run by its name, and lets a sound run pass."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from common.errors import GateError
from common.types import Manifest, RolloutGroup
from learner.config import LearnerConfig
from learner.gates import check_kl_is_zero, check_parity, check_ratio, measure_parity
from learner.objectives.base import Needs
from learner.objectives.grpo import GrpoConfig
from learner.objectives.nft import NftConfig
from learner.snapshots import Snapshots, ema_rule
from learner.update import Learner, make_learner
from tests.learner_fakes import manifest_of, sample_groups, sampler_spec, score_by_latents
from tests.learner_policies import StubPolicy, linear_policy

SPEC = sampler_spec()


def batch_of(policy: StubPolicy, version: int = 0, update: int = 1) -> tuple[Manifest, list[RolloutGroup]]:
    groups = sample_groups(policy, range((update - 1) * 2, update * 2), 6, SPEC, version=version)
    return manifest_of(update, groups, score_by_latents(groups, lambda x: float(x[0]))), groups


def learner_of(policy: StubPolicy, **changes: Any) -> Learner:
    facts: dict[str, Any] = {"groups_per_update": 2, "objective": GrpoConfig(clip_range=1e-3), "anchor": "behavior", "micro_batch": 6}
    return make_learner(policy, LearnerConfig(**(facts | changes)), {"r": 1.0}, 0)


def biased(groups: list[RolloutGroup], bias: float) -> list[RolloutGroup]:
    """The same groups with a bias in the stored log-probs of their second step."""
    shift = np.array([0.0, bias], dtype=np.float32)
    moved = [[replace(t, behavior_log_prob=t.behavior_log_prob + shift) for t in group.trajectories] for group in groups]
    return [replace(group, trajectories=tuple(trajectories)) for group, trajectories in zip(groups, moved, strict=True)]


@pytest.mark.parametrize("anchor", ["behavior", "recompute"])
def test_a_sound_first_update_passes_all_gates(anchor: str) -> None:
    metrics = learner_of(linear_policy(), anchor=anchor).update(*batch_of(linear_policy())).metrics
    assert metrics["ratio_min"] == pytest.approx(1.0, abs=1e-6)
    assert metrics["ratio_max"] == pytest.approx(1.0, abs=1e-6)
    assert metrics["num_steps"] == 1


@pytest.mark.parametrize("anchor", ["behavior", "recompute"])
def test_a_bias_of_a_hundredth_in_stored_log_probs_stops_the_run_whatever_the_anchor(anchor: str) -> None:
    manifest, groups = batch_of(linear_policy())
    with pytest.raises(GateError) as caught:
        learner_of(linear_policy(), anchor=anchor).update(manifest, biased(groups, 1e-2))
    assert (caught.value.name, caught.value.exit_code) == ("parity", 3)
    table = str(caught.value).splitlines()[-3:]
    assert "mean" in table[0]
    assert table[1].split()[0] == "0"
    assert float(table[1].split()[2]) < 1e-6
    assert float(table[2].split()[2]) == pytest.approx(1e-2, rel=1e-3)  # by step: the second is the wrong one


def test_a_bias_above_a_fifth_of_the_clip_asks_for_recomputed_anchors() -> None:
    manifest, groups = batch_of(linear_policy())
    with pytest.raises(GateError, match=r'set learner\.anchor = "recompute"') as caught:
        learner_of(linear_policy()).update(manifest, biased(groups, 3e-4))  # clip / 5 = 2e-4
    assert caught.value.name == "parity"
    metrics = learner_of(linear_policy(), anchor="recompute").update(manifest, biased(groups, 3e-4)).metrics
    assert metrics["mismatch_abs_dlogp"] == pytest.approx(1.5e-4, rel=1e-2)  # half the steps


def test_a_small_bias_passes_parity_and_is_caught_by_the_ratio() -> None:
    manifest, groups = batch_of(linear_policy())
    with pytest.raises(GateError, match=r"ratios from 0\.9999") as caught:
        learner_of(linear_policy()).update(manifest, biased(groups, 1e-5))
    assert caught.value.name == "ratio"


def test_an_adapter_that_is_not_zero_at_the_start_stops_the_run() -> None:
    policy = linear_policy(fresh=False)
    manifest, groups = batch_of(policy)
    with pytest.raises(GateError, match="B = 0") as caught:
        learner_of(policy, objective=NftConfig()).update(manifest, groups)
    assert caught.value.name == "kl_not_zero"
    check_kl_is_zero(linear_policy(), groups[0])


def test_a_resumed_run_may_hold_a_trained_adapter_and_is_checked_on_its_own_versions_group() -> None:
    policy = linear_policy(fresh=False)
    learner = learner_of(policy)
    learner.version = 4
    groups = batch_of(linear_policy(), version=3, update=5)[1]  # other weights: no parity to expect
    mixed = [groups[0], *sample_groups(policy, [9], 6, SPEC, version=4)]
    stale = manifest_of(5, mixed, score_by_latents(mixed, lambda x: float(x[0])))
    learner.update(stale, mixed)
    other = learner_of(linear_policy(fresh=False))
    other.version = 4
    with pytest.raises(GateError, match="group 9"):
        other.update(stale, [groups[0], *biased(mixed[1:], 1e-2)])


def test_gates_run_once() -> None:
    learner = learner_of(linear_policy())
    learner.update(*batch_of(linear_policy()))
    manifest, groups = batch_of(linear_policy(), version=1, update=2)
    learner.update(manifest, biased(groups, 1e-2))  # no gate: the second update


def test_parity_is_measured_under_the_snapshot_that_sampled() -> None:
    policy = linear_policy(fresh=False)
    group = batch_of(policy)[1][0]
    sampled = policy.read_adapter()
    policy.load_adapter(linear_policy().read_adapter())
    assert measure_parity(policy, group, sampled, 4).max() < 1e-6
    assert measure_parity(policy, group, policy.read_adapter(), 4).max() > 1e-3
    assert torch.equal(policy.read_adapter()["b"], torch.zeros(4, 2))


def test_objectives_without_a_stored_anchor_bear_any_mismatch_below_the_limit() -> None:
    group = batch_of(linear_policy())[1][0]
    assert check_parity(np.full((6, 2), 4e-3), group, Needs(trajectory=True)) == pytest.approx(4e-3)
    with pytest.raises(GateError):
        check_parity(np.full((6, 2), 6e-3), group, Needs(trajectory=True))
    with pytest.raises(GateError):
        check_parity(np.full((6, 2), np.nan), group, Needs(trajectory=True))


def test_ratios_within_the_tolerance_pass() -> None:
    check_ratio(1 - 9e-7, 1 + 9e-7, 1e-6)
    with pytest.raises(GateError):
        check_ratio(1.0, 1 + 2e-6, 1e-6)


def test_stored_log_probs_of_another_snapshot_need_not_have_ratios_of_one() -> None:
    """A resumed run that samples with `ema`: the groups are of the learner's own version, but of other weights than those that are trained."""
    sampled, trained = linear_policy(fresh=False), linear_policy(fresh=False)
    manifest, groups = batch_of(sampled, version=1, update=2)
    trained.load_adapter({name: tensor * 1.001 for name, tensor in sampled.read_adapter().items()})
    for snapshot in ("ema", "live"):
        learner = learner_of(trained, anchor="behavior")
        learner.version = 1
        learner.snapshots = Snapshots(sampled.read_adapter(), {"ema": ema_rule(0.9)})
        found = [replace(group, sampler=replace(group.sampler, snapshot=snapshot)) for group in groups]
        if snapshot == "ema":
            learner.update(manifest, found)
        else:
            with pytest.raises(GateError):
                learner.update(manifest, found)
