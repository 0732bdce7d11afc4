"""tiny-multi: rewards that judge different prompts in one run, each standardized in its group; weights live in the config alone."""

import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from common.errors import DataError
from common.prompts import read_prompts
from common.store.audit import audit
from common.store.manifests import read_manifest
from common.store.paths import history_path
from common.store.run_store import RunStore
from deploy.cli import app
from deploy.compose import prompt_order
from deploy.config import PROJECT, load_config
from deploy.gates import load_prompts, make_scorers
from deploy.report.reweighting import read_reweighting
from deploy.session import run_session
from tests.run_fixtures import QUIET, local_options

PROMPTS = PROJECT / "deploy" / "prompts"
SETS = (
    "model.lora.rank=4", "rollout.group_size=4", "rollout.micro_batch=4", "rollout.num_steps=4", "learner.groups_per_update=4",
    "learner.warmup_steps=0", "learner.micro_batch=8", "schedule.num_updates=2", "schedule.max_staleness=0", "evaluation.max_prompts=7",
    "evaluation.every=0", "evaluation.num_steps=2", "reward.0.name=jpeg_compressibility", "reward.2.name=jpeg_incompressibility",
    'evaluation.rewards=["jpeg_compressibility"]', "learner.advantage.eps=1e-9",
)  # fmt: skip


@pytest.mark.parametrize("name", ["train.jsonl", "test.jsonl"])
def test_the_prompts_are_those_of_both_tasks_one_file_after_the_other(name: str) -> None:
    both = [PROMPTS / folder / name for folder in ("tiny-geneval", "tiny-ocr")]
    assert (PROMPTS / "tiny-multi" / name).read_bytes() == b"".join(path.read_bytes() for path in both)


def test_the_plan_is_printed_and_every_prompt_has_what_its_rewards_need() -> None:
    done = CliRunner().invoke(app, ["train", "tiny-multi", "--dry-run"])
    assert done.exit_code == 0, done.output
    assert "run tiny-multi" in done.output
    config = load_config("tiny-multi", [])
    assert len(load_prompts(config, make_scorers(config)).train) == 751


def test_the_tags_of_the_recipe_cover_its_prompts_once() -> None:
    config = load_config("tiny-multi", [])
    train = read_prompts(PROMPTS / "tiny-multi" / "train.jsonl")
    judges = {tag: [reward.name for reward in config.reward if tag in reward.tags] for tag in {prompt.tag for prompt in train}}
    assert judges.pop("text") == ["ocr_flowgrpo"]
    assert set(map(tuple, judges.values())) == {("geneval_dense", "geneval_strict")}
    order = prompt_order(config, train)
    drawn = [order(number).tag for number in range(24)]
    assert drawn.count("text") == 11  # of a cycle of 24: about half
    assert all("text" in drawn[start : start + 12] for start in range(12))  # each update sees both kinds


def test_a_reward_without_its_tags_is_asked_about_every_prompt() -> None:
    config = load_config("tiny-multi", ["reward.2.tags=[]"])
    with pytest.raises(DataError, match=r"ocr_flowgrpo.*and \d+ more"):
        load_prompts(config, make_scorers(config))


def test_two_rewards_a_thousand_times_apart_train_one_model(tiny_sd3_dir: Path, tmp_path: Path) -> None:
    """On the small random model: minus kB / 500 on shapes (weight .5), kB on texts (weight 1): both standardized, so each weighs as it says."""
    run_dir = tmp_path / "run"
    run_session(load_config("tiny-multi", [*SETS, f'model.path="{tiny_sd3_dir}"']), local_options(run_dir), QUIET)
    store = RunStore(str(run_dir))
    assert audit(store).violations == ()
    spreads: dict[str, list[float]] = {}
    for update in (1, 2):
        rows = pq.read_table(io.BytesIO(store.read(history_path(update)))).to_pylist()
        for group in read_manifest(store, update).groups:
            kind = "text" if group.prompt_id.startswith("tiny-ocr") else "shapes"
            wanted = {"jpeg_incompressibility"} if kind == "text" else {"jpeg_compressibility", "geneval_strict"}
            assert set(group.scores) == wanted
            advantages = [row["advantage"] for row in rows if row["group"] == group.number]
            if any(advantages) and len(set(group.scores.get("geneval_strict", ()))) <= 1:  # where the JPEG alone speaks
                spreads.setdefault(kind, []).append(float(np.std(advantages)))
    assert set(spreads) == {"text", "shapes"}
    # sizes differ by at least a byte, .001 kB or 2e-6 after the scaling: eps = 1e-9 beside it is below 1 %
    np.testing.assert_allclose(spreads["text"], 1.0, rtol=1e-2)
    np.testing.assert_allclose(spreads["shapes"], 0.5, rtol=1e-2)
    weights = {"jpeg_compressibility": 0.5, "geneval_strict": 0.5, "jpeg_incompressibility": 1.0}
    assert [each.correlation for each in read_reweighting(store, weights).updates] == [pytest.approx(1.0)] * 2
