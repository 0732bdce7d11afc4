"""From a config section to a Policy: the registry of model families."""

from importlib import import_module

from common.policy.base import Policy
from common.policy.config import ModelConfig

FAMILIES = {"sd3": ("common.policy.sd3", "Sd3Network"), "flux": ("common.policy.flux", "FluxNetwork")}
"""Family -> module and Network; a family's libraries (0.3 GB a process) are imported when it is loaded, not by those who load none."""


def load_policy(config: ModelConfig, *, seed: int = 0, with_vae: bool = True, with_text: bool = True) -> Policy:
    """Load the model of a config section with a fresh adapter.

    Args:
        seed: of the adapter's initial A matrices; the same on every machine.
        with_vae: False where nothing is decoded (a learner). with_text: False where features come from group files.

    Raises:
        ModelError: the directory is missing, damaged or of another family.
        ConfigError: LoRA targets that name no module; a size, device, guidance or scheduler that the model cannot serve.
    """
    module, name = FAMILIES[config.family]
    policies, network = import_module("common.policy.pipeline_policy"), getattr(import_module(module), name)
    policy: Policy = policies.load_pipeline(config, network, seed=seed, with_vae=with_vae, with_text=with_text)
    return policy
