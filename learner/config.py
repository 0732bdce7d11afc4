"""How a batch of groups becomes a new policy version."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from common.config import StrictModel


class GrpoConfig(StrictModel):
    """Flow-GRPO's clipped objective (arXiv 2505.05470)."""

    name: Literal["grpo"] = "grpo"
    clip_range: float = Field(1e-4, gt=0)  # on ratios of mean log-probs
    kl_beta: float = Field(0.0, ge=0)
    kl_convention: Literal["flow_grpo", "exact"] = "flow_grpo"  # flow_grpo divides by 2 s^2 only, exact by 2 s^2 |dt|
    detach_uncond: bool = True


class NftConfig(StrictModel):
    """DiffusionNFT (arXiv 2509.16117)."""

    name: Literal["nft"] = "nft"
    beta: float = Field(1.0, gt=0)
    kl_beta: float = Field(1e-4, ge=0)  # velocity MSE to the base
    kl_guidance: float = Field(
        1.0, ge=1
    )  # guidance of that base: above 1 the KL distils it (CRD, arXiv 2603.14128); sampling stays as it is
    timesteps_per_sample: int = Field(2, ge=1)  # of the sampler's grid, drawn without replacement
    timestep_fraction: float = Field(1.0, gt=0, le=1)  # the grid's first part (high noise) that they are drawn from
    decay: Literal["on_policy", "linear", "delayed"] = "linear"  # of the behavior snapshot: the paper's types 0, 1, 2


def num_probe_sigmas(num_steps: int, timestep_fraction: float) -> int:
    """How many of the sampler's sigmas, from high noise, nft draws from."""
    return max(1, round(timestep_fraction * num_steps))


ObjectiveConfig = Annotated[GrpoConfig | NftConfig, Field(discriminator="name")]


class AdvantageConfig(StrictModel):
    """A batch's scores -> advantages."""

    kind: Literal["group_std", "global_std"] = "group_std"
    normalize: Literal["sum", "per_reward"] = "sum"  # several rewards: weigh raw scores, or standardize each, then weigh
    clip: float = Field(5.0, gt=0)
    eps: float = Field(1e-4, gt=0)


class LearnerConfig(StrictModel):
    """One update."""

    groups_per_update: int = Field(8, ge=1)  # P
    optimizer_steps: int = Field(1, ge=1)  # M; P % M == 0
    micro_batch: int = Field(16, ge=1)  # samples a forward; changes bits, so it is a key
    num_threads: int = Field(1, ge=1)
    num_ranks: int = Field(1, ge=1)  # processes that share each optimizer step by whole groups; speed only; (P / M) % num_ranks == 0
    rank_timeout_s: float = Field(600.0, gt=0)  # for any word between ranks: a rank that is silent for longer is lost
    objective: ObjectiveConfig = GrpoConfig()
    advantage: AdvantageConfig = AdvantageConfig()
    anchor: Literal["auto", "recompute", "behavior"] = "auto"  # auto: behavior on CPU float32, recompute elsewhere
    learning_rate: float = Field(3e-4, gt=0)
    adam_betas: tuple[float, float] = (0.9, 0.999)
    adam_eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(1e-4, ge=0)
    warmup_steps: int = Field(0, ge=0)  # linear
    decay_steps: int = Field(0, ge=0)  # from this step on the rate falls as decay_steps / step; 0: constant
    max_grad_norm: float = Field(1.0, gt=0)
    ema_decay: float = Field(0.9, ge=0, lt=1)  # decay = min((1+n)/(10+n), ema_decay)
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
