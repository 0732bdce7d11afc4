"""What the Ledger knows of one group, and the rules that follow from its files alone."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

from common.types import Drop, Manifest

Values = tuple[float | None, ...]  # K raw scores of one reward; None = not scored

_FLAT_SPREAD = 1e-8


class GroupState(StrEnum):
    """Where a group is; the lifecycle is drawn in common.store.ledger."""

    WAITING = "waiting"
    LEASED = "leased"
    GENERATED = "generated"
    READY = "ready"
    BATCHED = "batched"
    DROPPED = "dropped"


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardSpec:
    """What the store needs to know of a reward."""

    name: str
    use: Literal["train", "watch"] = "train"
    tags: tuple[str, ...] = ()  # prompt tags it applies to; empty = all
    sample_every: int = 1  # a watch reward judges the training groups whose number this divides
    breaker_limit_s: float = 300.0  # how long a train reward's pool may be down before the run ends

    def applies_to(self, tag: str) -> bool:
        """Whether it judges prompts of this tag; not applicable is neither null nor 0."""
        return not self.tags or tag in self.tags

    def judges(self, number: int, tag: str) -> bool:
        """Whether it judges this training group; a pure function of the number, so every incarnation samples the same ones."""
        return self.applies_to(tag) and number % self.sample_every == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerSettings:
    """The rules in force."""

    groups_per_update: int  # P
    group_size: int  # K
    max_staleness: int  # S
    num_updates: int
    rewards: tuple[RewardSpec, ...]
    max_attempts: int = 3
    lease_timeout_s: float = 30.0
    group_timeout_s: float = 600.0
    replace_flat_groups: bool = False
    min_scored_share: float = 0.75

    @property
    def min_scored(self) -> int:
        """The fewest scored samples of a group that trains."""
        return math.ceil(self.min_scored_share * self.group_size - 1e-9)


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupFile:
    """A committed group file."""

    number: int
    lease_id: str
    path: str
    version: int  # policy version that sampled it
    num_bytes: int
    drawn_for: tuple[str, str] | None = field(default=None, compare=False)  # id and text of its prompt, where the file was read back


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreSummary:
    """A committed score file, parsed."""

    number: int
    lease_id: str  # of the group file
    reward: str
    values: Values


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """What a run directory says."""

    groups: tuple[GroupFile, ...] = ()
    scores: tuple[ScoreSummary, ...] = ()
    drops: tuple[Drop, ...] = ()
    manifests: tuple[Manifest, ...] = ()  # in update order
    newest_version: int | None = None


@dataclass(slots=True, kw_only=True)
class Entry:
    """A number that is neither batched nor dropped, with every file that was committed for it."""

    number: int
    tag: str  # of its prompt
    files: dict[str, GroupFile] = field(default_factory=dict)  # by lease id: rivals are possible after restarts
    scores: dict[str, dict[str, Values]] = field(default_factory=dict)  # lease id -> reward -> values

    def applicable(self, settings: LedgerSettings, use: str = "train") -> tuple[RewardSpec, ...]:
        """The rewards of a use that judge this group."""
        return tuple(reward for reward in settings.rewards if reward.use == use and reward.judges(self.number, self.tag))

    def chosen(self, settings: LedgerSettings) -> GroupFile | None:
        """The file that stands for the number: most complete scores, then newest version, then smallest id."""
        if not self.files:
            return None
        names = [reward.name for reward in self.applicable(settings)]

        def rank(file: GroupFile) -> tuple[int, int, int, str]:
            filed = self.scores.get(file.lease_id, {})
            return (-sum(name in filed for name in names), -len(filed), -file.version, file.lease_id)

        return min(self.files.values(), key=rank)

    def filed(self, settings: LedgerSettings) -> Mapping[str, Values]:
        """Reward -> values of the chosen file; only applicable rewards count."""
        file = self.chosen(settings)
        filed = self.scores.get(file.lease_id, {}) if file else {}
        names = [reward.name for use in ("train", "watch") for reward in self.applicable(settings, use)]
        return {name: filed[name] for name in names if name in filed}

    def missing(self, settings: LedgerSettings) -> list[str]:
        """The applicable rewards, train ones first, that have not filed for the chosen file."""
        filed = self.filed(settings)
        rewards = (*self.applicable(settings), *self.applicable(settings, "watch"))
        return [reward.name for reward in rewards if reward.name not in filed]

    def kept(self, settings: LedgerSettings) -> tuple[bool, ...] | None:
        """[K] scored by every applicable train reward; None while one of them has not filed."""
        filed = self.filed(settings)
        columns = []
        for reward in self.applicable(settings):
            if reward.name not in filed:
                return None
            columns.append(filed[reward.name])
        if self.chosen(settings) is None:
            return None
        return tuple(all(column[sample] is not None for column in columns) for sample in range(settings.group_size))

    def is_flat(self, settings: LedgerSettings) -> bool:
        """Whether every train reward's spread over its scored samples is at most 1e-8."""
        filed = self.filed(settings)
        for reward in self.applicable(settings):
            scored = [value for value in filed.get(reward.name, ()) if value is not None]
            if scored and max(scored) - min(scored) > _FLAT_SPREAD:
                return False
        return True
