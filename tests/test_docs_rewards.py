"""The page on rewards is right: the reward of its example, copied from the page into a file, trains."""

import json
import re
import textwrap
from pathlib import Path

import pytest

from common.store.audit import audit
from common.store.run_store import RunStore
from deploy.config import load_config, recipe_path
from deploy.session import run_session
from reward_servers.registry import list_scorers
from tests.run_fixtures import QUIET, SMALL, local_options

PAGE = Path(__file__).parents[1] / "docs" / "rewards.md"


def blocks(section: str) -> list[str]:
    """The indented blocks of a section of the page."""
    text = PAGE.read_text(encoding="utf-8").partition(f"## {section}\n")[2].partition("\n## ")[0]
    return [textwrap.dedent(block) for block in re.findall(r"(?:^    .*\n)+", text, re.MULTILINE)]


def test_the_reward_of_the_page_trains_as_it_stands_there(tiny_sd3_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, table = blocks("One of your own")
    recipe = recipe_path("tiny-geneval").read_text(encoding="utf-8")
    start, end = recipe.index("[[reward]]"), recipe.index("[learner]")
    (tmp_path / "my_rewards.py").write_text(code, encoding="utf-8")
    (tmp_path / "mine.toml").write_text(recipe[:start] + table + "\n" + recipe[end:], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    small = [each for each in SMALL if not each.startswith(("reward.", "evaluation.rewards"))]
    config = load_config("mine.toml", [*small, f'model.path="{tiny_sd3_dir}"', "evaluation.rewards=[]", "schedule.num_updates=2"])
    run_session(config, local_options(tmp_path / "run"), QUIET)
    report = audit(RunStore(str(tmp_path / "run")))
    assert report.is_clean and report.num_manifests == 2
    manifest = json.loads((tmp_path / "run" / "manifests" / "update_000001.json").read_text())
    scores = [value for group in manifest["groups"] for value in group["scores"]["my_rewards:redness"]]
    assert all(0 <= value <= 1 for value in scores) and len(set(scores)) > 1


def test_the_page_names_every_built_in_reward() -> None:
    page = PAGE.read_text(encoding="utf-8").replace("geneval_hf_*", "geneval_hf_strict geneval_hf_dense geneval_hf_dense_flowgrpo")
    assert [card.name for card in list_scorers() if card.name not in page] == []
