"""What every objective's settings are: its config section, its cost, and what it cannot run with. No torch: configs are read everywhere."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from common.config import StrictModel

if TYPE_CHECKING:
    from learner.objectives.base import Objective

Anchor = Literal["recompute", "behavior"]

BACKWARD_FORWARDS = 3.0  # a trained forward with its backward, in forwards
QUIET_AT_THE_END = ("cps", "dpm_sde")  # kernels whose last step is a point; their has_last_log_prob is False
MAX_CLIP_RANGE = 0.05  # of a ratio of mean log-probs, and of a mean KL; the published ranges are 2e-6 to 1e-3


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
    quiet_end: bool = True  # the grid's last positive sigma is near .009
    trained_forward: float = BACKWARD_FORWARDS  # with its backward, in forwards without gradient

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

    def warnings(self, run: RunFacts) -> list[str]:
        """Return what can be trained together but is known to do badly; the plan shows it."""
        return []

    def forwards(self, run: RunFacts) -> float:
        """Return what a trained image costs the learner in an update, in no-grad forwards of one unguided velocity."""
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
    if run.kernel in QUIET_AT_THE_END and run.num_steps - 1 in run.window:
        problems.append(
            f"the {run.kernel} kernel has no noise at the last step, so it cannot be trained; use window.kind='drop_last' or end the window before it"
        )
    return problems


def clip_problems(name: str, clip_range: float) -> list[str]:
    """Say when a clip range is one of summed log-probs: log-probs here are means over a latent's elements."""
    if clip_range <= MAX_CLIP_RANGE:
        return []
    return [
        f"objective {name} clips ratios of mean log-probs, and learner.objective.clip_range={clip_range:g} is the scale of a sum over latent "
        f"elements: it would never bind; the rule is at most {MAX_CLIP_RANGE:g}, the published values are 1e-5 to 1e-3 (guard: 2e-6)"
    ]


def limit_problems(name: str, kl_limit: float) -> list[str]:
    """Say when a limit of a step's KL is one of a sum over a latent's elements."""
    if kl_limit <= MAX_CLIP_RANGE:
        return []
    return [
        f"objective {name} gates by the mean KL of a latent's elements, and learner.objective.kl_limit={kl_limit:g} is the scale of a sum: it "
        f"would never bind; the rule is at most {MAX_CLIP_RANGE:g}, the published value is 1e-5"
    ]


def steep_step_warnings(name: str, run: RunFacts) -> list[str]:
    """Say when an objective that takes log-probs as they are trains the step that ends beside sigma 0 on a kernel that is quiet there.

    On SD3's grid (diffusers spaces timesteps 1000 to 1) the last positive sigma is near .009 at any number of steps. Under dpm_sde a
    step's std is below its next sigma, and the log-prob's pull on the velocity goes as 1 / std: 50 times that of the step before at
    six steps, 25 times at ten (shift 3, eta .7).
    """
    if run.kernel != "dpm_sde" or not run.quiet_end or run.num_steps - 2 not in run.window:
        return []
    return [
        f"objective {name} trains step {run.num_steps - 2} under dpm_sde, whose std there is near .008: its log-prob outweighs all other steps; "
        f"end the window before it (kind='first', size={run.num_steps - 2}), or take guard or tempflow, which weigh steps by their std"
    ]


def guidance_warnings(name: str, run: RunFacts) -> list[str]:
    """Say when images are sampled with guidance for an objective that fits the unguided velocity to them."""
    if run.guidance_scale <= 1:
        return []
    return [
        f"objective {name} fits the unguided velocity to images that rollout.guidance_scale={run.guidance_scale:g} made: it was published "
        "without guidance, and users of guidance report slow or unstable training; set rollout.guidance_scale=1"
    ]


def whole_group_problems(name: str, run: RunFacts) -> list[str]:
    """What an objective that couples a group's members cannot run with."""
    if run.micro_batch >= run.group_size:
        return []
    return [
        f"objective {name} couples the members of a group, and learner.micro_batch={run.micro_batch} is less than "
        f"rollout.group_size={run.group_size}; raise micro_batch to it"
    ]
