"""Named adapters with update rules: what rollouts, evaluation and objectives use besides the live one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum

import torch

from common.errors import ConfigError, CorruptFile

AdapterTensors = dict[str, torch.Tensor]  # canonical LoRA names -> float32 CPU tensors

LIVE = "live"
EMA_REF = "ema_ref"


class Moment(StrEnum):
    """When a snapshot moves."""

    STEP = "step"  # after each optimizer step
    UPDATE = "update"  # after each update, i.e. once a manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotRule:
    """snapshot <- d(n) snapshot + (1 - d(n)) live, n = how many of its moments came before."""

    moment: Moment
    decay: Callable[[int], float]
    interval: int = 1  # it moves at every interval-th of its moments


def ema_rule(ema_decay: float, interval: int = 1) -> SnapshotRule:
    """d(n) = min((1 + n) / (10 + n), ema_decay), at every interval-th optimizer step (flow_grpo's EMA; its presets: .9 each 8 steps)."""
    return SnapshotRule(moment=Moment.STEP, decay=lambda n: min((1 + n) / (10 + n), ema_decay), interval=interval)


def ema_ref_rule(moment: Moment) -> SnapshotRule:
    """d(n) = min(0.001 n, 0.3): the close, lagging reference (the EMA adapter of awm's and dgpo's repositories).

    Args:
        moment: STEP in dgpo's repository. UPDATE in awm's, which thereby holds all steps of an update near the weights that it began with.
    """
    return SnapshotRule(moment=moment, decay=lambda n: min(0.001 * n, 0.3))


class Snapshots:
    """The adapters besides the live one, float32 on CPU, with a counter each."""

    def __init__(self, fresh: Mapping[str, torch.Tensor], rules: Mapping[str, SnapshotRule]) -> None:
        """Start every snapshot as a copy of the fresh adapter.

        Raises:
            ConfigError: a rule is named "live", which is the trained adapter itself.
        """
        if LIVE in rules:
            raise ConfigError("Snapshots: 'live' is the trained adapter and takes no rule; name the snapshot otherwise")
        self._rules = dict(rules)
        self._states = {name: _copy(fresh) for name in rules}
        self._counts = dict.fromkeys(rules, 0)

    @property
    def states(self) -> Mapping[str, AdapterTensors]:
        """The snapshots by name; moved in place, so read them at once or copy."""
        return self._states

    @property
    def counts(self) -> Mapping[str, int]:
        """How many of its moments each snapshot has seen."""
        return self._counts

    def move(self, moment: Moment, live: Mapping[str, torch.Tensor]) -> None:
        """Move every snapshot of this moment towards the live adapter."""
        for name, rule in self._rules.items():
            if rule.moment is not moment:
                continue
            count = self._counts[name]
            self._counts[name] += 1
            if (count + 1) % rule.interval == 0:
                decay = rule.decay(count)
                for key, tensor in self._states[name].items():
                    tensor.mul_(decay).add_(live[key].float(), alpha=1.0 - decay)

    def load(self, states: Mapping[str, Mapping[str, torch.Tensor]], counts: Mapping[str, int]) -> None:
        """Take up saved snapshots.

        Raises:
            CorruptFile: the saved names are not the names of the rules.
        """
        if set(states) != set(self._rules) or set(counts) != set(self._rules):
            raise CorruptFile(
                f"Snapshots: the saved state holds {sorted(states)}, the config asks for {sorted(self._rules)}; "
                "resume with the objective that wrote the state"
            )
        self._states = {name: _copy(states[name]) for name in self._rules}
        self._counts = {name: counts[name] for name in self._rules}


def _copy(state: Mapping[str, torch.Tensor]) -> AdapterTensors:
    return {name: tensor.detach().to("cpu", torch.float32, copy=True) for name, tensor in state.items()}
