"""Name -> the file that defines the objective: the one place that knows the names. A file, and torch with it, is imported when it is chosen."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from pydantic import ValidationError

from common.config import explain_errors
from learner.objectives.settings import ObjectiveSettings

OBJECTIVES: Mapping[str, str] = {
    "awm": "learner.objectives.awm:AwmConfig",
    "crd": "learner.objectives.crd:CrdConfig",
    "dance": "learner.objectives.dance:DanceConfig",
    "dgpo": "learner.objectives.dgpo:DgpoConfig",
    "dpo": "learner.objectives.dpo:DpoConfig",
    "dppo": "learner.objectives.dppo:DppoConfig",
    "grpo": "learner.objectives.grpo:GrpoConfig",
    "guard": "learner.objectives.guard:GuardConfig",
    "nft": "learner.objectives.nft:NftConfig",
    "orw": "learner.objectives.orw:OrwConfig",
    "rwr": "learner.objectives.rwr:RwrConfig",
    "sft": "learner.objectives.sft:SftConfig",
    "tempflow": "learner.objectives.tempflow:TempflowConfig",
    "vgrpo": "learner.objectives.vgrpo:VgrpoConfig",
}
"""Name -> module:settings class."""


def settings_type(name: str) -> type[ObjectiveSettings]:
    """Return the settings class of an objective.

    Raises:
        ValueError: naming the objectives there are.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"objective {name!r} is unknown; choose one of {', '.join(sorted(OBJECTIVES))}")
    module, _, attribute = OBJECTIVES[name].partition(":")
    found: type[ObjectiveSettings] = getattr(import_module(module), attribute)
    return found


def parse_objective(value: Any) -> ObjectiveSettings:
    """Read a [learner.objective] table: its `name` says which keys it has.

    Raises:
        ValueError: an unknown name or key, or a value that breaks its rule (pydantic adds where it stands).
    """
    if isinstance(value, ObjectiveSettings):
        return value
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        raise ValueError(f"an objective is a table with a name; choose one of {', '.join(sorted(OBJECTIVES))}")
    model = settings_type(value["name"])
    try:
        return model.model_validate(dict(value))
    except ValidationError as error:
        raise ValueError("; ".join(explain_errors(model, error))) from None
