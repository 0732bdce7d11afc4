"""From a config section to a Policy: the registry of model families."""

from collections.abc import Callable

from common.policy.base import Policy
from common.policy.config import ModelConfig
from common.policy.sd3 import load_sd3

FAMILIES: dict[str, Callable[..., Policy]] = {"sd3": load_sd3}


def load_policy(config: ModelConfig, *, seed: int = 0) -> Policy:
    """Load the model of a config section with a fresh adapter.

    Args:
        seed: of the adapter's initial A matrices; the same on every machine.

    Raises:
        ModelError: the directory is missing, incomplete or of another family.
        ConfigError: LoRA targets that name no module.
    """
    return FAMILIES[config.family](config, seed=seed)
