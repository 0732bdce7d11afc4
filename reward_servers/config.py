"""Which rewards judge, with which weight, on how many servers, and what happens when one cannot."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from common.config import StrictModel

SAME_ENVIRONMENT = "same"
HTTP_ENVIRONMENT = "http"
OnFailure = Literal["retry", "drop_sample", "stop"]
Use = Literal["train", "watch"]


class RewardConfig(StrictModel):
    """One reward. Durations are in seconds."""

    name: str  # of `flowfleet reward ls`, or a dotted path to user code
    weight: float = 1.0
    use: Use = "train"  # a watch reward is only looked at
    tags: tuple[str, ...] = ()  # prompts it applies to; empty = all
    num_servers: int = Field(1, ge=0)
    num_threads: int = Field(1, ge=1)
    num_gpus: float | None = Field(None, ge=0)  # a server, fractions too; None: cluster.reward_gpus
    env: str = SAME_ENVIRONMENT  # same: this Python; a path: another Python, in a child process; http: a server of the open protocol
    max_groups: int = Field(4, ge=1)  # leased at once; fewer while a group takes seconds
    micro_batch: int = Field(16, ge=1)  # images a scorer call
    deadline_s: float = Field(120.0, gt=0, allow_inf_nan=False)  # an image's; a call on n images gets n times as long
    retries: int = Field(2, ge=0)  # of images whose failure may pass, with jittered pauses, before they count as failed
    on_failure: OnFailure = "retry"  # retry: a group that failed whole is scored again; drop_sample: null at once; stop: ends the run
    breaker_failures: int = Field(5, ge=1)  # groups in a row that failed whole, after which a server rests
    breaker_pause_s: float = Field(10.0, gt=0, allow_inf_nan=False)  # its rest before it tries one group
    breaker_limit_s: float = Field(300.0, gt=0, allow_inf_nan=False)  # train: how long all its servers may rest before the run ends
    sample_every: int = Field(1, ge=1)  # watch: scores 1 training group in so many, by group number; evaluations are scored whole
    options: dict[str, Any] = Field(default_factory=dict)  # the scorer's own keyword arguments

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.sample_every > 1 and self.use == "train":
            raise ValueError(
                f'reward {self.name}: sample_every={self.sample_every} leaves groups unscored that train; set use = "watch" or 1'
            )
        if self.num_gpus is not None and self.num_gpus > 1 and self.num_gpus != int(self.num_gpus):
            raise ValueError(f"reward {self.name}: num_gpus={self.num_gpus:g}; more than one GPU is a whole number; round it")
        if self.env not in (SAME_ENVIRONMENT, HTTP_ENVIRONMENT) and "/" not in self.env:
            raise ValueError(
                f"reward {self.name}: env={self.env!r} is neither same, http nor the path of a Python; write /path/to/bin/python"
            )
        return self
