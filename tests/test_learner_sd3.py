"""The update on a small random SD3 of the real classes: gates pass, the adapter moves, the base does not."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch

from common.policy.config import LoraConfig, ModelConfig
from common.policy.load import load_policy
from common.policy.pipeline_policy import PipelinePolicy
from learner.config import LearnerConfig
from learner.objectives.grpo import GrpoConfig
from learner.objectives.nft import NftConfig
from learner.state import StateArchive
from learner.update import make_learner
from tests.learner_fakes import MemoryFiles, manifest_of, sample_groups, sampler_spec, score_by_latents
from tests.tiny_models import make_tiny_sd3


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_sd3(tmp_path_factory.mktemp("learner") / "sd3")


def policy_of(directory: Path) -> PipelinePolicy:
    policy = load_policy(ModelConfig(path=str(directory), lora=LoraConfig(rank=4, alpha=8)))
    assert isinstance(policy, PipelinePolicy)
    return policy


def base_digest(policy: PipelinePolicy) -> str:
    """Of every parameter that is not the adapter's."""
    adapter = {id(parameter) for parameter in policy.adapter_parameters()}
    digest = hashlib.sha256()
    for parameter in policy._transformer.parameters():
        if id(parameter) not in adapter:
            digest.update(parameter.detach().numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize(
    "objective", [GrpoConfig(clip_range=1e-3, kl_beta=0.01), NftConfig(kl_beta=1e-3)], ids=["grpo", "nft"]
)  # fmt: skip
def test_two_updates_pass_the_gates_move_the_adapter_and_resume_bitwise(directory: Path, objective: Any) -> None:
    policy = policy_of(directory)
    config = LearnerConfig(groups_per_update=2, micro_batch=8, objective=objective, learning_rate=1e-3)
    learner, other = (make_learner(policy, config, {"r": 1.0}, 0) for _ in range(2))
    before, fresh = base_digest(policy), policy.read_adapter()
    archive = StateArchive(MemoryFiles(), states_kept=1, writer_id="w")
    spec = sampler_spec(num_steps=4, window=(0, 1))
    for update in (1, 2):
        with policy.using(learner.live):
            groups = sample_groups(policy, range(2 * update - 2, 2 * update), 4, spec, version=update - 1)
        manifest = manifest_of(update, groups, score_by_latents(groups, lambda x: float(x.mean())))
        metrics = learner.update(manifest, groups).metrics
        if update == 1:
            archive.save(learner)
            archive.load(other, 1)
        else:
            other.update(manifest, groups)
        assert metrics["num_steps"] == 1
        assert metrics["grad_norm"] > 0
    assert metrics["kl"] > 0  # the second update: no longer the base
    assert any(not torch.equal(learner.live[name], fresh[name]) for name in fresh)
    assert all(torch.equal(learner.live[name], other.live[name]) for name in fresh)  # two learners, one policy
    assert base_digest(policy) == before  # O14
    assert all(torch.equal(tensor, fresh[name]) for name, tensor in policy.read_adapter().items())
