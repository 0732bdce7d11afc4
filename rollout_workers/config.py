"""How groups are sampled."""

from typing import Literal

from pydantic import Field

from common.config import StrictModel


class WindowConfig(StrictModel):
    """Which denoising steps are stochastic, kept and trained (a WindowPlan)."""

    kind: Literal["none", "all", "drop_last", "first", "random"] = "first"  # none: ODE throughout
    size: int = Field(2, ge=1)  # first, random: how many steps
    start: int = Field(0, ge=0)  # random: first step index that a window may hold
    stop: int | None = None  # random: one past the last; None = num_steps


class RolloutConfig(StrictModel):
    """One rollout group and the workers that make them."""

    num_workers: int = Field(1, ge=0)
    num_threads: int = Field(1, ge=1)  # a worker; changes bits, so it is a key
    group_size: int = Field(16, ge=2)  # K
    num_steps: int = Field(10, ge=1)  # T
    guidance_scale: float = Field(1.0, ge=1.0)  # 1 = no second forward
    kernel: Literal["ode", "flow_sde", "dance_sde", "cps"] = "flow_sde"
    noise_level: float = Field(0.7, ge=0.0)  # eta
    window: WindowConfig = WindowConfig()
    shared_init: bool = False  # one initial noise a group
    micro_batch: int = Field(16, ge=1)  # samples a forward; changes bits, so it is a key
    snapshot: str = "live"  # which weights sample: live, ema, or one that the objective keeps (nft: behavior)
