"""Config -> Objective: the one place that knows the names."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

from learner.config import ObjectiveConfig
from learner.objectives.base import Objective
from learner.objectives.grpo import Grpo
from learner.objectives.nft import Nft

Anchor = Literal["recompute", "behavior"]

OBJECTIVES: Mapping[str, Callable[[Any, Anchor], Objective[Any]]] = {
    "grpo": lambda config, anchor: Grpo(config=config, anchor=anchor),
    "nft": lambda config, anchor: Nft(config=config),
}


def make_objective(config: ObjectiveConfig, anchor: Anchor) -> Objective[Any]:
    """Return the objective that the config names, with its anchor resolved."""
    return OBJECTIVES[config.name](config, anchor)
