"""Prompt files, their check against scorers, and `reward test` on a folder."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import reward_servers.testing as reward_testing
from common.errors import DataError
from common.prompts import check_prompts, read_prompts
from reward_servers.registry import make_scorer


def written(path: Path, *lines: object) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n", encoding="utf-8")
    return path


def test_a_text_file_gives_a_prompt_a_line_with_the_line_number_as_id(tmp_path: Path) -> None:
    prompts = read_prompts(written(tmp_path / "p.txt", "a cat", "", 'a sign "é"'))
    assert [(p.id, p.text, dict(p.metadata)) for p in prompts] == [("1", "a cat", {}), ("3", 'a sign "é"', {})]


def test_json_lines_give_id_text_and_metadata(tmp_path: Path) -> None:
    rows = ({"id": "x", "text": "a cat", "metadata": {"tag": "t"}}, {"text": "a dog"}, {"id": 9, "text": "an eel"})
    path = written(tmp_path / "p.jsonl", *rows)
    assert [(p.id, p.text, p.tag) for p in read_prompts(path)] == [("x", "a cat", "t"), ("2", "a dog", ""), ("9", "an eel", "")]


def test_genevals_own_lines_are_taken_as_they_are(tmp_path: Path) -> None:
    row = {"tag": "single_object", "include": [{"class": "cow", "count": 1}], "prompt": "a photo of a cow"}
    (prompt,) = read_prompts(written(tmp_path / "p.jsonl", row))
    assert (prompt.id, prompt.text, prompt.tag) == ("1", "a photo of a cow", "single_object")
    assert prompt.metadata == {"tag": "single_object", "include": [{"class": "cow", "count": 1}]}


@pytest.mark.parametrize(
    ("name", "lines", "rule"),
    [
        ("p.jsonl", [{"text": "a"}, "{"], r"p\.jsonl:2: not JSON"),
        ("p.jsonl", ["[1]"], r"p\.jsonl:1: a list came"),
        ("p.jsonl", [{"id": "a"}], r'p\.jsonl:1: "text" is None'),
        ("p.jsonl", [{"text": "a", "tag": "b"}], r"p\.jsonl:1: unknown key 'tag'"),
        ("p.jsonl", [{"text": "a", "metadata": 3}], r'p\.jsonl:1: "metadata" is 3'),
        ("p.jsonl", [{"text": "a", "id": ""}], r'p\.jsonl:1: "id" is \'\''),
        ("p.jsonl", [{"id": "a", "text": "x"}, {"id": "a", "text": "y"}], r"p\.jsonl:2: the id 'a' already stands in line 1"),
        ("p.jsonl", [{"prompt": "a", "size": 3}], r"p\.jsonl:1: unknown key 'size' in a GenEval line"),
        ("p.txt", [""], "holds no prompt"),
        ("p.csv", ["a"], "suffix '.csv'"),
    ],
)
def test_a_bad_line_is_a_data_error_with_file_line_and_rule(tmp_path: Path, name: str, lines: list[object], rule: str) -> None:
    with pytest.raises(DataError, match=rule):
        read_prompts(written(tmp_path / name, *lines))


def test_a_missing_or_binary_file_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_prompts(tmp_path / "none.txt")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="UTF-8"):
        read_prompts(tmp_path / "b.txt")


def test_prompts_that_lack_what_their_rewards_need_are_named_by_line_ten_at_most(tmp_path: Path) -> None:
    path = written(tmp_path / "p.txt", 'a sign that says "HI"', "", *["a sign"] * 12)
    with pytest.raises(DataError, match=r"p\.txt: 12 of 13 prompts") as caught:
        check_prompts(read_prompts(path), [make_scorer("ocr_strict", {})], path)
    message = str(caught.value)
    assert [f"line {n}:" in message for n in (1, 3, 12, 13)] == [False, True, True, False]
    assert "ocr_strict" in message
    assert message.endswith("and 2 more")
    check_prompts(read_prompts(path)[:1], [make_scorer("ocr_strict", {})], path)


def test_prompts_that_came_from_no_file_are_named_by_id(tmp_path: Path) -> None:
    path = written(tmp_path / "p.jsonl", {"id": "lost", "text": "a sign"})
    with pytest.raises(DataError, match="prompt 'lost': ocr_strict"):
        check_prompts(read_prompts(path), [make_scorer("ocr_strict", {})], "elsewhere.jsonl")


@pytest.mark.parametrize("name", ["tiny-geneval", "tiny-ocr"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_the_shipped_prompts_carry_what_their_rewards_need(name: str, split: str) -> None:
    path = Path(__file__).parents[1] / "deploy" / "prompts" / name / f"{split}.jsonl"
    rewards = ("geneval_strict", "geneval_dense") if name == "tiny-geneval" else ("ocr_flowgrpo", "ocr_strict")
    prompts = read_prompts(path)
    check_prompts(prompts, [make_scorer(reward, {}) for reward in rewards], path)
    assert len(prompts) >= 100


def paint(path: Path, level: int) -> None:
    Image.fromarray(np.full((16, 16, 3), level, dtype=np.uint8)).save(path)


def test_a_folder_is_scored_by_prompt_id_with_a_row_an_image(tmp_path: Path) -> None:
    prompts = read_prompts(written(tmp_path / "p.txt", "one", "two"))
    images = tmp_path / "images"
    images.mkdir()
    for name, level in (("2_a", 0), ("1", 100), ("2_b", 200)):
        paint(images / f"{name}.png", level)
    table = reward_testing.test_scorer("jpeg_incompressibility", {}, images, prompts)
    expected = [("1.png", "1", "one"), ("2_a.png", "2", "two"), ("2_b.png", "2", "two")]
    assert [(row.image, row.prompt_id, row.text) for row in table.rows] == expected
    assert all(row.value is not None and 0.2 < row.value < 2 for row in table.rows)
    assert table.num_nulls == 0
    assert not table.has_non_finite
    assert table.images_per_s > 0
    assert table.mean == pytest.approx(sum(row.value or 0 for row in table.rows) / 3)


def test_a_folder_of_as_many_images_as_prompts_is_taken_in_natural_order(tmp_path: Path) -> None:
    prompts = read_prompts(written(tmp_path / "p.jsonl", *({"id": f"id{i}", "text": f"t{i}"} for i in range(11))))
    images = tmp_path / "images"
    images.mkdir()
    for i in range(11):
        paint(images / f"img{i}.png", i)
    pairs = [(file.name, prompt.id) for file, prompt in reward_testing.match_images(images, prompts)]
    assert pairs[9:] == [("img9.png", "id9"), ("img10.png", "id10")]
    (images / "img3.png").unlink()
    with pytest.raises(DataError, match="10 images for 11 prompts"):
        reward_testing.match_images(images, prompts)


def test_a_file_that_is_no_image_and_an_empty_folder_are_data_errors(tmp_path: Path) -> None:
    prompts = read_prompts(written(tmp_path / "p.txt", "one"))
    with pytest.raises(DataError, match="holds no image"):
        reward_testing.match_images(tmp_path, prompts)
    (tmp_path / "1.png").write_bytes(b"text")
    with pytest.raises(DataError, match="no readable image"):
        reward_testing.test_scorer("jpeg_incompressibility", {}, tmp_path, prompts)
