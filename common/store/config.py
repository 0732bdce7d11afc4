"""The run's schedule and the store's limits."""

from pydantic import Field

from common.config import StrictModel


class ScheduleConfig(StrictModel):
    """The asynchronous rule and its time limits (seconds)."""

    num_updates: int = Field(100, ge=1)
    time_limit_s: float | None = Field(None, gt=0)  # stop cleanly after it, counted from the start of this incarnation
    max_staleness: int = Field(1, ge=0)  # S, in updates
    max_attempts: int = Field(3, ge=1)
    lease_timeout_s: float = Field(30.0, gt=0)  # of silence
    group_timeout_s: float = Field(600.0, gt=0)  # of one group, however lively its worker
    stall_timeout_s: float = Field(900.0, gt=0)
    replace_flat_groups: bool = False
    min_scored_share: float = Field(0.75, gt=0, le=1)  # of K, below: dropped(too_few_scores)


class EvaluationConfig(StrictModel):
    """The frozen evaluation: ODE, fixed seeds. Everything here is part of the protocol's digest but `every` and `at_start`."""

    every: int = Field(0, ge=0)  # updates between evaluations; 0 = only at the start and the end
    at_start: bool = True
    snapshot: str = "ema"
    num_steps: int = Field(12, ge=1)
    guidance_scale: float = Field(1.0, ge=1.0)
    seed: int = 20250505
    images_per_prompt: int = Field(1, ge=1)
    max_prompts: int | None = None  # the first n of the file, evenly over tags
    sheet_size: int = Field(16, ge=1)  # images a lease
    rewards: tuple[str, ...] = ()  # names among the run's rewards; empty = all of them


class StoreConfig(StrictModel):
    """Limits of the run directory."""

    max_bytes: int = Field(8_000_000_000, ge=1_000_000)
    updates_kept: int | None = Field(None, ge=1)  # group files older than this many updates are retired; None = only at the cap
