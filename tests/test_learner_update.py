"""The update: minibatches, accumulation, snapshots, skipped steps: O8, O9, O11 (algorithms, section 27)."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from common.errors import ConfigError, CorruptFile, GateError
from common.types import Manifest, RolloutGroup
from learner.config import LearnerConfig
from learner.minibatches import SampleRef, plan_minibatches
from learner.objectives.grpo import GrpoConfig
from learner.objectives.nft import NftConfig
from learner.snapshots import Moment, SnapshotRule, Snapshots, ema_rule
from learner.update import Learner, make_learner, resolve_anchor
from tests.learner_fakes import manifest_of, sample_groups, sampler_spec, score_by_latents
from tests.learner_policies import StubPolicy, linear_policy

OBJECTIVES = pytest.mark.parametrize(
    "objective", [GrpoConfig(clip_range=0.1, kl_beta=0.01), NftConfig(kl_beta=1e-3)], ids=["grpo", "nft"]
)  # fmt: skip
SPEC = sampler_spec()


def config(**changes: Any) -> LearnerConfig:
    facts = {"groups_per_update": 4, "micro_batch": 5, "anchor": "recompute", "learning_rate": 1e-2, "max_grad_norm": 100.0}
    return LearnerConfig(**(facts | changes))


def learner_of(policy: StubPolicy | None = None, **changes: Any) -> Learner:
    return make_learner(policy or linear_policy(), config(**changes), {"r": 1.0}, 11)


def batch_of(policy: StubPolicy, update: int = 1, *, version: int | None = None, count: int = 4) -> tuple[Manifest, list[RolloutGroup]]:
    """Groups sampled under what the policy holds, scored by their first coordinate."""
    numbers = range((update - 1) * count, update * count)
    groups = sample_groups(policy, numbers, 6, SPEC, version=update - 1 if version is None else version)
    return manifest_of(update, groups, score_by_latents(groups, lambda x: float(x[0]))), groups


def flat(state: Any) -> torch.Tensor:
    return torch.cat([state[name].flatten() for name in sorted(state)])


@OBJECTIVES
def test_micro_batching_does_not_change_the_update(objective: Any) -> None:
    manifest, groups = batch_of(linear_policy())
    results = []
    for micro_batch in (24, 5, 1):
        learner = learner_of(objective=objective, micro_batch=micro_batch)
        results.append((learner.update(manifest, groups).metrics, flat(learner.live)))
    for metrics, live in results[1:]:
        assert metrics["grad_norm"] == pytest.approx(results[0][0]["grad_norm"], rel=1e-5)  # O8
        assert metrics["loss"] == pytest.approx(results[0][0]["loss"], abs=1e-5)
        # Adam divides by the gradient's size: float32 noise of 1e-7 against gradients of 1e-2 moves steps of 1e-2 by 1e-6
        torch.testing.assert_close(live, results[0][1], rtol=0, atol=1e-5)


def test_masked_samples_see_no_forward() -> None:
    manifest, groups = batch_of(linear_policy())
    flat_one, null_one = {"r": (0.5,) * 6}, {"r": (None, *manifest.groups[1].scores["r"][1:])}
    manifest = manifest_of(1, groups[:2], [flat_one, null_one])
    plan = plan_minibatches(
        np.array([[False] * 6, [False] + [True] * 5]), [SPEC] * 2, num_minibatches=1, micro_batch=3, seed=0, whole_groups=False
    )
    assert plan[0].micro_batches == (
        (SampleRef(group=1, sample=1), SampleRef(group=1, sample=2), SampleRef(group=1, sample=3)),
        (SampleRef(group=1, sample=4), SampleRef(group=1, sample=5)),
    )
    assert learner_of().update(manifest, groups[:2]).metrics["num_samples"] == 5


def test_minibatches_are_whole_groups_each_once_in_an_order_of_the_seed_alone() -> None:
    mask = np.ones((6, 4), dtype=np.bool_)
    plans = [plan_minibatches(mask, [SPEC] * 6, num_minibatches=3, micro_batch=5, seed=seed, whole_groups=False) for seed in (1, 1, 2, 3)]
    assert plans[0] == plans[1]
    assert len({str(plan) for plan in plans}) > 1
    for plan in plans:
        members = [{ref.group for refs in minibatch.micro_batches for ref in refs} for minibatch in plan]
        assert sorted(group for groups in members for group in groups) == list(range(6))
        assert [minibatch.num_samples for minibatch in plan] == [8, 8, 8]
        assert [[len(refs) for refs in minibatch.micro_batches] for minibatch in plan] == [[5, 3]] * 3  # micro-batches cross groups


def test_a_micro_batch_never_mixes_samplers_nor_splits_groups_that_must_stay_whole() -> None:
    mask = np.ones((2, 4), dtype=np.bool_)
    unlike = [SPEC, sampler_spec(noise_level=0.3)]
    plan = plan_minibatches(mask, unlike, num_minibatches=1, micro_batch=6, seed=0, whole_groups=False)
    assert [len(refs) for refs in plan[0].micro_batches] == [4, 4]
    plan = plan_minibatches(np.ones((3, 4), dtype=np.bool_), [SPEC] * 3, num_minibatches=1, micro_batch=9, seed=0, whole_groups=True)
    assert [len(refs) for refs in plan[0].micro_batches] == [8, 4]
    with pytest.raises(ConfigError, match=r"raise micro_batch to rollout\.group_size"):
        plan_minibatches(mask, [SPEC] * 2, num_minibatches=1, micro_batch=3, seed=0, whole_groups=True)
    with pytest.raises(ConfigError, match=r"multiple of learner\.optimizer_steps"):
        plan_minibatches(mask, [SPEC] * 2, num_minibatches=3, micro_batch=3, seed=0, whole_groups=False)


@OBJECTIVES
def test_a_constant_reward_moves_nothing(objective: Any) -> None:
    learner = learner_of(objective=objective, weight_decay=0.1)
    manifest, groups = batch_of(linear_policy())
    before = flat(learner.live).clone()
    result = learner.update(replace(manifest, groups=tuple(replace(g, scores={"r": (0.7,) * 6}) for g in manifest.groups)), groups)
    assert torch.equal(flat(learner.live), before)  # O11: max |d theta| == 0
    assert result.num_steps == 0
    assert result.batch.flat.all()
    assert learner.version == 1


def test_one_step_of_adamw_follows_the_formula() -> None:
    learner = learner_of(objective=GrpoConfig(clip_range=0.1), learning_rate=0.01, weight_decay=0.0, adam_eps=1e-12)
    before = {name: tensor.clone() for name, tensor in learner.live.items()}
    learner.update(*batch_of(linear_policy()))
    # bias-corrected first step: lr * g / |g|; A has no gradient while B = 0
    assert torch.equal(learner.live["a"], before["a"])
    torch.testing.assert_close((learner.live["b"] - before["b"]).abs(), torch.full_like(before["b"], 0.01), rtol=1e-4, atol=0)


def test_the_learning_rate_warms_up_linearly() -> None:
    learner = learner_of(warmup_steps=4, learning_rate=1.0)
    rates = []
    for steps in range(6):
        learner.num_optimizer_steps = steps
        rates.append(learner.learning_rate)
    assert rates == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_the_learning_rate_falls_with_one_over_the_step() -> None:
    learner = learner_of(warmup_steps=2, decay_steps=4, learning_rate=1.0)
    rates = []
    for steps in range(8):
        learner.num_optimizer_steps = steps
        rates.append(learner.learning_rate)
    assert rates == [0.5, 1.0, 1.0, 1.0, 4 / 5, 4 / 6, 4 / 7, 4 / 8]


def test_the_gradient_is_clipped_to_its_largest_norm() -> None:
    policy = linear_policy()
    learner = learner_of(policy, max_grad_norm=1e-3)
    seen: list[float] = []
    step = learner.optimizer.step
    learner.optimizer.step = lambda: (seen.append(float(torch.cat([p.grad.flatten() for p in policy.adapter_parameters()]).norm())), step())  # type: ignore
    metrics = learner.update(*batch_of(linear_policy())).metrics
    assert metrics["grad_norm"] > 1e-3  # before clipping
    assert seen == [pytest.approx(1e-3, rel=1e-3)]


def test_ema_decay_follows_its_schedule() -> None:
    rule = ema_rule(0.9)
    assert [rule.decay(n) for n in (0, 10, 80, 81, 5000)] == pytest.approx([0.1, 0.55, 0.9, 0.9, 0.9])  # O9


def test_snapshots_move_at_their_moment_by_their_own_counter() -> None:
    half = SnapshotRule(moment=Moment.STEP, decay=lambda n: 0.5 * (n + 1))
    snapshots = Snapshots({"x": torch.zeros(1)}, {"a": half, "b": SnapshotRule(moment=Moment.UPDATE, decay=lambda n: 0.0)})
    live = {"x": torch.tensor([8.0])}
    snapshots.move(Moment.STEP, live)
    assert {name: float(state["x"]) for name, state in snapshots.states.items()} == {"a": 4.0, "b": 0.0}
    snapshots.move(Moment.STEP, live)  # decay 1 keeps
    snapshots.move(Moment.UPDATE, live)
    assert {name: float(state["x"]) for name, state in snapshots.states.items()} == {"a": 4.0, "b": 8.0}
    assert snapshots.counts == {"a": 2, "b": 1}
    with pytest.raises(ConfigError, match="live"):
        Snapshots({}, {"live": half})


def test_an_ema_with_an_interval_moves_at_every_so_many_steps_with_the_decay_of_that_step() -> None:
    """flow_grpo's EMA: each 8 optimizer steps, decay min((1 + n) / (10 + n), .9) of all steps before; the oracle is the loop itself."""
    snapshots, expected = Snapshots({"x": torch.zeros(1)}, {"ema": ema_rule(0.9, 8)}), 0.0
    for step in range(100):
        live = float(step)
        if step % 8 == 7:
            decay = min((1 + step) / (10 + step), 0.9)
            expected = decay * expected + (1 - decay) * live
        snapshots.move(Moment.STEP, {"x": torch.tensor([live])})
        assert float(snapshots.states["ema"]["x"]) == pytest.approx(expected, rel=1e-5)
    assert snapshots.counts == {"ema": 100}
    assert learner_of(ema_interval=2).update(*batch_of(linear_policy())).num_steps == 1


def test_after_the_first_nft_update_the_behavior_is_the_live_adapter() -> None:
    learner = learner_of(objective=NftConfig(), optimizer_steps=2)
    learner.update(*batch_of(linear_policy()))
    assert torch.equal(flat(learner.snapshots.states["behavior"]), flat(learner.live))  # O9: d(0) = 0
    assert learner.snapshots.counts == {"behavior": 1, "ema": 2}  # an update, optimizer steps
    first = flat(learner.live).clone()
    learner.update(*batch_with(learner, 2))
    expected = 0.001 * first + 0.999 * flat(learner.live)  # d(1) = .001
    torch.testing.assert_close(flat(learner.snapshots.states["behavior"]), expected, rtol=1e-6, atol=1e-7)


def batch_with(learner: Learner, update: int) -> tuple[Manifest, list[RolloutGroup]]:
    policy = linear_policy()
    policy.load_adapter(learner.live)
    return batch_of(policy, update)


def poisoned(batch: tuple[Manifest, list[RolloutGroup]], groups: Sequence[int] = (0,)) -> tuple[Manifest, list[RolloutGroup]]:
    """NaN in the clean latents of a group: its NFT loss is not finite."""
    manifest, found = batch
    bad = [replace(t, final_latents=t.final_latents * np.float32("nan")) for t in found[0].trajectories]
    return manifest, [replace(group, trajectories=tuple(bad)) if position in groups else group for position, group in enumerate(found)]


def test_a_step_that_is_not_finite_is_skipped_and_counted_then_stops_the_run() -> None:
    learner = learner_of(objective=NftConfig(), max_nonfinite=2)
    clean, before = batch_of(linear_policy()), flat(learner.live).clone()
    result = learner.update(*poisoned(clean))
    assert (result.num_steps, result.num_skipped, learner.num_nonfinite) == (0, 1, 1)
    assert torch.equal(flat(learner.live), before)
    assert learner.snapshots.counts["ema"] == 0
    learner.update(*batch_of(linear_policy(), 2))
    assert learner.num_nonfinite == 0  # in a row
    learner.update(*poisoned(batch_of(linear_policy(), 3)))
    with pytest.raises(GateError, match=r"learner\.learning_rate") as caught:
        learner.update(*poisoned(batch_of(linear_policy(), 4)))
    assert caught.value.name == "non_finite"


def test_the_policy_is_left_as_it_was_found() -> None:
    policy = linear_policy()
    learner = learner_of(policy)
    foreign = {name: tensor + 3.0 for name, tensor in policy.read_adapter().items()}
    batch = batch_of(linear_policy())
    policy.load_adapter(foreign)  # a rollout worker of the same process
    learner.update(*batch)
    assert torch.equal(flat(policy.read_adapter()), flat(foreign))
    alone = learner_of()
    alone.update(*batch)
    assert torch.equal(flat(learner.live), flat(alone.live))


def test_groups_that_are_not_the_manifests_are_refused() -> None:
    manifest, groups = batch_of(linear_policy())
    with pytest.raises(CorruptFile, match="flowfleet audit"):
        learner_of().update(manifest, groups[::-1])
    with pytest.raises(CorruptFile, match="committed whole"):
        learner_of().update(manifest, [*groups[:3], replace(groups[3], trajectories=groups[3].trajectories[:-1])])


def test_a_trajectory_without_latents_around_its_steps_is_refused() -> None:
    manifest, groups = batch_of(linear_policy())
    cut = [replace(t, latents=t.latents[:1], latent_index=t.latent_index[:1]) for t in groups[0].trajectories]
    learner = learner_of()
    with pytest.raises(CorruptFile, match=r"without the latents before steps \[1, 2\]"):
        learner.update(manifest, [replace(groups[0], trajectories=tuple(cut)), *groups[1:]])


def test_a_step_that_ends_the_run_takes_the_clean_latents_as_its_end() -> None:
    policy = linear_policy()
    spec = sampler_spec(window=(5,))
    groups = sample_groups(policy, range(2), 4, spec)
    without = [
        replace(group, trajectories=tuple(replace(t, latents=t.latents[:1], latent_index=t.latent_index[:1]) for t in group.trajectories))
        for group in groups
    ]
    manifest = manifest_of(1, groups, score_by_latents(groups, lambda x: float(x[0])))
    results = [learner_of(anchor="behavior").update(manifest, found).metrics for found in (groups, without)]
    assert results[0] == results[1]


def test_the_anchor_auto_takes_stored_log_probs_only_on_cpu_in_float32() -> None:
    assert resolve_anchor("auto", torch.device("cpu"), "float32") == "behavior"
    assert resolve_anchor("auto", torch.device("cpu"), "bfloat16") == "recompute"
    assert resolve_anchor("auto", torch.device("cuda"), "float32") == "recompute"
    assert resolve_anchor("behavior", torch.device("cuda"), "float16") == "behavior"


def test_an_unknown_snapshot_is_named_with_those_that_exist() -> None:
    with pytest.raises(ConfigError, match=r"\['ema', 'live'\]"):
        learner_of(objective=GrpoConfig()).snapshot_state("behavior")
