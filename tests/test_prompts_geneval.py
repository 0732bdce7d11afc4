"""Prompt files as the benchmarks ship them: GenEval's metadata lines and OCR lines go in as they are and meet their scorers' checks."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from common.errors import DataError
from common.prompts import check_prompts, read_prompts
from common.types import Prompt
from deploy.geneval_prompts import geneval_line, make_prompts
from reward_servers.detection import Detection
from reward_servers.detectors.vocabulary import COCO_CLASSES, COLORS
from reward_servers.scorers.geneval import DetectedGenEval
from reward_servers.scorers.geneval_rules import TASKS
from reward_servers.scorers.ocr import OcrFlowGrpo, OcrStrict


class CocoDetector:
    """Knows what a detector of photographs knows, and finds nothing."""

    name = "coco"
    version = "0"
    labels: tuple[str, ...] = COCO_CLASSES
    colors: tuple[str, ...] = COLORS

    def detect(self, image: object) -> list[Detection]:
        """Find nothing."""
        return []


class SilentReader:
    """Reads nothing."""

    name = "silent"
    version = "0"

    def read(self, image: object) -> list[str]:
        """Read nothing."""
        return []


GENEVAL = DetectedGenEval("geneval_strict", CocoDetector())
# in the benchmark's manner, key by key; its own lines carry no exclude but for counting
LINES = (
    '{"tag": "single_object", "include": [{"class": "tv remote", "count": 1}], "prompt": "a photo of a tv remote"}',
    '{"tag": "two_object", "include": [{"class": "kite", "count": 1}, {"class": "sink", "count": 1}], "prompt": "a photo of a kite and a sink"}',
    '{"tag": "counting", "include": [{"class": "fork", "count": 3}], "exclude": [{"class": "fork", "count": 4}], "prompt": "a photo of three forks"}',
    '{"tag": "colors", "include": [{"class": "skis", "count": 1, "color": "pink"}], "prompt": "a photo of a pink skis"}',
    '{"tag": "position", "include": [{"class": "bowl", "count": 1}, {"class": "computer mouse", "count": 1, "position": ["below", 0]}], '
    '"prompt": "a photo of a computer mouse below a bowl"}',
    '{"tag": "color_attr", "include": [{"class": "tie", "count": 1, "color": "red"}, {"class": "dog", "count": 1, "color": "white"}], '
    '"prompt": "a photo of a red tie and a white dog"}',
)


def written(path: Path, lines: Sequence[str]) -> Path:
    path.write_bytes(("\n".join(lines) + "\n").encode())
    return path


def test_lines_in_genevals_own_form_are_accepted_as_they_are_for_all_six_tasks(tmp_path: Path) -> None:
    path = written(tmp_path / "evaluation_metadata.jsonl", LINES)
    prompts = read_prompts(path)
    check_prompts(prompts, [GENEVAL], path)
    assert [prompt.tag for prompt in prompts] == list(TASKS)
    for number, (prompt, line) in enumerate(zip(prompts, LINES, strict=True), start=1):
        row = json.loads(line)
        assert (prompt.id, prompt.text) == (str(number), row.pop("prompt"))
        assert prompt.metadata == row


def test_a_whole_file_of_the_projects_own_prompts_in_that_form_passes(tmp_path: Path) -> None:
    made = make_prompts(1, 100)
    path = written(tmp_path / "many.jsonl", [geneval_line(prompt) for prompt in made])
    prompts = read_prompts(path)
    check_prompts(prompts, [GENEVAL], path)
    assert Counter(prompt.tag for prompt in prompts) == {tag: 80 if tag == "single_object" else 100 for tag in TASKS}


def test_a_class_that_the_detector_does_not_know_is_named_with_its_line(tmp_path: Path) -> None:
    path = written(tmp_path / "p.jsonl", [*LINES[:2], LINES[2].replace('"fork"', '"spork"')])
    with pytest.raises(DataError, match=r"p\.jsonl: 1 of 3 prompts .*line 3: geneval_strict: metadata class 'spork'"):
        check_prompts(read_prompts(path), [GENEVAL], path)


def test_ocr_lines_are_accepted_as_they_are_with_commas_colons_unicode_and_windows_ends(tmp_path: Path) -> None:
    lines = (
        'A neon sign over a diner that reads "Open Late", in the rain at night.',
        'A chalkboard menu: "Soup & Salad: $4.50", surrounded by chalk flowers\r',
        'A book cover titled "L\'Été à Paris" — soft watercolors, 4k',
        'A stamp with the words "PAID", "2024" and a small eagle',
    )
    path = written(tmp_path / "test.txt", lines)
    prompts = read_prompts(path)
    check_prompts(prompts, [OcrFlowGrpo(SilentReader()), OcrStrict(SilentReader())], path)
    assert [prompt.text for prompt in prompts] == [line.strip() for line in lines]
    assert [prompt.id for prompt in prompts] == ["1", "2", "3", "4"]
    assert all(prompt.tag == "" for prompt in prompts)


def test_an_ocr_line_that_quotes_nothing_is_named_by_its_number(tmp_path: Path) -> None:
    path = written(tmp_path / "test.txt", ['A sign that says "STOP"', "", "A sign"])
    with pytest.raises(DataError, match="line 3: ocr_strict"):
        check_prompts(read_prompts(path), [OcrStrict(SilentReader())], path)


def test_a_prompt_of_ten_thousand_letters_is_a_prompt_like_any_other(tmp_path: Path) -> None:
    long = 'A wall covered by "' + "é" * 10_000 + '"'
    (prompt,) = read_prompts(written(tmp_path / "long.txt", [long]))
    assert prompt == Prompt(id="1", text=long)
    OcrStrict(SilentReader()).check_prompt(prompt)
