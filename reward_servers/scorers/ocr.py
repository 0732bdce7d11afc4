"""Visual text rendering: does the image say what the prompt puts between quotes?"""

import re
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
from PIL import Image as PillowImage
from PIL import ImageDraw, ImageFont
from rapidfuzz.distance import Levenshtein

from common.errors import DataError
from common.types import Prompt, Score
from reward_servers.scorers.base import Image, KnownCase, PlainScorer, score_each
from reward_servers.scorers.text_reader import TextReader

_STRAIGHT_SPAN: Final = re.compile(r'"([^"]*)"')
_ANY_SPAN: Final = re.compile(r'["“”]([^"“”]*)["“”]')
KNOWN_WORD: Final = "CAFE"


def normalized(text: str) -> str:
    """Return text in lower case without spaces; punctuation stays (Flow-GRPO's rule)."""
    return text.replace(" ", "").lower()


def first_target(prompt: str) -> str:
    """Return the normalized text between the first pair of straight double quotes.

    Raises:
        DataError: there is no such pair, or nothing but spaces in it.
    """
    match = _STRAIGHT_SPAN.search(prompt)
    if match is None or not normalized(match.group(1)):
        raise DataError(f'{prompt[:80]!r} names no text; it must stand between straight double quotes, e.g. a sign that says "CAFE"')
    return normalized(match.group(1))


def every_target(prompt: str) -> str:
    """Return the normalized texts of all quoted spans, straight or curly, joined in their order.

    Raises:
        DataError: no span holds any text.
    """
    target = "".join(normalized(span) for span in _ANY_SPAN.findall(prompt))
    if not target:
        raise DataError(f'{prompt[:80]!r} names no text; it must stand between double quotes, e.g. a sign that says "CAFE"')
    return target


def strict_reward(target: str, recognized: str) -> float:
    """Return 1 - min(Levenshtein(recognized, target), len(target)) / len(target), of normalized texts; in [0, 1]."""
    return 1.0 - min(Levenshtein.distance(recognized, target), len(target)) / len(target)


def flowgrpo_reward(target: str, recognized: str) -> float:
    """Return 1 when the target is a substring of the recognized text, else the strict reward (Flow-GRPO, flow_grpo/ocr.py)."""
    return 1.0 if target in recognized else strict_reward(target, recognized)


class OcrFlowGrpo(PlainScorer):
    """Flow-GRPO's OCR reward (Liu et al. 2025): the first straight-quoted span, free to stand inside other text.

    Deviation: PaddleOCR's current ONNX models in place of PaddleOCR 2.9.1.
    """

    name = "ocr_flowgrpo"

    def __init__(self, reader: TextReader) -> None:
        """Score with the lines of `reader`."""
        self._reader = reader
        self.version = f"1-{reader.version}"

    def check_prompt(self, prompt: Prompt) -> None:
        """Raise DataError when the prompt quotes nothing."""
        first_target(prompt.text)

    def score(self, images: Image, prompts: Sequence[Prompt]) -> list[Score]:
        """Score a batch [B, H, W, 3]; details: exact (0 or 1)."""
        return score_each(images, prompts, self._judge)

    def _judge(self, image: Image, prompt: Prompt) -> tuple[float, Mapping[str, float]]:
        target, recognized = first_target(prompt.text), _recognized(self._reader, image)
        return flowgrpo_reward(target, recognized), {"exact": float(recognized == target)}

    def known_case(self) -> KnownCase:
        """Return a rendered word, which scores 1."""
        return _known_case()


class OcrStrict(PlainScorer):
    """OCR without the substring gift: every quoted span counts, extra and repeated text costs; details: exact match."""

    name = "ocr_strict"

    def __init__(self, reader: TextReader) -> None:
        """Score with the lines of `reader`."""
        self._reader = reader
        self.version = f"1-{reader.version}"

    def check_prompt(self, prompt: Prompt) -> None:
        """Raise DataError when the prompt quotes nothing."""
        every_target(prompt.text)

    def score(self, images: Image, prompts: Sequence[Prompt]) -> list[Score]:
        """Score a batch [B, H, W, 3]; details: exact (0 or 1)."""
        return score_each(images, prompts, self._judge)

    def _judge(self, image: Image, prompt: Prompt) -> tuple[float, Mapping[str, float]]:
        target, recognized = every_target(prompt.text), _recognized(self._reader, image)
        return strict_reward(target, recognized), {"exact": float(recognized == target)}

    def known_case(self) -> KnownCase:
        """Return a rendered word, which scores 1."""
        return _known_case()


def _recognized(reader: TextReader, image: Image) -> str:
    return normalized("".join(reader.read(image)))


def _known_case() -> KnownCase:
    canvas = PillowImage.new("RGB", (128, 64), (240, 240, 240))
    font = ImageFont.load_default(size=36)
    ImageDraw.Draw(canvas).text((64, 32), KNOWN_WORD, font=font, fill=(20, 20, 30), anchor="mm")
    prompt = Prompt(id="known", text=f'a sign that says "{KNOWN_WORD}"')
    return KnownCase(image=np.asarray(canvas), prompt=prompt, expected=1.0, tolerance=1e-6)
