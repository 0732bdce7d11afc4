"""The objectives over stored steps against closed forms: O1 - O4, O8, O11, O13, R1 (algorithms, section 27)."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from common.errors import ConfigError, CorruptFile
from common.flow.grid import sigma_grid
from common.flow.kernels import make_kernel
from common.types import Manifest, RolloutGroup
from learner.advantages import GroupStd
from learner.config import LearnerConfig
from learner.minibatches import SampleRef, UpdateInput, collate
from learner.objectives.base import LossTerm, MicroBatch, Objective
from learner.objectives.dance import Dance, DanceAnchor, DanceConfig, draw_steps, num_parts
from learner.objectives.dppo import Dppo, DppoConfig
from learner.objectives.grpo import GrpoConfig
from learner.objectives.guard import GuardConfig, normalized_log_ratio
from learner.objectives.replay import LogProbAnchor, MeanAnchor, block_of
from learner.objectives.settings import ObjectiveSettings, RunFacts
from learner.objectives.tempflow import TempflowConfig, noise_weights
from learner.update import make_learner
from rollout_workers.sampler import sample_group
from tests.learner_fakes import manifest_of, sample_groups, sampler_spec, score_by_latents
from tests.learner_policies import StubPolicy, linear_policy
from tests.test_learner_objectives import context, in_double, run_terms, transition_by_hand

RUN_SEED = 3
SETTINGS: dict[str, ObjectiveSettings] = {
    "grpo": GrpoConfig(clip_range=1e-3),
    "guard": GuardConfig(clip_range=1e-3),
    "dppo": DppoConfig(kl_limit=1e-2),
    "tempflow": TempflowConfig(clip_range=1e-3),
    "dance": DanceConfig(clip_range=1e-3),
}
KERNELS = {name: ("flow_sde", "dance_sde", "dpm_sde") + (("cps",) if name not in ("guard", "tempflow") else ()) for name in SETTINGS}
EACH = pytest.mark.parametrize("name", SETTINGS)
EACH_KERNEL = pytest.mark.parametrize(("name", "kernel"), [(name, kernel) for name in SETTINGS for kernel in KERNELS[name]])
FACTS = RunFacts(
    kernel="flow_sde", noise_level=0.7, num_steps=6, window=frozenset(range(5)), window_size=5, guidance_scale=1.0, snapshot="live",
    shared_init=False, group_size=24, micro_batch=16, optimizer_steps=2, advantage="group_std", recomputes=False,
)  # fmt: skip


def make_batch(
    policy: StubPolicy, objective: Objective[Any], kernel: str = "flow_sde", *, window: tuple[int, ...] | None = None,
    advantages: Sequence[float] | None = None, run_seed: int = RUN_SEED,
) -> MicroBatch:  # fmt: skip
    """4 samples of one group, optionally with given advantages; under dpm_sde without the step of std .008, where z loses three digits."""
    window = window or ((0, 1, 2, 3) if kernel == "dpm_sde" else (0, 1, 3, 4))
    groups = sample_groups(policy, [5], 4, sampler_spec(kernel, window=window), run_seed=run_seed)
    manifest = manifest_of(1, groups, score_by_latents(groups, lambda x: float(x[0])))
    batch = GroupStd(eps=1e-4).estimate(manifest, {"r": 1.0})
    if advantages is not None:
        batch.advantages[0] = advantages
    source = UpdateInput(manifest=manifest, groups=tuple(groups), batch=batch, run_seed=RUN_SEED, advantage_clip=5.0)
    return collate([SampleRef(group=0, sample=k) for k in range(4)], source, objective.needs, policy)


def step_weights(objective: Objective[Any], batch: MicroBatch, kernel: str) -> torch.Tensor:
    """[B, W]: what multiplies A grad log p of each step at the sampling weights, by hand from the papers' formulas."""
    block = block_of(batch)
    interval = block.sigma - block.next_sigma
    rate = torch.full_like(interval, 0.49)
    if kernel == "flow_sde":
        rate = 0.49 * block.sigma / (1 - torch.where(block.sigma == 1, block.next_sigma, block.sigma))
    std = torch.sqrt(rate * interval)
    if kernel == "dpm_sde":
        kept = (1 - block.sigma) * block.next_sigma / (block.sigma * (1 - block.next_sigma))
        std = block.next_sigma * torch.sqrt(1 - kept**0.49)
    match objective.config.name:  # type: ignore[attr-defined]
        case "guard":
            return std / interval / block.num_steps
        case "tempflow":
            return 2.25 * std / block.num_steps
        case "dance":
            steps = draw_steps(block, batch.probe_seeds, 0.6)
            return torch.zeros_like(std).scatter(1, steps, 1 / steps.shape[1])
    return torch.full_like(std, 1 / block.num_steps)


def weighted_gradient(policy: StubPolicy, batch: MicroBatch, kernel: str, weights: torch.Tensor) -> torch.Tensor:
    """sum_ij weight_ij d log p_ij / d(a, b) by hand for v = ... + B A x, in float64."""
    block = block_of(batch)
    a, b = (p.detach().double() for p in policy.adapter_parameters())
    grad_a, grad_b = torch.zeros_like(a), torch.zeros_like(b)
    for i in range(batch.num_samples):
        for j in range(block.num_steps):
            x, following = block.latents[i, j].double().flatten(), block.next_latents[i, j].double().flatten()
            with torch.no_grad():
                v = policy.velocity(block.latents[i : i + 1, j], block.sigma[i : i + 1, j], batch.features).double().flatten()
            mean, pull, variance = transition_by_hand(kernel, x, v, float(block.sigma[i, j]), float(block.next_sigma[i, j]))
            row = float(weights[i, j]) * pull * (following - mean) / (len(x) * variance)
            grad_b += torch.outer(row, a @ x)
            grad_a += torch.outer(b.T @ row, x)
    return torch.cat([grad_a.flatten(), grad_b.flatten()])


@EACH_KERNEL
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_at_the_sampling_weights_each_loss_is_its_weighted_policy_gradient_with_ratios_of_exactly_one(
    name: str, kernel: str, dtype: torch.dtype, tolerance: float
) -> None:
    policy = linear_policy(dtype=dtype, fresh=False)
    objective = SETTINGS[name].make("recompute")
    batch = make_batch(policy, objective, kernel)
    batch = in_double(batch) if dtype is torch.float64 else batch
    value, gradient, terms = run_terms(objective, batch, context(policy))
    weights = batch.advantages[:, None].double() * step_weights(objective, batch, kernel).double()
    assert value == pytest.approx(-float(weights.sum()), abs=1e-5)  # O1; advantages are centered float32, guard's weights up to 15
    expected = -weighted_gradient(policy, batch, kernel, weights)
    assert (gradient.double() - expected).norm() / expected.norm() < tolerance  # O1, O13
    assert all(term.ranges["ratio"].tolist() == [1.0] * 4 for term in terms)  # R1: bitwise
    assert len(terms) == (2 if name == "dance" else 4)  # round(.6 x 4)


def shifted(objective: Objective[Any], batch: MicroBatch, anchors: Any, log_ratio: torch.Tensor) -> Any:
    """Anchors against which the live policy has these log-ratios, [B], in every step."""
    if isinstance(anchors, DanceAnchor):
        return replace(anchors, log_prob=anchors.log_prob - log_ratio[:, None])
    if isinstance(anchors, LogProbAnchor):
        return LogProbAnchor(log_prob=anchors.log_prob - log_ratio[:, None])
    block, live = block_of(batch), anchors.recomputed_mean
    std = block.kernel.transition(
        live.flatten(0, 1), torch.zeros_like(live.flatten(0, 1)), block.sigma.flatten(), block.next_sigma.flatten()
    ).std.view(4, -1)  # fmt: skip
    # anchor_mean = mean - c sign(x' - mean): log rho = (c mean|x' - mean| + c^2) / std, solved for c
    offset = block.next_latents - live
    size = offset.abs().flatten(2).mean(2)
    c = (-size + torch.sqrt(size.square() + 4 * log_ratio[:, None] * std)) / 2
    return MeanAnchor(log_prob=anchors.log_prob, recomputed_mean=live - c[:, :, None, None, None] * offset.sign())


def terms_against(objective: Objective[Any], batch: MicroBatch, policy: StubPolicy, anchors: Any) -> tuple[torch.Tensor, list[LossTerm]]:
    policy_parameters = policy.adapter_parameters()
    terms = list(objective.losses(batch, anchors, context(policy)))
    gradients = torch.autograd.grad(sum((term.loss for term in terms), torch.zeros(())), policy_parameters)
    return torch.cat([gradient.flatten() for gradient in gradients]), terms


@pytest.mark.parametrize(
    ("name", "kernel"), [(name, kernel) for name in ("grpo", "guard", "tempflow", "dance") for kernel in KERNELS[name]]
)
def test_the_clip_stops_exactly_the_gradients_that_would_move_further_away(name: str, kernel: str) -> None:
    policy = linear_policy(dtype=torch.float64, fresh=False)
    objective = SETTINGS[name].make("recompute")
    log_ratio = torch.tensor([2e-3, -2e-3, -2e-3, 2e-3], dtype=torch.float64)
    for advantages, moves in [((1, -1, 0, 0), False), ((0, 0, 1, 0), True), ((0, 0, 0, -1), True)]:  # O2: the four quadrants
        batch = in_double(make_batch(policy, objective, kernel, advantages=advantages))
        with torch.no_grad():
            anchors = shifted(objective, batch, objective.anchors(batch, context(policy)), log_ratio)
        gradient, terms = terms_against(objective, batch, policy, anchors)
        assert bool((gradient != 0).any()) == moves
        for term in terms:
            torch.testing.assert_close(term.ranges["ratio"], log_ratio.exp(), rtol=0, atol=1e-9)
            assert term.means["clip_fraction_up"].tolist() == [float(advantages[0] > 0), 0, 0, 0]
            assert term.means["clip_fraction_down"].tolist() == [0, float(advantages[1] < 0), 0, 0]


@pytest.mark.parametrize("kernel", KERNELS["dppo"])
@pytest.mark.parametrize("is_far", [True, False])
def test_the_divergence_gate_stops_only_far_steps_that_move_further_away(kernel: str, is_far: bool) -> None:
    policy = linear_policy(dtype=torch.float64, fresh=False)
    objective = Dppo(config=DppoConfig(kl_limit=1e-2), anchor="recompute")
    batch = in_double(make_batch(policy, objective, kernel, advantages=[1.0, -1.0, 1.0, -1.0]))
    block = block_of(batch)
    with torch.no_grad():
        anchors = objective.anchors(batch, context(policy))
    flat = block.next_latents.flatten(0, 1)
    std = block.kernel.transition(flat, torch.zeros_like(flat), block.sigma.flatten(), block.next_sigma.flatten()).std
    distance = (2 * 1e-2) ** 0.5 * (1.01 if is_far else 0.99)  # |d mean| / std, where (d mean / std)^2 / 2 is the gate
    assert anchors.recomputed_mean is not None
    mean = anchors.recomputed_mean + (distance * std).unflatten(0, block.sigma.shape)
    log_ratio = torch.tensor([0.3, -0.3, -0.3, 0.3], dtype=torch.float64)
    moved = MeanAnchor(log_prob=anchors.log_prob - log_ratio[:, None], recomputed_mean=mean)
    gradient, terms = terms_against(objective, batch, policy, moved)
    stopped = torch.tensor([is_far, is_far, False, False])
    weights = torch.where(stopped, 0.0, batch.advantages * log_ratio.exp())[:, None].expand(4, 4) / 4  # else plain -A r
    expected = -weighted_gradient(policy, batch, kernel, weights)
    assert (gradient - expected).norm() / expected.norm() < 1e-10
    for term in terms:
        assert term.means["clip_fraction"].tolist() == stopped.float().tolist()
        torch.testing.assert_close(term.means["kl_anchor"], torch.full((4,), distance**2 / 2, dtype=torch.float64))


def test_guards_ratio_is_the_published_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    following, mean, anchor_mean = torch.randn((3, 5, 2, 4, 4), generator=generator, dtype=torch.float64)
    std = torch.rand((5, 1, 1, 1), generator=generator, dtype=torch.float64) + 0.1
    log_probs = [torch.distributions.Normal(m, std).log_prob(following).flatten(1).mean(1) for m in (mean, anchor_mean)]
    bias = ((mean - anchor_mean).square() / (2 * std**2)).flatten(1).mean(1)
    published = (log_probs[0] - log_probs[1] + bias) * std.flatten()
    torch.testing.assert_close(normalized_log_ratio(following, mean, anchor_mean, std), published, rtol=1e-12, atol=1e-12)


def test_guards_log_ratio_is_zero_on_average_where_the_plain_one_is_biased() -> None:
    size, rel, std, count = 65_536, 0.1, 0.01, 400  # O3
    generator = torch.Generator().manual_seed(1)
    kernel = make_kernel("dance_sde", 0.3)
    anchor_mean, mean, level = torch.zeros(8, size, 1, 1), torch.full((8, size, 1, 1), rel * std), torch.full((8, 1, 1, 1), std)
    blank = kernel.transition(anchor_mean, anchor_mean, torch.ones(8), torch.zeros(8))
    corrected, plain = [], []
    for _ in range(count // 8):
        following = std * torch.randn((8, size, 1, 1), generator=generator)
        corrected.append(normalized_log_ratio(following, mean, anchor_mean, level))
        densities = [kernel.log_prob(following, replace(blank, mean=m, std=level)) for m in (mean, anchor_mean)]
        plain.append(densities[0] - densities[1])
    log_rho, log_ratio = torch.cat(corrected).double(), torch.cat(plain).double()
    spread = rel * std / size**0.5
    assert abs(float(log_rho.mean())) < min(4 * spread / count**0.5, 1e-6)
    assert float(log_rho.std()) == pytest.approx(spread, rel=0.05)  # 1.4 standard errors of 400 draws, whose seed is fixed
    assert float(log_ratio.mean()) == pytest.approx(-(rel**2) / 2, rel=0.02)


class Bias(torch.nn.Module):
    """dv = b, at every t and x."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.b = torch.nn.Parameter(torch.zeros(size))

    def forward(self, flat: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return self.b.expand_as(flat)


def mixture_velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """E[eps - x_0 | x_t] of .5 N(-1, .3^2) + .5 N(1, .3^2), each element alone."""
    level, clean = t[:, None], torch.zeros_like(x)
    variance = ((1 - level) * 0.3) ** 2 + level**2
    share = torch.sigmoid(2 * (1 - level) * x / variance)
    for mode, weight in ((1.0, share), (-1.0, 1 - share)):
        clean = clean + weight * (mode + (1 - level) * 0.09 / variance * (x - (1 - level) * mode))
    return (x - clean) / level


def test_guards_gradients_are_equal_at_all_steps_where_those_of_grpo_grow_with_the_signal_to_noise_ratio() -> None:
    policy = StubPolicy(mixture_velocity, Bias(4096), (4096, 1, 1))
    window = tuple(range(10))
    groups = sample_groups(policy, [0], 8, sampler_spec(num_steps=10, window=window), run_seed=RUN_SEED)
    manifest = manifest_of(1, groups, score_by_latents(groups, lambda x: float(x[0])))
    batch = GroupStd(eps=1e-4).estimate(manifest, {"r": 1.0})
    source = UpdateInput(manifest=manifest, groups=tuple(groups), batch=batch, run_seed=RUN_SEED, advantage_clip=5.0)
    norms = {}
    for name in ("guard", "grpo"):
        objective = SETTINGS[name].make("recompute")
        micro = collate([SampleRef(group=0, sample=k) for k in range(8)], source, objective.needs, policy)
        with torch.no_grad():
            anchors = objective.anchors(micro, context(policy))
        parts = objective.losses(micro, anchors, context(policy))
        norms[name] = torch.stack([torch.autograd.grad(term.loss, policy.adapter_parameters())[0].norm() for term in parts])
    guard, grpo = norms["guard"], norms["grpo"]
    t, s = policy.sigmas(10)[:-1], policy.sigmas(10)[1:]
    # 4096 noises a step: norms scatter by 1 / sqrt(2 x 4096) = 1.1 %
    torch.testing.assert_close(guard[1:] / guard[1:].mean(), torch.ones(9), rtol=0, atol=0.1)
    assert float(guard[1:].mean() / guard[0]) == pytest.approx(1 + 0.7**2 / 2, rel=0.1)  # at t = 1 d mean / d v = dt alone
    growth = grpo[1:] / torch.sqrt((t - s) * (1 - t) / t)[1:]
    torch.testing.assert_close(growth / growth.mean(), torch.ones(9), rtol=0, atol=0.1)
    assert float(grpo.max() / grpo[1]) > 5


def test_tempflows_weights_average_one_over_the_trained_steps_of_the_sd35_grid() -> None:
    grid = sigma_grid(10, 3.0)
    zeros = torch.zeros(10, 1, 1, 1)
    weights = noise_weights(make_kernel("flow_sde", 0.7).transition(zeros, zeros, grid[:-1], grid[1:]).std, 2.25)
    assert float(weights[:9].mean()) == pytest.approx(0.9990, abs=1e-3)  # O4
    assert float(weights.mean()) == pytest.approx(0.9005, abs=1e-3)


def test_tempflows_kl_is_exact_and_not_weighted() -> None:
    policy = linear_policy(fresh=False)
    values = []
    for config in (TempflowConfig(kl_beta=0.1), GrpoConfig(kl_beta=0.1, kl_convention="exact")):
        objective = config.make("recompute")
        value, gradient, terms = run_terms(objective, make_batch(policy, objective, advantages=[0.0] * 4), context(policy))
        values.append((value, gradient, [term.means["kl_exact"] for term in terms]))
        assert objective.needs.base
    torch.testing.assert_close(values[0], values[1])
    assert values[0][1].norm() > 0
    assert policy.num_forwards["off"] == 8


def test_dance_trains_distinct_steps_of_each_samples_own_never_the_last_and_forwards_no_others() -> None:
    policy = linear_policy(fresh=False)
    objective = Dance(config=DanceConfig(), anchor="recompute")
    batch = make_batch(policy, objective, window=(0, 1, 2, 3, 4, 5))
    seeds = tuple(range(200))
    many = replace(block_of(batch), next_sigma=block_of(batch).next_sigma[:1].expand(200, 6))
    steps = draw_steps(many, seeds, 0.6)
    assert steps.shape == (200, 4)  # round(.6 x 6)
    assert all(len(set(row)) == 4 for row in steps.tolist())
    assert sorted({step for row in steps.tolist() for step in row}) == [0, 1, 2, 3, 4]
    counts = torch.bincount(steps.flatten(), minlength=5)
    assert counts.min() > 200 * 0.8 - 4 * (200 * 0.8 * 0.2) ** 0.5  # each of 5 with chance 4/5; 4 standard errors
    alone = draw_steps(replace(many, next_sigma=many.next_sigma[:1]), seeds[17:18], 0.6)
    assert torch.equal(alone[0], steps[17])
    policy.num_forwards["on"] = 0
    _, _, terms = run_terms(objective, batch, context(policy))
    assert len(terms) == 4
    assert policy.num_forwards["on"] == 8  # anchors and losses, the chosen steps each
    with pytest.raises(ConfigError, match="drop_last"):
        draw_steps(many, seeds, 1.0)


@pytest.mark.parametrize(("window", "fraction", "expected"), [(5, 0.6, 3), (15, 0.6, 9), (1, 0.6, 1), (3, 0.1, 1), (4, 1.0, 4)])
def test_dance_rounds_its_share_of_the_window(window: int, fraction: float, expected: int) -> None:
    assert num_parts(window, fraction) == expected
    run = replace(FACTS, window_size=window, guidance_scale=4.5, recomputes=True)
    assert DanceConfig(step_fraction=fraction).forwards(run) == expected * (3 + 1 + 2)  # trained, unconditional, guided anchor


@pytest.mark.parametrize("kernel", ["flow_sde", "dance_sde", "cps", "dpm_sde"])
def test_the_remade_behavior_mean_is_the_mean_at_sampling(kernel: str) -> None:
    policy, spec = linear_policy(fresh=False), sampler_spec(kernel, window=(0, 1, 3, 4))
    fake = sample_groups(policy, [5], 4, spec, run_seed=RUN_SEED)[0]
    sampled = sample_group(policy, fake.features, spec, run_seed=RUN_SEED, group=5, group_size=4, micro_batch=4)
    for group in (fake, replace(fake, trajectories=sampled)):
        manifest = manifest_of(1, [group], score_by_latents([group], lambda x: float(x[0])))
        batch = GroupStd(eps=1e-4).estimate(manifest, {"r": 1.0})
        source = UpdateInput(manifest=manifest, groups=(group,), batch=batch, run_seed=RUN_SEED, advantage_clip=5.0)
        refs = [SampleRef(group=0, sample=k) for k in (2, 0, 3)]
        objective = SETTINGS["dppo"].make("behavior")
        micro = collate(refs, source, objective.needs, policy)
        block = block_of(micro)
        with torch.no_grad():
            for step in range(4):
                velocity = policy.velocity(block.latents[:, step], block.sigma[:, step], micro.features)
                mean = block.kernel.transition(block.latents[:, step], velocity, block.sigma[:, step], block.next_sigma[:, step]).mean
                torch.testing.assert_close(objective.anchors(micro, context(policy)).mean(block, step), mean, rtol=0, atol=1e-5)
        assert block_of(collate(refs, source, SETTINGS["dppo"].make("recompute").needs, policy)).behavior_mean is None


def test_noise_of_another_seed_is_noticed_and_means_that_were_not_asked_for_are_refused() -> None:
    policy, objective = linear_policy(fresh=False), SETTINGS["guard"].make("behavior")
    with pytest.raises(CorruptFile, match=r'learner\.anchor = "recompute"'):
        make_batch(policy, objective, run_seed=RUN_SEED + 1)
    batch = make_batch(policy, SETTINGS["guard"].make("recompute"))
    with pytest.raises(ConfigError, match=r"needs\.behavior_mean"):
        next(iter(objective.losses(batch, objective.anchors(batch, context(policy)), context(policy))))


def update_of(name: str, scores: Sequence[float] | None = None, **changes: Any) -> tuple[dict[str, float], torch.Tensor, torch.Tensor]:
    """Metrics, the fresh adapter and the adapter after two optimizer steps on 4 groups of 6."""
    facts = {
        "groups_per_update": 4,
        "anchor": "recompute",
        "micro_batch": 24,
        "learning_rate": 1e-2,
        "max_grad_norm": 1e4,
        "weight_decay": 0.1,
    }
    learner = make_learner(linear_policy(), LearnerConfig(objective=SETTINGS[name], **(facts | changes)), {"r": 1.0}, RUN_SEED)
    groups: list[RolloutGroup] = sample_groups(linear_policy(), range(4), 6, sampler_spec(window=(0, 1, 3)), run_seed=RUN_SEED)
    tables = score_by_latents(groups, lambda x: float(x[0])) if scores is None else [{"r": list(scores)}] * 4
    manifest: Manifest = manifest_of(1, groups, tables)
    before = torch.cat([learner.live[key].flatten() for key in sorted(learner.live)])
    metrics = dict(learner.update(manifest, groups).metrics)
    return metrics, before, torch.cat([learner.live[key].flatten() for key in sorted(learner.live)])


@EACH
def test_micro_batches_do_not_change_the_update(name: str) -> None:
    whole, _, expected = update_of(name)
    for micro_batch in (5, 1):
        metrics, _, live = update_of(name, micro_batch=micro_batch)
        assert metrics["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-5)  # O8
        # Adam divides by the gradient's size: float32 noise of 1e-7 against gradients of 1e-2 moves steps of 1e-2 by 1e-6
        torch.testing.assert_close(live, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["guard", "dppo"])
def test_stored_and_recomputed_anchors_train_alike(name: str) -> None:
    results = [update_of(name, anchor=anchor, optimizer_steps=2) for anchor in ("behavior", "recompute")]
    assert results[0][0]["grad_norm"] == pytest.approx(results[1][0]["grad_norm"], rel=1e-3)
    torch.testing.assert_close(results[0][2], results[1][2], rtol=0, atol=1e-4)  # of moves of 1e-2 a step
    assert results[0][0]["kl_anchor"] > 0  # in the second step


@EACH
def test_a_constant_reward_moves_nothing(name: str) -> None:
    metrics, before, after = update_of(name, scores=[0.7] * 6)
    assert torch.equal(before, after)  # O11: max |d theta| == 0, weight decay too
    assert metrics["num_steps"] == 0


@EACH
def test_what_cannot_be_trained_is_refused_with_its_reason_and_remedy(name: str) -> None:
    settings = SETTINGS[name]
    assert settings.problems(FACTS) == []
    assert any("choose flow_sde" in problem for problem in settings.problems(replace(FACTS, kernel="ode")))
    found = settings.problems(replace(FACTS, kernel="cps"))
    assert found == [] if "cps" in KERNELS[name] else ("std" in found[0] and "set rollout.kernel to flow_sde or dance_sde" in found[0])


@EACH
def test_the_steep_step_of_dpm_sde_is_warned_of_where_log_probs_are_taken_as_they_are(name: str) -> None:
    quiet = replace(FACTS, kernel="dpm_sde")
    assert SETTINGS[name].problems(quiet) == []
    said = SETTINGS[name].warnings(quiet)
    assert said == [] if name in ("guard", "tempflow") else ("trains step 4" in said[0] and "kind='first', size=4" in said[0])
    for other in (replace(quiet, window=frozenset(range(4))), replace(quiet, quiet_end=False), FACTS):
        assert SETTINGS[name].warnings(other) == []
    pulls = {}
    for step in (3, 4):
        t, t_next = sigma_grid(6, 3.0)[step : step + 2]
        ends = [
            make_kernel("dpm_sde", 0.7).transition(torch.zeros(1, 1, 1, 1), torch.full((1, 1, 1, 1), v), t[None], t_next[None])
            for v in (0.0, 1.0)
        ]
        pulls[step] = float((ends[1].mean - ends[0].mean).abs() / ends[0].std)
    assert pulls[4] / pulls[3] == pytest.approx(50, rel=0.05)


def test_dance_is_refused_where_its_subset_would_hold_the_last_step() -> None:
    last = replace(FACTS, window=frozenset({4, 5}), window_size=1)
    assert any("drop_last" in problem for problem in DanceConfig().problems(last))
    assert DanceConfig().problems(replace(FACTS, window=frozenset(range(6)), window_size=6)) == []
    assert DanceConfig(step_fraction=1.0).problems(FACTS) == []
