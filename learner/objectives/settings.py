"""What every objective's settings are: its config section, its cost, and what it cannot run with. No torch: configs are read everywhere."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from common.config import StrictModel

if TYPE_CHECKING:
    from learner.objectives.base import Objective

Anchor = Literal["recompute", "behavior"]

BACKWARD_FORWARDS = 3.0  # a trained forward with its backward, in forwards


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """The rest of a run, as far as an objective can clash with it."""

    kernel: str
    noise_level: float  # eta
    num_steps: int  # T
    window: frozenset[int]  # every step that some round's window may hold
    window_size: int  # W: stochastic steps of a trajectory
    guidance_scale: float
    snapshot: str  # that rollouts sample with
    shared_init: bool
    group_size: int  # K
    micro_batch: int  # samples a learner's forward
    optimizer_steps: int  # M
    advantage: str  # AdvantageConfig.kind
    recomputes: bool  # the anchor is recomputed

    @property
    def guided(self) -> int:
        """Forwards a velocity costs as sampled: 2 with classifier-free guidance."""
        return 2 if self.guidance_scale > 1 else 1


class ObjectiveSettings(StrictModel):
    """The [learner.objective] section: each objective's file defines its own."""

    name: str

    def make(self, anchor: Anchor) -> "Objective[Any]":
        """Return the objective, with its anchor resolved."""
        raise NotImplementedError

    def problems(self, run: RunFacts) -> list[str]:
        """Return what cannot be trained together, each with its reason and the remedy; empty when all agrees."""
        raise NotImplementedError

    def forwards(self, run: RunFacts) -> float:
        """Return what an image costs the learner in an update, in no-grad forwards of one unguided velocity."""
        raise NotImplementedError

    @property
    def guides(self) -> bool:
        """Whether it guides a model that sampling may not guide: groups then carry the empty prompt's features."""
        return False


def trajectory_problems(name: str, run: RunFacts) -> list[str]:
    """What no objective over stochastic steps can run with."""
    problems = []
    if run.kernel == "ode" or not run.window:
        problems.append(
            f"objective {name} trains on stochastic steps, and rollout.kernel='ode' or window.kind='none' makes none; choose flow_sde "
            "with a window, or an objective of clean latents (nft, awm, dgpo ...)"
        )
    if run.noise_level == 0:
        problems.append(f"objective {name} needs rollout.noise_level > 0; the published value for flow_sde is 0.7")
    if run.kernel == "cps" and run.num_steps - 1 in run.window:
        problems.append(
            "the cps kernel has no noise at the last step, so it cannot be trained; use window.kind='drop_last' or end the window before it"
        )
    return problems


def whole_group_problems(name: str, run: RunFacts) -> list[str]:
    """What an objective that couples a group's members cannot run with."""
    if run.micro_batch >= run.group_size:
        return []
    return [
        f"objective {name} couples the members of a group, and learner.micro_batch={run.micro_batch} is less than "
        f"rollout.group_size={run.group_size}; raise micro_batch to it"
    ]
