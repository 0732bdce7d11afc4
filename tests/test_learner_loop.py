"""The learner's loop in a world without processes: files, order, replay after a kill at any write, metrics and history."""

import io
import json
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from common.errors import ConfigError
from common.policy.adapters import read_adapter, read_publication
from common.store.run_store import RunStore
from common.types import Drop, Wait
from learner.advantages import GroupStd
from learner.archive import RunArchive
from learner.config import LearnerConfig
from learner.history import encode_history
from learner.loop import learner_loop
from learner.metrics import metrics_record, reward_summary
from learner.objectives.grpo import GrpoConfig
from learner.objectives.nft import NftConfig
from learner.publishing import Publisher
from learner.state import RunFiles
from learner.update import Learner, make_learner
from learner.writer import BackgroundWriter, InlineWriter, Writer
from tests.learner_fakes import MemoryFiles, RolloutWorld, manifest_of, sample_groups, sampler_spec
from tests.learner_policies import linear_policy

CASES = pytest.mark.parametrize(
    ("objective", "snapshot"), [(GrpoConfig(clip_range=0.1), "live"), (NftConfig(), "behavior")], ids=["grpo", "nft"]
)  # fmt: skip


class Killed(RuntimeError):
    """The process dies here."""


@dataclass
class MortalFiles(MemoryFiles):
    """Dies just before the n-th write."""

    writes_left: int = 10**9

    def create_exclusive(self, path: str, content: bytes, *, writer_id: str) -> None:
        if self.writes_left == 0:
            raise Killed(path)
        self.writes_left -= 1
        super().create_exclusive(path, content, writer_id=writer_id)


@dataclass
class Run:
    """One run directory and whoever works in it."""

    objective: Any
    snapshot: str
    num_updates: int = 4
    files: RunFiles = field(default_factory=MemoryFiles)
    changes: dict[str, Any] = field(default_factory=dict)
    world: RolloutWorld = field(init=False)
    archives: list[RunArchive] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.world = RolloutWorld(
            policy=linear_policy(), group_size=6, num_groups=2, spec=sampler_spec(snapshot=self.snapshot), num_updates=self.num_updates,
            states=lambda publication: read_adapter(self.files.read(publication.path), self.snapshot),
        )  # fmt: skip

    def start(self, clock: Callable[[], float] | None = None, writer: Writer | None = None) -> tuple[Learner, list[Wait]]:
        """Start an incarnation and let it run to its end."""
        facts = {"groups_per_update": 2, "objective": self.objective, "learning_rate": 1e-2, "micro_batch": 4} | self.changes
        config = LearnerConfig(**facts)
        learner = make_learner(linear_policy(), config, {"r": 1.0}, 3)
        incarnation = len(self.archives) + 1
        publisher = Publisher(self.files, incarnation=incarnation, snapshots=[self.snapshot, "ema", "ema"])
        self.archives.append(RunArchive(self.files, config, publisher, incarnation=incarnation, unix_clock=lambda: 1000.0))
        options = {"clock": clock} if clock else {}
        with closing(writer or InlineWriter()) as used:
            loop = learner_loop(learner, self.world, self.world, self.archives[-1], writer=used, **options)
            return learner, [wait for wait in loop if not time.sleep(0.001 if wait.seconds < 0.5 else 0.0)]

    def lasting(self) -> dict[str, bytes]:
        """The files whose bytes depend on no clock and no incarnation."""
        paths = [path for path in self.files.list() if path.startswith(("learner/", "history/"))]
        return {path: self.files.read(path) for path in paths}

    def weights(self) -> dict[int, str]:
        """Version -> digest of what was published."""
        paths = self.files.list("policy")
        found = [read_publication(self.files.read(path), path).adapter for path in paths]
        assert len({adapter.version for adapter in found}) == len(found)  # no version stands twice
        return {adapter.version: adapter.digest for adapter in found}


@CASES
def test_a_run_leaves_one_file_of_each_kind_an_update(objective: Any, snapshot: str) -> None:
    run = Run(objective, snapshot, files=RunStore("memory://learner-loop-" + objective.name))
    learner, waits = run.start()
    assert learner.version == 4
    assert waits == [Wait(seconds=0.5, reason="groups")] * 4  # handed through
    assert run.files.list("policy") == [f"policy/i0001/v{version:06d}.safetensors" for version in range(5)]
    assert run.files.list("history") == [f"history/update_{update:06d}.parquet" for update in range(1, 5)]
    assert run.files.list("metrics") == [f"metrics/update_{update:06d}.i0001.json" for update in range(1, 5)]
    assert {path.split("/")[1] for path in run.files.list("learner")} == {"update_000003", "update_000004"}  # thinned
    assert [publication.adapter.version for publication in run.world.publications] == [0, 1, 2, 3, 4]
    assert [update for update, _ in run.world.finished] == [1, 2, 3, 4]
    assert set(run.world.publications[0].snapshots) == {snapshot, "ema"}
    assert run.archives[0].num_differences == 0


@CASES
def test_published_snapshots_are_those_of_the_learner_and_their_canary_is_their_own(objective: Any, snapshot: str) -> None:
    run = Run(objective, snapshot)
    learner, _ = run.start()
    newest = run.world.publications[-1]
    for name in (snapshot, "ema"):
        state = read_adapter(run.files.read(newest.path), name)
        assert all(torch.equal(tensor, learner.snapshot_state(name)[key]) for key, tensor in state.items())
        assert newest.snapshots[name].canary == pytest.approx(float(sum(t.double().square().sum() for t in state.values())))


@pytest.mark.parametrize("writer", [InlineWriter, BackgroundWriter])
@pytest.mark.parametrize("state_interval", [1, 2])
@CASES
def test_a_kill_before_any_write_costs_nothing_but_time(
    objective: Any, snapshot: str, state_interval: int, writer: Callable[[], Writer]
) -> None:
    changes = {"state_interval": state_interval, "states_kept": 2}
    whole = Run(objective, snapshot, num_updates=3, changes=changes)
    whole.start()
    num_writes = len(whole.files.writers)  # type: ignore[attr-defined]
    for writes in range(num_writes):
        run = Run(objective, snapshot, num_updates=3, files=MortalFiles(writes_left=writes), changes=changes)
        with pytest.raises(Killed):
            run.start(writer=writer())
        assert len(run.files.writers) == writes  # type: ignore[attr-defined]  # the dead write nothing more
        run.files.writes_left = 10**9  # type: ignore[attr-defined]
        learner, _ = run.start(writer=writer())
        assert learner.version == 3
        assert run.weights() == whole.weights(), writes  # bit-equal, whatever incarnation wrote it
        assert run.lasting() == whole.lasting(), writes
        assert run.archives[-1].num_differences == 0
        versions = [publication.adapter.version for publication in run.world.publications]
        assert versions == sorted(versions)  # never below the newest


def test_a_replay_keeps_foreign_files_and_counts_the_differences() -> None:
    run = Run(NftConfig(), "behavior", num_updates=2)
    run.start()
    before = dict(run.files.content)  # type: ignore[attr-defined]
    for path in [path for path in before if path.startswith(("learner/update_000002", "history/update_000002"))]:
        run.files.remove(path)
    run.changes = {"learning_rate": 2e-2}  # another learner than the one that published version 2
    run.start()
    assert run.files.read("policy/i0001/v000002.safetensors") == before["policy/i0001/v000002.safetensors"]
    assert run.files.list("policy") == [path for path in sorted(before) if path.startswith("policy/")]
    assert run.archives[-1].num_differences == 1
    record = json.loads(run.files.read("metrics/update_000002.i0002.json"))
    assert record["learner"]["replay_differences"] == 1.0
    assert (record["incarnation"], record["update"], record["time_unix"]) == (2, 2, 1000.0)


def test_stopping_between_due_states_saves_one() -> None:
    run = Run(GrpoConfig(clip_range=0.1), "live", num_updates=2, changes={"state_interval": 5})
    run.start()
    assert "learner/update_000002/complete.json" in run.files.list("learner")


@pytest.mark.parametrize("writer", [InlineWriter, BackgroundWriter])
def test_a_state_that_the_coordinator_wants_is_saved_with_the_next_update(writer: Callable[[], Writer]) -> None:
    run = Run(GrpoConfig(clip_range=0.1), "live", num_updates=5, changes={"state_interval": 9, "states_kept": 9})
    run.world.states_wanted_at = frozenset({2})
    run.start(writer=writer())
    complete = [path for path in run.files.list("learner") if path.endswith("complete.json")]
    assert complete == [f"learner/update_{update:06d}/complete.json" for update in (0, 3, 5)]  # begin, wanted, end


def test_a_publication_of_a_snapshot_that_nobody_keeps_is_refused() -> None:
    with pytest.raises(ConfigError, match="behavior"):
        Run(GrpoConfig(), "behavior").start()


def test_durations_come_from_the_injected_clock_and_add_up() -> None:
    ticks = iter(range(10_000))
    run = Run(GrpoConfig(clip_range=0.1), "live", num_updates=1)
    run.start(clock=lambda: float(next(ticks)))
    record = json.loads(run.files.read("metrics/update_000001.i0001.json"))
    assert record["seconds"] == {"wait": 1.0, "read": 1.0, "learn": 1.0, "save": 1.0}
    update, live = run.world.finished[0]
    assert (update, live["images"], live["images_per_s"], live["staleness"]) == (1, 12.0, 3.0, 0.0)


def test_the_metrics_record_holds_what_the_scores_and_the_losses_say() -> None:
    run = Run(GrpoConfig(clip_range=0.1, kl_beta=0.1), "live", num_updates=2)
    run.start()
    record = json.loads(run.files.read("metrics/update_000002.i0001.json"))
    scores = [score for group in run.world.manifests[2].groups for score in group.scores["r"] if score is not None]
    assert record["rewards"]["r"]["mean"] == pytest.approx(sum(scores) / len(scores))
    assert record["rewards"]["r"]["coverage"] == 1.0
    assert (record["images"], record["staleness"], record["drops"], record["flat_group_share"]) == (12, {"0": 2}, {}, 0.0)
    expected = {
        "loss", "grad_norm", "ratio_mean", "ratio_min", "ratio_max", "kl", "kl_exact", "approx_kl", "clip_fraction", "clip_fraction_up",
        "clip_fraction_down", "mismatch_abs_dlogp", "advantage_abs_mean",
    }  # fmt: skip
    assert expected <= set(record["learner"])
    assert run.world.finished[1][1]["reward"] == pytest.approx(sum(scores) / len(scores), rel=1e-5)


def test_history_holds_a_row_a_sample() -> None:
    groups = sample_groups(linear_policy(), [7, 8], 3, sampler_spec(), version=2)
    scores = [{"a": [0.0, 1.0, None], "b": [1.0, 1.0, 1.0]}, {"a": [0.5, 0.5, 0.5]}]
    manifest = manifest_of(4, groups, scores)
    table = pq.read_table(io.BytesIO(encode_history(manifest, groups, GroupStd(eps=1e-4).estimate(manifest, {"a": 2.0})))).to_pydict()
    assert table["group"] == [7, 7, 7, 8, 8, 8]
    assert table["sample_index"] == [0, 1, 2] * 2
    assert table["prompt"] == ["prompt 7"] * 3 + ["prompt 8"] * 3
    assert table["staleness"] == [1] * 6
    assert table["kept"] == [True, True, False, True, True, True]
    assert table["trained"] == [True, True, False, False, False, False]  # the second group is flat
    assert table["reward.a"] == [0.0, 1.0, None, 0.5, 0.5, 0.5]
    assert table["reward.b"] == [1.0, 1.0, 1.0, None, None, None]
    assert table["weighted_reward"] == [0.0, 2.0, None, 1.0, 1.0, 1.0]
    assert table["advantage"][:3] == pytest.approx([-1 / 1.0001, 1 / 1.0001, 0.0])


def test_reward_summaries_count_only_what_was_asked_and_scored() -> None:
    groups = sample_groups(linear_policy(), [0, 1], 4, sampler_spec())
    scores = [{"a": [0.0, 1.0, None, None], "b": [None] * 4}, {"a": [2.0, 2.0, 2.0, 2.0]}]
    drops = (Drop(number=2, reason="stale"), Drop(number=3, reason="stale"), Drop(number=4, reason="attempts"))
    manifest = manifest_of(3, groups, scores, drops=drops)
    summary = reward_summary(manifest)
    assert summary["a"] == {"mean": 1.5, "std_in_group": 0.25, "coverage": 0.75, "flat_share": 0.5}
    assert summary["b"] == {"mean": None, "std_in_group": None, "coverage": 0.0, "flat_share": 1.0}
    batch = GroupStd(eps=1e-4).estimate(manifest, {"a": 1.0})
    statistics = {"sharpness": 2.0, "x": float("nan")}
    record = metrics_record(manifest, batch, incarnation=1, time_unix=0.0, seconds={}, learner={}, image_statistics=statistics)
    assert record["drops"] == {"stale": 2, "attempts": 1}
    assert record["staleness"] == {"2": 2}
    assert record["image_statistics"] == {"sharpness": 2.0, "x": None}  # what is not a number is none
