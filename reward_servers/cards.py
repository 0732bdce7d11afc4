"""The reward card: what a user must know of a reward before trusting it, one dataclass a reward, shown by `flowfleet reward show`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

from common.protocols import Scorer

NOT_MEASURED: Final = "not measured"
NO_MODEL: Final = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardCard:
    """What one reward is. Every field is one line of plain text."""

    name: str
    description: str
    range: str  # of raw scores
    source: str  # paper or repository whose definition this is
    licence: str  # of definition and models
    model: str = NO_MODEL  # checkpoint id
    revision: str = NO_MODEL  # of the checkpoint; a path's digest is in the scorer's version
    preprocessing: str = "none"
    memory: str = NOT_MEASURED  # of the process that scores, with the machine
    speed: str = NOT_MEASURED  # images a second, with the machine
    verified: str = "definition tested on fixtures"  # or "not verified with real weights"
    extra: str = ""  # pip extra that its engine needs; empty = none
    needs: Literal["nothing", "model", "server"] = "model"  # besides its extra: a checkpoint to load, or somebody to ask

    @property
    def is_self_contained(self) -> bool:
        """Whether it runs at once where its extra is installed."""
        return self.needs == "nothing"


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardEntry:
    """A reward as the registry knows it. `make` takes the reward's options as keyword arguments and returns its Scorer."""

    card: RewardCard
    make: Callable[..., Scorer]
