"""The Ledger: a pure state machine that decides who samples what, and which groups make the next update.

No I/O, no clock, no Ray: events come in, decisions go out. What a number's state is follows from the files that exist (plus
leases and attempts, which live in memory only), so `Ledger.rebuild(listing)` equals the live ledger but for those.

Lifecycle of a group number (architecture, section 4):

                     returned, expired                           manifest
      (issued) --> WAITING <----------> LEASED --> GENERATED --> READY --> BATCHED
                      |        leased      group file    every train    ^
                      |                       |          reward filed   | an adopted manifest overrides all
                      +-----------------------+---------------+--> DROPPED(attempts | too_few_scores | flat | stale)

issued = waiting + leased + generated + ready + batched + dropped, always (`conservation_error` is 0).
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from common.errors import CorruptFile
from common.store.leases import LeaseBook
from common.store.ledger_entries import Entry, GroupFile, GroupState, LedgerSettings, Listing, ScoreSummary
from common.store.ledger_rules import cause_to_stop, drop_of_files, record_of
from common.store.ledger_scoring import GrantedScoring, ScoreKey, ScoringBook
from common.types import Drop, Manifest, Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class NullScores:
    """A decision: file nulls for this key, because its reward failed too often."""

    key: ScoreKey
    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Decisions:
    """What must be written to the run directory before the ledger can go on."""

    drops: tuple[Drop, ...]
    nulls: tuple[NullScores, ...]


class Ledger:
    """The state of a run's groups.

    Args:
        settings: the rules in force.
        prompt_for: number -> Prompt, a pure function.
    """

    def __init__(self, settings: LedgerSettings, prompt_for: Callable[[int], Prompt]) -> None:
        self.settings = settings
        self._prompt_for = prompt_for
        self._active: dict[int, Entry] = {}
        self._batched: dict[int, int] = {}  # number -> update
        self._batch_sizes: dict[int, int] = {}  # update -> groups
        self._dropped: dict[int, Drop] = {}
        self._reported_drops: set[int] = set()
        self._next_number = 0
        self._guard_start = 0  # drops of earlier incarnations do not stop this one
        self._errors: dict[int, str] = {}
        self.last_update = 0  # newest manifest
        self.newest_version: int | None = None
        timeouts = {"silence_s": settings.lease_timeout_s, "total_s": settings.group_timeout_s}
        self.leases: LeaseBook[int] = LeaseBook(**timeouts)
        self.scoring = ScoringBook(**timeouts, max_attempts=settings.max_attempts)

    @classmethod
    def rebuild(cls, listing: Listing, settings: LedgerSettings, prompt_for: Callable[[int], Prompt]) -> "Ledger":
        """Return the ledger that a run directory describes. Raises CorruptFile when its manifests contradict each other."""
        ledger = cls(settings, prompt_for)
        for file in listing.groups:
            ledger.generated(file)
        for summary in listing.scores:
            ledger.scored(summary)
        for drop in listing.drops:
            ledger.drop_written(drop)
        for manifest in listing.manifests:
            ledger.adopt(manifest)
        if listing.newest_version is not None:
            ledger.published(listing.newest_version)
        ledger._guard_start = ledger._next_number
        return ledger

    def lease(self, slot: str, new_id: Callable[[int], str], now: float, *, admits: bool = True) -> int | None:
        """Lease the lowest returned number or hole, else a new one if `admits` and the bound allow; None to wait. new_id: number -> id."""
        if self.newest_version is None:
            return None
        number = self._lowest_waiting()
        if number is None:
            if not admits or not self.may_issue():
                return None
            number = self._next_number
            self._issue_through(number)
        self.leases.grant(number, new_id(number), slot=slot, now=now, version=self.newest_version)
        return number

    def readopt(self, number: int, lease_id: str, slot: str, now: float) -> bool:
        """Give a number back to the worker that held it before a restart; False when it is taken or done."""
        if number >= self._next_number and not self.may_issue():
            return False
        self._issue_through(number)
        entry = self._active.get(number)
        if entry is None or entry.files or self.leases.holds(number) or self.leases.get(lease_id) is not None:
            return False
        self.leases.grant(number, lease_id, slot=slot, now=now)
        return True

    def may_issue(self) -> bool:
        """Admission, for new numbers only: unpublished work after it <= (S + 1) P, and no more than the run still needs."""
        needed = (self.settings.num_updates - self.last_update) * self.settings.groups_per_update
        bound = (self.settings.max_staleness + 1) * self.settings.groups_per_update
        return len(self._active) + self.num_unpublished() + 1 <= bound and len(self._active) + 1 <= needed

    def num_unpublished(self) -> int:
        """Groups batched for updates that have not published."""
        newest = -1 if self.newest_version is None else self.newest_version
        return sum(self._batch_sizes[update] for update in range(newest + 1, self.last_update + 1) if update)

    def _lowest_waiting(self) -> int | None:
        free = (
            number
            for number, entry in sorted(self._active.items())
            if not entry.files and not self.leases.holds(number) and self.leases.attempts[number] < self.settings.max_attempts
        )
        return next(free, None)

    def fail(self, lease_id: str, error: str) -> None:
        """A worker failed: the number waits again, and the attempt counts."""
        number = self.leases.fail(lease_id)
        if number is not None:
            self._errors[number] = error

    def expire(self, now: float) -> int:
        """Expire the silent rollout and scoring leases; return how many there were."""
        late = self.leases.expire(now)
        for number in late:
            self._errors[number] = "its lease expired"
        return len(late) + self.scoring.expire(now)

    def _issue_through(self, number: int) -> None:
        while self._next_number <= number:
            prompt = self._prompt_for(self._next_number)
            self._active[self._next_number] = Entry(number=self._next_number, tag=prompt.tag)
            self._next_number += 1

    def generated(self, file: GroupFile) -> None:
        """A group file exists. A lease of the number ends; a rival file of the same number is kept beside it."""
        self._issue_through(file.number)
        if file.number in self._active:
            self._active[file.number].files.setdefault(file.lease_id, file)
            self.leases.end_key(file.number)

    def scored(self, summary: ScoreSummary) -> None:
        """A score file exists. Raises CorruptFile when it does not hold K values."""
        if len(summary.values) != self.settings.group_size:
            place = f"scores of group {summary.number} by {summary.reward} hold {len(summary.values)} values"
            raise CorruptFile(f"ledger: {place}; the rule is K = {self.settings.group_size}; remove that file, and it is scored again")
        if (entry := self._active.get(summary.number)) is not None:
            entry.scores.setdefault(summary.lease_id, {}).setdefault(summary.reward, summary.values)

    def drop_written(self, drop: Drop) -> None:
        """A drop file exists: the number leaves the sum, unless a manifest holds it."""
        self._issue_through(drop.number)
        if self._active.pop(drop.number, None) is not None:
            self._dropped[drop.number] = drop
            self.leases.end_key(drop.number)

    def adopt(self, manifest: Manifest) -> None:
        """A manifest exists: its groups are batched at its paths, whatever else says. Raises CorruptFile on a gap or repeat."""
        if manifest.update <= self.last_update:
            return
        if manifest.update != self.last_update + 1:
            raise CorruptFile(f"ledger: manifest {manifest.update} follows {self.last_update}; manifests are contiguous; restore the gap")
        for group in manifest.groups:
            if group.number in self._batched:
                raise CorruptFile(
                    f"ledger: manifest {manifest.update} holds group {group.number}, which update {self._batched[group.number]} "
                    "consumed; each group is consumed once; restore the run directory"
                )
            self._issue_through(group.number)
            self._active.pop(group.number, None)
            self._dropped.pop(group.number, None)
            self.leases.end_key(group.number)
            self._batched[group.number] = manifest.update
        self._reported_drops.update(drop.number for drop in manifest.drops)
        self._batch_sizes[manifest.update] = len(manifest.groups)
        self.last_update = manifest.update

    def published(self, version: int) -> None:
        """A policy version exists."""
        self.newest_version = version if self.newest_version is None else max(version, self.newest_version)

    def decisions(self) -> Decisions:
        """What follows from the files and attempts: drops and null scores to write first, then to report as events."""
        drops: list[Drop] = []
        nulls: list[NullScores] = []
        position = 0
        for number in sorted(self._active):
            entry = self._active[number]
            drop = self._drop_of(entry, self.last_update + 1 + position // self.settings.groups_per_update)
            if drop:
                drops.append(drop)
            position += drop is None or drop.reason != "stale"
            nulls += [NullScores(key=key, error=self.scoring.error(key)) for key in self._unscored(entry) if self.scoring.is_exhausted(key)]
        return Decisions(drops=tuple(drops), nulls=tuple(nulls))

    def _drop_of(self, entry: Entry, update: int) -> Drop | None:
        """The drop that a number needs, were it to be consumed by `update`."""
        number = entry.number
        if not entry.files:
            exhausted = self.leases.attempts[number] >= self.settings.max_attempts and not self.leases.holds(number)
            return Drop(number=number, reason="attempts", detail=self._errors.get(number, "")) if exhausted else None
        return drop_of_files(entry, update, self.settings)

    def unhealthy(self) -> str | None:
        """The cause to stop for when more than half of the last 2P issued were dropped (flat and stale do not count)."""
        start = max(self._guard_start, self._next_number - 2 * self.settings.groups_per_update)
        return cause_to_stop([self._dropped[n] for n in range(start, self._next_number) if n in self._dropped], self.settings)

    def flat_in_a_row(self) -> int:
        """How many groups of this incarnation were dropped as flat since the last manifest; 0 when one is ready to train."""
        if any(self.state(number) is GroupState.READY for number in self._active):
            return 0
        recent = (drop for n, drop in self._dropped.items() if n >= self._guard_start and n not in self._reported_drops)
        return sum(drop.reason == "flat" for drop in recent)

    def wanted_scores(self, reward: str) -> list[ScoreKey]:
        """What a reward has to score, lowest number first."""
        return [key for number in sorted(self._active) for key in self._unscored(self._active[number]) if key.reward == reward]

    def _unscored(self, entry: Entry) -> list[ScoreKey]:
        file = entry.chosen(self.settings)
        names = entry.missing(self.settings)
        return [ScoreKey(number=entry.number, lease_id=file.lease_id, reward=name) for name in names] if file else []

    def lease_scores(self, reward: str, limit: int, *, slot: str, now: float, new_id: Callable[[], str]) -> list[GrantedScoring]:
        """Lease up to `limit` groups to score."""
        return self.scoring.ask(self.wanted_scores(reward), limit, slot=slot, now=now, new_id=new_id)

    def next_manifest(self, *, incarnation: int, config_digest: str) -> Manifest | None:
        """The next update's batch: the P lowest numbers, when all are ready. None to wait. Becomes true by `adopt`."""
        lowest = sorted(self._active)[: self.settings.groups_per_update]
        update = self.last_update + 1
        if len(lowest) < self.settings.groups_per_update or update > self.settings.num_updates:
            return None
        entries = [self._active[number] for number in lowest]
        if any(self.state(entry.number) is not GroupState.READY or self._drop_of(entry, update) for entry in entries):
            return None
        unreported = sorted(set(self._dropped) - self._reported_drops)
        return Manifest(
            update=update, incarnation=incarnation, config_digest=config_digest, max_staleness=self.settings.max_staleness,
            groups=tuple(record_of(entry, self._prompt_for(entry.number).id, self.settings) for entry in entries),
            drops=tuple(self._dropped[number] for number in unreported),
        )  # fmt: skip

    def state(self, number: int) -> GroupState:
        """Where an issued number is."""
        if number in self._batched:
            return GroupState.BATCHED
        if number in self._dropped:
            return GroupState.DROPPED
        entry = self._active[number]
        if not entry.files:
            return GroupState.LEASED if self.leases.holds(number) else GroupState.WAITING
        kept = entry.kept(self.settings)
        return GroupState.READY if kept is not None and sum(kept) >= self.settings.min_scored else GroupState.GENERATED

    def counts(self) -> dict[str, int]:
        """Groups by state, and their sum."""
        found = Counter(str(self.state(number)) for number in self._active)
        found.update({str(GroupState.BATCHED): len(self._batched), str(GroupState.DROPPED): len(self._dropped)})
        return {**{str(state): found[str(state)] for state in GroupState}, "issued": self._next_number}

    def conservation_error(self) -> int:
        """How many issued numbers are in no state, or in more than one: always 0, else a group may be lost or trained on twice."""
        held = (self._active.keys(), self._batched.keys(), self._dropped.keys())
        known = set().union(*held)
        return abs(self._next_number - len(known)) + sum(map(len, held)) - len(known)

    def holding_up(self) -> tuple[int, GroupState] | None:
        """The lowest number that the next manifest waits for, and its state; None when a number must be issued first."""
        for number in sorted(self._active)[: self.settings.groups_per_update]:
            if self.state(number) is not GroupState.READY:
                return number, self.state(number)
        return None

    def drops_by_reason(self) -> dict[str, int]:
        """How many were dropped, by reason."""
        return dict(Counter(drop.reason for drop in self._dropped.values()))

    def durable_view(self) -> dict[str, Any]:
        """All that the run directory must be able to tell again: everything but leases and attempts."""
        rules = self.settings
        with_files = {n: (str(self.state(n)), e.chosen(rules), dict(e.filed(rules))) for n, e in self._active.items() if e.files}
        known = [*with_files, *self._batched, *self._dropped]
        top = max(known, default=-1)
        return {
            "files": with_files, "holes": sorted(n for n, e in self._active.items() if not e.files and n < top), "top": top,
            "batched": dict(self._batched), "dropped": dict(self._dropped), "reported": set(self._reported_drops),
            "last_update": self.last_update, "newest_version": self.newest_version,
        }  # fmt: skip
