"""Where a reward lives: in the process, in a child process of another Python, behind a server; and the commands about rewards and prompts."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from common.errors import ConfigError
from common.prompts import read_prompts
from deploy.cli import app
from reward_servers.config import RewardConfig
from reward_servers.environments import configured_scorer, release_scorers
from reward_servers.registry import list_scorers, make_scorer
from reward_servers.scorers.jpeg import jpeg_kilobytes
from reward_servers.wire.child import ChildScorer
from tests.wire_servers import level_images, prompts_of, reward_server

NAME = "jpeg_incompressibility"
IMAGES = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)


def test_the_same_reward_scores_alike_here_in_a_child_process_and_behind_a_server() -> None:
    expected = [jpeg_kilobytes(image) for image in IMAGES]
    with reward_server(make_scorer(NAME, {})) as url:
        configs = [
            RewardConfig(name=NAME),
            RewardConfig(name=NAME, env=sys.executable),
            RewardConfig(name=NAME, env="http", options={"url": url}),
            RewardConfig(name="http", options={"url": url, "reward": NAME}),
        ]
        for config in configs:
            scorer = configured_scorer(config)
            try:
                assert [score.value for score in scorer.score(IMAGES, prompts_of(3))] == pytest.approx(expected, rel=1e-6)
            finally:
                release_scorers([scorer])


def test_releasing_a_child_ends_its_process() -> None:
    scorer = configured_scorer(RewardConfig(name=NAME, env=sys.executable))
    assert isinstance(scorer, ChildScorer) and scorer.pid is not None
    pid = scorer.pid
    os.kill(pid, 0)  # it runs
    release_scorers([scorer])
    deadline = time.monotonic() + 60
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2][:3]:
        assert time.monotonic() < deadline, "the child lives on"
        time.sleep(0.05)


def test_user_code_in_this_process_takes_its_deadline_and_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rewards_of_env.py").write_text("def level(image, prompt, metadata, plus=0.0):\n    return image[0, 0, 0] + plus\n")
    monkeypatch.chdir(tmp_path)
    scorer = configured_scorer(RewardConfig(name="rewards_of_env:level", options={"plus": 2.0}, deadline_s=5.0))
    assert [score.value for score in scorer.score(level_images(3, 7), prompts_of(2))] == [5.0, 9.0]


def test_a_python_that_is_none_and_a_name_that_is_none_are_config_errors() -> None:
    with pytest.raises(ConfigError, match="cannot be run"):
        configured_scorer(RewardConfig(name=NAME, env="/nonexistent/python"))
    with pytest.raises(ConfigError, match="nearest name"):
        configured_scorer(RewardConfig(name="jpeg_incompress"))


def test_every_card_can_be_shown() -> None:
    for card in list_scorers():
        shown = CliRunner().invoke(app, ["reward", "show", card.name])
        assert shown.exit_code == 0, shown.output
        assert card.name in shown.output
    assert "not verified with real weights" in " ".join(CliRunner().invoke(app, ["reward", "show", "pickscore"]).output.split())


def test_made_prompts_are_geneval_prompts_and_nothing_is_overwritten(tmp_path: Path) -> None:
    made = CliRunner().invoke(app, ["prompts", "make", str(tmp_path / "mine"), "--per-task", "6", "--seed", "3"])
    assert made.exit_code == 0, made.output
    train, test = (read_prompts(tmp_path / "mine" / f"{side}.jsonl") for side in ("train", "test"))
    assert len(train) + len(test) == 36
    assert {prompt.tag for prompt in train} == {"single_object", "two_object", "counting", "colors", "position", "color_attr"}
    judge = make_scorer("geneval_strict", {"detector": "shapes"})
    assert all(judge.applies_to(prompt) for prompt in train)
    again = CliRunner().invoke(app, ["prompts", "make", str(tmp_path / "mine")])
    assert again.exit_code != 0
    assert "not overwritten" in str(again.exception)


def test_a_served_reward_answers_and_leaves_at_a_signal(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "deploy.cli", "reward", "serve", NAME, "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        assert f"{NAME} " in line and "POST /v1/score" in line
        url = line.split(" at ")[1].split(";")[0]
        with urllib.request.urlopen(f"{url}/v1/rewards", timeout=60) as answer:
            assert json.load(answer)["rewards"][0]["name"] == NAME
    finally:
        server.send_signal(signal.SIGTERM)
        code = server.wait(timeout=120)
    assert code == 0


def test_options_that_are_no_json_are_the_users_mistake() -> None:
    result = CliRunner().invoke(app, ["reward", "serve", NAME, "--options", "{detector"])
    assert isinstance(result.exception, ConfigError)
    assert "is not JSON" in str(result.exception)
