"""The Objective: the loss of a minibatch and the snapshots it needs. One small file an objective; nothing else names one."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch

from common.flow.kernels import TransitionKernel
from common.policy.base import AdapterState, FeatureBatch, Policy
from learner.snapshots import SnapshotRule

AnchorT = TypeVar("AnchorT")


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What an objective asks of the learner."""

    snapshots: Mapping[str, SnapshotRule] = field(default_factory=dict)  # name -> rule; readable as context.snapshots[name]
    trajectory: bool = False  # micro-batches carry a TrajectoryBlock
    behavior_mean: bool = False  # with the means of its steps under the policy that sampled
    base: bool = False  # a forward with the adapter off runs (costs a third of a step)
    whole_groups: bool = False  # a micro-batch holds whole groups, for losses that couple their members
    parity_tolerance: float | None = None  # largest p99 |stored - recomputed log-prob| that its anchor bears; None: it reads no stored one
    stored_anchor: bool = False  # the anchor is the stored behavior log-prob, so parity is a condition and not a metric


@dataclass(frozen=True, slots=True, kw_only=True)
class TrajectoryBlock:
    """The kept stochastic steps of B trajectories, in denoising order, on the policy's device, float32."""

    latents: torch.Tensor  # [B, W, C, h, w] before each step
    next_latents: torch.Tensor  # [B, W, C, h, w] after it
    sigma: torch.Tensor  # [B, W]
    next_sigma: torch.Tensor  # [B, W]
    behavior_log_prob: torch.Tensor  # [B, W] mean over latent elements, under the policy that sampled
    kernel: TransitionKernel  # as sampled
    guidance_scale: float  # as sampled
    behavior_mean: torch.Tensor | None = None  # [B, W, C, h, w] of each step under the policy that sampled; None unless needs.behavior_mean

    @property
    def num_steps(self) -> int:
        """W."""
        return int(self.sigma.shape[1])


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """B samples for one forward. They may come from several groups, which were then sampled alike."""

    clean: torch.Tensor  # [B, C, h, w] x_0, float32
    advantages: torch.Tensor  # [B] clipped to +-advantage_clip, float32
    rewards: torch.Tensor  # [B] weighted sum of the raw train rewards, float32
    group: torch.Tensor  # [B] int64 position of the sample's group in the manifest, on CPU
    features: FeatureBatch  # B rows
    grid: torch.Tensor  # [T] the sigmas at which the sampler called the network, 1 first, float32 on CPU
    probe_seeds: tuple[int, ...]  # [B] one a sample of this update: all randomness of an objective derives from them
    group_probe_seeds: tuple[int, ...]  # [B] equal within a group
    trajectory: TrajectoryBlock | None  # None unless needs.trajectory

    @property
    def num_samples(self) -> int:
        """B."""
        return int(self.clean.shape[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class LossContext:
    """What a loss may look at besides the samples."""

    policy: Policy  # the live adapter is loaded
    snapshots: Mapping[str, AdapterState]  # those that the objective declared
    advantage_clip: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LossTerm:
    """A part of a micro-batch's loss; its backward runs before the next part is asked for, so one graph lives at a time."""

    loss: torch.Tensor  # scalar: SUM over the B samples of this part of their losses; the learner divides by the minibatch's kept count
    means: Mapping[str, torch.Tensor] = field(default_factory=dict)  # metric -> [B] detached; logged as its mean over samples and terms
    ranges: Mapping[str, torch.Tensor] = field(default_factory=dict)  # metric -> [B] detached; logged as _mean, _min, _max


class Objective(Protocol[AnchorT]):
    """The loss of a minibatch (architecture, section 9).

    Both families fit: trajectory objectives (grpo, guard, dppo) replay stored steps; forward-process objectives (nft, awm,
    dgpo, dpo, sft, rwr) noise the clean latents at probes that derive from the samples' seeds.
    """

    @property
    def needs(self) -> Needs:
        """What the learner must provide."""
        ...

    def anchors(self, batch: MicroBatch, context: LossContext) -> AnchorT:
        """Compute what stays fixed during the whole update, before its first optimizer step.

        Called without grad, once a micro-batch, on the very micro-batches that `losses` gets.
        """
        ...

    def losses(self, batch: MicroBatch, anchors: AnchorT, context: LossContext) -> Iterator[LossTerm]:
        """Yield the parts of the loss. Adapters may be swapped only before a part's live forward."""
        ...
