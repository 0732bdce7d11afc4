"""Several learner ranks: split by groups, summed, and the same as one; a lost rank is noticed by the others."""

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from common.config import parse
from common.errors import ConfigError, CorruptFile, GateError
from common.policy.config import LoraConfig, ModelConfig
from common.policy.load import load_policy
from common.seeding import derive_seed
from common.store.run_store import RunStore
from common.types import Stop, Wait
from learner.config import LearnerConfig
from learner.metrics import Tally
from learner.minibatches import plan_minibatches
from learner.ranks import SoloRanks, check_agreement, decode_answer, encode_answer
from learner.update import Learner, make_learner
from tests.learner_fakes import sampler_spec
from tests.learner_policies import linear_policy
from tests.learner_rank_child import NUM_UPDATES, OBJECTIVES, SHORT_S, Batches, config, prepared_batches, train

TIMEOUT_S = 600.0  # of the two processes together, on a machine that is busy with other things
ROOT = Path(__file__).parent.parent
SPEC = sampler_spec()


@dataclass
class Pair:
    """What two ranks and one process alone made of the same batches."""

    folder: Path
    seen: dict[int, Any]
    exit_codes: list[int]
    alone: dict[str, Learner]
    fresh: dict[str, torch.Tensor]
    batches: Batches


@pytest.fixture(scope="module")
def pair(tiny_sd3_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Two spawned processes, and the same training in this one meanwhile."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = dict(os.environ) | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.learner_rank_child"]
    children = [
        subprocess.Popen([*command, str(rank), str(folder), str(tiny_sd3_dir)], env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]  # fmt: skip
    try:
        policy = load_policy(ModelConfig(path=str(tiny_sd3_dir), lora=LoraConfig(rank=4, alpha=8)), with_vae=False)
        batches, fresh = prepared_batches(policy), dict(policy.read_adapter())
        alone = {name: train(policy, name, batches, SoloRanks(), folder / f"{name}-alone") for name in OBJECTIVES}
        errors = [child.communicate(timeout=TIMEOUT_S)[1] for child in children]
    finally:
        for child in children:
            child.kill()
    assert (folder / "seen.0.json").exists() and (folder / "seen.1.json").exists(), "\n".join(errors)
    seen = {rank: json.loads((folder / f"seen.{rank}.json").read_text()) for rank in range(2)}
    exit_codes = [child.returncode for child in children]
    return Pair(folder=folder, seen=seen, exit_codes=exit_codes, alone=alone, fresh=fresh, batches=batches)


def test_the_prepared_batches_give_ranks_unequal_counts_and_one_rank_none(pair: Pair) -> None:
    """Else the comparison below would prove little."""
    estimator = make_learner(linear_policy(), config(OBJECTIVES["grpo"]), {"r": 1.0}, 11).estimator
    counts = []
    for update, (manifest, groups) in pair.batches.items():
        mask, samplers = estimator.estimate(manifest, {"r": 1.0}).mask, [group.sampler for group in groups]
        facts: dict[str, Any] = {
            "num_minibatches": 2, "micro_batch": 3, "seed": derive_seed(11, "minibatches", update), "whole_groups": False, "num_ranks": 2,
        }  # fmt: skip
        plans = [plan_minibatches(mask, samplers, rank=rank, **facts) for rank in range(2)]
        counts += [tuple(sum(len(refs) for refs in plan[step].micro_batches) for plan in plans) for step in range(2)]
    assert len(counts) == 2 * NUM_UPDATES
    assert len({max(count) / sum(count) for count in counts}) > 3
    assert any(0 in count for count in counts)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_five_updates_of_two_ranks_equal_those_of_one(pair: Pair, objective: str) -> None:
    ranks = [safetensors.torch.load((pair.folder / f"{objective}.{rank}.safetensors").read_bytes()) for rank in range(2)]
    alone = pair.alone[objective]
    assert alone.num_optimizer_steps == 2 * NUM_UPDATES
    for name, tensor in alone.live.items():
        assert torch.equal(ranks[0][name], ranks[1][name])  # bit for bit: they step on the same sums
        torch.testing.assert_close(ranks[0][name], tensor, rtol=0, atol=1e-5)
    moved = max(float((tensor - pair.fresh[name]).abs().max()) for name, tensor in alone.live.items())
    assert moved > 3e-3  # hundreds of tolerances


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_rank_0_writes_the_files_of_one_process_and_the_other_none(pair: Pair, objective: str) -> None:
    """nft's ranks started twice (3 + 2 updates): the second start loads rank 0's LearnerState on both ranks."""
    together, alone = (RunStore(str(pair.folder / name)) for name in (objective, f"{objective}-alone"))

    def facts(store: RunStore) -> list[str]:
        return [path for path in store.list() if not path.startswith("learner/") or path.endswith("complete.json")]

    assert facts(together) == facts(alone)
    for update in range(1, NUM_UPDATES + 1):
        path = f"history/update_{update:06d}.parquet"
        assert together.read(path) == alone.read(path)  # advantages come from the manifest alone
        path = f"metrics/update_{update:06d}.i0001.json"
        metrics, expected = (json.loads(store.read(path))["learner"] for store in (together, alone))
        assert metrics.keys() == expected.keys()
        for name, value in expected.items():
            assert metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name  # means, least and largest over both ranks' samples


def test_words_reach_every_rank_whole(pair: Pair) -> None:
    for rank in range(2):
        seen = pair.seen[rank]["words"]
        assert seen["lengths"] == [100_000, 1, 0]
        assert seen["ends"] == ["y", ""]
        assert seen["shared"] == ["a", "aaaa"]
        assert seen["gradients"] == [[[3.0, 3.0], [3.0, 3.0]], [[1.0, 0.0], [0.0, 1.0]], None]


def test_a_loss_that_is_not_finite_on_one_rank_is_skipped_on_both(pair: Pair) -> None:
    assert pair.seen[0]["skip"] == pair.seen[1]["skip"] == [0, 1, 1, True]


def test_a_silent_rank_is_lost_within_the_timeout(pair: Pair) -> None:
    message, seconds = pair.seen[0]["silence"]
    assert "learner rank 0 of 2: waited for the other ranks' gradients" in message
    assert "learner.rank_timeout_s" in message
    assert SHORT_S - 0.5 < seconds < SHORT_S + 60.0


def test_a_dead_rank_is_lost_at_once(pair: Pair) -> None:
    message, seconds = pair.seen[0]["death"]
    assert "all ranks start again from the newest LearnerState" in message
    assert seconds < 100.0  # its timeout is 300
    assert pair.exit_codes == [0, 9]


def test_ranks_share_each_minibatch_by_whole_groups() -> None:
    mask = np.ones((8, 3), dtype=np.bool_)
    mask[2] = mask[5, 1:] = False
    facts: dict[str, Any] = {"num_minibatches": 2, "micro_batch": 2, "seed": 5, "whole_groups": False}
    whole = plan_minibatches(mask, [SPEC] * 8, **facts)
    shares = [plan_minibatches(mask, [SPEC] * 8, rank=rank, num_ranks=2, **facts) for rank in range(2)]
    for step, minibatch in enumerate(whole):
        refs = [{ref for micro in share[step].micro_batches for ref in micro} for share in shares]
        assert refs[0] | refs[1] == {ref for micro in minibatch.micro_batches for ref in micro}
        assert not {ref.group for ref in refs[0]} & {ref.group for ref in refs[1]}
        assert {share[step].num_samples for share in shares} == {minibatch.num_samples} == {len(refs[0]) + len(refs[1])}


def test_groups_that_ranks_cannot_share_are_refused_with_the_remedy() -> None:
    with pytest.raises(ConfigError, match=r"num_ranks=3 does not divide the 4 groups of an optimizer step"):
        parse(LearnerConfig, {"groups_per_update": 8, "optimizer_steps": 2, "num_ranks": 3}, "test")
    assert LearnerConfig(groups_per_update=8, optimizer_steps=2, num_ranks=4).num_ranks == 4
    with pytest.raises(ConfigError, match=r"multiple of learner\.num_ranks"):  # a manifest of an earlier configuration
        plan_minibatches(
            np.ones((6, 2), dtype=np.bool_), [SPEC] * 6, num_minibatches=2, micro_batch=2, seed=0, whole_groups=False, num_ranks=2
        )


def test_answers_of_the_desk_survive_the_way_to_other_ranks(pair: Pair) -> None:
    for answer in (pair.batches[1][0], Wait(seconds=0.25, reason="größere Gruppen"), Stop(reason="done")):
        assert decode_answer(encode_answer(answer)) == answer
    with pytest.raises(CorruptFile, match="one version of the program"):
        decode_answer(b"Publication\n{}")


def test_tallies_cross_ranks_bit_for_bit() -> None:
    tally = Tally()
    tally.add_values("a", torch.tensor([1 / 3, 1e-30], dtype=torch.float64))
    tally.add_number("b", math.inf)
    found, loss = Tally.decode(tally.encode(0.1 + 0.2))
    assert (found.metrics(), loss) == (tally.metrics(), 0.1 + 0.2)
    assert math.isnan(Tally.decode(Tally().encode(math.nan))[1])


class Strangers(SoloRanks):
    """Two ranks of which the other holds something else."""

    size = 2

    def share(self, content: bytes) -> tuple[bytes, ...]:
        """The other's word differs."""
        return (content, content[::-1])


def test_ranks_that_drift_apart_stop_the_run() -> None:
    with pytest.raises(GateError, match="same kind of device") as caught:
        check_agreement(Strangers(), linear_policy().read_adapter(), 3)
    assert caught.value.name == "ranks_differ"
