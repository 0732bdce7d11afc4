"""Which samples share an optimizer step and a forward, and their tensors. Order derives from (run, update) alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from common.errors import ConfigError, CorruptFile
from common.flow.kernels import make_kernel
from common.flow.noise import draw_noise
from common.policy.base import Policy
from common.seeding import derive_seed
from common.types import FloatArray, Manifest, RolloutGroup, SamplerSpec, Trajectory
from learner.advantages import AdvantageBatch, BoolArray
from learner.objectives.base import MicroBatch, Needs, TrajectoryBlock

NOISE_TOLERANCE = 1e-3  # of a stored log-prob to the density of the noise that is remade for it; float32 differs by 1e-4 at most


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRef:
    """One training sample."""

    group: int  # position of its group in the manifest
    sample: int  # sample_index = position among the group's trajectories


@dataclass(frozen=True, slots=True, kw_only=True)
class Minibatch:
    """One rank's samples of one optimizer step, cut into forwards."""

    micro_batches: tuple[tuple[SampleRef, ...], ...]  # none when all of the rank's samples are masked
    num_samples: int  # unmasked ones on all ranks together: what every sample's loss is divided by


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateInput:
    """Everything a micro-batch's tensors are made from."""

    manifest: Manifest
    groups: tuple[RolloutGroup, ...]  # in the manifest's order
    batch: AdvantageBatch
    run_seed: int
    advantage_clip: float


def plan_minibatches(
    mask: BoolArray, samplers: Sequence[SamplerSpec], *, num_minibatches: int, micro_batch: int, seed: int, whole_groups: bool,
    rank: int = 0, num_ranks: int = 1,
) -> tuple[Minibatch, ...]:  # fmt: skip
    """Cut an update's groups into minibatches of whole groups, and a rank's unmasked samples of each into micro-batches.

    A micro-batch may cross groups that were sampled alike (same kernel, noise level, grid, guidance and window size).

    Args:
        mask: [P, K], the samples to train on.
        samplers: P, how each group was sampled.
        num_minibatches: M, a divisor of P.
        micro_batch: samples a forward.
        seed: of the groups' order.
        whole_groups: never split a group.
        rank: whose samples; every rank gets as many groups of each minibatch.

    Raises:
        ConfigError: P is no multiple of M, P / M none of the ranks, or a whole group does not fit a micro-batch.
    """
    num_groups = len(mask)
    if num_groups % num_minibatches:
        raise ConfigError(
            f"Learner: {num_groups} groups came for optimizer_steps={num_minibatches}; minibatches are whole groups of equal number; "
            "make learner.groups_per_update a multiple of learner.optimizer_steps"
        )
    check_split(num_groups // num_minibatches, num_ranks)
    order = np.random.Generator(np.random.Philox(key=seed)).permutation(num_groups)
    shares = [np.sort(share) for share in np.split(order, num_minibatches)]
    own = [np.split(share, num_ranks)[rank] for share in shares]
    return tuple(
        Minibatch(
            micro_batches=_cut([_refs(mask, int(group)) for group in groups], samplers, micro_batch, whole_groups),
            num_samples=int(mask[share].sum()),
        )
        for share, groups in zip(shares, own, strict=True)
    )


def check_split(groups_per_step: int, num_ranks: int) -> None:
    """Check that ranks get as many whole groups of each minibatch.

    Args:
        groups_per_step: P / M.

    Raises:
        ConfigError: it is no multiple of the ranks.
    """
    if groups_per_step % num_ranks:
        raise ConfigError(
            f"Learner: an optimizer step takes {groups_per_step} groups (groups_per_update / optimizer_steps) and learner.num_ranks is "
            f"{num_ranks}; ranks share a step by whole groups; make the number of groups a multiple of learner.num_ranks"
        )


def _refs(mask: BoolArray, group: int) -> tuple[SampleRef, ...]:
    return tuple(SampleRef(group=group, sample=int(sample)) for sample in np.flatnonzero(mask[group]))


def _cut(
    groups: Sequence[tuple[SampleRef, ...]], samplers: Sequence[SamplerSpec], micro_batch: int, whole_groups: bool
) -> tuple[tuple[SampleRef, ...], ...]:
    done: list[tuple[SampleRef, ...]] = []
    current: list[SampleRef] = []
    for refs in groups:
        if whole_groups and len(refs) > micro_batch:
            raise ConfigError(
                f"Learner: a group has {len(refs)} samples and learner.micro_batch is {micro_batch}; this objective couples the members of "
                "a group; raise micro_batch to rollout.group_size"
            )
        unlike = bool(current) and bool(refs) and _likeness(samplers[current[0].group]) != _likeness(samplers[refs[0].group])
        if current and (unlike or (whole_groups and len(current) + len(refs) > micro_batch)):
            done.append(tuple(current))
            current = []
        current.extend(refs)
        while len(current) >= micro_batch:
            done.append(tuple(current[:micro_batch]))
            current = current[micro_batch:]
    return (*done, tuple(current)) if current else tuple(done)


def _likeness(sampler: SamplerSpec) -> tuple[str, float, int, float, int]:
    return sampler.kernel, sampler.noise_level, sampler.num_steps, sampler.guidance_scale, len(sampler.window)


def check_groups(manifest: Manifest, groups: Sequence[RolloutGroup]) -> None:
    """Check that the groups that were read are those that the manifest names, whole and in order.

    Raises:
        CorruptFile: naming the group and the rule that it breaks.
    """
    if len(groups) != len(manifest.groups):
        raise CorruptFile(f"Learner: manifest {manifest.update} names {len(manifest.groups)} groups, {len(groups)} came; read each once")
    for entry, group in zip(manifest.groups, groups, strict=True):
        found = (group.number, group.adapter.version, tuple(t.sample_index for t in group.trajectories))
        expected = (entry.number, entry.version, tuple(range(len(entry.kept))))
        if found != expected:
            raise CorruptFile(
                f"Learner: {entry.path} holds (number, version, samples) {found}, manifest {manifest.update} says {expected}; "
                "a group is committed whole and never changed; run `flowfleet audit`"
            )


def collate(refs: Sequence[SampleRef], source: UpdateInput, needs: Needs, policy: Policy) -> MicroBatch:
    """Return the tensors of a micro-batch on the policy's device.

    Raises:
        CorruptFile: see trajectory_block and add_behavior_means.
    """
    groups = [source.groups[ref.group] for ref in refs]
    trajectories = [source.groups[ref.group].trajectories[ref.sample] for ref in refs]
    update, sampler = source.manifest.update, groups[0].sampler
    advantages = [float(source.batch.advantages[ref.group, ref.sample]) for ref in refs]
    rewards = [float(source.batch.rewards[ref.group, ref.sample]) for ref in refs]
    block = trajectory_block(trajectories, sampler, policy) if needs.trajectory else None
    if block is not None and needs.behavior_mean:
        block = add_behavior_means(block, trajectories, [group.number for group in groups], source.run_seed)
    return MicroBatch(
        clean=_stack([t.final_latents for t in trajectories], policy),
        advantages=torch.tensor(advantages, dtype=torch.float32).clamp(-source.advantage_clip, source.advantage_clip).to(policy.device),
        rewards=torch.tensor(rewards, dtype=torch.float32).to(policy.device),
        group=torch.tensor([ref.group for ref in refs], dtype=torch.int64),
        features=policy.batch_features([group.features for group in groups]),
        grid=policy.sigmas(sampler.num_steps)[:-1],
        probe_seeds=tuple(derive_seed(source.run_seed, "probe", update, g.number, ref.sample) for g, ref in zip(groups, refs, strict=True)),
        group_probe_seeds=tuple(derive_seed(source.run_seed, "group_probe", update, group.number) for group in groups),
        trajectory=block,
    )


def trajectory_block(trajectories: Sequence[Trajectory], sampler: SamplerSpec, policy: Policy) -> TrajectoryBlock:
    """Return the kept steps of trajectories that were sampled alike.

    Raises:
        CorruptFile: a trajectory lacks the latents around one of its steps.
    """
    pairs = [_around_steps(trajectory, sampler.num_steps) for trajectory in trajectories]
    return TrajectoryBlock(
        latents=_stack([before for before, _ in pairs], policy),
        next_latents=_stack([after for _, after in pairs], policy),
        sigma=_stack([t.sigma for t in trajectories], policy),
        next_sigma=_stack([t.next_sigma for t in trajectories], policy),
        behavior_log_prob=_stack([t.behavior_log_prob for t in trajectories], policy),
        kernel=make_kernel(sampler.kernel, sampler.noise_level),
        guidance_scale=sampler.guidance_scale,
    )


def add_behavior_means(
    block: TrajectoryBlock, trajectories: Sequence[Trajectory], numbers: Sequence[int], run_seed: int
) -> TrajectoryBlock:
    """Return the block with the means of its steps at sampling: x' - std z, with z drawn again from the key that drew it there.

    A step's std depends on its sigmas alone. The stored log-prob is the density of that noise, so a wrong key is noticed.

    Args:
        numbers: the group's, one a trajectory.
        run_seed: that the groups were sampled with.

    Raises:
        CorruptFile: noise that does not have the stored log-probs.
    """
    noise = np.stack([_step_noise(t, number, run_seed) for t, number in zip(trajectories, numbers, strict=True)])
    following = block.next_latents.flatten(0, 1)
    transition = block.kernel.transition(following, torch.zeros_like(following), block.sigma.flatten(), block.next_sigma.flatten())
    mean = following - transition.std * torch.from_numpy(noise).to(following).flatten(0, 1)
    density = block.kernel.log_prob(following, replace(transition, mean=mean))
    difference = float((density - block.behavior_log_prob.flatten()).abs().max())
    if not difference <= NOISE_TOLERANCE:
        raise CorruptFile(
            f"Learner: the noise remade for groups {sorted(set(numbers))} with run seed {run_seed} misses the stored log-probs by "
            f"{difference:.3g} (at most {NOISE_TOLERANCE:g}); the behavior means need the seed that the groups were sampled with; "
            'train with that run.seed, or set learner.anchor = "recompute"'
        )
    return replace(block, behavior_mean=mean.unflatten(0, block.sigma.shape))


def _step_noise(trajectory: Trajectory, number: int, run_seed: int) -> FloatArray:
    """[W, C, h, w]: what the sampler drew at each kept step."""
    shape = tuple(trajectory.final_latents.shape)
    steps = [int(step) for step in trajectory.step_index]
    return np.stack([draw_noise(run_seed, number, trajectory.sample_index, "step", step=step, shape=shape).numpy() for step in steps])


def _around_steps(trajectory: Trajectory, num_steps: int) -> tuple[FloatArray, FloatArray]:
    """The latents before and after each kept step, [W, C, h, w] each."""
    states: Mapping[int, FloatArray] = {
        num_steps: trajectory.final_latents,
        **{int(index): latents for index, latents in zip(trajectory.latent_index, trajectory.latents, strict=True)},
    }
    steps = [int(step) for step in trajectory.step_index]
    missing = sorted({index for step in steps for index in (step, step + 1)} - set(states))
    if missing or not steps:
        raise CorruptFile(
            f"Learner: sample {trajectory.sample_index} keeps steps {steps} without the latents before steps {missing}; a trajectory "
            "objective needs both sides of each stochastic step; sample with a window, or train with an objective of clean latents"
        )
    return np.stack([states[step] for step in steps]), np.stack([states[step + 1] for step in steps])


def _stack(arrays: Sequence[FloatArray], policy: Policy) -> torch.Tensor:
    return torch.from_numpy(np.stack(arrays).astype(np.float32, copy=False)).to(policy.device)
