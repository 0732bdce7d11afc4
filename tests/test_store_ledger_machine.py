"""The ledger under random interleavings: it never loses, doubles, reorders, over-ages or blocks a group, and is its files.

`World` is the run directory: what was written. After every step `Ledger.rebuild(world)` equals the live ledger but for leases
and attempts; at the end of every run a greedy drain must finish it.
"""

import dataclasses
from dataclasses import dataclass, field

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from common.store.ledger import Ledger
from common.store.ledger_entries import GroupFile, LedgerSettings, Listing, RewardSpec, ScoreSummary, Values
from common.store.ledger_scoring import ScoreKey
from common.types import Drop, Manifest, Prompt

K = 4
NUM_UPDATES = 6
REWARDS = (RewardSpec(name="r"), RewardSpec(name="q", tags=("b",)), RewardSpec(name="w", use="watch"))
VALUES: tuple[Values, ...] = ((0.0, 0.5, 0.25, 1.0), (0.0, 0.5, 0.25, None), (1.0, 1.0, 1.0, 1.0), (0.5, None, None, 1.0), (None,) * 4)


def prompt_for(number: int) -> Prompt:
    return Prompt(id=f"p{number % 3}", text="x", metadata={"tag": "ab"[number % 2]})


@dataclass
class World:
    groups: list[GroupFile] = field(default_factory=list)
    scores: dict[tuple[str, str], ScoreSummary] = field(default_factory=dict)
    drops: dict[int, Drop] = field(default_factory=dict)
    manifests: list[Manifest] = field(default_factory=list)
    version: int | None = None

    def listing(self) -> Listing:
        return Listing(
            groups=tuple(self.groups), scores=tuple(self.scores.values()), drops=tuple(self.drops.values()),
            manifests=tuple(self.manifests), newest_version=self.version,
        )  # fmt: skip


class LedgerMachine(RuleBasedStateMachine):
    """Workers, reward servers, a learner and their failures around one ledger."""

    @initialize(
        num_groups=st.integers(1, 3), staleness=st.integers(0, 2), replace=st.booleans(),
    )  # fmt: skip
    def begin(self, num_groups: int, staleness: int, replace: bool) -> None:
        self.rules = LedgerSettings(
            groups_per_update=num_groups, group_size=K, max_staleness=staleness, num_updates=NUM_UPDATES, rewards=REWARDS,
            replace_flat_groups=replace,
        )  # fmt: skip
        self.world = World()
        self.ledger = Ledger(self.rules, prompt_for)
        self.now = 0.0
        self.held: dict[str, tuple[int, int]] = {}  # lease -> number, version: what workers believe they hold, ghosts too
        self.scoring: dict[str, ScoreKey] = {}
        self.num_leases = 0
        self.rules_changed = False
        self.publish_next()

    # ---- the world's own moves

    def publish_next(self) -> None:
        self.world.version = 0 if self.world.version is None else self.world.version + 1
        self.ledger.published(self.world.version)

    def write_group(self, lease_id: str) -> None:
        number, version = self.held.pop(lease_id)
        path = f"groups/{number}.{lease_id}.group.arrow"
        file = GroupFile(number=number, lease_id=lease_id, path=path, version=version, num_bytes=1)
        self.world.groups.append(file)
        self.ledger.generated(file)

    def write_scores(self, key: ScoreKey, values: Values) -> None:
        summary = ScoreSummary(number=key.number, lease_id=key.lease_id, reward=key.reward, values=values)
        self.ledger.scored(self.world.scores.setdefault((key.lease_id, key.reward), summary))

    def new_id(self) -> str:
        self.num_leases += 1
        return f"{self.num_leases:05d}"

    def settle(self) -> None:
        while True:
            wanted = self.ledger.decisions()
            if not wanted.drops and not wanted.nulls:
                return
            for drop in wanted.drops:
                assert drop.reason != "stale" or self.rules_changed, "strict order and admission alone must bound staleness"
                self.ledger.drop_written(self.world.drops.setdefault(drop.number, drop))
            for null in wanted.nulls:
                self.write_scores(null.key, (None,) * K)

    def cut(self, tell: bool = True) -> bool:
        manifest = self.ledger.next_manifest(incarnation=1, config_digest="c")
        if manifest is None:
            return False
        self.check_manifest(manifest)
        self.world.manifests.append(manifest)
        if tell:
            self.ledger.adopt(manifest)
        return True

    def check_manifest(self, manifest: Manifest) -> None:
        consumed = {group.number for earlier in self.world.manifests for group in earlier.groups}
        numbers = [group.number for group in manifest.groups]
        assert not consumed & set(numbers), "each group is consumed once"
        lowest = [n for n in range(max(numbers) + 1) if n not in consumed and n not in self.world.drops]
        assert numbers == lowest[: self.rules.groups_per_update] == lowest, "strict order"
        for group in manifest.groups:
            assert 0 <= manifest.update - 1 - group.version <= self.rules.max_staleness, "staleness"
            assert sum(group.kept) >= 3
            assert "r" in group.scores
            assert ("q" in group.scores) <= (group.number % 2 == 1)
        reported = {drop.number for earlier in self.world.manifests for drop in earlier.drops}
        assert {drop.number for drop in manifest.drops} == set(self.world.drops) - reported

    # ---- steps

    @rule(slot=st.sampled_from("abc"))
    def lease(self, slot: str) -> None:
        lease_id = self.new_id()
        number = self.ledger.lease(slot, lambda _: lease_id, self.now)
        if number is not None:
            assert self.world.version is not None
            self.held[lease_id] = (number, self.world.version)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        self.write_group(data.draw(st.sampled_from(sorted(self.held))))

    @precondition(lambda self: self.held)
    @rule(data=st.data(), how=st.sampled_from(["return", "fail", "forget"]))
    def give_up(self, data: st.DataObject, how: str) -> None:
        lease_id = data.draw(st.sampled_from(sorted(self.held)))
        if how == "return":
            self.ledger.leases.end(lease_id)
        elif how == "fail":
            self.ledger.fail(lease_id, "broke")
        del self.held[lease_id]

    @rule(seconds=st.sampled_from([1.0, 20.0, 31.0]), beating=st.booleans())
    def wait(self, seconds: float, beating: bool) -> None:
        self.now += seconds
        if beating:
            self.ledger.leases.beat(self.held, self.now)
            self.ledger.scoring.leases.beat(self.scoring, self.now)
        self.ledger.expire(self.now)

    @rule(reward=st.sampled_from(["r", "q", "w"]), limit=st.integers(1, 3))
    def ask_scores(self, reward: str, limit: int) -> None:
        for granted in self.ledger.lease_scores(reward, limit, slot="s", now=self.now, new_id=self.new_id):
            self.scoring[granted.lease_id] = granted.key

    @precondition(lambda self: self.scoring)
    @rule(data=st.data(), values=st.sampled_from(VALUES), how=st.sampled_from(["file", "file", "fail", "forget"]))
    def finish_scores(self, data: st.DataObject, values: Values, how: str) -> None:
        lease_id = data.draw(st.sampled_from(sorted(self.scoring)))
        key = self.scoring.pop(lease_id)
        if how == "file":
            self.write_scores(key, values)
            self.ledger.scoring.leases.end(lease_id)
        elif how == "fail":
            self.ledger.scoring.fail(lease_id, "broke")

    @rule(count=st.integers(1, 4))
    def work(self, count: int) -> None:
        """Workers that do not fail: random walks alone seldom finish an update."""
        for _ in range(count):
            before = set(self.held)
            self.lease("a")
            for lease_id in set(self.held) - before:
                self.write_group(lease_id)

    @rule(values=st.sampled_from(VALUES[:3]), rewards=st.sampled_from(["r", "rq", "rq", "rqw"]))
    def score_all(self, values: Values, rewards: str) -> None:
        for reward in rewards:
            for granted in self.ledger.lease_scores(reward, 9, slot="s", now=self.now, new_id=self.new_id):
                self.write_scores(granted.key, values)
                self.ledger.scoring.leases.end(granted.lease_id)

    @rule()
    def write_decisions(self) -> None:
        self.settle()

    @rule()
    def cut_manifest(self) -> None:
        self.settle()
        self.cut()

    @precondition(lambda self: (self.world.version or 0) < len(self.world.manifests))
    @rule()
    def publish(self) -> None:
        self.publish_next()

    @rule(
        change=st.booleans(), num_groups=st.integers(1, 3), staleness=st.integers(0, 2),
        last_words=st.sampled_from(["nothing", "manifest", "drop"]),
    )  # fmt: skip
    def restart(self, change: bool, num_groups: int, staleness: int, last_words: str) -> None:
        if last_words == "manifest":
            self.settle()
            self.cut(tell=False)  # written, and the process died before it knew
        if last_words == "drop":
            for drop in self.ledger.decisions().drops[:1]:
                self.world.drops[drop.number] = drop
        if change and (num_groups, staleness) != (self.rules.groups_per_update, self.rules.max_staleness):
            self.rules = dataclasses.replace(self.rules, groups_per_update=num_groups, max_staleness=staleness)
            self.rules_changed = True
        self.ledger = Ledger.rebuild(self.world.listing(), self.rules, prompt_for)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def readopt(self, data: st.DataObject) -> None:
        lease_id = data.draw(st.sampled_from(sorted(self.held)))
        self.ledger.readopt(self.held[lease_id][0], lease_id, "a", self.now)

    # ---- what must hold after every step

    @invariant()
    def every_number_is_in_one_state(self) -> None:
        counts = self.ledger.counts()
        assert sum(count for state, count in counts.items() if state != "issued") == counts["issued"]
        assert self.ledger.conservation_error() == 0

    @invariant()
    def the_files_tell_the_same_story(self) -> None:
        rebuilt = Ledger.rebuild(self.world.listing(), self.rules, prompt_for)
        assert rebuilt.durable_view() == self.ledger.durable_view()

    def teardown(self) -> None:
        """No deadlock: workers that never fail finish the run, with a learner that publishes as late as it can."""
        self.now += 1000.0
        self.ledger.expire(self.now)
        for _ in range(400):
            self.settle()
            issued = self.ledger.counts()["issued"]
            self.work(1)
            for lease_id in sorted(self.held):
                self.write_group(lease_id)
            self.score_all(VALUES[0], "rq")
            self.settle()
            if not self.cut() and issued == self.ledger.counts()["issued"] and (self.world.version or 0) < len(self.world.manifests):
                self.publish_next()
            if len(self.world.manifests) == NUM_UPDATES:
                return
        raise AssertionError(f"deadlock: {self.ledger.counts()} after {len(self.world.manifests)} manifests")


LedgerMachine.TestCase.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
TestLedgerMachine = LedgerMachine.TestCase
