"""What scorers share: the per-image loop, the known case of the start gate, and defaults for user classes."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from common.errors import DataError, ScorerError, ScorerUnavailable
from common.types import Prompt, Score

Image = NDArray[np.uint8]
ImageJudge = Callable[[Image, Prompt], tuple[float, Mapping[str, float]]]
"""Scores one image [H, W, 3]: raw score and details. Raises ScorerError when it cannot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownCase:
    """An image whose score is known: what a start gate asks before any compute is spent."""

    image: Image  # [H, W, 3]
    prompt: Prompt
    expected: float
    tolerance: float


@runtime_checkable
class HasKnownCase(Protocol):
    """A scorer that can prove itself."""

    def known_case(self) -> KnownCase:
        """Return a fixed image with its prompt and its known score."""
        ...


class PlainScorer:
    """Defaults for scorers that judge every prompt and need nothing of it."""

    def applies_to(self, prompt: Prompt) -> bool:
        """Judge every prompt."""
        return True

    def check_prompt(self, prompt: Prompt) -> None:
        """Need nothing."""


def score_each(images: Image, prompts: Sequence[Prompt], judge: ImageJudge) -> list[Score]:
    """Score images one by one; an image whose judge raises ScorerError or DataError becomes a null with that text.

    Args:
        images: [B, H, W, 3] uint8 RGB.
        prompts: B prompts.
        judge: scores one image.

    Returns:
        B scores in order.
    """
    scores = []
    for index, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
        started = time.perf_counter()
        try:
            value, details = judge(image, prompt)
        except (ScorerError, DataError) as error:
            may_pass = isinstance(error, ScorerUnavailable)
            latency_s = time.perf_counter() - started
            scores.append(Score(sample_index=index, value=None, error=str(error), latency_s=latency_s, may_pass=may_pass))
        else:
            scores.append(Score(sample_index=index, value=value, details=details, latency_s=time.perf_counter() - started))
    return scores
