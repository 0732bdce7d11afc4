"""What one rank of a learner does in tests: prepared batches, the real loops, and what it saw as JSON.

Run as `python -m tests.learner_rank_child RANK FOLDER MODEL`; both ranks meet at files in FOLDER.
"""

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from common.policy.base import Policy
from common.policy.config import LoraConfig, ModelConfig
from common.policy.load import load_policy
from common.store.run_store import RunStore
from common.types import Manifest, Publication, RolloutGroup, Stop, Wait
from learner.archive import RunArchive
from learner.config import LearnerConfig
from learner.loop import follower_loop, learner_loop
from learner.objectives.grpo import GrpoConfig
from learner.objectives.nft import NftConfig
from learner.publishing import Publisher
from learner.ranks import RankLost, RankPlace, Ranks, TorchRanks
from learner.state import StateArchive
from learner.update import Learner, make_learner
from learner.writer import BackgroundWriter
from tests.learner_fakes import group_path, manifest_of, sample_groups, sampler_spec, score_by_latents
from tests.learner_policies import linear_policy

NUM_UPDATES, NUM_GROUPS, GROUP_SIZE = 5, 8, 4
OBJECTIVES: dict[str, GrpoConfig | NftConfig] = {"grpo": GrpoConfig(clip_range=0.05, kl_beta=0.01), "nft": NftConfig(kl_beta=1e-3)}
PATIENCE_S = 300.0  # of a sound exchange: the machine may be busy
SHORT_S = 3.0  # of the exchange that is meant to run out
Batches = Mapping[int, tuple[Manifest, list[RolloutGroup]]]


def config(objective: GrpoConfig | NftConfig, **changes: Any) -> LearnerConfig:
    """Minibatches of four groups, so two a rank; Adam's eps is far above float noise, which it would else blow up to whole steps."""
    facts: dict[str, Any] = {
        "groups_per_update": NUM_GROUPS, "optimizer_steps": 2, "micro_batch": 3, "objective": objective, "learning_rate": 1e-3, "adam_eps": 1e-5,
    }  # fmt: skip
    return LearnerConfig(**(facts | changes))


def prepared_batches(policy: Policy) -> Batches:
    """Update -> its manifest and groups, all sampled by the fresh adapter: nulls of unequal number, flat groups, a group without scores."""
    found: dict[int, tuple[Manifest, list[RolloutGroup]]] = {}
    for update in range(1, NUM_UPDATES + 1):
        numbers = range((update - 1) * NUM_GROUPS, update * NUM_GROUPS)
        groups = sample_groups(policy, numbers, GROUP_SIZE, sampler_spec(num_steps=4, window=(0, 1)))
        scores = score_by_latents(groups, lambda x: float(x.mean()))
        found[update] = (manifest_of(update, groups, [_mask(n, table) for n, table in zip(numbers, scores, strict=True)]), groups)
    return found


def _mask(number: int, table: Mapping[str, Sequence[float | None]]) -> dict[str, list[float | None]]:
    values: list[float | None] = list(table["r"])
    if number % 8 in (1, 2):
        values = [0.5] * GROUP_SIZE
    if number % 8 == 5:
        values = [None] * GROUP_SIZE
    return {"r": [None if (number * 3 + sample) % 5 == 0 else value for sample, value in enumerate(values)]}


@dataclass
class PreparedDesk:
    """Hands out the prepared manifests, after one Wait each."""

    batches: Batches
    num_updates: int
    asked: list[int] = field(default_factory=list)
    finished: list[int] = field(default_factory=list)

    def next_manifest(self, update: int) -> Manifest | Wait | Stop:
        self.asked.append(update)
        if self.asked.count(update) == 1:
            return Wait(seconds=0.0, reason="groups")
        return self.batches[update][0] if update <= self.num_updates else Stop(reason="done")

    def publish(self, publication: Publication) -> None:
        pass

    def finish_update(self, update: int, metrics: Mapping[str, float]) -> bool:
        self.finished.append(update)
        return False

    def beat(self, slot: str, lease_ids: Sequence[str], metrics: Mapping[str, float]) -> None:
        pass


@dataclass
class PreparedGroups:
    """Reads the prepared groups."""

    batches: Batches

    def read_group(self, path: str) -> RolloutGroup:
        return next(group for _, groups in self.batches.values() for group in groups if group_path(group.number) == path)


def train(policy: Policy, objective: str, batches: Batches, ranks: Ranks, url: Path, *, num_updates: int = NUM_UPDATES) -> Learner:
    """Run the loop of this rank on a run directory until update `num_updates`."""
    settings, store = config(OBJECTIVES[objective]), RunStore(str(url))
    learner = make_learner(policy, settings, {"r": 1.0}, 11)
    learner.ranks = ranks
    if ranks.rank == 0:
        archive = RunArchive(store, settings, Publisher(store, incarnation=1, snapshots=["live"]), incarnation=1)
        loop = learner_loop(learner, PreparedDesk(batches, num_updates), PreparedGroups(batches), archive, writer=BackgroundWriter())
    else:
        loop = follower_loop(learner, PreparedGroups(batches), StateArchive(store, states_kept=2, writer_id="follower"))
    for wait in loop:
        time.sleep(min(wait.seconds, 0.01))
    return learner


class Child:
    """One rank."""

    def __init__(self, rank: int, folder: Path, model: Path) -> None:
        self.rank, self.folder, self.model = rank, folder, model
        self.seen: dict[str, Any] = {}

    def meet(self, name: str, timeout_s: float = PATIENCE_S) -> TorchRanks:
        """Two ranks over gloo at a fresh file."""
        place = RankPlace(rank=self.rank, size=2, address=f"file://{self.folder}/{name}.meet", timeout_s=timeout_s)
        return TorchRanks(place, torch.device("cpu"))

    def words(self) -> None:
        """Every exchange once."""
        ranks = self.meet("words")
        told = [ranks.broadcast(content if self.rank == 0 else b"ignored").decode() for content in (b"x" * 100_000, b"y", b"")]
        shared = [content.decode() for content in ranks.share(b"a" * (3 * self.rank + 1))]
        parameters = [torch.nn.Parameter(torch.zeros(2, 2)) for _ in range(3)]
        parameters[0].grad = torch.full((2, 2), float(self.rank + 1))
        if self.rank == 1:
            parameters[1].grad = torch.eye(2)
        ranks.sum_gradients(parameters)
        ranks.barrier()
        ranks.close()
        self.seen["words"] = {
            "lengths": [len(word) for word in told], "ends": told[1:], "shared": shared,
            "gradients": [None if p.grad is None else p.grad.tolist() for p in parameters],
        }  # fmt: skip

    def skip(self) -> None:
        """NaN in the last group alone: one rank's loss is not finite, and both must skip."""
        policy = linear_policy()
        groups = sample_groups(policy, range(2), 6, sampler_spec())
        manifest = manifest_of(1, groups, score_by_latents(groups, lambda x: float(x[0])))
        bad = tuple(replace(t, final_latents=t.final_latents * np.float32("nan")) for t in groups[1].trajectories)
        ranks = self.meet("skip")
        learner = make_learner(policy, config(NftConfig(), groups_per_update=2, optimizer_steps=1), {"r": 1.0}, 11)
        learner.ranks = ranks
        result = learner.update(manifest, [groups[0], replace(groups[1], trajectories=bad)])
        ranks.close()
        unmoved = all(torch.equal(tensor, policy.read_adapter()[name]) for name, tensor in learner.live.items())
        self.seen["skip"] = [result.num_steps, result.num_skipped, learner.num_nonfinite, unmoved]

    def equality(self) -> None:
        """Five updates of each objective; nft's in two starts."""
        policy = load_policy(ModelConfig(path=str(self.model), lora=LoraConfig(rank=4, alpha=8)), with_vae=False)
        batches = prepared_batches(policy)
        for objective in OBJECTIVES:
            if objective == "nft":
                ranks = self.meet("nft-first")
                train(policy, objective, batches, ranks, self.folder / objective, num_updates=3)
                ranks.close()
            ranks = self.meet(objective)
            learner = train(policy, objective, batches, ranks, self.folder / objective)
            ranks.close()
            (self.folder / f"{objective}.{self.rank}.safetensors").write_bytes(safetensors.torch.save(dict(learner.live)))

    def silence(self) -> None:
        """Rank 1 beats on but says nothing for longer than rank 0 waits."""
        ranks = self.meet("silence", SHORT_S)
        if self.rank == 0:
            self.seen["silence"] = self.lose(ranks)
            (self.folder / "lost").touch()
        else:
            deadline = time.monotonic() + PATIENCE_S
            while not (self.folder / "lost").exists() and time.monotonic() < deadline:
                time.sleep(0.05)
        ranks.close()

    def death(self) -> None:
        """Rank 1 is gone at once, in the middle of an update."""
        ranks = self.meet("death")
        if self.rank == 1:
            self.finish()
            os._exit(9)
        self.seen["death"] = self.lose(ranks)
        ranks.close()

    def lose(self, ranks: Ranks) -> list[Any]:
        """The error's text and the seconds until it came."""
        parameter = torch.nn.Parameter(torch.zeros(1))
        started = time.monotonic()
        try:
            ranks.sum_gradients([parameter])
        except RankLost as error:
            return [str(error), time.monotonic() - started]
        return ["nothing was lost", time.monotonic() - started]

    def finish(self) -> None:
        """Write what was seen."""
        (self.folder / f"seen.{self.rank}.json").write_text(json.dumps(self.seen))

    def run(self) -> None:
        """Everything, in the order that both ranks keep."""
        for scenario in (self.words, self.skip, self.equality, self.silence, self.death):
            scenario()
        self.finish()


if __name__ == "__main__":
    torch.set_num_threads(1)
    Child(int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])).run()
