"""Losses against closed forms: O1, O2, O5, O9 (algorithms, section 27)."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from common.flow.kernels import make_kernel
from common.policy.base import Policy
from learner.advantages import GroupStd
from learner.minibatches import SampleRef, UpdateInput, collate
from learner.objectives.base import LossContext, LossTerm, MicroBatch, Objective
from learner.objectives.clipping import clipped_loss
from learner.objectives.grpo import Grpo, GrpoConfig
from learner.objectives.nft import DECAYS, Nft, NftConfig, clean_error, implicit_velocities
from learner.objectives.probes import draw_probes
from learner.objectives.replay import LogProbAnchor
from tests.learner_fakes import manifest_of, sample_groups, sampler_spec, score_by_latents
from tests.learner_policies import StubPolicy, linear_policy


def make_batch(
    policy: Policy, objective: Objective[Any], *, advantages: Sequence[float] | None = None, kernel: str = "flow_sde"
) -> MicroBatch:
    """4 samples of one group, optionally with given advantages."""
    spec = sampler_spec(kernel)
    groups = sample_groups(policy, [0], 4, spec)
    manifest = manifest_of(1, groups, score_by_latents(groups, lambda x: float(x[0])))
    source = UpdateInput(
        manifest=manifest, groups=tuple(groups), batch=GroupStd(eps=1e-4).estimate(manifest, {"r": 1.0}), run_seed=3, advantage_clip=5.0
    )
    if advantages is not None:
        source.batch.advantages[0] = advantages
    return collate([SampleRef(group=0, sample=k) for k in range(4)], source, objective.needs, policy)


def context(policy: StubPolicy, **snapshots: dict[str, torch.Tensor]) -> LossContext:
    return LossContext(policy=policy, snapshots=snapshots, advantage_clip=5.0)


def run_terms(objective: Objective[Any], batch: MicroBatch, where: LossContext) -> tuple[float, torch.Tensor, list[LossTerm]]:
    """The summed loss and the flat gradient by autograd."""
    for parameter in where.policy.adapter_parameters():
        parameter.grad = None
    with torch.no_grad():
        anchors = objective.anchors(batch, where)
    total, terms = 0.0, []
    for term in objective.losses(batch, anchors, where):
        term.loss.backward()
        total += float(term.loss.detach())
        terms.append(term)
    return total, flat_gradient(where.policy), terms


def flat_gradient(policy: Policy) -> torch.Tensor:
    return torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten().clone() for p in policy.adapter_parameters()])


def grpo(anchor: str = "recompute", **changes: Any) -> Grpo:
    return Grpo(config=GrpoConfig(**changes), anchor=anchor)  # type: ignore[arg-type]


@pytest.mark.parametrize("kernel", ["flow_sde", "dance_sde", "cps", "dpm_sde"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_on_policy_grpo_has_loss_minus_sum_of_advantages_and_the_policy_gradient(kernel: str, dtype: torch.dtype, tolerance: float) -> None:
    policy = linear_policy(dtype=dtype, fresh=False)
    objective = grpo()
    batch = make_batch(policy, objective, kernel=kernel)
    batch = in_double(batch) if dtype is torch.float64 else batch
    value, gradient, _ = run_terms(objective, batch, context(policy))
    assert value == pytest.approx(-float(batch.advantages.sum()), abs=1e-6)  # O1; advantages are centered float32
    expected = -analytic_log_prob_gradient(policy, batch, kernel)
    error = (gradient.double() - expected).norm() / expected.norm()
    assert error < tolerance  # float32: z = (x' - mu) / std loses a digit


def analytic_log_prob_gradient(policy: StubPolicy, batch: MicroBatch, kernel: str) -> torch.Tensor:
    """sum_i A_i mean_j d logp_ij / d(a, b) by hand for v = ... + B A x, in float64: d logp / d v = (d mu / d v) (x' - mu) / (D std^2)."""
    block = batch.trajectory
    assert block is not None
    a, b = (p.detach().double() for p in policy.adapter_parameters())
    grad_a, grad_b = torch.zeros_like(a), torch.zeros_like(b)
    for j in range(block.num_steps):
        for i in range(batch.num_samples):
            x, following = block.latents[i, j].double().flatten(), block.next_latents[i, j].double().flatten()
            t, s = float(block.sigma[i, j]), float(block.next_sigma[i, j])
            with torch.no_grad():
                v = policy.velocity(block.latents[i : i + 1, j], block.sigma[i : i + 1, j], batch.features).double().flatten()
            mean, pull, variance = transition_by_hand(kernel, x, v, t, s)
            row = pull * (following - mean) / (len(x) * variance)
            weight = float(batch.advantages[i]) / block.num_steps
            grad_b += weight * torch.outer(row, a @ x)
            grad_a += weight * torch.outer(b.T @ row, x)
    return torch.cat([grad_a.flatten(), grad_b.flatten()])


def transition_by_hand(kernel: str, x: torch.Tensor, v: torch.Tensor, t: float, s: float) -> tuple[torch.Tensor, float, float]:
    """mean, d mean / d v and the variance that the log-prob divides by (section 1; cps has 1 / 2 there)."""
    dt, eta = s - t, 0.7
    if kernel == "cps":
        root = s * np.cos(eta * np.pi / 2)
        return (1 - s) * (x - t * v) + root * (x + (1 - t) * v), -t * (1 - s) + root * (1 - t), 0.5
    if kernel == "dpm_sde":
        share = eta**2 / 2
        kept = (1 - t) * s / (t * (1 - s))
        pull = -t * (1 - s) * (1 - kept ** (1 + share))
        return s / t * kept**share * x + (1 - s) * (1 - kept ** (1 + share)) * (x - t * v), pull, s**2 * (1 - kept ** (2 * share))
    rate = eta**2 if kernel == "dance_sde" else eta**2 * t / (1 - (s if t == 1.0 else t))  # squared diffusion
    pull = dt * (1 + rate * (1 - t) / (2 * t))
    return x * (1 + rate * dt / (2 * t)) + v * pull, pull, rate * -dt


def test_the_clip_stops_exactly_the_gradients_that_would_move_further_away() -> None:
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
    log_ratio = torch.log(torch.tensor([1.2, 0.8, 0.8, 1.2])).requires_grad_()
    losses = clipped_loss(log_ratio, advantages, 0.1)
    losses.sum().backward()
    torch.testing.assert_close(losses.detach(), torch.tensor([-1.1, 0.9, -0.8, 1.2]))
    assert log_ratio.grad is not None
    assert log_ratio.grad[:2].tolist() == [0.0, 0.0]  # O2: exactly
    torch.testing.assert_close(log_ratio.grad[2:], torch.tensor([-0.8, 1.2]))  # -A r


def test_clip_fractions_count_the_stopped_samples_up_and_down() -> None:
    policy = linear_policy(fresh=False)
    objective = grpo("behavior", clip_range=0.1)
    batch = make_batch(policy, objective, advantages=[1.0, 1.0, -1.0, -1.0])
    assert batch.trajectory is not None
    shift = torch.log(torch.tensor([1.2, 0.8, 0.8, 1.2]))[:, None]
    anchors = LogProbAnchor(log_prob=batch.trajectory.behavior_log_prob - shift)
    term = next(iter(objective.losses(batch, anchors, context(policy))))
    assert term.means["clip_fraction_up"].tolist() == [1, 0, 0, 0]
    assert term.means["clip_fraction_down"].tolist() == [0, 0, 1, 0]
    torch.testing.assert_close(term.ranges["ratio"], torch.tensor([1.2, 0.8, 0.8, 1.2]), rtol=0, atol=2e-6)
    torch.testing.assert_close(term.means["mismatch_abs_dlogp"], shift[:, 0].abs(), rtol=0, atol=1e-6)


def test_the_recomputed_anchor_gives_ratios_of_exactly_one() -> None:
    policy = linear_policy(fresh=False)
    objective = grpo()
    _, _, terms = run_terms(objective, make_batch(policy, objective), context(policy))
    assert all(term.ranges["ratio"].tolist() == [1.0] * 4 for term in terms)  # R1: bitwise


@pytest.mark.parametrize(("convention", "divides_by_dt"), [("flow_grpo", False), ("exact", True)])
def test_kl_follows_its_named_convention(convention: str, divides_by_dt: bool) -> None:
    policy = linear_policy(fresh=False)
    objective = grpo(kl_beta=0.1, kl_convention=convention)
    batch = make_batch(policy, objective, advantages=[0.0] * 4)
    value, gradient, terms = run_terms(objective, batch, context(policy))
    block = batch.trajectory
    assert block is not None
    a, b = (p.detach().double() for p in policy.adapter_parameters())
    expected = 0.0
    for j in range(2):
        moved = (block.latents[:, j].double().flatten(1) @ a.T @ b.T).square().mean(1)  # mean_d dv^2
        t, s = block.sigma[:, j].double(), block.next_sigma[:, j].double()
        rate = 0.49 * t / (1 - torch.where(t == 1, s, t))
        pull = (s - t) * (1 + rate * (1 - t) / (2 * t))
        kl = pull**2 * moved / (2 * rate * ((t - s) if divides_by_dt else 1.0))
        torch.testing.assert_close(terms[j].means["kl"].double(), kl, rtol=1e-5, atol=0)
        exact = kl if divides_by_dt else kl / (t - s)
        torch.testing.assert_close(terms[j].means["kl_exact"].double(), exact, rtol=1e-5, atol=0)
        expected += 0.1 * float(kl.sum()) / 2
    assert value == pytest.approx(expected, rel=1e-5)
    assert gradient.norm() > 0  # a KL under no_grad would give 0


def test_without_kl_weight_no_reference_forward_runs() -> None:
    for objective, expected in [(grpo(), 0), (grpo(kl_beta=0.1), 2), (Nft(config=NftConfig(kl_beta=0.0)), 0), (Nft(config=NftConfig()), 2)]:
        policy = linear_policy(fresh=False)
        batch = make_batch(policy, objective)
        policy.num_forwards["off"] = 0
        run_terms(objective, batch, context(policy, behavior=policy.read_adapter()))
        assert policy.num_forwards["off"] == expected
        assert objective.needs.base == (expected > 0)


def nft(**changes: Any) -> Nft:
    return Nft(config=NftConfig(**({"kl_beta": 0.0} | changes)))


def flow_matching_gradient(policy: StubPolicy, batch: MicroBatch, objective: Nft, weights: torch.Tensor) -> torch.Tensor:
    """Gradient of sum_i weight_i mean_n [ t^2 / w mean_d (v - (eps - x_0))^2 ]: x_0-space error t^2 |dv|^2 and the adaptive weight."""
    probes = draw_probes(batch, objective.config.timesteps_per_sample)
    for parameter in policy.adapter_parameters():
        parameter.grad = None
    for sigma, noise in zip(probes.sigma, probes.noise, strict=True):
        level = sigma.view(-1, 1, 1, 1)
        velocity = policy.velocity((1 - level) * batch.clean + level * noise, sigma, batch.features)
        error = (velocity - (noise - batch.clean)).flatten(1)
        weight = (sigma[:, None] * error).abs().mean(1).detach().clamp(min=1e-5)
        (weights * sigma.square() * error.square().mean(1) / weight).sum().div(len(probes.sigma)).backward()
    return flat_gradient(policy)


@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_nft_at_the_behavior_policy_has_the_gradient_of_weighted_flow_matching(beta: float) -> None:
    policy = linear_policy(dtype=torch.float64, fresh=False)
    objective = nft(beta=beta)
    batch = in_double(make_batch(policy, objective, advantages=[3.0, -1.0, 0.5, -7.0]))
    _, gradient, _ = run_terms(objective, batch, context(policy, behavior=policy.read_adapter()))
    # (2 rho - 1) = A / 5 clipped to +-1, and the loss is multiplied by the advantage clip 5
    expected = flow_matching_gradient(policy, batch, objective, 5 * (batch.advantages / 5).clamp(-1, 1))
    assert (gradient - expected).norm() / expected.norm() < 1e-8  # O5


def in_double(batch: MicroBatch) -> MicroBatch:
    """The same float32 numbers as float64 tensors, so that the mathematics runs in float64."""
    block = batch.trajectory
    if block is not None:
        names = ("latents", "next_latents", "sigma", "next_sigma", "behavior_log_prob")
        block = replace(block, **{name: getattr(block, name).double() for name in names})
    return replace(batch, clean=batch.clean.double(), advantages=batch.advantages.double(), trajectory=block)


@pytest.mark.parametrize(("fraction", "expected"), [(1.0, 6), (0.83, 5), (0.5, 3), (0.01, 1)])
def test_probes_come_from_the_high_noise_part_of_the_grid(fraction: float, expected: int) -> None:
    batch = make_batch(linear_policy(), nft())
    grid = torch.linspace(1.0, 0.1, 6)
    many = replace(batch, grid=grid, probe_seeds=tuple(range(batch.num_samples)))
    seen = {
        float(sigma)
        for shift in range(60)
        for sigma in draw_probes(
            replace(many, probe_seeds=tuple(seed + 1000 * shift for seed in many.probe_seeds)), 1, fraction
        ).sigma.flatten()
    }
    assert seen == {float(sigma) for sigma in grid[:expected]}  # 60 x B draws: each of at most 6 sigmas is missed with p < 1e-4


def test_nft_without_advantage_does_not_pull_at_the_behavior_policy() -> None:
    policy = linear_policy(dtype=torch.float64, fresh=False)
    objective = nft()
    batch = in_double(make_batch(policy, objective, advantages=[0.0] * 4))
    _, gradient, _ = run_terms(objective, batch, context(policy, behavior=policy.read_adapter()))
    scale = flow_matching_gradient(policy, batch, objective, torch.ones(4, dtype=torch.float64)).norm()
    assert gradient.norm() / scale < 1e-9  # O5: rho = .5


@pytest.mark.parametrize(("advantage", "sign"), [(5.0, 1.0), (-5.0, -1.0)])
def test_a_full_optimality_pulls_to_the_sample_and_none_mirrors_it(advantage: float, sign: float) -> None:
    policy = linear_policy(dtype=torch.float64, fresh=False)
    objective = nft()
    batch = in_double(make_batch(policy, objective, advantages=[advantage] * 4))
    _, gradient, _ = run_terms(objective, batch, context(policy, behavior=policy.read_adapter()))
    expected = flow_matching_gradient(policy, batch, objective, torch.full((4,), 5 * sign, dtype=torch.float64))
    assert (gradient - expected).norm() / expected.norm() < 1e-8  # O5: rho = 1 and 0


def test_nft_reads_the_behavior_snapshot_and_not_the_live_adapter() -> None:
    policy = linear_policy(fresh=False)
    behavior = {name: torch.zeros_like(tensor) for name, tensor in policy.read_adapter().items()}
    objective = nft(kl_beta=0.5)
    batch = make_batch(policy, objective)
    _, _, terms = run_terms(objective, batch, context(policy, behavior=behavior))
    probes = draw_probes(batch, 2)
    level = probes.sigma[0].view(-1, 1, 1, 1)
    latents = (1 - level) * batch.clean + level * probes.noise[0]
    a, b = (p.detach() for p in policy.adapter_parameters())
    moved = (latents.flatten(1) @ a.T @ b.T).square().mean(1)  # live - behavior = live - base = B A x
    torch.testing.assert_close(terms[0].means["kl_behavior"], moved, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(terms[0].means["kl"], moved, rtol=1e-4, atol=1e-7)


def test_the_kl_of_nft_pulls_toward_the_guided_base() -> None:
    policy, scale = linear_policy(fresh=False), 3.0
    objective = nft(kl_beta=0.5, kl_guidance=scale)
    batch = make_batch(policy, objective)
    plain, _, _ = run_terms(nft(), batch, context(policy, behavior=policy.read_adapter()))
    value, _, terms = run_terms(objective, batch, context(policy, behavior=policy.read_adapter()))
    probes, added = draw_probes(batch, 2), 0.0
    for term, sigma, noise in zip(terms, probes.sigma, probes.noise, strict=True):
        level = sigma.view(-1, 1, 1, 1)
        latents = (1 - level) * batch.clean + level * noise
        with torch.no_grad():
            live = policy.velocity(latents, sigma, batch.features)
            with policy.base():
                base = policy.velocity(latents, sigma, batch.features)
        distance = (live - scale * base).square().mean(dim=(1, 2, 3))
        torch.testing.assert_close(term.means["kl_guided"], distance, rtol=1e-5, atol=0)
        assert "kl" not in term.means  # which is 0 at the start of a run
        added += 0.5 * float(distance.sum()) / 2
    assert value - plain == pytest.approx(added, rel=1e-4)


def test_implicit_velocities_average_to_the_behavior() -> None:
    velocity, behavior = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    positive, negative = implicit_velocities(velocity, behavior, 0.3)
    assert (positive + negative - 2 * behavior).abs().max() <= 1e-12  # O5
    torch.testing.assert_close(positive, 0.3 * velocity + 0.7 * behavior)


def test_the_adaptive_weight_is_the_detached_mean_error_with_a_floor() -> None:
    clean = torch.zeros(2, 1, 1, 2)
    latents = torch.tensor([[[[3.0, -1.0]]], [[[0.0, 0.0]]]])
    error = clean_error(latents, torch.zeros(2), torch.zeros_like(clean).requires_grad_(), clean)
    assert error.tolist() == [2.5, 0.0]  # mean square 5 / mean abs 2; 0 / 1e-5


def test_probes_are_the_samplers_own_sigmas_without_replacement_and_depend_on_the_seed_alone() -> None:
    policy = linear_policy()
    batch = make_batch(policy, nft())
    probes = draw_probes(batch, 6)
    for column in probes.sigma.T:
        assert sorted(column.tolist()) == sorted(policy.sigmas(6)[:-1].tolist())
    assert len({tuple(column.tolist()) for column in probes.sigma.T}) > 1  # not one order for all
    alone = replace(batch, clean=batch.clean[2:3], probe_seeds=batch.probe_seeds[2:3])
    torch.testing.assert_close(draw_probes(alone, 6).noise[:, 0], probes.noise[:, 2], rtol=0, atol=0)


def test_behavior_decays_are_the_papers_types() -> None:
    assert [DECAYS["on_policy"](n) for n in (0, 5, 1000)] == [0.0, 0.0, 0.0]
    assert [DECAYS["linear"](n) for n in (0, 100, 499, 500, 10_000)] == pytest.approx([0.0, 0.1, 0.499, 0.5, 0.5])
    assert [DECAYS["delayed"](n) for n in (0, 75, 76, 100, 1000)] == pytest.approx([0.0, 0.0, 0.0075, 0.1875, 0.999])


def test_the_registry_builds_what_the_config_names() -> None:
    assert GrpoConfig(clip_range=0.5).make("behavior") == Grpo(config=GrpoConfig(clip_range=0.5), anchor="behavior")
    assert NftConfig().make("recompute") == Nft(config=NftConfig())
    assert make_kernel("cps", 0.7).has_log_prob
