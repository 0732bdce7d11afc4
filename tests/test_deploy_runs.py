"""Whole runs through the command line's own session: sync runs are functions of their seed, resumes and drivers change nothing."""

import errno
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from common.errors import AlreadyExists, ConfigError, GateError, StoreError
from common.store.audit import audit
from common.store.faces import GroupFiles
from common.store.run_store import RunStore
from common.types import MediaBatch, RolloutGroup
from deploy.evaluate import EvaluationRequest, evaluate
from deploy.session import run_session
from deploy.summary import show_results
from tests.run_fixtures import QUIET, history_digests, local_options, manifest_facts, published_digests, small_config

SYNC = "schedule.max_staleness=0"


@pytest.fixture(scope="module")
def sync_run(tiny_sd3_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synchronous nft run of three updates."""
    run_dir = tmp_path_factory.mktemp("runs") / "sync"
    run_session(small_config(tiny_sd3_dir, "tiny-geneval", SYNC), local_options(run_dir), QUIET)
    return run_dir


def test_a_run_leaves_a_clean_audit_and_all_its_files(sync_run: Path) -> None:
    report = audit(RunStore(str(sync_run)))
    assert report.violations == ()
    assert (report.num_manifests, report.num_groups) == (3, 6)
    assert json.loads((sync_run / "status.json").read_text())["state"] == "done"
    assert len(list((sync_run / "eval").iterdir())) == 2  # the base model and the last version


def test_the_same_seed_gives_bit_equal_adapters_and_another_seed_does_not(sync_run: Path, tiny_sd3_dir: Path, tmp_path: Path) -> None:
    for name, seed in (("same", 1), ("other", 2)):
        run_session(small_config(tiny_sd3_dir, "tiny-geneval", SYNC, f"run.seed={seed}"), local_options(tmp_path / name), QUIET)
    assert published_digests(tmp_path / "same") == published_digests(sync_run)
    assert manifest_facts(tmp_path / "same") == manifest_facts(sync_run)
    assert history_digests(tmp_path / "same") == history_digests(sync_run)
    assert published_digests(tmp_path / "other")[3] != published_digests(sync_run)[3]


def test_activations_that_are_made_again_change_no_bit_of_what_is_learnt(sync_run: Path, tiny_sd3_dir: Path, tmp_path: Path) -> None:
    run_session(small_config(tiny_sd3_dir, "tiny-geneval", SYNC, "model.gradient_checkpointing=true"), local_options(tmp_path), QUIET)
    assert published_digests(tmp_path) == published_digests(sync_run)


@pytest.mark.parametrize("recipe", ["tiny-geneval", "tiny-geneval-grpo"])
def test_a_run_cut_in_two_equals_the_whole_one(recipe: str, tiny_sd3_dir: Path, tmp_path: Path) -> None:
    whole = small_config(tiny_sd3_dir, recipe, SYNC, "evaluation.at_start=false")
    run_session(whole, local_options(tmp_path / "whole"), QUIET)
    first = small_config(tiny_sd3_dir, recipe, SYNC, "evaluation.at_start=false", "schedule.num_updates=1")
    run_session(first, local_options(tmp_path / "cut"), QUIET)
    run_session(whole, local_options(tmp_path / "cut"), QUIET)
    assert published_digests(tmp_path / "cut")[3] == published_digests(tmp_path / "whole")[3]
    assert history_digests(tmp_path / "cut") == history_digests(tmp_path / "whole")
    assert audit(RunStore(str(tmp_path / "cut"))).is_clean


def test_a_guided_kl_finds_the_empty_prompts_features_in_the_group_file(tiny_sd3_dir: Path, tmp_path: Path) -> None:
    guided = ("learner.objective.kl_beta=0.1", "learner.objective.kl_guidance=2.0", "schedule.num_updates=1", "evaluation.at_start=false")
    run_session(small_config(tiny_sd3_dir, "tiny-geneval", SYNC, *guided), local_options(tmp_path / "run"), QUIET)
    learner = json.loads((tmp_path / "run" / "metrics" / "update_000001.i0001.json").read_text())["learner"]
    assert learner["kl_guided"] > 0
    store = RunStore(str(tmp_path / "run"))
    groups = [GroupFiles(store).read_group(path) for path in store.list("groups") if path.endswith(".group.arrow")]
    assert all(group.features.negative_embeds is not None and group.sampler.guidance_scale == 1.0 for group in groups)


def test_grpo_starts_at_ratio_one_and_passes_parity(tiny_sd3_dir: Path, tmp_path: Path) -> None:
    config = small_config(tiny_sd3_dir, "tiny-geneval-grpo", SYNC, "schedule.num_updates=1", "learner.optimizer_steps=1")
    run_session(config, local_options(tmp_path / "grpo"), QUIET)
    learner = json.loads((tmp_path / "grpo" / "metrics" / "update_000001.i0001.json").read_text())["learner"]
    assert learner["ratio_min"] == pytest.approx(1.0, abs=1e-6)
    assert learner["ratio_max"] == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("staleness", [1, 2])
def test_asynchronous_runs_stay_within_their_staleness(staleness: int, tiny_sd3_dir: Path, tmp_path: Path) -> None:
    config = small_config(tiny_sd3_dir, "tiny-geneval", f"schedule.max_staleness={staleness}", "schedule.num_updates=4")
    run_session(config, local_options(tmp_path / "run"), QUIET)
    assert audit(RunStore(str(tmp_path / "run"))).violations == ()
    lags = {update - 1 - group["version"] for update, _, groups in manifest_facts(tmp_path / "run") for group in groups}
    assert max(lags) == staleness  # --local fills the bound before the learner moves


def test_a_changed_config_is_refused_at_resume_with_its_difference(sync_run: Path, tiny_sd3_dir: Path) -> None:
    changed = small_config(tiny_sd3_dir, "tiny-geneval", SYNC, "learner.learning_rate=1e-4")
    with pytest.raises(ConfigError, match=r"learner.learning_rate: 0.001 -> 0.0001.*--allow-change learner.learning_rate"):
        run_session(changed, local_options(sync_run), QUIET)
    with pytest.raises(ConfigError, match="--resume never"):
        run_session(changed, local_options(sync_run, resume=False), QUIET)


def test_evaluating_a_run_twice_gives_the_numbers_that_the_run_stored(sync_run: Path) -> None:
    once, again = (evaluate(EvaluationRequest(target=str(sync_run)), QUIET) for _ in range(2))
    (stored,) = (sync_run / "eval").glob("v000003.*")
    recorded = json.loads((stored / "result.json").read_text())
    assert once["rewards"] == again["rewards"] == recorded["rewards"]
    assert once["digest"] == recorded["digest"]
    base = evaluate(EvaluationRequest(target=str(sync_run), snapshot="base"), QUIET)
    (first,) = (sync_run / "eval").glob("v000000.*")
    assert base["rewards"] == json.loads((first / "result.json").read_text())["rewards"]


def test_the_report_of_a_run_opens_offline(sync_run: Path) -> None:
    rows = show_results(RunStore(str(sync_run)), QUIET)
    assert [row.reward for row in rows if row.is_mean] == ["jpeg_compressibility"]
    page = (sync_run / "reports" / "report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page


class BiasedFiles(GroupFiles):
    """Adds 1e-2 to every stored log-prob: two sides that do not compute the same thing."""

    def write_group(self, group: RolloutGroup, media: MediaBatch) -> str:
        rows = tuple(replace(row, behavior_log_prob=row.behavior_log_prob + np.float32(1e-2)) for row in group.trajectories)
        return super().write_group(replace(group, trajectories=rows), media)


def test_biased_log_probs_stop_the_run_by_the_parity_gate(tiny_sd3_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rollout_workers.build.GroupFiles", BiasedFiles)
    with pytest.raises(GateError, match="parity") as caught:
        run_session(small_config(tiny_sd3_dir, "tiny-geneval-grpo", SYNC), local_options(tmp_path / "run"), QUIET)
    assert (caught.value.name, caught.value.exit_code) == ("parity", 3)


class FullDisk:
    """Refuses the n-th to m-th link of a file kind with ENOSPC, as a full disk does."""

    def __init__(self, word: str, first: int, last: int) -> None:
        self.word, self.first, self.last, self.count = word, first, last, 0

    def __call__(self, stage: str, path: str) -> None:
        if stage == "write" and self.word in path:
            self.count += 1
            if self.first <= self.count <= self.last:
                raise OSError(errno.ENOSPC, "No space left on device")


def test_a_disk_that_is_full_for_a_while_holds_the_run_up_and_loses_nothing(
    tiny_sd3_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = FullDisk("group.arrow", 2, 3)
    monkeypatch.setattr("deploy.local_run.RunStore", lambda url, **options: RunStore(url, hook=fault, **options))
    run_session(small_config(tiny_sd3_dir, "tiny-geneval", SYNC), local_options(tmp_path / "run"), QUIET)
    assert fault.count > 3  # it was met, and passed
    assert audit(RunStore(str(tmp_path / "run"))).is_clean


def test_a_full_disk_under_the_learner_ends_the_run_by_name_and_the_same_command_goes_on(
    tiny_sd3_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, options = small_config(tiny_sd3_dir, "tiny-geneval", SYNC), local_options(tmp_path / "run")
    with monkeypatch.context() as patch:
        full = FullDisk("learner/update_000002", 1, 99)
        patch.setattr("learner.build.RunStore", lambda url, patience_s: RunStore(url, hook=full, patience_s=0.5))
        with pytest.raises(StoreError, match="No space left"):
            run_session(config, options, QUIET)
    run_session(config, options, QUIET)
    report = audit(RunStore(str(tmp_path / "run")))
    assert (report.violations, report.num_manifests) == ((), 3)


def test_a_damaged_group_file_is_named_and_repaired_by_nobody(tiny_sd3_dir: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_session(small_config(tiny_sd3_dir, "tiny-geneval", SYNC, "schedule.num_updates=1"), local_options(run_dir), QUIET)
    victim = next((run_dir / "groups" / "000").glob("*.group.arrow"))
    victim.write_bytes(victim.read_bytes()[:-200])
    report = audit(RunStore(str(run_dir)))
    assert [violation.rule for violation in report.violations]
    assert any(victim.name in violation.where + violation.message for violation in report.violations)


def test_exclusive_creates_of_two_runs_cannot_mix(sync_run: Path) -> None:
    with pytest.raises(AlreadyExists):
        RunStore(str(sync_run)).create_exclusive("manifests/update_000001.json", b"{}", writer_id="other")


def test_a_users_own_function_trains(tiny_sd3_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's example, copied into a file."""
    (tmp_path / "my_rewards.py").write_text("def redness(image, prompt, metadata):\n    return float(image[..., 0].mean() / 255)\n")
    monkeypatch.chdir(tmp_path)
    config = small_config(
        tiny_sd3_dir, "tiny-geneval", SYNC, "reward.0.name=my_rewards:redness", 'evaluation.rewards=["my_rewards:redness"]'
    )
    run_session(config, local_options(tmp_path / "run"), QUIET)
    rows = [json.loads(path.read_text()) for path in sorted((tmp_path / "run" / "metrics").iterdir())]
    assert all(0 < row["rewards"]["my_rewards:redness"]["mean"] < 1 for row in rows)
    assert audit(RunStore(str(tmp_path / "run"))).is_clean
