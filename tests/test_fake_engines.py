"""`--fake`: engines that sleep leave real files, real adapters and real states, and a clean audit."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import ConfigError, ModelError
from common.fakes import FakeSpec
from common.policy.fake import FakePolicy
from common.store.audit import audit
from common.store.faces import GroupFiles
from common.store.media import read_media
from common.store.run_store import RunStore
from deploy.fakes import FakeEngines, parse_fakes
from deploy.options import StartOptions, default_run_dir
from deploy.session import run_session
from tests.run_fixtures import QUIET, history_digests, manifest_facts, published_digests
from tests.simulated_run import simulate, small_fake_config

QUICK = parse_fakes("rollout=0s,learner=0s,reward=0s")
RAY_TIMEOUT_S = 900  # half a minute on an idle machine; only a hanging run reaches it
SYNC = "schedule.max_staleness=0"
ONE_WORLD = ("reward.0.num_servers=1", "evaluation.max_prompts=4", "evaluation.rewards=[]", "evaluation.every=0")


def run_fake(run_dir: Path, *sets: str) -> RunStore:
    """--local --fake to the end."""
    config = small_fake_config(*ONE_WORLD, SYNC, *sets)
    run_session(config, StartOptions(run_dir=str(run_dir), local=True, fakes=QUICK), QUIET)
    return RunStore(str(run_dir))


def test_the_option_names_seconds_and_ranges_for_each_role() -> None:
    found = parse_fakes("rollout=0.2s..2.6s, learner=1s,reward=0.3s")
    assert found == FakeEngines(
        rollout=FakeSpec(least_s=0.2, most_s=2.6), learner=FakeSpec(least_s=1.0, most_s=1.0), reward=FakeSpec(least_s=0.3, most_s=0.3)
    )
    assert "rollout 0.2 to 2.6 s, learner 1 s, reward 0.3 s" in found.describe()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "'' is not ROLE=SECONDS"),
        ("rollout", "'rollout' is not ROLE=SECONDS of a role among rollout, learner, reward"),
        ("worker=1s", "'worker=1s' is not ROLE=SECONDS"),
        ("rollout=1s,rollout=2s", "rollout stands twice"),
        ("rollout=1s,learner=1s", "reward is missing"),
        ("rollout=1,learner=1s,reward=1s", "rollout='1' is not a duration in seconds, such as 0.5s"),
        ("rollout=-1s,learner=1s,reward=1s", "is not a duration"),
        ("rollout=2s..1s,learner=1s,reward=1s", "rollout=2s..1s is no range"),
        ("rollout=0s..1s,learner=1s,reward=1s", "it must rise and start above 0s"),
    ],
)
def test_a_mistake_in_the_option_is_named_with_the_rule(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words.replace("(", r"\(")):
        parse_fakes(text)


def test_a_range_spreads_the_slots_evenly_in_ratio_and_the_same_at_every_start() -> None:
    """By hand: 0.2 to 3.2 is a ratio of 16; shares 0, 1, 1/2, 1/4, 3/4 are 16^share."""
    spec = FakeSpec(least_s=0.2, most_s=3.2)
    assert [spec.seconds_of(f"rollout.{index}") for index in range(5)] == pytest.approx([0.2, 3.2, 0.8, 0.4, 1.6])
    assert [spec.seconds_of(f"reward.shapes.{index}") for index in range(2)] == pytest.approx([0.2, 3.2])
    assert spec.seconds_of("learner") == 0.2


def test_the_fake_policy_binds_one_module_whose_canary_shows_its_weights() -> None:
    """B A 1 with A = 1/2, B = 1: each entry of A 1 is 4 / 2 = 2, each of B (A 1) is 2 + 2 = 4, so the canary is 4."""
    policy = FakePolicy()
    assert policy.inspect_adapter().canary == 0.0
    state = {name: torch.ones_like(tensor) if "lora_B" in name else tensor for name, tensor in policy.read_adapter().items()}
    with policy.using(state):
        assert policy.inspect_adapter().canary == pytest.approx(4.0)
    assert policy.inspect_adapter().canary == 0.0
    with pytest.raises(ModelError, match="either of real engines or of --fake"):
        policy.load_adapter({"transformer.lora_A.weight": torch.zeros(1)})


def test_the_default_directory_of_a_fake_run_is_not_the_real_one() -> None:
    config = small_fake_config()
    assert default_run_dir(config) == "runs/tiny-geneval-grpo"
    assert default_run_dir(config, QUICK) == "runs/tiny-geneval-grpo-fake"


def test_a_fake_run_leaves_the_recipes_own_schema_and_a_clean_audit(tmp_path: Path) -> None:
    store = run_fake(tmp_path / "run", "schedule.num_updates=2")
    report = audit(store)
    assert report.violations == ()
    assert (report.num_manifests, report.num_groups) == (2, 8)
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "done"
    manifest = json.loads(store.read("manifests/update_000001.json"))
    entry = manifest["groups"][0]
    group = GroupFiles(store).read_group(entry["path"])
    assert len(group.trajectories) == 2 and group.sampler.window == (0,) and group.sampler.kernel == "flow_sde"
    assert group.trajectories[0].latents.shape == (2, 1, 4, 4)  # the states before and after the window's one step
    images = read_media(store, entry["media_path"]).images
    expected = images.mean(axis=(1, 2, 3)) / 255.0  # a score is its image's mean brightness
    np.testing.assert_allclose(entry["scores"]["geneval_strict"], expected, rtol=1e-6)  # stored as float32


def test_a_sync_fake_run_is_a_function_of_its_seed_and_a_resume_changes_no_bit(tmp_path: Path) -> None:
    whole = run_fake(tmp_path / "whole", "schedule.num_updates=4")
    run_fake(tmp_path / "cut", "schedule.num_updates=2")
    cut = run_fake(tmp_path / "cut", "schedule.num_updates=4")
    run_fake(tmp_path / "other", "schedule.num_updates=4", "run.seed=7")
    assert published_digests(tmp_path / "cut")[4] == published_digests(tmp_path / "whole")[4]
    assert history_digests(tmp_path / "cut") == history_digests(tmp_path / "whole")
    assert published_digests(tmp_path / "other")[4] != published_digests(tmp_path / "whole")[4]
    assert len(set(published_digests(tmp_path / "whole").values())) == len(published_digests(tmp_path / "whole"))  # each update moves it
    assert audit(whole).is_clean and audit(cut).is_clean


def test_sixty_four_workers_and_one_write_the_same_synchronous_run() -> None:
    runs = []
    for num_workers in (1, 64):
        config = small_fake_config(f"rollout.num_workers={num_workers}", SYNC, "schedule.num_updates=2")
        runs.append(simulate(f"memory://workers-{num_workers}", config, "rollout=1s..13s,learner=1s,reward=0.3s"))
    facts = [[(m.update, [(g.number, g.version, g.scores) for g in m.groups]) for m in run.manifests.values()] for run in runs]
    assert facts[0] == facts[1]


def test_a_fake_run_on_ray_finishes_with_a_clean_audit_and_stays_within_its_staleness(tmp_path: Path) -> None:
    sets = ("rollout.group_size=4", "rollout.num_workers=2", "learner.groups_per_update=4", "schedule.num_updates=4",
            "schedule.max_staleness=2", "evaluation.max_prompts=8", "evaluation.at_start=false")  # fmt: skip
    done = subprocess.run([
        sys.executable, "-c", "from deploy.cli import main; main()", "train", "tiny-geneval-grpo", "--run-dir", str(tmp_path / "ray"), "--fake", "rollout=0.05s..0.65s,learner=0.3s,reward=0.05s",
        *(part for item in sets for part in ("--set", item)),
    ], capture_output=True, text=True, timeout=RAY_TIMEOUT_S, check=False)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "fake engines" in done.stdout
    report = audit(RunStore(str(tmp_path / "ray")))
    assert report.violations == ()
    assert report.num_manifests == 4
    lags = [update - 1 - group["version"] for update, _, groups in manifest_facts(tmp_path / "ray") for group in groups]
    assert min(lags) >= 0 and max(lags) <= 2
