"""The trained adapter inside a transformer: canonical names, in-place copies, on and off."""

import difflib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import LoraConfig as PeftLoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn

from common.errors import ConfigError, ModelError
from common.policy.base import AdapterState
from common.policy.config import LoraConfig

ADAPTER = "live"  # the one PEFT adapter; snapshots are values that are copied into it


class LoraHandle:
    """One PEFT adapter whose values are swapped by copy: no recompilation, no merge, fixed rank."""

    def __init__(self, transformer: nn.Module, config: LoraConfig) -> None:
        """Add a fresh adapter (B = 0) in float32.

        Raises:
            ConfigError: a target names no module.
        """
        _check_targets(transformer, config.targets)
        peft_config = PeftLoraConfig(
            r=config.rank, lora_alpha=config.alpha, lora_dropout=0.0, target_modules=list(config.targets),
            init_lora_weights="gaussian" if config.init == "gaussian" else True,
        )  # fmt: skip
        transformer.requires_grad_(False)
        transformer.add_adapter(peft_config, adapter_name=ADAPTER)  # type: ignore[operator]
        self._layers = [module for module in transformer.modules() if isinstance(module, LoraLayer)]
        self._parameters = _lora_parameters(transformer)
        self._is_off = False
        for parameter in self._parameters.values():
            parameter.data = parameter.data.float()  # PEFT follows a half-precision base
            parameter.requires_grad_(True)

    @property
    def num_modules(self) -> int:
        """Bound LoRA modules."""
        return len(self._layers)

    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters in canonical name order."""
        return list(self._parameters.values())

    def read(self) -> dict[str, torch.Tensor]:
        """A float32 CPU copy by canonical name, e.g. `transformer_blocks.0.attn.to_q.lora_A.weight`."""
        return {name: parameter.detach().to("cpu", torch.float32, copy=True) for name, parameter in self._parameters.items()}

    def load(self, state: AdapterState) -> int:
        """Copy a state in place and return the number of modules bound.

        Raises:
            ModelError: names or shapes other than this adapter's.
        """
        if state.keys() != self._parameters.keys():
            foreign, missing = sorted(state.keys() - self._parameters.keys()), sorted(self._parameters.keys() - state.keys())
            raise ModelError(
                f"adapter: {len(foreign)} foreign tensors ({', '.join(foreign[:3])}), {len(missing)} missing ({', '.join(missing[:3])}); "
                "an adapter is loaded whole or not at all; use one trained with the same model.lora.targets"
            )
        for name, parameter in self._parameters.items():
            if state[name].shape != parameter.shape:
                raise ModelError(
                    f"adapter: {name} has shape {tuple(state[name].shape)}, this run's is {tuple(parameter.shape)}; "
                    "use one trained with the same model.lora.rank"
                )
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(state[name])
        return self.num_modules

    @contextmanager
    def using(self, state: AdapterState) -> Iterator[None]:
        """Run with another state, then put the values back bit for bit, also after an error."""
        saved = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        try:
            self.load(state)
            yield
        finally:
            self.load(saved)

    @contextmanager
    def off(self) -> Iterator[None]:
        """Run the base alone; nested, the outermost exit turns the adapter on again."""
        was_off, self._is_off = self._is_off, True
        self._switch()
        try:
            yield
        finally:
            self._is_off = was_off
            self._switch()

    def _switch(self) -> None:
        for layer in self._layers:
            layer._disable_adapters = self._is_off  # the flag alone: PEFT's enable_adapters also flips requires_grad


def _lora_parameters(transformer: nn.Module) -> dict[str, nn.Parameter]:
    marker = f".{ADAPTER}."
    found = {
        name.replace(marker, "."): parameter for name, parameter in transformer.named_parameters() if "lora_" in name and marker in name
    }
    return dict(sorted(found.items()))


def _check_targets(transformer: nn.Module, targets: tuple[str, ...]) -> None:
    if not targets:
        raise ConfigError("model.lora.targets: none came, so no module would be trained; leave the key out for the attention projections")
    linear = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            endings = sorted({".".join(name.split(".")[-size:]) for name in linear for size in (1, 2, 3)})
            near = difflib.get_close_matches(target, endings, n=3, cutoff=0.3)
            raise ConfigError(
                f"model.lora.targets: {target!r} names no linear module of {type(transformer).__name__}; it must be a module name's end; "
                f"the nearest are {', '.join(near) or 'none'}"
            )
