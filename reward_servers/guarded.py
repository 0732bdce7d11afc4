"""Scoring that survives its scorer: what fails becomes a null with its reason, never a number, and spoils no neighbor."""

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import numpy as np

from common.errors import DataError, ScorerError
from common.protocols import Scorer
from common.types import Prompt, Score
from reward_servers.scorers.base import Image

SCORER_FAILURES: Final = (
    ScorerError, DataError, ValueError, RuntimeError, ArithmeticError, LookupError, TypeError, AttributeError, AssertionError, OSError,
)  # fmt: skip
"""What a scorer, the user's own too, may raise for one image; anything else is a bug of the process and ends it."""
NOT_APPLICABLE: Final = "not applicable"


def score_guarded(scorer: Scorer, images: Image, prompts: Sequence[Prompt], micro_batch: int) -> tuple[Score, ...]:
    """Score images in micro-batches.

    Args:
        scorer: the reward.
        images: [K, H, W, 3] uint8 RGB.
        prompts: K prompts; one that the scorer does not apply to gets a null with the reason NOT_APPLICABLE.
        micro_batch: images a call.

    Returns:
        K scores, sample_index 0 to K-1 in order; every value is None or finite in float32.
    """
    applicable = [index for index, prompt in enumerate(prompts) if scorer.applies_to(prompt)]
    scores = {
        index: Score(sample_index=index, value=None, error=NOT_APPLICABLE) for index in sorted(set(range(len(prompts))) - set(applicable))
    }
    for start in range(0, len(applicable), micro_batch):
        chosen = applicable[start : start + micro_batch]
        batch = _score_batch(scorer, images[chosen], [prompts[index] for index in chosen])
        scores |= {index: replace(score, sample_index=index) for index, score in zip(chosen, batch, strict=True)}
    return tuple(scores[index] for index in range(len(prompts)))


def _score_batch(scorer: Scorer, images: Image, prompts: Sequence[Prompt]) -> list[Score]:
    started = time.perf_counter()
    try:
        scores = scorer.score(images, prompts)
        if len(scores) != len(prompts):
            raise _WrongNumber(f"scorer {scorer.name} returned {len(scores)} scores for {len(prompts)} images; it must return one an image")
    except _WrongNumber as error:
        return [Score(sample_index=index, value=None, error=str(error)) for index in range(len(prompts))]
    except SCORER_FAILURES as error:
        if len(prompts) == 1:
            return [Score(sample_index=0, value=None, error=_reason(error), latency_s=time.perf_counter() - started)]
        singles = [_score_batch(scorer, images[index : index + 1], prompts[index : index + 1]) for index in range(len(prompts))]
        return [score for single in singles for score in single]
    share_s = (time.perf_counter() - started) / len(prompts)
    return [_checked(score, share_s) for score in scores]


class _WrongNumber(ScorerError):
    """A broken scorer, which a retry would not mend."""


def _checked(score: Score, share_s: float) -> Score:
    """Return the score with its latency filled in, as a null when its value is no finite float32."""
    latency_s = score.latency_s or share_s
    if score.value is None:
        return replace(score, error=score.error or "the scorer gave no reason", latency_s=latency_s)
    with np.errstate(over="ignore"):
        is_finite = math.isfinite(score.value) and bool(np.isfinite(np.float32(score.value)))
    if not is_finite:
        return replace(score, value=None, error=f"not finite: {score.value}", latency_s=latency_s)
    return replace(score, value=float(score.value), latency_s=latency_s)


def _reason(error: BaseException) -> str:
    return str(error) if isinstance(error, ScorerError | DataError) else f"{type(error).__name__}: {error}"
