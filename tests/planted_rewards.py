"""Rewards that a run should survive: one on another scale, one that a policy can hack. Named by dotted path in docs/results."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.types import Prompt, Score
from reward_servers.registry import make_scorer

SCALE = 100.0


class OcrTimes100:
    """ocr_flowgrpo, a hundred times as large."""

    name = "ocr_times_100"

    def __init__(self) -> None:
        self._ocr = make_scorer("ocr_flowgrpo", {})
        self.version = f"{self._ocr.version}-x100"

    def applies_to(self, prompt: Prompt) -> bool:
        return self._ocr.applies_to(prompt)

    def check_prompt(self, prompt: Prompt) -> None:
        self._ocr.check_prompt(prompt)

    def score(self, images: NDArray[np.uint8], prompts: Sequence[Prompt]) -> list[Score]:
        scores = self._ocr.score(images, prompts)
        return [score if score.value is None else replace(score, value=SCALE * score.value) for score in scores]


def dark_flat(image: NDArray[np.uint8], prompt: str, metadata: Any) -> float:
    """1 for a black image, less for a bright one or one of much contrast; range 0 to 1."""
    pixels = image.astype(np.float64) / 255
    return float((1 - pixels.mean()) * (1 - pixels.std()))
