"""dgpo and dpo against closed forms: O6-O9 (algorithms, section 27)."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from common.errors import ConfigError
from common.policy.base import Policy
from learner.advantages import GroupStd
from learner.config import AdvantageConfig
from learner.minibatches import SampleRef, UpdateInput, collate
from learner.objectives.base import MicroBatch, Objective
from learner.objectives.dgpo import Dgpo, DgpoConfig, group_weights
from learner.objectives.dpo import Dpo, DpoConfig, preference_loss, reference_rule
from learner.objectives.groups import group_sums
from learner.objectives.probes import Probes, draw_probes
from learner.objectives.settings import RunFacts
from learner.snapshots import EMA_REF, Moment, Snapshots, ema_ref_rule
from learner.update import Learner
from tests.learner_fakes import manifest_of, sample_groups, sampler_spec, score_by_latents
from tests.learner_policies import StubPolicy, linear_policy
from tests.resume_check import check_resume
from tests.test_learner_objectives import context, flat_gradient, in_double, run_terms
from tests.test_learner_update import batch_of, batch_with, flat, learner_of

SCORES = [1.5, -0.5, -2.0, 1.0]  # of a group's four samples
PAIR = [1.0, -1.0]
SPEC = sampler_spec(kernel="ode", window=())


def dgpo(**changes: Any) -> Dgpo:
    return Dgpo(config=DgpoConfig(**({"kl_beta": 0.0, "timesteps_per_sample": 2} | changes)))


def dpo(**changes: Any) -> Dpo:
    return Dpo(config=DpoConfig(**({"beta": 8.0} | changes)))


def make_batch(
    policy: Policy, objective: Objective[Any], advantages: Sequence[Sequence[float]], groups: Sequence[int] = (0, 1)
) -> MicroBatch:
    """Whole groups with given advantages, in float64; the named ones of a batch of them."""
    size = len(advantages[0])
    found = sample_groups(policy, range(len(advantages)), size, SPEC)
    manifest = manifest_of(1, found, score_by_latents(found, lambda x: float(x[0])))
    batch = GroupStd(eps=1e-4).estimate(manifest, {"r": 1.0})
    batch.advantages[:] = advantages
    source = UpdateInput(manifest=manifest, groups=tuple(found), batch=batch, run_seed=3, advantage_clip=5.0)
    return in_double(collate([SampleRef(group=g, sample=k) for g in groups for k in range(size)], source, objective.needs, policy))


def moved(policy: StubPolicy, by: float = 0.2) -> dict[str, torch.Tensor]:
    """An adapter beside the policy's own."""
    generator = torch.Generator().manual_seed(5)
    return {name: t + by * torch.randn(t.shape, generator=generator, dtype=t.dtype) for name, t in policy.read_adapter().items()}


def matching_errors(policy: StubPolicy, batch: MicroBatch, probes: Probes) -> list[torch.Tensor]:
    """[B] mean (v - (eps - x_0))^2 a sigma, under what the policy holds, written out."""
    found = []
    for sigma, noise in zip(probes.sigma, probes.noise, strict=True):
        level = sigma.view(-1, 1, 1, 1)
        velocity = policy.velocity((1 - level) * batch.clean + level * noise, sigma, batch.features)
        found.append((velocity - (noise - batch.clean)).flatten(1).square().mean(1))
    return found


def matching_gradient(policy: StubPolicy, batch: MicroBatch, probes: Probes, weights: torch.Tensor) -> torch.Tensor:
    """Gradient of sum_i weight_i mean_n FM_i; weights [B] or [n, B]."""
    for parameter in policy.adapter_parameters():
        parameter.grad = None
    (weights * torch.stack(matching_errors(policy, batch, probes))).mean(0).sum().backward()
    return flat_gradient(policy)


def reference_errors(policy: StubPolicy, state: dict[str, torch.Tensor], batch: MicroBatch, probes: Probes) -> list[torch.Tensor]:
    with torch.no_grad(), policy.using(state):
        return matching_errors(policy, batch, probes)


def check_parallel(gradient: torch.Tensor, expected: torch.Tensor) -> None:
    assert float(torch.nn.functional.cosine_similarity(gradient, expected, dim=0)) > 1 - 1e-8  # O6
    assert (gradient - expected).norm() / expected.norm() < 1e-8  # and its factor


@pytest.mark.parametrize("beta", [1.0, 100.0])
def test_at_the_reference_dgpo_has_half_the_gradient_of_weighted_flow_matching(beta: float) -> None:
    policy, objective = linear_policy(dtype=torch.float64, fresh=False), dgpo(beta=beta)
    batch = make_batch(policy, objective, [SCORES, SCORES[::-1]])
    value, gradient, terms = run_terms(objective, batch, context(policy, ema_ref=policy.read_adapter()))
    probes = draw_probes(batch, 2, 0.7, shared=True)
    check_parallel(gradient, matching_gradient(policy, batch, probes, 0.5 * batch.advantages))  # any beta
    assert all(torch.equal(term.means["group_weight"], torch.full_like(batch.advantages, 0.5)) for term in terms)  # O7: s_G = 0
    with torch.no_grad():
        errors = torch.stack(matching_errors(policy, batch, probes)).mean(0)
    assert value == pytest.approx(float((0.5 * batch.advantages * errors).sum()), rel=1e-10)


@pytest.mark.parametrize("beta", [1.0, 100.0])
def test_at_the_reference_dpo_has_a_quarter_of_beta_of_the_pairs_flow_matching_gradient(beta: float) -> None:
    policy, objective = linear_policy(dtype=torch.float64, fresh=False), dpo(beta=beta)
    batch = make_batch(policy, objective, [PAIR, PAIR[::-1]])
    value, gradient, terms = run_terms(objective, batch, context(policy, reference=policy.read_adapter()))
    each_once = gradient / 2  # the summed loss holds a pair's loss for both of its samples
    check_parallel(each_once, matching_gradient(policy, batch, draw_probes(batch, 2, shared=True), beta / 4 * batch.advantages))
    assert value / batch.num_samples == pytest.approx(math.log(2), abs=1e-9)  # O7
    assert all((term.means["pair_margin"] == 0).all() for term in terms)


def test_swapping_winner_and_loser_flips_the_margin_and_at_the_reference_the_gradient() -> None:
    policy, objective = linear_policy(dtype=torch.float64, fresh=False), dpo()
    batch = make_batch(policy, objective, [PAIR, PAIR])
    swapped = replace(batch, advantages=-batch.advantages)
    here, away = context(policy, reference=policy.read_adapter()), context(policy, reference=moved(policy))
    torch.testing.assert_close(run_terms(objective, swapped, here)[1], -run_terms(objective, batch, here)[1], rtol=1e-12, atol=1e-14)
    value, _, terms = run_terms(objective, batch, away)
    other, _, others = run_terms(objective, swapped, away)
    margins = torch.stack([term.means["pair_margin"] for term in terms])
    torch.testing.assert_close(torch.stack([term.means["pair_margin"] for term in others]), -margins)  # O7
    # log(1 + e^x) - log(1 + e^-x) = x, with x = (beta / 2) margin
    assert value - other == pytest.approx(float(4.0 * margins.mean(0).sum()), rel=1e-9)
    assert margins.abs().min() > 1e-6


def test_away_from_the_reference_dpo_is_its_formula() -> None:
    policy, objective = linear_policy(dtype=torch.float64, fresh=False), dpo()
    batch, state = make_batch(policy, objective, [PAIR, PAIR[::-1]]), moved(policy)
    value, _, terms = run_terms(objective, batch, context(policy, reference=state))
    probes, expected = draw_probes(batch, 2, shared=True), 0.0
    references = reference_errors(policy, state, batch, probes)
    with torch.no_grad():
        lives = matching_errors(policy, batch, probes)
    for term, e, ref in zip(terms, lives, references, strict=True):
        for winner, loser in ((0, 1), (3, 2)):
            margin = float((e[winner] - ref[winner]) - (e[loser] - ref[loser]))
            expected += -math.log(1 / (1 + math.exp(4.0 * margin))) / len(lives)  # -log sigmoid(-(beta / 2) margin), beta 8
            assert float(term.means["pair_margin"][winner]) == pytest.approx(margin, rel=1e-9)
            assert float(term.means["pair_accuracy"][winner]) == float(margin < 0)
    assert value == pytest.approx(2 * expected, rel=1e-9)


def test_away_from_the_reference_dgpo_weighs_groups_and_sends_no_gradient_through_the_weight() -> None:
    policy, objective = linear_policy(dtype=torch.float64, fresh=False), dgpo(beta=6.0, clip_range=0.0)
    batch, state = make_batch(policy, objective, [SCORES, SCORES[::-1]]), moved(policy)
    value, gradient, _ = run_terms(objective, batch, context(policy, ema_ref=state))
    probes = draw_probes(batch, 2, 0.7, shared=True)
    references = reference_errors(policy, state, batch, probes)
    with torch.no_grad():
        lives = matching_errors(policy, batch, probes)
    weights, expected = torch.zeros(2, 8, dtype=torch.float64), 0.0
    for n, (d, ref) in enumerate(zip(lives, references, strict=True)):
        for members in (range(4), range(4, 8)):
            s = 6.0 / 4 * sum(float(batch.advantages[i] * (d[i] - ref[i])) for i in members)
            for i in members:
                weights[n, i] = float(batch.advantages[i]) / (1 + math.exp(-s))
                expected += float(weights[n, i] * d[i]) / 2
    assert value == pytest.approx(expected, rel=1e-9)
    check_parallel(gradient, matching_gradient(policy, batch, probes, weights))
    assert (weights / batch.advantages - 0.5).abs().max() > 1e-3  # it was away


def test_group_weights_by_hand() -> None:
    gains = torch.tensor([0.02, -0.01, 0.5], dtype=torch.float64)
    found = group_weights(gains, torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64), torch.tensor([4, 4, 9]), 100.0)
    # s = -(100 / 2) (.02 + .01) = -1.5 and -(100 / 1) .5 = -50
    assert found.tolist() == pytest.approx([1 / (1 + math.exp(1.5))] * 2 + [1 / (1 + math.exp(50.0))], rel=1e-9)
    assert group_sums(torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([7, 3, 7, 3])).tolist() == [5.0, 10.0, 5.0, 10.0]


def test_preference_loss_by_hand() -> None:
    found = preference_loss(torch.tensor([0.0, -1.0, 1.0], dtype=torch.float64), 2.0)
    assert found.tolist() == pytest.approx([math.log(2), math.log(1 + math.exp(-1.0)), math.log(1 + math.e)], abs=1e-12)


def test_the_clip_rests_exactly_the_samples_that_went_further_along_their_advantage() -> None:
    policy, objective = linear_policy(dtype=torch.float64, fresh=False), dgpo(clip_range=0.01, timesteps_per_sample=1)
    batch, state = make_batch(policy, objective, [SCORES, SCORES[::-1]]), moved(policy)
    value, gradient, (term,) = run_terms(objective, batch, context(policy, ema_ref=state))
    free, _, (unclipped,) = run_terms(dgpo(clip_range=0.0, timesteps_per_sample=1), batch, context(policy, ema_ref=state))
    gains = term.means["error_gain"].tolist()
    rests = [math.exp(gain) > 1.01 if a > 0 else math.exp(gain) < 0.99 for gain, a in zip(gains, batch.advantages.tolist(), strict=True)]
    assert 0 < sum(rests) < len(rests)
    assert term.means["clip_fraction"].tolist() == [float(rest) for rest in rests]
    assert torch.equal(term.means["group_weight"], unclipped.means["group_weight"])  # s_G counts them all
    assert value == free  # the clip stops gradients and keeps values
    weights = term.means["group_weight"] * batch.advantages * torch.tensor([0.0 if rest else 1.0 for rest in rests])
    check_parallel(gradient, matching_gradient(policy, batch, draw_probes(batch, 1, 0.7, shared=True), weights))
    assert unclipped.means["clip_fraction"].sum() == 0


CASES = pytest.mark.parametrize(
    ("objective", "advantages", "snapshot"), [(dgpo(beta=6.0), SCORES, EMA_REF), (dpo(), PAIR, "reference")], ids=["dgpo", "dpo"]
)  # fmt: skip


@CASES
def test_groups_of_a_micro_batch_do_not_touch_each_other(objective: Any, advantages: list[float], snapshot: str) -> None:
    policy = linear_policy(dtype=torch.float64, fresh=False)
    where = context(policy, **{snapshot: moved(policy)})
    both, first, second = (make_batch(policy, objective, [advantages, advantages[::-1]], groups) for groups in ((0, 1), (0,), (1,)))
    value, gradient, terms = run_terms(objective, both, where)
    parts = [run_terms(objective, batch, where) for batch in (first, second)]
    assert value == pytest.approx(sum(part[0] for part in parts), rel=1e-12)  # sums in another order
    torch.testing.assert_close(gradient, parts[0][1] + parts[1][1], rtol=1e-10, atol=1e-13)
    for n, term in enumerate(terms):
        for name, values in term.means.items():
            torch.testing.assert_close(values, torch.cat([part[2][n].means[name] for part in parts]), rtol=1e-12, atol=1e-14)


@CASES
def test_a_group_shares_its_sigmas_and_noise_and_no_other_group_has_them(objective: Any, advantages: list[float], snapshot: str) -> None:
    policy = linear_policy(dtype=torch.float64, fresh=False)
    batch = make_batch(policy, objective, [advantages, advantages])
    anchors = objective.anchors(batch, context(policy, **{snapshot: policy.read_adapter()}))
    probes = anchors if isinstance(anchors, Probes) else anchors.probes
    size = len(advantages)
    for members in (slice(0, size), slice(size, 2 * size)):
        assert torch.equal(probes.noise[:, members], probes.noise[:, members][:, :1].expand(-1, size, -1, -1, -1))
        assert torch.equal(probes.sigma[:, members], probes.sigma[:, members][:, :1].expand(-1, size))
    assert (probes.noise[:, 0] != probes.noise[:, size]).all()


def settings(name: str, **changes: Any) -> dict[str, Any]:
    """Of a learner with few, moderate steps."""
    if name == "dgpo":
        return {"objective": DgpoConfig(**({"beta": 6.0, "kl_beta": 0.01} | changes)), "micro_batch": 24}
    facts: dict[str, Any] = {"beta": 8.0, "reference_interval": 2} | changes
    return {"objective": DpoConfig(**facts), "advantage": AdvantageConfig(kind="pair"), "micro_batch": 8}


NAMES = pytest.mark.parametrize("name", ["dgpo", "dpo"])


def away(learner: Learner) -> Learner:
    """The learner as if it had trained: its live adapter left its snapshots."""
    generator = torch.Generator().manual_seed(1)
    learner.live = {key: tensor + 0.2 * torch.randn(tensor.shape, generator=generator) for key, tensor in learner.live.items()}
    learner.version = 1
    return learner


@NAMES
def test_micro_batches_of_whole_groups_give_the_same_update(name: str) -> None:
    facts = settings(name)
    batch = batch_of(linear_policy(), 2)
    results = []
    for divisor in (1, 2, 4):
        learner = away(learner_of(**(facts | {"micro_batch": facts["micro_batch"] // divisor, "optimizer_steps": 1})))
        results.append((learner.update(*batch).metrics, flat(learner.live)))
    for metrics, live in results[1:]:
        assert metrics["grad_norm"] == pytest.approx(results[0][0]["grad_norm"], rel=1e-5)  # O8
        assert metrics["loss"] == pytest.approx(results[0][0]["loss"], abs=1e-5)
        torch.testing.assert_close(live, results[0][1], rtol=0, atol=1e-5)  # Adam divides by the gradient's size
    assert results[0][0]["num_samples"] == (24 if name == "dgpo" else 8)  # the four groups' pairs


@NAMES
def test_a_constant_reward_moves_nothing(name: str) -> None:
    learner = learner_of(**settings(name), weight_decay=0.1)
    manifest, groups = batch_of(linear_policy())
    before = flat(learner.live).clone()
    result = learner.update(replace(manifest, groups=tuple(replace(g, scores={"r": (0.7,) * 6}) for g in manifest.groups)), groups)
    assert torch.equal(flat(learner.live), before)  # O11: bitwise
    assert result.num_steps == 0 and result.batch.flat.all()


@NAMES
def test_six_updates_equal_three_saved_loaded_elsewhere_and_three_more(name: str) -> None:
    whole = check_resume(lambda: learner_of(**settings(name), optimizer_steps=2), batch_with, updates=6, cut=3)
    assert whole.snapshots.counts == {"ema": 12, **({EMA_REF: 12} if name == "dgpo" else {"reference": 6})}


def test_the_reference_is_copied_after_every_interval_of_updates_and_untouched_between() -> None:
    assert [reference_rule(3).decay(n) for n in range(7)] == [1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0]
    assert [reference_rule(1).decay(n) for n in range(3)] == [0.0, 0.0, 0.0]
    snapshots, seen = Snapshots({"x": torch.tensor([0.1])}, {"reference": reference_rule(3)}), []
    for update in range(1, 8):
        snapshots.move(Moment.STEP, {"x": torch.tensor([99.0])})  # it does not move with steps
        snapshots.move(Moment.UPDATE, {"x": torch.tensor([update + 0.1])})
        seen.append(snapshots.states["reference"]["x"].clone())
    expected = [0.1, 0.1, 3.1, 3.1, 3.1, 6.1, 6.1]
    assert torch.equal(torch.cat(seen), torch.tensor(expected))  # bitwise: copies, not averages
    assert DpoConfig().reference_interval == 40


def test_a_learner_keeps_the_reference_of_its_last_full_interval() -> None:
    learner = learner_of(**settings("dpo"))
    fresh, seen = flat(learner.live).clone(), []
    for update in range(1, 5):
        learner.update(*batch_with(learner, update))
        seen.append((flat(learner.live).clone(), flat(learner.snapshots.states["reference"]).clone()))
    lives, references = zip(*seen, strict=True)
    for found, expected in zip(references, [fresh, lives[1], lives[1], lives[3]], strict=True):
        assert torch.equal(found, expected)
    assert not torch.equal(lives[0], fresh)


def test_the_close_reference_follows_its_schedule() -> None:
    rule = ema_ref_rule(Moment.STEP)
    assert [rule.decay(n) for n in (0, 1, 100, 299, 300, 5000)] == pytest.approx([0.0, 0.001, 0.1, 0.299, 0.3, 0.3])  # O9
    learner = learner_of(**settings("dgpo"))
    learner.update(*batch_of(linear_policy()))
    first = flat(learner.live).clone()
    assert torch.equal(flat(learner.snapshots.states[EMA_REF]), first)  # d(0) = 0
    learner.update(*batch_with(learner, 2))
    expected = 0.001 * first + 0.999 * flat(learner.live)
    torch.testing.assert_close(flat(learner.snapshots.states[EMA_REF]), expected, rtol=1e-6, atol=1e-7)


def test_interval_zero_holds_pairs_against_the_base_itself() -> None:
    policy, objective = linear_policy(dtype=torch.float64, fresh=False), dpo(reference_interval=0)
    batch = make_batch(policy, objective, [PAIR, PAIR])
    policy.num_forwards["off"] = 0
    value, _, _ = run_terms(objective, batch, context(policy))
    assert policy.num_forwards["off"] == 2  # a sigma each
    silent = {key: torch.zeros_like(tensor) for key, tensor in policy.read_adapter().items()}
    assert value == run_terms(dpo(), batch, context(policy, reference=silent))[0]
    assert objective.needs.base and not objective.needs.snapshots
    assert not dpo().needs.base and list(dpo().needs.snapshots) == ["reference"]


def test_the_kl_of_dgpo_pulls_to_the_base_and_without_it_no_base_forward_runs() -> None:
    policy, objective = linear_policy(dtype=torch.float64, fresh=False), dgpo(kl_beta=0.5, timesteps_per_sample=1)
    batch = make_batch(policy, objective, [[0.0] * 4, [0.0] * 4])
    where = context(policy, ema_ref=policy.read_adapter())
    value, gradient, (term,) = run_terms(objective, batch, where)
    probes = draw_probes(batch, 1, 0.7, shared=True)
    level = probes.sigma[0].view(-1, 1, 1, 1)
    a, b = (p.detach() for p in policy.adapter_parameters())
    distance = (((1 - level) * batch.clean + level * probes.noise[0]).flatten(1) @ a.T @ b.T).square().mean(1)  # live - base = B A x
    torch.testing.assert_close(term.means["kl"], distance, rtol=1e-10, atol=0)
    assert value == pytest.approx(0.5 * float(distance.sum()), rel=1e-10)
    assert gradient.norm() > 0
    policy.num_forwards["off"] = 0
    run_terms(dgpo(), batch, where)
    assert policy.num_forwards["off"] == 0
    assert objective.needs.base and not dgpo().needs.base


def test_groups_that_are_no_pairs_are_refused_with_the_remedy() -> None:
    learner = learner_of(**(settings("dpo") | {"advantage": AdvantageConfig(), "micro_batch": 24}))
    with pytest.raises(ConfigError, match=r"set learner\.advantage\.kind='pair'"):
        learner.update(*batch_of(linear_policy()))
    policy = linear_policy(dtype=torch.float64)
    for sides in ([1.0, 1.0], [1.0, 0.0]):
        with pytest.raises(ConfigError, match="one sample with a positive and one with a negative"):
            dpo().anchors(make_batch(policy, dpo(), [PAIR, sides]), context(policy, reference=policy.read_adapter()))
    dpo().anchors(make_batch(policy, dpo(), [PAIR, [0.3, -0.7]]), context(policy, reference=policy.read_adapter()))  # clipped below 1


def facts(**changes: Any) -> RunFacts:
    found: dict[str, Any] = {
        "kernel": "ode", "noise_level": 0.0, "num_steps": 10, "window": frozenset(), "window_size": 0, "guidance_scale": 1.0,
        "snapshot": "live", "shared_init": False, "group_size": 16, "micro_batch": 16, "optimizer_steps": 1, "advantage": "group_std",
        "recomputes": False,
    }  # fmt: skip
    return RunFacts(**(found | changes))


@pytest.mark.parametrize(
    ("objective", "changes", "remedy"),
    [
        (DgpoConfig(), {"micro_batch": 15}, "raise micro_batch to it"),
        (DgpoConfig(), {"advantage": "best"}, "'best' leaves one; set it to 'group_std'"),
        (DgpoConfig(timesteps_per_sample=8), {}, "exceeds the 7 sigmas"),
        (DpoConfig(), {}, "learner.advantage.kind='group_std' does not choose them; set learner.advantage.kind='pair'"),
        (DpoConfig(), {"advantage": "pair", "micro_batch": 1}, "raise it to 2 or more"),
        (DpoConfig(timesteps_per_sample=11), {"advantage": "pair"}, "exceeds the 10 sigmas"),
    ],
)
def test_what_cannot_run_is_refused_with_the_remedy(objective: Any, changes: dict[str, Any], remedy: str) -> None:
    (problem,) = objective.problems(facts(**changes))
    assert remedy in problem


def test_what_fits_is_not_refused_and_costs_what_it_forwards() -> None:
    assert DgpoConfig().problems(facts()) == DpoConfig().problems(facts(advantage="pair", micro_batch=2)) == []
    assert DgpoConfig().forwards(facts()) == 4 * (3 + 1 + 1)
    assert DgpoConfig(kl_beta=0.0).forwards(facts()) == 4 * (3 + 1)
    assert DpoConfig().forwards(facts()) == 2 * (3 + 1)
    assert DgpoConfig().make("recompute") == Dgpo(config=DgpoConfig()) and DpoConfig().make("behavior") == Dpo(config=DpoConfig())
