"""docs/rewards.md on prompt files: its lines are read as it says, and its command writes what it says."""

import shlex
from pathlib import Path

import pytest

from common.errors import DataError
from common.prompts import read_prompts
from deploy.cli import app
from reward_servers.scorers.geneval import check_metadata
from reward_servers.scorers.ocr import every_target, first_target
from tests.test_docs_rewards import blocks

LINES, COMMAND = blocks("Prompt files")


def test_the_lines_of_the_page_are_read_and_carry_what_their_rewards_need(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(LINES, encoding="utf-8")
    sign, cups = read_prompts(path)
    assert [(prompt.id, prompt.tag) for prompt in (sign, cups)] == [("sign-1", "text"), ("two-cups", "counting")]
    assert (first_target(sign.text), every_target(sign.text)) == ("cafe", "cafe")
    check_metadata(cups.metadata)


def test_a_txt_file_numbers_its_prompts_by_line_and_another_key_is_an_error(tmp_path: Path) -> None:
    plain, odd = tmp_path / "mine.txt", tmp_path / "odd.jsonl"
    plain.write_text('a cup\n\na sign that says "CAFE"\n', encoding="utf-8")
    assert [prompt.id for prompt in read_prompts(plain)] == ["1", "3"]
    odd.write_text('{"text": "a cup", "style": "flat"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r'unknown key .style.[^{]*under "metadata"'):
        read_prompts(odd)


def test_the_command_of_the_page_writes_geneval_lines_and_no_test_prompt_of_another_seed_is_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    word, *arguments = shlex.split(COMMAND)
    assert word == "flowfleet"
    app(arguments, standalone_mode=False)
    app(["prompts", "make", "other", "--per-task", "100", "--seed", "1"], standalone_mode=False)
    train, test = (read_prompts(tmp_path / "my-prompts" / f"{side}.jsonl") for side in ("train", "test"))
    other = read_prompts(tmp_path / "other" / "train.jsonl")
    assert 0.15 < len(test) / (len(train) + len(test)) < 0.25
    assert {prompt.tag for prompt in train} == {prompt.tag for prompt in test} and len({prompt.tag for prompt in test}) == 6
    assert {prompt.text for prompt in test} & {prompt.text for prompt in (*train, *other)} == set()
    for prompt in (*train, *test):
        check_metadata(prompt.metadata)
