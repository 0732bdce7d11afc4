"""OCR rewards: distances counted by hand, and the real engine on rendered words."""

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from common.errors import DataError, ScorerError
from common.types import Prompt
from reward_servers.registry import check_known_score, make_scorer
from reward_servers.scorers.ocr import OcrFlowGrpo, OcrStrict, every_target, first_target, flowgrpo_reward, strict_reward

BLANK = np.zeros((1, 8, 8, 3), dtype=np.uint8)


class FixedReader:
    """Reads the same lines from every image."""

    name = "fixed"
    version = "0"

    def __init__(self, lines: Sequence[str]) -> None:
        self._lines = list(lines)

    def read(self, image: NDArray[np.uint8]) -> list[str]:
        """Return the fixed lines."""
        return self._lines


class BrokenReader(FixedReader):
    """Fails on every image."""

    def read(self, image: NDArray[np.uint8]) -> list[str]:
        """Fail."""
        raise ScorerError("engine gone")


def flowgrpo(prompt: str, lines: Sequence[str]) -> tuple[float | None, float]:
    (score,) = OcrFlowGrpo(FixedReader(lines)).score(BLANK, [Prompt(id="0", text=prompt)])
    return score.value, score.details["exact"]


def strict(prompt: str, lines: Sequence[str]) -> tuple[float | None, float]:
    (score,) = OcrStrict(FixedReader(lines)).score(BLANK, [Prompt(id="0", text=prompt)])
    return score.value, score.details["exact"]


@pytest.mark.parametrize(
    ("target", "recognized", "expected"),
    [
        ("cafe", "cafe", 1.0),
        ("cafe", "caf", 0.75),  # one letter missing of four
        ("cafe", "cake", 0.75),  # one replaced
        ("cafe", "cxfx", 0.5),  # two replaced
        ("cafe", "", 0.0),  # four missing
        ("cafe", "restaurant", 0.0),  # the distance is capped at the target's length
        ("straße", "strasse", 1 - 2 / 6),  # ß is one letter: replaced and one inserted
        ("ночь", "ночь", 1.0),
    ],
)
def test_the_reward_is_one_minus_the_edit_distance_over_the_targets_length(target: str, recognized: str, expected: float) -> None:
    assert strict_reward(target, recognized) == pytest.approx(expected, abs=1e-12)
    assert flowgrpo_reward(target, recognized) == pytest.approx(expected, abs=1e-12)


def test_a_substring_is_right_for_flowgrpo_and_costs_its_surroundings_in_strict() -> None:
    assert flowgrpo_reward("cafe", "mycafe2") == 1.0
    assert strict_reward("cafe", "mycafe2") == 1 - 3 / 4
    assert flowgrpo_reward("cafe", "cafecafe") == 1.0
    assert strict_reward("cafe", "cafecafe") == 0.0


def test_lines_are_joined_without_separator_and_compared_in_lower_case_without_spaces() -> None:
    prompt = 'a poster that says "Grand Opening!" in red'
    assert flowgrpo(prompt, ["GRAND", "Open ing!"]) == (1.0, 1.0)
    value, exact = flowgrpo(prompt, ["grand opening"])  # punctuation counts: 1 of 13 letters is missing
    assert value == pytest.approx(1 - 1 / 13)
    assert exact == 0.0


def test_flowgrpo_takes_the_first_straight_span_only_and_strict_takes_every_span() -> None:
    prompt = 'a sign "AB" above a sign “CD” and "EF"'
    assert first_target(prompt) == "ab"
    assert every_target(prompt) == "abcdef"
    assert flowgrpo(prompt, ["ab"]) == (1.0, 1.0)
    assert strict(prompt, ["ab"])[0] == pytest.approx(1 - 4 / 6)
    assert strict(prompt, ["AB", "CD", "EF"]) == (1.0, 1.0)


def test_exact_match_is_reported_beside_a_gifted_substring() -> None:
    assert flowgrpo('"hi"', ["oh hi!"]) == (1.0, 0.0)


@pytest.mark.parametrize("text", ["a sign", 'an inch is 1" long', 'a sign that says ""', 'a sign that says "  "'])
def test_a_prompt_without_quoted_text_is_a_data_error_that_names_the_rule(text: str) -> None:
    for scorer in (OcrFlowGrpo(FixedReader([])), OcrStrict(FixedReader([]))):
        with pytest.raises(DataError, match="double quotes"):
            scorer.check_prompt(Prompt(id="0", text=text))


def test_curly_quotes_serve_strict_only() -> None:
    prompt = Prompt(id="0", text="a sign that says “CAFE”")
    OcrStrict(FixedReader([])).check_prompt(prompt)
    with pytest.raises(DataError, match="straight"):
        OcrFlowGrpo(FixedReader([])).check_prompt(prompt)


def test_a_failing_engine_gives_a_null_with_its_reason_and_never_a_zero() -> None:
    (score,) = OcrFlowGrpo(BrokenReader([])).score(BLANK, [Prompt(id="0", text='"hi"')])
    assert score.value is None
    assert "engine gone" in score.error


def word_image(word: str, side: int = 128) -> NDArray[np.uint8]:
    canvas = Image.new("RGB", (side, side), (235, 235, 230))
    ImageDraw.Draw(canvas).text((side / 2, side / 2), word, font=ImageFont.load_default(size=36), fill=(20, 20, 90), anchor="mm")
    return np.asarray(canvas)


@pytest.mark.parametrize("name", ["ocr_flowgrpo", "ocr_strict"])
def test_the_real_engine_proves_itself_on_the_known_image(name: str) -> None:
    assert check_known_score(make_scorer(name, {}))


def test_the_real_engine_reads_words_whatever_the_batch_and_finds_no_text_in_an_empty_image() -> None:
    words = ("BREAD", "Stop", "exit")
    images = np.stack([*map(word_image, words), np.full((128, 128, 3), 230, dtype=np.uint8)])
    prompts = [Prompt(id=str(i), text=f'a sign that says "{word}"') for i, word in enumerate((*words, "void"))]
    scorer = make_scorer("ocr_flowgrpo", {})
    together = [score.value for score in scorer.score(images, prompts)]
    alone = [scorer.score(images[i : i + 1], prompts[i : i + 1])[0].value for i in range(4)]
    backwards = [score.value for score in scorer.score(images[::-1], prompts[::-1])][::-1]
    assert together == [1.0, 1.0, 1.0, 0.0]
    assert alone == together
    assert backwards == together


def test_an_engine_is_made_once_a_process() -> None:
    first, second = make_scorer("ocr_flowgrpo", {}), make_scorer("ocr_strict", {})
    assert isinstance(first, OcrFlowGrpo)
    assert isinstance(second, OcrStrict)
    assert first._reader._engine is second._reader._engine  # type: ignore[attr-defined]
