"""Which rewards judge, with which weight, on how many servers."""

from typing import Any, Literal

from pydantic import Field

from common.config import StrictModel


class RewardConfig(StrictModel):
    """One reward."""

    name: str  # of `flowfleet reward ls`, or a dotted path to user code
    weight: float = 1.0
    use: Literal["train", "watch"] = "train"  # a watch reward is only looked at
    tags: tuple[str, ...] = ()  # prompts it applies to; empty = all
    num_servers: int = Field(1, ge=0)
    num_threads: int = Field(1, ge=1)
    max_groups: int = Field(4, ge=1)  # leased at once
    options: dict[str, Any] = Field(default_factory=dict)  # the scorer's own keyword arguments
