"""How groups are sampled."""

from typing import Literal, Self

from pydantic import Field, model_validator

from common.config import StrictModel


class WindowConfig(StrictModel):
    """Which denoising steps are stochastic, kept and trained (a WindowPlan)."""

    kind: Literal["none", "all", "drop_last", "first", "random", "sliding"] = "first"  # none: ODE throughout
    size: int = Field(2, ge=1)  # first, random, sliding: how many steps
    start: int = Field(0, ge=0)  # random, sliding: first step index that a window may hold
    stop: int | None = None  # random, sliding: one past the last; None = num_steps
    strategy: Literal["progressive", "random", "decay", "exp_decay"] = "progressive"  # sliding: how long it stays where
    interval: int = Field(25, ge=1)  # sliding: rounds at a position (tau); decay and exp_decay start from it
    stride: int = Field(1, ge=0)  # sliding: steps from a position to the next; 0 = frozen at the start
    roll_back: bool = False  # sliding: after the last position to the first again; False = it stays at the last
    last_interval: int | None = Field(None, ge=1)  # sliding, decay: rounds at the range's last position; None = a quarter of interval
    decay_from: int = Field(13, ge=0)  # sliding, exp_decay: positions up to it keep the whole interval
    decay_rate: float = Field(0.1, ge=0)  # sliding, exp_decay: interval * exp(-rate * (position - decay_from)) beyond it
    shared: bool = True  # one window for all groups of a round; there is no other

    @model_validator(mode="after")
    def _is_shared(self) -> Self:
        if not self.shared:
            raise ValueError(
                "shared=false would draw a window for each group: samples with noise at other steps differ in reward for that reason, "
                "which inflates the groups' spread and collapses training; leave shared out, or set window.kind='random' "
                "for another window every round"
            )
        return self


class RolloutConfig(StrictModel):
    """One rollout group and the workers that make them."""

    num_workers: int = Field(1, ge=0)
    num_threads: int = Field(1, ge=1)  # a worker; changes bits, so it is a key
    group_size: int = Field(16, ge=2)  # K
    num_steps: int = Field(10, ge=1)  # T
    guidance_scale: float = Field(1.0, ge=1.0)  # 1 = no second forward
    kernel: Literal["ode", "flow_sde", "dance_sde", "cps", "dpm_sde"] = "flow_sde"
    noise_level: float = Field(0.7, ge=0.0)  # eta
    window: WindowConfig = WindowConfig()
    shared_init: bool = False  # one initial noise a group
    micro_batch: int = Field(16, ge=1)  # samples a forward; changes bits, so it is a key
    snapshot: str = "live"  # which weights sample: live, ema, or one that the objective keeps (nft: behavior)
