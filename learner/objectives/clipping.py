"""What the clipped objectives over stored steps share: the loss, its metrics, the KL beside it, their cost."""

from dataclasses import dataclass

import torch

from common.flow.kernels import KlConvention
from common.policy.primitives import StepReplay
from learner.objectives.base import LossContext, MicroBatch, Needs, TrajectoryBlock
from learner.objectives.replay import block_of, replay_of, replay_reference
from learner.objectives.settings import Anchor, RunFacts

PARITY_SHARE = 0.2  # of the clip range: what |stored - recomputed log-prob| may take


def clipped_loss(log_ratio: torch.Tensor, advantages: torch.Tensor, clip_range: float) -> torch.Tensor:
    """max(-A r, -A clip(r, 1 - c, 1 + c)) with r = exp(log_ratio), [B]."""
    ratio = log_ratio.exp()
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1.0 - clip_range, 1.0 + clip_range))


def clip_metrics(log_ratio: torch.Tensor, advantages: torch.Tensor, clip_range: float) -> dict[str, torch.Tensor]:
    """approx_kl = (log r)^2 / 2 to the anchor; clip fractions count samples whose gradient the clip stops. [B] each."""
    ratio = log_ratio.detach().exp()
    up = (ratio > 1.0 + clip_range) & (advantages > 0)
    down = (ratio < 1.0 - clip_range) & (advantages < 0)
    return {"approx_kl": log_ratio.detach().square() / 2, **stop_fractions(up, down)}


def stop_fractions(up: torch.Tensor, down: torch.Tensor) -> dict[str, torch.Tensor]:
    """Samples [B] whose gradient is stopped on its way up (A > 0) and on its way down (A < 0)."""
    return {"clip_fraction": (up | down).float(), "clip_fraction_up": up.float(), "clip_fraction_down": down.float()}


def clipped_needs(clip_range: float, anchor: Anchor, *, base: bool = False) -> Needs:
    """Trajectories, with parity to a fifth of the clip range when the anchor is the stored log-probs; a base forward for a KL."""
    return Needs(trajectory=True, base=base, parity_tolerance=clip_range * PARITY_SHARE, stored_anchor=anchor == "behavior")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClippedStep:
    """A kept step's clipped loss and what else was found on the way."""

    loss: torch.Tensor  # [B]
    kl: torch.Tensor | None  # [B] to the base, where it was asked for
    replay: StepReplay
    means: dict[str, torch.Tensor]  # metrics, [B] each
    ratio: torch.Tensor  # [B] detached


def clipped_step(
    batch: MicroBatch, anchor: torch.Tensor, step: int, context: LossContext, *, clip_range: float, detach_uncond: bool,
    kl_convention: KlConvention | None = None,
) -> ClippedStep:  # fmt: skip
    """Replay a kept step and clip its ratio.

    Args:
        anchor: [B] log-probs of the step that the ratio is taken against.
        kl_convention: of the KL to the base; None: no KL, and no base forward.
    """
    block, kl = block_of(batch), None
    reference = None if kl_convention is None else replay_reference(context.policy, block, batch.features, step)
    replay = replay_of(context.policy, block, batch.features, step, detach_uncond=detach_uncond)
    log_ratio = replay.log_prob - anchor
    means = clip_metrics(log_ratio, batch.advantages, clip_range)
    means["mismatch_abs_dlogp"] = (anchor - block.behavior_log_prob[:, step]).abs()
    if reference is not None and kl_convention is not None:
        kl, kl_means = kl_to_base(block, replay, reference, kl_convention)
        means |= kl_means
    loss = clipped_loss(log_ratio, batch.advantages, clip_range)
    return ClippedStep(loss=loss, kl=kl, replay=replay, means=means, ratio=log_ratio.detach().exp())


def kl_to_base(
    block: TrajectoryBlock, replay: StepReplay, reference: StepReplay, convention: KlConvention
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return a replayed step's KL to the base in a convention, [B] with its gradient, and the metrics kl and kl_exact."""
    kl = block.kernel.kl(replay.mean, reference.mean, replay.transition, convention)
    exact = block.kernel.kl(replay.mean.detach(), reference.mean, replay.transition, "exact")
    return kl, {"kl": kl.detach(), "kl_exact": exact}


def replay_forwards(run: RunFacts, *, num_steps: int, detach_uncond: bool, kl: bool = False) -> float:
    """Return the cost of trained steps: guided ones cost the unconditional branch too, a KL a base forward, a recomputed anchor one more."""
    reference = float(run.guided) if kl else 0.0
    recompute = float(run.guided) if run.recomputes else 0.0
    unconditional = (1.0 if detach_uncond else run.trained_forward) if run.guided == 2 else 0.0
    return num_steps * (run.trained_forward + unconditional + reference + recompute)
