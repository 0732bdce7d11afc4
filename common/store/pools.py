"""PoolWatch: what the servers of each reward say of themselves, and how much of what they are asked they score.

A pool is down while every one of its servers says that its breaker is open. A server that tries a group again says half open: the pool
is no longer down, so that there is a group to try, but it is not well either until a group was scored. The caller holds the lock and
passes its clock's time.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from common.store.ledger_entries import RewardSpec
from common.types import NOT_APPLICABLE, ScoreFile

BREAKER_GAUGE = "breaker_open"  # of a server's heartbeat: 0 closed, .5 half open, 1 open
COVERAGE_GROUPS = 64  # newest score files a reward, over which coverage is taken


@dataclass(slots=True, kw_only=True)
class _Server:
    reward: str
    heard: float
    level: float = 0.0


class PoolWatch:
    """The reward pools of a run.

    Args:
        rewards: of the run.
        silence_s: a server that was silent for longer does not count, unless all are silent.
    """

    def __init__(self, rewards: Sequence[RewardSpec], *, silence_s: float) -> None:
        self._specs, self._silence_s = {spec.name: spec for spec in rewards}, silence_s
        self._servers: dict[str, _Server] = {}
        self._ill_since: dict[str, float] = {}  # reward -> when its breakers were all open at first, until one closes
        self._errors: dict[str, str] = {}
        self._filed: dict[str, OrderedDict[tuple[int, str], tuple[int, int]]] = {}  # reward -> group file -> scored, applicable

    def asked(self, slot: str, reward: str, now: float) -> None:
        """A server asked for work."""
        server = self._servers.setdefault(slot, _Server(reward=reward, heard=now))
        server.reward, server.heard = reward, now
        self._judge(reward, now)

    def heard(self, slot: str, gauges: Mapping[str, float], now: float) -> None:
        """A slot's heartbeat; those that never asked for scoring are no servers."""
        server = self._servers.get(slot)
        if server is not None:
            server.heard, server.level = now, gauges.get(BREAKER_GAUGE, 0.0)
            self._judge(server.reward, now)

    def reward_of(self, slot: str) -> str:
        """Whose server a slot is; "" for the other roles, and before it asked."""
        return self._servers[slot].reward if slot in self._servers else ""

    def failed(self, reward: str, error: str) -> None:
        """A server could not score a group."""
        self._errors[reward] = error

    def filed(self, file: ScoreFile) -> None:
        """A training group's score file exists; being told twice counts once."""
        failures = [score.error for score in file.scores if score.value is None and score.error != NOT_APPLICABLE]
        if failures:
            self._errors[file.reward] = failures[0]
        scored = sum(score.value is not None for score in file.scores)
        newest = self._filed.setdefault(file.reward, OrderedDict())
        newest.setdefault((file.number, file.lease_id), (scored, scored + len(failures)))
        while len(newest) > COVERAGE_GROUPS:
            newest.popitem(last=False)

    def coverage(self) -> dict[str, float]:
        """Reward -> scored / applicable images of its newest groups, in [0, 1]; absent while it was asked for none."""
        sums = {name: [sum(column) for column in zip(*groups.values(), strict=True)] for name, groups in self._filed.items()}
        return {name: scored / applicable for name, (scored, applicable) in sums.items() if applicable}

    def down(self, now: float) -> dict[str, bool]:
        """Reward -> whether every server of its pool has its breaker open; rewards whose servers never asked are absent."""
        return {reward: min(self._levels(reward, now)) >= 1.0 for reward in sorted({s.reward for s in self._servers.values()})}

    def blocking(self, now: float) -> list[str]:
        """The train rewards whose pool is down: no new group is admitted for them to judge."""
        return [name for name, is_down in self.down(now).items() if is_down and self._trains(name)]

    def alerts(self, now: float) -> dict[str, str]:
        """Reward -> a sentence, of every pool that is not well."""
        return {name: self._sentence(name, now) for name in sorted(self._ill_since)}

    def cause_to_stop(self, now: float) -> str | None:
        """Why the run is to end: a train reward's pool has been ill for its limit, and its last try failed too."""
        for name in self.blocking(now):
            if now - self._ill_since.get(name, now) >= self._specs[name].breaker_limit_s:
                return f"{self._been_open(name, now)}; mend what it needs; the same command goes on"
        return None

    def ill_train_rewards(self, now: float) -> list[str]:
        """What is to be said beside another guard's cause: the train rewards that are not well, as clauses."""
        return [self._been_open(name, now) for name in sorted(self._ill_since) if self._trains(name)]

    def last_error(self) -> str:
        """The newest error of each train reward that had one, as one clause; "" without any."""
        return "; ".join(f"reward {name}: last error: {error}" for name, error in sorted(self._errors.items()) if self._trains(name))

    def _trains(self, name: str) -> bool:
        return name in self._specs and self._specs[name].use == "train"

    def _levels(self, reward: str, now: float) -> list[float]:
        pool = [server for server in self._servers.values() if server.reward == reward]
        alive = [server for server in pool if now - server.heard <= self._silence_s]
        return [server.level for server in alive or pool] or [0.0]

    def _judge(self, reward: str, now: float) -> None:
        levels = self._levels(reward, now)
        if min(levels) >= 1.0:
            self._ill_since.setdefault(reward, now)
        elif min(levels) <= 0.0:
            self._ill_since.pop(reward, None)

    def _been_open(self, name: str, now: float) -> str:
        error = self._errors.get(name, "no error is known")
        return f"reward {name}: its breaker has been open for {now - self._ill_since[name]:.0f} s: {error}"

    def _sentence(self, name: str, now: float) -> str:
        if not self._trains(name):
            return f"{self._been_open(name, now)}; it only watches: training goes on"
        limit_s = self._specs[name].breaker_limit_s
        return f"{self._been_open(name, now)}; no new group is admitted meanwhile, and after {limit_s:g} s the run ends"
