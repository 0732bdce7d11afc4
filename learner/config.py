"""How a batch of groups becomes a new policy version."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from common.config import StrictModel
from learner.objectives.registry import parse_objective
from learner.objectives.settings import ObjectiveSettings


def _grpo() -> Any:
    return {"name": "grpo"}


class AdvantageConfig(StrictModel):
    """A batch's scores -> advantages."""

    kind: Literal["group_std", "global_std", "none", "super_linear", "pair", "best"] = "group_std"
    normalize: Literal["sum", "per_reward"] = "sum"  # several rewards: weigh raw scores, or standardize each, then weigh
    clip: float = Field(5.0, gt=0)
    eps: float = Field(1e-4, gt=0)
    gamma: float = Field(0.5, ge=0)  # of super_linear (experimental): |difference|^(1 + gamma)
    merge_prompts: bool = False  # groups of equal prompts in an update are one group, as in flow_grpo
    subset: int = Field(0, ge=0)  # train on the n/2 highest and n/2 lowest advantages of a group only (DanceGRPO's best-of-n); 0: on all

    @model_validator(mode="after")
    def _parts_agree(self) -> "AdvantageConfig":
        if self.subset % 2:
            raise ValueError(
                f"subset={self.subset} is odd; it is the n/2 highest and the n/2 lowest of a group; make it even, or 0 for all"
            )
        if self.kind == "none" and self.normalize == "per_reward":
            raise ValueError(
                "kind='none' leaves rewards in their own units, and normalize='per_reward' would give them one; set kind='group_std' to "
                "standardize each reward in its group, or normalize='sum'"
            )
        if self.merge_prompts and (self.subset or self.kind in ("pair", "best")):
            raise ValueError(
                "merge_prompts=true with pair, best or subset, which choose inside a group as it was sampled; leave merge_prompts out"
            )
        if self.subset and self.kind in ("pair", "best"):
            raise ValueError(f"subset={self.subset} with kind={self.kind!r}, which chooses a group's samples itself; leave subset out")
        return self

    def num_trained(self, group_size: int) -> int:
        """How many of a group's K samples train, when all are scored and the group is not flat."""
        return {"pair": 2, "best": 1}.get(self.kind, self.subset or group_size)


class LearnerConfig(StrictModel):
    """One update."""

    groups_per_update: int = Field(8, ge=1)  # P
    optimizer_steps: int = Field(1, ge=1)  # M; P % M == 0
    micro_batch: int = Field(16, ge=1)  # samples a forward; changes bits, so it is a key
    num_threads: int = Field(1, ge=1)
    num_ranks: int = Field(1, ge=1)  # processes that share each optimizer step by whole groups; speed only; (P / M) % num_ranks == 0
    rank_timeout_s: float = Field(600.0, gt=0)  # for any word between ranks: a rank that is silent for longer is lost
    objective: Annotated[SerializeAsAny[ObjectiveSettings], BeforeValidator(parse_objective)] = Field(default_factory=_grpo)
    advantage: AdvantageConfig = AdvantageConfig()
    anchor: Literal["auto", "recompute", "behavior"] = "auto"  # auto: behavior on CPU float32, recompute elsewhere
    learning_rate: float = Field(3e-4, gt=0)
    adam_betas: tuple[float, float] = (0.9, 0.999)
    adam_eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(1e-4, ge=0)
    warmup_steps: int = Field(0, ge=0)  # linear
    decay_steps: int = Field(0, ge=0)  # from this step on the rate falls as decay_steps / step; 0: constant
    max_grad_norm: float = Field(1.0, gt=0)
    ema_decay: float = Field(0.9, ge=0, lt=1)  # decay = min((1+n)/(10+n), ema_decay), n optimizer steps before
    ema_interval: int = Field(1, ge=1)  # optimizer steps between moves of the EMA; flow_grpo's presets: 8
    state_interval: int = Field(1, ge=1)  # updates between LearnerStates
    states_kept: int = Field(2, ge=1)
    max_nonfinite: int = Field(3, ge=1)  # skipped steps in a row before the run stops

    @model_validator(mode="after")
    def _ranks_share_steps(self) -> "LearnerConfig":
        groups = self.groups_per_update // self.optimizer_steps
        if self.groups_per_update % self.optimizer_steps == 0 and groups % self.num_ranks:
            raise ValueError(
                f"num_ranks={self.num_ranks} does not divide the {groups} groups of an optimizer step (groups_per_update / optimizer_steps); "
                "ranks share a step by whole groups; change one of the three"
            )
        return self
