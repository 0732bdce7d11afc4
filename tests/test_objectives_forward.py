"""Forward-process objectives against closed forms: O5, O6, O8 (algorithms, sections 26.4 and 27), their probes and anchors."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch

from common.errors import ConfigError
from common.types import Manifest, RolloutGroup
from learner.advantages import make_estimator
from learner.config import AdvantageConfig, LearnerConfig
from learner.gates import StartGates
from learner.minibatches import SampleRef, UpdateInput, collate, plan_minibatches
from learner.objectives.awm import Awm, AwmConfig, LikelihoodAnchor, log_likelihood
from learner.objectives.base import LossContext, LossTerm, MicroBatch, Needs, Objective
from learner.objectives.nft import BEHAVIOR, Nft, NftConfig
from learner.objectives.orw import Orw, OrwConfig
from learner.objectives.probes import Probes, draw_probes
from learner.objectives.rwr import Rwr, RwrConfig, reward_weights
from learner.objectives.settings import ObjectiveSettings, RunFacts
from learner.objectives.sft import Sft, SftConfig
from learner.objectives.vgrpo import Vgrpo, VgrpoConfig, soft_clipped
from learner.snapshots import EMA_REF, Moment, ema_ref_rule
from learner.update import Learner, make_learner
from tests.learner_fakes import manifest_of, sample_groups, sampler_spec, score_by_latents
from tests.learner_policies import StubPolicy, linear_policy
from tests.test_learner_objectives import flat_gradient, in_double, run_terms

BEST = AdvantageConfig(kind="best")
FAMILY: dict[str, ObjectiveSettings] = {
    "awm": AwmConfig(timesteps_per_sample=2),
    "vgrpo": VgrpoConfig(timesteps_per_sample=2, kl_beta=1e-2),
    "rwr": RwrConfig(kl_beta=1e-2),
    "sft": SftConfig(),
    "orw": OrwConfig(),
}
ALL = pytest.mark.parametrize("name", FAMILY)


def facts(**changes: Any) -> RunFacts:
    found: dict[str, Any] = {
        "kernel": "ode", "noise_level": 0.0, "num_steps": 6, "window": frozenset(), "window_size": 0, "guidance_scale": 1.0,
        "snapshot": "live", "shared_init": False, "group_size": 6, "micro_batch": 24, "optimizer_steps": 1, "advantage": "group_std",
        "recomputes": True,
    }  # fmt: skip
    return RunFacts(**(found | changes))


def scored_groups(policy: StubPolicy, update: int = 1, num_groups: int = 4) -> tuple[Manifest, list[RolloutGroup]]:
    """Groups of six, with rewards in (0, 1) that differ."""
    numbers = range((update - 1) * num_groups, update * num_groups)
    groups = sample_groups(policy, numbers, 6, sampler_spec(kernel="ode", window=()), version=update - 1)
    return manifest_of(update, groups, score_by_latents(groups, lambda x: float(1 / (1 + np.exp(-x[0]))))), groups


def batch_of(policy: StubPolicy, objective: Objective[Any], kind: str = "group_std", num_groups: int = 2) -> MicroBatch:
    """All unmasked samples of some groups as one micro-batch, in float64."""
    manifest, groups = scored_groups(policy, num_groups=num_groups)
    batch = make_estimator(AdvantageConfig(kind=kind)).estimate(manifest, {"r": 1.0})  # type: ignore[arg-type]
    source = UpdateInput(manifest=manifest, groups=tuple(groups), batch=batch, run_seed=3, advantage_clip=5.0)
    refs = [SampleRef(group=int(group), sample=int(sample)) for group, sample in np.argwhere(batch.mask)]
    return in_double(collate(refs, source, objective.needs, policy))


def context(policy: StubPolicy, **snapshots: dict[str, torch.Tensor]) -> LossContext:
    return LossContext(policy=policy, snapshots=snapshots, advantage_clip=5.0)


def at_sampling_weights(policy: StubPolicy) -> LossContext:
    """Every reference of the family is the live adapter."""
    return context(policy, **{name: policy.read_adapter() for name in (BEHAVIOR, EMA_REF)})


def anchors_of(objective: Objective[Any], batch: MicroBatch, where: LossContext) -> Any:
    """As the learner takes them: without grad."""
    with torch.no_grad():
        return objective.anchors(batch, where)


def learner_of(settings: ObjectiveSettings, **changes: Any) -> Learner:
    found = {"groups_per_update": 4, "micro_batch": 24, "learning_rate": 1e-2, "max_grad_norm": 100.0}
    if isinstance(settings, SftConfig):
        found["advantage"] = BEST
    return make_learner(linear_policy(), LearnerConfig(objective=settings, **(found | changes)), {"r": 1.0}, 11)


# --- the first-order identity (26.4, O5, O6) ---

Weigh = Callable[[MicroBatch, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # batch, t, e, x_0-space residual -> [B]


def matching_gradient(policy: StubPolicy, batch: MicroBatch, probes: Probes, weigh: Weigh) -> torch.Tensor:
    """Gradient of sum_i mean_n weight_i mean_d (v - (eps - x_0))^2 with detached weights, written out."""
    for parameter in policy.adapter_parameters():
        parameter.grad = None
    for sigma, noise in zip(probes.sigma, probes.noise, strict=True):
        level = sigma.view(-1, 1, 1, 1)
        latents = (1 - level) * batch.clean + level * noise
        velocity = policy.velocity(latents, sigma, batch.features)
        error = (velocity - noise + batch.clean).square().flatten(1).mean(1)
        residual = (latents - level * velocity - batch.clean).detach()
        (weigh(batch, sigma, error.detach(), residual) * error).sum().div(len(probes.sigma)).backward()
    return flat_gradient(policy)


def share(batch: MicroBatch) -> torch.Tensor:
    """A / advantage clip."""
    return batch.advantages / 5


def adaptive(batch: MicroBatch, t: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """t^2 / w: an x_0-space error under the adaptive weight, seen as a velocity's."""
    return t.square() / residual.abs().flatten(1).mean(1)


IDENTITIES: dict[str, tuple[Objective[Any], Weigh]] = {
    "nft": (Nft(config=NftConfig()), lambda b, t, e, r: b.advantages * adaptive(b, t, r)),  # (2 rho - 1) * 5 = A
    "awm-uniform": (Awm(config=AwmConfig(weighting="uniform")), lambda b, t, e, r: share(b)),
    "awm-t": (Awm(config=AwmConfig(weighting="t")), lambda b, t, e, r: share(b) * t),
    "awm-t2": (Awm(config=AwmConfig(weighting="t2")), lambda b, t, e, r: share(b) * t.square()),
    "awm-huber": (Awm(config=AwmConfig(weighting="huber")), lambda b, t, e, r: share(b) * t * 0.5 * (e + 1e-10) ** -0.5),
    "awm-ghuber": (Awm(config=AwmConfig()), lambda b, t, e, r: share(b) * t * (e + 1e-10) ** -0.75),
    "vgrpo": (Vgrpo(config=VgrpoConfig()), lambda b, t, e, r: 2 * torch.tanh(b.advantages / 2) * adaptive(b, t, r)),
    "rwr": (Rwr(config=RwrConfig()), lambda b, t, e, r: b.rewards),
    "rwr-exp": (Rwr(config=RwrConfig(temperature=3.0)), lambda b, t, e, r: (3 * b.rewards).exp()),
    "sft": (Sft(config=SftConfig()), lambda b, t, e, r: torch.ones_like(t)),
    "orw": (Orw(config=OrwConfig()), lambda b, t, e, r: b.rewards.exp()),
}


@pytest.mark.parametrize("name", IDENTITIES)
def test_at_the_sampling_weights_the_gradient_is_the_weight_times_that_of_flow_matching(name: str) -> None:
    objective, weigh = IDENTITIES[name]
    policy = linear_policy(dtype=torch.float64)  # a fresh adapter: the base, too, is the sampling policy
    batch = batch_of(policy, objective, "best" if name == "sft" else "group_std")
    _, gradient, _ = run_terms(objective, batch, at_sampling_weights(policy))
    anchors = anchors_of(objective, batch, at_sampling_weights(policy))
    expected = matching_gradient(policy, batch, anchors if isinstance(anchors, Probes) else anchors.probes, weigh)
    assert torch.nn.functional.cosine_similarity(gradient, expected, dim=0) > 1 - 1e-8  # O5, O6
    assert gradient.norm() / expected.norm() == pytest.approx(1.0, abs=1e-6)  # and the stated factor; the weights' rewards are float32


@pytest.mark.parametrize("name", ["awm", "vgrpo"])
def test_on_policy_the_ratio_is_one_and_the_loss_minus_the_sum_of_the_advantages(name: str) -> None:
    policy = linear_policy(dtype=torch.float64, fresh=False)
    objective: Objective[Any] = (
        Awm(config=AwmConfig(kl_beta=0.0)) if name == "awm" else Vgrpo(config=VgrpoConfig())
    )  # fmt: skip
    batch = batch_of(policy, objective)
    value, _, terms = run_terms(objective, batch, at_sampling_weights(policy))
    advantages = share(batch) if name == "awm" else 2 * torch.tanh(batch.advantages / 2)
    assert all(term.ranges["ratio"].tolist() == [1.0] * batch.num_samples for term in terms)  # R1: bitwise
    assert value == pytest.approx(-float(advantages.sum()), abs=1e-12)


# --- AWM ---


@pytest.mark.parametrize(
    ("weighting", "expected"),
    [
        ("uniform", [-4.0, -0.0625, 0.0]),
        ("t", [-2.0, -0.0625, 0.0]),
        ("t2", [-1.0, -0.0625, 0.0]),
        ("huber", [-0.5 * 2.0, -0.25, 0.0]),  # -t sqrt(e), up to 1e-5
        ("ghuber", [-0.5 * 4 * 2**0.5, -4 * 0.5, 0.0]),  # -4 t e^(1/4), up to 4 t 1e-10^(1/4) = .0126 t
    ],
)
def test_the_surrogate_weighs_the_error_as_published(weighting: Any, expected: list[float]) -> None:
    error = torch.tensor([4.0, 0.0625, 0.0], dtype=torch.float64, requires_grad=True)
    sigma = torch.tensor([0.5, 1.0, 1.0], dtype=torch.float64)
    found = log_likelihood(error, sigma, weighting)
    offset = {"huber": 1e-5, "ghuber": 4 * 1e-10**0.25}.get(weighting, 0.0) * sigma * (error.detach() > 0)
    torch.testing.assert_close(found.detach(), torch.tensor(expected, dtype=torch.float64) + offset, rtol=0, atol=1e-8)
    (slope,) = torch.autograd.grad(found.sum(), error)
    assert slope.isfinite().all() and (slope < 0).all()  # at an error of 0, too


def test_awm_stops_at_twice_the_ratio_and_pushes_without_a_stop_but_ever_less() -> None:
    policy = linear_policy(dtype=torch.float64, fresh=False)
    objective = Awm(config=AwmConfig(kl_beta=0.0, ema_kl_beta=0.0, timesteps_per_sample=1))
    batch = batch_of(policy, objective)
    found = anchors_of(objective, batch, context(policy))

    def gradient(advantage: float, log_ratio: float) -> float:
        anchors = LikelihoodAnchor(probes=found.probes, log_likelihood=found.log_likelihood - log_ratio)
        (term,) = objective.losses(replace(batch, advantages=torch.full_like(batch.advantages, advantage)), anchors, context(policy))
        for parameter in policy.adapter_parameters():
            parameter.grad = None
        term.loss.backward()
        return float(flat_gradient(policy).norm())

    assert gradient(5.0, np.log(2.1)) == 0.0
    assert gradient(5.0, np.log(1.9)) == pytest.approx(1.9 * gradient(5.0, 0.0), rel=1e-9)
    assert gradient(-5.0, np.log(0.01)) == pytest.approx(0.01 * gradient(-5.0, 0.0), rel=1e-9)


def test_the_kl_terms_of_awm_are_velocity_errors_to_their_references() -> None:
    policy = linear_policy(dtype=torch.float64, fresh=False)
    plain, both = (Awm(config=AwmConfig(ema_kl_beta=ema, kl_beta=base)) for ema, base in ((0.0, 0.0), (1.0, 0.5)))
    reference = {name: tensor * (0.5 if name == "b" else 1.0) for name, tensor in policy.read_adapter().items()}
    batch = batch_of(policy, both)
    without, _, _ = run_terms(plain, batch, context(policy))
    value, gradient, terms = run_terms(both, batch, context(policy, ema_ref=reference))
    a, b = policy.adapter_parameters()
    probes, total = both.config.draw(batch), torch.zeros((), dtype=torch.float64)
    for term, sigma, noise in zip(terms, probes.sigma, probes.noise, strict=True):
        level = sigma.view(-1, 1, 1, 1)
        moved = ((1 - level) * batch.clean + level * noise).flatten(1) @ a.T @ b.T  # live - base = B A x
        squared = moved.square().mean(1)
        torch.testing.assert_close(term.means["kl"], squared.detach(), rtol=1e-9, atol=0)
        torch.testing.assert_close(term.means["kl_ema_ref"], squared.detach() / 4, rtol=1e-9, atol=0)  # the reference stands half way
        held = (moved - moved.detach() / 2).square().mean(1)
        total = total + (0.5 * squared + held).sum() / 6
    assert value - without == pytest.approx(float(total.detach()), rel=1e-9)
    _, alone, _ = run_terms(plain, batch, context(policy))
    expected = torch.cat([part.flatten() for part in torch.autograd.grad(total, [a, b])])
    torch.testing.assert_close(gradient - alone, expected, rtol=1e-8, atol=1e-10)


def test_ema_ref_follows_each_update_with_the_published_decay() -> None:
    rule = ema_ref_rule(Moment.UPDATE)
    assert [rule.decay(n) for n in (0, 1, 100, 300, 10_000)] == pytest.approx([0.0, 0.001, 0.1, 0.3, 0.3])
    assert set(Awm(config=AwmConfig()).needs.snapshots) == {EMA_REF}
    assert Awm(config=AwmConfig(ema_kl_beta=0.0)).needs.snapshots == {}
    learner = learner_of(AwmConfig())
    learner.update(*scored_groups(learner.policy))  # type: ignore[arg-type]
    for name, tensor in learner.live.items():
        torch.testing.assert_close(learner.snapshot_state(EMA_REF)[name], tensor, rtol=0, atol=0)  # d(0) = 0
    assert learner.snapshots.counts[EMA_REF] == 1


def test_the_penalty_holds_the_second_step_of_an_update_near_the_weights_that_it_began_with() -> None:
    """Were ema_ref to follow each step, it would stand on the live weights when the second step is taken, and hold nothing."""
    learner = learner_of(AwmConfig(), optimizer_steps=2)
    first = learner.update(*scored_groups(learner.policy)).metrics  # type: ignore[arg-type]
    assert first["kl_ema_ref"] > 0.0  # the mean over both steps; at the first one the reference is where the policy is


# --- V-GRPO ---


def test_vgrpo_adds_up_to_the_clipped_ratio_of_the_whole_image() -> None:
    policy = linear_policy(dtype=torch.float64, fresh=False)
    objective = Vgrpo(config=VgrpoConfig(clip_range=0.2, kl_beta=0.3))
    batch = batch_of(policy, objective)
    anchors = anchors_of(objective, batch, context(policy))
    shifts = torch.linspace(-0.5, 0.5, batch.num_samples, dtype=torch.float64)  # ratios of .6 to 1.65: some of them stopped
    anchors = replace(anchors, log_likelihood=anchors.log_likelihood - shifts)
    for parameter in policy.adapter_parameters():
        parameter.grad = None
    value = 0.0
    for term in objective.losses(batch, anchors, context(policy)):
        term.loss.backward()
        value += float(term.loss.detach())
    gradient = flat_gradient(policy)
    expected = image_loss(policy, batch, anchors, objective.config)
    assert value == pytest.approx(float(expected.detach()), rel=1e-10)
    direct = torch.cat([part.flatten() for part in torch.autograd.grad(expected, policy.adapter_parameters())])
    torch.testing.assert_close(gradient, direct, rtol=1e-9, atol=1e-12)
    stopped = ((shifts > np.log(1.2)) & (batch.advantages > 0)) | ((shifts < np.log(0.8)) & (batch.advantages < 0))
    torch.testing.assert_close(term.means["clip_fraction"], stopped.float(), rtol=0, atol=0)
    assert 0 < stopped.float().mean() < 1


def image_loss(policy: StubPolicy, batch: MicroBatch, anchors: Any, config: VgrpoConfig) -> torch.Tensor:
    """Written out with all graphs at once."""
    likelihoods, gaps = [], []
    a, b = policy.adapter_parameters()
    for sigma, noise, weight in zip(anchors.probes.sigma, anchors.probes.noise, anchors.weight, strict=True):
        level = sigma.view(-1, 1, 1, 1)
        latents = (1 - level) * batch.clean + level * noise
        residual = latents - level * policy.velocity(latents, sigma, batch.features) - batch.clean
        torch.testing.assert_close(weight, residual.detach().abs().flatten(1).mean(1), rtol=1e-12, atol=0)
        likelihoods.append(-residual.square().flatten(1).mean(1) / weight)
        gaps.append((latents.flatten(1) @ a.T @ b.T).square().mean(1))
    ratio = (torch.stack(likelihoods) - anchors.log_likelihood).mean(0).exp()
    advantages = soft_clipped(batch.advantages, config.soft_clip)
    clipped = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - config.clip_range, 1 + config.clip_range))
    return (clipped + config.kl_beta * torch.stack(gaps).mean(0)).sum()


def test_soft_clipping_keeps_small_advantages_and_bounds_large_ones() -> None:
    found = soft_clipped(torch.tensor([-100.0, -0.01, 0.0, 0.01, 2.0]), 2.0)
    torch.testing.assert_close(found, torch.tensor([-2.0, -0.01, 0.0, 0.01, 2 * float(np.tanh(1.0))]), rtol=1e-4, atol=0)


@dataclass(frozen=True, slots=True)
class Recorder:
    """An objective that writes down the ratios of every minibatch."""

    inner: Objective[Any]
    seen: list[torch.Tensor] = field(default_factory=list)

    @property
    def needs(self) -> Needs:
        return self.inner.needs

    def anchors(self, batch: MicroBatch, context: LossContext) -> Any:
        return self.inner.anchors(batch, context)

    def losses(self, batch: MicroBatch, anchors: Any, context: LossContext) -> Iterator[LossTerm]:
        terms = []
        for term in self.inner.losses(batch, anchors, context):
            terms.append(term.ranges["ratio"])
            yield term
        self.seen.append(torch.cat(terms))


@pytest.mark.parametrize("name", ["awm", "vgrpo"])
def test_the_stored_likelihood_stays_for_all_steps_of_an_update_and_is_taken_anew_in_the_next(name: str) -> None:
    settings = FAMILY[name]
    config = LearnerConfig(objective=settings, groups_per_update=4, optimizer_steps=2, micro_batch=12, learning_rate=1e-2)
    recorder = Recorder(settings.make("recompute"))
    learner = Learner(
        linear_policy(),
        config,
        recorder,
        make_estimator(config.advantage),
        weights={"r": 1.0},
        run_seed=1,
        gates=StartGates(micro_batch=12),
    )
    for update in (1, 2):
        learner.update(*scored_groups(learner.policy, update))  # type: ignore[arg-type]
    assert len(recorder.seen) == 4  # a minibatch of 12 a step
    for first, second in (recorder.seen[:2], recorder.seen[2:]):
        assert (first == 1.0).all()
        assert (second != 1.0).all()  # the first step moved the policy under the second's stored likelihood


# --- the weighted regressions ---


def test_reward_weights_are_the_raw_reward_or_its_exponential_and_never_negative() -> None:
    rewards = torch.tensor([0.0, 0.5, 2.0])
    assert reward_weights(rewards, 0.0).tolist() == [0.0, 0.5, 2.0]
    torch.testing.assert_close(reward_weights(-rewards, 2.0), torch.tensor([1.0, float(np.exp(-1)), float(np.exp(-4))]))
    with pytest.raises(ConfigError, match="temperature"):
        reward_weights(torch.tensor([0.5, -0.1]), 0.0)


def test_the_w2_term_of_orw_rests_at_the_base_and_pulls_back_from_elsewhere() -> None:
    objective = Orw(config=OrwConfig(temperature=0.0, alpha=2.0))
    fresh, moved = (linear_policy(dtype=torch.float64, fresh=fresh) for fresh in (True, False))
    batch = batch_of(fresh, objective)
    batch = replace(batch, rewards=torch.zeros_like(batch.rewards))  # the W2 term alone
    value, gradient, _ = run_terms(objective, batch, context(fresh))
    assert value == 0.0 and gradient.norm() == 0.0
    value, gradient, terms = run_terms(objective, batch, context(moved))
    assert value == pytest.approx(2 * sum(float(term.means["kl"].sum()) for term in terms) / 2, rel=1e-12)
    adapter = torch.cat([parameter.detach().flatten() for parameter in moved.adapter_parameters()])
    assert value > 0 and gradient @ adapter > 0  # a step down the gradient shrinks B A
    assert not Orw(config=OrwConfig(alpha=0.0)).needs.base


def test_sft_trains_on_the_best_of_each_group_alone_and_refuses_other_advantages() -> None:
    policy = linear_policy(dtype=torch.float64, fresh=False)
    manifest, groups = scored_groups(policy)
    batch = make_estimator(BEST).estimate(manifest, {"r": 1.0})
    (plan,) = plan_minibatches(batch.mask, [g.sampler for g in groups], num_minibatches=1, micro_batch=24, seed=0, whole_groups=False)
    best = tuple(SampleRef(group=row, sample=int(np.argmax(entry.scores["r"]))) for row, entry in enumerate(manifest.groups))  # type: ignore[arg-type]
    assert plan.micro_batches == (best,)
    objective = Sft(config=SftConfig())
    source = UpdateInput(manifest=manifest, groups=tuple(groups), batch=batch, run_seed=3, advantage_clip=5.0)
    micro = in_double(collate(best, source, objective.needs, policy))
    _, gradient, _ = run_terms(objective, micro, context(policy))
    expected = matching_gradient(policy, micro, anchors_of(objective, micro, context(policy)), lambda b, t, e, r: torch.ones_like(t))
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=0)
    assert learner_of(SftConfig()).update(manifest, groups).metrics["num_samples"] == 4
    assert SftConfig().problems(facts(advantage="best")) == []
    assert "learner.advantage.kind='best'" in SftConfig().problems(facts())[0]


# --- NFT ---


def test_the_kl_of_nft_has_the_gradient_of_the_velocity_error_to_the_base() -> None:
    policy = linear_policy(dtype=torch.float64, fresh=False)
    objective = Nft(config=NftConfig(kl_beta=0.5))
    batch = batch_of(policy, objective)
    batch = replace(batch, advantages=torch.zeros_like(batch.advantages))  # at the behavior policy only the KL pulls
    _, gradient, _ = run_terms(objective, batch, at_sampling_weights(policy))
    a, b = policy.adapter_parameters()
    probes, total = draw_probes(batch, 2), torch.zeros((), dtype=torch.float64)
    for sigma, noise in zip(probes.sigma, probes.noise, strict=True):
        level = sigma.view(-1, 1, 1, 1)
        total = total + 0.5 * (((1 - level) * batch.clean + level * noise).flatten(1) @ a.T @ b.T).square().mean(1).sum() / 2
    expected = torch.cat([part.flatten() for part in torch.autograd.grad(total, [a, b])])
    torch.testing.assert_close(gradient, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("decay", "lags"), [("on_policy", False), ("linear", True), ("delayed", False)])
def test_the_behavior_policy_of_nft_is_the_live_one_after_the_first_update_and_lags_as_its_decay_says(decay: Any, lags: bool) -> None:
    learner = learner_of(NftConfig(decay=decay))
    states = []
    for update in (1, 2):
        learner.update(*scored_groups(learner.policy, update))  # type: ignore[arg-type]
        states.append((dict(learner.live), {name: tensor.clone() for name, tensor in learner.snapshot_state(BEHAVIOR).items()}))
    (first, behavior), (second, later) = states
    for name in first:
        assert torch.equal(behavior[name], first[name])  # O9: d(0) = 0
        expected = 0.001 * first[name] + 0.999 * second[name] if lags else second[name]
        torch.testing.assert_close(later[name], expected, rtol=5e-7, atol=1e-7)  # float32; the lag of 1e-5 is larger


# --- refusals ---


def test_what_cannot_be_trained_is_refused_with_a_remedy() -> None:
    assert all(settings.problems(facts(advantage="best")) == [] for settings in FAMILY.values())
    assert "lower it" in AwmConfig(timesteps_per_sample=7).problems(facts())[0]
    assert AwmConfig(timesteps_per_sample=7, times="stratified").problems(facts()) == []
    assert "times='uniform'" in RwrConfig(timestep_fraction=0.5).problems(facts())[0]
    assert "ema_kl_beta" in AwmConfig(ema_kl_beta=0.0, kl_beta=0.0).problems(facts())[0]
    assert AwmConfig(ema_kl_beta=0.0, kl_beta=0.0, clip_range=0.2).problems(facts()) == []
    assert AwmConfig().warnings(facts()) == []
    assert "guidance_scale=4.5" in AwmConfig().warnings(facts(guidance_scale=4.5))[0]
